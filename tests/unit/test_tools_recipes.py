"""The tools' folders: recipes, series, templates and files agree, and what is wrong with them is said at once."""

from __future__ import annotations

import configparser
import re
import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline import patches, recipe, run
from pipeline.debroot import SCHEMA as ROOT_SCHEMA
from pipeline.debroot import Root
from pipeline.errors import BuildError
from pipeline.sources import Sources
from pipeline.store import Stage, Store
from tools import build

TOOLS = build.names()
RELEASE = "1.0a1b2c3d"
# Words that only mean something on Debian: packages install on Enterprise Linux 9 too.
DEBIAN_ONLY = re.compile(
    r"x86_64-linux-gnu|/var/lib/dpkg|/etc/default/|/etc/init\.d|"
    r"\b(dpkg|apt-get|update-rc\.d|invoke-rc\.d|deb-systemd-helper|adduser|addgroup|start-stop-daemon)\b"
)


def rendered(name: str) -> str:
    tool = build.read(name)
    return build.spec(tool, tool.version or "9.8.7", f"{tool.source}_9.8.7.tar.gz" if tool.source else "", RELEASE)


def section(text: str, name: str) -> str:
    """One scriptlet of a spec file, or ""."""
    match = re.search(
        rf"^%{name}\n(.*?)(?=^%(?:pre|post|preun|postun|files|install|changelog)\b|\Z)", text, re.M | re.S
    )
    return match[1] if match else ""


def unit(path: Path) -> configparser.ConfigParser:
    """A unit file; of a key that stands twice the last counts."""
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text(encoding="utf-8").replace("\\\n", ""))
    return parser


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A copy of the room with one tool in it."""
    copy = tmp_path / "tools"
    copy.mkdir()
    shutil.copy(build.ROOM / build.COMMON, copy)
    shutil.copytree(build.ROOM / "ipvsadm", copy / "ipvsadm")
    return copy


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


# --- what is in the repository


def test_the_room_has_the_three_tools_of_the_manual_and_ours() -> None:
    assert TOOLS == ["ipvsadm", "keepalived", "quagga", "toa-bpf"]
    assert [name for name in TOOLS if not build.read(name).source] == ["toa-bpf"]


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_is_sound(name: str) -> None:
    tool = build.read(name)
    assert bool(tool.version) != (tool.source in Sources().pins)
    series = patches.read(tool.folder)
    found = patches.lint(series)
    assert not found, found.lines
    assert sorted(path.name for path in (tool.folder / "patches").glob("*.patch")) == sorted(series.names)


@pytest.mark.parametrize("name", TOOLS)
def test_a_spec_renders_and_has_every_file_as_a_source(name: str) -> None:
    tool = build.read(name)
    text = rendered(name)
    assert "{{" not in text and "{%" not in text and "{#" not in text
    assert re.search(rf"^Name: +{tool.name}$", text, re.M)
    assert re.search(rf"^Release: +{re.escape(RELEASE)}$", text, re.M)
    sources = dict(re.findall(r"^Source(\d+): +(\S+)$", text, re.M))
    assert sources.pop("0", "") == (f"{tool.source}_9.8.7.tar.gz" if tool.source else "")
    assert tuple(sources[str(number)] for number in range(1, len(sources) + 1)) == tool.files
    used = set(re.findall(r"%\{SOURCE(\d+)\}", text))
    assert used == set(sources), "each file is installed, and nothing else"


@pytest.mark.parametrize("name", TOOLS)
def test_scriptlets_name_nothing_of_debian(name: str) -> None:
    text = rendered(name)
    for part in ("pre", "post", "preun", "postun"):
        found = DEBIAN_ONLY.search(section(text, part))
        assert found is None, f"%{part}: {found}"
    assert section(text, "post"), "the pattern of this test finds scriptlets"


@pytest.mark.parametrize("name", TOOLS)
def test_nothing_starts_by_itself(name: str) -> None:
    tool = build.read(name)
    text = rendered(name)
    for command in ("systemctl preset", "systemctl enable", "systemctl start", "systemctl restart", "try-restart"):
        assert command not in text, command
    presets = [path for path in tool.files if path.endswith(".preset")]
    lines = [
        line
        for path in presets
        for line in (tool.folder / path).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert sorted(lines) == sorted(f"disable {name}" for name in tool.units)
    assert set(tool.units) == {file for file in tool.files if file.endswith(".service")}


@pytest.mark.runs("sh")
@pytest.mark.parametrize(("left", "calls"), [(0, "unload\n"), (1, "")], ids=["removed", "upgraded"])
@pytest.mark.parametrize("status", [0, 1])
def test_programs_leave_the_kernel_with_their_package(tmp_path: Path, left: int, calls: str, status: int) -> None:
    """Not in an upgrade, which would lose the clients that are known; a failure does not keep the package."""
    program = tmp_path / "toa-bpf"
    program.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\nexit {status}\n', encoding="utf-8")
    program.chmod(0o755)
    (tmp_path / "calls").touch()
    script = section(rendered("toa-bpf"), "preun").replace("%{_sbindir}", str(tmp_path))
    # With -e each command counts, wherever it stands; with this PATH no systemctl of this machine is asked.
    run.run(["/bin/sh", "-ec", script, "preun", str(left)], env={"PATH": str(tmp_path)})
    assert (tmp_path / "calls").read_text(encoding="utf-8") == calls


UNITS = [(name, file) for name in TOOLS for file in build.read(name).units]


@pytest.mark.parametrize(("name", "file"), UNITS)
def test_a_unit_waits_for_its_configuration(name: str, file: str) -> None:
    path = build.ROOM / name / file
    parsed = unit(path)
    assert "ConditionPathExists" in parsed["Unit"], "a daemon without a configuration must not start"
    assert parsed["Unit"]["Documentation"].startswith("man:")
    assert parsed["Install"]["WantedBy"] == "multi-user.target"
    assert not DEBIAN_ONLY.search(path.read_text(encoding="utf-8"))


def test_what_comes_before_the_network_waits_for_nothing_that_may_come_after_it() -> None:
    """A distribution's cloud-init puts sysinit.target after the network: with default dependencies it is a cycle."""
    parts = {f"{name}/{file}": unit(build.ROOM / name / file)["Unit"] for name, file in UNITS}
    early = {path: part for path, part in parts.items() if "network-pre.target" in part.get("Before", "").split()}
    assert "toa-bpf/toa-bpf.service" in early
    for path, part in early.items():
        assert part.get("DefaultDependencies") == "no", path
        # What the default would have said besides.
        assert part["Conflicts"] == "shutdown.target" and "shutdown.target" in part["Before"].split(), path
        late = {"local-fs.target", "sysinit.target", "basic.target", "network.target", "cloud-init.service"}
        assert not late & set(part["After"].split()), path
        service = unit(build.ROOM / path)["Service"]
        assert service["Type"] != "oneshot" or "TimeoutStartSec" in service, f"{path}: by default it has no limit"


def test_keepalived_reloads_by_signal_and_says_when_it_is_ready() -> None:
    service = unit(build.ROOM / "keepalived" / "keepalived.service")["Service"]
    assert service["Type"] == "notify"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"


def test_routing_daemons_start_as_the_manual_types_them() -> None:
    room = build.ROOM / "quagga"
    assert unit(room / "zebra.service")["Service"]["ExecStart"] == (
        "/usr/sbin/zebra -d $ZEBRA_OPTS -f /etc/quagga/zebra.conf"
    )
    text = (room / "ospfd.service").read_text(encoding="utf-8")
    # the operations manual calls the file ospf.conf; the daemon's own name for it is ospfd.conf
    assert "ConditionPathExists=|/etc/quagga/ospfd.conf" in text
    assert "ConditionPathExists=|/etc/quagga/ospf.conf" in text
    assert '/usr/sbin/ospfd -d $OSPFD_OPTS -f "$f"' in text


def test_the_daemons_terminal_listens_on_loopback_only() -> None:
    text = (build.ROOM / "quagga" / "frr.sysconfig").read_text(encoding="utf-8")
    options = dict(re.findall(r'^([A-Z0-9]+)_OPTS="(.*)"$', text, re.M))
    options.pop("WATCH", None)
    daemons = {file.split(".")[0].upper() for file in build.read("quagga").units} - {"WATCHFRR"}
    assert set(options) == daemons
    assert set(options.values()) <= {"-A 127.0.0.1", "-A ::1"}


def test_logs_of_the_manual_can_be_written_and_are_rotated() -> None:
    room = build.ROOM / "quagga"
    rotated = (room / "frr.logrotate").read_text(encoding="utf-8")
    made = (room / "frr.tmpfiles").read_text(encoding="utf-8")
    for log in ("/var/log/zebra.log", "/var/log/ospf.log"):
        assert log in rotated
        assert f"f {log} 0640 frr frr -" in made


def test_logs_of_the_routing_daemons_have_a_limit_and_root_signals_nobody_that_frr_names() -> None:
    """What stands in the daemons' own files must not choose which process gets root's SIGUSR1, which ends most."""
    text = (build.ROOM / "quagga" / "frr.logrotate").read_text(encoding="utf-8")
    blocks = re.findall(r"^/.+?^}$", text, re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        assert "\n    maxsize 100M\n" in block
        (script,) = re.findall(r"^    postrotate\n(.+?)^    endscript$", block, re.M | re.S)
        as_frr = re.findall(r"^ *setpriv --reuid=frr --regid=frr --clear-groups sh -c '[^']+'$", script, re.M)
        rest = re.sub(r"^ *#.*", "", script.replace("".join(as_frr), ""), flags=re.M)
        assert len(as_frr) == 1 and "kill -USR1" in as_frr[0] and not rest.strip()


def test_no_link_of_the_routing_daemons_leads_root_astray() -> None:
    """Their folder is their own; without -h chown changes what a link in it points to."""
    units = [build.ROOM / "quagga" / file for file in build.read("quagga").units]
    texts = [path.read_text(encoding="utf-8") for path in units if path.name != "watchfrr.service"]
    assert len(texts) == 5
    for text in texts:
        assert re.findall(r"chown\b.*? frr:frr", text) == ["chown -h frr:frr"]


def test_the_build_root_is_a_valid_recipe() -> None:
    root = recipe.load(build.ROOM / "root.yaml", ROOT_SCHEMA)
    assert {"gcc", "rpm", "ccache", "libyang2-dev"} <= set(root["packages"])


def test_a_tool_with_a_root_of_its_own_is_built_in_that(store: Store) -> None:
    room = build.Tools(store, Sources(store), cast(Root, FakeRoot()))
    assert [root.name for root in room.roots()[1:]] == ["root-toa-bpf"]
    assert {"gcc", "rpm", "ccache", "clang"} <= set(room.root_of("toa-bpf").recipe["packages"])
    assert room.root_of("ipvsadm") is room.root


# --- bad input


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("release: 1", "release: 1\nrelaese: 2", "unknown key relaese"),
        ("release: 1", "release: one", "release: 'one' is not of type 'integer'"),
        ("release: 1", "release: 0", "release: 0 is less than the minimum"),
        ("name: ipvsadm", "name: IPVSadm", "name: 'IPVSadm' does not match"),
        ("source: ipvsadm", "", "is not valid under any of the given schemas"),
        ("source: ipvsadm", 'source: ipvsadm\nversion: "1.0"', "is valid under each of"),
        ("Linux Virtual Server", "Linux Virtual Server.", "summary:"),
        ("- ipvsadm.preset", "- ../ipvsadm.preset", "files[2]:"),
        ("- ipvsadm.preset", "- ipvsadm.presett", "files[2]: tools/ipvsadm/ipvsadm.presett does not exist"),
        ("- ipvsadm.preset", "", "files: tools/ipvsadm/ipvsadm.preset is not listed"),
        ("units:\n  - ipvsadm.service", "units:\n  - other.service", "units[0]: other.service is not among the files"),
        ("name: ipvsadm", "name: other", "name: tools/ipvsadm/other.spec.j2 does not exist"),
    ],
)
def test_a_wrong_recipe_is_refused(room: Path, old: str, new: str, said: str) -> None:
    edit(room / "ipvsadm" / "recipe.yaml", old, new)
    with pytest.raises(BuildError) as caught:
        build.read("ipvsadm", room)
    assert said in str(caught.value)
    assert "correct" in caught.value.hint


def test_all_that_is_wrong_is_said_at_once(room: Path) -> None:
    edit(room / "ipvsadm" / "recipe.yaml", "- ipvsadm.preset", "- missing.one\n  - missing.two")
    with pytest.raises(BuildError) as caught:
        build.read("ipvsadm", room)
    assert len(caught.value.details) == 3, "two missing files, one that is not listed"


def test_an_unknown_tool_names_those_that_exist() -> None:
    with pytest.raises(BuildError) as caught:
        build.read("haproxy")
    assert "ipvsadm|keepalived|quagga|toa-bpf" in caught.value.hint


def test_a_template_with_an_unknown_name_is_refused_with_its_place(room: Path) -> None:
    edit(room / "ipvsadm" / "ipvsadm.spec.j2", "%description", "%description {{ colour }}")
    with pytest.raises(BuildError) as caught:
        build.spec(build.read("ipvsadm", room), "1", "a.tar", RELEASE)
    assert "'colour' is undefined" in caught.value.message


# --- keys


class FakeRoot:
    """A build root that needs no archive."""

    def __init__(self, version: str = "1") -> None:
        self.version = version

    def stage(self) -> Stage:
        return Stage("root-tools", {"version": self.version}, lambda _: None)


def key(room: Path, store: Store, root: str = "1") -> str:
    return build.Tools(store, Sources(store), cast(Root, FakeRoot(root)), room).stage("ipvsadm").key


@pytest.mark.parametrize(
    "changed", ["ipvsadm/recipe.yaml", "ipvsadm/ipvsadm.spec.j2", "ipvsadm/ipvsadm.service", build.COMMON]
)
def test_what_goes_into_a_package_is_in_its_key(room: Path, store: Store, changed: str) -> None:
    before = key(room, store)
    path = room / changed
    if changed.endswith("recipe.yaml"):
        edit(path, "release: 1", "release: 2")
    else:
        path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert key(room, store) != before


def test_a_patch_and_the_root_are_in_the_key(room: Path, store: Store) -> None:
    before = key(room, store)
    assert key(room, store) == before
    assert key(room, store, root="2") != before
    (room / "ipvsadm" / "patches").mkdir(exist_ok=True)
    (room / "ipvsadm" / "patches" / "0001-x.patch").write_text("x\n", encoding="utf-8")
    with (room / "ipvsadm" / "series").open("a", encoding="utf-8") as series:
        series.write("0001-x.patch\n")
    assert key(room, store) != before


def test_a_comment_in_a_recipe_builds_nothing(room: Path, store: Store) -> None:
    before = key(room, store)
    edit(room / "ipvsadm" / "recipe.yaml", "release: 1", "release: 1   # for now")
    assert key(room, store) == before


def test_the_release_ends_with_the_key(room: Path, store: Store) -> None:
    tools = build.Tools(store, Sources(store), cast(Root, FakeRoot()), room)
    assert tools.release("ipvsadm") == f"1.{tools.stage('ipvsadm').key[:8]}"


def test_a_variant_is_another_stage_and_leaves_the_tool_alone(room: Path, store: Store) -> None:
    shutil.copytree(build.ROOM / "keepalived", room / "keepalived")
    tools = build.Tools(store, Sources(store), cast(Root, FakeRoot()), room)
    shipped = tools.stage("keepalived")
    sanitized = tools.variant("keepalived", "sanitized", switches=["sanitizers"], root=cast(Root, FakeRoot("2")))
    stock = tools.variant("keepalived", "stock", series=False)
    assert [stage.name for stage in (sanitized, stock)] == ["tool-keepalived-sanitized", "tool-keepalived-stock"]
    assert (sanitized.inputs["series"], stock.inputs["series"]) == (shipped.inputs["series"], [])
    assert (sanitized.inputs["switches"], stock.inputs["switches"]) == (["sanitizers"], [])
    assert sanitized.needs != stock.needs
    assert tools.variant("keepalived", "sanitized").key != sanitized.key
    assert tools.stage("keepalived").key == shipped.key


def test_a_new_tool_is_a_new_folder_and_no_python(room: Path, store: Store) -> None:
    shutil.copytree(room / "ipvsadm", room / "another")
    tools = build.Tools(store, Sources(store), cast(Root, FakeRoot()), room)
    assert [stage.name for stage in tools.all_stages()] == ["tool-another", "tool-ipvsadm"]


def test_the_table_of_el9_libraries_is_well_formed() -> None:
    table: dict[str, Any] = recipe.load(
        build.ROOM / "el9-sonames.yaml",
        {
            "type": "object",
            "additionalProperties": False,
            "required": ["limits", "sonames", "others"],
            "properties": {
                "limits": {"type": "object", "additionalProperties": {"type": "string"}},
                "sonames": {
                    "type": "object",
                    "patternProperties": {
                        r"\.so\.\d+$": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["package", "repository"],
                            "properties": {
                                "package": {"type": "string"},
                                "repository": {"enum": ["baseos", "appstream"]},
                                "versions": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                            },
                        }
                    },
                    "additionalProperties": False,
                },
                "others": {"type": "array", "items": {"type": "string"}},
            },
        },
    )
    assert table["limits"]["GLIBC"] == "2.34"
