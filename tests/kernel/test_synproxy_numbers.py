"""SYNPROXY: what is translated between two ends that know different numbers, and a client's port that is used again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernel import packets
from tests.kernel.cookies import FULL, METHODS, PAIRS, M, Wired, ack, opened, protect, served
from tests.kernel.packets import NOPS, Ends, Packet, mss, options, sack, wscale
from tests.kernel.talk import Bare
from tests.kernel.topology import FAMILIES, Site, service, url

pytestmark = [pytest.mark.build, pytest.mark.guest]


@pytest.fixture(params=PAIRS)
def wired(request: pytest.FixtureRequest, site: Callable[..., Site]) -> Wired:
    """A protected service of either family and method."""
    return Wired.of(site, *request.param)


@pytest.mark.parametrize(
    ("theirs", "servers", "inward", "outward"),
    [(9, 3, 50, 62), (9, None, 25600, 7), (None, 3, 50, 1000), (0, 14, 50, 65535), (14, 0, 50, 7)],
)
def test_windows(wired: Wired, theirs: int | None, servers: int | None, inward: int, outward: int) -> None:
    """In the units that each end expects, whoever of them scales."""
    scale = [] if theirs is None else [NOPS, wscale(theirs)]
    server_scale = [] if servers is None else [NOPS, wscale(servers)]
    ends, synack, syn, update = opened(
        wired, options(mss(1400), *scale), options(mss(1460), *(server_scale if theirs is not None else []))
    )
    assert (3 in syn.options) == (theirs is not None)
    assert update.window == (20000 >> 7 if theirs is not None else 20000)
    wired.client.send(packets.tcp(ends, "PA", seq=synack.ack, ack=synack.seq + 1, window=50, data=b"q"))
    assert wired.at_server("PA").window == inward
    wired.server.send(packets.tcp(syn.ends.back, "PA", seq=7001, ack=syn.seq + 2, window=1000, data=b"a"))
    assert wired.at_client(ends, "PA").window == outward


def test_no_window_stays_none_and_a_small_one_is_no_none(wired: Wired) -> None:
    ends, _, syn, _ = opened(wired, FULL, options(mss(1460), NOPS, wscale(0)))
    for window, told in ((0, 0), (1, 1), (127, 1), (256, 2)):
        wired.server.send(packets.tcp(syn.ends.back, "PA", seq=7001, ack=syn.seq + 1, window=window, data=b"a"))
        assert wired.at_client(ends, "PA").window == told


def test_early_data_out_of_order(wired: Wired) -> None:
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack)
    syn = wired.at_server("S")
    for n, data in ((2, b"cc"), (0, b"aa"), (0, b"aa")):
        wired.client.send(packets.tcp(ends, "PA", seq=synack.ack + n, ack=synack.seq + 1, data=data))
    wired.client.send(packets.tcp(ends, "FA", seq=synack.ack + 4, ack=synack.seq + 1))
    wired.server.send(packets.tcp(syn.ends.back, "SA", seq=5, ack=syn.seq + 1, option=options(mss(1460))))
    got = [wired.at_server(flags) for flags in ("A", "PA", "PA", "FA")]
    assert [p.payload for p in got] == [b"", b"aa", b"cc", b""]
    assert [(p.seq - syn.seq) % M for p in got] == [1, 1, 3, 5]
    wired.server.wire.silence(lambda p: p.protocol == packets.TCP, "what was kept twice")


def test_nothing_may_come_early(wired: Wired) -> None:
    """With nothing kept the client's window is closed until the server has answered."""
    wired.net.director.ip_vs_sysctl("synproxy_ack_skb_store_thresh", 0)
    ends = wired.ends()
    synack = wired.answer(ends)
    assert synack.window == 0
    ack(wired, ends, synack)
    syn = wired.at_server("S")
    wired.client.send(packets.tcp(ends, "PA", seq=synack.ack, ack=synack.seq + 1, data=b"x"))
    wired.server.send(packets.tcp(syn.ends.back, "SA", seq=5, ack=syn.seq + 1, option=options(mss(1460))))
    wired.at_server("A")
    assert wired.at_client(ends, "A").window > 0
    wired.server.wire.silence(lambda p: p.protocol == packets.TCP, "early data")


def test_an_old_connection_at_the_server(wired: Wired) -> None:
    """It acknowledges something else: RFC 9293 has us reset that, and the SYN is sent again."""
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack)
    syn = wired.at_server("S")
    wired.server.send(packets.tcp(syn.ends.back, "A", seq=999, ack=syn.seq + 7777))
    assert wired.at_server("R").seq == (syn.seq + 7777) % M
    assert wired.at_server("S").seq == syn.seq


def test_errors_about_what_the_client_got(wired: Wired) -> None:
    """The server knows its own numbers only, and believes no others."""
    ends, _, syn, _ = opened(wired, FULL, options(mss(1460)))
    wired.server.send(packets.tcp(syn.ends.back, "A", seq=7001, ack=syn.seq + 1, data=b"x" * 400))
    seen = wired.client.wire.expect(lambda p: p.ends == ends.back and p.payload != b"", "data at the client")
    wired.client.send(packets.frag_needed(wired.client.address(wired.family), seen.data, 1300))
    error = wired.server.wire.expect(lambda p: p.is_error, "the error at the server")
    assert error.quoted.ends == syn.ends.back
    assert error.quoted.seq == 7001


# --- repeated acknowledgements


def test_an_ack_storm(wired: Wired) -> None:
    ends, synack, syn, _ = opened(wired, FULL, options(mss(1460)))
    same = packets.tcp(syn.ends.back, "A", seq=7001, ack=syn.seq + 1)

    def passed(count: int, packet: bytes = same) -> int:
        # At once: what is counted is what comes within a second.
        end = packets.tcp(syn.ends.back, "PA", seq=7001, ack=syn.seq + 1, data=b"end")
        wired.server.send(*[packet] * count, end)
        seen = 0
        while wired.client.wire.expect(lambda p: p.ends == ends.back, "what the server says").payload != b"end":
            seen += 1
        return seen

    assert passed(30) == 11
    assert wired.counted("synproxy_ackstorm") == 19
    # it answers to data: duplicates that the client counts
    for _ in range(30):
        wired.client.send(packets.tcp(ends, "A", seq=synack.ack + 10, ack=synack.seq + 1, data=b"lost one before"))
        assert passed(1) == 1
    selective = options(NOPS, NOPS, sack((syn.seq + 20, syn.seq + 30)))
    assert passed(30, packets.tcp(syn.ends.back, "A", seq=7001, ack=syn.seq + 1, option=selective)) == 30
    wired.net.director.ip_vs_sysctl("synproxy_ack_storm_thresh", 0)
    assert passed(30) == 30


def test_answers_to_probes_are_no_storm(wired: Wired) -> None:
    """A client that keeps a connection alive, or asks whether a window is open, gets the same answer each time."""
    wired.net.director.ip_vs_sysctl("synproxy_ack_storm_thresh", 1)
    apart = 1.2 / wired.net.director.guest.scale  # a second, however slow the machine is
    ends, synack, syn, _ = opened(wired, FULL, options(mss(1460)))
    for _ in range(4):
        wired.client.send(packets.tcp(ends, "A", seq=synack.ack - 1, ack=synack.seq + 1))
        wired.at_server("A")
        wired.server.send(packets.tcp(syn.ends.back, "A", seq=7001, ack=syn.seq + 1, window=0))
        assert wired.at_client(ends, "A").window == 0
        wired.client.wire.silence(lambda p: p.protocol == packets.TCP, "more than one answer", apart)
    assert wired.counted("synproxy_ackstorm") == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_resets_of_one_that_was_idle(site: Callable[..., Site], family: int) -> None:
    """Each end gets the number that it knows."""
    wired = Wired.of(site, family, "-b", "-V", "2")
    ends, synack, syn, _ = opened(wired, FULL, options(mss(1460)))
    wired.server.send(packets.tcp(syn.ends.back, "PA", seq=7001, ack=syn.seq + 1, data=b"x"))
    wired.at_client(ends, "PA")
    wired.client.send(packets.tcp(ends, "A", seq=synack.ack, ack=synack.seq + 2))
    wired.at_server("A")
    reset = wired.client.wire.expect(lambda p: p.ends == ends.back and p.flags == "R", "the client's reset", 10)
    assert reset.seq == (synack.seq + 2) % M
    assert wired.at_server("R").seq == (syn.seq + 1) % M


def remove(wired: Wired) -> None:
    real = service(wired.server.address(wired.family), 80)
    wired.net.director.ipvsadm("-d", "-t", service(wired.net.vip(wired.family), 80), "-r", real)


def before(wired: Wired) -> tuple[Ends, Packet, Packet]:
    """A connection from when the service was not protected: ends, SYN-ACK at the client, SYN at the server."""
    assert protect(wired.net, wired.family, on=False) == "ok"
    ends = wired.ends()
    wired.client.send(packets.tcp(ends, "S", seq=1000, option=options(mss(1400))))
    syn = wired.at_server("S")
    wired.server.send(packets.tcp(syn.ends.back, "SA", seq=7000, ack=syn.seq + 1, option=options(mss(1460))))
    synack = wired.at_client(ends, "SA")
    wired.client.send(packets.tcp(ends, "A", seq=synack.ack, ack=synack.seq + 1))
    wired.at_server("A")
    assert protect(wired.net, wired.family) == "ok"
    return ends, synack, syn


BEGUN: dict[str, Callable[[Wired], tuple[Ends, Packet, Packet]]] = {
    "before": before,
    "protected": lambda wired: opened(wired, FULL, options(mss(1460)))[:3],
}


@pytest.mark.parametrize("begun", BEGUN)
def test_the_client_of_a_server_that_was_removed(wired: Wired, begun: str) -> None:
    """Each of its segments is answered, as long as any comes: they are no cookies, which nobody would answer."""
    wired.net.director.ip_vs_sysctl("expire_nodest_conn", 1)
    ends, synack, syn = BEGUN[begun](wired)
    for n in range(3):
        wired.server.send(packets.tcp(syn.ends.back, "PA", seq=7001 + n, ack=syn.seq + 1, data=b"x"))
        wired.at_client(ends, "PA")
    remove(wired)
    wired.client.wire.silence(lambda p: p.protocol == packets.TCP, "anything before the client speaks")
    # What it says of data that it gets one after the other: only the last reset has the number that it waits for.
    for seen in (2, 3, 4, 4):
        wired.client.send(packets.tcp(ends, "PA", seq=synack.ack, ack=synack.seq + seen, data=b"more"))
        assert wired.at_client(ends, "R").seq == (synack.seq + seen) % M
        wired.server.wire.silence(lambda p: p.protocol == packets.TCP, "anything at the server", 0.1)
    (row,) = wired.net.director.connections()
    assert row.state == "CLOSE"
    other = Bare(wired.net, 1, back=True)
    where, real = service(wired.net.vip(wired.family), 80), service(other.address(wired.family), 80)
    wired.net.director.ipvsadm("-a", "-t", where, "-r", real, wired.method)
    ack(wired, ends, wired.answer(ends, isn=90_000), b"anew")
    other.wire.expect(lambda p: p.target == other.address(wired.family) and p.flags == "S", "a SYN at the other one")


def test_a_forged_segment_takes_no_reset_from_the_client(wired: Wired) -> None:
    wired.net.director.ip_vs_sysctl("expire_nodest_conn", 1)
    ends, synack, _, _ = opened(wired, FULL, options(mss(1460)))
    remove(wired)
    wired.client.send(packets.tcp(ends, "S", seq=77))
    wired.client.wire.silence(lambda p: p.protocol == packets.TCP, "an answer to the SYN")
    wired.client.send(packets.tcp(ends, "A", seq=synack.ack + 5000, ack=synack.seq + 77))
    assert wired.at_client(ends, "R").seq == (synack.seq + 77) % M
    wired.client.send(packets.tcp(ends, "A", seq=synack.ack, ack=synack.seq + 1))
    assert wired.at_client(ends, "R").seq == (synack.seq + 1) % M


def test_a_removed_server_may_come_back(wired: Wired) -> None:
    """Without expire_nodest_conn its clients wait."""
    wired.net.director.ip_vs_sysctl("expire_nodest_conn", 0)
    ends, synack, _, _ = opened(wired, FULL, options(mss(1460)))
    remove(wired)
    more = packets.tcp(ends, "PA", seq=synack.ack, ack=synack.seq + 1, data=b"more")
    wired.client.send(more)
    wired.client.wire.silence(lambda p: p.protocol == packets.TCP, "an answer")
    wired.server.wire.silence(lambda p: p.protocol == packets.TCP, "anything at the server")
    where, real = service(wired.net.vip(wired.family), 80), service(wired.server.address(wired.family), 80)
    wired.net.director.ipvsadm("-a", "-t", where, "-r", real, wired.method)
    wired.client.send(more)
    assert wired.at_server("PA").payload == b"more"


@pytest.mark.parametrize("begun", BEGUN)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_idle_client_of_a_server_that_was_removed(site: Callable[..., Site], family: int, begun: str) -> None:
    wired = Wired.of(site, family, "-b", "-V", "2")
    wired.net.director.ip_vs_sysctl("expire_nodest_conn", 1)
    ends, synack, syn = BEGUN[begun](wired)
    wired.server.send(packets.tcp(syn.ends.back, "PA", seq=7001, ack=syn.seq + 1, data=b"x"))
    wired.at_client(ends, "PA")
    wired.client.send(packets.tcp(ends, "A", seq=synack.ack, ack=synack.seq + 2))
    wired.at_server("A")
    remove(wired)
    reset = wired.client.wire.expect(lambda p: p.ends == ends.back and p.flags == "R", "the client's reset", 10)
    assert reset.seq == (synack.seq + 2) % M
    assert (wired.counted("rst_out_established"), wired.counted("rst_in_established")) == (1, 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_is_removed_in_the_midst_of_a_download(site: Callable[..., Site], family: int, method: str) -> None:
    """Where data are on their way, resets cross them."""
    net = served(site, family, method, 8_000_000)
    net.director.ip_vs_sysctl("expire_nodest_conn", 1)
    client = net.clients[0]
    client.run("tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "50ms")  # as on the Internet
    words = ("--silent", "--show-error", "--globoff", "--limit-rate", "200k", "-o", "/dev/null")
    job = client.start("curl", *words, url(net.vip(family), "/bulk"))
    net.director.wait_until(lambda: any(c.state == "ESTABLISHED" for c in net.director.connections()), "the download")
    net.director.ipvsadm("-d", "-t", service(net.vip(family), 80), "-r", service(net.server(family), 80))
    done = job.wait(10, check=False)
    assert done.status == 56, str(done)  # CURLE_RECV_ERROR
    assert "reset" in done.err


NEAR = """
import socket, sys, time
near, device, vip = sys.argv[1:]
with socket.socket(socket.AF_INET6) as link:
    link.bind((near, 0, 0, socket.if_nametoindex(device)))
    link.connect((vip, 80))
    link.sendall(b"GET /bulk HTTP/1.0\\r\\n\\r\\n")
    while link.recv(4096):
        time.sleep(0.05)  # the server is removed in the midst of it
"""


def test_a_client_on_the_director_itself_of_a_server_that_was_removed(site: Callable[..., Site]) -> None:
    """A packet of its own has no device yet, which alone says where a link-local address is."""
    net = site(servers=1)
    net.serve(size=8_000_000)
    net.director.ip_vs_sysctl("expire_nodest_conn", 1)
    net.balance(6, "-m", options=("-j", "enable"))
    # Where VRRP has it: whoever is at a device's own address has no way to those of others.
    net.director.ip(f"addr del {net.vip(6)}/128 dev lo", f"addr add {net.vip(6)}/128 dev {net.back} nodad")
    near = net.director.run("ip", "-6", "-o", "address", "show", "dev", net.back, "scope", "link").out.split()[3]
    job = net.director.start("python3", "-c", NEAR, near.partition("/")[0], net.back, net.vip(6))
    net.director.wait_until(lambda: any(c.state == "ESTABLISHED" for c in net.director.connections()), "the download")
    net.director.ipvsadm("-d", "-t", service(net.vip(6), 80), "-r", service(net.server(6), 80))
    done = job.wait(10, check=False)
    assert "ConnectionResetError" in done.err, str(done)


@pytest.mark.parametrize("data", [b"", b"a request"])
def test_a_server_is_removed_before_it_answers(wired: Wired, data: bytes) -> None:
    """A request that was sent can be sent again; who waits for the server to speak is told."""
    other = Bare(wired.net, 1, back=True)
    wired.net.director.ip_vs_sysctl("expire_nodest_conn", 1)
    ends = wired.ends()
    synack = wired.answer(ends)
    ack(wired, ends, synack, data)
    wired.at_server("S")
    where, real = service(wired.net.vip(wired.family), 80), service(other.address(wired.family), 80)
    wired.net.director.ipvsadm("-a", "-t", where, "-r", real, wired.method)
    remove(wired)
    if not data:
        assert wired.at_client(ends, "R").seq == (synack.seq + 1) % M
        return
    wired.net.director.wait_until(lambda: not wired.net.director.connections(), "the end of the entry")
    ack(wired, ends, synack, data)
    other.wire.expect(lambda p: p.target == other.address(wired.family) and p.flags == "S", "a SYN at the other one")


# --- a port that is used again


def close(wired: Wired, ends: Ends, synack: Packet, syn: Packet) -> None:
    wired.client.send(packets.tcp(ends, "FA", seq=synack.ack, ack=synack.seq + 1))
    wired.at_server("FA")
    wired.server.send(packets.tcp(syn.ends.back, "FA", seq=7001, ack=syn.seq + 2))
    wired.at_client(ends, "FA")
    wired.client.send(packets.tcp(ends, "A", seq=synack.ack + 1, ack=synack.seq + 2))
    wired.at_server("A")
    (row,) = [c for c in wired.net.director.connections() if c.cport == ends.sport]
    assert row.state == "TIME_WAIT"


def test_a_port_is_used_again(wired: Wired) -> None:
    """A new connection in the place of one that has ended, and old segments do not make one."""
    ends, synack, syn, _ = opened(wired, FULL, options(mss(1460)))
    close(wired, ends, synack, syn)
    wired.client.send(packets.tcp(ends, "A", seq=synack.ack + 1, ack=synack.seq + 2))
    wired.at_server("A")
    again = wired.answer(ends, isn=90_000)
    assert again.seq != synack.seq
    ack(wired, ends, again, b"second")
    wired.at_server("S")
    assert (wired.counted("synproxy_conn_reused"), wired.counted("synproxy_conn_reused_timewait")) == (1, 1)


@pytest.mark.parametrize("switch", ["synproxy_conn_reuse", "synproxy_conn_reuse_time_wait"])
def test_a_port_is_not_used_again_if_so_told(wired: Wired, switch: str) -> None:
    ends, synack, syn, _ = opened(wired, FULL, options(mss(1460)))
    close(wired, ends, synack, syn)
    wired.net.director.ip_vs_sysctl(switch, 0)
    wired.client.send(packets.tcp(ends, "S", seq=90_000, option=FULL))
    assert wired.at_server("S").ends == syn.ends, "it is the server's to answer"
    assert wired.counted("synproxy_conn_reused") == 0


def test_in_which_states_a_port_is_used_again(wired: Wired) -> None:
    """Those that have a switch; after a reset from the start."""
    for state, flags, by_server, at_first in (
        ("close", "R", True, 1),
        ("fin_wait", "FA", True, 0),
        ("close_wait", "FA", False, 0),
    ):
        name = f"synproxy_conn_reuse_{state}"
        assert wired.net.director.ip_vs_sysctl(name) == str(at_first)
        for switch in (0, 1):
            wired.net.director.ip_vs_sysctl(name, switch)
            ends, synack, syn, _ = opened(wired, FULL, options(mss(1460)))
            if by_server:
                wired.server.send(packets.tcp(syn.ends.back, flags, seq=7001, ack=syn.seq + 1))
                wired.at_client(ends, flags)
            else:
                wired.client.send(packets.tcp(ends, flags, seq=synack.ack, ack=synack.seq + 1))
                wired.at_server(flags)
            (row,) = [c for c in wired.net.director.connections() if c.cport == ends.sport]
            assert row.state.lower() == state
            if not switch:
                wired.client.send(packets.tcp(ends, "S", seq=90_000, option=FULL))
                assert wired.at_server("S").ends == syn.ends, "it is the server's to answer"
                continue
            ack(wired, ends, wired.answer(ends, isn=90_000))
            wired.at_server("S")
            assert wired.counted(f"synproxy_conn_reused_{state.replace('_', '')}") == 1
    assert wired.counted("synproxy_conn_reused") == 3


@pytest.mark.parametrize("ended", [False, True])
def test_a_server_that_has_lost_the_connection(wired: Wired, ended: bool) -> None:
    """It accepts the client's next SYN, by numbers that nobody translates: the one after that begins anew."""
    ends, synack, syn, _ = opened(wired, FULL, options(mss(1460)))
    if ended:
        close(wired, ends, synack, syn)
        wired.client.send(packets.tcp(ends, "A", seq=synack.ack + 1, ack=synack.seq + 2))
        wired.at_server("A")
        wired.net.director.ip_vs_sysctl("synproxy_conn_reuse", 0)
    before = wired.counted("synproxy_syn_cnt")
    # What nobody has asked for ends nothing: a SYN-ACK to no SYN, one to another number, one of the first SYN.
    foreign = packets.tcp(syn.ends.back, "SA", seq=123, ack=90_002, option=options(mss(1460)))
    wired.server.send(foreign)
    wired.client.send(packets.tcp(ends, "S", seq=90_000, option=FULL))
    second = wired.at_server("S")
    wired.server.send(packets.tcp(syn.ends.back, "SA", seq=123, ack=second.seq + 2, option=options(mss(1460))))
    wired.server.send(packets.tcp(syn.ends.back, "SA", seq=123, ack=syn.seq + 1, option=options(mss(1460))))
    wired.server.send(packets.tcp(syn.ends.back, "SA", seq=7000, ack=syn.seq + 1, option=options(mss(1460))))
    wired.at_server("A")
    assert len(wired.net.director.connections()) == 1
    # Then what a server says that accepts it.
    wired.server.send(packets.tcp(syn.ends.back, "SA", seq=123, ack=second.seq + 1, option=options(mss(1460))))
    assert wired.at_server("R").seq == (second.seq + 1) % M
    wired.net.director.wait_until(lambda: not wired.net.director.connections(), "the end of the entry")
    assert wired.counted("synproxy_syn_cnt") == before
    ack(wired, ends, wired.answer(ends, isn=90_000))
    third = wired.at_server("S")
    wired.server.send(packets.tcp(third.ends.back, "SA", seq=9000, ack=third.seq + 1, option=options(mss(1460))))
    assert wired.at_server("A").ack == 9001


def test_a_port_is_used_again_where_nothing_is_protected_any_more(wired: Wired) -> None:
    """The old entry is in nobody's way: the server's own answer reaches the client."""
    ends, synack, syn, _ = opened(wired, FULL, options(mss(1460)))
    close(wired, ends, synack, syn)
    wired.client.send(packets.tcp(ends, "A", seq=synack.ack + 1, ack=synack.seq + 2))
    wired.at_server("A")
    assert protect(wired.net, wired.family, on=False) == "ok"
    wired.client.send(packets.tcp(ends, "S", seq=90_000, option=FULL))
    second = wired.at_server("S")
    wired.server.send(packets.tcp(second.ends.back, "SA", seq=500, ack=second.seq + 1, option=options(mss(1460))))
    assert wired.at_client(ends, "SA").seq == 500
    assert wired.counted("synproxy_conn_reused") == 0


def test_a_syn_at_a_living_connection(wired: Wired) -> None:
    """It goes to the server, whose answer tells the client, and no forger, what is the matter."""
    ends, synack, syn, _ = opened(wired, FULL, options(mss(1460)))
    before = wired.counted("synproxy_syn_cnt")
    wired.client.send(packets.tcp(ends, "S", seq=90_000, option=FULL))
    wired.at_server("S")
    assert wired.counted("synproxy_syn_cnt") == before
    wired.server.send(packets.tcp(syn.ends.back, "A", seq=7001, ack=syn.seq + 1))
    challenge = wired.at_client(ends, "A")
    assert (challenge.seq, challenge.ack) == ((synack.seq + 1) % M, synack.ack)
