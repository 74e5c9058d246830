"""Floods of other packets than SYNs: they begin nothing, and nobody answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernel import packets
from tests.kernel.cookies import PAIRS, Wired, ack, protect
from tests.kernel.machine import Failed
from tests.kernel.packets import Ends
from tests.kernel.talk import Conversation
from tests.kernel.topology import FAMILIES, Site

pytestmark = [pytest.mark.build, pytest.mark.guest]


@pytest.fixture(params=PAIRS)
def wired(request: pytest.FixtureRequest, site: Callable[..., Site]) -> Wired:
    """A protected service of either family and method."""
    return Wired.of(site, *request.param)


@pytest.fixture
def defended(wired: Wired) -> Wired:
    """All defences are on, and the service has no cookies."""
    assert protect(wired.net, wired.family, on=False) == "ok"
    for name in ("tcp", "udp", "frag"):
        wired.net.director.ip_vs_sysctl(f"defence_{name}_drop", 1)
    return wired


@pytest.mark.parametrize("flags", ["A", "R", "RA", "FA", "PA", "", "FSPUA", "SA"])
def test_segments_that_begin_nothing(defended: Wired, flags: str) -> None:
    """They make no connection, and nobody answers."""
    for _ in range(5):
        defended.client.send(packets.tcp(defended.ends(), flags, seq=7, ack=9))
    defended.client.wire.silence(lambda p: p.protocol in (packets.TCP, packets.ICMP, packets.ICMPV6), "an answer")
    assert defended.net.director.connections() == []
    assert defended.counted("defence_tcp_drop") == 5


def test_what_belongs_to_a_connection_passes(defended: Wired) -> None:
    talk = Conversation(defended.client, defended.server, defended.family)
    talk.open()
    talk.to_server("PA", seq=talk.here.seq, ack=talk.here.ack, data=b"x")
    talk.close()
    assert defended.counted("defence_tcp_drop") == 0


def test_cookies_pass_and_others_do_not(defended: Wired) -> None:
    assert protect(defended.net, defended.family) == "ok"
    ends = defended.ends()
    synack = defended.answer(ends)
    defended.client.send(packets.tcp(ends, "A", seq=synack.ack, ack=synack.seq + 2))
    defended.server.wire.silence(lambda p: p.protocol == packets.TCP, "a SYN at the server")
    assert defended.counted("synproxy_bad_ack") == 1
    ack(defended, ends, synack)
    defended.at_server("S")
    assert defended.counted("defence_tcp_drop") == 0


def test_another_port_is_none_of_ours(defended: Wired) -> None:
    ends = Ends(defended.client.address(defended.family), 4000, defended.net.vip(defended.family), 81)
    defended.client.send(packets.tcp(ends, "A", seq=7, ack=9))
    assert defended.at_client(ends, "R").seq == 9, "the director's own stack refuses it"


def test_datagrams(defended: Wired) -> None:
    """Dropped as long as the address has no service for them."""
    vip = defended.net.vip(defended.family)
    ends = Ends(defended.client.address(defended.family), 4000, vip, 53)
    defended.client.send(packets.udp(ends, b"x"))
    defended.client.wire.silence(lambda p: p.is_error, "port unreachable")
    assert defended.counted("defence_udp_drop") == 1
    other = Ends(ends.source, 4000, defended.net.vip(defended.family, 1), 53)
    defended.client.send(packets.udp(other, b"x"))
    defended.client.wire.expect(lambda p: p.is_error, "an address without services")
    address = [defended.server.address(defended.family)]
    locals_ = 1 if defended.method == "-b" else 0
    where = defended.net.balance(
        defended.family, defended.method, port=54, protocol="udp", servers=address, locals_=locals_
    )
    defended.client.send(packets.udp(ends, b"x"))
    defended.client.wire.expect(lambda p: p.is_error, "port unreachable")
    defended.net.director.ipvsadm("-D", "-u", where)
    defended.client.send(packets.udp(ends, b"x"))
    defended.client.wire.silence(lambda p: p.is_error, "port unreachable")
    assert defended.counted("defence_udp_drop") == 2


def test_off_they_are_as_if_they_were_not_there(wired: Wired) -> None:
    assert protect(wired.net, wired.family, on=False) == "ok"
    ends = wired.ends()
    wired.client.send(packets.tcp(ends, "A", seq=7, ack=9))
    assert wired.at_client(ends, "R").seq == 9
    wired.client.send(packets.udp(Ends(ends.source, 4000, ends.target, 53), b"x"))
    wired.client.wire.expect(lambda p: p.is_error, "port unreachable")


@pytest.mark.parametrize("family", FAMILIES)
def test_fragments(site: Callable[..., Site], family: int) -> None:
    """Those to an address of a service; others are put together as ever."""
    net = site(clients=1, servers=1)
    net.echo()
    net.balance(family, "-b", port=53, protocol="udp", locals_=1)
    client = net.clients[0]
    assert len(client.ask(net.vip(family), text="x" * 3000)) > 3000
    net.director.ip_vs_sysctl("defence_frag_drop", 1)
    with pytest.raises(Failed, match=r"imeout|timed out"):
        client.ask(net.vip(family), text="x" * 3000)
    assert net.director.ext_stats()["defence_ip_frag_drop"] >= 3
    assert client.ask(net.vip(family)) != ""
    word = ["-6"] if family == 6 else []
    client.run("ping", *word, "-c", "1", "-s", "3000", net.director_address(family))
