"""SYNPROXY: SYNs are answered with cookies, and only clients that prove them get a connection."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable

import pytest

from tests.kernel import packets
from tests.kernel.cookies import FULL, METHODS, NO_STAMPS, PAIRS, M, Wired, ack, protect, served
from tests.kernel.lab import selftest
from tests.kernel.machine import Guest
from tests.kernel.packets import NOPS, SACK_PERMITTED, mss, options, sack, timestamp, wscale
from tests.kernel.talk import Bare
from tests.kernel.topology import FAMILIES, Site, service, url

pytestmark = [pytest.mark.build, pytest.mark.guest]
TRACKED = """
table inet filter {
  counter invalid {}
  chain input {
    type filter hook input priority filter; policy drop;
    ct state invalid counter name invalid drop
    ct state established,related accept
    meta l4proto icmp accept; meta l4proto ipv6-icmp accept
    ct state new tcp dport 80 accept
  }
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state invalid counter name invalid drop
    ct state established,related accept
  }
}
"""


@pytest.fixture(params=PAIRS)
def wired(request: pytest.FixtureRequest, site: Callable[..., Site]) -> Wired:
    """A protected service of either family and method."""
    return Wired.of(site, *request.param)


# --- real stacks


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_real_stacks(site: Callable[..., Site], family: int, method: str) -> None:
    net = served(site, family, method, 600_000)
    with net.director.capture("front") as front, net.director.capture("back") as back:
        assert net.clients[0].get(net.vip(family), count=3) != []
    front.must_be_sound()
    back.must_be_sound()
    assert len(net.clients[0].get(net.vip(family), "/bulk")[0]) == 600_000
    where = url(net.vip(family))
    net.clients[0].run("curl", "-sS", "-g", "--data-binary", "@-", where, stdin="x" * 600_000, seconds=10)
    stats = net.director.ext_stats()
    assert stats["synproxy_ok_ack"] == stats["synproxy_syn_cnt"] == 5
    assert stats["synproxy_bad_ack"] == 0


# --- the SYN


def test_answers_obey_ipsec_policies(wired: Wired) -> None:
    """What a policy wants encrypted or kept back does not leave in clear text."""
    source, target = wired.net.vip(wired.family), wired.client.address(wired.family)
    policy = ("xfrm", "policy", "add", "src", source, "dst", target, "dir", "out", "action", "block")
    wired.net.director.run("ip", *policy)
    wired.client.send(packets.tcp(wired.ends(), "S", seq=1000, option=FULL))
    wired.client.wire.silence(lambda p: p.protocol == packets.TCP, "an answer")
    wired.net.director.run("ip", "xfrm", "policy", "flush")
    wired.answer(wired.ends())


def test_a_syn_leaves_nothing(wired: Wired) -> None:
    for _ in range(5):
        wired.answer(wired.ends())
    assert wired.net.director.connections() == []
    wired.server.wire.silence(lambda p: p.protocol == packets.TCP, "a SYN at the server")
    damaged = packets.tcp(wired.ends(), "S", seq=1, option=FULL)
    wired.client.send(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    wired.client.wire.silence(lambda p: p.protocol == packets.TCP, "an answer to a damaged SYN")
    assert wired.counted("synproxy_syn_cnt") == 5


def test_the_answers_options(wired: Wired) -> None:
    """What the real server can honour, and no echo of what we do not speak."""
    strange = bytes([30, 12]) + b"m" * 10 + bytes([34, 2])
    ends = wired.ends()
    synack = wired.answer(ends, option=options(FULL, strange), data=b"early")
    room = {4: 8, 6: 20}[wired.family] if wired.method == "-b" else 0  # for the client's address
    assert synack.mss == min(1452, 1500 - {4: 40, 6: 60}[wired.family] - room)
    assert synack.timestamps is not None
    assert synack.timestamps[1] == 1000
    assert set(synack.options) == {2, 3, 4, 8}
    assert synack.options[3] == b"\x07"
    assert synack.payload == b""
    assert synack.ack == 1001
    assert synack.window == 3 * synack.mss, "no more than is kept"
    bare = wired.answer(wired.ends(), option=options(mss(1400)))
    assert set(bare.options) == {2}
    strange = bytes([19, 18]) + b"d" * 16 + bytes([77, 4]) + b"??"
    record = {4: bytes([7, 7, 4, 0, 0, 0, 0, 0]), 6: bytes([1, 4, 0, 0, 0, 0])}[wired.family]  # a route; padding
    assert set(wired.answer(wired.ends(), option=options(mss(1400), strange), extra=record).options) == {2}
    ends = wired.ends()
    wired.client.send(packets.tcp(ends, "SEC", seq=1000, option=FULL))
    assert wired.at_client(ends, "SA").extra == b"", "no answer of ours speaks ECN, or has options of IP"


@pytest.mark.parametrize("option", [FULL, NO_STAMPS], ids=["timestamps", "none"])
def test_the_whole_course(wired: Wired, option: bytes) -> None:
    """Cookie, SYN to the server with the client's options, kept data, numbers and windows of both sides."""
    ends = wired.ends()
    synack = wired.answer(ends, isn=0xFFFFFFF0, option=option)
    ack(wired, ends, synack, b"hello")
    syn = wired.at_server("S")
    assert syn.mss == {4: 1300, 6: 1220}[wired.family], "the next smaller one that a cookie can say"
    assert syn.options[3] == b"\x09"
    assert 4 in syn.options
    assert (syn.timestamps is not None) == (option is FULL)
    if wired.method == "-m":
        assert syn.seq == 0xFFFFFFF0
    inside = syn.ends
    server_option = (
        options(mss(1460), SACK_PERMITTED, timestamp(777, syn.timestamps[0]), NOPS, wscale(3))
        if (syn.timestamps)
        else options(mss(1460), NOPS, NOPS, SACK_PERMITTED, NOPS, wscale(3))
    )
    wired.server.send(
        packets.tcp(inside.back, "SA", seq=9_000_000, ack=syn.seq + 1, window=20000, option=server_option)
    )
    kept = wired.at_server("PA")
    assert (kept.seq, kept.ack, kept.payload) == ((syn.seq + 1) % M, 9_000_001, b"hello")
    update = wired.at_client(ends, "A")
    assert (update.seq, update.ack, update.window) == ((synack.seq + 1) % M, synack.ack, 20000 >> 7)
    if option is FULL:
        assert kept.timestamps is not None
        assert kept.timestamps[1] == 777
    # server to client
    stamp = options(NOPS, NOPS, timestamp(800, 1)) if option is FULL else b""
    wired.server.send(
        packets.tcp(inside.back, "PA", seq=9_000_001, ack=syn.seq + 6, window=1000, data=b"world", option=stamp)
    )
    seen = wired.at_client(ends, "PA")
    assert (seen.seq, seen.ack, seen.payload) == ((synack.seq + 1) % M, (0xFFFFFFF0 + 6) % M, b"world")
    assert seen.window == (1000 << 3) >> 7
    if option is FULL:
        assert seen.timestamps is not None
        assert synack.timestamps is not None
        assert seen.timestamps[0] == (synack.timestamps[0] + 800 - 777) % M
    # client to server, SACK about the server's numbers
    blocks = (synack.seq + 100, synack.seq + 200)
    wired.client.send(
        packets.tcp(ends, "A", seq=6 + 0xFFFFFFF0, ack=synack.seq + 6, window=50, option=options(NOPS, sack(blocks)))
    )
    seen = wired.at_server("A")
    assert (seen.ack, seen.window) == (9_000_006, 50)
    assert seen.sacks == [(9_000_100, 9_000_200)]


# --- ACKs


def test_a_wrong_cookie(wired: Wired) -> None:
    for offset in (1, 1 << 16, 1 << 24, 1 << 31):
        ends = wired.ends()
        synack = wired.answer(ends)
        wired.client.send(packets.tcp(ends, "PA", seq=synack.ack, ack=synack.seq + 1 + offset, data=b"x"))
    other = wired.ends()
    wired.client.send(packets.tcp(other, "A", seq=synack.ack, ack=synack.seq + 1))
    wired.client.send(packets.tcp(ends, "A", seq=synack.ack + 1, ack=synack.seq + 1))
    wired.server.wire.silence(lambda p: p.protocol == packets.TCP, "a SYN at the server")
    wired.client.wire.silence(lambda p: p.protocol == packets.TCP and "R" in p.flags, "a reset")
    assert wired.net.director.connections() == []
    assert wired.counted("synproxy_bad_ack") == 6
    wired.net.director.ip_vs_sysctl("synproxy_bad_ack_rst", 1)
    wired.client.send(packets.tcp(other, "A", seq=synack.ack, ack=synack.seq + 1))
    assert wired.at_client(other, "R").seq == (synack.seq + 1) % M


def test_defer_waits_for_data(wired: Wired) -> None:
    wired.net.director.ip_vs_sysctl("synproxy_defer", 1)
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack)
    wired.server.wire.silence(lambda p: p.protocol == packets.TCP, "a SYN at the server")
    assert wired.counted("synproxy_null_ack") == 1
    ack(wired, ends, synack, b"now")
    wired.at_server("S")


def test_the_server_refuses(wired: Wired) -> None:
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack)
    syn = wired.at_server("S")
    wired.server.send(packets.tcp(syn.ends.back, "RA", seq=0, ack=syn.seq + 1))
    assert wired.at_client(ends, "R").seq == (synack.seq + 1) % M
    wired.net.director.wait_until(lambda: not wired.net.director.connections(), "the end of the entry")


@pytest.mark.parametrize("why", ["port", "prohibited"])
def test_a_firewall_refuses(wired: Wired, why: str) -> None:
    """By ICMP, about a SYN that the client has not sent: nobody else's number is believed, and no way is no refusal."""
    refusals = {"port": {4: (3, 3), 6: (1, 4)}, "prohibited": {4: (3, 10), 6: (1, 1)}}
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack)
    syn = wired.at_server("S")
    source = wired.server.address(wired.family)
    other = packets.tcp(syn.ends, "S", seq=syn.seq + 1)
    for (kind, code), about in ((refusals[why][wired.family], other), ({4: (3, 1), 6: (1, 0)}[wired.family], syn.data)):
        wired.server.send(packets.error(source, syn.source, kind, code, about))
    wired.client.wire.silence(lambda p: p.protocol == packets.TCP and p.flags == "R", "a reset of the client")
    wired.server.send(packets.error(source, syn.source, *refusals[why][wired.family], syn.data))
    assert wired.at_client(ends, "R").seq == (synack.seq + 1) % M
    wired.net.director.wait_until(lambda: not wired.net.director.connections(), "the end of the entry")


def test_the_server_is_silent(wired: Wired) -> None:
    """The SYN is repeated, with back-off, and then the client is told."""
    wired.net.director.ip_vs_sysctl("synproxy_syn_retry", 1)
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack)
    first = wired.at_server("S")
    again = wired.at_server("S")
    since = wired.net.director.guest.ask("hello")["uptime"]
    assert (again.seq, again.ends, again.option_bytes) == (first.seq, first.ends, first.option_bytes)
    reset = wired.client.wire.expect(lambda p: p.ends == ends.back and p.flags == "R", "the reset", 6.0)
    # Seen a little late each time: the second wait is twice the first, which is a second.
    assert wired.net.director.guest.ask("hello")["uptime"] - since > 1.5
    assert reset.seq == (synack.seq + 1) % M
    assert wired.at_server("R").seq == (first.seq + 1) % M, "it may have heard us all the same"
    wired.net.director.wait_until(lambda: not wired.net.director.connections(), "the end of the entry")
    assert wired.counted("synproxy_rs_error") == 2
    assert (wired.counted("rst_in_syn_sent"), wired.counted("rst_out_syn_sent")) == (1, 1)


def test_the_server_is_removed(wired: Wired) -> None:
    """While its answer is waited for: the client is told at the next time-out, and no SYN is sent any more."""
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack)
    wired.at_server("S")
    real = service(wired.server.address(wired.family), 80)
    wired.net.director.ipvsadm("-d", "-t", service(wired.net.vip(wired.family), 80), "-r", real)
    wired.server.wire.drain()  # on a busy machine a SYN was sent again before
    tried = wired.counted("synproxy_rs_error")
    assert wired.at_client(ends, "R").seq == (synack.seq + 1) % M
    wired.net.director.wait_until(lambda: not wired.net.director.connections(), "the end of the entry")
    came = [frame.packet for frame in wired.server.wire.drain() if frame.is_ip]
    assert [packet.flags for packet in came if packet.protocol == packets.TCP] == ["R"]
    assert wired.counted("synproxy_rs_error") == tried + 1


def test_the_client_gives_up(wired: Wired) -> None:
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack)
    wired.at_server("S")
    wired.client.send(packets.tcp(ends, "R", seq=synack.ack + 5))
    assert len(wired.net.director.connections()) == 1
    wired.client.send(packets.tcp(ends, "R", seq=synack.ack))
    assert wired.at_server("R").seq
    wired.net.director.wait_until(lambda: not wired.net.director.connections(), "the end of the entry")


def test_another_client_of_the_same_port_while_the_server_is_silent(wired: Wired) -> None:
    """Behind a NAT, or after a crash: the first one's reset was lost, and its connection is not the second one's."""
    ends = wired.ends()
    first = wired.answer(ends)
    ack(wired, ends, first, b"first")
    old = wired.at_server("S")
    second = wired.answer(ends, isn=5000)
    wired.client.send(packets.tcp(ends, "A", seq=second.ack, ack=second.seq + 77))  # no cookie, which ends nothing
    wired.server.wire.silence(lambda p: p.protocol == packets.TCP and p.flags != "S", "anything but SYNs")
    ack(wired, ends, second, b"second")
    assert wired.at_server("R").seq == (old.seq + 1) % M
    new = wired.server.wire.expect(lambda p: p.protocol == packets.TCP and p.seq != old.seq, "the second one's SYN")
    assert new.flags == "S"
    wired.server.send(packets.tcp(new.ends.back, "SA", seq=7000, ack=new.seq + 1, option=options(mss(1460))))
    assert wired.at_server("PA").payload == b"second"


def test_the_servers_syn_ack_is_repeated(wired: Wired) -> None:
    """It has lost our ACK: it gets another one."""
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack)
    syn = wired.at_server("S")
    again = packets.tcp(syn.ends.back, "SA", seq=5, ack=syn.seq + 1, option=options(mss(1460)))
    for _ in range(2):
        wired.server.send(again)
        seen = wired.at_server("A")
        assert (seen.seq, seen.ack) == ((syn.seq + 1) % M, 6)


def test_what_is_kept_is_bounded(wired: Wired) -> None:
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack)
    syn = wired.at_server("S")
    for n in range(6):
        wired.client.send(packets.tcp(ends, "PA", seq=synack.ack + n, ack=synack.seq + 1, data=b"%d" % n))
    wired.server.send(packets.tcp(syn.ends.back, "SA", seq=5, ack=syn.seq + 1, option=options(mss(1460))))
    got = [wired.at_server("PA").payload for _ in range(3)]
    assert got == [b"0", b"1", b"2"]
    assert wired.counted("synproxy_synsend_qlen") == 3


# --- control


@pytest.mark.parametrize("method", ["-g", "-i"])
def test_only_where_answers_come_back(site: Callable[..., Site], method: str) -> None:
    """Refused with the reason, whatever comes first, and nothing has changed."""
    net = site(clients=0, servers=1)
    where = net.balance(4, method)
    saved = net.director.ipvsadm("-S", "-n").out
    name = {"-g": "Route", "-i": "Tunnel"}[method]
    done = net.director.ipvsadm("-E", "-t", where, "-j", "enable", check=False)
    assert done.status == 1
    assert f"the forwarding method {name}, which real server {net.server(4)} of service" in done.err
    assert net.director.ipvsadm("-S", "-n").out == saved
    assert protect(net, 4) == "EOPNOTSUPP"
    net.director.ipvsadm("-C")
    net.balance(4, "-m", options=("-j", "enable"))
    done = net.director.ipvsadm("-a", "-t", where, "-r", "10.0.2.77", method, check=False)
    assert done.status == 1
    assert f"the forwarding method {name} does not go with SYNPROXY" in done.err
    done = net.director.ipvsadm("-e", "-t", where, "-r", net.server(4), method, check=False)
    assert done.status == 1
    assert f"the forwarding method {name} does not go with SYNPROXY" in done.err


def test_listed_saved_and_kept(site: Callable[..., Site]) -> None:
    net = site(clients=0, servers=1)
    where = net.balance(4, "-m", options=("-j", "enable"))
    assert "rr synproxy" in net.director.ipvsadm("-L", "-n").out
    assert "-s rr -j enable" in net.director.ipvsadm("-S", "-n").out
    net.director.ipvsadm("-E", "-t", where, "-s", "wlc")
    assert "wlc synproxy" in net.director.ipvsadm("-L", "-n").out, "an edit that does not speak of it"
    rules = net.director.ipvsadm("-S", "-n").out
    net.director.ipvsadm("-C")
    net.director.run("ipvsadm", "-R", stdin=rules)
    assert net.director.ipvsadm("-S", "-n").out == rules
    net.director.ipvsadm("-E", "-t", where, "-j", "disable")
    assert "synproxy" not in net.director.ipvsadm("-L", "-n").out
    assert "-j" not in net.director.ipvsadm("-S", "-n").out


def test_the_secret(wired: Wired) -> None:
    """Readable for root alone, refused whole if it is damaged, in force at once; the old one while it is there."""
    director = wired.net.director
    secret = director.ip_vs_sysctl("synproxy_secret")
    assert len(secret) == 35
    assert oct(int(director.run("stat", "-c", "%a", "/proc/sys/net/ipv4/vs/synproxy_secret").out, 8)) == "0o600"
    for damaged in ("1-2-3", f"{secret},", "x", f"{secret},{secret},{secret}", "00000000000000000001-2-3-4"):
        with pytest.raises(Exception, match="Invalid argument"):
            director.sysctl("net.ipv4.vs.synproxy_secret", damaged)
        assert director.ip_vs_sysctl("synproxy_secret") == secret
    new = "00000001-00000002-00000003-00000004"
    first, second = wired.ends(), wired.ends()
    answers = [wired.answer(ends) for ends in (first, second)]
    director.sysctl("net.ipv4.vs.synproxy_secret", new)
    ack(wired, first, answers[0])
    wired.server.wire.silence(lambda p: p.protocol == packets.TCP, "a SYN at the server")
    director.sysctl("net.ipv4.vs.synproxy_secret", f"{new},{secret}")
    assert director.ip_vs_sysctl("synproxy_secret") == f"{new},{secret}"
    ack(wired, second, answers[1])
    wired.at_server("S")


def test_the_ack_reaches_another_director(site: Callable[..., Site]) -> None:
    """Two directors with one secret, as behind ECMP."""
    nets = [site(clients=0, servers=0, name=name) for name in ("a", "b")]
    sides = []
    for number, net in enumerate(nets):
        client, server = Bare(net, number), Bare(net, number, back=True)
        net.balance(4, "-b", locals_=1, servers=[server.address(4)])
        assert protect(net, 4) == "ok"
        net.director.sysctl("net.ipv4.vs.synproxy_secret", "1-2-3-4")
        sides.append(Wired(net, client, server, 4, "-b"))
    ends = sides[0].ends()
    synack = sides[0].answer(ends)
    ack(sides[1], ends, synack, b"hello")
    sides[1].at_server("S")
    assert sides[1].counted("synproxy_ok_ack") == 1


def test_switched_off_with_live_connections(wired: Wired) -> None:
    """What has begun goes on; what begins then goes straight to the server."""
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack)
    syn = wired.at_server("S")
    assert protect(wired.net, wired.family, on=False) == "ok"
    wired.server.send(packets.tcp(syn.ends.back, "SA", seq=5, ack=syn.seq + 1, option=options(mss(1460))))
    seen = wired.at_server("A")
    assert seen.ack == 6
    ack(wired, ends, synack, b"more")
    assert wired.at_server("PA").payload == b"more"
    new = wired.ends()
    wired.client.send(packets.tcp(new, "S", seq=1, option=FULL))
    wired.at_server("S")


def test_switched_on_with_live_and_half_open_connections(wired: Wired) -> None:
    """What has begun without it goes on without it."""
    assert protect(wired.net, wired.family, on=False) == "ok"
    live, half = wired.ends(), wired.ends()
    wired.client.send(packets.tcp(live, "S", seq=100, option=FULL))
    syn = wired.at_server("S")
    wired.server.send(packets.tcp(syn.ends.back, "SA", seq=500, ack=syn.seq + 1, option=options(mss(1460))))
    assert wired.at_client(live, "SA").seq == 500
    wired.client.send(packets.tcp(live, "A", seq=101, ack=501))
    wired.at_server("A")
    wired.client.send(packets.tcp(half, "S", seq=200, option=FULL))
    syn = wired.at_server("S")
    assert protect(wired.net, wired.family) == "ok"
    wired.client.send(packets.tcp(live, "PA", seq=101, ack=501, data=b"more"))
    assert wired.at_server("PA").payload == b"more"
    wired.client.send(packets.tcp(half, "S", seq=200, option=FULL))
    assert wired.at_server("S").ends == syn.ends, "the same SYN again"
    wired.server.send(packets.tcp(syn.ends.back, "SA", seq=700, ack=syn.seq + 1, option=options(mss(1460))))
    assert wired.at_client(half, "SA").seq == 700
    wired.client.send(packets.tcp(half, "A", seq=201, ack=701))
    wired.at_server("A")
    assert wired.counted("synproxy_syn_cnt") == 0
    wired.answer(wired.ends())


def test_a_namespace_ends_while_a_server_is_waited_for(wired: Wired) -> None:
    """With what is kept; that nothing is left the session looks for."""
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack, b"kept")
    wired.at_server("S")
    wired.client.send(packets.tcp(ends, "PA", seq=synack.ack + 4, ack=synack.seq + 1, data=b"more"))
    wired.net.director.ipvsadm("-C")


# --- what else may be at a service


def test_no_server(wired: Wired) -> None:
    where = ["-t", service(wired.net.vip(wired.family), 80), "-r", service(wired.server.address(wired.family), 80)]
    wired.net.director.ipvsadm("-e", *where, wired.method, "-w", "0")
    wired.client.send(packets.tcp(wired.ends(), "S", seq=1, option=FULL))
    wired.client.wire.silence(lambda p: p.protocol == packets.TCP, "an answer")
    assert wired.counted("synproxy_no_dest") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_no_local_address(site: Callable[..., Site], family: int) -> None:
    """The client believes to be connected: it is told otherwise."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", servers=[server.address(family)])
    assert protect(net, family) == "ok"
    wired = Wired(net, client, server, family, "-b")
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack)
    assert wired.at_client(ends, "R").seq == (synack.seq + 1) % M
    assert wired.counted("conn_sched_unreach") == 1
    # one that has a single port, which somebody has
    net.director.ip_vs_sysctl("fullnat_lport_min", 6000)
    net.director.ip_vs_sysctl("fullnat_lport_max", 6000)
    net.director.ipvsadm("-P", "-t", service(net.vip(family), 80), "-z", net.local(family))
    ends = wired.ends()
    ack(wired, ends, wired.answer(ends))
    assert wired.at_server("S").sport == 6000
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack)
    assert wired.at_client(ends, "R").seq == (synack.seq + 1) % M
    assert wired.counted("conn_sched_unreach") == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_together(site: Callable[..., Site], family: int, method: str) -> None:
    """Persistence, another port at the real server, a timeout of the service's own, clients named."""
    net = site(servers=2, gateway=method == "-m")
    net.serve(port=8080, size=300_000)
    net.balance(
        family, method, to=8080, options=("-p", "60", "-V", "77", "-j", "enable"), locals_=2 if method == "-b" else 0
    )
    client = net.clients[0]
    for _ in range(3):
        assert len(client.get(net.vip(family), "/bulk")[0]) == 300_000
    client.hold(net.vip(family), sport=4000)
    row = next(c for c in net.director.connections() if c.cport == 4000 and c.state == "ESTABLISHED")
    assert 60 < row.expires <= 77
    stats = net.director.ext_stats()
    assert stats["synproxy_ok_ack"] == stats["synproxy_syn_cnt"] == 4
    assert len({c.server for c in net.director.connections() if c.protocol == "TCP" and c.cport}) == 1
    assert (stats["fullnat_add_toa_ok"] > 0) == (method == "-b")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_real_server_on_the_director_itself(site: Callable[..., Site], family: int, method: str) -> None:
    """It answers from within the packet that reaches it."""
    net = site(servers=0)
    here = net.director_address(family, back=True)
    net.director.serve(port=8080, size=300_000, addresses=[here])
    locals_ = 1 if method == "-b" else 0
    net.balance(family, method, to=8080, options=("-j", "enable"), locals_=locals_, servers=[here])
    answer = net.clients[0].get(net.vip(family), count=3)[0].split()
    assert answer[:2] == ["director", net.local(family) if method == "-b" else net.client(family)]
    assert len(net.clients[0].get(net.vip(family), "/bulk")[0]) == 300_000
    assert net.director.ext_stats()["synproxy_ok_ack"] == 4


def test_a_client_on_the_director_itself(site: Callable[..., Site]) -> None:
    """Nobody forges its address: it needs no cookie."""
    net = site(servers=1)
    net.serve()
    for family in FAMILIES:
        net.balance(family, "-b", options=("-j", "enable"), locals_=1)
        assert net.director.get(net.vip(family))[0].split()[0] == "server0"
    assert net.director.ext_stats()["synproxy_syn_cnt"] == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_connection_tracking(site: Callable[..., Site], family: int, method: str) -> None:
    """A stateful firewall lets everything pass, and finds nothing invalid."""
    net = site(servers=1, gateway=method == "-m")
    net.serve(size=300_000)
    net.balance(family, method, options=("-j", "enable"), locals_=1 if method == "-b" else 0)
    net.director.nft(TRACKED)
    net.director.ip_vs_sysctl("conntrack", 1)
    client = net.clients[0]
    assert client.get(net.vip(family), count=3) != []
    assert len(client.get(net.vip(family), "/bulk")[0]) == 300_000
    for sport in (4000, 4000):  # the second one takes the place of the first
        client.get(net.vip(family), sport=sport)
    # Assured are those that go on: of the handshake tracking sees no more than its end.
    talk = client.start_call("servers:chat", address=net.vip(family), port=80, count=1, patience=5 * client.guest.scale)
    client.wait_until(lambda: len(talk.so_far().split()) >= 2, "two answers on a connection")
    assert "packets 0" in net.director.run("nft", "list", "counters").out
    table = net.director.run("conntrack", "-L", "-f", f"ipv{family}", "-p", "tcp").out
    (row,) = [c for c in net.director.connections() if c.state == "ESTABLISHED"]
    entry = next(line for line in table.splitlines() if f"sport={row.cport} " in line)
    assert "ESTABLISHED" in entry
    assert "[ASSURED]" in entry


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vrf(site: Callable[..., Site], family: int) -> None:
    net = site(servers=1, arms=1, kind="vrf")
    net.serve(size=300_000)
    net.balance(family, "-b", options=("-j", "enable"), locals_=1)
    assert len(net.clients[0].get(net.vip(family), "/bulk")[0]) == 300_000
    assert net.director.ext_stats()["synproxy_ok_ack"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_firewall_mark(site: Callable[..., Site], family: int) -> None:
    """Set before connections are tracked, as SYNs are answered before that.

    A rule brings what has the mark to this host. It is not for segments to real servers, nor for those to clients.
    """
    net = site(servers=1)
    net.serve(size=300_000)
    six = ["-6"] if family == 6 else []
    director = net.director
    director.nft("""
        table inet m {
        chain pre { type filter hook prerouting priority raw; tcp dport 80 meta mark set 9; }
        }""")
    director.run("ip", *six, "rule", "add", "fwmark", "9", "lookup", "100")
    director.run("ip", *six, "route", "add", "local", "default", "dev", "lo", "table", "100")
    director.ipvsadm("-A", "-f", "9", *six, "-s", "rr", "-j", "enable")
    director.ipvsadm("-P", "-f", "9", *six, "-z", net.local(family))
    director.ipvsadm("-a", "-f", "9", *six, "-r", net.server(family), "-b")
    assert len(net.clients[0].get(net.vip(family), "/bulk")[0]) == 300_000
    assert director.ext_stats()["synproxy_ok_ack"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_nobody_speaks_for_a_network(site: Callable[..., Site], method: str) -> None:
    """SYNs are answered before the stack has looked at where they come from: all hosts would get each answer.

    IPv6 has no broadcast, and drops what comes from a group before anybody sees it.
    """
    wired = Wired.of(site, 4, method)
    ours = ipaddress.ip_network(f"{wired.client.address(4)}/24", strict=False)
    for source in (str(ours.broadcast_address), "224.0.0.9"):
        forged = dataclasses.replace(wired.ends(), source=source)
        wired.client.send(packets.tcp(forged, "S", seq=1, option=FULL))
    wired.answer(wired.ends())
    assert wired.counted("synproxy_syn_cnt") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_virtual_address_that_is_only_routed_by(site: Callable[..., Site], family: int) -> None:
    """A director that is no more than a router for it, as a backup is, answers nothing."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", locals_=1, servers=[server.address(family)])
    assert protect(net, family) == "ok"
    wired = Wired(net, client, server, family, "-b")
    vip = f"{net.vip(family)}/{32 if family == 4 else 128}"
    net.director.ip(f"addr del {vip} dev lo", f"route add {vip} via {server.address(family)} dev {net.back}")
    wired.client.send(packets.tcp(wired.ends(), "S", seq=1, option=FULL))
    passed = server.wire.expect(lambda p: p.protocol == packets.TCP, "the SYN behind the router")
    assert passed.target == net.vip(family)
    assert wired.counted("synproxy_syn_cnt") == 0


# --- the kernel's own


def test_the_kernels_own_selftest(guest: Guest) -> None:
    selftest(guest, "ipvs_synproxy.sh")
