"""FULLNAT whatever the packets and the devices are like: offloads, segmentation, VLAN, bond, bridge, VRF, one arm."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernel import packets
from tests.kernel.machine import Failed
from tests.kernel.packets import NEEDS_CSUM, NOPS, Frame, Offload, Packet, options, sack, timestamp
from tests.kernel.talk import Bare, Conversation
from tests.kernel.topology import FAMILIES, KINDS, Site

pytestmark = [pytest.mark.build, pytest.mark.guest]
BULK = 300_000  # bytes
M = 1 << 32
# What the hosts leave to their devices; `conntrack` lets the director sum up what arrives before IPVS sees it, so that
# the packet carries a whole checksum in its control block (CHECKSUM_COMPLETE).
OFFLOADS = {
    "partial+gso": {"tx": True, "sg": True, "tso": True, "gso": True},
    "partial": {"tx": True, "tso": False, "gso": False},
    "none": {"tx": False, "tso": False, "gso": False},
    "none+conntrack": {"tx": False, "tso": False, "gso": False},
}


def _bulk() -> str:
    return "".join(f"{n:015d}\n" for n in range(0, BULK, 16))[:BULK]


def _transfers(net: Site, family: int) -> None:
    """Up and down, TCP and UDP."""
    client = net.clients[0]
    assert client.get(net.vip(family), "/bulk")[0] == _bulk()
    upload = client.call(
        "servers:http_post",
        address=net.vip(family),
        port=80,
        size=BULK,
        patience=20.0 * net.lab.guest.scale,
        seconds=25,
    )
    assert upload.split()[1] == net.local(family)
    assert client.ask(net.vip(family), text="x" * 1000).endswith("x" * 1000)
    assert client.ask(net.vip(family), text="x" * 4001).endswith("x" * 4001)


def _services(net: Site, family: int) -> None:
    net.serve(size=BULK)
    net.echo()
    net.balance(family, "-b", locals_=1)
    net.balance(family, "-b", port=53, protocol="udp", locals_=1)


# --- offloads


@pytest.mark.parametrize("gro", [False, True], ids=["", "gro"])
@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_offloads(site: Callable[..., Site], family: int, how: str, gro: bool) -> None:
    net = site(servers=1)
    _services(net, family)
    for host, device in ((net.clients[0], "eth0"), (net.servers[0], "eth0")):
        host.offload(device, **OFFLOADS[how])
    for device in ("front", "back"):
        net.director.offload(device, gro=gro)
        if gro:  # hold what arrives for a moment, or there is rarely a second one to join it with
            net.switch.offload(f"d-{device}-a", tso=False)  # veth(4) joins only where its peer cuts
            net.director.write_sysfs(f"class/net/{device}/gro_flush_timeout", "3000000")
    if "conntrack" in how:
        net.director.nft("table inet t {\nchain c {\ntype filter hook input priority 0;\nct state new accept;\n}\n}")
        net.director.ip_vs_sysctl("conntrack", 1)
    with net.director.capture("front") as front, net.director.capture("back") as back:
        _transfers(net, family)
    front.must_be_sound()
    back.must_be_sound()
    joined = [f for f in (*front.frames, *back.frames) if f.offload.gso]
    partial = [f for f in (*front.frames, *back.frames) if f.offload.flags & NEEDS_CSUM]
    assert bool(joined) == (gro or "gso" in how), "the packets were not what this test is about"
    assert bool(partial) == (gro or "partial" in how), "the packets were not what this test is about"


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_that_are_one_packet(site: Callable[..., Site], family: int) -> None:
    """A packet that is to be cut by a device keeps its kind, its piece size, its partial sum; options in it as well."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", to=8080, locals_=1, servers=[server.address(family)])
    talk = Conversation(client, server, family, dport=8080)
    stamps = options(packets.mss(1460), timestamp(100, 0))
    syn, _ = talk.open(isn=0xFFFFFFF0, option=stamps, server_option=options(packets.mss(1460), timestamp(7, 100)))
    assert syn.timestamps
    start = 20 if family == 4 else 40
    kind = packets.GSO_TCPV4 if family == 4 else packets.GSO_TCPV6
    data = bytes(range(256)) * 40

    def sent(option: bytes) -> Offload:
        return Offload(NEEDS_CSUM, kind, head=start + 20 + len(option), size=1000, start=start, offset=16)

    def taken(bare: Bare) -> Frame:
        frames: list[Frame] = []

        def came() -> bool:
            frames.extend(frame for frame in bare.wire.receive(1) if _incoming(frame))
            return bool(frames)

        bare.member.wait_until(came, "the packet")
        (frame,) = frames
        assert frame.problems() == []
        assert frame.packet.timestamps
        return frame

    option = options(NOPS * 2, timestamp(150, 7))
    packet = packets.tcp(
        talk.outside, "PA", seq=talk.here.seq, ack=talk.here.ack, option=option, data=data, partial=True
    )
    client.send(packet, offload=sent(option))
    frame = taken(server)
    assert (frame.offload.gso, frame.offload.size, frame.packet.payload) == (kind, 1000, data)
    assert (frame.packet.seq, frame.packet.timestamps) == (talk.there.ack % M, ((syn.timestamps[0] + 50) % M, 7))
    option = options(
        NOPS, timestamp(9, (syn.timestamps[0] + 50) % M), sack((talk.there.ack + 5, talk.there.ack + 9)), NOPS
    )
    packet = packets.tcp(
        talk.inside.back, "PA", seq=talk.there.seq, ack=talk.there.ack, option=option, data=data, partial=True
    )
    server.send(packet, offload=sent(option))
    frame = taken(client)
    assert (frame.offload.gso, frame.offload.size, frame.packet.payload) == (kind, 1000, data)
    assert frame.packet.timestamps == (9, 150)
    assert frame.packet.sacks == [((talk.here.seq + 5) % M, (talk.here.seq + 9) % M)]
    assert frame.packet.ack == talk.here.seq % M


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_that_the_director_cuts(site: Callable[..., Site], family: int) -> None:
    """Its devices do nothing themselves, so each piece is on the wire as it will be: numbers, options, checksums.

    Options at every alignment, in both directions. A partial sum becomes a whole one here, which hides nothing.
    """
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", to=8080, locals_=1, servers=[server.address(family)])
    for device in ("front", "back"):
        net.director.offload(device, tx=False)
    start = 20 if family == 4 else 40
    kind = packets.GSO_TCPV4 if family == 4 else packets.GSO_TCPV6
    data = (bytes(range(256)) * 14)[:3333]  # four pieces, the last one odd

    def pieces(bare: Bare, ends: packets.Ends) -> list[Packet]:
        seen: list[Packet] = []
        while sum(len(p.payload) for p in seen) < len(data):
            seen.append(bare.wire.expect(lambda p: p.protocol == packets.TCP and p.ends == ends, f"piece {len(seen)}"))
        assert b"".join(p.payload for p in seen) == data
        assert [len(p.payload) for p in seen] == [1000, 1000, 1000, 333]
        assert [p.flags for p in seen] == ["A", "A", "A", "PA"]
        return seen

    for before in range(4):
        talk = Conversation(client, server, family, dport=8080)
        stamps = options(packets.mss(1460), timestamp(100, 0))
        syn, _ = talk.open(isn=0xFFFFFFF0, option=stamps, server_option=options(packets.mss(1460), timestamp(7, 100)))
        assert syn.timestamps
        ours, theirs = (100 + 50, 7), ((syn.timestamps[0] + 50) % M, 7)
        blocks = [(talk.there.ack + 5, talk.there.ack + 9), (talk.there.ack + 50, talk.there.ack + 90)]
        for inward in (True, False):
            if inward:
                option = options(NOPS * before, timestamp(*ours))
                ends, numbers = talk.outside, talk.here
            else:
                option = options(NOPS * before, timestamp(9, theirs[0]), sack(*blocks))
                ends, numbers = talk.inside.back, talk.there
            offload = Offload(NEEDS_CSUM, kind, head=start + 20 + len(option), size=1000, start=start, offset=16)
            packet = packets.tcp(
                ends, "PA", seq=numbers.seq, ack=numbers.ack, option=option, data=data, partial=True
            )  # fmt: skip
            (client if inward else server).send(packet, offload=offload)
            seen = pieces(server, talk.inside) if inward else pieces(client, talk.outside.back)
            first = talk.there.ack if inward else talk.here.ack
            assert [p.seq for p in seen] == [(first + n) % M for n in (0, 1000, 2000, 3000)], f"after {before} NOPs"
            assert {p.ack for p in seen} == {(talk.there.seq if inward else talk.here.seq) % M}
            assert {p.timestamps for p in seen} == {theirs if inward else (9, ours[0])}, f"after {before} NOPs"
            if not inward:
                delta = talk.here.seq - talk.there.ack
                wanted = [((a + delta) % M, (b + delta) % M) for a, b in blocks]
                assert all(p.sacks == wanted for p in seen), f"after {before} NOPs"


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_that_are_one_packet(site: Callable[..., Site], family: int, cut: bool) -> None:
    """As a program with UDP_SEGMENT sends them: they arrive as one packet, or as its pieces if the director cuts it."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", port=53, to=5353, protocol="udp", locals_=1, servers=[server.address(family)])
    for device in ("front", "back") if cut else ():
        net.director.offload(device, tx=False)
    start = 20 if family == 4 else 40
    offload = Offload(NEEDS_CSUM, packets.GSO_UDP_L4, head=start + 8, size=400, start=start, offset=6)
    data = bytes(range(256)) * 5
    outside = packets.Ends(client.address(family), 4000, net.vip(family), 53)
    client.send(packets.udp(outside, b"first"))
    inside = server.wire.expect(_is_udp, "a datagram").ends
    for sender, receiver, ends, seen_as in (
        (client, server, outside, inside),
        (server, client, inside.back, outside.back),
    ):
        sender.send(packets.udp(ends, data, partial=True), offload=offload)
        seen: list[Packet] = []
        while sum(len(p.payload) for p in seen) < len(data):
            seen.append(receiver.wire.expect(lambda p, e=seen_as: _is_udp(p) and p.ends == e, f"piece {len(seen)}"))  # type: ignore[misc]
        assert b"".join(p.payload for p in seen) == data
        assert [len(p.payload) for p in seen] == ([400, 400, 400, 80] if cut else [1280])


# How a director's device joins what arrives, and whether one sees that the packet is a list.
JOINED = {
    "tcp-list": ({"rx_gro_list": True}, True),
    "udp-list": ({"rx_gro_list": True}, True),
    "udp": ({"rx_udp_gro_forwarding": True}, False),
}


@pytest.mark.parametrize("how", JOINED)
@pytest.mark.parametrize("family", FAMILIES)
def test_packets_that_are_joined_on_their_way(site: Callable[..., Site], family: int, how: str) -> None:
    """A list of packets, each with its own header, of which only the first is translated: what leaves must be whole.

    The director's devices cut and sum up nothing, so all that is done is done by its stack and seen on the wire.
    """
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    tcp = how.startswith("tcp")
    net.balance(family, "-b", port=7, to=77, protocol="tcp" if tcp else "udp", locals_=1,
                servers=[server.address(family)])  # fmt: skip
    switches, is_list = JOINED[how]
    for device in ("front", "back"):
        net.director.offload(device, gro=True, tx=False, **switches)
        net.switch.offload(f"d-{device}-a", tso=False)  # veth(4) joins only where its peer cuts
        net.director.write_sysfs(f"class/net/{device}/gro_flush_timeout", "20000000")
    payloads = [bytes([n]) * 500 for n in range(6)]
    stamps = options(NOPS, timestamp(150, 7), NOPS)
    talk = Conversation(client, server, family, vport=7, dport=77)
    if tcp:
        syn, _ = talk.open(
            isn=0xFFFFFFF0,
            option=options(packets.mss(1460), timestamp(100, 0)),
            server_option=options(packets.mss(1460), timestamp(7, 100)),
        )
        assert syn.timestamps
        translated = (syn.timestamps[0] + 50) % M
        back_stamps = options(NOPS, timestamp(9, translated), NOPS)
    else:
        client.send(packets.udp(talk.outside, b"first"))
        inside = server.wire.expect(_is_udp, "a datagram").ends

    def sent(inward: bool) -> list[bytes]:
        if not tcp:
            return [packets.udp(talk.outside if inward else inside.back, payload) for payload in payloads]
        numbers, ends = (talk.here, talk.outside) if inward else (talk.there, talk.inside.back)
        return [
            packets.tcp(ends, "A", seq=numbers.seq + 500 * n, ack=numbers.ack, data=payload,
                        option=stamps if inward else back_stamps)
            for n, payload in enumerate(payloads)
        ]  # fmt: skip

    for inward in (True, False):
        device, sender, receiver = ("front", client, server) if inward else ("back", server, client)
        lists: list[Frame] = []
        for _ in range(5):  # whether two of them meet is a matter of time
            with net.director.capture(device) as came:
                sender.send(*sent(inward))
                seen = [
                    receiver.wire.expect(lambda p: p.protocol in (packets.TCP, packets.UDP), f"packet {n}")
                    for n in range(len(payloads))
                ]
            assert [p.payload for p in seen] == payloads
            if tcp:
                start = talk.there.ack if inward else talk.here.ack
                assert [p.seq for p in seen] == [(start + 500 * n) % M for n in range(6)]
                assert {p.ack for p in seen} == {(talk.there.seq if inward else talk.here.seq) % M}
                assert {p.timestamps for p in seen} == {(translated, 7) if inward else (9, 150)}
                assert {p.ends for p in seen} == {talk.inside if inward else talk.outside.back}
            else:
                assert {p.ends for p in seen} == {inside if inward else talk.outside.back}
            lists = [f for f in came.frames if f.offload.gso and bool(f.offload.flags & NEEDS_CSUM) != is_list]
            if lists:
                break
        assert lists, "nothing was joined: the packets were not what this test is about"


@pytest.mark.parametrize("family", FAMILIES)
def test_more_headers_before_the_segment(site: Callable[..., Site], family: int) -> None:
    """IPv4 options and IPv6 extension headers stay, and what follows them is found."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", to=8080, locals_=1, servers=[server.address(family)])
    net.balance(family, "-b", port=53, protocol="udp", locals_=1, servers=[server.address(family)])
    extra = {4: b"\1\1\1\0", 6: b"\1\4\0\0\0\0"}[family]
    talk = Conversation(client, server, family, dport=8080)
    talk.open()
    seen = talk.to_server("PA", seq=talk.here.seq, ack=talk.here.ack, data=b"there", extra=extra)
    assert (seen.extra, seen.payload, seen.seq) == (extra, b"there", talk.there.ack % M)
    back = talk.to_client("PA", seq=talk.there.seq, ack=talk.there.ack, data=b"back", extra=extra)
    assert (back.extra, back.payload, back.ack) == (extra, b"back", talk.here.seq % M)
    ends = packets.Ends(client.address(family), 4000, net.vip(family), 53)
    client.send(packets.udp(ends, b"there", extra=extra))
    asked = server.wire.expect(_is_udp, "a datagram")
    assert (asked.extra, asked.payload) == (extra, b"there")
    server.send(packets.udp(asked.ends.back, b"back", extra=extra))
    answered = client.wire.expect(_is_udp, "the answer")
    assert (answered.ends, answered.extra, answered.payload) == (ends.back, extra, b"back")


def _incoming(frame: Frame) -> bool:
    """A segment: other packets, as the director's multicast reports, come at any time."""
    return frame.is_ip and frame.kind != packets.OUTGOING and frame.packet.protocol == packets.TCP


@pytest.mark.parametrize("family", FAMILIES)
def test_what_others_hold_is_not_written_to(site: Callable[..., Site], family: int) -> None:
    """A listener on the director's device gets a clone of each packet: as it came, and its owner's copy goes on."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", locals_=1, servers=[server.address(family)])
    with net.director.capture("front") as front, net.director.capture("back") as back:
        talk = Conversation(client, server, family)
        syn, _ = talk.open(option=options(packets.mss(1460), timestamp(5, 0)))
        given = ((talk.there.ack + 10, talk.there.ack + 20),)
        talk.to_client("A", seq=talk.there.seq, ack=talk.there.ack, option=options(NOPS * 3, sack(*given)))
    front.must_be_sound()
    back.must_be_sound()
    (first,) = front.tcp("S", target=net.vip(family))
    assert (first.seq, first.timestamps) == (1000, (5, 0))
    (behind,) = back.tcp("S", target=server.address(family))
    assert (behind.seq, behind.timestamps) == (syn.seq, syn.timestamps)
    (came,) = [p for p in back.tcp("A", source=server.address(family)) if p.sacks]
    assert came.sacks == list(given)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_datagram_without_checksum(site: Callable[..., Site], family: int) -> None:
    """IPv4 allows it and it stays so; IPv6 does not, and such a one must not become valid on its way."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", port=53, protocol="udp", locals_=1, servers=[server.address(family)])
    ends = packets.Ends(client.address(family), 4000, net.vip(family), 53)
    client.send(packets.udp(ends, b"question", checksum=False))
    if family == 4:
        seen = server.wire.expect(_is_udp, "the datagram")
        assert seen.segment[6:8] == b"\0\0"
    else:
        server.wire.silence(lambda p: _is_udp(p) and p.segment[6:8] != b"\0\0", "a datagram that became valid")
    client.send(packets.udp(ends, b"another"))
    seen = server.wire.expect(lambda p: _is_udp(p) and p.payload == b"another", "the second datagram")
    assert seen.segment[6:8] != b"\0\0"


def _is_udp(packet: Packet) -> bool:
    return bool(packet.protocol == packets.UDP)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_datagram_whose_checksum_becomes_zero(site: Callable[..., Site], family: int) -> None:
    """Zero means "no checksum", so it is written as all ones: of 65536 payloads one hits it on each leg."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", port=53, protocol="udp", locals_=1, servers=[server.address(family)])
    ends = packets.Ends(client.address(family), 4000, net.vip(family), 53)
    client.send(packets.udp(ends, b"\0\0"))
    seen = server.wire.expect(_is_udp, "a datagram")
    # What is missing to all ones behind the director: with it as payload the sum is zero.
    (given,) = (int.from_bytes(seen.segment[6:8], "big"),)
    client.send(packets.udp(ends, given.to_bytes(2, "big")))
    seen = server.wire.expect(_is_udp, "the datagram whose sum is zero")
    assert seen.segment[6:8] == b"\xff\xff"


# --- devices


@pytest.mark.parametrize("arms", [1, 2], ids=["one-arm", "two-arms"])
@pytest.mark.parametrize("kind", KINDS)
def test_devices(site: Callable[..., Site], kind: str, arms: int) -> None:
    net = site(servers=1, kind=kind, arms=arms)
    net.serve(size=BULK)
    net.echo()
    for family in FAMILIES:
        net.balance(family, "-b", locals_=1)
        net.balance(family, "-b", port=53, protocol="udp", locals_=1)
    with net.director.capture(net.front) as front, net.director.capture(net.back) as back:
        for family in FAMILIES:
            _transfers(net, family)
    front.must_be_sound()
    back.must_be_sound()


@pytest.mark.parametrize("arms", [1, 2], ids=["one-arm", "two-arms"])
@pytest.mark.parametrize("family", FAMILIES)
def test_errors_and_resets_in_a_vrf(site: Callable[..., Site], family: int, arms: int) -> None:
    """What the director says on its own finds the clients in their VRF, too; no other table knows them."""
    net = site(servers=1, kind="vrf", arms=arms)
    net.balance(family, "-b", port=53, protocol="udp", locals_=1)
    net.balance(family, "-b", locals_=1, options=("-V", "2"))
    net.balance(family, "-b", port=81)
    with pytest.raises(Failed, match="ConnectionRefusedError"):  # by the real server, in an ICMP error
        net.clients[0].ask(net.vip(family))
    with pytest.raises(Failed, match="ConnectionRefusedError"):  # by the director
        net.clients[0].get(net.vip(family), port=81)
    patience = 30.0 * net.lab.guest.scale
    server = net.servers[0].start_call("servers:accept_idle", address=net.server(family), port=80, patience=patience)
    net.servers[0].wait_for_port(80)
    client = net.clients[0].start_call("servers:idle", address=net.vip(family), port=80, patience=patience)
    assert client.wait(20).result == "reset"
    assert server.wait(20).result == "reset"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_in_one_subnet(site: Callable[..., Site], family: int) -> None:
    """Client, virtual address, local address and real server on one link and in one network, with all offloads."""
    net = site(clients=0, servers=2, arms=1)
    net.serve(size=BULK)
    client = net.servers[1]  # it is a client now
    vip = net.local(family, 3)
    where = f"[{vip}]:80" if family == 6 else f"{vip}:80"
    net.director.ipvsadm("-A", "-t", where, "-s", "rr")
    net.director.ipvsadm("-P", "-t", where, "-z", net.local(family))
    server = f"[{net.server(family)}]:80" if family == 6 else f"{net.server(family)}:80"
    net.director.ipvsadm("-a", "-t", where, "-r", server, "-b")
    with client.capture("eth0") as seen:
        assert client.get(vip)[0].split()[1] == net.local(family)
        assert client.get(vip, "/bulk")[0] == _bulk()
    seen.must_be_sound()
    assert {p.source for p in seen.tcp() if p.target == net.server(family, 1)} == {vip}
    assert not seen.seen(lambda p: p.protocol == packets.ICMP and p.icmp[0] == 5), "the client was redirected past us"


@pytest.mark.parametrize("family", FAMILIES)
def test_jumbo_frames(site: Callable[..., Site], family: int) -> None:
    net = site(servers=1, mtu=9000)
    _services(net, family)
    with net.director.capture("back") as back:
        _transfers(net, family)
    back.must_be_sound()
    assert back.tcp("SA")[0].mss == 9000 - (40 if family == 4 else 60)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hop_count_is_lowered_once_each_way(site: Callable[..., Site], family: int) -> None:
    """A director is a router: a loop between two must end."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", locals_=1, servers=[server.address(family)])
    talk = Conversation(client, server, family)
    talk.open()
    seen = talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack, ttl=20)
    assert seen.ttl == 19
    talk.say("A", seq=talk.here.seq, ack=talk.here.ack, ttl=1)
    expired = client.wire.expect(lambda p: p.is_error, "time exceeded")
    assert expired.icmp[0] == (11 if family == 4 else 3)
    assert expired.quoted.ends == talk.outside
    assert talk.to_client("A", seq=talk.there.seq, ack=talk.there.ack, ttl=20).ttl == 19
    talk.answer("A", seq=talk.there.seq, ack=talk.there.ack, ttl=1)
    expired = server.wire.expect(lambda p: p.is_error, "time exceeded, at the server")
    assert expired.icmp[0] == (11 if family == 4 else 3)
    assert expired.quoted.ends == talk.inside.back
