"""The built packages: what they ask for and hold, and that their programs run and judge a configuration."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kernel import build as kernels
from pipeline import recipe, rpm
from pipeline.sandbox import Sandbox
from pipeline.store import Store
from tools import build

pytestmark = pytest.mark.build

FLAVOURS = kernels.flavours()
DEBIAN_ONLY = re.compile(
    r"x86_64-linux-gnu|/var/lib/dpkg|/etc/default/|/etc/init\.d|"
    r"\b(dpkg|apt-get|update-rc\.d|invoke-rc\.d|deb-systemd-helper|adduser|addgroup|start-stop-daemon)\b"
)


@dataclass(frozen=True)
class Package:
    """What rpm says of a package file.

    Attributes:
        path: the file.
        files: path to mode and flags (`c` configuration, `n` noreplace, `d` documentation) as rpm prints them.
        requires: each dependency, with its comparison if it has one.
        provides: likewise.
        scripts: all scriptlets as text.
    """

    path: Path
    files: dict[str, str]
    requires: list[str]
    provides: list[str]
    scripts: str


@dataclass
class Room:
    """The build root to ask in, and the packages that were asked."""

    store: Store
    sandbox: Sandbox
    known: dict[Path, Package] = field(default_factory=dict)

    def query(self, path: Path, *options: str) -> str:
        inside = f"/build/{path.name}"
        return self.sandbox.run(["rpm", "-qp", "--nosignature", *options, inside], ro_binds={path: inside}).stdout

    def package(self, path: Path) -> Package:
        if path not in self.known:
            files = self.query(path, "--queryformat", r"[%{FILENAMES}\t%{FILEMODES:perms} %{FILEFLAGS:fflags}\n]")
            self.known[path] = Package(
                path,
                dict(line.split("\t", 1) for line in files.splitlines() if "\t" in line),
                [" ".join(line.split()) for line in self.query(path, "--requires").splitlines()],
                [" ".join(line.split()) for line in self.query(path, "--provides").splitlines()],
                self.query(path, "--scripts", "--triggers"),
            )
        return self.known[path]

    def tool(self, name: str) -> Package:
        built = build.packages(self.store.ensure(build.stage(name, self.store)))
        assert len(built) == 1, built
        return self.package(built[0])


@pytest.fixture(scope="session")
def room() -> Room:
    store = Store()
    tools = build.room(store)
    return Room(store, tools.sandbox())


def kernel_packages(room: Room, flavour: str) -> list[Package]:
    built = room.store.ensure(kernels.stage(flavour, room.store))
    return [room.package(path) for path in build.packages(built)]


@pytest.fixture(scope="session")
def unpacked(room: Room, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of each tool's package, by name of the tool."""
    trees = {}
    for name in build.names():
        trees[name] = tmp_path_factory.mktemp(name)
        path = room.tool(name).path
        room.sandbox.run(
            ["sh", "-ec", "rpm2archive - <$0 | tar -xz -C /build/tree", f"/build/{path.name}"],
            binds={trees[name]: "/build/tree"},
            ro_binds={path: f"/build/{path.name}"},
        )
    return trees


# --- the Enterprise Linux 9 rule

TABLE: dict[str, Any] = recipe.parse((build.ROOM / "el9-sonames.yaml").read_text(encoding="utf-8"), "el9-sonames.yaml")
_LIBRARY = re.compile(r"^(?P<soname>[^()\s]+\.so[.\d]*)\((?P<version>[^)]*)\)\(64bit\)$")
_BOUNDED = re.compile(r"^(?P<name>[A-Z]+)_(?P<number>[\d.]+)$")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def el9_lacks(requirement: str, own: str) -> str:
    """Why Enterprise Linux 9 cannot satisfy a requirement, or "".

    Args:
        requirement: as rpm prints it.
        own: the package's name; it may ask for itself and its siblings.
    """
    library = _LIBRARY.match(requirement)
    if library is None:
        plain = requirement.split(" ")[0]
        if any(plain == other or (other.endswith("(") and plain.startswith(other)) for other in TABLE["others"]):
            return ""
        return "" if plain.split("(")[0] in (own, own.removesuffix("-devel")) else "not in el9-sonames.yaml (others)"
    entry = TABLE["sonames"].get(library["soname"])
    if entry is None:
        return f"{library['soname']} is not in el9-sonames.yaml"
    version = library["version"]
    if not version or version in entry.get("versions", ()):
        return ""
    bounded = _BOUNDED.match(version)
    if bounded is None or bounded["name"] not in TABLE["limits"]:
        return f"{version} is not among the versions of {library['soname']}"
    limit = TABLE["limits"][bounded["name"]]
    return "" if numbers(bounded["number"]) <= numbers(limit) else f"{version} is above {limit}"


@pytest.mark.parametrize(
    ("requirement", "lacks"),
    [
        ("libc.so.6(GLIBC_2.34)(64bit)", ""),
        ("libc.so.6(GLIBC_2.4)(64bit)", ""),
        ("libc.so.6(GLIBC_2.35)(64bit)", "above 2.34"),
        ("libc.so.6(GLIBC_ABI_DT_RELR)(64bit)", "not among the versions"),
        ("libcrypt.so.1()(64bit)", "libcrypt.so.1 is not in"),
        ("libjson-c.so.5(JSONC_0.15)(64bit)", "not among the versions"),
        ("libcrypto.so.3(OPENSSL_3.2.0)(64bit)", "above 3.0.0"),
        ("rpmlib(PayloadIsZstd) <= 5.4.18-1", ""),
        ("perl-base", "not in el9-sonames.yaml (others)"),
        ("/usr/bin/perl", "not in el9-sonames.yaml (others)"),
    ],
)
def test_the_rule_finds_what_it_must(requirement: str, lacks: str) -> None:
    found = el9_lacks(requirement, "toy")
    assert (lacks in found) if lacks else not found


def check_el9(package: Package) -> None:
    own = rpm.FileName.parse(package.path.name).name
    assert package.requires
    lacking = {text: why for text in package.requires if (why := el9_lacks(text, own))}
    assert not lacking
    found = DEBIAN_ONLY.search(package.scripts)
    assert found is None, found


@pytest.mark.parametrize("name", build.names())
def test_a_tool_installs_on_enterprise_linux_9(room: Room, name: str) -> None:
    check_el9(room.tool(name))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_kernel_installs_on_enterprise_linux_9(room: Room, flavour: str) -> None:
    for package in kernel_packages(room, flavour):
        check_el9(package)


@pytest.mark.parametrize("name", build.names())
def test_nothing_lies_where_only_debian_looks(room: Room, name: str) -> None:
    wrong = [path for path in room.tool(name).files if re.search(r"x86_64-linux-gnu|^/(bin|sbin|lib|lib64)/", path)]
    assert not wrong


# --- what is in them


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        (
            "ipvsadm",
            [
                "/usr/sbin/ipvsadm",
                "/usr/sbin/ipvsadm-save",
                "/usr/sbin/ipvsadm-restore",
                "/usr/lib/systemd/system/ipvsadm.service",
                "/usr/share/man/man8/ipvsadm.8.gz",
            ],
        ),
        (
            "keepalived",
            [
                "/etc/keepalived",
                "/usr/sbin/keepalived",
                "/usr/lib/systemd/system/keepalived.service",
                "/usr/share/man/man8/keepalived.8.gz",
                "/usr/share/man/man5/keepalived.conf.5.gz",
            ],
        ),
        (
            "quagga",
            [
                "/etc/quagga",
                "/usr/sbin/zebra",
                "/usr/sbin/ospfd",
                "/usr/sbin/ospf6d",
                "/usr/sbin/bgpd",
                "/usr/sbin/watchfrr",
                "/usr/bin/vtysh",
                "/usr/lib/systemd/system/zebra.service",
                "/usr/lib/systemd/system/ospfd.service",
                "/usr/lib/sysusers.d/frr.conf",
                "/usr/lib/tmpfiles.d/frr.conf",
                "/etc/logrotate.d/frr",
                "/usr/share/man/man8/frr-ospfd.8.gz",
            ],
        ),
        (
            "toa-bpf",
            [
                "/etc/toa-bpf.conf",
                "/usr/sbin/toa-bpf",
                "/usr/lib/systemd/system/toa-bpf.service",
                "/usr/share/man/man8/toa-bpf.8.gz",
            ],
        ),
    ],
)
def test_files_lie_where_the_manual_says(room: Room, name: str, paths: list[str]) -> None:
    files = room.tool(name).files
    assert [path for path in paths if path not in files] == []


@pytest.mark.parametrize("name", build.names())
def test_configuration_survives_an_upgrade(room: Room, name: str) -> None:
    etc = {path: text for path, text in room.tool(name).files.items() if path.startswith("/etc/")}
    files = {path: text.split() for path, text in etc.items() if not text.startswith("d")}
    assert files
    for path, words in files.items():
        assert len(words) == 2 and "c" in words[1] and "n" in words[1], f"{path} is not %config(noreplace): {words}"


def test_the_routing_package_answers_to_quagga(room: Room) -> None:
    package = room.tool("quagga")
    assert any(text.startswith("quagga = ") for text in package.provides)
    assert not any("libfrr" in text for text in [*package.provides, *package.requires]), "a private library"


@pytest.mark.parametrize("name", build.names())
def test_a_package_tells_neither_builder_nor_time(room: Room, name: str) -> None:
    text = room.query(room.tool(name).path, "--queryformat", "%{BUILDHOST}\t%{BUILDTIME}\t[%{FILEMTIMES}\t]")
    host, time, *files = text.rstrip("\t").split("\t")
    assert host == "builder"
    assert all(int(moment) <= int(time) for moment in files)


@pytest.mark.parametrize("name", build.names())
def test_no_build_path_is_left_in_a_program(unpacked: dict[str, Path], name: str) -> None:
    files = [path for path in unpacked[name].rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    assert [str(path) for path in files if b"/build/rpmbuild" in path.read_bytes()] == []


def elf_files(tree: Path) -> Iterator[Path]:
    for path in tree.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.read_bytes()[:4] == b"\x7fELF":
            yield path


@pytest.mark.parametrize("name", build.names())
def test_programs_are_hardened(room: Room, unpacked: dict[str, Path], name: str) -> None:
    found = list(elf_files(unpacked[name]))
    assert found
    for path in found:
        inside = f"/build/{path.name}"
        text = room.sandbox.run(["readelf", "-Wdl", inside], ro_binds={path: inside}).stdout
        assert "GNU_RELRO" in text and "NOW" in text, f"{path}: no full RELRO"
        assert re.search(r"GNU_STACK +\S+ +\S+ +\S+ +\S+ +\S+ +RW ", text), f"{path}: executable stack"
        assert "Elf file type is DYN" in text, f"{path}: not position independent"
        if path.parent.name != "modules":  # too small to call anything that can be fortified
            symbols = room.sandbox.run(["readelf", "-W", "--dyn-syms", inside], ro_binds={path: inside}).stdout
            assert "_chk@" in symbols, f"{path}: not fortified"


def test_a_source_package_rebuilds_alone(room: Room) -> None:
    folder = room.store.path(build.stage("ipvsadm", room.store))
    room.tool("ipvsadm")
    (source,) = folder.glob("*.src.rpm")
    inside = f"/build/{source.name}"
    result = room.sandbox.run(
        ["rpmbuild", "--rebuild", "--define", "_topdir /tmp/top", "--define", "_tmppath /tmp", inside],
        ro_binds={source: inside},
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


# --- they run


def run_program(room: Room, tree: Path, *words: str, configuration: Path | None = None) -> tuple[int, str]:
    """Run a program of an unpacked package in the build root, which holds its libraries."""
    binds = {tree: "/build/tree"}
    if configuration is not None:
        binds[configuration] = "/build/etc"
        for file in configuration.glob("*.etc"):
            binds[file] = f"/etc/{file.stem}"
    result = room.sandbox.run(
        [f"/build/tree{words[0]}", *words[1:]],
        ro_binds=binds,
        env={"LD_LIBRARY_PATH": "/build/tree/usr/lib/frr"},
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def test_keepalived_has_what_directors_need(room: Room, unpacked: dict[str, Path]) -> None:
    code, text = run_program(room, unpacked["keepalived"], "/usr/sbin/keepalived", "--version")
    assert code == 0, text
    options = " ".join(text.split("Config options:")[1].split("System options:")[0].split()).split(" ")
    wanted = {"LVS", "VRRP", "VRRP_AUTH", "REGEX", "JSON", "BFD", "NFTABLES", "SYSTEMD_NOTIFY", "INIT=systemd"}
    assert wanted <= set(options), text
    assert not {option for option in options if "SNMP" in option}


def test_keepalived_judges_the_manuals_configuration(room: Room, unpacked: dict[str, Path], tmp_path: Path) -> None:
    # The manual's two files in the words that upstream knows; FNAT, syn_proxy, local addresses come with the series.
    (tmp_path / "keepalived.conf").write_text(
        "! Configuration File for keepalived\n"
        "global_defs {\n    checker_log_all_failures true\n}\n"
        "include /build/etc/taobao.conf\n",
        encoding="utf-8",
    )
    service = """virtual_server_group taobao {
    1.1.1.1 80
    1.1.1.2 80
}
virtual_server group taobao {
    delay_loop 7
    lb_algo rr
    lb_kind NAT
    protocol TCP
    alpha
    omega
    quorum 1
    hysteresis 0
    real_server 192.168.1.1 80 {
        weight 100
        inhibit_on_failure
        TCP_CHECK {
            connect_timeout 5
        }
    }
    real_server 192.168.1.2 80 {
        weight 100
        inhibit_on_failure
        HTTP_GET {
            url {
                path /index.html
                status_code 200
            }
            connect_timeout 3
            retry 2
            delay_before_retry 5
        }
    }
}
"""
    (tmp_path / "taobao.conf").write_text(service, encoding="utf-8")
    words = ("/usr/sbin/keepalived", "--config-test", "--check", "--use-file", "/build/etc/keepalived.conf")
    code, text = run_program(room, unpacked["keepalived"], *words, configuration=tmp_path)
    assert code == 0, text
    (tmp_path / "taobao.conf").write_text(service.replace("lb_algo rr", "lb_algoo rr"), encoding="utf-8")
    code, text = run_program(room, unpacked["keepalived"], *words, configuration=tmp_path)
    assert code != 0 and "lb_algoo" in text, "a wrong word is refused"


ZEBRA = """hostname lvs-route-4
password 8 123456
enable password 8 123456
log file /var/log/zebra.log
service password-encryption
"""
OSPF = """hostname lvs-4-ospfd
password 8 123456
enable password 8 123456
log file /var/log/ospf.log
log stdout
log syslog
service password-encryption
interface eth0
ip ospf message-digest-key 8 md5 123456
ip ospf hello-interval 3
ip ospf dead-interval 12
router ospf
ospf router-id 192.168.0.14
log-adjacency-changes
auto-cost reference-bandwidth 1000
network 1.1.1.0/24 area 0.0.0.11
network 192.168.0.12/30 area 0.0.0.11
area 0.0.0.11 authentication message-digest
area 0.0.0.11 stub no-summary
"""


@pytest.mark.parametrize(("daemon", "text"), [("zebra", ZEBRA), ("ospfd", OSPF)], ids=["zebra", "ospfd"])
def test_the_manuals_routing_files_are_accepted(
    room: Room, unpacked: dict[str, Path], tmp_path: Path, daemon: str, text: str
) -> None:
    # The daemons look their users up, whom the package's %pre makes.
    (tmp_path / "passwd.etc").write_text("root:x:0:0::/root:/bin/sh\nfrr:x:990:990::/run/frr:/usr/sbin/nologin\n")
    (tmp_path / "group.etc").write_text("root:x:0:\nfrr:x:990:\nfrrvty:x:991:frr,root\n")
    file = tmp_path / f"{daemon}.conf"
    file.write_text(text, encoding="utf-8")
    # -C: read the file, say what is wrong with it, and end
    words = (f"/usr/sbin/{daemon}", "-C", "-u", "root", "-g", "root", "-f", f"/build/etc/{daemon}.conf")
    code, said = run_program(room, unpacked["quagga"], *words, configuration=tmp_path)
    assert code == 0 and "No such command" not in said, said
    file.write_text(text + "no-such-word at all\n", encoding="utf-8")
    code, said = run_program(room, unpacked["quagga"], *words, configuration=tmp_path)
    assert "no-such-word" in said, "a wrong line is named"


# --- rpmlint

LINT: dict[str, Any] = tomllib.loads((build.ROOM / "rpmlint.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def findings(room: Room, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every finding of rpmlint about every package and source package, before any is tolerated."""
    settings = tmp_path_factory.mktemp("rpmlint") / "rpmlint.toml"
    settings.write_text("\n".join(f"{name} = {value!r}" for name, value in LINT.items() if name != "Filters"))
    found: set[str] = set()
    for name in build.names():
        room.tool(name)
        # One at a time: rpmlint 2.4 takes the spec files of several source packages for those of one.
        for path in sorted(room.store.path(build.stage(name, room.store)).glob("*.rpm")):
            inside = f"/build/{path.name}"
            result = room.sandbox.run(
                ["rpmlint", "-c", "/build/rpmlint.toml", inside],
                ro_binds={settings: "/build/rpmlint.toml", path: inside},
                check=False,
            )
            assert "1 packages" in result.stdout, result.stdout + result.stderr
            found.update(re.findall(r"^\S+ [EW]: .*$", result.stdout, re.M))
    return sorted(found)


def test_rpmlint_finds_nothing_that_is_not_listed(findings: list[str]) -> None:
    assert [text for text in findings if not any(re.search(known, text) for known in LINT["Filters"])] == []


def test_every_listed_finding_is_still_found(findings: list[str]) -> None:
    assert [known for known in LINT["Filters"] if not any(re.search(known, text) for text in findings)] == []
