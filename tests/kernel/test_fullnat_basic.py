"""FULLNAT between real programs: who sees whom, what the tables say, how a server is chosen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.kernel.machine import Failed
from tests.kernel.topology import FAMILIES, HOST, Connection, Site, service, url

pytestmark = [pytest.mark.build, pytest.mark.guest]
BULK = 400_000  # bytes


@pytest.fixture
def make(site: Callable[..., Site]) -> Iterator[Callable[..., Site]]:
    """A topology whose real servers know no way to the clients, and the other way round."""

    def made(**plan: int) -> Site:
        net = site(**plan)
        for member in (*net.clients, *net.servers):
            assert "default" not in member.run("ip", "route").out
        return net

    yield made


def _names(answers: list[str]) -> Counter[str]:
    return Counter(answer.split()[0] for answer in answers)


def _rows(net: Site, protocol: str = "TCP") -> list[Connection]:
    """The connections that are no templates."""
    return [c for c in net.director.connections() if c.protocol == protocol and c.cport]


# --- the way of a packet


@pytest.mark.parametrize("to", [80, 8080], ids=["same-port", "other-port"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tcp(make: Callable[..., Site], family: int, to: int) -> None:
    net = make()
    net.serve(port=to, size=BULK)
    net.balance(family, "-b", to=to, locals_=2)
    client = net.clients[0]
    with net.director.capture("front") as front, net.director.capture("back") as back:
        answers = client.get(net.vip(family), count=6)
        assert _names(answers) == {"server0": 3, "server1": 3}
        assert {answer.split()[1] for answer in answers} <= {net.local(family), net.local(family, 1)}
        assert all(5000 <= int(answer.split()[2]) <= 65535 for answer in answers)
        assert client.curl(url(net.vip(family))).out.split()[1] in (net.local(family), net.local(family, 1))
        (bulk,) = client.get(net.vip(family), "/bulk")
        uploaded = client.run(
            "curl", "-sS", "-g", "--data-binary", "@-", url(net.vip(family)), stdin="x" * BULK, seconds=10
        )
        assert uploaded.out.split()[1] in (net.local(family), net.local(family, 1))
    assert bulk == "".join(f"{n:015d}\n" for n in range(0, BULK, 16))
    front.must_be_sound()
    back.must_be_sound()
    for packet in front.tcp():
        assert {packet.source, packet.target} == {net.client(family), net.vip(family)}
        assert 80 in (packet.sport, packet.dport)
    ours, theirs = {net.local(family), net.local(family, 1)}, {net.server(family), net.server(family, 1)}
    for packet in back.tcp():
        ends = (packet.source, packet.target) if packet.dport == to else (packet.target, packet.source)
        assert ends[0] in ours, packet
        assert ends[1] in theirs, packet


@pytest.mark.parametrize("to", [53, 5353], ids=["same-port", "other-port"])
@pytest.mark.parametrize("family", FAMILIES)
def test_udp(make: Callable[..., Site], family: int, to: int) -> None:
    net = make()
    net.echo(port=to)
    net.balance(family, "-b", port=53, to=to, protocol="udp", locals_=2)
    client = net.clients[0]
    with net.director.capture("front") as front, net.director.capture("back") as back:
        answers = [client.ask(net.vip(family), text=f"number {n}") for n in range(6)]
        big = client.ask(net.vip(family), text="x" * 5000)  # several fragments on the way
    assert _names(answers) == {"server0": 3, "server1": 3}
    assert [answer.split(" ", 3)[3] for answer in answers] == [f"number {n}" for n in range(6)]
    assert {answer.split()[1] for answer in answers} <= {net.local(family), net.local(family, 1)}
    assert big.endswith(" " + "x" * 5000)
    front.must_be_sound()
    back.must_be_sound()
    assert all(row.local and row.lport for row in _rows(net, "UDP"))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_client_port_stays_with_its_server(make: Callable[..., Site], family: int) -> None:
    """A datagram of the same client port belongs to the same connection, and comes from the same local port."""
    net = make()
    net.echo()
    net.balance(family, "-b", port=53, protocol="udp", locals_=2)
    answers = {net.clients[0].ask(net.vip(family), sport=4000) for _ in range(4)}
    assert len(answers) == 1
    assert len(_rows(net, "UDP")) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_director_as_its_own_client(make: Callable[..., Site], family: int) -> None:
    net = make()
    net.serve()
    net.balance(family, "-b", locals_=1)
    answers = net.director.get(net.vip(family), count=2)
    assert _names(answers) == {"server0": 1, "server1": 1}
    assert {answer.split()[1] for answer in answers} == {net.local(family)}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_forwarding(make: Callable[..., Site], family: int) -> None:
    """What comes back is for the director itself, so it need not be a router."""
    net = make()
    net.serve()
    net.director.sysctl("net.ipv4.ip_forward", 0)
    net.director.sysctl("net.ipv6.conf.all.forwarding", 0)
    net.balance(family, "-b", locals_=1)
    assert _names(net.clients[0].get(net.vip(family), count=2)) == {"server0": 1, "server1": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_address_that_is_only_routed_here(make: Callable[..., Site], family: int) -> None:
    """No device of the director has it: what is for it passes through, and is caught on its way."""
    net = make()
    net.serve()
    address = {4: "10.0.9.9", 6: "fd00:9::9"}[family]
    back = net.director_address(family, back=True)
    for server in net.servers:
        server.ip(f"route add {address}/{HOST[family]} via {back}")
    where = net.balance(family, "-b")
    net.director.ipvsadm("-P", "-t", where, "-z", address)
    net.director.ip(f"route add default via {net.client(family)}")  # else it has no way at all for such packets
    answers = net.clients[0].get(net.vip(family), count=2)
    assert {answer.split()[1] for answer in answers} == {address}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_local_address_serves_several_services(make: Callable[..., Site], family: int) -> None:
    net = make()
    net.serve()
    net.serve(port=81)
    net.echo(port=80)
    net.balance(family, "-b", locals_=1)
    net.balance(family, "-b", port=81, locals_=1)
    net.balance(family, "-b", port=80, protocol="udp", locals_=1)
    client = net.clients[0]
    for _ in range(2):
        for answer in (*client.get(net.vip(family)), *client.get(net.vip(family), port=81)):
            assert answer.split()[1] == net.local(family)
        assert client.ask(net.vip(family), port=80).split()[1] == net.local(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_refusals_come_back(make: Callable[..., Site], family: int) -> None:
    net = make(servers=1)
    net.balance(family, "-b", locals_=1)
    net.balance(family, "-b", port=53, protocol="udp", locals_=1)
    with net.clients[0].capture("eth0") as seen:
        with pytest.raises(Failed, match="ConnectionRefusedError"):
            net.clients[0].get(net.vip(family))
        with pytest.raises(Failed, match="ConnectionRefusedError"):
            net.clients[0].ask(net.vip(family))
    seen.must_be_sound()
    assert seen.tcp("R", source=net.vip(family))
    (error,) = seen.seen(lambda p: p.is_error)
    assert (error.quoted.source, error.quoted.target) == (net.client(family), net.vip(family))
    assert error.quoted.dport == 53


# --- what one sees of it


@pytest.mark.parametrize("family", FAMILIES)
def test_the_connection_table(make: Callable[..., Site], family: int) -> None:
    net = make(servers=1)
    net.serve(port=8080)
    net.balance(family, "-b", to=8080, locals_=1)
    net.clients[0].hold(net.vip(family), sport=4000)
    text = net.director.read("/proc/net/ip_vs_conn")
    assert text.splitlines()[0].split()[-2:] == ["LocalIP", "LPrt"]
    (row,) = _rows(net)
    assert (row.client, row.cport, row.vip, row.vport) == (net.client(family), 4000, net.vip(family), 80)
    assert (row.server, row.sport, row.state) == (net.server(family), 8080, "ESTABLISHED")
    assert (row.local, row.lport) == (net.local(family), row.lport)
    assert row.line.split()[9:11] == ["-", "-"]
    seen = net.servers[0].run("ss", "-Htn", "state", "established").out.split()
    assert service(row.local, row.lport) in seen
    listed = net.director.ipvsadm("-L", "-c", "-n").out.splitlines()[-1]
    for address, port in (
        (row.client, 4000), (row.vip, 80), (row.server, 8080), (row.local, row.lport),
    ):  # fmt: skip
        assert service(address, port) in listed


@pytest.mark.parametrize("family", FAMILIES)
def test_other_methods_have_no_local_address(site: Callable[..., Site], family: int) -> None:
    net = site(gateway=True)
    net.serve()
    net.balance(family, "-m")
    net.clients[0].hold(net.vip(family))
    (row,) = _rows(net)
    assert row.local == ""
    assert len(row.line.split()) == 9


@pytest.mark.parametrize("family", FAMILIES)
def test_listings_and_counters(make: Callable[..., Site], family: int) -> None:
    net = make()
    net.serve()
    where = net.balance(family, "-b", locals_=2)
    net.clients[0].hold(net.vip(family), count=6)
    assert {row[0] for row in net.director.destinations().values()} == {"FullNat"}
    listing = net.director.ipvsadm("-L", "-n").out
    assert re.findall(r"FullNat\s+1\s+3\s+0", listing) and listing.count("FullNat") == 2
    table = net.director.ipvsadm("-G", "-n", "-t", where).out
    assert re.search(rf"^TCP +{re.escape(where)} +2$|{re.escape(where)} +2$", table, re.M), table
    counts = [int(line.split()[2]) for line in table.splitlines() if net.local(family, 0)[:-3] in line.split()[:1][0]]
    assert sum(counts) == 6, table

    def counted() -> bool:
        """The estimator adds up the processors' counters every other second."""
        lines = net.director.ipvsadm("-L", "-n", "--stats", "--exact").out.splitlines()
        return next(line for line in lines if where in line).split()[2:5] == ["6", "12", "6"]

    net.director.wait_until(counted, "6 connections, 12 packets in, 6 out")


# --- choosing a server


@pytest.mark.parametrize("family", FAMILIES)
def test_persistence(make: Callable[..., Site], family: int) -> None:
    net = make(clients=2)
    net.serve()
    net.balance(family, "-b", options=("-p", "60"), locals_=2)
    first = _names(net.clients[0].get(net.vip(family), count=4))
    second = _names(net.clients[1].get(net.vip(family), count=4))
    assert [sum(first.values()), sum(second.values())] == [4, 4]
    assert len(first) == len(second) == 1
    assert set(first) != set(second), "round robin chose one server twice"
    templates = [c for c in net.director.connections() if c.cport == 0]
    assert {c.client for c in templates} == {net.client(family, n) for n in range(2)}
    assert {c.local for c in templates} == {""}


@pytest.mark.parametrize("persistent", [False, True], ids=["", "persistent"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_firewall_mark(make: Callable[..., Site], family: int, persistent: bool) -> None:
    """Two ports that belong together, each to that port of a real server; with persistence both to one server."""
    net = make()
    for port in (80, 81):
        net.serve(port=port)
    net.director.nft(f"""
        table inet marks {{
        chain pre {{
        type filter hook prerouting priority mangle;
        {"ip" if family == 4 else "ip6"} daddr {net.vip(family)} tcp dport 80-81 meta mark set 7;
        }}
        }}""")
    six = ["-6"] if family == 6 else []
    net.director.ipvsadm("-A", "-f", "7", *six, "-s", "rr", *(["-p", "60"] if persistent else []))
    net.director.ipvsadm("-P", "-f", "7", *six, "-z", net.local(family))
    for number in range(2):
        net.director.ipvsadm("-a", "-f", "7", *six, "-r", service(net.server(family, number), 0), "-b")
    answers = [net.clients[0].get(net.vip(family), port=port)[0] for port in (80, 80, 81, 81)]
    assert sorted(_names(answers).values()) == ([4] if persistent else [2, 2])
    assert {answer.split()[1] for answer in answers} == {net.local(family)}
    assert {row.sport for row in _rows(net)} == {80, 81}


@pytest.mark.parametrize("scheduler", ["sh", "mh"])
@pytest.mark.parametrize("family", FAMILIES)
def test_source_hashing(make: Callable[..., Site], family: int, scheduler: str) -> None:
    """By the client's address, which is still known here; with the port in the hash one client sees all servers."""
    net = make(clients=2)
    net.serve()
    where = net.balance(family, "-b", scheduler=scheduler, locals_=2)
    for client in net.clients:
        assert len(_names(client.get(net.vip(family), count=4))) == 1
    net.director.ipvsadm("-E", "-t", where, "-s", scheduler, "-b", f"{scheduler}-port")
    assert len(_names(net.clients[0].get(net.vip(family), count=16))) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds(make: Callable[..., Site], family: int) -> None:
    """A server that has as many connections as it may have gets no more, and counts them right."""
    net = make()
    net.serve()
    where = net.balance(family, "-b", scheduler="wrr", locals_=1)
    for number in range(2):
        net.director.ipvsadm(
            "-e", "-t", where, "-r", service(net.server(family, number), 80), "-b", "-x", "3", "-y", "1"
        )
    net.clients[0].hold(net.vip(family), count=6)
    assert {(row[2], row[3]) for row in net.director.destinations().values()} == {(3, 0)}
    with pytest.raises(Failed, match=r"ConnectionRefusedError|TimeoutError"):
        net.clients[0].get(net.vip(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lower_threshold(make: Callable[..., Site], family: int) -> None:
    """A full server is chosen again when enough of its connections have gone: each counts once, up and down."""
    net = make(servers=1)
    net.echo()
    where = net.balance(family, "-b", port=53, protocol="udp", locals_=1)
    net.director.ipvsadm("-e", "-u", where, "-r", service(net.server(family), 53), "-b", "-x", "3", "-y", "2")
    client = net.clients[0]
    for sport in (4000, 4001, 4002):
        client.ask(net.vip(family), sport=sport)
    with pytest.raises(Failed, match=r"ConnectionRefusedError|TimeoutError"):
        client.ask(net.vip(family), sport=4003)
    net.director.ipvsadm("--set", "0", "0", "1")
    for sport in (4000, 4001, 4002):  # the time-out is a connection's with its next packet
        client.ask(net.vip(family), sport=sport)
    net.director.wait_until(lambda: not net.director.connections(), "the end of the connections")
    net.director.ipvsadm("--set", "0", "0", "300")
    for sport in (4000, 4001, 4002):
        client.ask(net.vip(family), sport=sport)
    assert sum(row[2] + row[3] for row in net.director.destinations().values()) == 3
    with pytest.raises(Failed, match=r"ConnectionRefusedError|TimeoutError"):
        client.ask(net.vip(family), sport=4003)


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_0_is_quiescent(make: Callable[..., Site], family: int) -> None:
    net = make()
    net.echo()
    where = net.balance(family, "-b", port=53, protocol="udp", locals_=1)
    client = net.clients[0]
    before = {port: client.ask(net.vip(family), sport=port).split()[0] for port in (4000, 4001)}
    assert set(before.values()) == {"server0", "server1"}
    net.director.ipvsadm("-e", "-u", where, "-r", service(net.server(family), 53), "-b", "-w", "0")
    assert _names([client.ask(net.vip(family)) for _ in range(4)]) == {"server1": 4}
    for port, name in before.items():
        assert client.ask(net.vip(family), sport=port).split()[0] == name


@pytest.mark.parametrize("family", FAMILIES)
def test_expire_quiescent_template(make: Callable[..., Site], family: int) -> None:
    """With weight 0 and this sysctl a persistent client moves to another server."""
    net = make()
    net.serve()
    where = net.balance(family, "-b", options=("-p", "60"), locals_=1)
    net.director.ip_vs_sysctl("expire_quiescent_template", 1)
    (first,) = _names(net.clients[0].get(net.vip(family), count=2))
    server = service(net.server(family, int(first[-1])), 80)
    net.director.ipvsadm("-e", "-t", where, "-r", server, "-b", "-w", "0")
    (second,) = _names(net.clients[0].get(net.vip(family), count=2))
    assert second != first


@pytest.mark.parametrize("method", ["-b", "-g"], ids=["fullnat", "on-the-director"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sorry_server(make: Callable[..., Site], family: int, method: str) -> None:
    """All servers gone, another takes their place as keepalived does it: behind FULLNAT as well, or on the director."""
    net = make(servers=3)
    net.serve()
    where = net.balance(family, "-b", locals_=1, servers=[net.server(family, n) for n in range(2)])
    client = net.clients[0]
    client.hold(net.vip(family), sport=4000)
    for number in range(2):
        net.director.ipvsadm("-d", "-t", where, "-r", service(net.server(family, number), 80))
    with pytest.raises(Failed, match="ConnectionRefusedError"):
        client.get(net.vip(family))
    if method == "-b":
        sorry, name = net.server(family, 2), "server2"
    else:
        net.director.serve()
        sorry, name = "127.0.0.1" if family == 4 else "::1", "director"
    net.director.ipvsadm("-a", "-t", where, "-r", service(sorry, 80), method)
    answers = client.get(net.vip(family), count=2)
    assert _names(answers) == {name: 2}
    assert {answer.split()[1] for answer in answers} == {net.local(family) if method == "-b" else net.client(family)}
    net.director.ipvsadm("-d", "-t", where, "-r", service(sorry, 80))
    net.director.ipvsadm("-a", "-t", where, "-r", service(net.server(family), 80), "-b")
    assert _names(client.get(net.vip(family), count=2)) == {"server0": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_methods_in_one_service(make: Callable[..., Site], family: int) -> None:
    net = make()
    net.serve()
    where = net.balance(family, "-b", locals_=1)
    second = service(net.server(family, 1), 80)
    net.servers[1].ip(f"route add default via {net.director_address(family, back=True)}")
    net.director.ipvsadm("-e", "-t", where, "-r", second, "-m")
    answers = {a.split()[0]: a.split()[1] for a in net.clients[0].get(net.vip(family), count=4)}
    assert answers == {"server0": net.local(family), "server1": net.client(family)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_methods_of_live_connections_do_not_change(make: Callable[..., Site], family: int) -> None:
    net = make(servers=1)
    net.servers[0].ip(f"route add default via {net.director_address(family, back=True)}")
    net.echo()
    where = net.balance(family, "-b", port=53, protocol="udp", locals_=1)
    client = net.clients[0]
    before = client.ask(net.vip(family), sport=4000)
    net.director.ipvsadm("-e", "-u", where, "-r", service(net.server(family), 53), "-m")
    assert client.ask(net.vip(family), sport=4001).split()[1] == net.client(family)
    assert client.ask(net.vip(family), sport=4000) == before
