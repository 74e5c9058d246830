"""Local addresses and ports of FULLNAT: which is taken, that none is taken twice, and what happens when all are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.kernel import packets
from tests.kernel.machine import Failed
from tests.kernel.packets import mss, options, timestamp
from tests.kernel.talk import USUAL, Bare, Conversation
from tests.kernel.topology import FAMILIES, FRONT, Site, service

pytestmark = [pytest.mark.build, pytest.mark.guest]


def _range(net: Site, first: int, last: int) -> None:
    """The ports that connections may have."""
    net.director.ip_vs_sysctl("fullnat_lport_max", 65535)
    net.director.ip_vs_sysctl("fullnat_lport_min", first)
    net.director.ip_vs_sysctl("fullnat_lport_max", last)


def _used(net: Site) -> list[tuple[str, int, str, int]]:
    """Local and real addresses with their ports, a row each connection."""
    return [(c.local, c.lport, c.server, c.sport) for c in net.director.connections() if c.local]


# --- none is left


@pytest.mark.parametrize("family", FAMILIES)
def test_all_local_addresses_are_tried_before_a_refusal(site: Callable[..., Site], family: int) -> None:
    net = site(servers=1)
    net.serve()
    where = net.balance(family, "-b", locals_=3)
    _range(net, 5000, 5001)
    net.clients[0].hold(net.vip(family), count=6)
    assert Counter(local for local, *_ in _used(net)) == {net.local(family, n): 2 for n in range(3)}
    assert net.director.ext_stats()["conn_sched_unreach"] == 0
    with net.clients[0].capture("eth0") as seen, pytest.raises(Failed, match="ConnectionRefusedError"):
        net.clients[0].get(net.vip(family))
    errors = seen.seen(lambda p: p.is_error)  # IPv6 may ask a second time before it believes it
    assert {error.icmp for error in errors} == {(3, 3) if family == 4 else (1, 4)}
    counters = net.director.ext_stats()
    assert counters["conn_sched_unreach"] == counters["fullnat_no_lport"] >= 1
    told = net.director.call("genl:listed", of={"address": net.vip(family), "port": 80})["locals"]
    assert {address: connections for address, (_, connections) in told.items()} == {
        net.local(family, n): 2 for n in range(3)
    }
    assert all(conflicts >= 1 for conflicts, _ in told.values()), "each was asked for a port in vain"
    assert counters["fullnat_no_laddr"] == 0
    net.lab.guest.new_messages()
    logged = [line for line in net.lab.guest.log if "IPVS" in line and "port" in line]
    assert 1 <= len(logged) <= 10, "the log says nothing, or too much"
    net.director.ipvsadm("-P", "-t", where, "-z", net.local(family, 3))
    assert net.clients[0].get(net.vip(family))[0].split()[1] == net.local(family, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flood_of_refusals_floods_no_log(site: Callable[..., Site], family: int) -> None:
    net = site(clients=0, servers=1)
    client = Bare(net)
    net.balance(family, "-b")
    syns = [packets.tcp(packets.Ends(client.address(family), 10000 + n, net.vip(family), 80), "S") for n in range(300)]
    client.send(*syns)
    net.director.wait_until(lambda: net.director.ext_stats()["fullnat_no_laddr"] == 300, "300 refusals")
    assert net.director.ext_stats()["conn_sched_unreach"] == 300
    assert net.director.connections() == []
    net.lab.guest.new_messages()
    told = [line for line in net.lab.guest.log if "IPVS" in line]
    assert 1 <= len(told) <= 30, "the log says nothing, or too much"


@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_are_refused_as_well(site: Callable[..., Site], family: int) -> None:
    net = site(servers=1)
    net.echo()
    net.balance(family, "-b", port=53, protocol="udp", locals_=1)
    _range(net, 5000, 5001)
    for sport in (4000, 4001):
        net.clients[0].ask(net.vip(family), sport=sport)
    with pytest.raises(Failed, match="ConnectionRefusedError"):
        net.clients[0].ask(net.vip(family), sport=4002)
    assert net.clients[0].ask(net.vip(family), sport=4000)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_free_port_is_found(site: Callable[..., Site], family: int) -> None:
    """Also the last one of many; then a refusal, and no port is lost by it."""
    net = site(servers=1)
    net.balance(family, "-b", port=53, protocol="udp", locals_=1)
    net.director.ipvsadm("--set", "900", "120", "300")
    _range(net, 6000, 6999)
    tally = net.servers[0].start_call(
        "servers:udp_tally", address=net.server(family), port=53, wanted=1000, patience=3 * net.lab.guest.scale
    )
    net.servers[0].wait_for_port(53, "udp")
    refused = net.clients[0].call(
        "servers:udp_storm", address=net.vip(family), port=53, name="a", count=1001, seconds=60
    )
    seen = tally.wait(60).result
    assert len(seen) == 1000
    assert {int(peer.split()[1]) for peer in seen} == set(range(6000, 7000))
    assert refused == 1
    assert net.director.ext_stats()["fullnat_no_lport"] >= 1


# --- none is taken twice


@pytest.mark.parametrize("family", FAMILIES)
def test_a_port_serves_every_real_server(site: Callable[..., Site], family: int) -> None:
    """One tuple is (local address, port, real server, its port): the same port may go to each."""
    net = site(servers=2)
    for port in (80, 81):
        net.serve(port=port)
        net.balance(family, "-b", port=port, locals_=1)
    _range(net, 5000, 5000)
    for port in (80, 81):
        net.clients[0].hold(net.vip(family), port=port, count=2)
    used = _used(net)
    assert len(set(used)) == len(used) == 4
    assert {lport for _, lport, _, _ in used} == {5000}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_services_share_a_local_address_and_a_server(site: Callable[..., Site], family: int) -> None:
    """They must not both give the same port away: the real server would see one tuple twice."""
    net = site(servers=1)
    net.serve()
    net.balance(family, "-b", locals_=1)
    net.balance(family, "-b", port=8000, to=80, locals_=1)
    _range(net, 5000, 5001)
    net.clients[0].hold(net.vip(family))
    net.clients[0].hold(net.vip(family), port=8000)
    used = _used(net)
    assert len(set(used)) == len(used) == 2
    for port in (80, 8000):
        with pytest.raises(Failed, match="ConnectionRefusedError"):
            net.clients[0].get(net.vip(family), port=port)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_address_that_is_added_again_knows_its_ports(site: Callable[..., Site], family: int) -> None:
    """Deleted with a live connection, which goes on; what it uses stays taken."""
    net = site(servers=1)
    net.echo()
    where = net.balance(family, "-b", port=53, protocol="udp", locals_=1)
    _range(net, 5000, 5000)
    client = net.clients[0]
    before = client.ask(net.vip(family), sport=4000)
    net.director.ipvsadm("-Q", "-u", where, "-z", net.local(family))
    assert net.local(family) not in net.director.ipvsadm("-G", "-n").out
    assert client.ask(net.vip(family), sport=4000) == before
    with pytest.raises(Failed, match="ConnectionRefusedError"):
        client.ask(net.vip(family), sport=4001)
    assert net.director.ext_stats()["fullnat_no_laddr"] >= 1
    net.director.ipvsadm("-P", "-u", where, "-z", net.local(family))
    with pytest.raises(Failed, match="ConnectionRefusedError"):
        client.ask(net.vip(family), sport=4002)
    assert client.ask(net.vip(family), sport=4000) == before
    _range(net, 5000, 5001)
    assert client.ask(net.vip(family), sport=4003).split()[2] == "5001"


@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_from_two_processors_never_share_a_tuple(site: Callable[..., Site], family: int) -> None:
    """Exactly as many ports as connections, asked for from both sides at once: all get one, each its own."""
    net = site(clients=2, servers=1)
    net.balance(family, "-b", port=53, protocol="udp", locals_=2)
    each = 1000
    _range(net, 6000, 6000 + each - 1)
    tally = net.servers[0].start_call(
        "servers:udp_tally", address=net.server(family), port=53, wanted=2 * each, patience=5 * net.lab.guest.scale
    )
    net.servers[0].wait_for_port(53, "udp")
    storms = [
        client.start_call("servers:udp_storm", address=net.vip(family), port=53, name=client.name, count=each)
        for client in net.clients
    ]
    assert [storm.wait(60).result for storm in storms] == [0, 0]
    seen = tally.wait(60).result
    shared = {peer: texts for peer, texts in seen.items() if len(texts) > 1}
    assert not shared
    assert len(seen) == 2 * each
    used = _used(net)
    assert len(set(used)) == len(used) == 2 * each


@pytest.mark.parametrize("family", FAMILIES)
def test_connections_from_two_processors_never_share_a_tuple(site: Callable[..., Site], family: int) -> None:
    """As the real server sees them: each peer once, all open at the same time, each with its own bytes."""
    net = site(clients=2, servers=1)
    net.balance(family, "-b", locals_=2)
    each = 300
    _range(net, 6000, 6000 + each - 1)
    patience = 20.0 * net.lab.guest.scale
    net.servers[0].sysctl("net.core.somaxconn", 4096)
    tally = net.servers[0].start_call(
        "servers:tcp_tally", address=net.server(family), port=80, wanted=2 * each, patience=patience
    )
    net.servers[0].wait_for_port(80)
    storms = [
        client.start_call("servers:tcp_storm", address=net.vip(family), port=80, name=client.name, count=each,
                          patience=patience)
        for client in net.clients
    ]  # fmt: skip
    assert [storm.wait(60).result for storm in storms] == [each, each]
    seen = tally.wait(60).result
    assert len({peer for peer, _ in seen}) == len({line for _, line in seen}) == 2 * each


# --- which one is taken


@pytest.mark.parametrize("family", FAMILIES)
def test_the_choice_is_not_in_step_with_the_scheduler(site: Callable[..., Site], family: int) -> None:
    """Two servers by turns and two local addresses: each server sees both."""
    net = site(servers=2)
    net.echo()
    net.balance(family, "-b", port=53, protocol="udp", locals_=2)
    pairs = Counter(tuple(net.clients[0].ask(net.vip(family)).split()[:2]) for _ in range(40))
    assert len(pairs) == 4, pairs
    assert min(pairs.values()) >= 2, pairs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_port_rests_before_it_is_used_again(site: Callable[..., Site], family: int) -> None:
    """A real server may hold the closed connection in TIME_WAIT: ports are taken in turn, not the first free one."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", locals_=1, servers=[server.address(family)])
    net.director.ipvsadm("--set", "900", "1", "300")
    _range(net, 7000, 7009)
    open_ = Conversation(client, server, family)
    open_.open()  # one that stays
    ports: list[int] = []
    for _ in range(12):
        talk = Conversation(client, server, family)
        talk.open()
        ports.append(talk.inside.sport)
        talk.to_client("FA", seq=talk.there.seq, ack=talk.there.ack)
        if len(ports) % 4 == 0:
            net.director.wait_until(lambda: len(net.director.connections()) == 1, "the end of the closed ones")
    assert open_.inside.sport not in ports
    for at, port in enumerate(ports):
        assert port not in ports[max(0, at - 8) : at], ports


@pytest.mark.parametrize("family", FAMILIES)
def test_a_range_that_was_full_is_searched_again(site: Callable[..., Site], family: int) -> None:
    """Also while there are more connections of the range before than the new one has ports."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", locals_=1, servers=[server.address(family)])
    net.director.ipvsadm("--set", "900", "1", "300")
    _range(net, 5000, 5004)
    for _ in range(5):
        Conversation(client, server, family).open()
    _range(net, 6000, 6001)
    talk, other, late = (Conversation(client, server, family) for _ in range(3))
    talk.open()
    other.open()
    late.say("S", seq=1, option=USUAL)
    assert client.wire.expect(lambda p: p.is_error, "a refusal").quoted.ends == late.outside
    talk.to_client("FA", seq=talk.there.seq, ack=talk.there.ack)
    net.director.wait_until(lambda: len(net.director.connections()) == 6, "the end of the closed one")
    late.open()
    assert late.inside.sport == talk.inside.sport


# --- a real server that remembers


@pytest.fixture
def memory(site: Callable[..., Site]) -> Iterator[Callable[[int], Site]]:
    """A real server with nginx, which closes first and so holds TIME_WAIT; one local port for everybody."""

    def made(family: int) -> Site:
        net = site(clients=2, servers=1)
        net.serve()
        net.balance(family, "-b", locals_=1)
        _range(net, 5000, 5000)
        net.director.ip_vs_sysctl("expire_nodest_conn", 1)
        return net

    yield made


def _forget(net: Site, family: int) -> None:
    """Let the director forget its connections at once; the real server does not."""
    where, real = service(net.vip(family), 80), service(net.server(family), 80)
    net.director.ipvsadm("-d", "-t", where, "-r", real)
    net.director.wait_until(lambda: not net.director.connections(), "an empty table")
    net.director.ipvsadm("-a", "-t", where, "-r", real, "-b")


def _waits(net: Site) -> int:
    return len(net.servers[0].run("ss", "-Htn", "state", "time-wait").out.splitlines())


@pytest.mark.parametrize("remove", [0, 1], ids=["translated", "removed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_syn_is_lost_in_time_wait(memory: Callable[[int], Site], family: int, remove: int) -> None:
    """Clients with unrelated clocks, one local address, one port: each SYN must be newer than what the server holds."""
    net = memory(family)
    net.director.ip_vs_sysctl("fullnat_timestamp_remove_entry", remove)
    for number in range(6):
        with net.servers[0].capture("eth0") as seen:
            net.clients[number % 2].get(net.vip(family))
        assert len(seen.tcp("S", dport=80)) == 1, f"connection {number}: the SYN had to be repeated\n{seen}"
        assert _waits(net) == 1, "the server holds nothing: the test proves nothing"
        assert bool(seen.tcp("S", dport=80)[0].timestamps) == (not remove)
        _forget(net, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_syn_is_lost_in_time_wait_whatever_the_clocks(memory: Callable[[int], Site], family: int) -> None:
    """As above, with clocks and numbers that go back as far as they can."""
    net = memory(family)
    client = Bare(net)
    for isn, ticks in ((3_000_000_000, 4_000_000_000), (5, 1), (4_294_967_295, 2_147_483_647), (0, 0), (1 << 31, 7)):
        ends = packets.Ends(client.address(family), 20000 + ticks % 1000, net.vip(family), 80)
        stamps = options(mss(1460), timestamp(ticks, 0))
        client.send(packets.tcp(ends, "S", seq=isn, option=stamps))
        answer = client.wire.expect(
            lambda p, e=ends: p.protocol == packets.TCP and p.ends == e.back,  # type: ignore[misc]
            f"the answer to the SYN with {isn} and {ticks}",
        )
        assert answer.flags == "SA", f"{answer}: the server took the SYN for an old segment"
        assert answer.ack == (isn + 1) % (1 << 32)
        assert answer.timestamps and answer.timestamps[1] == ticks
        echo = answer.timestamps[0]
        request = b"GET / HTTP/1.0\r\n\r\n"
        here = {"seq": isn + 1, "ack": answer.seq + 1, "option": options(timestamp(ticks + 5, echo))}
        client.send(packets.tcp(ends, "PA", data=request, **here))  # type: ignore[arg-type]
        fin = client.wire.expect(
            lambda p, e=ends: p.protocol == packets.TCP and p.ends == e.back and "F" in p.flags,  # type: ignore[misc]
            "the server's FIN",
        )
        end = fin.seq + len(fin.payload) + 1
        done = {"seq": isn + 1 + len(request), "ack": end, "option": options(timestamp(ticks + 9, echo))}
        client.send(packets.tcp(ends, "FA", **done))  # type: ignore[arg-type]
        net.director.wait_until(lambda: _waits(net) == 1, "the server in TIME_WAIT")
        _forget(net, family)
    assert client.address(family).startswith(FRONT[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_connections_port_is_not_free_yet(site: Callable[..., Site], family: int) -> None:
    """While the director itself remembers the end of a connection, its tuple is not given to another client."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", locals_=1, servers=[server.address(family)])
    _range(net, 5000, 5000)
    talk = Conversation(client, server, family)
    talk.open()
    talk.close()
    other = Conversation(client, server, family)
    other.say("S", seq=1, option=USUAL)
    refused = client.wire.expect(lambda p: p.is_error, "a refusal")
    assert refused.quoted.ends == other.outside
