"""Our zebra and ospfd with the operations manual's files, beside a router of Debian's own FRR package.

    director (eth0 192.168.0.14/30, virtual addresses on lo) ── eth0 peer ── core (10.9.9.0/24, the backbone)

The peer connects the manual's stub area with the backbone, as the routers above a cluster of directors do. The times of
the protocol are real ones: an adjacency takes about fifteen seconds, on whichever machine.
"""

from __future__ import annotations

import hashlib
import ipaddress
import itertools
import json
import re
import statistics
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from pipeline import rpm, settings
from pipeline.store import Store
from tests.kernel.lab import Lab, Namespace
from tests.kernel.machine import Background, Done
from tests.kernel.packets import Packet
from tools import build as tools

pytestmark = [pytest.mark.build, pytest.mark.guest]

MANUAL = settings.TOP / "provision/examples/manual/ospf/etc/quagga"
RENDERED = settings.TOP / "tests/cases/render/minimal/expected/lvs-1/rootfs/etc"
ETC = "/etc/quagga"
ZEBRA, OSPFD = f"/usr/sbin/zebra -d -f {ETC}/zebra.conf", f"/usr/sbin/ospfd -d -f {ETC}/ospf.conf"  # as it is typed
LOGS = {"zebra": "/var/log/zebra.log", "ospfd": "/var/log/ospf.log"}
DIRECTOR, PEER, AREA, KEY, KEY_NUMBER = "192.168.0.14", "192.168.0.13", "0.0.0.11", "123456", 8
VIPS = ("1.1.1.1", "1.1.1.2")
ELSEWHERE = "1.1.2.1"  # in no network of the manual's file
PEER_RUN = "/run/frr/peer"
PEER_ZEBRA = "hostname peer\n"
PEER_OSPF = f"""hostname peer
interface eth0
 ip ospf message-digest-key {KEY_NUMBER} md5 {KEY}
 ip ospf hello-interval 3
 ip ospf dead-interval 12
router ospf
 ospf router-id {PEER}
 network 192.168.0.12/30 area {AREA}
 network 10.9.9.0/24 area 0.0.0.0
 area {AREA} authentication message-digest
 area {AREA} stub no-summary
"""
OSPF6D = f"/usr/sbin/ospf6d -d -f {ETC}/ospf6d.conf"
PEER_LOG = f"{PEER_RUN}/ospf6d.log"
_UPLINK6 = """interface {nic}
 ipv6 ospf6 area {area}
 ipv6 ospf6 hello-interval 3
 ipv6 ospf6 dead-interval 12
"""
_OSPF6 = """interface lo
 ipv6 ospf6 area {area}
router ospf6
 ospf6 router-id {router_id}
"""
# RFC 2328 A.3
HELLO, UPDATE, ROUTER_LSA, CRYPTOGRAPHIC, EXTERNAL_BIT = 1, 4, 1, 2, 0x02
STANDING = 20.0  # seconds within which what OSPF retransmits must have come; two of its intervals and more


@dataclass(frozen=True)
class Heard:
    """An OSPF packet.

    Attributes:
        at: when, in seconds of the machine's monotonic clock.
        source: the sender's address.
        kind: `HELLO`, `UPDATE`, …
        area: its area.
        authentication: the kind of it.
        key: the key's number.
        text: header and body, which the digest covers.
        digest: what follows them.
    """

    at: float
    source: str
    kind: int
    area: str
    authentication: int
    key: int
    text: bytes
    digest: bytes

    @classmethod
    def parse(cls, line: str) -> Heard:
        """A line of `inside/routing.py`."""
        at, data = line.split()
        packet = Packet(bytes.fromhex(data))
        segment = packet.segment
        version, kind, length, area, authentication, key = struct.unpack_from("!BBH4x4s2xH2xB", segment)
        assert version == 2
        where = str(ipaddress.IPv4Address(area))
        return cls(float(at), packet.source, kind, where, authentication, key, segment[:length], segment[length:])

    def is_signed_with(self, key: str) -> bool:
        """RFC 2328 D.4.3."""
        return hashlib.md5(self.text + key.encode().ljust(16, b"\0"), usedforsecurity=False).digest() == self.digest

    @property
    def hello(self) -> tuple[int, int, int]:
        """Of a hello: its interval, its options, the dead interval."""
        return struct.unpack_from("!HBxI", self.text, 28)

    def router_lsas(self, router: str) -> Iterator[int]:
        """Of an update: the sequence numbers of a router's own LSA."""
        (count,) = struct.unpack_from("!I", self.text, 24)
        at = 28
        for _ in range(count):
            kind, name, number, length = struct.unpack_from("!3xB4s4xI2xH", self.text, at)
            if kind == ROUTER_LSA and name == ipaddress.IPv4Address(router).packed:
                yield number
            at += length


class Ear:
    """Hears OSPF on the director's uplink."""

    def __init__(self, job: Background) -> None:
        self._job = job

    def lines(self) -> list[str]:
        """What came until now."""
        return self._job.so_far().splitlines()

    def packets(self, source: str, kind: int = 0) -> list[Heard]:
        """The packets of one sender, of one kind or all."""
        found = (Heard.parse(line) for line in self.lines()[1:])
        return [one for one in found if one.source == source and kind in (0, one.kind)]


class Routers:
    """The director and its peer."""

    def __init__(self, lab: Lab) -> None:
        self.guest = lab.guest
        self.director = lab.namespace("director")
        self.peer = lab.namespace("peer")
        self.director.ip(
            f"link add eth0 type veth peer name eth0 netns {self.peer.handle}",
            f"addr add {DIRECTOR}/30 dev eth0",
            "link set eth0 up",
        )
        self.peer.ip(
            f"addr add {PEER}/30 dev eth0",
            "link set eth0 up",
            "link add core type dummy",
            "addr add 10.9.9.1/24 dev core",
            "link set core up",
        )
        self._install()

    def _install(self) -> None:
        """What rpm does beside unpacking: owners, folders and logs; Debian's package has made the daemons' user."""
        room = tools.room(Store())
        (package,) = tools.packages(room.store.path(room.stage("quagga")))
        owners = rpm.query(room.sandbox(), package, "[%{FILEUSERNAME}:%{FILEGROUPNAME} %{FILENAMES}\n]").splitlines()
        lines = [f"chown {line}" for line in owners if not line.startswith("root:root ")]
        assert lines
        self.guest.run("sh", "-ec", "; ".join([*lines, "systemd-tmpfiles --create frr.conf"]))
        for name in ("zebra.conf", "ospf.conf"):
            self.configure(name, (MANUAL / name).read_text(encoding="utf-8"))

    def configure(self, name: str, text: str) -> None:
        """Write a file as an operator with an editor does: it is root's."""
        self.guest.write(f"{ETC}/{name}", text)

    def type(self, line: str, *, check: bool = True) -> Done:
        """Type a command on the director."""
        return self.director.run(*line.split(), seconds=10, check=check)

    def start_peer(self) -> None:
        """Start Debian's daemons."""
        self.guest.run("install", "-d", "-o", "frr", "-g", "frr", PEER_RUN)
        for daemon, text in (("zebra", PEER_ZEBRA), ("ospfd", PEER_OSPF)):
            self.guest.write(f"/tmp/peer-{daemon}.conf", text)  # noqa: S108  the guest's
            words = ("-d", "-N", "peer", "-P", "0", "-f", f"/tmp/peer-{daemon}.conf")  # noqa: S108
            self.peer.run(f"/usr/lib/frr/{daemon}", *words, seconds=10)

    def listen(self) -> Ear:
        """Hear what is said between the two."""
        ear = Ear(self.director.start_call("routing:listen", device="eth0"))
        self.director.wait_until(lambda: bool(ear.lines()), "the ear")
        return ear

    def ask(self, *commands: str, peer: bool = False) -> str:
        """Commands for vtysh."""
        words = [word for command in commands for word in ("-c", command)]
        return self.guest.run("vtysh", *(["--vty_socket", PEER_RUN] if peer else []), *words, seconds=10).out

    def neighbours(self, *, peer: bool = False) -> dict[str, dict[str, Any]]:
        """By their router-id, what the director (or the peer) says about its neighbours."""
        answer = json.loads(self.ask("show ip ospf neighbor json", peer=peer) or "{}")
        return {name: rows[0] for name, rows in answer.get("neighbors", {}).items()}

    def full(self) -> bool:
        """Whether each knows all that the other knows."""
        sides = ((self.neighbours(), PEER), (self.neighbours(peer=True), DIRECTOR))
        return all(rows.get(name, {}).get("nbrState", "").startswith("Full/") for rows, name in sides)

    def strangers(self) -> bool:
        """Whether neither knows the other."""
        return not self.neighbours() and not self.neighbours(peer=True)

    def wait(self, probe: Any, what: str, seconds: float = 60.0) -> float:
        """Wait for a state, so many seconds of the protocol and a slow machine's own; returns how long it took."""
        begun = self.clock()
        self.director.wait_until(probe, what, seconds / self.guest.scale + 10)
        return self.clock() - begun

    def clock(self) -> float:
        """The machine's monotonic seconds."""
        return float(self.guest.ask("hello")["uptime"])

    def connect(self) -> None:
        """Start everything and wait for the adjacency."""
        self.start_peer()
        self.type(ZEBRA)
        self.type(OSPFD)
        self.wait(self.full, "the adjacency")

    def connect6(self, *others: Namespace) -> None:
        """Start OSPF for IPv6, and wait for adjacencies: with the peer, and with others on links of their own."""
        director = "hostname director\n"
        for number, place in enumerate((self.peer, *others)):
            run = f"/run/frr/{place.name}"
            self.guest.run("install", "-d", "-o", "frr", "-g", "frr", run)
            own = f"hostname {place.name}\nlog file {run}/ospf6d.log\ndebug ospf6 flooding\n"
            own += _UPLINK6.format(nic="eth0", area=AREA) + _OSPF6.format(area=AREA, router_id=f"192.168.{number}.13")
            for daemon, lines in (("zebra", f"hostname {place.name}\n"), ("ospf6d", own)):
                self.guest.write(f"{run}/{daemon}.conf", lines)
                words = ("-d", "-N", place.name, "-P", "0", "-f", f"{run}/{daemon}.conf")
                place.run(f"/usr/lib/frr/{daemon}", *words, seconds=10)
            director += _UPLINK6.format(nic=f"eth{number}", area=AREA)
        self.configure("ospf6d.conf", director + _OSPF6.format(area=AREA, router_id=DIRECTOR))
        self.type(ZEBRA)
        self.type(OSPF6D)
        full = 1 + len(others)
        self.wait(lambda: "Full/" in self.ask("show ipv6 ospf6 neighbor", peer=True), "the adjacency")
        self.wait(lambda: self.ask("show ipv6 ospf6 neighbor").count("Full/") == full, "the adjacencies")

    def learnt(self, where: Namespace, family: int = 4) -> dict[str, str]:
        """The routes that OSPF put into a kernel: gateways by destination."""
        rows = json.loads(where.run("ip", f"-{family}", "-j", "route", "show", "proto", "ospf").out or "[]")
        return {row["dst"]: row.get("gateway", "") for row in rows}

    def bind(self, *addresses: str, command: str = "add") -> None:
        """What the manual's quorum_up and quorum_down do."""
        hosts = [f"{address}/{ipaddress.ip_address(address).max_prefixlen}" for address in addresses]
        self.director.ip(*(f"addr {command} {host} dev lo" for host in hosts))

    def pids(self) -> dict[str, str]:
        """Process ids by the names of their files."""
        script = "for f in /run/frr/*.pid /run/frr/*/*.pid; do [ ! -e $f ] || echo $f $(cat $f); done"
        return dict(line.split() for line in self.guest.run("sh", "-c", script).out.splitlines())

    def end(self) -> None:
        """Kill the daemons, which are nobody's children, and take their files away."""
        for pid in (pids := list(self.pids().values())):
            self.guest.run("kill", "-KILL", pid, check=False)
        gone = f"! ls -d {' '.join(f'/proc/{pid}' for pid in pids)} 2>/dev/null"
        if pids:
            self.director.wait_until(lambda: bool(self.guest.run("sh", "-c", f"{gone} || :").out == ""), "their end")
        self.guest.run("sh", "-c", f"rm -rf /run/frr {ETC}/*.conf.sav {' '.join(f'{log}*' for log in LOGS.values())}")


@pytest.fixture
def routers(lab: Lab) -> Iterator[Routers]:
    """Both, not yet started."""
    found = Routers(lab)
    yield found
    if found.guest.alive:
        found.end()


def test_the_manuals_files_make_a_neighbour(routers: Routers) -> None:
    ear = routers.listen()
    routers.connect()
    # who runs
    for name, pid in routers.pids().items():
        assert re.search(r"^Uid:\s+(?!0\b)\d+\s", routers.guest.read(f"/proc/{pid}/status"), re.M), f"{name} is root's"
    # what is said on the wire
    routers.wait(lambda: len(ear.packets(DIRECTOR, HELLO)) >= 6, "hellos")
    for heard in ear.packets(DIRECTOR):
        assert (heard.area, heard.authentication, heard.key) == (AREA, CRYPTOGRAPHIC, KEY_NUMBER)
        assert heard.is_signed_with(KEY)
        assert not heard.is_signed_with("1234567"), "a digest that fits any key proves nothing"
    hellos = ear.packets(DIRECTOR, HELLO)
    for heard in hellos:
        interval, options, dead = heard.hello
        assert (interval, options & EXTERNAL_BIT, dead) == (3, 0, 12)
    # A busy host delays single ones; those of the default interval would be ten seconds apart.
    assert 2.5 < statistics.median(b.at - a.at for a, b in itertools.pairwise(hellos)) < 4.5
    # what the neighbour says
    assert 0 < routers.neighbours(peer=True)[DIRECTOR]["deadTimeMsecs"] <= 12_000
    # A stub area without summaries: nothing of the backbone but the way to it.
    routers.wait(lambda: routers.learnt(routers.director) == {"default": PEER}, "the way out", STANDING)
    area = json.loads(routers.ask("show ip ospf json"))["areas"][AREA]
    assert area["stubNoSummary"] is True
    assert (area["lsaSummaryNumber"], area["authentication"]) == (1, "authenticationMessageDigest")
    # what is logged, at the places that the file names
    log = routers.guest.read(LOGS["ospfd"])
    assert re.search(rf"AdjChg: Nbr {re.escape(PEER)}.* on eth0:{re.escape(DIRECTOR)}: \w+ -> Full", log), log
    assert "client" in routers.guest.read(LOGS["zebra"])
    # the dead interval
    routers.guest.run("kill", "-STOP", routers.pids()[f"{PEER_RUN}/ospfd.pid"])
    took = routers.wait(lambda: not routers.neighbours(), "the end of a silent neighbour", 30)
    assert 8 < took < 30, "neither at once nor after the default of forty seconds"
    assert re.search(r"AdjChg: .*Full -> Deleted \(InactivityTimer\)", routers.guest.read(LOGS["ospfd"]))


def test_virtual_addresses_are_announced_while_they_are_bound(routers: Routers) -> None:
    routers.connect()
    ear = routers.listen()

    def announced(*addresses: str) -> None:
        routers.wait(
            lambda: {a for a in routers.learnt(routers.peer) if a.startswith("1.1.")} == set(addresses),
            f"{addresses or 'nothing'} in the peer's kernel",
            STANDING,
        )

    assert not any(address in routers.learnt(routers.peer) for address in VIPS)
    routers.bind(*VIPS, ELSEWHERE)
    announced(*VIPS)
    assert {routers.learnt(routers.peer)[address] for address in VIPS} == {DIRECTOR}
    for address in VIPS:
        routers.peer.run("ping", "-c", "1", "-W", "20", address, seconds=25)
    routers.bind(VIPS[0], command="del")
    announced(VIPS[1])
    routers.bind(VIPS[1], command="del")
    announced()
    routers.bind(*VIPS)
    announced(*VIPS)
    routers.bind(*VIPS, command="del")
    announced()
    # All of it went out once: what a neighbour is told within a second of the last time it throws away. The sender
    # keeps that second; a busy host may bring two packets nearer to each other.
    first: dict[int, float] = {}
    for heard in ear.packets(DIRECTOR, UPDATE):
        for number in heard.router_lsas(DIRECTOR):
            first.setdefault(number, heard.at)
    assert len(first) >= 5
    moments = [first[number] for number in sorted(first)]
    assert all(b - a >= 0.7 for a, b in itertools.pairwise(moments)), moments


def test_virtual_addresses_of_ipv6_are_announced_while_they_are_bound(routers: Routers) -> None:
    """One after the other within a second, and more of them than there is room for in two announcements."""
    routers.connect6()
    every = [f"2001:db8:ffff::{number:x}" for number in range(1, 141)]

    def announced(addresses: list[str]) -> None:
        routers.wait(
            lambda: {a for a in routers.learnt(routers.peer, 6) if a.startswith("2001:")} == set(addresses),
            f"{len(addresses)} addresses in the peer's kernel",
            STANDING,
        )

    routers.director.run("sleep", "10")  # also for what two new neighbours throw away of each other
    before = len(routers.guest.read(PEER_LOG))
    for command, expected in (("add", every[:2]), ("del", [])):
        routers.director.run("sleep", "2")  # a quiet moment: what comes first goes out at once
        one, two = (f"ip addr {command} {address}/128 dev lo" for address in every[:2])
        routers.director.run("sh", "-ec", f"{one}; sleep 0.05; {two}")
        announced(expected)
    # As for IPv4, a busy host may bring two packets nearer to each other.
    early = re.findall(r"within MinLSArrival, (\d+)ms", routers.guest.read(PEER_LOG)[before:])
    assert all(int(each) >= 700 for each in early), f"thrown away by the peer until they came again: {early}"
    routers.bind(*every[:139])
    announced(every[:139])
    # One more or less does nothing to those of other announcements, even where nothing has changed for a while. (Those
    # of the same one the peer takes out of its kernel, and puts in again.)
    heard = routers.peer.start("ip", "-6", "monitor", "route")
    for command in ("add", "del"):
        routers.director.run("sleep", "2")
        routers.bind(every[139], command=command)
        announced(every if command == "add" else every[:139])
    routers.wait(lambda: f"Deleted {every[139]} " in heard.so_far(), "the peer's word for it", STANDING)
    gone = {line.split()[1] for line in heard.so_far().splitlines() if line.startswith("Deleted 2001:")}
    assert not gone & set(every[:126]), sorted(gone)
    # The others move from one announcement to another.
    routers.bind(*every[:70], command="del")
    announced(every[70:139])
    routers.bind(*every[:70])
    announced(every[:139])
    # Fewer need fewer announcements: the last ones go.
    routers.bind(*every[40:139], command="del")
    announced(every[:40])


def test_a_router_that_withdraws_a_prefix_is_taken_out_of_its_route(lab: Lab, routers: Routers) -> None:
    """Also the first one that has announced it."""
    second, vip = lab.namespace("second"), "2001:db8:ffff::1"
    routers.director.ip(f"link add eth1 type veth peer name eth0 netns {second.handle}", "link set eth1 up")
    second.ip("link set eth0 up")
    routers.connect6(second)

    def leads_to(*devices: str) -> None:
        def ways() -> list[str]:
            rows = json.loads(routers.director.run("ip", "-6", "-j", "route", "show", "proto", "ospf").out or "[]")
            return sorted(hop["dev"] for row in rows if row["dst"] == vip for hop in row.get("nexthops", [row]))

        routers.wait(lambda: ways() == sorted(devices), f"a route by {devices or 'nothing'}", STANDING)

    for first, last, other in ((routers.peer, second, "eth1"), (second, routers.peer, "eth0")):
        leads_to()
        first.ip(f"addr add {vip}/128 dev lo")
        leads_to("eth0" if other == "eth1" else "eth1")
        last.ip(f"addr add {vip}/128 dev lo")
        leads_to("eth0", "eth1")
        first.ip(f"addr del {vip}/128 dev lo")
        leads_to(other)
        last.ip(f"addr del {vip}/128 dev lo")


def _crashes(routers: Routers, daemon: str, family: int, gone: str, kept: str) -> Callable[[], None]:
    """A director's daemon dies, and an address goes before it comes back; returns what says that its peer knows."""

    def announced(*addresses: str) -> None:
        def found() -> bool:
            return set(routers.learnt(routers.peer, family)) & {gone, kept} == set(addresses)

        def stays() -> bool:
            return found() and bool(routers.director.run("sleep", "2")) and found()

        # Routes come and go one after the other.
        routers.wait(stays, f"{addresses or 'nothing'} in the peer's kernel", STANDING)

    routers.bind(gone, kept)
    announced(gone, kept)
    routers.guest.run("kill", "-KILL", routers.pids()[f"/run/frr/{daemon}.pid"])
    routers.bind(gone, command="del")
    announced()  # after the dead interval
    return lambda: announced(kept)


def test_what_a_crash_leaves_with_neighbours_is_replaced(routers: Routers) -> None:
    """The router-LSA of before, however short ago the director has made its own."""
    routers.connect()
    (gone, kept), other = VIPS, "1.1.1.3"
    known = _crashes(routers, "ospfd", 4, gone, kept)
    peer = routers.pids()[f"{PEER_RUN}/ospfd.pid"]
    routers.guest.run("kill", "-STOP", peer)
    routers.type(OSPFD)
    own = "show ip ospf database router self-originate"
    routers.wait(lambda: "LS Seq Number" in routers.ask(own), "its first instance, which is an exception upstream")
    routers.bind(other)
    routers.wait(lambda: other in routers.ask(own), "another one", STANDING)
    arrival = "timers lsa min-arrival"
    routers.ask("configure terminal", "router ospf", f"{arrival} 600000", "end")  # milliseconds
    routers.guest.run("kill", "-CONT", peer)
    routers.wait(routers.full, "the adjacency")
    shown = f"show ip ospf database router {DIRECTOR}"
    routers.wait(lambda: gone not in routers.ask(shown, peer=True), "another than the one of before", STANDING)
    routers.ask("configure terminal", "router ospf", f"{arrival} 1000", "end")
    routers.director.run("sleep", "2")  # the time that ospfd keeps between two instances
    routers.bind(other, command="del")
    known()


def test_what_a_crash_leaves_with_neighbours_of_ipv6_is_replaced(routers: Routers) -> None:
    """The prefixes of before, however short ago the director has announced its own."""
    routers.connect6()
    known = _crashes(routers, "ospf6d", 6, "2001:db8:ffff::1", "2001:db8:ffff::2")
    more = " timers lsa min-arrival 600000\n"  # milliseconds
    routers.configure("ospf6d.conf", routers.guest.read(f"{ETC}/ospf6d.conf") + more)
    routers.type(OSPF6D)
    known()


def test_packets_for_a_withdrawn_address_do_not_come_back(lab: Lab, routers: Routers) -> None:
    """From a router that has not yet heard, and never does here, with what `render` makes of a cluster file."""
    zebra = (RENDERED / "quagga/zebra.conf").read_text(encoding="utf-8")
    routers.configure("zebra.conf", zebra)
    routers.connect()
    for place in (routers.director, routers.peer):
        place.run("sysctl", "-q", "net.ipv4.ip_forward=1")
    vip, client = VIPS[0], lab.namespace("client")
    routers.peer.ip(
        f"link add inner type veth peer name eth0 netns {client.handle}",
        "addr add 10.9.8.1/24 dev inner",
        "link set inner up",
        f"route add {vip} via {DIRECTOR} metric 1",  # nearer than what OSPF says
    )
    client.ip("addr add 10.9.8.2/24 dev eth0", "link set eth0 up", "route add default via 10.9.8.1")
    routers.wait(lambda: routers.learnt(routers.director) == {"default": PEER}, "the way out", STANDING)

    def answer() -> str:
        return client.run("ping", "-c", "1", "-W", "5", vip, seconds=15, check=False).out

    assert "exceeded" in answer(), "nothing comes back, whatever the routes do"
    (route,) = (
        line
        for line in (RENDERED / "lvs/vips.routes").read_text(encoding="utf-8").splitlines()
        if "203.0.113.1 " in line
    )
    routers.guest.write("/tmp/vips.routes", route.replace("203.0.113.1", vip))  # noqa: S108  the guest's
    routers.director.run("ip", "-batch", "/tmp/vips.routes")  # noqa: S108
    assert "0 received" in answer()
    assert "exceeded" not in answer()
    # here
    routers.bind(vip)
    assert "1 received" in answer()
    shown = f"show ip ospf database router {DIRECTOR}"
    routers.wait(lambda: vip in routers.ask(shown, peer=True), "the announcement", STANDING)
    routers.bind(vip, command="del")
    # OSPF still has a way there, by lo, which zebra is told not to take.
    assert "exceeded" not in answer()
    # on another director
    routers.peer.ip(f"addr add {vip}/32 dev lo")
    routers.ask("configure terminal", "router ospf", f"network {vip}/32 area {AREA}", "end", peer=True)
    routers.wait(lambda: routers.learnt(routers.director).get(vip) == PEER, "the other's announcement", STANDING)
    way = json.loads(routers.director.run("ip", "-j", "route", "get", vip).out)
    assert way[0]["gateway"] == PEER
    routers.ask("configure terminal", "router ospf", f"no network {vip}/32 area {AREA}", "end", peer=True)
    routers.peer.ip(f"addr del {vip}/32 dev lo")
    routers.wait(lambda: vip not in routers.learnt(routers.director), "its end", STANDING)
    assert "exceeded" not in answer()
    routers.director.ip(f"route del blackhole {vip}")
    assert "exceeded" in answer(), "nothing comes back, whatever the routes do"


_KEY = f"ip ospf message-digest-key {KEY_NUMBER} md5"
# What differs, and what mends it; lines of the peer's configuration.
DIFFERENT = {
    "key": (
        ["interface eth0", f"no ip ospf message-digest-key {KEY_NUMBER}", f"{_KEY} 1234567"],
        ["interface eth0", f"no ip ospf message-digest-key {KEY_NUMBER}", f"{_KEY} {KEY}"],
    ),
    "hello interval": (["interface eth0", "ip ospf hello-interval 4"], ["interface eth0", "ip ospf hello-interval 3"]),
    "dead interval": (["interface eth0", "ip ospf dead-interval 13"], ["interface eth0", "ip ospf dead-interval 12"]),
    "kind of area": (
        ["router ospf", f"no area {AREA} stub no-summary", f"no area {AREA} stub"],
        ["router ospf", f"area {AREA} stub no-summary"],
    ),
}


def test_who_is_configured_otherwise_is_no_neighbour(routers: Routers) -> None:
    routers.connect()
    ear = routers.listen()
    for what, (other, same) in DIFFERENT.items():
        routers.ask("configure terminal", *other, "end", peer=True)
        routers.wait(routers.strangers, f"the end of the adjacency: another {what}")
        until = len(ear.packets(PEER, HELLO)) + 3
        routers.wait(lambda until=until: len(ear.packets(PEER, HELLO)) >= until, "more hellos")
        assert routers.strangers(), f"neighbours in spite of another {what}"
        routers.ask("configure terminal", *same, "end", peer=True)
        routers.wait(routers.full, f"the adjacency, with the same {what}")


# --- without a neighbour


def _passwords(text: str) -> list[str]:
    return re.findall(r"^(?:enable )?password (.*)$", text, re.M)


def test_passwords_are_encrypted(routers: Routers) -> None:
    """The manual's are given as encrypted already, so they stay; clear ones are shown and written encrypted."""
    printed = (MANUAL / "zebra.conf").read_text(encoding="utf-8")
    routers.type(ZEBRA)
    shown = routers.ask("show running-config")
    assert _passwords(shown) == ["8 123456", "8 123456"]
    assert "service password-encryption" in shown
    # Nobody knows a password whose hash is 123456.
    patience = 10 * routers.guest.scale
    answer = routers.director.call("routing:terminal", port=2601, lines=["123456"] * 3, patience=patience, seconds=15)
    assert ">" not in answer
    clear = printed.replace("8 123456", "fromAbove")
    encrypted, open_ = (clear, clear.replace("service password-encryption\n", ""))
    for text, secret in ((encrypted, True), (open_, False)):
        routers.end()
        routers.guest.run("systemd-tmpfiles", "--create", "frr.conf")
        routers.configure("zebra.conf", text)
        routers.type(ZEBRA)
        shown = routers.ask("show running-config")
        assert ("fromAbove" in shown) is not secret
        assert len(_passwords(shown)) == 2
        if secret:
            assert all(re.fullmatch(r"8 \S{13}", one) for one in _passwords(shown)), shown
        lines = ["wrong", "fromAbove", "enable", "fromAbove", "show running-config"]
        answer = routers.director.call("routing:terminal", port=2601, lines=lines, patience=patience, seconds=15)
        assert answer.count("Password: ") == 3, "asked again after the wrong one, and once more for enable"
        assert "lvs-route-4# " in answer
        # `write` as the daemon: by the manual the file is root's, so that the unit's chown comes first.
        routers.guest.run("chown", "frr:frr", f"{ETC}/zebra.conf")
        routers.ask("write file")
        assert ("fromAbove" in routers.guest.read(f"{ETC}/zebra.conf")) is not secret


def test_a_file_that_cannot_be_read_is_told_at_once(routers: Routers) -> None:
    routers.type(ZEBRA)
    routers.guest.run("chmod", "600", f"{ETC}/ospf.conf")
    done = routers.type(OSPFD, check=False)
    assert done.status == 1
    assert "can't open configuration file /etc/quagga/ospf.conf: Permission denied" in done.err
    done = routers.type(OSPFD.replace("ospf.conf", "ospd.conf"), check=False)
    assert done.status == 1
    assert "/etc/quagga/ospd.conf: No such file or directory" in done.err
    assert "/run/frr/ospfd.pid" not in routers.pids()
    routers.guest.run("chown", "frr:frr", f"{ETC}/ospf.conf")
    routers.type(OSPFD)
    assert "/run/frr/ospfd.pid" in routers.pids()


def test_a_log_is_rotated(routers: Routers) -> None:
    """By the package's own rules; the daemon goes on in the new file."""
    routers.type(ZEBRA)
    log = LOGS["zebra"]
    for word in ("before", "after"):
        routers.ask("configure terminal", "log commands", f"access-list {word} permit any")
        routers.wait(lambda word=word: f"access-list {word}" in routers.guest.read(log), "the log")
        if word == "before":
            routers.guest.run("logrotate", "--force", "/etc/logrotate.d/frr", seconds=10)
    assert "before" not in routers.guest.read(log)
    assert "before" in routers.guest.read(f"{log}.1")
    assert routers.guest.run("stat", "-c", "%U:%G %a", log).out.strip() == "frr:frr 640"
