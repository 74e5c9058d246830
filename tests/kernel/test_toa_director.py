"""The client's address in a TCP option: on which segments, beside what, and what happens where there is no room.

Both ends are made by hand, so that a test decides what a header holds; `Wire.expect` verifies every checksum.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.kernel import packets
from tests.kernel.machine import Failed
from tests.kernel.packets import NOPS, SACK_PERMITTED, Offload, Packet, mss, options, sack, timestamp, wscale
from tests.kernel.talk import USUAL, Bare, Conversation, Sides
from tests.kernel.topology import FAMILIES, Site

pytestmark = [pytest.mark.build, pytest.mark.guest]
KIND, OLD_KIND = 254, 253
ROOM = {4: 8, 6: 20}
HEAD = {4: 40, 6: 60}  # of a segment without options
FAST_OPEN = bytes([34, 10]) + b"cookie!!"
MPTCP_ACK = bytes([30, 20]) + b"\x01" * 18  # MP_CAPABLE of a third ACK: two keys
STAMPS = options(mss(1460), SACK_PERMITTED, timestamp(7, 0), NOPS, wscale(7))


def toa(client: str, port: int, kind: int = KIND) -> bytes:
    """The option."""
    content = struct.pack("!H", port) + packets.packed(client)
    return bytes([kind, 2 + len(content)]) + content


@dataclass
class Wired:
    """A service whose client and server are made by hand."""

    net: Site
    client: Bare
    server: Bare
    family: int

    def talk(self, **words: Any) -> Conversation:
        """A new connection."""
        return Conversation(self.client, self.server, self.family, **words)

    def set(self, name: str, value: int) -> None:
        """A sysctl of the director."""
        self.net.director.ip_vs_sysctl(f"fullnat_toa_{name}", value)

    def counted(self, name: str) -> int:
        """A counter of the director."""
        return self.net.director.ext_stats()[name]


@pytest.fixture(params=FAMILIES)
def wired(request: pytest.FixtureRequest, site: Callable[..., Site]) -> Wired:
    """One service with one local address, of either family."""
    return _wired(site(clients=0, servers=0), request.param)


def _wired(net: Site, family: int) -> Wired:
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", locals_=1, servers=[server.address(family)])
    return Wired(net, client, server, family)


def told(talk: Conversation, seen: Packet, kind: int = KIND) -> bool:
    """Whether a segment names the client, rightly, once, and before all else."""
    mine = toa(talk.outside.source, talk.outside.sport, kind)
    assert seen.option_bytes.count(mine[:2]) <= 1, seen
    return seen.option_bytes.startswith(mine)


def _handshake(talk: Conversation, option: bytes = USUAL) -> Packet:
    """SYN and SYN-ACK; returns the SYN as the server saw it."""
    syn = talk.to_server("S", seq=1000, option=option)
    synack = talk.to_client("SA", seq=5_000_000, ack=syn.seq + 1, option=option)
    talk.here = Sides(1001, synack.seq + 1)
    talk.there = Sides(5_000_001, syn.seq + 1)
    return syn


# --- when


def test_every_segment_until_the_server_shows_its_socket(wired: Wired) -> None:
    talk = wired.talk()
    syn = _handshake(talk)
    assert KIND not in syn.options, "the SYN"
    for flags, data in (("A", b""), ("PA", b"GET "), ("PA", b"GET "), ("A", b"/"), ("FPA", b"x")):
        seen = talk.to_server(flags, seq=talk.here.seq, ack=talk.here.ack, data=data)
        assert told(talk, seen), flags
        assert seen.payload == data
    # neither of these needs a socket that was accepted: a request answers with them, too
    talk.to_client("A", seq=talk.there.seq, ack=talk.there.ack)
    talk.to_client("SA", seq=talk.there.seq - 1, ack=talk.there.ack, option=USUAL)
    assert told(talk, talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack))
    talk.to_client("A", seq=talk.there.seq, ack=talk.there.ack + 1)
    last = talk.to_server("A", seq=talk.here.seq + 1, ack=talk.here.ack)
    assert KIND not in last.options
    assert wired.counted("fullnat_add_toa_ok") == 6


@pytest.mark.parametrize("answer", [{"flags": "PA", "data": b"220 hello"}, {"flags": "FA"}])
def test_a_server_that_speaks_first(wired: Wired, answer: dict[str, Any]) -> None:
    talk = wired.talk()
    _handshake(talk)
    assert told(talk, talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack))
    talk.to_client(seq=talk.there.seq, ack=talk.there.ack, **answer)
    assert KIND not in talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack + 1).options


def test_resets_have_none(wired: Wired) -> None:
    talk = wired.talk()
    _handshake(talk)
    assert KIND not in talk.to_server("R", seq=talk.here.seq).options


def test_another_connection_of_the_same_entry(wired: Wired) -> None:
    """A tuple that is used again is told again."""
    for _ in range(2):
        talk = wired.talk(cport=30000)
        _handshake(talk)
        assert told(talk, talk.to_server("PA", seq=talk.here.seq, ack=talk.here.ack, data=b"x"))
        talk.to_client("RA", seq=talk.there.seq, ack=talk.there.ack + 1)


def test_switched_off(wired: Wired) -> None:
    """For connections that begin then; forged options are removed all the same."""
    wired.set("entry", 0)
    talk = wired.talk()
    _handshake(talk)
    for option in (b"", options(toa("198.51.100.250", 99))):
        seen = talk.to_server("PA", seq=talk.here.seq, ack=talk.here.ack, data=b"x", option=option)
        assert KIND not in seen.options
        assert len(seen.option_bytes) == len(option)
    assert wired.counted("fullnat_add_toa_ok") == 0


def test_another_kind(wired: Wired) -> None:
    other = "kind_v6" if wired.family == 6 else "kind"
    wired.set(other, 221)
    talk = wired.talk()
    _handshake(talk)
    assert told(talk, talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack), 221)
    for value in (199, 255):
        with pytest.raises(Failed, match="Invalid argument"):
            wired.set(other, value)


def test_nothing_of_it_with_other_methods(site: Callable[..., Site]) -> None:
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(4, "-m", servers=[server.address(4)])
    syn = options(mss(1460), toa("198.51.100.250", 99), FAST_OPEN)
    client.send(packets.tcp(packets.Ends(client.address(4), 1234, net.vip(4), 80), "S", option=syn))
    seen = server.wire.expect(lambda p: p.protocol == packets.TCP and p.flags == "S", "the SYN")
    assert seen.option_bytes == syn


# --- beside other options


def test_timestamps_stay(wired: Wired) -> None:
    talk = wired.talk()
    syn = _handshake(talk, STAMPS)
    assert syn.timestamps is not None
    shift = syn.timestamps[0] - 7
    seen = talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack, option=options(NOPS, NOPS, timestamp(9, 77)))
    assert told(talk, seen)
    assert seen.timestamps == ((9 + shift) % (1 << 32), 77)


def test_a_full_header_gives_up_sack(wired: Wired) -> None:
    """SACK is advice, so it gives way as far as need be: the first blocks, which are the newest, stay."""
    talk = wired.talk()
    _handshake(talk, STAMPS)
    own = [(talk.here.ack + 1000 * n, talk.here.ack + 1000 * n + 500) for n in (3, 2, 1)]
    option = options(NOPS, NOPS, timestamp(9, 77), NOPS, NOPS, sack(*own))
    assert len(option) == 40
    seen = talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack, option=option)
    assert told(talk, seen)
    assert seen.timestamps is not None
    assert seen.timestamps[1] == 77
    assert seen.sacks == [(a % (1 << 32), b % (1 << 32)) for a, b in own[: {4: 2, 6: 1}[wired.family]]]


def test_mptcp_keeps_its_option(wired: Wired) -> None:
    """Its third ACK decides about the protocol of the connection; the timestamp of one segment does not."""
    talk = wired.talk()
    _handshake(talk, STAMPS)
    option = options(NOPS, NOPS, timestamp(9, 77), MPTCP_ACK)
    seen = talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack, option=option)
    assert told(talk, seen)
    assert seen.options[30] == MPTCP_ACK[2:]
    assert (seen.timestamps is None) == (wired.family == 6)


def test_no_room_at_all(wired: Wired) -> None:
    """Options that we do not know stay as they are; a segment of ours goes ahead, and it is one that a server takes."""
    talk = wired.talk()
    _handshake(talk, STAMPS)
    option = options(NOPS, NOPS, timestamp(9, 77), bytes([77, 24]) + b"!" * 22)
    talk.say("PA", seq=talk.here.seq, ack=talk.here.ack, option=option, data=b"hello", window=4321)
    ahead = talk.server_hears("A")
    seen = talk.server_hears("PA")
    assert told(talk, ahead)
    assert seen.timestamps is not None
    assert (ahead.seq, ahead.ack, ahead.window, ahead.payload) == (seen.seq, seen.ack, 4321, b"")
    assert ahead.timestamps == seen.timestamps
    assert (len(seen.option_bytes), seen.payload) == (36, b"hello")
    assert wired.counted("fullnat_add_toa_head_full") == wired.counted("fullnat_add_toa_ack") == 1


# --- long segments


def test_a_segment_that_would_be_too_long(wired: Wired) -> None:
    """Of a client that was told no smaller size: cut in two, and both are sound, fit, and name the client."""
    wired.net.director.offload("back", tso=False, gso=False, tx=False)
    talk = wired.talk()
    _handshake(talk)
    data = bytes(n % 251 for n in range(1500 - HEAD[wired.family]))
    talk.say("PA", seq=talk.here.seq, ack=talk.here.ack, data=data)
    got = _pieces(wired, talk, len(data))
    assert b"".join(p.payload for p in got) == data
    assert ["P" in p.flags for p in got] == [False, True]


def _pieces(wired: Wired, talk: Conversation, size: int) -> list[Packet]:
    """The segments that have so many bytes, in their order."""
    got: dict[int, Packet] = {}
    while sum(len(p.payload) for p in got.values()) < size:
        seen = wired.server.wire.expect(
            lambda p: p.protocol == packets.TCP and p.sport == talk.inside.sport, "a part of it"
        )
        assert seen.length <= 1500
        assert told(talk, seen)
        got[seen.seq] = seen
    return [got[n] for n in sorted(got)]


def test_one_with_a_wrong_checksum_is_not_made_right(wired: Wired) -> None:
    """To cut a segment is to make checksums: of one that was damaged on its way they would say that it is whole."""
    talk = wired.talk()
    _handshake(talk)
    head = HEAD[wired.family]
    whole = packets.tcp(talk.outside, "PA", seq=talk.here.seq, ack=talk.here.ack, data=b"x" * (1500 - head))
    damaged = whole[:-1] + b"y"
    wired.client.send(damaged)
    ahead = talk.server_hears("A")
    assert told(talk, ahead), "it is told all the same"
    came: list[packets.Frame] = []

    def arrived() -> bool:
        came.extend(f for f in wired.server.wire.drain() if f.is_ip and f.packet.protocol == packets.TCP)
        return any(f.packet.payload for f in came)

    wired.net.director.wait_until(arrived, "the segment")
    frames = [f for f in came if f.packet.payload]
    assert packets.wrong(frames), "the damage was covered up"
    assert wired.counted("fullnat_add_toa_fail_len") == 1


def test_large_frames(wired: Wired) -> None:
    """As a card with TSO or GRO hands them on: cut later, and every piece has the option and fits."""
    talk = wired.talk()
    _handshake(talk)
    head = HEAD[wired.family]
    size = 1500 - head
    data = bytes(n % 251 for n in range(5 * size))
    packet = packets.tcp(talk.outside, "PA", seq=talk.here.seq, ack=talk.here.ack, data=data, partial=True)
    gso = packets.GSO_TCPV6 if wired.family == 6 else packets.GSO_TCPV4
    offload = Offload(packets.NEEDS_CSUM, gso, head, size, head - 20, 16)
    wired.net.director.offload("back", tso=False, gso=False, tx=False)
    wired.client.send(packet, offload=offload)
    assert b"".join(p.payload for p in _pieces(wired, talk, len(data))) == data


def _cut(packet: bytes, *sizes: int) -> list[bytes]:
    """Fragments of an IPv6 packet, or of an IPv4 packet that says that there must be none."""
    whole = Packet(packet)
    segment, at, parts = whole.segment, 0, []
    for size in (*sizes, len(segment) - sum(sizes)):
        more = at + size < len(segment)
        piece = segment[at : at + size]
        if whole.version == 6:
            head = packet[:4] + struct.pack("!HB", 8 + len(piece), 44) + packet[7:40]
            parts.append(head + struct.pack("!BBHI", whole.protocol, 0, at | more, 77) + piece)
        else:
            head = packet[:2] + struct.pack("!HHH", 20 + len(piece), 77, 0x4000 | more << 13 | at // 8) + packet[8:10]
            head += b"\0\0" + packet[12:20]
            parts.append(head[:10] + struct.pack("!H", ~packets.total(head) & 0xFFFF) + head[12:] + piece)
        at += size
    return parts


@pytest.mark.parametrize("sizes", [(1408, 1440, 504), (1408, 104), (1000, 408, 1440), (608, 8)], ids=str)
def test_what_came_in_fragments(wired: Wired, sizes: tuple[int, ...]) -> None:
    """Put together it is a chain of packets, which cannot be cut at any place: it leaves in fragments as it came.

    Of IPv4 only what is whole within the MTU: a longer packet that is not to be fragmented is refused as such.
    """
    if wired.family == 4:
        sizes = tuple(max(8, size // 16 * 8) for size in sizes[:2])
    wired.net.director.offload("back", tso=False, gso=False, tx=False)
    talk = wired.talk()
    _handshake(talk)
    length = 1500 - 40 - 4 if wired.family == 4 else sum(sizes) + 804
    data = bytes(n % 251 for n in range(length))
    whole = packets.tcp(talk.outside, "PA", seq=talk.here.seq, ack=talk.here.ack, data=data)
    wired.client.send(*_cut(whole, *sizes))
    came: dict[int, bytes] = {}
    size = len(data) + 20 + ROOM[wired.family]

    def arrived() -> bool:
        for frame in wired.server.wire.drain():
            if not frame.is_ip or frame.packet.target != wired.server.address(wired.family):
                continue
            packet = frame.packet
            if packet.fragment:
                assert packet.length <= 1500
                word = struct.unpack("!H", packet.data[42:44] if packet.version == 6 else packet.data[6:8])[0]
                came[word & 0xFFF8 if packet.version == 6 else (word & 0x1FFF) * 8] = packet.segment
        return sum(map(len, came.values())) >= size

    wired.net.director.wait_until(arrived, "all of it")
    joined = b"".join(came[at] for at in sorted(came))
    seen = Packet(packets.internet(talk.inside.source, talk.inside.target, packets.TCP, joined))
    assert not seen.problems()
    assert told(talk, seen)
    assert seen.payload == data


@pytest.mark.parametrize("state", ["FIN_WAIT", "ESTABLISHED"])
def test_a_client_that_begins_anew_over_a_living_entry(wired: Wired, state: str) -> None:
    """The server may have closed, or forgotten, what the director still has: what it accepts then is told, too."""
    talk = wired.talk(cport=30001)
    _handshake(talk)
    talk.to_server("PA", seq=talk.here.seq, ack=talk.here.ack, data=b"x")
    talk.to_client("FA" if state == "FIN_WAIT" else "A", seq=talk.there.seq, ack=talk.there.ack + 1)
    (entry,) = wired.net.director.connections()
    assert entry.state == state
    syn = talk.to_server("S", seq=900_000, option=USUAL)
    synack = talk.to_client("SA", seq=7_000_000, ack=syn.seq + 1, option=USUAL)
    # what is left of the old connection proves nothing
    talk.to_client("FA", seq=talk.there.seq, ack=talk.there.ack + 1)
    assert told(talk, talk.to_server("PA", seq=900_001, ack=synack.seq + 1, data=b"y"))
    talk.to_client("A", seq=7_000_001, ack=syn.seq + 2)
    assert KIND not in talk.to_server("A", seq=900_002, ack=synack.seq + 1).options


def test_a_routers_mtu_is_told_with_room_for_the_option(wired: Wired) -> None:
    talk = wired.talk()
    _handshake(talk)
    seen = talk.to_server("PA", seq=talk.here.seq, ack=talk.here.ack, data=b"x" * 1300)
    router = wired.net.director_address(wired.family, back=True)[:-1] + "77"
    wired.server.send(packets.frag_needed(router, seen.data, 1400))
    error = wired.client.wire.expect(lambda p: p.is_error, "the error")
    assert error.mtu == 1400 - ROOM[wired.family]
    # once the server has shown its socket, segments grow no more
    talk.to_client("A", seq=talk.there.seq, ack=talk.there.ack + 1300)
    wired.server.send(packets.frag_needed(router, seen.data, 1400))
    error = wired.client.wire.expect(lambda p: p.is_error, "the error")
    assert error.mtu == 1400


# --- what clients must not say


@pytest.mark.parametrize("kind", [KIND, OLD_KIND])
def test_a_forged_address_is_removed(wired: Wired, kind: int) -> None:
    """In all segments, the SYN's too, at any place."""
    victim = toa("198.51.100.250" if wired.family == 4 else "2001:db8:1::250", 99, kind)
    talk = wired.talk()
    syn = _handshake(talk, options(mss(1460), NOPS, victim))
    assert kind not in syn.options
    assert syn.mss == 1460
    for before in range(4):
        option = options(NOPS * before, victim)
        seen = talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack, option=option)
        assert told(talk, seen)
        assert OLD_KIND not in seen.options
        assert victim[2:] not in seen.option_bytes
    talk.to_client("PA", seq=talk.there.seq, ack=talk.there.ack, data=b"hello")
    seen = talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack + 5, option=options(victim))
    assert not {KIND, OLD_KIND} & set(seen.options)
    assert wired.counted("fullnat_toa_removed") == 6


def test_fast_open_is_not_asked_for(wired: Wired) -> None:
    """An application would have the connection before the segment that names the client."""
    talk = wired.talk()
    option = options(mss(1460), FAST_OPEN, NOPS)
    seen = talk.to_server("S", seq=1000, option=option, data=b"early")
    assert 34 not in seen.options
    assert seen.payload == b"early"
    wired.set("entry", 0)
    seen = wired.talk().to_server("S", seq=1000, option=option)
    assert seen.options[34] == FAST_OPEN[2:]


# --- with real stacks


def test_it_is_nobodys_trouble(site: Callable[..., Site]) -> None:
    """A server that does not know the option gets its data, over every path, and the client its answers."""
    net = site(servers=1)
    net.serve(size=300_000)
    for family in FAMILIES:
        net.balance(family, "-b", locals_=1)
        with net.director.capture("back") as back:
            assert len(net.clients[0].get(net.vip(family), "/bulk")[0]) == 300_000
        back.must_be_sound()
        named = [p for p in back.tcp("A", dport=80) if KIND in p.options]
        assert named
        assert all(p.options[KIND][2:] == packets.packed(net.client(family)) for p in named), "another client is named"


def test_a_real_server_on_the_director_itself(site: Callable[..., Site]) -> None:
    net = site(servers=0)
    for family in FAMILIES:
        here = net.director_address(family, back=True)
        net.director.serve(port=8000 + family, addresses=[here])
        net.balance(family, "-b", to=8000 + family, locals_=1, servers=[here])
        assert net.clients[0].get(net.vip(family))[0].split()[1] == net.local(family)
    assert net.director.ext_stats()["fullnat_add_toa_ok"] > 0
