"""What IPVS did before our patches, it does after them: NAT, direct routing and tunnels, on both kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from tests.kernel.lab import Namespace, selftest
from tests.kernel.machine import Failed, Guest, unload
from tests.kernel.topology import FAMILIES, FRONT, Site, network, service, url

pytestmark = [pytest.mark.build, pytest.mark.guest]
STOCK = True
BULK = 400_000  # bytes: some segments are joined on the way, some are not


def _names(answers: list[str]) -> Counter[str]:
    return Counter(answer.split()[0] for answer in answers)


def _take_vip(site: Site, server: Namespace) -> None:
    """What a real server needs for direct routing: the address without telling anybody, and a way to the clients."""
    server.sysctl("net.ipv4.conf.all.arp_ignore", 1)
    server.sysctl("net.ipv4.conf.all.arp_announce", 2)
    server.ip(
        *(f"addr add {site.vip(f)} dev lo" for f in FAMILIES),
        *(f"route add {network(FRONT[f])} dev eth0" for f in FAMILIES),
    )


def _take_tunnel(server: Namespace, number: int, site: Site) -> None:
    """What it needs for a tunnel as well: the device that opens packets."""
    server.ip(
        f"link add tun4 type ipip local {site.server(4, number)}",
        f"link add tun6 type ip6tnl mode ip6ip6 local {site.server(6, number)} remote ::",
        "link set tun4 up",
        "link set tun6 up",
    )


# --- NAT


@pytest.mark.parametrize("to", [80, 8080], ids=["same-port", "other-port"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nat_tcp(site: Callable[..., Site], family: int, to: int) -> None:
    net = site(gateway=True)
    net.serve(port=to, size=BULK)
    net.balance(family, "-m", to=to)
    client = net.clients[0]
    with net.director.capture("front") as front, net.director.capture("back") as back:
        assert _names(client.get(net.vip(family), count=4)) == {"server0": 2, "server1": 2}
        answer = client.curl(url(net.vip(family))).out.split()
        assert answer[1] == net.client(family)
        (bulk,) = client.get(net.vip(family), "/bulk")
    assert bulk == "".join(f"{n:015d}\n" for n in range(0, BULK, 16))
    front.must_be_sound()
    back.must_be_sound()
    assert back.tcp("S", dport=to, source=net.client(family))
    assert not front.tcp(source=net.server(family))
    states = {c.state for c in net.director.connections()}
    assert states <= {"TIME_WAIT", "FIN_WAIT", "CLOSE"}


@pytest.mark.parametrize("to", [53, 5353], ids=["same-port", "other-port"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nat_udp(site: Callable[..., Site], family: int, to: int) -> None:
    net = site(gateway=True)
    net.echo(port=to)
    net.balance(family, "-m", port=53, to=to, protocol="udp")
    client = net.clients[0]
    with net.director.capture("front") as front, net.director.capture("back") as back:
        answers = [client.ask(net.vip(family), text=f"number {n}") for n in range(4)]
    assert _names(answers) == {"server0": 2, "server1": 2}
    assert [answer.split(" ", 3)[3] for answer in answers] == [f"number {n}" for n in range(4)]
    assert {answer.split()[1] for answer in answers} == {net.client(family)}
    front.must_be_sound()
    back.must_be_sound()


@pytest.mark.parametrize("family", FAMILIES)
def test_nat_refusals_come_back(site: Callable[..., Site], family: int) -> None:
    """A port where nobody listens: the reset and the ICMP error both carry the virtual address."""
    net = site(gateway=True, servers=1)
    net.balance(family, "-m")
    net.balance(family, "-m", port=53, protocol="udp")
    with net.clients[0].capture("eth0") as seen:
        with pytest.raises(Failed, match="ConnectionRefusedError"):
            net.clients[0].get(net.vip(family))
        with pytest.raises(Failed, match="ConnectionRefusedError"):
            net.clients[0].ask(net.vip(family))
    seen.must_be_sound()
    assert seen.tcp("R", source=net.vip(family))
    (error,) = seen.seen(lambda p: p.is_error)
    assert error.quoted.ends.target == net.vip(family)
    assert error.quoted.dport == 53


# --- the other methods


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["-g", "-i"], ids=["direct", "tunnel"])
def test_direct_and_tunnel(site: Callable[..., Site], family: int, method: str) -> None:
    net = site(arms=1)
    for number, server in enumerate(net.servers):
        _take_vip(net, server)
        if method == "-i":
            _take_tunnel(server, number, net)
    net.serve(size=BULK)
    for server in net.servers:
        server.echo(addresses=[net.vip(f) for f in FAMILIES])
    net.balance(family, method)
    net.balance(family, method, port=53, protocol="udp")
    client = net.clients[0]
    with client.capture("eth0") as seen:
        answers = client.get(net.vip(family), count=4)
        assert _names(answers) == {"server0": 2, "server1": 2}
        assert {answer.split()[1] for answer in answers} == {net.client(family)}
        assert len(client.get(net.vip(family), "/bulk")[0]) == BULK
        assert _names([client.ask(net.vip(family)) for _ in range(4)]) == {"server0": 2, "server1": 2}
    seen.must_be_sound()
    assert {packet.source for packet in seen.tcp("SA")} == {net.vip(family)}


# --- choosing a server


@pytest.mark.parametrize("family", FAMILIES)
def test_persistence(site: Callable[..., Site], family: int) -> None:
    net = site(gateway=True, clients=2)
    net.serve()
    net.balance(family, "-m", options=("-p", "60"))
    first = _names(net.clients[0].get(net.vip(family), count=4))
    second = _names(net.clients[1].get(net.vip(family), count=4))
    assert [sum(first.values()), sum(second.values())] == [4, 4]
    assert set(first) != set(second), "round robin chose one server twice"
    assert len(first) == len(second) == 1, "a client changed its server"
    templates = [c for c in net.director.connections() if c.cport == 0]
    assert {c.client for c in templates} == {net.client(family, n) for n in range(2)}


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_0_is_quiescent(site: Callable[..., Site], family: int) -> None:
    """No new connection, and the old ones go on."""
    net = site(gateway=True)
    net.echo()
    where = net.balance(family, "-m", port=53, protocol="udp")
    client = net.clients[0]
    before = {port: client.ask(net.vip(family), sport=port).split()[0] for port in (4000, 4001)}
    assert set(before.values()) == {"server0", "server1"}
    net.director.ipvsadm("-e", "-u", where, "-r", service(net.server(family), 53), "-m", "-w", "0")
    assert _names([client.ask(net.vip(family)) for _ in range(4)]) == {"server1": 4}
    for port, name in before.items():
        assert client.ask(net.vip(family), sport=port).split()[0] == name
    net.director.ipvsadm("-e", "-u", where, "-r", service(net.server(family, 1), 53), "-m", "-w", "0")
    with pytest.raises(Failed, match="ConnectionRefusedError"):
        client.ask(net.vip(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_firewall_mark_is_a_service(site: Callable[..., Site], family: int) -> None:
    net = site(gateway=True)
    net.serve()
    net.serve(port=81)
    net.director.nft(f"""
        table inet marks {{ chain pre {{ type filter hook prerouting priority mangle;
        {"ip" if family == 4 else "ip6"} daddr {net.vip(family)} tcp dport 80-81 meta mark set 7;
        }}
        }}""")
    six = ["-6"] if family == 6 else []
    net.director.ipvsadm("-A", "-f", "7", *six, "-s", "rr")
    for number in range(2):
        net.director.ipvsadm("-a", "-f", "7", *six, "-r", service(net.server(family, number), 0), "-m")
    answers = [net.clients[0].get(net.vip(family), port=port)[0] for port in (80, 81, 80, 81)]
    assert _names(answers) == {"server0": 2, "server1": 2}


# --- the kernel's own test, and ends


def test_the_kernels_own_selftest(guest: Guest) -> None:
    sysctl = "/proc/sys/net/core/fb_tunnels_only_for_init_net"
    before = guest.read(sysctl)
    guest.write(sysctl, "0")  # it counts on tunl0, which our own tests do without
    try:
        selftest(guest, "ipvs.sh")
    finally:
        guest.write(sysctl, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_unload_with_live_connections(site: Callable[..., Site], guest: Guest, family: int) -> None:
    net = site(gateway=True)
    net.serve()
    net.echo()
    net.balance(family, "-m")
    net.balance(family, "-m", port=53, protocol="udp")
    net.clients[0].hold(net.vip(family), count=20)
    net.clients[0].ask(net.vip(family))
    assert guest.run("rmmod", "ip_vs", check=False).status != 0, "it was unloaded from under its services"
    net.director.ipvsadm("-C")
    assert len(net.director.connections()) == 21
    unload(guest)
    assert "ip_vs" not in guest.modules()
    guest.run("modprobe", "ip_vs")
    assert net.director.connections() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_namespace_ends_with_live_connections(site: Callable[..., Site], family: int) -> None:
    net = site(gateway=True)
    net.serve()
    net.balance(family, "-m", options=("-p", "60"))
    net.clients[0].hold(net.vip(family), count=20)
    assert len(net.director.connections()) == 21
    net.lab.remove(net.director)
    net.lab.wait_for_empty_ipvs()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_goes_with_live_connections(site: Callable[..., Site], family: int) -> None:
    """The cached ways through it must not hold it."""
    net = site(gateway=True)
    net.serve()
    net.balance(family, "-m")
    net.clients[0].hold(net.vip(family), count=4)
    net.director.ip("link del back")
    net.director.wait_until(lambda: "back" not in net.director.run("ip", "-br", "link").out, "the end of the device")
    assert len(net.director.connections()) == 4
