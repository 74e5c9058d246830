"""Our ipvsadm on a kernel whose IPVS knows no FULLNAT: one clear error, and nothing is changed; all else as ever."""

from __future__ import annotations

import pytest

from tests.kernel.lab import Lab, Namespace
from tests.kernel.test_ipvsadm import MODULES, ipvsadm, refused, saved, taken
from tests.packages.test_ipvsadm_rules import RULES

pytestmark = [pytest.mark.build, pytest.mark.guest]
FLAVOURS = ("rs",)
WHERE, REAL = "-t 192.0.2.1:80", "10.1.0.2"


def _error(host: Namespace) -> str:
    release = host.guest.kernel.uname
    return (
        f"FULLNAT is not in the running kernel ({release}): the command is not carried out; boot a kernel that has it"
    )


@pytest.fixture
def host(lab: Lab) -> Namespace:
    """A host with a service of NAT."""
    found = lab.namespace("host")
    taken(found, f"-A {WHERE} -s rr", f"-a {WHERE} -r {REAL}:8080 -m")
    return found


@pytest.mark.parametrize(
    "line",
    [
        f"-a {WHERE} -r {REAL} -b",
        f"-a {WHERE} -r {REAL} --fullnat",
        f"-a -t 192.0.2.1:99 -r {REAL} -b",
        f"-e {WHERE} -r {REAL}:8080 -b",
        f"-P {WHERE} -z 10.0.0.5",
        f"-Q {WHERE} -z 10.0.0.5",
        "-G",
        f"-G -n {WHERE}",
        "-A -t 192.0.2.1:81 -V 90",
        "-A -t 192.0.2.1:81 -V 0",
        f"-E {WHERE} -V 90",
    ],
)
def test_what_needs_fullnat_is_refused(host: Namespace, line: str) -> None:
    refused(host, line, 1, _error(host))


def test_a_restore_stops_where_fullnat_begins(host: Namespace) -> None:
    done = ipvsadm(
        host, "-R", "-A -t 192.0.2.1:83 -s rr\n-a -t 192.0.2.1:83 -r 10.1.0.2 -b\n-A -t 192.0.2.1:84 -s rr\n"
    )
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines() == [
        f"line 2: {_error(host)}",
        "line 2: -a -t 192.0.2.1:83 -r 10.1.0.2 -b",
        "line 2: nothing is restored from here on; the lines above are in effect",
    ]
    assert "192.0.2.1:83 " in saved(host)
    assert "192.0.2.1:84 " not in saved(host)


def test_lists_have_no_word_of_fullnat(host: Namespace) -> None:
    listing = ipvsadm(host, "-L -n").out.splitlines()
    assert listing[3:] == [
        "TCP  192.0.2.1:80 rr",
        "  -> 10.1.0.2:8080                Masq    1      0          0         ",
    ]
    names = ipvsadm(host, "-L -c -n").out.splitlines()[1]
    assert names.split() == ["pro", "expire", "state", "source", "virtual", "destination"]


def test_every_other_rule_comes_back(host: Namespace) -> None:
    for module in MODULES:
        host.guest.run("modprobe", module)
    taken(host, "-C")
    fullnat = [line for line in RULES.splitlines() if line.startswith("-P") or " -b -w " in line]
    assert len(fullnat) >= 10
    rules = [line.split(" -V ")[0] for line in RULES.splitlines() if line not in fullnat]
    done = ipvsadm(host, "-R", "".join(f"{line}\n" for line in rules))
    assert (done.status, done.out, done.err) == (0, "", ""), str(done)
    first = saved(host)
    assert sorted(first.splitlines()) == sorted(rules)
    taken(host, "-C")
    ipvsadm(host, "-R", first)
    assert saved(host) == first


def test_editing_keeps_what_it_does_not_speak_of(host: Namespace) -> None:
    where = "-t 192.0.2.1:82"
    taken(host, f"-A {where} -s sh -p 500 -M 255.255.255.0 -b sh-fallback,sh-port")
    for edit, left in (
        ("-p 900", "-s sh -p 900 -M 255.255.255.0 -b sh-fallback,sh-port"),
        ("-s rr", "-s rr -p 900 -M 255.255.255.0"),
        ("--no-persistent", "-s rr"),
    ):
        taken(host, f"-E {where} {edit}")
        assert f"-A {where} {left}" in saved(host).splitlines(), edit


def test_the_other_errors_are_those_of_stock_ipvsadm(host: Namespace) -> None:
    refused(host, f"-A {WHERE} -s rr", 255, "Service already exists")
    refused(host, f"-a {WHERE} -r {REAL}:8080 -m", 255, "Destination already exists")
    refused(host, "-D -t 192.0.2.9:80", 255, "No such service")
    done = host.run("setpriv", "--reuid=65534", "--clear-groups", "/usr/sbin/ipvsadm", "-L", check=False)
    assert done.status == 2
    assert done.err.startswith("Can't initialize ipvs: Permission denied (you must be root)\n")
    done = host.run("sh", "-c", "ipvsadm -Sn >/dev/full", check=False)
    assert (done.status, done.err) == (1, "cannot write the rules: No space left on device\n")
