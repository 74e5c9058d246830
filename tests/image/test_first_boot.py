"""Golden image + seed = that host; then a changed cluster file, by `apply` and by a new seed; in both modes.

pytest -m long tests/image/test_first_boot.py
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import run, settings
from pipeline.errors import BuildError
from tests.image import fleet as fleets
from tests.image.fleet import BACKUP, DIRECTOR, DIRECTORS, OSPF, REAL, ROUTER, VIPS, VRRP, Fleet

pytestmark = [pytest.mark.build, pytest.mark.long]

AS_IT_SHOULD_BE = [f"== {name}: as it should be" for name in (DIRECTOR, REAL)]
SESSIONS = 240  # more than the check of their spread asks for


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleets.fleet(tmp_path_factory.mktemp("fleet")) as found:
        found.until(ROUTER, "vtysh -d ospfd -c 'show ip ospf neighbor' | grep -q Full", "OSPF")
        found.until(ROUTER, "vtysh -d ospf6d -c 'show ipv6 ospf6 neighbor' | grep -q Full", "OSPF for IPv6")
        for vip in VIPS:
            found.until(DIRECTOR, f"ip -o address show dev lo to {vip} | grep -q .", f"quorum for {vip}")
            found.until(ROUTER, f"ip -o route get {vip} | grep -q eth1", f"the route to {vip}")
        yield found


def bound(fleet: Fleet, device: str, name: str = DIRECTOR) -> set[str]:
    """The addresses of a device of a director, link-local ones left out."""
    (link,) = json.loads(fleet.ask(name, f"ip -j address show dev {device}"))
    return {f"{each['local']}/{each['prefixlen']}" for each in link["addr_info"] if each["scope"] != "link"}


def talk(fleet: Fleet, sessions: int = SESSIONS) -> None:
    """A client's connections to every VIP, each for one page."""
    for vip, port in ((VIPS[0], 80), (f"[{VIPS[2]}]", 80), (VIPS[1], 8080)):
        target = f"http://{vip}:{port}/index.html?[1-{sessions}]"
        pages = fleet.ask(ROUTER, f"curl -sS -m 100 --noproxy '*' -H 'Connection: close' '{target}'")
        assert pages.split() == ["rs-1"] * sessions


def well(found: dict[tuple[str, str], tuple[str, str]]) -> None:
    """All checks are green."""
    wrong = {name: said for name, (result, said) in found.items() if result == "failed"}
    assert not wrong, json.dumps({" ".join(name): said for name, said in wrong.items()}, indent=1)


# --- mode ospf


def test_a_seed_makes_the_image_that_host(fleet: Fleet) -> None:
    assert fleet.ask(DIRECTOR, "hostname") == DIRECTOR
    assert bound(fleet, "eth1") == {"192.0.2.2/24", "2001:db8:2::2/64"}
    local = {f"10.64.0.{n}/32" for n in range(1, 5)} | {f"2001:db8:64::{n}/128" for n in range(1, 5)}
    assert bound(fleet, "eth2") == {"10.64.255.254/16", "2001:db8:64::ff/64"} | local
    assert bound(fleet, "lo") == {"127.0.0.1/8", "::1/128", *(f"{vip}/{128 if ':' in vip else 32}" for vip in VIPS)}
    assert fleet.ask(DIRECTOR, "systemctl --failed --plain --no-legend") == ""
    # What cloud-init has written is what `apply` would write.
    assert fleet.invoke("plan").stdout.splitlines()[-2:] == AS_IT_SHOULD_BE


def test_all_checks_are_green(fleet: Fleet) -> None:
    talk(fleet)
    found = fleet.check(client=True)
    well(found)
    # All of them, and on what there was to judge.
    assert [name for name, (result, _) in found.items() if result == "skipped"] == []
    assert {host for host, _ in found} == {DIRECTOR, REAL}


# Whom each of the test's changes concerns.
CHANGED = [
    "/etc/keepalived/keepalived.conf",
    "/etc/keepalived/web.conf",
    "/etc/lvs/host.conf",
    "/etc/lvs/network-config",
    "/etc/quagga/ospf6d.conf",
    "/etc/quagga/ospfd.conf",
    "/etc/sysctl.d/70-host.conf",
]


def test_apply_converges_and_then_does_nothing(fleet: Fleet) -> None:
    """A VIP more, by the daily operation; then several changes of the file at once."""
    fleet.invoke("add-vip", "--service", "shop", "--vip", "203.0.113.3", "--apply")
    assert "203.0.113.3/32" in bound(fleet, "lo")
    data = yaml.safe_load(fleet.file.read_text(encoding="utf-8"))
    data["local_addresses"]["laddr_g1"]["without"] = ["10.64.0.4"]
    data["services"][0]["real_servers"][0]["weight"] = 3
    data["directors"][0]["sysctl"] = {"net.core.somaxconn": 2048}
    data["directors"][0]["interfaces"][2]["routes"] = [{"to": "10.66.0.0/16", "via": "10.64.1.2"}]
    data["ospf"]["reference_bandwidth"] = 10000
    fleet.write(data)
    concerned = "network sysctl keepalived rc-local ospfd ospf6d"
    planned = fleet.invoke("plan").stdout
    assert f"concerned: {concerned}" in planned, planned
    assert re.findall(r"^  --- (\S+)", planned, re.MULTILINE) == CHANGED
    done = fleet.invoke("apply", "--drain", "10").stdout.splitlines()
    assert done[-2:] == [
        f"{REAL}: nothing to do",
        f"{DIRECTOR}: {len(CHANGED)} files changed, {concerned}",
    ]
    assert "10.64.0.4/32" not in bound(fleet, "eth2")
    assert fleet.ask(DIRECTOR, "sysctl -n net.core.somaxconn") == "2048"
    routes = fleet.ask(DIRECTOR, "ip route show proto static dev eth2")
    assert "10.66.0.0/16" in routes and "10.65.0.0/16" not in routes
    before = fleet.ask(DIRECTOR, "find /etc /var/lib/lvs -newer /etc/lvs/files -type f | sort")
    done = fleet.invoke("apply").stdout.splitlines()
    assert done[-2:] == [f"{REAL}: nothing to do", f"{DIRECTOR}: nothing to do"]
    assert fleet.ask(DIRECTOR, "find /etc /var/lib/lvs -newer /etc/lvs/files -type f | sort") == before


# --- each check seen to fail


@dataclass(frozen=True)
class Break:
    """Something that is broken on a running host.

    Attributes:
        check: the check whose subject it is, as the table calls it.
        says: in the check's words, as a pattern.
        how: the command that breaks it.
        mend: the command that makes it whole again.
        where: the host on which they are typed; the check is of `host`.
        shows: a command on that host that succeeds when the break has shown there.
        talk: a client talks while it is broken, and it is mended before the check looks.
    """

    check: str
    says: str
    how: str
    mend: str
    where: str = DIRECTOR
    host: str = DIRECTOR
    shows: str = "true"
    talk: bool = False


SHOP, WEB = "203.0.113.2:8080", "203.0.113.1:80"
FULL = "until vtysh -d {0} -c 'show {1} neighbor' | grep -q Full; do sleep 1; done"
FULL4, FULL6 = FULL.format("ospfd", "ip ospf"), FULL.format("ospf6d", "ipv6 ospf6")
QUEUE = (
    "awk -v n=$(basename $(readlink -f /sys/class/net/eth1/device))-input.0 '$NF == n {print $1+0}' /proc/interrupts"
)
SECOND = "-f /run/second.conf -p /run/second.pid -c /run/second-c.pid -r /run/second-r.pid"
ALL_UP = "! ipvsadm -Ln | grep -q 'FullNat 0 ' && [ $(ipvsadm -Ln | grep -c FullNat) -ge 6 ]"
HEALTHY = f"until {ALL_UP}; do sleep 1; done"
LEARNT = "ip {0} route show proto ospf | grep -q default"
ROUTED = f"{{ [ ! -e /etc/quagga/ospfd.conf ] || {{ {LEARNT.format('-4')} && {LEARNT.format('-6')}; }}; }}"
# What is broken at the same time: of one host each check once, and nothing that another break would hide.
BREAKS = [
    [
        Break(
            "vips are on lo",
            r"not on lo: 203\.0\.113\.2/32",
            "ip address del 203.0.113.2/32 dev lo",
            "ip address replace 203.0.113.2/32 dev lo",
        ),
        Break(
            "local addresses are on the downlink",
            r"not on eth2: 10\.64\.0\.2/32",
            "ip address del 10.64.0.2/32 dev eth2",
            "ip address replace 10.64.0.2/32 dev eth2",
        ),
        Break(
            "health checks come from no local address",
            r"2001:db8:64::1:1 is asked from 2001:db8:64::2",
            "ip address change 2001:db8:64::2/128 dev eth2 preferred_lft forever",
            "ip address change 2001:db8:64::2/128 dev eth2 preferred_lft 0",
        ),
        Break(
            "services are in the kernel",
            f"TCP {re.escape(SHOP)}: scheduler wlc",
            f"ipvsadm -E -t {SHOP} -s wlc",
            f"ipvsadm -E -t {SHOP} -s wrr",
        ),
        Break(
            "real servers are healthy and weighted",
            rf"TCP {re.escape(SHOP)}: 10\.64\.1\.2:80 has weight 7 for 300",
            f"ipvsadm -e -t {SHOP} -r 10.64.1.2:80 -b -w 7",
            f"ipvsadm -e -t {SHOP} -r 10.64.1.2:80 -b -w 300",
        ),
        Break(
            "services have their local addresses",
            rf"TCP {re.escape(SHOP)}: \['10\.64\.0\.1', '10\.64\.0\.2', '10\.64\.0\.4'\], not",
            f"ipvsadm -Q -t {SHOP} -z 10.64.0.3",
            f"ipvsadm -P -t {SHOP} -z 10.64.0.3",
        ),
        Break(
            "routes of the cluster file are there",
            r"no route to 10\.65\.0\.0/16 by 10\.64\.1\.1 on eth2",
            "ip route del 10.65.0.0/16",
            "ip route add 10.65.0.0/16 via 10.64.1.1 dev eth2 proto static",
        ),
        Break(
            "kernel settings are in force",
            r"net\.ipv4\.conf\.all\.arp_ignore is 0, not 1",
            "sysctl -qw net.ipv4.conf.all.arp_ignore=0",
            "sysctl -qw net.ipv4.conf.all.arp_ignore=1",
        ),
        Break(
            "interrupts are spread",
            r"eth1: irq \d+ may run on CPU 0-1, not on \d alone",
            f"echo 3 >/proc/irq/$({QUEUE})/smp_affinity",
            "systemctl restart rc-local",
        ),
        Break(
            "toa is there",
            "neither the module toa nor toa-bpf is loaded",
            "toa-bpf unload 2>/dev/null; ! grep -q '^toa ' /proc/modules || rmmod toa",
            "if modinfo toa >/dev/null 2>&1; then modprobe toa; else toa-bpf load; fi",
            where=REAL,
            host=REAL,
        ),
        Break(
            "kernel settings are in force",
            r"net\.core\.somaxconn is 128, not 4096",
            "sysctl -qw net.core.somaxconn=128",
            "sysctl -qw net.core.somaxconn=4096",
            where=REAL,
            host=REAL,
        ),
    ],
    [
        Break(
            "vips are on lo",
            r"on lo, in no service: 203\.0\.113\.99/32",
            "ip address add 203.0.113.99/32 dev lo",
            "ip address del 203.0.113.99/32 dev lo",
        ),
        Break(
            "local addresses are on the downlink",
            r"local addresses on other interfaces: .*'eth1': \['2001:db8:64::3/128'\]",
            "ip address add 2001:db8:64::3/128 dev eth1",
            "ip address del 2001:db8:64::3/128 dev eth1",
        ),
        Break(
            "services are in the kernel",
            f"missing: TCP {re.escape(SHOP)}",
            f"ipvsadm -D -t {SHOP}",
            f"systemctl restart keepalived; {HEALTHY}",
        ),
        Break(
            "keepalived has nothing to complain about",
            "Unknown keyword 'frobnicate'",
            "echo frobnicate >>/etc/keepalived/shop.conf; systemctl reload keepalived",
            f"sed -i '$d' /etc/keepalived/shop.conf; systemctl restart keepalived; {HEALTHY}",
            shows="grep -q frobnicate /var/log/messages",
        ),
        Break(
            "routes of ospf are there",
            "no default route by OSPF",
            "ip route add default via 192.0.2.1 dev eth1",  # better than what any daemon has learnt
            "ip route del default via 192.0.2.1 dev eth1 metric 0",
            shows="! ip route show proto ospf | grep -q default",
        ),
        Break(
            "real servers answer",
            r"http://\[2001:db8:64::1:2\]:80/index\.html: 000, not 200",
            "ip address del 2001:db8:64::1:2/64 dev eth1",
            "ip address add 2001:db8:64::1:2/64 dev eth1 nodad",
            where=REAL,
        ),
        Break(
            "toa believes the directors",
            r"toa(-bpf)? believes \['0\.0\.0\.0/0'",
            "sed -i 's,^trusted = .*,trusted = 0.0.0.0/0,' /etc/toa-bpf.conf; "
            "sysctl -qw net.toa.trusted=0.0.0.0/0 2>/dev/null || systemctl reload-or-restart toa-bpf",
            "T=$(sed -n 's/^net.toa.trusted = //p' /etc/sysctl.d/70-host.conf); "
            "sed -i \"s|^trusted = .*|trusted = $(echo $T | sed 's/,/, /g')|\" /etc/toa-bpf.conf; "
            "sysctl -qw net.toa.trusted=$T 2>/dev/null || systemctl reload-or-restart toa-bpf",
            where=REAL,
            host=REAL,
        ),
    ],
    [
        Break(
            "real servers are healthy and weighted",
            r"10\.64\.1\.1:80 has weight 0 for 1 \(down\?\)",
            "systemctl stop web",
            fleets.SERVE,
            where=REAL,
            shows=f"ipvsadm -Ln -t {WEB} | grep -q 'FullNat 0 '",
        ),
    ],
    [
        Break(
            "keepalived has its processes",
            "4 processes of keepalived, 2 are right",
            f"sed 's/10.64.1.1/10.64.1.9/;s/{VIPS[1]}/203.0.113.98/' /etc/keepalived/shop.conf >/run/second.conf; "
            f"sed -i 's/laddr_group_name.*//;s/FNAT/NAT/;/vip_bind_dev/d' /run/second.conf; keepalived {SECOND}",
            "kill $(cat /run/second.pid); while [ -e /run/second.pid ]; do sleep 1; done",
            shows="[ $(pgrep -cx keepalived) = 4 ]",
        ),
        Break(
            "services of the host run",
            "'zebra': 'inactive'",
            "systemctl stop zebra",
            f"systemctl start zebra ospfd ospf6d; {FULL4}; {FULL6}",
        ),
        Break(
            "real servers answer",
            r"http://10\.64\.1\.1:80/index\.html: 404, not 200",
            "mv /srv/www/index.html /srv/www/gone",
            "mv /srv/www/gone /srv/www/index.html",
            where=REAL,
        ),
    ],
    [
        # keepalived is started anew after it, and sessions are counted anew.
        Break(
            "sessions are spread evenly",
            rf"TCP {re.escape(WEB)}: 10\.64\.1\.1:80 had \d+ of \d+ sessions, its share is \d+",
            f"ipvsadm -Z; ipvsadm -e -t {WEB} -r 10.64.1.2:80 -b -w 0",
            f"ipvsadm -e -t {WEB} -r 10.64.1.2:80 -b -w 1",
            talk=True,
        ),
    ],
    [
        Break(
            "ospf says and hears hellos",
            r"no hello of this host on eth1 in 8 s \(OSPFv2\)",
            "systemctl stop ospfd",
            f"systemctl start ospfd; {FULL4}",
        ),
        Break(
            "ospf neighbours of ipv6 are full",
            "no neighbour is Full: {}",
            "vtysh -d ospf6d -c 'configure terminal' -c 'interface eth1' -c 'ipv6 ospf6 hello-interval 5'",
            f"vtysh -d ospf6d -c 'configure terminal' -c 'interface eth1' -c 'ipv6 ospf6 hello-interval 3'; {FULL6}",
            where=ROUTER,
            shows="! vtysh -d ospf6d -c 'show ipv6 ospf6 neighbor' | grep -q Full",
        ),
        Break(
            "keepalived has its processes",
            "0 processes of keepalived, 2 are right",
            "systemctl stop keepalived",
            f"systemctl start keepalived; {HEALTHY}",
        ),
    ],
    [
        Break(
            "ospf says and hears hellos",
            r"no hello of a neighbour on eth1 in 8 s \(OSPFv3\)",
            "systemctl stop ospf6d",
            f"systemctl start ospf6d; {FULL6}",
            where=ROUTER,
        ),
        Break(
            "ospf neighbours are full",
            "no neighbour is Full: {}",
            "vtysh -d ospfd -c 'configure terminal' -c 'interface eth1' -c 'ip ospf hello-interval 5'",
            f"vtysh -d ospfd -c 'configure terminal' -c 'interface eth1' -c 'ip ospf hello-interval 3'; {FULL4}",
            where=ROUTER,
            shows="! vtysh -d ospfd -c 'show ip ospf neighbor' | grep -q Full",
        ),
        Break(
            "packets for withdrawn vips are dropped",
            r"dropped for \['2001:db8:ffff::1'\], not for \['2001:db8:ffff::1', '203\.0\.113\.1', '203\.0\.113\.2'\]",
            "ip route flush proto 254",
            "systemctl restart rc-local",
        ),
        Break(
            "routes of ospf for ipv6 are there",
            "no default route by OSPF",
            "systemctl stop ospf6d",
            f"systemctl start ospf6d; {FULL6}",
            where=ROUTER,
            shows="! ip -6 route show proto ospf | grep -q default",
        ),
        Break(
            "keepalived has its processes",
            "0 processes of keepalived, 2 are right",
            # systemd starts it again within a second, unless it cannot.
            "mv /usr/sbin/keepalived /usr/sbin/gone; kill -9 $(systemctl show -P MainPID keepalived)",
            f"mv /usr/sbin/gone /usr/sbin/keepalived; systemctl reset-failed; systemctl restart keepalived; {HEALTHY}",
            shows="! pgrep -x keepalived",
        ),
    ],
    [
        # Health checks come from the downlink's own address: nothing else notices.
        Break(
            "vips answer a client",
            r"http://203\.0\.113\.1:80/index\.html: 000, not 200",
            "ip route add blackhole 10.64.0.0/24",
            "ip route del blackhole 10.64.0.0/24",
            where=REAL,
        ),
    ],
]
BREAKS_VRRP = [
    [
        Break(
            "vips are where the master is",
            r"VI_1: .*'eth2': \{'203\.0\.113\.1/32'\}",
            "ip address add 203.0.113.1/32 dev eth2",
            "ip address del 203.0.113.1/32 dev eth2",
        ),
        Break(
            "routes of the cluster file are there",
            r"no route to default by 2001:db8:2::1 on eth1",
            "ip -6 route del default",
            "ip -6 route add default via 2001:db8:2::1 dev eth1 proto static",
        ),
        Break(
            "packets for vips elsewhere are dropped",
            r"dropped for \[\], not for \['2001:db8:ffff::/64', '203\.0\.113\.0/24'\]",
            "nft delete table inet lvs",
            "systemctl restart rc-local",
        ),
    ],
    [
        Break(
            "keepalived has its processes",
            "0 processes of keepalived, 3 are right",
            "systemctl stop keepalived",
            f"systemctl start keepalived; {HEALTHY}",
        ),
    ],
    [
        # A dead master whose VIPs stay: systemd's stop would have taken them away.
        Break(
            "one master advertises",
            r"VI_1: VIPs are here, and 192\.0\.2\.3 is master too",
            # One that has just started is no master yet, and a backup that is dead is not this check's to find.
            f"until ip -o address show dev eth1 to {VIPS[0]} | grep -q .; do sleep 1; done; "
            "systemctl kill -s STOP keepalived",
            "systemctl kill -s CONT keepalived",
            shows="timeout 5 tcpdump -i eth1 -nn -c 1 'ip proto 112 and src 192.0.2.3'",
        ),
    ],
]


def shown_by_their_checks(fleet: Fleet, breaks: list[Break]) -> Iterator[tuple[Break, str, str]]:
    """Break all of them, look, mend all; what their checks said."""
    names = {item.check.replace(" ", "_") for item in breaks}
    broken: list[Break] = []
    try:
        for item in breaks:
            fleet.ask(item.where, item.how)
            broken.append(item)
        for item in breaks:
            fleet.until(item.host, item.shows, f"the break shows: {item.how}")
        if any(item.talk for item in breaks):
            talk(fleet)
            mend(fleet, broken)
        hosts = sorted({item.host for item in breaks})
        found = fleet.check(*hosts, k=" or ".join(names), client="vips_answer_a_client" in names)
    finally:
        mend(fleet, broken)
    for item in breaks:
        yield item, *found[item.host, item.check]


def mend(fleet: Fleet, broken: list[Break]) -> None:
    """Make whole what is broken, the last first, and wait until it is."""
    while broken:
        item = broken.pop()
        fleet.ask(item.where, item.mend)
    for director in (name for name in DIRECTORS if name in fleet.machines):
        fleet.until(director, f"{ALL_UP} && {ROUTED}", "healthy real servers and routes")


def shown_one_by_one(fleet: Fleet, rounds: list[list[Break]], file: Path) -> None:
    """Each check fails when its subject is broken, and all are green when everything is whole again."""
    lines, missed = [], []
    for breaks in rounds:
        try:
            for item, result, said in shown_by_their_checks(fleet, breaks):
                lines.append(f"| {item.check} | {item.where}: `{' '.join(item.how.split())}` | {said} |")
                if result != "failed" or not re.search(item.says, said):
                    missed.append(f"{item.check}, {item.how}: {result}: {said}")
        except (AssertionError, BuildError) as error:
            missed.append(f"{', '.join(item.check for item in breaks)}: {error}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert not missed, "\n".join(missed)
    green(fleet)


def green(fleet: Fleet, *hosts: str) -> None:
    """Wait until no check fails."""
    failed: list[str] = []

    def whole() -> bool:
        found = fleet.check(*hosts).items()
        failed[:] = [f"{host}: {check}: {said}" for (host, check), (result, said) in found if result == "failed"]
        return not failed

    run.wait_until(whole, deadline=fleet.seconds(50), what="all checks are green", hint="-", tail_of=lambda: failed)


def test_every_check_fails_when_its_subject_is_broken(fleet: Fleet) -> None:
    fleet.write(OSPF)
    fleet.invoke("apply")
    known = {check for _, check in fleet.check()}
    shown_one_by_one(fleet, BREAKS, settings.out() / "checks-broken-ospf.md")
    assert {item.check for breaks in BREAKS for item in breaks} == known, "every check is among them"


# --- mode vrrp


ALL_VIPS = (*VIPS, "203.0.113.4")
BOUND = {f"{vip}/{128 if ':' in vip else 32}" for vip in ALL_VIPS}
PAIR = [f"== {name}: as it should be" for name in (*DIRECTORS, REAL)]


@pytest.fixture(scope="module")
def pair(fleet: Fleet) -> Fleet:
    """The same machines, with the seed of mode vrrp at their next boot, and a backup that boots for the first time.

    Its power goes in the moment in which its seed is applied, so that it boots once more.
    """
    data: dict[str, Any] = copy.deepcopy(VRRP)
    data["services"][1]["vips"] = [VIPS[1], "203.0.113.4"]
    fleet.write(data)
    fleet.stop(DIRECTOR)
    fleet.start(BACKUP)
    fleet.cut(BACKUP, "Started \x1b[0;1;39mcloud-init-local")
    for name in DIRECTORS:
        fleet.start(name)
    # VIPs are neighbours on the router's link now.
    for prefix in OSPF["vip_prefixes"]:
        fleet.ask(ROUTER, f"ip {'-6' if ':' in prefix else '-4'} route replace {prefix} dev eth1")
    for name in DIRECTORS:
        fleet.booted(name)
    is_master(fleet, DIRECTOR)
    for name in DIRECTORS:
        fleet.until(name, ALL_UP, "healthy real servers")
    return fleet


def is_master(fleet: Fleet, name: str) -> None:
    """Wait until a director has all VIPs."""
    for vip in ALL_VIPS:
        fleet.until(name, f"ip -o address show dev eth1 to {vip} | grep -q .", f"being master of {vip}")


def test_a_new_seed_makes_it_another_host(pair: Fleet) -> None:
    assert not {f"{vip}/32" for vip in VIPS} & bound(pair, "lo")
    assert pair.ask(DIRECTOR, "ls /etc/quagga") == "vtysh.conf"  # the package's own
    states = pair.ask(DIRECTOR, "systemctl is-active zebra ospfd ospf6d keepalived || :").split()
    assert states == ["inactive", "inactive", "inactive", "active"]
    assert pair.invoke("plan").stdout.splitlines()[-3:] == PAIR


def test_all_checks_are_green_in_mode_vrrp(pair: Fleet) -> None:
    assert bound(pair, "eth1") >= BOUND and not bound(pair, "eth1", BACKUP) & BOUND
    talk(pair)
    found = pair.check(client=True)
    well(found)
    # The backup has had no sessions.
    skipped = [name for name, (result, _) in found.items() if result == "skipped"]
    assert skipped == [(BACKUP, "sessions are spread evenly")]
    assert {host for host, _ in found} == {*DIRECTORS, REAL}


def test_vips_move_to_the_backup_and_back(pair: Fleet) -> None:
    pair.ask(DIRECTOR, "systemctl stop keepalived")
    is_master(pair, BACKUP)
    assert not bound(pair, "eth1") & BOUND
    talk(pair)
    found = pair.check(client=True)
    wrong = {name for name, (result, _) in found.items() if result == "failed"}
    assert wrong == {
        (DIRECTOR, check)
        for check in (
            "keepalived has its processes",
            "services are in the kernel",
            "services have their local addresses",
            "real servers are healthy and weighted",
            "services of the host run",
        )
    }
    assert found[BACKUP, "sessions are spread evenly"][0] == "passed"
    pair.ask(DIRECTOR, "systemctl start keepalived")
    is_master(pair, DIRECTOR)
    pair.until(BACKUP, f'[ -z "$(ip -o address show dev eth1 to {VIPS[0]})" ]', "being backup again")
    talk(pair)
    green(pair)


def test_every_check_of_mode_vrrp_fails_when_its_subject_is_broken(pair: Fleet) -> None:
    known = {check for _, check in pair.check()}
    shown_one_by_one(pair, BREAKS_VRRP, settings.out() / "checks-broken-vrrp.md")
    assert {item.check for breaks in (*BREAKS, *BREAKS_VRRP) for item in breaks} >= known
