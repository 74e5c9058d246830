"""Our ipvsadm on the director's kernel: what it lists, saves and refuses, to the letter.

tests/packages/ holds it against a stand-in for the kernel; here the kernel's own answers are what it speaks of.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.kernel.lab import Lab, Namespace
from tests.kernel.machine import Done
from tests.kernel.topology import FAMILIES, Site, service
from tests.packages.test_ipvsadm_rules import RULES

pytestmark = [pytest.mark.build, pytest.mark.guest]
VIP = {4: "192.0.2.1", 6: "2001:db8::1"}
RS = {4: "10.1.0.2", 6: "2001:db8::2"}
LIP = {4: ("10.0.0.5", "10.0.0.6"), 6: ("2001:db8::5", "2001:db8::6")}
NO_HOST = {
    4: ("0.0.0.0", "224.0.0.1", "255.255.255.255", "127.0.0.1"),  # noqa: S104  refused
    6: ("::", "ff02::1", "::1", "fe80::1"),
}
MODULES = ("ip_vs_rr", "ip_vs_wlc", "ip_vs_wrr", "ip_vs_lc", "ip_vs_sh", "ip_vs_mh", "ip_vs_pe_sip")


def ipvsadm(host: Namespace, line: str, stdin: str = "") -> Done:
    """Run it with the words of a line, whatever becomes of it."""
    return host.run("ipvsadm", *line.split(), check=False, stdin=stdin)


def taken(host: Namespace, *lines: str) -> None:
    """Lines that it must carry out in silence."""
    for line in lines:
        done = ipvsadm(host, line)
        assert (done.status, done.out, done.err) == (0, "", ""), str(done)


def refused(host: Namespace, line: str, status: int, err: str) -> None:
    """A line that it must refuse with one line of text, and that changes nothing."""
    before = saved(host)
    done = ipvsadm(host, line)
    assert (done.status, done.out, done.err) == (status, "", f"{err}\n"), str(done)
    assert saved(host) == before, f"{line}: refused, and it changed something"


def saved(host: Namespace) -> str:
    """What -S says."""
    done = ipvsadm(host, "-S -n")
    assert (done.status, done.err) == (0, ""), str(done)
    return done.out


@pytest.fixture
def host(lab: Lab) -> Namespace:
    """A host without any service."""
    return lab.namespace("host")


# --- lists


@pytest.mark.parametrize("family", FAMILIES)
def test_lists(host: Namespace, family: int) -> None:
    where, real, (one, two) = service(VIP[family], 80), service(RS[family], 8080), LIP[family]
    taken(
        host,
        f"-A -t {where} -s rr -V 90",
        f"-a -t {where} -r {real} -b -w 5",
        f"-P -t {where} -z {one}",
        f"-P -t {where} -z {two}",
    )
    listing = ipvsadm(host, "-L -n").out.splitlines()
    assert re.fullmatch(r"IP Virtual Server version 1\.2\.1 \(size=\d+\)", listing[0])
    assert listing[1:] == [
        "Prot LocalAddress:Port Scheduler Flags",
        "  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn",
        f"TCP  {where} rr est_timeout 90",
        f"  -> {real:<28} FullNat 5      0          0         ",
    ]
    locals_ = [f"{'':<32} {address:<20} 0          0" for address in (one, two)]
    head = "VIP:VPORT               TOTAL    SNAT_IP              CONFLICTS  CONNS"
    for words in ("-G -n", f"-G -n -t {where}"):
        table = ipvsadm(host, words).out.splitlines()
        assert table == [head, f"{where:<23} 2", *locals_], words
    assert saved(host).splitlines() == [
        f"-A -t {where} -s rr -V 90",
        f"-a -t {where} -r {real} -b -w 5",
        f"-P -t {where} -z {one}",
        f"-P -t {where} -z {two}",
    ]
    kernels = host.read("/proc/net/ip_vs").splitlines()[-1]
    assert kernels.split()[2:] == ["FullNat", "5", "0", "0"]


def test_words_in_any_order(host: Namespace) -> None:
    taken(host, "-A -t 192.0.2.1:80 -s rr")
    for line in (
        "-ab -w 5 -r 10.1.0.2:8080 -t 192.0.2.1:80",
        "-at 192.0.2.1:80 -b -r 10.1.0.2:8080 -w 5",
        "-a -t 192.0.2.1:80 -r 10.1.0.2:8080 -bw 5",
        "-a -t 192.0.2.1:80 -r 10.1.0.2:8080 --fullnat --weight 5",
    ):
        taken(host, line)
        assert saved(host).splitlines()[1:] == ["-a -t 192.0.2.1:80 -r 10.1.0.2:8080 -b -w 5"], line
        taken(host, "-d -t 192.0.2.1:80 -r 10.1.0.2:8080")


# --- refusals


@pytest.mark.parametrize("family", FAMILIES)
def test_refusals_about_local_addresses(host: Namespace, family: int) -> None:
    where, (one, two) = service(VIP[family], 80), LIP[family]
    other, six = service(VIP[family], 81), LIP[6 if family == 4 else 4][0]
    taken(host, f"-A -t {where} -s rr", f"-P -t {where} -z {one}")
    hint = f"in service -t {where}; `ipvsadm -G -t {where} -n' lists all"
    refused(host, f"-P -t {where} -z {one}", 1, f"local address {one} is already there {hint}")
    refused(host, f"-Q -t {where} -z {two}", 1, f"local address {two} is not there {hint}")
    comes_before = f"; `ipvsadm -A -t {other}' comes before its local addresses"
    refused(host, f"-P -t {other} -z {one}", 1, f"there is no service -t {other}{comes_before}")
    refused(host, f"-Q -t {other} -z {one}", 1, f"there is no service -t {other}")
    refused(host, f"-G -t {other}", 1, f"there is no service -t {other}")
    what = "the unicast address of a host, not 0.0.0.0 or ::, multicast, broadcast, loopback or link-local"
    for address in NO_HOST[family]:
        refused(host, f"-P -t {where} -z {address}", 1, f"{address} cannot be a local address: that is {what}")
    families = ("IPv6", "IPv4") if family == 4 else ("IPv4", "IPv6")
    wrong = f"local address {six} is {families[0]}, and service -t {where} is {families[1]}"
    refused(host, f"-P -t {where} -z {six}", 2, wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_refusals_about_the_method(host: Namespace, family: int) -> None:
    """One-packet scheduling either way round, and a protocol that cannot be translated."""
    where, real = f"-u {service(VIP[family], 53)}", service(RS[family], 53)
    taken(host, f"-A {where} -s rr -o")
    refused(
        host, f"-a {where} -r {real} -b", 1,
        f"FULLNAT does not go with one-packet scheduling, which service {where} has; "
        f"`ipvsadm -E {where} --no-ops' ends it",
    )  # fmt: skip
    taken(host, f"-E {where} --no-ops", f"-a {where} -r {real} -b")
    refused(
        host, f"-E {where} -o", 1,
        f"one-packet scheduling does not go with the FULLNAT real servers of service {where}; give them another "
        "forwarding method first",
    )  # fmt: skip
    taken(host, f"-e {where} -r {real} -m", f"-E {where} -o")
    sctp = f"--sctp-service {service(VIP[family], 9)}"
    taken(host, f"-A {sctp} -s rr")
    refused(
        host, f"-a {sctp} -r {real} -b", 1,
        f"FULLNAT is for TCP and UDP; the real servers of service {sctp} need another forwarding method",
    )  # fmt: skip


def test_refusals_about_the_established_timeout(host: Namespace) -> None:
    refused(host, "-A -u 192.0.2.1:53 -s rr -V 90", 2, "An established timeout is only for TCP virtual services")
    words = "it is a number of seconds, 0 (the global timeout) to 2147483"
    refused(host, "-A -t 192.0.2.1:80 -s rr -V 2147484", 2, f"illegal established timeout `2147484': {words}")
    taken(host, "-A -t 192.0.2.1:80 -s rr -V 2147483")
    assert saved(host) == "-A -t 192.0.2.1:80 -s rr -V 2147483\n"


def test_nobody_but_root(host: Namespace) -> None:
    done = host.run("setpriv", "--reuid=65534", "--clear-groups", "/usr/sbin/ipvsadm", "-L", check=False)
    assert done.status == 2
    assert done.err.startswith("Can't initialize ipvs: Permission denied (you must be root)\n")


# --- changes


def test_editing_a_service(host: Namespace) -> None:
    """-E changes what it speaks of; local addresses and the time-out stay."""
    where = "-t 192.0.2.1:80"
    taken(host, f"-A {where} -s sh -p 500 -M 255.255.255.0 -b sh-fallback,sh-port -V 90", f"-P {where} -z {LIP[4][0]}")
    for edit, left in (
        ("-p 900", "-s sh -p 900 -M 255.255.255.0 -b sh-fallback,sh-port -V 90"),
        ("-s rr", "-s rr -p 900 -M 255.255.255.0 -V 90"),
        ("-V 0", "-s rr -p 900 -M 255.255.255.0"),
        ("--no-persistent", "-s rr"),
        ("-s wrr", "-s wrr"),
    ):
        taken(host, f"-E {where} {edit}")
        assert saved(host).splitlines() == [f"-A {where} {left}", f"-P {where} -z {LIP[4][0]}"], edit
    taken(host, "-A -u 192.0.2.1:5060 -s rr -p 30 --pe sip", "-E -u 192.0.2.1:5060 -s wlc")
    assert "-A -u 192.0.2.1:5060 -s wlc -p 30 --pe sip" in saved(host).splitlines()
    taken(host, "-E -u 192.0.2.1:5060 --no-pe", "-A -u 192.0.2.1:53 -s rr -o", "-E -u 192.0.2.1:53 -s wlc")
    assert "-A -u 192.0.2.1:5060 -s wlc -p 30" in saved(host).splitlines()
    assert "-A -u 192.0.2.1:53 -s wlc -o" in saved(host).splitlines()


def test_editing_a_destination(host: Namespace) -> None:
    where, real = "-t 192.0.2.1:80", "10.1.0.2:8080"
    taken(host, f"-A {where} -s rr", f"-a {where} -r {real} -b -w 3 -x 100 -y 50")
    for edit, left in (
        ("-w 0", "-b -w 0 -x 100 -y 50"),
        ("-m", "-m -w 0 -x 100 -y 50"),
        ("-b -w 2", "-b -w 2 -x 100 -y 50"),
        ("-y 0", "-b -w 2 -x 100"),
        ("-y 50", "-b -w 2 -x 100 -y 50"),
    ):
        taken(host, f"-e {where} -r {real} {edit}")
        assert saved(host).splitlines()[1:] == [f"-a {where} -r {real} {left}"], edit
    refused(host, f"-e {where} -r {real} -x 9", 255, "Lower threshold is above the upper threshold")


# --- save and restore


def test_every_kind_of_rule_comes_back(host: Namespace) -> None:
    for module in MODULES:
        host.guest.run("modprobe", module)
    done = ipvsadm(host, "-R", RULES)
    assert (done.status, done.out, done.err) == (0, "", ""), str(done)
    first = saved(host)
    assert sorted(first.splitlines()) == sorted(RULES.splitlines())
    taken(host, "-C")
    assert saved(host) == ""
    host.run("ipvsadm-restore", stdin=first)
    assert host.run("ipvsadm-save", "-n").out == first


@pytest.mark.parametrize("scheduler", ["sh", "mh"])
def test_a_flag_without_a_name_comes_back(host: Namespace, scheduler: str) -> None:
    rule = f"-A -t 192.0.2.1:80 -s {scheduler} -b {scheduler}-fallback,flag-3 -V 90"
    host.guest.run("modprobe", f"ip_vs_{scheduler}")
    taken(host, rule)
    assert saved(host) == f"{rule}\n"


def test_the_unit_loads_saves_and_clears_rules(host: Namespace) -> None:
    unit, file = "/usr/libexec/ipvsadm/ipvsadm-rules", "/etc/sysconfig/ipvsadm"
    rules = (
        "-A -t 192.0.2.1:80 -s rr -V 90\n-a -t 192.0.2.1:80 -r 10.1.0.2:80 -b -w 1\n-P -t 192.0.2.1:80 -z 10.0.0.5\n"
    )
    host.guest.write(file, rules)
    host.run(unit, "restore")
    assert saved(host) == rules
    taken(host, "-P -t 192.0.2.1:80 -z 10.0.0.6")
    host.run(unit, "save")
    assert host.read(file) == f"{rules}-P -t 192.0.2.1:80 -z 10.0.0.6\n"
    # a reload is the file, or else what was there
    host.guest.write(file, rules)
    host.run(unit, "reload")
    assert saved(host) == rules
    host.guest.write(file, f"-A -t 192.0.2.9:80 -s rr\n{rules}-A -t 192.0.2.1:80 -s rr\n")
    done = host.run(unit, "reload", check=False)
    assert done.status != 0
    assert done.err.splitlines()[0].startswith("line 5: "), done.err
    assert done.err.splitlines()[-1] == f"{file} is not loaded: the rules of before stay"
    assert saved(host) == rules
    host.run(unit, "stop")
    assert saved(host) == ""


def test_what_cannot_be_saved_or_restored(host: Namespace) -> None:
    taken(host, "-A -t 192.0.2.1:80 -s rr")
    done = host.run("sh", "-c", "ipvsadm -Sn >/dev/full", check=False)
    assert (done.status, done.err) == (1, "cannot write the rules: No space left on device\n")
    done = ipvsadm(
        host, "-R", "-A -t 192.0.2.1:81 -s rr\n-a -t 192.0.2.1:82 -r 10.1.0.2 -b\n-A -t 192.0.2.1:83 -s rr\n"
    )
    assert done.status != 0
    assert done.err.startswith("line 2: "), done.err
    assert saved(host).splitlines() == [f"-A -t 192.0.2.1:{port} -s rr" for port in (80, 81)]


# --- connections


@pytest.mark.parametrize("family", FAMILIES)
def test_connections(site: Callable[..., Site], family: int) -> None:
    """Columns stand where they always stood; the local address comes after them, for those that have one."""
    net = site(servers=2)
    net.serve(port=8080)
    net.servers[1].ip(f"route add default via {net.director_address(family, back=True)}")
    where = net.balance(
        family, "-b", to=8080, locals_=1, servers=[net.server(family)], options=("-p", "60", "-V", "90")
    )
    net.balance(family, "-m", port=81, to=8080, servers=[net.server(family, 1)])
    client = net.clients[0]
    client.hold(net.vip(family), sport=4000)
    client.hold(net.vip(family), port=81, sport=4001)
    (peer,) = [line.split()[3] for line in net.servers[0].run("ss", "-Htn", "state", "established").out.splitlines()]
    assert peer.startswith(service(net.local(family), 0)[:-1])
    for words in ("-L -c -n", "-L -c -n --persistent-conn"):
        head, names, *rows = ipvsadm(net.director, words).out.splitlines()
        assert head == "IPVS connection entries"
        assert names.split()[:6] == ["pro", "expire", "state", "source", "virtual", "destination"]
        assert names.split()[-1] == "local"
        by_client = {row.split()[3]: row.split() for row in rows}
        ours = by_client[service(net.client(family), 4000)]
        assert ours[0:1] + ours[2:6] == [
            "TCP", "ESTABLISHED", service(net.client(family), 4000), where, service(net.server(family), 8080),
        ]  # fmt: skip
        assert ours[6:] == ([peer] if "persistent" not in words else ["-", "-", peer])
        assert re.fullmatch(r"01:[0-3]\d", ours[1]), f"{ours[1]}: the service's own time-out is 90 s"
        others = by_client[service(net.client(family), 4001)]
        assert (others[2], others[5], len(others)) == ("ESTABLISHED", service(net.server(family, 1), 8080), 6)
        assert len(by_client[service(net.client(family), 0)]) == 6, "a template has no local address"
    assert ipvsadm(net.director, "-G -n").out.splitlines()[2].split() == [net.local(family), "0", "1"]
    taken(net.director, f"-e -t {where} -r {service(net.server(family), 8080)} -w 0")
    (bulk,) = client.get(net.vip(family), port=81)
    assert bulk.split()[0] == "server1"
    assert any(c.cport == 4000 and c.state == "ESTABLISHED" for c in net.director.connections()), "weight 0 ended it"


@pytest.mark.parametrize("family", FAMILIES)
def test_counters(site: Callable[..., Site], family: int) -> None:
    """Both directions of service and real server, as with NAT."""
    net = site(servers=1)
    net.serve()
    where = net.balance(family, "-b", locals_=1)
    net.clients[0].get(net.vip(family))

    def counted() -> bool:
        rows = [line.split() for line in ipvsadm(net.director, "-L -n --stats --exact").out.splitlines()[3:]]
        numbers = {row[1]: [int(n) for n in row[2:]] for row in rows}
        real = numbers[service(net.server(family), 80)]
        return real == numbers[where] and real[0] == 1 and all(n > 0 for n in real)

    net.director.wait_until(counted, "counters of both directions, alike for the service and the real server")
    rate = ipvsadm(net.director, "-L -n --rate --exact").out.splitlines()
    assert [len(line.split()) for line in rate[3:]] == [7, 7]
