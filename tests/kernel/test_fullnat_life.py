"""How FULLNAT connections end: time-outs and resets; modules, namespaces and devices that go; the sync daemons."""

from __future__ import annotations

import ipaddress
import itertools
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.kernel import packets
from tests.kernel.lab import Capture, selftest
from tests.kernel.machine import Background, Guest, unload
from tests.kernel.packets import Ends
from tests.kernel.talk import Bare, Conversation
from tests.kernel.topology import BACK, FAMILIES, Site, service

pytestmark = [pytest.mark.build, pytest.mark.guest]
FULLNAT = 5
SYNC = ("224.0.0.81", 8848)  # IP_VS_SYNC_GROUP, IP_VS_SYNC_PORT
SYNC_MAC = "01:00:5e:00:00:51"


def _idle(net: Site, family: int) -> tuple[Background, Background]:
    """A connection on which nobody says anything; the jobs of the client and of the server tell how it ends."""
    patience = 30.0 * net.lab.guest.scale
    server = net.servers[0].start_call("servers:accept_idle", address=net.server(family), port=80, patience=patience)
    net.servers[0].wait_for_port(80)
    client = net.clients[0].start_call("servers:idle", address=net.vip(family), port=80, patience=patience)
    net.clients[0].wait_until(lambda: client.so_far().startswith("open"), "the connection")
    return client, server


# --- time-outs


@pytest.mark.parametrize("family", FAMILIES)
def test_an_idle_connection_is_reset_at_both_ends(site: Callable[..., Site], family: int) -> None:
    """Real stacks take a reset only with the right number (RFC 5961); both do."""
    net = site(servers=1)
    net.balance(family, "-b", locals_=1, options=("-V", "2"))
    with net.director.capture("front") as front, net.director.capture("back") as back:
        client, server = _idle(net, family)
        assert client.wait(20).result == "reset"
        assert server.wait(20).result == "reset"
    front.must_be_sound()
    back.must_be_sound()
    assert len(front.tcp("R", target=net.client(family), source=net.vip(family))) == 1
    assert len(back.tcp("R", target=net.server(family), source=net.local(family))) == 1
    assert not front.tcp("R", source=net.client(family)), "the reset was answered"
    assert net.director.connections() == []
    counters = net.director.ext_stats()
    assert (counters["rst_in_established"], counters["rst_out_established"]) == (1, 1)


@pytest.fixture(params=FAMILIES)
def talk(request: pytest.FixtureRequest, site: Callable[..., Site]) -> Conversation:
    """Its ends are made by hand, and it expires after 3 s."""
    family: int = request.param
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", locals_=1, options=("-V", "3"), servers=[server.address(family)])
    return Conversation(client, server, family)


def _must_be_reset(talk: Conversation, to_client: int, to_server: int) -> None:
    """Both ends hear a reset, with these sequence numbers."""
    hears = {
        end: bare.wire.expect(lambda p: "R" in p.flags, f"the {end}'s reset", 10)
        for end, bare in (("client", talk.client), ("server", talk.server))
    }
    assert (hears["client"].ends, hears["client"].seq) == (talk.outside.back, to_client % (1 << 32))
    assert (hears["server"].ends, hears["server"].seq) == (talk.inside, to_server % (1 << 32))


def test_the_resets_numbers_after_much_traffic(talk: Conversation) -> None:
    """Exactly the next number of each direction, whatever was repeated or came late."""
    talk.open(isn=0xFFFFFFA0, server_isn=0xFFFFFFB0)
    for offset, size in ((0, 100), (100, 50), (0, 100)):
        talk.to_server("PA", seq=talk.here.seq + offset, ack=talk.here.ack, data=b"c" * size)
    for offset, size in ((0, 70), (0, 70), (70, 30)):
        talk.to_client("PA", seq=talk.there.seq + offset, ack=talk.there.ack + 150, data=b"s" * size)
    talk.to_server("A", seq=talk.here.seq + 150, ack=talk.here.ack + 100)
    _must_be_reset(talk, talk.here.ack + 100, talk.there.ack + 150)


def test_the_resets_numbers_when_the_server_had_lost_the_connection(talk: Conversation) -> None:
    """It accepts another one from the same port; the numbers of both directions are lower than those of the first."""
    talk.open(isn=4_000_000, server_isn=6_000_000)
    talk.open(isn=3_000_000, server_isn=5_000_000)
    _must_be_reset(talk, talk.here.ack, talk.there.ack)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_reset_if_so_told(site: Callable[..., Site], family: int) -> None:
    net = site(servers=1)
    net.balance(family, "-b", locals_=1, options=("-V", "1"))
    net.director.ip_vs_sysctl("conn_expire_tcp_rst", 0)
    with net.director.capture("front") as front, net.director.capture("back") as back:
        _idle(net, family)
        net.director.wait_until(lambda: not net.director.connections(), "the end of the entry")
    assert not front.tcp("R")
    assert not back.tcp("R")
    assert net.director.ext_stats()["rst_out_established"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_other_methods_are_not_reset(site: Callable[..., Site], family: int) -> None:
    net = site(servers=1, gateway=True)
    net.serve()
    net.balance(family, "-m")
    net.director.ipvsadm("--set", "1", "1", "1")
    with net.director.capture("front") as front, net.director.capture("back") as back:
        net.clients[0].hold(net.vip(family))
        net.director.wait_until(lambda: not net.director.connections(), "the end of the entry")
    assert not front.tcp("R")
    assert not back.tcp("R")


def test_other_states_are_not_reset(talk: Conversation) -> None:
    """The port of a connection that has been closed may be another one's by then."""
    director = talk.client.net.director
    director.ipvsadm("--set", "900", "1", "300")
    talk.open()
    talk.to_client("FA", seq=talk.there.seq, ack=talk.there.ack)
    director.wait_until(lambda: not director.connections(), "the end of the entry")
    for bare in (talk.client, talk.server):
        bare.wire.silence(lambda p: p.protocol == packets.TCP and "R" in p.flags, "a reset")
    assert director.ext_stats()["rst_out_established"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_services_own_timeout(site: Callable[..., Site], family: int) -> None:
    """Of its established connections and of no others; a change is for connections to come."""
    net = site(servers=1)
    net.serve()
    net.serve(port=81)
    where = net.balance(family, "-b", locals_=1, options=("-V", "50"))
    net.balance(family, "-b", port=81, locals_=1)
    net.clients[0].hold(net.vip(family))
    net.clients[0].hold(net.vip(family), port=81)
    expires = {c.vport: c.expires for c in net.director.connections()}
    assert 30 < expires[80] <= 50
    assert 800 < expires[81] <= 900
    assert "est_timeout 50" in net.director.ipvsadm("-L", "-n").out
    net.director.ipvsadm("-E", "-t", where, "-s", "wrr")
    assert "est_timeout 50" in net.director.ipvsadm("-L", "-n").out, "an edit that did not speak of it changed it"
    net.director.ipvsadm("-E", "-t", where, "-V", "0")
    net.clients[0].hold(net.vip(family), sport=4000)
    assert 800 < next(c.expires for c in net.director.connections() if c.cport == 4000) <= 900


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_of_the_timeout_reaches_live_connections(site: Callable[..., Site], family: int) -> None:
    """With their next packet, both ways; no other state has it."""
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    where = net.balance(family, "-b", locals_=1, options=("-V", "50"), servers=[server.address(family)])

    def expires() -> int:
        (row,) = net.director.connections()
        return row.expires

    talk = Conversation(client, server, family)
    talk.to_server("S", seq=1000)
    assert 50 < expires() <= 60  # SYN_RECV
    talk = Conversation(client, server, family, cport=talk.outside.sport)
    talk.open()
    assert 30 < expires() <= 50
    net.director.ipvsadm("-E", "-t", where, "-V", "0")
    assert expires() <= 50
    talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack)
    assert 800 < expires() <= 900
    net.director.ipvsadm("-E", "-t", where, "-V", "70")
    talk.to_client("A", seq=talk.there.seq, ack=talk.there.ack)
    assert 50 < expires() <= 70


# --- what goes away with live connections


def _busy(net: Site, family: int) -> None:
    """Services of both protocols with persistence, and connections of all of them."""
    net.serve()
    net.echo()
    net.balance(family, "-b", locals_=2, options=("-p", "60"))
    net.balance(family, "-b", port=53, protocol="udp", locals_=2)
    net.clients[0].hold(net.vip(family), count=20)
    net.clients[0].ask(net.vip(family))
    assert len(net.director.connections()) == 22


@pytest.mark.parametrize("family", FAMILIES)
def test_unload(site: Callable[..., Site], guest: Guest, family: int) -> None:
    net = site(servers=1)
    _busy(net, family)
    net.director.ipvsadm("-C")
    assert len(net.director.connections()) == 22
    unload(guest)
    guest.run("modprobe", "ip_vs")
    assert net.director.connections() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_namespace_ends(site: Callable[..., Site], family: int) -> None:
    net = site(servers=1)
    _busy(net, family)
    net.lab.remove(net.director)
    net.lab.wait_for_empty_ipvs()


@pytest.mark.parametrize("device", ["front", "back"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_goes(site: Callable[..., Site], family: int, device: str) -> None:
    """The ways through it that connections, servers and local addresses remember must not hold it."""
    net = site(servers=1)
    _busy(net, family)
    net.director.ip(f"link del {device}")
    net.director.wait_until(lambda: device not in net.director.run("ip", "-br", "link").out, "the end of the device")
    assert len(net.director.connections()) == 22


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_that_comes_back(site: Callable[..., Site], family: int) -> None:
    """Down and up again: the connections find their ways anew."""
    net = site(servers=1)
    net.echo()
    net.balance(family, "-b", port=53, protocol="udp", locals_=1)
    before = net.clients[0].ask(net.vip(family), sport=4000)
    for device in ("front", "back"):
        net.director.ip(f"link set {device} down", f"link set {device} up")
    if family == 6:  # taken off by the kernel when the device went down
        net.restore_addresses()
    assert net.clients[0].ask(net.vip(family), sport=4000) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_is_removed(site: Callable[..., Site], family: int) -> None:
    """Its connections go on until they end, or are dropped at the next packet if one says so."""
    net = site(servers=1)
    net.echo()
    where = net.balance(family, "-b", port=53, protocol="udp", locals_=1)
    real = service(net.server(family), 53)
    before = net.clients[0].ask(net.vip(family), sport=4000)
    net.director.ipvsadm("-d", "-u", where, "-r", real)
    (row,) = net.director.connections()
    assert row.lport == int(before.split()[2])
    net.director.ipvsadm("-a", "-u", where, "-r", real, "-b")
    assert net.clients[0].ask(net.vip(family), sport=4000) == before
    net.director.ip_vs_sysctl("expire_nodest_conn", 1)
    net.director.ipvsadm("-d", "-u", where, "-r", real)
    net.director.wait_until(lambda: not net.director.connections(), "the end of the entry")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_address_is_deleted(site: Callable[..., Site], family: int) -> None:
    """A transfer that runs goes on; nothing new gets it; its entry is freed with the last connection."""
    net = site(servers=1)
    net.serve(size=400_000)
    where = net.balance(family, "-b", locals_=1)
    client = net.clients[0]
    client.offload("eth0", gro=False)
    net.director.run(
        "tc", "qdisc", "add", "dev", "front", "root", "tbf", "rate", "2mbit", "burst", "10k", "latency", "1s"
    )
    slow = client.start_call(
        "servers:http_get", address=net.vip(family), port=80, path="/bulk", count=1, sport=0,
        patience=30 * net.lab.guest.scale,
    )  # fmt: skip
    net.director.wait_until(lambda: bool(net.director.connections()), "the connection")
    net.director.ipvsadm("-Q", "-t", where, "-z", net.local(family))
    assert len(slow.wait(30).result[0]) == 400_000
    net.director.ipvsadm("-P", "-t", where, "-z", net.local(family, 1))
    assert client.get(net.vip(family))[0].split()[1] == net.local(family, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_flushing_everything_with_live_connections(site: Callable[..., Site], family: int) -> None:
    net = site(servers=1)
    _busy(net, family)
    for _ in range(3):
        net.director.ipvsadm("-C")
        net.balance(family, "-b", locals_=2)
    assert net.clients[0].get(net.vip(family))[0].split()[0] == "server0"


def _all_services(net: Site) -> list[str]:
    """Lines for ipvsadm: TCP and UDP of both families, two local addresses and two real servers each."""
    lines = []
    for kind, family in itertools.product(("-t", "-u"), FAMILIES):
        where = f"{kind} {service(net.vip(family), 80)}"
        lines += [f"-A {where} -s rr", *(f"-P {where} -z {net.local(family, n)}" for n in range(2))]
        lines += [f"-a {where} -r {service(address, 80)} -b" for address in net.addresses(family)]
    return lines


def _all_changes(net: Site) -> list[str]:
    """What can be changed of them."""
    lines = []
    for kind, family in itertools.product(("-t", "-u"), FAMILIES):
        where = f"{kind} {service(net.vip(family), 80)}"
        one, two = (service(address, 80) for address in net.addresses(family))
        lines += [
            f"-P {where} -z {net.local(family, 2)}", f"-Q {where} -z {net.local(family)}",
            f"-e {where} -r {one} -b -w 0", f"-E {where} -s wrr", f"-d {where} -r {two}",
            f"-a {where} -r {two} -b -w 3", f"-e {where} -r {one} -m", f"-e {where} -r {one} -b",
            f"-Q {where} -z {net.local(family, 2)}", f"-P {where} -z {net.local(family)}",
        ]  # fmt: skip
    return lines


@pytest.mark.parametrize("end", ["unload", "namespace"])
def test_everything_changes_under_traffic(site: Callable[..., Site], guest: Guest, end: str) -> None:
    """Connections come and go on two processors while all that they use is changed, and in the end taken away."""
    net = site(clients=2, servers=2)
    net.serve()
    net.echo(port=80)
    net.director.ipvsadm("--set", "2", "1", "1")
    restless = [
        client.start_call("servers:restless", addresses=[net.vip(family) for family in FAMILIES], port=80)
        for client in net.clients
    ]

    def batch(lines: list[str]) -> None:
        net.director.run("ipvsadm", "-R", stdin="".join(f"{line}\n" for line in lines), seconds=20)

    def busy() -> bool:
        return Counter(c.protocol for c in net.director.connections() if c.local).keys() == {"TCP", "UDP"}

    for first in (5000, 6000, 5010):
        batch(_all_services(net))
        net.director.wait_until(busy, "connections")
        net.director.ip_vs_sysctl("fullnat_lport_max", 65535)
        net.director.ip_vs_sysctl("fullnat_lport_min", first)
        net.director.ip_vs_sysctl("fullnat_lport_max", first + 30)
        batch(_all_changes(net))
        for words in (("-L", "-c", "-n"), ("-G", "-n"), ("-L", "-n", "--stats")):
            net.director.ipvsadm(*words)
        net.director.ext_stats()
        net.director.ip(f"link set {net.back} down", f"link set {net.back} up")
        net.restore_addresses()
        net.director.ipvsadm("-C")
    if end == "unload":
        unload(guest)
        guest.run("modprobe", "ip_vs")
        assert net.director.connections() == []
    else:
        batch(_all_services(net))
        net.director.wait_until(busy, "connections")
        net.lab.remove(net.director)
        net.lab.wait_for_empty_ipvs()
    for job in restless:
        assert job.poll() is None, "a client ended: there was no traffic"


# --- the sync daemons


@dataclass(frozen=True)
class Synced:
    """A connection in a sync message: what a backup would make of it."""

    client: str
    cport: int
    server: str
    method: int
    flags: int


def _synced(capture: Capture) -> list[Synced]:
    """Read version 1 of the protocol (net/netfilter/ipvs/ip_vs_sync.c, struct ip_vs_sync_v4 and _v6)."""
    found = []
    for packet in capture.seen(lambda p: p.protocol == packets.UDP and p.target == SYNC[0]):
        data = packet.payload
        assert data[0] == 0, "version 0 of the protocol: the test must learn it"
        count, rest = data[4], data[8:]
        for _ in range(count):
            kind, _, size = struct.unpack("!BBH", rest[:4])
            size &= 0xFFF
            flags, _, cport = struct.unpack("!IHH", rest[4:12])
            step = 16 if kind & 1 else 4
            caddr = str(ipaddress.ip_address(rest[24 : 24 + step]))
            daddr = str(ipaddress.ip_address(rest[24 + 2 * step : 24 + 3 * step]))
            found.append(Synced(caddr, cport, daddr, flags & 7, flags))
            rest = rest[(size + 3) & ~3 :]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_master_tells_nothing_of_our_connections(site: Callable[..., Site], family: int) -> None:
    """A peer could only misread them. Templates of persistent clients are told, and what other methods have."""
    net = site(servers=2)
    net.servers[1].ip(f"route add default via {net.director_address(family, back=True)}")
    net.serve()
    net.director.sysctl("net.ipv4.vs.sync_threshold", "0 1")
    net.director.ipvsadm("--start-daemon", "master", "--mcast-interface", net.back)
    where = net.balance(family, "-b", locals_=1, options=("-p", "60"))
    net.director.ipvsadm("-A", "-t", service(net.vip(family), 81), "-s", "rr")
    net.director.ipvsadm("-a", "-t", service(net.vip(family), 81), "-r", service(net.server(family, 1), 80), "-m")
    net.director.ipvsadm("-d", "-t", where, "-r", service(net.server(family, 1), 80))
    with net.switch.capture(f"br-{net.back}") as seen:
        client = net.clients[0]
        client.get(net.vip(family), count=3, sport=4000)
        client.get(net.vip(family), port=81, sport=5000)
        wire_has = net.servers[0].wire("eth0")
        wire_has.expect(lambda p: p.target == SYNC[0], "a sync message", 10)
        net.director.ipvsadm("--stop-daemon", "master")  # sends what is left
    synced = _synced(seen)
    assert {s.cport for s in synced if s.server == net.server(family, 1)} == {5000}, "the other method's is missing"
    ours = [s for s in synced if s.server == net.server(family)]
    assert {s.cport for s in ours} == {0}, f"the template and nothing else: {ours}"
    assert all(s.method != FULLNAT for s in synced)


@pytest.mark.parametrize("method", [0, FULLNAT])
def test_a_backup_drops_what_it_cannot_read(site: Callable[..., Site], method: int) -> None:
    """From a peer that does send them. With method 0 the same message makes an entry, so it is a right one."""
    net = site(clients=0, servers=0)
    peer = Bare(net, back=True)
    net.director.ipvsadm("--start-daemon", "backup", "--mcast-interface", net.back)
    addresses = b"".join(packets.packed(a) for a in ("198.51.100.9", net.vip(4), f"{BACK[4]}11"))
    entry = struct.pack("!BBHIHHHHII", 0, packets.TCP, 36, method, 1, 4321, 80, 80, 0, 60) + addresses
    control = struct.pack("!BBHIHHHHII", 0, packets.TCP, 36, 0, 1, 999, 80, 80, 0, 60) + addresses
    message = struct.pack("!BBHBbH", 0, 0, 8 + len(entry) + len(control), 2, 1, 0) + entry + control

    def known() -> set[int]:
        datagram = packets.udp(Ends(peer.address(4), 40000, *SYNC), message, ttl=1)
        peer.wire.send(datagram, to=SYNC_MAC)
        return {c.cport for c in net.director.connections()}

    net.director.wait_until(lambda: 999 in known(), "the entry that every backup takes")
    assert (4321 in known()) == (method == 0)


def test_hundreds_of_local_addresses(site: Callable[..., Site]) -> None:
    """More than one page of a dump could tell at once."""
    net = site(servers=1)
    net.serve()
    where = net.balance(4, "-b")
    wanted = [f"10.0.{n}.{m}" for n in range(10, 14) for m in range(1, 101)]
    net.director.run("ipvsadm", "-R", stdin="".join(f"-P -t {where} -z {a}\n" for a in wanted), seconds=20)
    told = net.director.call("genl:listed", of={"address": net.vip(4), "port": 80}, seconds=10)
    assert sorted(told["locals"]) == sorted(wanted)
    net.director.run("ipvsadm", "-R", stdin="".join(f"-Q -t {where} -z {a}\n" for a in wanted), seconds=20)
    assert net.director.call("genl:listed", of={"address": net.vip(4), "port": 80})["locals"] == {}


# --- the kernel's own test


def test_the_kernels_own_selftest(guest: Guest) -> None:
    selftest(guest, "ipvs_fullnat.sh")
