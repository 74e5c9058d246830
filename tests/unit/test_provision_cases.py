"""Rendering by golden cases: `tests/cases/render/<case>/`.

    cluster.yaml  the input; what it refers to lies beside it
    expected/     what is rendered, a folder for each host, without the disk images

After a wanted change, render the case (`invoke render --cluster …`; SECRETS below are its environment), copy it over
expected/ without seed.iso, and read the diff.
"""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import recipe, run, seed
from provision import cluster as model
from provision import render
from provision.model import Check, Director

TOP = Path(__file__).parent.parent.parent
CASES = sorted(p for p in (TOP / "tests/cases/render").iterdir() if p.is_dir())
EXAMPLES = sorted((TOP / "provision/examples").glob("*.yaml"))
ALL = [*(case / "cluster.yaml" for case in CASES), *EXAMPLES]
BLOCK = 2048
# The manual's own, known to everybody.
SECRETS = {"OSPF_KEY": "123456", "VTY_PASSWORD": "123456", "VRRP_PASSWORD": "123456"}
# The manual prints the same as the hash of a password, which it cannot be: here it has a hash's form.
SECRETS["VTY_HASH"] = "ab1234567890."


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def name_of(path: Path) -> str:
    return path.parent.name if path.name == "cluster.yaml" else path.stem


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_there_are_cases() -> None:
    assert len(CASES) >= 4
    assert {"manual-ospf.yaml", "manual-vrrp.yaml"} <= {p.name for p in EXAMPLES}
    assert all((case / "expected").is_dir() for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_case(case: Path, tmp_path: Path) -> None:
    targets = render.render_cluster(case / "cluster.yaml", tmp_path / "out")
    data = yaml.safe_load((case / "cluster.yaml").read_text(encoding="utf-8"))
    assert [p.name for p in targets] == [
        host["name"] for kind in ("directors", "real_servers") for host in data.get(kind, [])
    ]
    rendered = contents(tmp_path / "out")
    for target in targets:
        assert rendered.pop(f"{target.name}/seed.iso")
    assert rendered == contents(case / "expected")


# --- the manual

MANUAL = TOP / "provision/examples/manual"


def statements(text: str) -> list[str]:
    """A configuration as its statements: without comments, blank lines, indentation and a space after a quote."""
    found = []
    for line in re.sub(r"/\*.*?\*/", "", text, flags=re.S).splitlines():
        words = re.sub(r"^\s*[#!].*", "", line).replace('" ', '"').split()
        if words:
            found.append(" ".join(words))
    return found


def blocks(lines: list[str]) -> list[Any]:
    """Statements with what they enclose, in an order of their own: that of the manual is not asked for."""
    found: list[Any] = []
    while lines:
        line = lines.pop(0)
        if line == "}":
            break
        found.append((line, blocks(lines)) if line.endswith("{") else (line, []))
    return sorted(found, key=repr)


def flat(lines: list[str]) -> list[Any]:
    """The routing daemons' configuration: lines belong to the `interface` or `router` above them."""
    found: dict[str, list[str]] = {"": []}
    section = ""
    for line in lines:
        if line.split()[0] in ("interface", "router"):
            section = line
            found[section] = []
        else:
            found[section].append(line)
    return sorted((name, sorted(below)) for name, below in found.items())


# What the manual does not have: OSPF's own way to a VIP that has just gone is not taken.
ADDED = {
    "quagga/zebra.conf": [
        "route-map learnt deny 10",
        "match interface lo",
        "route-map learnt permit 20",
        "ip protocol ospf route-map learnt",
    ]
}


@pytest.mark.parametrize(
    ("example", "host", "printed", "rendered"),
    [
        ("ospf", "lvs-4", "keepalived/keepalived.conf", "keepalived/keepalived.conf"),
        ("ospf", "lvs-4", "keepalived/taobao.conf", "keepalived/taobao.conf"),
        ("ospf", "lvs-4", "quagga/zebra.conf", "quagga/zebra.conf"),
        ("ospf", "lvs-4", "quagga/ospf.conf", "quagga/ospfd.conf"),
        ("vrrp", "lvs-1", "keepalived/keepalived.conf", "keepalived/keepalived.conf"),
        ("vrrp", "lvs-1", "keepalived/taobao.conf", "keepalived/taobao.conf"),
    ],
)
def test_the_manual_is_rendered(example: str, host: str, printed: str, rendered: str, tmp_path: Path) -> None:
    """The manual's examples as cluster files come out as the manual prints them, up to order, comments and `ADDED`."""
    render.render_cluster(TOP / f"provision/examples/manual-{example}.yaml", tmp_path)
    text = (MANUAL / example / "etc" / printed).read_text(encoding="utf-8")
    wanted = statements(text.replace("password 8 123456", f"password 8 {SECRETS['VTY_HASH']}"))
    got = statements((tmp_path / host / "rootfs/etc" / rendered).read_text(encoding="utf-8"))
    shape = blocks if "keepalived" in printed else flat
    assert wanted
    assert shape(list(got)) == shape([*wanted, *ADDED.get(printed, [])])
    # and the order as well, which is how people compare
    if "quagga" not in printed:
        assert got == wanted


def test_the_backup_differs_where_the_manual_says(tmp_path: Path) -> None:
    """Section 2: `state MASTER/BACKUP`, `priority 150/90`; and local addresses, which must not be on two directors."""
    render.render_cluster(TOP / "provision/examples/manual-vrrp.yaml", tmp_path)
    master, backup = (
        {
            name: statements((tmp_path / host / "rootfs/etc/keepalived" / name).read_text(encoding="utf-8"))
            for name in ("keepalived.conf", "taobao.conf")
        }
        for host in ("lvs-1", "lvs-2")
    )
    differ = [(a, b) for a, b in zip(master["taobao.conf"], backup["taobao.conf"], strict=True) if a != b]
    assert differ == [("state MASTER", "state BACKUP"), ("priority 150", "priority 90")]
    assert [line for line in backup["keepalived.conf"] if line not in master["keepalived.conf"]] == [
        f"192.168.100.{n}" for n in range(6, 11)
    ]


@pytest.mark.parametrize(
    ("interface", "downlink", "tracked"),
    [("uplink", "eth1", "eth1"), ("downlink", "eth1", "eth0"), ("uplink", "eth0", "")],
    ids=["where VIPs come in", "where they go out", "one arm"],
)
def test_a_master_gives_vips_away_when_its_other_interface_is_dead(
    interface: str, downlink: str, tracked: str, tmp_path: Path
) -> None:
    data = yaml.safe_load((TOP / "provision/examples/lab-vrrp.yaml").read_text(encoding="utf-8"))
    data["vrrp"]["instances"][0]["interface"] = interface
    data["local_addresses"]["laddr_g1"]["routed"] = True  # on one arm they are on no network of the downlink
    for director in data["directors"]:
        director["downlink"] = downlink
    for track in (True, False):
        data["vrrp"]["instances"][0]["track"] = track
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
        render.render_cluster(tmp_path / "cluster.yaml", tmp_path / "out")
        for host in ("lvs-1", "lvs-2"):
            text = (tmp_path / "out" / host / "rootfs/etc/keepalived/web.conf").read_text(encoding="utf-8")
            found = re.findall(r"    track_interface \{\n        (\S+)\n    \}\n", text)
            assert found == ([tracked] if tracked and track else [])
            # The pages of `web` are asked for every 2 s, and then once more; a try may take 2 s.
            found = re.findall(r"^    (state|preempt_delay) (.+)$", text, re.MULTILINE)
            alone = downlink == "eth1" and interface == "uplink" and not track
            first = "MASTER" if host == "lvs-1" else "BACKUP"
            assert found == ([("state", first)] if alone else [("state", "BACKUP"), ("preempt_delay", "7")])


@pytest.mark.parametrize(
    ("check", "seconds"),
    [
        (Check("none"), 0),
        (Check("tcp", connect_timeout=5), 12),
        (Check("tcp", connect_timeout=5, delay_before_retry=30), 12),
        (Check("http", connect_timeout=3), 17),
        (Check("https", connect_timeout=3, delay_before_retry=10), 20),
    ],
)
def test_how_long_a_check_takes_to_find_a_real_server_again(check: Check, seconds: int) -> None:
    assert check.revival(7) == seconds


def test_a_master_comes_back_after_the_slowest_check(tmp_path: Path) -> None:
    data = yaml.safe_load((TOP / "provision/examples/lab-vrrp.yaml").read_text(encoding="utf-8"))

    def rendered() -> list[str]:
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
        render.render_cluster(tmp_path / "cluster.yaml", tmp_path / "out")
        (text,) = (
            text
            for file in (tmp_path / "out/lvs-1/rootfs/etc/keepalived").iterdir()
            if "vrrp_instance" in (text := file.read_text(encoding="utf-8"))
        )
        return re.findall(r"^    (state \S+|preempt_delay \S+)$", text, re.MULTILINE)

    for delay_loop, seconds in ((60, 2 + 60 + 60 + 1), (600, 1000)):
        data["services"][0]["delay_loop"] = delay_loop
        assert rendered() == ["state BACKUP", f"preempt_delay {seconds}"]
    for service in data["services"]:
        service["check"] = {"none": True}
    assert rendered() == ["state MASTER"]


def test_a_directors_instances_come_back_together(tmp_path: Path) -> None:
    """With NAT, a master of the clients' VIPs that has not the real servers' gateway loses every answer."""
    data = yaml.safe_load((TOP / "provision/examples/lab-vrrp.yaml").read_text(encoding="utf-8"))
    data["vrrp"]["instances"] += [{"name": "GATEWAY", "id": 201, "interface": "downlink"}]
    for service in data["services"]:
        service["instance"] = "VI_1"
    gateway = {"name": "gateway", "instance": "GATEWAY", "check": {"none": True}, "vips": ["203.0.113.3"]}
    data["services"] += [{**copy.deepcopy(data["services"][1]), **gateway}]
    for tracked in (True, False):
        data["vrrp"]["instances"][0]["track"] = tracked
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
        render.render_cluster(tmp_path / "cluster.yaml", tmp_path / "out")
        for name in ("web", "gateway"):
            text = (tmp_path / "out/lvs-1/rootfs/etc/keepalived" / f"{name}.conf").read_text(encoding="utf-8")
            assert re.findall(r"^    (state \S+|preempt_delay \S+)$", text, re.MULTILINE) == [
                "state BACKUP",
                "preempt_delay 7",
            ]


@pytest.mark.parametrize("priority", [None, 0, 7])
def test_who_may_be_the_designated_router(priority: int | None, tmp_path: Path) -> None:
    """Said to both daemons, on the uplink; nothing where the cluster file says nothing."""
    data = yaml.safe_load((TOP / "provision/examples/lab-ospf.yaml").read_text(encoding="utf-8"))
    data["ospf"].pop("dr_priority")
    if priority is not None:
        data["ospf"]["dr_priority"] = priority
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    render.render_cluster(tmp_path / "cluster.yaml", tmp_path / "out")
    for daemon, word in (("ospfd", "ip ospf"), ("ospf6d", "ipv6 ospf6")):
        text = (tmp_path / "out/lvs-1/rootfs/etc/quagga" / f"{daemon}.conf").read_text(encoding="utf-8")
        uplink = text.partition("interface eth0\n")[2].partition("!")[0]
        assert re.findall(rf"^ {word} priority (\d+)$", uplink, re.MULTILINE) == (
            [] if priority is None else [str(priority)]
        )
        assert text.count(" priority ") == (priority is not None)


def test_the_manuals_other_data(tmp_path: Path) -> None:
    """1c and 2c: sysctl; 1f: local addresses on the downlink."""
    settings = {}
    for example, host in (("ospf", "lvs-4"), ("vrrp", "lvs-1")):
        render.render_cluster(TOP / f"provision/examples/manual-{example}.yaml", tmp_path)
        settings[example] = statements(
            (tmp_path / host / "rootfs/etc/sysctl.d/70-host.conf").read_text(encoding="utf-8")
        )
        assert statements((tmp_path / host / "rootfs/etc/lvs/host.conf").read_text(encoding="utf-8")) == [
            "UPLINK=eth0",
            "DOWNLINK=eth1",
            'LOCAL_ADDRESSES="192.168.100.1 192.168.100.2 192.168.100.3 192.168.100.4 192.168.100.5"',
        ]
    assert settings == {
        "ospf": [
            "net.ipv4.conf.all.arp_ignore = 1",
            "net.ipv4.conf.all.arp_announce = 2",
            "net.core.netdev_max_backlog = 500000",
        ],
        "vrrp": ["net.core.netdev_max_backlog = 500000"],
    }


# --- seeds


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_the_seed_carries_the_files(path: Path, tmp_path: Path) -> None:
    for target in render.render_cluster(path, tmp_path):
        text = (target / "seed/user-data").read_text(encoding="utf-8")
        assert text.startswith("#cloud-config\n")
        user = yaml.safe_load(text)
        root = target / "rootfs"
        on_disk = {
            "/" + p.relative_to(root).as_posix(): (p.read_bytes(), p.stat().st_mode & 0o7777)
            for p in root.rglob("*")
            if p.is_file()
        }
        written = {f["path"]: (f["content"].encode(), int(f["permissions"], 8)) for f in user.get("write_files", [])}
        assert written == on_disk
        assert not {"password", "chpasswd", "passwd", "ssh_pwauth", "users"} & user.keys()
        assert user["ssh_authorized_keys"]
        listed = on_disk.get("/etc/lvs/files", (b"", 0))[0].decode().split()
        assert listed == sorted(on_disk.keys() - {"/etc/lvs/files"})


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_secrets_are_not_for_everybody(path: Path, tmp_path: Path) -> None:
    for target in render.render_cluster(path, tmp_path):
        assert target.stat().st_mode & 0o077 == 0
        for file in (target / "rootfs").rglob("*.conf"):
            if "123456" in file.read_text(encoding="utf-8"):
                assert file.stat().st_mode & 0o007 == 0, file


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_the_disk_carries_the_seed(path: Path, tmp_path: Path) -> None:
    for target in render.render_cluster(path, tmp_path):
        image = (target / "seed.iso").read_bytes()
        assert seed.LABEL.encode() in image[16 * BLOCK : 17 * BLOCK]
        parts = {p.name: p.read_bytes() for p in (target / "seed").iterdir()}
        assert parts.keys() <= set(seed.FILES)
        for name, content in parts.items():
            assert name.encode() in image
            assert image.index(content) % BLOCK == 0


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_the_same_input_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    render.render_cluster(path, tmp_path / "one")
    first = contents(tmp_path / "one")
    render.render_cluster(path, tmp_path / "other")
    render.render_cluster(path, tmp_path / "one")
    assert first == contents(tmp_path / "one") == contents(tmp_path / "other")


def test_one_host_alone_is_the_same(tmp_path: Path) -> None:
    render.render_cluster(EXAMPLES[0], tmp_path / "all")
    (target,) = render.render_cluster(EXAMPLES[0], tmp_path / "one", ["rs-1"])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["rs-1"]
    assert contents(target) == contents(tmp_path / "all/rs-1")


def turned(data: Any) -> Any:
    """The same mappings, each with its keys the other way round."""
    if isinstance(data, dict):
        return {key: turned(data[key]) for key in reversed(data)}
    return [turned(item) for item in data] if isinstance(data, list) else data


def test_mappings_in_another_order_are_the_same_hosts(tmp_path: Path) -> None:
    """Keys of a mapping have no order, so a file whose keys are sorted otherwise must not become new instances."""
    case = TOP / "tests/cases/render/real-servers"
    shutil.copytree(case, tmp_path / "in")
    data = yaml.safe_load((case / "cluster.yaml").read_text(encoding="utf-8"))
    (tmp_path / "in/cluster.yaml").write_text(yaml.safe_dump(turned(data), sort_keys=False), encoding="utf-8")
    render.render_cluster(tmp_path / "in/cluster.yaml", tmp_path / "a")
    render.render_cluster(case / "cluster.yaml", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_the_model_and_its_schema_agree(path: Path) -> None:
    """Examples and cases use every key that the schema knows, so that none is accepted and then forgotten."""
    assert not recipe.check(yaml.safe_load(path.read_text(encoding="utf-8")), model.SCHEMA, "")


def used_keys(data: Any, schema: Any, place: str = "") -> set[str]:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        schema, place = model.SCHEMA["$defs"][name], f"{name}."
    found: set[str] = set()
    if isinstance(data, dict):
        for key, value in data.items():
            known = schema.get("properties", {})
            if key in known:
                found |= {f"{place}{key}"} | used_keys(value, known[key], f"{place}{key}.")
            else:
                found |= used_keys(value, schema.get("additionalProperties") or {}, place)
    elif isinstance(data, list):
        for item in data:
            found |= used_keys(item, schema.get("items", {}), place)
    return found


def known_keys(schema: Any, place: str = "") -> set[str]:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        schema, place = model.SCHEMA["$defs"][name], f"{name}."
    found: set[str] = set()
    for key, below in schema.get("properties", {}).items():
        found |= {f"{place}{key}"} | known_keys(below, f"{place}{key}.")
    for below in (schema.get("additionalProperties"), schema.get("items")):
        if isinstance(below, dict):
            found |= known_keys(below, place)
    return found


# A file that others may not read cannot be kept in a repository: unit tests of the rules write one.
SECRETS_IN_FILES = ("secret.file",)


def test_the_cases_use_every_key() -> None:
    used: set[str] = set()
    for path in ALL:
        used |= used_keys(yaml.safe_load(path.read_text(encoding="utf-8")), model.SCHEMA)
    assert known_keys(model.SCHEMA) - used == set(SECRETS_IN_FILES)
    assert used <= known_keys(model.SCHEMA)
    assert len(used) > 100


def test_no_remark_of_the_manual_is_left() -> None:
    files = [p for p in (TOP / "provision/examples/manual").rglob("*") if p.suffix == ".conf"]
    assert len(files) == 6
    assert not [p for p in files if re.search(r"//|[^\x00-\x7f]", p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", ALL, ids=name_of)
@pytest.mark.runs("bash")
def test_the_image_understands_host_conf(path: Path, tmp_path: Path) -> None:
    """/etc/rc.local of the director's image, with recording tools in the place of the real ones."""
    script = TOP / "image/director/rootfs/etc/rc.local"
    render.render_cluster(path, tmp_path)
    directors = model.load(path).directors
    assert directors
    for host in directors:
        root = tmp_path / host.name / "rootfs"
        log = play(root, script, host)
        added = [line.split() for line in log if line.startswith("ip address replace ")]
        assert [words[3].split("/")[0] for words in added] == list(map(str, host.all_local_addresses))
        assert {words[5] for words in added} <= {host.downlink}
        assert all(words[6:] == (["preferred_lft", "0"] if ":" in words[3] else []) for words in added)
        assert [line for line in log if line.startswith("set_irq_affinity")] == [
            f"set_irq_affinity --{host.irq_cpus or 'local-node'} "
            + " ".join(dict.fromkeys([host.uplink, host.downlink]))
        ]


def play(root: Path, script: Path, host: Director) -> list[str]:
    """Run rc.local on a rendered tree; returns what it called."""
    tools = root / "usr/sbin"
    tools.mkdir(parents=True)
    for tool in ("ip", "ethtool", "set_irq_affinity"):
        (tools / tool).write_text(f'#!/bin/bash\necho "{tool} $*" >>"$LVS_ROOT/log"\n', encoding="utf-8")
        (tools / tool).chmod(0o755)
    for interface in host.interfaces:
        nic = root / "sys/class/net" / interface.name
        nic.mkdir(parents=True)
        (nic / "ifindex").write_text("1\n", encoding="utf-8")
    link = root / "run/systemd/netif/links/1"
    link.parent.mkdir(parents=True)
    link.write_text("ADMIN_STATE=unmanaged\n", encoding="utf-8")
    result = run.run(["bash", script], env={"LVS_ROOT": str(root)})
    assert "left out" not in result.stdout + result.stderr
    return (root / "log").read_text(encoding="utf-8").splitlines()
