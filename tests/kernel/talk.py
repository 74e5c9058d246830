"""Both ends of a connection through the director made by hand, so that a test decides about every field."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from tests.kernel import packets
from tests.kernel.lab import Namespace, Wire
from tests.kernel.packets import Ends, Packet
from tests.kernel.topology import BACK, FAMILIES, FRONT, Site

_FIRST = 100  # the host's number of the first bare host
_PORT = itertools.count(20000)  # a client's port of its own for each conversation of a session
USUAL = packets.options(packets.mss(1460), packets.SACK_PERMITTED, packets.NOPS, packets.wscale(7))


class Bare:
    """A host without a stack, on one of the director's links.

    Args:
        net: the topology.
        number: which one, from 0.
        back: beside the real servers instead of the clients.
    """

    def __init__(self, net: Site, number: int = 0, *, back: bool = False) -> None:
        self.net = net
        self.number = number
        self.start = BACK if back else FRONT
        self.member: Namespace = net.bare(f"bare{'server' if back else 'client'}{number}", back=back)
        self.wire: Wire = self.member.wire("eth0")
        self.director = net.director.mac(net.back if back else net.front)
        net.neighbour([self.address(family) for family in FAMILIES], self.wire.address, back=back)

    def address(self, family: int) -> str:
        """Its address; no stack knows it."""
        return f"{self.start[family]}{_FIRST + self.number}"

    def send(self, *packets_: bytes, **words: Any) -> None:
        """Send packets by the director."""
        self.wire.send(*packets_, to=self.director, **words)


@dataclass
class Sides:
    """The numbers of one side of a conversation, as that side counts."""

    seq: int
    ack: int


class Conversation:
    """A TCP connection from a bare client over the director to a bare server.

    Args:
        client, server: its ends.
        family: 4 or 6.
        vport, dport: ports of the service and of the real server.
        cport: of the client; one of its own if not given.
        source: the client's address if it is not the bare host's own.
    """

    def __init__(
        self,
        client: Bare,
        server: Bare,
        family: int,
        *,
        vport: int = 80,
        dport: int = 80,
        cport: int = 0,
        source: str = "",
    ) -> None:
        self.client, self.server, self.family, self.dport = client, server, family, dport
        net = client.net
        self.outside = Ends(source or client.address(family), cport or next(_PORT), net.vip(family), vport)
        self._inside: Ends | None = None  # known when the server has seen the SYN

    @property
    def inside(self) -> Ends:
        """The server's view: local address and port, server and port."""
        assert self._inside is not None, "the server has seen no SYN yet"
        return self._inside

    # -- single packets

    def to_server(self, flags: str, seconds: float = 2.0, **fields: Any) -> Packet:
        """The client sends a segment; returns it as the server sees it."""
        self.say(flags, **fields)
        return self.server_hears(flags, seconds)

    def say(self, flags: str, **fields: Any) -> bytes:
        """The client sends a segment; returns what it sent."""
        packet = packets.tcp(self.outside, flags, **fields)
        self.client.send(packet)
        return packet

    def server_hears(self, flags: str, seconds: float = 2.0) -> Packet:
        """The next segment with these flags that the server sees; the first one tells the local address."""
        address = self.server.address(self.family)

        def ours(packet: Packet) -> bool:
            if packet.protocol != packets.TCP or (packet.target, packet.dport) != (address, self.dport):
                return False
            return packet.flags == flags and (self._inside is None or packet.ends == self._inside)

        seen = self.server.wire.expect(ours, f"{flags} of {self.outside} at the server", seconds)
        self._inside = seen.ends
        return seen

    def to_client(self, flags: str, seconds: float = 2.0, **fields: Any) -> Packet:
        """The server sends a segment; returns it as the client sees it."""
        self.answer(flags, **fields)
        return self.client_hears(flags, seconds)

    def answer(self, flags: str, **fields: Any) -> bytes:
        """The server sends a segment; returns what it sent."""
        packet = packets.tcp(self.inside.back, flags, **fields)
        self.server.send(packet)
        return packet

    def client_hears(self, flags: str, seconds: float = 2.0) -> Packet:
        """The next segment with these flags that the client sees."""
        return self.client.wire.expect(
            lambda p: p.protocol == packets.TCP and p.ends == self.outside.back and p.flags == flags,
            f"{flags} to {self.outside} at the client",
            seconds,
        )

    # -- the usual course

    def open(
        self, isn: int = 1000, server_isn: int = 5_000_000, option: bytes = USUAL, server_option: bytes = USUAL
    ) -> tuple[Packet, Packet]:
        """Shake hands; returns the SYN as the server saw it and the SYN-ACK as the client saw it."""
        syn = self.to_server("S", seq=isn, option=option)
        synack = self.to_client("SA", seq=server_isn, ack=syn.seq + 1, option=server_option)
        assert synack.ack == (isn + 1) & 0xFFFFFFFF
        self.here = Sides(isn + 1, synack.seq + 1)  # what the client counts
        self.there = Sides(server_isn + 1, syn.seq + 1)  # what the server counts
        ack = self.to_server("A", seq=self.here.seq, ack=self.here.ack)
        assert (ack.seq, ack.ack) == (self.there.ack & 0xFFFFFFFF, self.there.seq & 0xFFFFFFFF)
        return syn, synack

    def greet(self) -> None:
        """The server says a byte, which only an accepted socket can: no segment names the client any more."""
        self.to_client("PA", seq=self.there.seq, ack=self.there.ack, data=b"!")
        self.here.ack += 1
        self.there.seq += 1

    @property
    def delta(self) -> int:
        """What is added to the client's numbers on their way to the server."""
        return (self.there.ack - self.here.seq) & 0xFFFFFFFF

    def close(self) -> None:
        """FIN from both, the server's first, so that the server holds no TIME_WAIT."""
        self.to_client("FA", seq=self.there.seq, ack=self.there.ack)
        self.to_server("FA", seq=self.here.seq, ack=self.here.ack + 1)
        self.to_client("A", seq=self.there.seq + 1, ack=self.there.ack + 1)
