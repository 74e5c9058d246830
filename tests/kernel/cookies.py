"""A service with SYNPROXY between a client and a real server that are made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.kernel import packets
from tests.kernel.packets import NOPS, SACK_PERMITTED, Ends, Packet, mss, options, timestamp, wscale
from tests.kernel.talk import Bare
from tests.kernel.topology import Site

M = 1 << 32
FLAG = 0x8000
METHODS = ("-b", "-m")
# Both families and both methods are in what every run does; the other two pairs wait for `invoke test-kernel`.
PAIRS = [
    pytest.param((family, method), id=f"{family}{method}", marks=[] if often else pytest.mark.long)
    for family, method, often in ((4, "-b", True), (4, "-m", False), (6, "-b", False), (6, "-m", True))
]
FULL = options(mss(1400), SACK_PERMITTED, timestamp(1000, 0), NOPS, wscale(9))
NO_STAMPS = options(mss(1400), NOPS, NOPS, SACK_PERMITTED, NOPS, wscale(9))


def protect(net: Site, family: int, *, on: bool = True, port: int = 80) -> str:
    """Switch SYNPROXY of a service on or off; returns the kernel's answer."""
    spec = {"address": net.vip(family), "port": port, "whole": True, "flags": FLAG if on else 0}
    request = {"command": "SET_SERVICE", "service": spec}
    (answer,) = net.director.call("genl:do", requests=[request])
    return str(answer)


def served(site: Callable[..., Site], family: int, method: str, size: int) -> Site:
    """A client and an nginx behind a protected service; `/bulk` has so many bytes."""
    net = site(servers=1, gateway=method == "-m")
    net.serve(size=size)
    net.balance(family, method, locals_=1 if method == "-b" else 0)
    assert protect(net, family) == "ok"
    return net


@dataclass
class Wired:
    """A protected service whose client and server are made by hand."""

    net: Site
    client: Bare
    server: Bare
    family: int
    method: str
    port: int = 20000

    @classmethod
    def of(cls, site: Callable[..., Site], family: int, method: str, *options_: str) -> Wired:
        """Between two hosts without stacks; `options_` are more words for the service."""
        net = site(clients=0, servers=0)
        client, server = Bare(net), Bare(net, back=True)
        locals_ = 1 if method == "-b" else 0
        net.balance(family, method, locals_=locals_, options=options_, servers=[server.address(family)])
        assert protect(net, family) == "ok"
        return cls(net, client, server, family, method)

    def ends(self, port: int = 0) -> Ends:
        """From a client's port, a new one if not given."""
        self.port += 1
        return Ends(self.client.address(self.family), port or self.port, self.net.vip(self.family), 80)

    def counted(self, name: str) -> int:
        """A counter of the director."""
        return self.net.director.ext_stats()[name]

    def answer(self, ends: Ends, isn: int = 1000, option: bytes = FULL, **fields: Any) -> Packet:
        """Send a SYN; returns the SYN-ACK."""
        self.client.send(packets.tcp(ends, "S", seq=isn, option=option, **fields))
        return self.client.wire.expect(
            lambda p: p.protocol == packets.TCP and p.ends == ends.back and p.flags == "SA", "the SYN-ACK"
        )

    def at_server(self, flags: str) -> Packet:
        """The next segment of these flags at the server."""
        address = self.server.address(self.family)
        return self.server.wire.expect(
            lambda p: p.protocol == packets.TCP and p.target == address and p.flags == flags, f"{flags} at the server"
        )

    def at_client(self, ends: Ends, flags: str) -> Packet:
        """The next segment of these flags at the client."""
        return self.client.wire.expect(
            lambda p: p.protocol == packets.TCP and p.ends == ends.back and p.flags == flags, f"{flags} at the client"
        )


def ack(wired: Wired, ends: Ends, synack: Packet, data: bytes = b"", *, stamps: bool = True, flags: str = "") -> None:
    option = options(NOPS, NOPS, timestamp(1001, synack.timestamps[0])) if stamps and synack.timestamps else b""
    wired.client.send(
        packets.tcp(
            ends, flags or ("PA" if data else "A"), seq=synack.ack, ack=synack.seq + 1, data=data, option=option
        )
    )


def opened(
    wired: Wired, option: bytes, server_option: bytes, window: int = 20000, data: bytes = b""
) -> tuple[Ends, Packet, Packet, Packet]:
    """Ends, SYN-ACK at the client, SYN at the server, the client's window update."""
    ends = wired.ends()
    synack = wired.answer(ends, option=option)
    ack(wired, ends, synack, data)
    syn = wired.at_server("S")
    wired.server.send(packets.tcp(syn.ends.back, "SA", seq=7000, ack=syn.seq + 1, window=window, option=server_option))
    wired.at_server("PA" if data else "A")
    return ends, synack, syn, wired.at_client(ends, "A")
