"""How our keepalived reads configurations: what it takes in silence, and what it refuses, with the line of it.

No kernel is needed for that. What is done with a configuration is for tests/kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pipeline import rpm, run, settings
from pipeline.store import Stage, Store
from tools import build

pytestmark = pytest.mark.build

MANUAL = settings.TOP / "provision/examples/manual/ospf/etc/keepalived"
FILE = "/build/etc/keepalived.conf"
SAMPLES = "usr/share/doc/keepalived/samples/keepalived.conf"
Check = Callable[..., run.Result]

GROUP = "local_address_group g {\n10.0.0.5\nfd00::5\n}\n"


def group(*lines: str) -> str:
    """A group; its first address is in line 2."""
    return "\n".join(["local_address_group f {", *lines, "}", ""])


def of_group(line: int, what: str) -> str:
    """What is said of an address of it."""
    return f"{line}) local_address_group f: {what} - ignoring"


def of_virtual(line: int, what: str) -> str:
    """What is said of a virtual server that is refused."""
    return f"{line}) Virtual server [192.0.2.1]:tcp:80: {what} - ignoring the virtual server"


def virtual(*more: str, where: str = "192.0.2.1 80", real: str = "10.1.0.2 80", method: str = "FNAT") -> str:
    """A virtual server; its first line is the first."""
    lines = [f"lvs_method {method}", "lvs_sched rr", "protocol TCP", *more]
    return "\n".join([f"virtual_server {where} {{", *lines, f"real_server {real} {{", "}", "}", ""])


class Program:
    """A build of keepalived, unpacked."""

    def __init__(self, room: build.Tools, stage: Stage, folder: Path) -> None:
        self.room = room
        self.root = folder / "root"
        (package,) = build.packages(room.store.ensure(stage))
        rpm.unpack(room.sandbox(), package, self.root)

    def check(self, text: str, others: Mapping[str, str] | None = None, *words: str) -> run.Result:
        """`--config-test` of files."""
        with run.temporary_directory("lvsforge-keepalived-") as etc:
            for name, content in {"keepalived.conf": text, **(others or {})}.items():
                (etc / name).write_text(content, encoding="utf-8")
            inside = {self.root / "usr/sbin/keepalived": "/build/keepalived", etc: "/build/etc"}
            command = ["timeout", "60", "/build/keepalived", "--config-test", "-f", FILE, *words]
            result = self.room.sandbox().run(command, ro_binds=inside, check=False)
        assert 0 <= result.returncode < 100, f"it did not end by itself: {result.returncode}"
        return result


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The package as it ships."""
    room = build.room(Store())
    return Program(room, room.stage("keepalived"), tmp_path_factory.mktemp("keepalived"))


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Unpatched keepalived."""
    room = build.room(Store())
    return Program(room, room.variant("keepalived", "stock", series=False), tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="session")
def check(ours: Program) -> Check:
    """Runs `--config-test` on files."""
    return ours.check


def accepted(result: run.Result) -> None:
    """Silent, and status 0."""
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "text",
    [
        GROUP + virtual("laddr_group_name g"),
        virtual("laddr_group_name g") + GROUP,  # in any order
        GROUP + virtual("laddr_group_name g", where="2001:db8::1 80", real="2001:db8:2::2 80"),
        GROUP + virtual("laddr_group_name g", real="10.1.0.2 8080"),  # another port
        GROUP + virtual("laddr_group_name g").replace("lvs_method", "lb_kind").replace("lvs_sched", "lb_algo"),
        GROUP + virtual("laddr_group_name g").replace("protocol TCP", "protocol UDP"),
        GROUP + virtual("laddr_group_name g", "syn_proxy", "est_timeout 90", "vip_bind_dev lo"),
        GROUP + virtual("laddr_group_name g", "establish_timeout 2147483", "syn_proxy off"),
        GROUP + virtual("laddr_group_name g", method="NAT"),
        virtual("syn_proxy", method="NAT"),
        GROUP + virtual("laddr_group_name g", where="fwmark 9", real="10.1.0.2 8080").replace("protocol TCP\n", ""),
        # the forms of an address
        group("10.0.0.1", "10.0.0.2-9", "10.0.0.10 lo", "10.0.0.250-10.0.1.5", "10.2.0.0-10.2.15.255"),
        group("fd00::1", "fd00::2-f lo", "fd00::fff0-fd00::1:f", "10.0.0.1"),
        "local_address_group f { 10.0.0.1-3 }\n",
        # comments
        "/* one */\n/*\n group f {\n*/ local_address_group f { /* two */\n10.0.0.1 /* three */ # four\n}\n",
        "include /build/etc/*.none\n! /* no comment that goes on\n# nor this one /*\n",
        # scripts
        virtual('quorum_up " ip addr add 192.0.2.1/32 dev lo; ip addr add 192.0.2.2/32 dev lo;"', method="NAT"),
        virtual('quorum_up "ip addr add 192.0.2.1/32 dev lo || true"', "alpha", "omega", method="NAT"),
    ],
)
def test_what_is_right_is_silent(check: Check, text: str) -> None:
    accepted(check(text))


def test_the_manuals_configuration(check: Check) -> None:
    files = {file.name: file.read_text(encoding="utf-8") for file in MANUAL.iterdir()}
    accepted(check(files.pop("keepalived.conf"), files))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # local addresses; line 2 is the first of the group
        (group("10.0.0.300"), of_group(2, "10.0.0.300: not an address")),
        (group("name"), of_group(2, "name: not an address")),
        (group("10.0.0.0/24"), of_group(2, "10.0.0.0/24: not an address")),
        *(
            (
                group(bad),
                of_group(2, f"{bad}: not the unicast address of a host"),
            )
            for bad in (
                "127.0.0.1",
                "0.0.0.1",
                "224.0.0.1",
                "255.255.255.255",
                "169.254.0.1",
                "126.255.255.255-127.0.0.1",
                "::1",
                "ff02::1",
                "fe80::1",
                "::ffff:10.0.0.1",
            )
        ),
        (group("10.0.0.9-3"), of_group(2, "10.0.0.9-3: the end is before the start")),
        (
            group("10.0.0.1-256"),
            of_group(2, "10.0.0.1-256: the end is neither an address nor the last part of one"),
        ),
        (
            group("10.0.0.1-fd00::1"),
            of_group(2, "10.0.0.1-fd00::1: the end is neither an address nor the last part of one"),
        ),
        (
            group("10.2.0.0-10.2.16.0"),
            of_group(2, "10.2.0.0-10.2.16.0: there are more than 4096 addresses in it"),
        ),
        (
            group("fd00::1-fd00:1::1"),
            of_group(2, "fd00::1-fd00:1::1: the ends differ in more than the last 32 bits"),
        ),
        (
            group("10.0.0.1", "10.0.0.1"),
            of_group(3, "10.0.0.1: it overlaps with what the group already has"),
        ),
        (
            group("10.0.0.5-9", "10.0.0.1-5"),
            of_group(3, "10.0.0.1-5: it overlaps with what the group already has"),
        ),
        (
            group("10.0.0.1 10.0.0.2"),
            of_group(2, "10.0.0.1: what follows is not the name of an interface"),
        ),
        (
            group("10.0.0.1 lo lo"),
            of_group(2, "10.0.0.1: only an interface can follow an address"),
        ),
        (
            group("10.0.0.1 none"),
            "2) WARNING - local_address_group f: 10.0.0.1: there is no interface none",
        ),
        (
            GROUP + "local_address_group g {\n10.0.0.9\n}\n",
            "5) local_address_group g is already defined - ignoring this one",
        ),
        ("local_address_group {\n10.0.0.9\n}\n", "1) local_address_group has no name - ignoring"),
        # what virtual servers say of them
        (virtual(), of_virtual(1, "FNAT needs laddr_group_name")),
        (
            virtual("laddr_group_name none"),
            of_virtual(5, "there is no local_address_group none"),
        ),
        (
            virtual("laddr_group_name none", method="NAT"),
            of_virtual(5, "there is no local_address_group none"),
        ),
        (
            "local_address_group e {\n}\n" + virtual("laddr_group_name e"),
            "7) Virtual server [192.0.2.1]:tcp:80: local_address_group e, which FNAT needs, has no IPv4 address"
            " - ignoring the virtual server",
        ),
        (
            "local_address_group e {\n10.0.0.1\n}\n"
            + virtual("laddr_group_name e", where="2001:db8::1 80", real="2001:db8:2::2 80"),
            "8) Virtual server [2001:db8::1]:tcp:80: local_address_group e, which FNAT needs, has no IPv6 address"
            " - ignoring the virtual server",
        ),
        (
            GROUP + virtual("laddr_group_name g").replace("TCP", "SCTP"),
            of_virtual(5, "FNAT is possible with TCP and UDP only").replace("tcp", "sctp"),
        ),
        (
            GROUP + virtual("laddr_group_name g", "ops").replace("TCP", "UDP"),
            "5) Virtual server [192.0.2.1]:udp:80: FNAT is not possible with one packet scheduling"
            " - ignoring the virtual server",
        ),
        (
            virtual("laddr_group_name", method="NAT"),
            "5) laddr_group_name needs the name of a local_address_group, and nothing else",
        ),
        # the rest
        (
            virtual("syn_proxy", method="DR"),
            of_virtual(1, "syn_proxy needs lvs_method NAT or FNAT"),
        ),
        (
            virtual("syn_proxy", method="NAT").replace("TCP", "UDP"),
            "1) Virtual server [192.0.2.1]:udp:80: syn_proxy is possible with TCP only - ignoring the virtual server",
        ),
        (virtual("syn_proxy perhaps", method="NAT"), "5) Invalid syn_proxy parameter perhaps"),
        (
            virtual("est_timeout 90", method="NAT").replace("TCP", "UDP"),
            "1) Virtual server [192.0.2.1]:udp:80: est_timeout is possible with TCP only - ignoring it",
        ),
        (virtual("est_timeout 2147484", method="NAT"), "5) est_timeout 2147484 must be in [1, 2147483] - ignoring"),
        (virtual("est_timeout 0", method="NAT"), "5) est_timeout 0 must be in [1, 2147483] - ignoring"),
        (
            virtual("vip_bind_dev lo", where="fwmark 9", method="NAT").replace("protocol TCP\n", ""),
            "1) Virtual server FWM 9: vip_bind_dev needs addresses, and no fwmarks - ignoring it",
        ),
        (
            virtual("vip_bind_dev lo", "ha_suspend", method="NAT"),
            "1) Virtual server [192.0.2.1]:tcp:80: ha_suspend is not possible with vip_bind_dev - ignoring it",
        ),
        (
            virtual("vip_bind_dev none", method="NAT"),
            "1) WARNING - virtual server [192.0.2.1]:tcp:80: vip_bind_dev: there is no interface none",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line(check: Check, text: str, said: str) -> None:
    result = check(text)
    assert result.returncode != 0
    assert f"({FILE}: Line {said}" in result.stderr.splitlines()


def test_errors_name_the_file_that_is_included(check: Check) -> None:
    result = check("\ninclude web.conf\n", {"web.conf": ""})
    accepted(result)
    result = check("\n\ninclude web.conf\n", {"web.conf": "\n" + virtual("laddr_group_name g")})
    assert result.stderr.splitlines() == [f"(web.conf: Line {of_virtual(6, 'there is no local_address_group g')}"]


def test_a_comment_without_an_end(check: Check) -> None:
    result = check("\n/* a comment\nlocal_address_group f {\n10.0.0.1\n}\n")
    assert result.returncode != 0
    assert f"({FILE}: Line 2) The comment that starts here has no end" in result.stderr.splitlines()


def test_a_block_without_an_end(check: Check) -> None:
    """Its beginning is told; what follows it is not what is wrong."""
    group_ = "local_address_group f {\n10.0.0.1\n}\n"
    broken = virtual("syn_proxy", method="NAT").rstrip().removesuffix("}")
    result = check(group_ + "include web.conf\n", {"web.conf": "\n" + broken})
    assert result.returncode != 0
    said = "(web.conf: Line 2) The block that starts here has no end: there are 1 missing '}'s or extra '{'s"
    assert set(result.stderr.splitlines()) == {said}
    result = check(group_ + "}\n")
    assert f"({FILE}: Line 4) Extra '}}' found" in result.stderr.splitlines()


def test_a_file_that_is_not_there(check: Check) -> None:
    result = check("\nincludea none.conf\n")
    assert result.returncode != 0
    assert f"({FILE}: Line 2) Config files missing 'none.conf'." in result.stderr.splitlines()


def test_lists_of_commands_and_script_security(check: Check) -> None:
    script = 'quorum_up "ip addr add 192.0.2.1/32 dev lo; true" root root'
    accepted(check(virtual(script, method="NAT")))
    result = check("global_defs {\nenable_script_security\n}\n" + virtual(script, method="NAT"))
    assert result.returncode != 0
    assert "is a list of commands, which enable_script_security does not allow for root" in result.stderr


def test_the_manual_page_and_the_sample_are_there(ours: Program) -> None:
    assert (ours.root / f"{SAMPLES}.fullnat").exists()
    page = ours.room.sandbox().run(
        ["sh", "-c", "zcat /build/page.gz"],
        ro_binds={ours.root / "usr/share/man/man5/keepalived.conf.5.gz": "/build/page.gz"},
    )
    for keyword in ("local_address_group", "laddr_group_name", "syn_proxy", "est_timeout", "vip_bind_dev", "FNAT"):
        assert keyword in page.stdout


def test_the_sample_is_right(ours: Program) -> None:
    """Apart from an interface that is not there."""
    said = ours.check((ours.root / f"{SAMPLES}.fullnat").read_text(encoding="utf-8")).stderr.splitlines()
    assert [line for line in said if "there is no interface eth1" not in line] == []


def test_upstreams_samples_are_read_as_upstream_reads_them(ours: Program, stock: Program) -> None:
    """keepalived has no tests of its own; its samples are what there is."""
    folder = stock.root / Path(SAMPLES).parent
    samples = sorted(folder.glob("keepalived.conf.*"))
    assert len(samples) > 20
    for sample in samples:
        text = sample.read_text(encoding="utf-8")
        now = said(ours.check(text).stderr)
        if sample.suffix == ".SMTP_CHECK":  # unpatched keepalived does not come to an end of it
            assert not [line for line in now if "SMTP_CHECK host block is deprecated" not in line]
            continue
        theirs = said(stock.check(text).stderr)
        assert now == [line for line in theirs if not line.startswith("nb_get_retry is deprecated")], sample.name


def said(text: str) -> list[str]:
    """Messages without their places: unpatched keepalived leaves out the name of the only file."""
    return [re.sub(r"^\((?:\S+: )?Line \d+\) ", "", line) for line in text.splitlines()]
