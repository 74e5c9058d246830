"""A server with a stack and a peer without one that names clients in TCP options, for the tests of TOA's receivers."""

from __future__ import annotations

import hashlib
import itertools
import struct
from typing import Any

from tests.kernel import packets
from tests.kernel.lab import Lab, Namespace
from tests.kernel.machine import Background
from tests.kernel.packets import Ends, Packet
from tests.kernel.topology import FAMILIES, PREFIX

SERVER = {4: "10.0.2.11", 6: "fd00:2::11"}
NEAR = {4: "10.0.2.200", 6: "fd00:2::200"}  # a director's local address: trusted by default
FAR = {4: "203.0.113.9", 6: "2001:db8:9::9"}  # a host of the Internet
CLIENT = {4: "198.51.100.7", 6: "2001:db8:1::7"}
CPORT = 4660
DEFAULT = "10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,fc00::/7"  # who is trusted if nobody says so
ANY = {4: "0.0.0.0", 6: "::"}  # noqa: S104  the guest's
MSS = packets.options(packets.mss(1460))
_PORT = itertools.count(20000)


def option(client: str, port: int = CPORT, *, kind: int = 254) -> bytes:
    """The option that names a client, not filled up."""
    value = struct.pack("!H", port) + packets.packed(client)
    return bytes([kind, 2 + len(value)]) + value


def named(*clients: str, kind: int = 254) -> bytes:
    """Whole options of a segment, one for each client."""
    return packets.options(*(option(client, kind=kind) for client in clients))


def mapped(address: str, six: bool) -> str:
    """As a socket of that family shows it."""
    return f"::ffff:{address}" if six and ":" not in address else address


class App:
    """`serve` of inside/toa.py, running."""

    def __init__(self, server: Namespace, address: str, port: int = 80, **kind: Any) -> None:
        self.server = server
        self.job: Background = server.start_call("toa:serve", address=address, port=port, **kind)
        self.seen = 0
        server.wait_for_port(port)

    def says(self, count: int = 1) -> list[str]:
        """Its next lines."""
        self.server.wait_until(lambda: len(self._lines()) >= self.seen + count, f"{count} lines after {self._lines()}")
        lines = self._lines()[self.seen : self.seen + count]
        self.seen += count
        return lines

    def silent(self) -> bool:
        """Whether it has said nothing more."""
        return len(self._lines()) == self.seen

    def _lines(self) -> list[str]:
        return self.job.so_far().splitlines()


class Peer:
    """The server's one neighbour, which is as many hosts as it has addresses."""

    def __init__(self, lab: Lab, server: Namespace, name: str = "peer") -> None:
        self.server = server
        self.member = lab.namespace(name)
        self.member.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
        server.ip(f"link add eth0 type veth peer name eth0 netns {self.member.handle}")
        self.member.ip("link set eth0 arp off up")
        mac = self.member.mac("eth0")
        lines = []
        for f in FAMILIES:
            lines += [f"addr add {SERVER[f]}/{PREFIX[f]} dev eth0"]
            lines += [f"neigh replace {a} lladdr {mac} dev eth0 nud permanent" for a in (NEAR[f], FAR[f])]
        server.ip("link set eth0 up", *lines, "route add default dev eth0", "route add ::/0 dev eth0")
        self.mac = server.mac("eth0")
        self.wire = self.member.wire("eth0")

    def call(self, family: int, *, source: str = "", port: int = 80) -> Call:
        """A connection to the server that is not open yet."""
        return Call(self, Ends(source or NEAR[family], next(_PORT), SERVER[family], port))


class Call:
    """A connection, of which every segment is said."""

    def __init__(self, peer: Peer, ends: Ends) -> None:
        self.peer, self.ends = peer, ends
        self.seq, self.ack = 1000, 0

    def __str__(self) -> str:
        return f"{self.ends.source} {self.ends.sport}"

    def send(self, flags: str, *, seq: int | None = None, ack: int | None = None, **fields: Any) -> None:
        """Send a segment, by default the next one."""
        seq = self.seq if seq is None else seq
        packet = packets.tcp(self.ends, flags, seq=seq, ack=self.ack if ack is None else ack, **fields)
        self.peer.wire.send(packet, to=self.peer.mac)

    def hears(self, flags: str) -> Packet:
        """The next segment with these flags."""

        def ours(packet: Packet) -> bool:
            return packet.protocol == packets.TCP and packet.ends == self.ends.back and set(packet.flags) >= set(flags)

        return self.peer.wire.expect(ours, f"{flags} to {self}")

    def knock(self, option: bytes = MSS, data: bytes = b"") -> Packet:
        """SYN, and the answer."""
        self.send("S", option=option, data=data)
        answer = self.hears("SA")
        self.seq, self.ack = answer.ack, answer.seq + 1
        return answer

    def open(self, option: bytes = b"") -> Call:
        """The whole handshake; its ACK has these options."""
        self.knock()
        self.send("A", option=option)
        return self

    def say(self, data: bytes = b"n", option: bytes = b"", flags: str = "PA") -> None:
        """Data, which is acknowledged (and perhaps answered) before this returns."""
        self.send(flags, data=data, option=option)
        self.seq += len(data) + ("F" in flags)
        while (heard := self.hears("A")).ack != self.seq:
            pass
        self.ack = heard.seq + len(heard.payload)


class Room:
    """A server with a receiver, its peer, and applications.

    Args:
        lab: takes the namespaces.
    """

    def __init__(self, lab: Lab) -> None:
        self.server: Namespace = lab.namespace("server")
        self.peer = Peer(lab, self.server)

    def app(self, family: int, port: int = 80, **kind: bool | int) -> App:
        """An application that listens."""
        return App(self.server, ANY[family], port, **kind)

    def stats(self) -> dict[str, int]:
        """The receiver's counters over all CPUs."""
        rows = (line.split() for line in self.counters().splitlines()[1:])
        return {row[0]: sum(map(int, row[1:])) for row in rows}

    def counters(self) -> str:
        """The receiver's counters as it shows them."""
        raise NotImplementedError

    def trust(self, prefixes: str) -> None:
        """Let only these peers name clients."""
        raise NotImplementedError


def shows(app: App, call: Call, client: str = "", *, six: bool | None = None) -> None:
    """accept() and getpeername() show the client, or the peer if none is given; the socket option shows the peer."""
    six = (packets.family(call.ends.source) == 6) if six is None else six
    peer = f"{mapped(call.ends.source, six)} {call.ends.sport}"
    name = f"{mapped(client, six)} {CPORT}" if client else peer
    call.say()
    assert app.says(2) == [f"accept {name}", f"name {name} carrier {peer}"]


def capable(length: int, *keys: int, data: int = 0) -> bytes:
    """MP_CAPABLE of version 1."""
    body = b"".join(struct.pack("!Q", key) for key in keys) + (struct.pack("!H", data) if data else b"")
    return bytes([30, length, 0x01, 0x01]) + body


def mapping(key: int, at: int, length: int) -> bytes:
    """DSS: so many bytes from there on are the same ones of the subflow and of the connection that has our key."""
    first = int.from_bytes(hashlib.sha256(struct.pack("!Q", key)).digest()[-8:], "big") & 0xFFFFFFFF
    return struct.pack("!BBBBIIH", 30, 14, 0x20, 0x04, (first + at) & 0xFFFFFFFF, at, length)
