"""FULLNAT and ICMP: errors of both sides reach the end that they are for, about the packet that it sent; path MTU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.kernel import packets
from tests.kernel.machine import Failed
from tests.kernel.packets import Ends, Packet
from tests.kernel.talk import Bare, Conversation
from tests.kernel.topology import DIRECTOR, FAMILIES, FAR_BACK, FIRST_HOST, Site, service

pytestmark = [pytest.mark.build, pytest.mark.guest]
M = 1 << 32
BULK = 400_000  # bytes
# What a router or host may say: type, code and second word, of either family.
ERRORS = {
    4: {"frag needed": (3, 4, 1300), "port": (3, 3, 0), "host": (3, 1, 0), "time exceeded": (11, 0, 0)},
    6: {"too big": (2, 0, 1300), "port": (1, 4, 0), "no route": (1, 0, 0), "hop limit": (3, 0, 0)},
}
ROUTER = {4: "10.0.2.77", 6: "fd00:2::77"}  # beside the real servers
FAR_ROUTER = {4: "203.0.113.9", 6: "2001:db8:77::9"}  # somewhere on the clients' side


@dataclass
class Wired:
    """A TCP and a UDP service whose client and server are made by hand."""

    net: Site
    client: Bare
    server: Bare
    family: int


@pytest.fixture(params=FAMILIES)
def wired(request: pytest.FixtureRequest, site: Callable[..., Site]) -> Wired:
    family: int = request.param
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", to=8080, locals_=1, servers=[server.address(family)])
    net.balance(family, "-b", port=53, to=5353, protocol="udp", locals_=1, servers=[server.address(family)])
    return Wired(net, client, server, family)


def _is_error(packet: Packet) -> bool:
    return packet.is_error


def _talk(wired: Wired) -> Conversation:
    talk = Conversation(wired.client, wired.server, wired.family, dport=8080)
    talk.open(isn=0xFFFFFFF0)
    talk.greet()
    return talk


def _error(wired: Wired, source: str, about: bytes, name: str, cut: int = 0) -> bytes:
    kind, code, rest = ERRORS[wired.family][name]
    quoted = about[:cut] if cut else about[:548] if wired.family == 4 else about[:1232]
    return packets.error(source, Packet(about).source, kind, code, quoted, rest=rest)


# --- translation


def test_errors_about_the_clients_segments(wired: Wired) -> None:
    """What the client gets is about its own packet: addresses, ports and the number that it sent."""
    talk = _talk(wired)
    for name, (kind, code, rest) in ERRORS[wired.family].items():
        for size in (0, 400):
            sent = talk.here.seq
            seen = talk.to_server("A", seq=sent, ack=talk.here.ack, data=b"x" * size)
            wired.server.send(_error(wired, ROUTER[wired.family], seen.data, name))
            error = wired.client.wire.expect(_is_error, f"{name} at the client")
            assert (error.icmp, error.mtu) == ((kind, code), rest)
            assert (error.source, error.target) == (talk.outside.target, talk.outside.source)
            assert error.quoted.ends == talk.outside, name
            assert error.quoted.seq == sent % M, name


def test_errors_about_the_servers_segments(wired: Wired) -> None:
    talk = _talk(wired)
    for name, (kind, code, rest) in ERRORS[wired.family].items():
        for size in (0, 400):
            seen = talk.to_client("A", seq=talk.there.seq, ack=talk.there.ack, data=b"x" * size)
            wired.client.send(_error(wired, FAR_ROUTER[wired.family], seen.data, name))
            error = wired.server.wire.expect(_is_error, f"{name} at the server")
            assert (error.icmp, error.mtu) == ((kind, code), rest)
            assert (error.source, error.target) == (talk.inside.source, talk.inside.target)
            assert error.quoted.ends == talk.inside.back, name
            assert error.quoted.seq == talk.there.seq % M, name


def test_errors_about_datagrams(wired: Wired) -> None:
    outside = Ends(wired.client.address(wired.family), 4000, wired.net.vip(wired.family), 53)
    wired.client.send(packets.udp(outside, b"question"))
    asked = wired.server.wire.expect(lambda p: p.protocol == packets.UDP, "the question")
    assert (asked.target, asked.dport) == (wired.server.address(wired.family), 5353)
    wired.server.send(packets.udp(asked.ends.back, b"answer"))
    answered = wired.client.wire.expect(lambda p: p.protocol == packets.UDP, "the answer")
    assert answered.ends == outside.back
    for name, (kind, code, rest) in ERRORS[wired.family].items():
        wired.server.send(_error(wired, ROUTER[wired.family], asked.data, name))
        error = wired.client.wire.expect(_is_error, f"{name} at the client")
        assert (error.icmp, error.mtu, error.quoted.ends) == ((kind, code), rest, outside)
        wired.client.send(_error(wired, FAR_ROUTER[wired.family], answered.data, name))
        error = wired.server.wire.expect(_is_error, f"{name} at the server")
        assert (error.icmp, error.mtu, error.quoted.ends) == ((kind, code), rest, asked.ends.back)


def test_a_quotation_of_eight_bytes(wired: Wired) -> None:
    """RFC 792 asks for no more: ports and the number are there, nothing else may be read or written."""
    talk = _talk(wired)
    head = 20 if wired.family == 4 else 40
    seen = talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack, data=b"x" * 100)
    wired.server.send(_error(wired, ROUTER[wired.family], seen.data, "port", cut=head + 8))
    error = wired.client.wire.expect(_is_error, "the error at the client")
    assert error.quoted.ends == talk.outside
    assert error.quoted.seq == talk.here.seq % M
    assert len(error.quoted.segment) == 8
    back = talk.to_client("A", seq=talk.there.seq, ack=talk.there.ack)
    wired.client.send(_error(wired, FAR_ROUTER[wired.family], back.data, "port", cut=head + 8))
    error = wired.server.wire.expect(_is_error, "the error at the server")
    assert error.quoted.ends == talk.inside.back
    assert error.quoted.seq == talk.there.seq % M


def test_shorter_quotations_and_strangers_go_nowhere(wired: Wired) -> None:
    """Cut before the ports end, or about connections that nobody has."""
    talk = _talk(wired)
    head = 20 if wired.family == 4 else 40
    seen = talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack)
    for cut in (head, head + 1, head + 2, head + 3):
        wired.server.send(_error(wired, ROUTER[wired.family], seen.data, "port", cut=cut))
    stranger = Ends(talk.inside.source, 4999, talk.inside.target, 8080)
    wired.server.send(_error(wired, ROUTER[wired.family], packets.tcp(stranger, "A"), "port"))
    wired.client.wire.silence(_is_error, "an error that is for nobody", 0.2)
    assert talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack).seq == talk.there.ack % M


def test_echo_is_answered_by_the_director(wired: Wired, site: Callable[..., Site]) -> None:
    net = wired.net
    client = net.lab.namespace("pinger")
    net.switch.ip(*net.cable(client, "eth0", "front", "pinger"))
    net.join_front(client, 0)
    client.run("ping", "-c", "1", "-W", "5", net.vip(wired.family), seconds=10)


# --- path MTU


@pytest.mark.parametrize("wide", [True, False], ids=["to-server", "to-client"])
def test_what_does_not_fit_the_directors_own_link(wired: Wired, wide: bool) -> None:
    """With DF the sender is told the link's MTU, about its own packet, and nothing goes on, whole or in pieces."""
    talk = _talk(wired)
    narrow = wired.net.back if wide else wired.net.front
    wired.net.director.ip(f"link set {narrow} mtu 1400")
    sender, receiver = (wired.client, wired.server) if wide else (wired.server, wired.client)
    ends = talk.outside if wide else talk.inside.back
    seq, ack = (talk.here.seq, talk.here.ack) if wide else (talk.there.seq, talk.there.ack)
    head = 40 if wired.family == 4 else 60
    sender.send(packets.tcp(ends, "A", seq=seq, ack=ack, data=b"x" * (1500 - head)))
    error = sender.wire.expect(_is_error, "the error")
    assert error.icmp == ((3, 4) if wired.family == 4 else (2, 0))
    assert error.mtu == 1400
    assert error.quoted.ends == ends
    assert error.quoted.seq == seq % M
    receiver.wire.silence(lambda p: p.protocol == packets.TCP, "what did not fit", 0.1)
    fits = packets.tcp(ends, "A", seq=seq, ack=ack, data=b"x" * (1400 - head))
    sender.send(fits)
    assert receiver.wire.expect(lambda p: p.protocol == packets.TCP, "what fits").length == 1400


def test_without_df_it_goes_on_in_pieces(site: Callable[..., Site]) -> None:
    """IPv4 only: who allows fragments gets them, and they carry what was sent."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(4, "-b", locals_=1, servers=[server.address(4)])
    talk = Conversation(client, server, 4)
    talk.open()
    talk.greet()
    net.director.ip(f"link set {net.back} mtu 1400")
    data = bytes(range(250)) * 5
    client.send(packets.tcp(talk.outside, "A", seq=talk.here.seq, ack=talk.here.ack, data=data + b"x" * 210, df=False))
    first = server.wire.expect(lambda p: p.fragment, "the first piece")
    second = server.wire.expect(lambda p: p.fragment, "the second piece")
    assert (first.segment + second.segment)[20:] == data + b"x" * 210


@pytest.mark.parametrize("family", FAMILIES)
def test_download_over_a_narrow_link_behind_the_clients_router(site: Callable[..., Site], family: int) -> None:
    """The router's error goes to the virtual address; the real server must hear it and send less at once."""
    net = site(clients=0, servers=1)
    net.serve(size=BULK)
    net.balance(family, "-b", locals_=1)
    far = net.routed_client(1300)
    with net.servers[0].capture("eth0") as seen:
        (bulk,) = far.get(net.vip(family), "/bulk")
    assert len(bulk) == BULK
    seen.must_be_sound()
    errors = seen.seen(_is_error)
    assert errors, "the router had no reason to complain: the test is wrong"
    assert {error.mtu for error in errors} == {1300}
    assert {error.quoted.ends.source for error in errors} == {net.server(family)}
    learnt = net.servers[0].run("ip", "route", "get", net.local(family)).out
    assert "mtu 1300" in learnt


@pytest.mark.parametrize("family", FAMILIES)
def test_upload_over_a_narrow_link_behind_the_servers_router(site: Callable[..., Site], family: int) -> None:
    net = site(servers=0)
    far = net.routed_server(1300)
    far.serve()
    address = f"{FAR_BACK[family]}{FIRST_HOST}"
    net.balance(family, "-b", locals_=1, servers=[address])
    client = net.clients[0]
    with client.capture("eth0") as seen:
        done = client.run(
            "curl", "-sS", "-g", "--data-binary", "@-", f"http://{service(net.vip(family), 80)}/", stdin="x" * BULK,
            seconds=20,
        )  # fmt: skip
    assert done.out.split()[1] == net.local(family)
    seen.must_be_sound()
    errors = seen.seen(_is_error)
    assert errors, "the router had no reason to complain: the test is wrong"
    assert {error.mtu for error in errors} == {1300}
    assert {error.source for error in errors} == {net.vip(family)}
    assert "mtu 1300" in client.run("ip", "route", "get", net.vip(family)).out


@pytest.mark.parametrize("narrow", ["front", "back"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bulk_over_a_narrow_link_of_the_director(site: Callable[..., Site], family: int, narrow: str) -> None:
    """Real stacks send packets that are to be cut up: one whose pieces are too large is refused, never fragmented."""
    net = site(servers=1)
    net.serve(size=BULK)
    net.balance(family, "-b", locals_=1)
    client, server = net.clients[0], net.servers[0]
    net.director.ip(f"link set {narrow} mtu 1400")
    with net.director.capture(narrow) as seen:  # only this way: the device takes nothing larger from the other side
        if narrow == "front":
            assert len(client.get(net.vip(family), "/bulk")[0]) == BULK
        else:
            patience = 20.0 * net.lab.guest.scale
            client.call("servers:http_post", address=net.vip(family), port=80, size=BULK, patience=patience, seconds=25)
    seen.must_be_sound()
    sent = [frame for frame in seen.frames if frame.is_ip and frame.kind == packets.OUTGOING]
    assert not [frame.packet for frame in sent if frame.packet.fragment]
    head = 20 if family == 4 else 40
    assert max(f.offload.head + f.offload.size if f.offload.gso else f.packet.length for f in sent) <= 1400 + head
    told = (client, net.vip(family)) if narrow == "back" else (server, net.local(family))
    assert "mtu 1400" in told[0].run("ip", "route", "get", told[1]).out


@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_learn_the_path_mtu(site: Callable[..., Site], family: int) -> None:
    """A datagram that does not fit fails at its sender, which is told why, instead of vanishing."""
    net = site(servers=0)
    far = net.routed_server(1300)
    # Its answer is as long, and the router takes nothing longer from it: this way it knows.
    far.ip(f"route replace default via {FAR_BACK[family]}{DIRECTOR} mtu 1300")
    far.echo()
    net.balance(family, "-b", port=53, protocol="udp", locals_=1, servers=[f"{FAR_BACK[family]}{FIRST_HOST}"])
    client = net.clients[0]
    with pytest.raises(Failed, match=r"Message too long|TimeoutError"):
        client.ask(net.vip(family), text="x" * 1400, patience=1.0)
    assert "mtu 1300" in client.run("ip", "route", "get", net.vip(family)).out
    assert client.ask(net.vip(family), text="x" * 1400).endswith("x" * 1400)  # in pieces now
