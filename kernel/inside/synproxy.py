"""Process 1 of the machine of `invoke bench-synproxy`: measures, and leaves a line of JSON for every figure.

The hosts are those of `forwarding.py`. A flood is of SYNs with the options that Linux sends, from as many clients as
there are ports and addresses; their checksums are right, because whoever answers looks. The way back to those clients
is another one: a device that counts what it is told to send and forgets it, as a card does that sends it. So a flood's
cost is what the director does, from receiving to handing the answer to a card, and nothing of who receives answers.

`syn`: SYNs answered in a second of the time that the machine spends in softirqs, where the director receives, decides
and answers; the sender runs outside of it. The sides are SYNPROXY of IPVS, the one of nftables as its documentation has
it (SYNs are not tracked, the rest of the handshake is), and a listening socket that answers every SYN with a cookie.
Answers must be as many as SYNs. What they are is looked at before each side is measured: one from each client.

`bulk`: as in `forwarding.py`, with SYNPROXY and without, in segments of one size. By default SYNPROXY bounds the size
that it tells clients to 1452, for those behind PPPoE. What smaller segments cost is no work of SYNPROXY's, so the bound
is put out of the way.

`legit`: of requests, each on a connection of its own, how many are answered while another process floods the service
with all that it gets of the processor. Memory of slabs, connections and tracked connections must not grow.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from kernel.inside import forwarding as hosts
else:  # in the machine there is what stands beside this file, and nothing else
    import forwarding as hosts

VIP = hosts.VIP
NEAR = {4: "198.51.100.11", 6: "2001:db8:1::11"}  # the client
FAR = {4: "198.51.100.128/25", 6: "2001:db8:1::1:0/112"}  # whoever a flood claims to be from
# Of each side the families that it answers: that of nftables (nft_synproxy.c in 6.12) sums IPv6 packets up as if they
# were IPv4, and drops each of them that no card has verified before.
TAKEN = {"ipvs": (4, 6), "nftables": (4,), "cookies": (4, 6)}
FLOODED = 8080  # of the side that is not a service
PORTS = range(1024, 65024)
OPTIONS = bytes([2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 3, 232, 0, 0, 0, 0, 1, 3, 3, 7])
LARGEST = 1460  # segment that the MTU allows
MOST_GROWTH = 4 << 20  # bytes of slabs that a flood may cost; 100000 connections would be thirty times as much
CARD = "card"  # by it the answers to a flood leave
BEYOND = {4: "203.0.113.2", 6: "fe80::2"}  # the router behind it
SOURCES = 100  # addresses of a flood
NFTABLES = """
table inet proxy {
  chain pre { type filter hook prerouting priority raw; tcp dport 8080 tcp flags syn notrack; }
  chain in {
    type filter hook input priority filter;
    tcp dport 8080 ct state invalid,untracked synproxy mss 1460 wscale 7 timestamp sack-perm
    ct state invalid drop
  }
}
"""


def total(data: bytes) -> int:
    """The ones' complement sum of 16-bit words."""
    value: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


@contextlib.contextmanager
def within(namespace: str) -> Iterator[None]:
    """Sockets that are made in this block are those of a namespace."""
    with open("/proc/self/ns/net", "rb") as home, open(f"/run/netns/{namespace}", "rb") as there:
        enter(there.fileno())
        try:
            yield
        finally:
            enter(home.fileno())


def enter(namespace: int) -> None:
    """Go into a namespace; of an open file."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
        raise OSError(ctypes.get_errno(), "setns")


def wrong(frame: bytes, family: int, port: int) -> str:
    """What is wrong with a frame as an answer to a SYN of a flood; "" if nothing is."""
    packet = frame[14:]
    if len(packet) < 60 or packet[0] >> 4 != family:
        return "too short, or of another protocol"
    size, addresses = (40, packet[8:40]) if family == 6 else (20, packet[12:20])
    vip = socket.inet_pton(socket.AF_INET6 if family == 6 else socket.AF_INET, VIP[family])
    tcp = packet[size:]
    source, client, _, number = struct.unpack("!HHII", tcp[:12])
    rules = {
        "of another address or port": addresses[: len(vip)] == vip and source == port,
        "no SYN-ACKs": tcp[13] == 0x12,
        "for another number": number == 0x10010000 - client,
        "without the client's timestamp": OPTIONS[8:12] in tcp[20:],
        "of a wrong checksum": total(addresses + struct.pack("!II", socket.IPPROTO_TCP, len(tcp)) + tcp) == 0xFFFF,
    }
    return ", ".join(fault for fault, kept in rules.items() if not kept)


class Flood:
    """Sends SYNs of clients that have no stack.

    A client's port is added to a checksum, so it is taken from the sequence number, and the checksum stays what it is.
    """

    def __init__(self) -> None:
        info = json.loads(hosts.run("ip", "-j", "link", "show", "dev", "front", where=hosts.DIRECTOR))[0]
        mine = json.loads(hosts.run("ip", "-j", "link", "show", "dev", "eth0", where=hosts.CLIENT))[0]
        self.ends = bytes.fromhex((info["address"] + mine["address"]).replace(":", ""))

    def frame(self, family: int, source: int, port: int) -> tuple[bytearray, int]:
        """A SYN of one source with the port 0, and where its ports are."""
        tcp = struct.pack("!HHIIBBHHH", 0, port, 0x1000FFFF, 0, 0xA0, 2, 64240, 0, 0) + OPTIONS
        if family == 6:
            ends = socket.inet_pton(socket.AF_INET6, f"2001:db8:1::1:{source:x}")
            ends += socket.inet_pton(socket.AF_INET6, VIP[6])
            head = struct.pack("!IHBB", 6 << 28, len(tcp), socket.IPPROTO_TCP, 64) + ends
        else:
            ends = socket.inet_aton(f"198.51.100.{128 + source}") + socket.inet_aton(VIP[4])
            head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, socket.IPPROTO_TCP, 0)
            head = head[:10] + struct.pack("!H", 0xFFFF ^ total(head + ends)) + ends
        check = 0xFFFF ^ total(ends + struct.pack("!II", socket.IPPROTO_TCP, len(tcp)) + tcp)
        tcp = tcp[:16] + struct.pack("!H", check) + tcp[18:]
        kind = b"\x86\xdd" if family == 6 else b"\x08\x00"
        return bytearray(self.ends + kind + head + tcp), 14 + len(head)

    def syns(self, family: int, port: int) -> Iterator[bytearray]:
        """All of them, again and again."""
        frames = [self.frame(family, source, port) for source in range(SOURCES)]
        while True:
            for number in PORTS:
                frame, at = frames[number % len(frames)]
                struct.pack_into("!H", frame, at, number)
                struct.pack_into("!H", frame, at + 6, 0xFFFF - number)
                yield frame

    def start(self, family: int, port: int, count: int) -> int:
        """Send so many (0: until killed) from the client's namespace; returns the process."""
        pid = os.fork()
        if pid == 0:
            try:
                with within(hosts.CLIENT), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as link:
                    link.bind(("eth0", 0))  # protocol 0: it receives nothing
                    send = link.send
                    for sent, frame in enumerate(self.syns(family, port), 1):
                        send(frame)
                        if sent == count:
                            break
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return pid

    def send(self, family: int, port: int, count: int) -> None:
        """Send so many and wait for that."""
        if os.waitpid(self.start(family, port, count), 0)[1]:
            raise hosts.Failed("the sender of SYNs failed; see the console")


def answered() -> int:
    """How many packets the card was told to send until now."""
    info = json.loads(hosts.run("ip", "-j", "-s", "link", "show", "dev", CARD, where=hosts.DIRECTOR))[0]
    return int(info["stats64"]["tx"]["packets"])


def softirq() -> float:
    """Seconds that the processor was in softirqs."""
    return hosts.Ticks.now()[6] / os.sysconf("SC_CLK_TCK")


def service(family: int, port: int, method: str, *, proxied: bool) -> list[str]:
    """Lines for ipvsadm."""
    local = hosts.LOCAL[family][0] if method == "-b" else ""
    lines = hosts.service(family, port, port, method, local)
    return [f"{lines[0]} -j enable" if proxied else lines[0], *lines[1:]]


def held() -> dict[str, int]:
    """What a flood may not make more of: bytes of slabs, connections, tracked connections."""
    hosts.write("/proc/sys/vm/drop_caches", "3")
    time.sleep(1)  # noqa: TID251  what waits for RCU is freed
    with open("/proc/meminfo", encoding="ascii") as stream:
        slabs = next(int(line.split()[1]) for line in stream if line.startswith("SUnreclaim"))
    rows = hosts.run("cat", "/proc/net/ip_vs_conn", where=hosts.DIRECTOR).count("\n")
    tracked = hosts.run("sh", "-c", "cat /proc/sys/net/netfilter/nf_conntrack_count || true", where=hosts.DIRECTOR)
    return {"slabs": slabs * 1024, "connections": rows, "tracked": int(tracked or 0)}


class Bench:
    """All of it.

    Args:
        plan: `rounds`, `syns` of a flood, `requests` under one, `bytes_large` and `bytes_small` of bulk data; `ours`,
            the folder of the modules.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.sides = hosts.Sides(plan["ours"], "")
        self.flood = Flood()
        self.round = 0
        mac = self.flood.ends[6:].hex(":")
        hosts.batch(hosts.DIRECTOR, [f"link add {CARD} type dummy", f"link set {CARD} addrgenmode none"])
        # A router tells the world of its groups; nothing but answers may be sent there.
        hosts.run("sysctl", "-qw", f"net.ipv6.conf.{CARD}.forwarding=0", where=hosts.DIRECTOR)
        hosts.batch(
            hosts.DIRECTOR,
            [
                f"link set {CARD} up",
                # In the midst of a flood a question for it may get lost.
                *(f"neigh replace {near} lladdr {mac} dev front nud permanent" for near in NEAR.values()),
                *(f"route add {FAR[family]} via {BEYOND[family]} dev {CARD} onlink" for family in VIP),
            ],
        )

    def note(self, trial: str, side: str, measure: Callable[[], float]) -> None:
        """Measure, and tell the host; round 0 is for warming up."""
        with hosts.Ticks() as ticks:
            value = measure()
        if self.round:
            spent = {"user": ticks.user, "kernel": ticks.kernel}
            hosts.say(trial=trial, side=side, round=self.round, value=value, **spent)

    def load(self, *lines: str) -> None:
        """Modules as after boot, and services."""
        self.sides.load("nat")
        hosts.run("ipvsadm", "-C", where=hosts.DIRECTOR)
        hosts.run("ipvsadm", "-R", where=hosts.DIRECTOR, stdin="".join(f"{line}\n" for line in lines))

    # -- SYNs

    @contextlib.contextmanager
    def ipvs(self) -> Iterator[int]:
        """SYNPROXY of IPVS."""
        self.load(*service(4, hosts.HTTP, "-b", proxied=True), *service(6, hosts.HTTP, "-b", proxied=True))
        yield hosts.HTTP

    @contextlib.contextmanager
    def listener(self, cookies: int) -> Iterator[int]:
        """A listening socket on the director; `tcp_syncookies`."""
        self.load()
        hosts.sysctl(hosts.DIRECTOR, net__ipv4__tcp_syncookies=cookies)
        script = (
            "import socket, time\n"
            f"s = socket.create_server(('::', {FLOODED}), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)\n"
            "time.sleep(1e6)\n"
        )
        hosts.start("python3", "-c", script, where=hosts.DIRECTOR)
        hosts.until(
            lambda: f":{FLOODED} " in hosts.run("ss", "-ltn", where=hosts.DIRECTOR), f"port {FLOODED} of the director"
        )
        try:
            yield FLOODED
        finally:
            text = hosts.run("ss", "-ltnp", f"sport = {FLOODED}", where=hosts.DIRECTOR)
            for pid in set(re.findall(r"pid=(\d+)", text)):
                os.kill(int(pid), signal.SIGKILL)
                os.waitpid(int(pid), 0)

    @contextlib.contextmanager
    def nftables(self) -> Iterator[int]:
        """SYNPROXY of nftables, before such a socket."""
        with self.listener(1) as port:
            hosts.run("nft", "-f", "-", where=hosts.DIRECTOR, stdin=NFTABLES)
            hosts.sysctl(hosts.DIRECTOR, net__netfilter__nf_conntrack_tcp_loose=0)
            try:
                yield port
            finally:
                hosts.run("nft", "delete", "table", "inet", "proxy", where=hosts.DIRECTOR)

    def rate(self, side: str, family: int, port: int) -> float:
        """SYNs that a side answers in a second of softirqs.

        Raises:
            Failed: some were not answered.
        """
        count = self.plan["syns"]
        others = answered()
        before = softirq()
        self.flood.send(family, port, count)
        spent = softirq() - before
        seen = answered() - others
        if seen != count:
            state = hosts.run("nstat", "-s", "-z", where=hosts.DIRECTOR)
            raise hosts.Failed(f"{side}, IPv{family}: {seen} of {count} SYNs were answered\n{state}")
        return seen / spent

    def look(self, side: str, family: int, port: int) -> None:
        """Are a side's answers right? One to each client.

        Raises:
            Failed: no.
        """
        hosts.run("ethtool", "-K", CARD, "tx", "off", where=hosts.DIRECTOR)  # which sums some of them up
        with within(hosts.DIRECTOR):
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        with tap:
            tap.bind((CARD, 3))  # ETH_P_ALL sees what is sent
            tap.settimeout(10)
            self.flood.send(family, port, SOURCES)
            try:
                frames = [tap.recv(2048) for _ in range(SOURCES)]
            except TimeoutError:
                raise hosts.Failed(f"{side}, IPv{family}: not all SYNs were answered") from None
        hosts.run("ethtool", "-K", CARD, "tx", "on", where=hosts.DIRECTOR)
        faults = {fault for frame in frames if (fault := wrong(frame, family, port))}
        clients = {frame[38:58] if family == 6 else frame[30:38] for frame in frames}  # with the ports
        if faults or len(clients) != SOURCES:
            raise hosts.Failed(f"{side}, IPv{family}: answers are {'; '.join(sorted(faults)) or 'repeated'}")

    def syns(self) -> None:
        """All sides, both families."""
        sides: dict[str, Callable[[], contextlib.AbstractContextManager[int]]]
        sides = {"ipvs": self.ipvs, "nftables": self.nftables, "cookies": partial(self.listener, 2)}
        for side in sides if self.round % 2 else reversed(sides):
            with sides[side]() as port:
                for family in TAKEN[side]:
                    self.look(side, family, port)
                    self.note(f"syn-v{family}", side, partial(self.rate, side, family, port))

    # -- connections

    def bulk(self) -> None:
        """Bulk data with SYNPROXY and without."""
        for method, name in (("-m", "nat"), ("-b", "fullnat")):
            for side in ("proxied", "plain") if self.round % 2 else ("plain", "proxied"):
                lines = [
                    line for family in VIP for line in service(family, hosts.BULK, method, proxied=side == "proxied")
                ]
                self.load(*lines)
                hosts.sysctl(hosts.DIRECTOR, net__ipv4__vs__synproxy_init_mss=LARGEST)
                for size in ("large", "small"):
                    hosts.segments(size == "large")
                    for family in VIP:
                        for direction in ("up", "down"):
                            measure = partial(hosts.bulk, family, direction, self.plan[f"bytes_{size}"])
                            self.note(f"bulk-{name}-v{family}-{direction}-{size}", side, measure)
        hosts.segments(True)

    def legit(self) -> None:
        """Requests under a flood, and what the flood leaves."""
        count = self.plan["requests"]
        self.load(*(line for family in VIP for line in service(family, hosts.HTTP, "-b", proxied=True)))
        for family in VIP:
            hosts.connrate(family, 20)
            before, others = held(), answered()
            flood = self.flood.start(family, hosts.HTTP, 0)
            try:
                url = f"http://{hosts.bracketed(VIP[family])}:{hosts.HTTP}/"
                text = hosts.run("ab", "-q", "-r", "-n", str(count), "-c", "1", url, where=hosts.CLIENT)
            finally:
                os.kill(flood, signal.SIGKILL)
                os.waitpid(flood, 0)
            after = held()
            if answered() - others < count:
                raise hosts.Failed("there was no flood")
            if after["slabs"] > before["slabs"] + MOST_GROWTH:
                raise hosts.Failed(f"a flood costs memory: {before}, then {after}")
            if after["connections"] > before["connections"] + count or after["tracked"] > before["tracked"] + count:
                raise hosts.Failed(f"a flood makes connections: {before}, then {after}")
            found = {key: int(value) for key, value in re.findall(r"^(\w+) requests:\s+(\d+)", text, re.M)}
            if self.round:
                good = found["Complete"] - found.get("Failed", 0)
                hosts.say(trial=f"legit-v{family}", side="answered", round=self.round, value=float(good))
                hosts.say(trial=f"legit-v{family}", side="asked", round=self.round, value=float(count))

    def run(self) -> None:
        """Warm up, then the rounds."""
        self.syns()
        for number in range(1, self.plan["rounds"] + 1):
            self.round = number
            hosts.say(begins=number)
            self.syns()
            self.bulk()
            self.legit()
        hosts.say(ends=self.plan["rounds"])


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    hosts.main(Bench)
