"""The module `toa` of the real server's kernel: whom accept() and getpeername() show. The peer is made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.kernel.lab import Lab, Namespace
from tests.kernel.machine import Failed, Guest
from tests.kernel.naming import CLIENT, CPORT, DEFAULT, FAR, MSS, NEAR, SERVER, Room, mapped, named, shows
from tests.kernel.receivers import Scenarios
from tests.kernel.topology import FAMILIES

pytestmark = [pytest.mark.build, pytest.mark.guest]
FLAVOURS = ("rs",)
STOP = "/tmp/no-more"  # noqa: S108  the guest's


class ModuleRoom(Room):
    """Served by the module."""

    def counters(self) -> str:
        return self.server.read("/proc/net/toa_stats")

    def trust(self, prefixes: str) -> None:
        self.server.sysctl("net.toa.trusted", prefixes + "\n")


@pytest.fixture
def room(lab: Lab, guest: Guest) -> Room:
    guest.run("modprobe", "toa", seconds=20)
    return ModuleRoom(lab)


Setter = Callable[[str, str], None]


@pytest.fixture
def host(guest: Guest) -> Iterator[Setter]:
    """Sets a list where the machine booted. All rooms begin with what is there, so that it is put back.

    Asked for before `lab`, it outlives what a test left running.
    """
    guest.run("modprobe", "toa", seconds=20)

    def write(name: str, text: str) -> None:
        guest.write(f"/proc/sys/net/toa/{name}", text + "\n")

    kept = {name: guest.read(f"/proc/sys/net/toa/{name}").strip() for name in ("trusted", "kinds")}
    yield write
    if guest.alive:
        for name, text in kept.items():
            write(name, text)


def lists(server: Namespace) -> tuple[str, str]:
    """Whom it believes, and which kinds of option."""
    return server.sysctl("net.toa.trusted"), server.sysctl("net.toa.kinds")


class TestModule(Scenarios):
    """What the programs of BPF do as well."""


# --- how a connection begins


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_open(room: Room, family: int) -> None:
    """The application runs before the handshake ends: it sees the peer at first, then the client."""
    room.server.sysctl("net.ipv4.tcp_fastopen", 0x203)
    app = room.app(family, fastopen=True)
    call = room.peer.call(family)
    answer = call.knock(MSS, b"n")
    assert answer.ack == 1002, "it was no Fast Open"
    assert app.says(2) == [f"accept {call}", f"name {call} carrier {call}"]
    assert room.stats()["syn_recv_sock_no_toa"] == 0
    call.send("A", option=named(CLIENT[family]))
    call.say()
    assert app.says() == [f"name {CLIENT[family]} {CPORT} carrier {call}"]
    assert room.stats()["syn_recv_sock_toa"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_open_that_names_nobody(room: Room, family: int) -> None:
    """Its handshake ends with a segment without any option."""
    room.server.sysctl("net.ipv4.tcp_fastopen", 0x203)
    app = room.app(family, fastopen=True)
    call = room.peer.call(family)
    assert call.knock(MSS, b"n").ack == 1002, "it was no Fast Open"
    call.send("A")
    call.say()
    assert app.says(3) == [f"accept {call}"] + [f"name {call} carrier {call}"] * 2
    assert room.stats()["syn_recv_sock_no_toa"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_open_of_a_stranger(room: Room, family: int) -> None:
    """It is counted where it begins: no later segment is looked at."""
    room.server.sysctl("net.ipv4.tcp_fastopen", 0x203)
    app = room.app(family, fastopen=True)
    call = room.peer.call(family, source=FAR[family])
    assert call.knock(MSS, b"n").ack == 1002, "it was no Fast Open"
    call.send("A", option=named(CLIENT[family]))
    call.say()
    assert app.says(3) == [f"accept {call}"] + [f"name {call} carrier {call}"] * 2
    stats = room.stats()
    assert {name: count for name, count in stats.items() if count} == {
        "syn_recv_sock_no_toa": 1,
        "getname_toa_empty": 3,
    }


# --- later segments


@pytest.mark.parametrize("wrong", ["seq", "ack", "old"])
def test_a_segment_that_tcp_drops_names_nobody(room: Room, wrong: str) -> None:
    """Else whoever can send with the director's address could, without seeing the connection."""
    app = room.app(4)
    call = room.peer.call(4).open()
    call.say()
    app.says(2)
    fields = {"seq": {"seq": call.seq + 10_000_000}, "ack": {"ack": call.ack + 10_000}, "old": {"seq": call.seq - 500}}
    call.send("A", option=named(CLIENT[4]), **fields[wrong])
    call.say()
    assert app.says() == [f"name {call} carrier {call}"]


# --- whom it believes


def test_the_list_of_the_trusted(room: Room) -> None:
    server = room.server
    assert server.sysctl("net.toa.trusted") == DEFAULT
    for text, kept in {
        "10.0.2.200": "10.0.2.200/32",
        " fd00::/8,\t10.0.0.0/8 ,": "fd00::/8,10.0.0.0/8",
        "0.0.0.0/0 ::/0": "0.0.0.0/0,::/0",
        "10.0.2.0/24\n10.0.3.0/24\n": "10.0.2.0/24,10.0.3.0/24",
        "fd00:2::200/128": "fd00:2::200/128",
        "": "",
        ",".join(f"10.{n}.0.0/16" for n in range(64)): ",".join(f"10.{n}.0.0/16" for n in range(64)),
    }.items():
        server.sysctl("net.toa.trusted", text + "\n")
        assert server.sysctl("net.toa.trusted") == kept
    wrong = ["10.0.0.1/8", "10.0.0.0/33", "fd00::1/64", "fd00::/129", "10.0.0.0/", "10.0.0/24", "10.0.0.0/8x", "any"]
    # What the kernel's own parsers of addresses pass over.
    wrong += ["10.0.0.0;10.0.0.0/8", "10.0.0.1-10.0.0.9", "10.0.0.1:80", "10.0.0.0x", "fe80::1%eth0"]
    wrong += ["::ffff:10.0.0.0/104", "::ffff:10.0.0.1", "10.0.0.0/8\nx"]
    wrong += [f"10.1.0.0/16,{each}" for each in wrong]
    wrong += [",".join(f"10.{n}.0.0/16" for n in range(65)), "10.0.0.0/8 " * 400]
    server.sysctl("net.toa.trusted", "192.0.2.0/24")
    for text in wrong:
        with pytest.raises(Failed, match=r"Invalid argument|list too long"):
            server.sysctl("net.toa.trusted", text)
        assert server.sysctl("net.toa.trusted") == "192.0.2.0/24", text


def test_the_list_of_kinds(room: Room) -> None:
    app = room.app(4)
    room.server.sysctl("net.toa.kinds", "200 28")
    assert room.server.sysctl("net.toa.kinds") == "28,200"
    shows(app, room.peer.call(4).open(named(CLIENT[4])))
    shows(app, room.peer.call(4).open(named(CLIENT[4], kind=28)), CLIENT[4])
    for text in ("254,2", "30", "256", "-1", "x", "254 0"):
        with pytest.raises(Failed, match=r"Invalid argument|out of range"):
            room.server.sysctl("net.toa.kinds", text)
        assert room.server.sysctl("net.toa.kinds") == "28,200", text
    room.server.sysctl("net.toa.kinds", "\n")
    assert room.server.sysctl("net.toa.kinds") == ""
    shows(app, room.peer.call(4).open(named(CLIENT[4], kind=28)))


def test_each_namespace_has_its_own(room: Room, lab: Lab) -> None:
    room.server.sysctl("net.toa.trusted", "\n")
    other = lab.namespace("other")
    assert other.sysctl("net.toa.trusted") == DEFAULT
    assert other.read("/proc/net/toa_stats").split()[0].startswith("CPU")
    app = room.app(4)
    shows(app, room.peer.call(4).open(named(CLIENT[4])))
    assert room.stats()["syn_recv_sock_no_toa"] == 1
    assert "syn_recv_sock_no_toa 0" in " ".join(other.read("/proc/net/toa_stats").split())


def test_a_new_namespace_begins_with_the_hosts_lists(host: Setter, guest: Guest, lab: Lab) -> None:
    """Else who tells a host whom to believe has containers that believe their neighbours."""
    early = lab.namespace("early")
    host("trusted", f"{FAR[4]} {FAR[6]}")
    host("kinds", "200")
    room = ModuleRoom(lab)
    assert lists(room.server) == (f"{FAR[4]}/32,{FAR[6]}/128", "200")
    assert lists(early) == (DEFAULT, "253,254")
    host("trusted", DEFAULT)
    host("kinds", "253 254")
    app = room.app(6)
    for f in FAMILIES:
        shows(app, room.peer.call(f, source=FAR[f]).open(named(CLIENT[f], kind=200)), CLIENT[f], six=True)
        shows(app, room.peer.call(f).open(named(CLIENT[f], kind=200)), six=True)
        shows(app, room.peer.call(f, source=FAR[f]).open(named(CLIENT[f])), six=True)
    room.trust("")
    assert guest.read("/proc/sys/net/toa/trusted").strip() == DEFAULT


def test_namespaces_begin_while_the_hosts_list_changes(host: Setter, guest: Guest, lab: Lab) -> None:
    """Each has one of the lists as a whole, and nobody reads one that is gone."""
    full = [",".join(f"10.{n}.{m}.0/24" for n in range(64)) for m in range(2)]
    host("trusted", full[0])
    loop = 'while :; do echo "$1" >"$0"; echo "$2" >"$0"; done'
    writer = guest.start("sh", "-c", loop, "/proc/sys/net/toa/trusted", *full)
    for n in range(10):
        assert lab.namespace(f"n{n}").sysctl("net.toa.trusted") in full
    assert writer.poll() is None
    writer.stop()


# --- loading and unloading


def test_the_module_comes_to_namespaces_that_exist(host: Setter, guest: Guest, room: Room) -> None:
    """All begin with the defaults, as the machine's own namespace does."""
    host("trusted", FAR[4])
    room.trust("")
    guest.run("rmmod", "toa", seconds=20)
    guest.run("modprobe", "toa", seconds=20)
    assert guest.read("/proc/sys/net/toa/trusted").strip() == DEFAULT
    assert lists(room.server) == (DEFAULT, "253,254")


@pytest.mark.parametrize("family", FAMILIES)
def test_live_connections_outlive_the_module(room: Room, guest: Guest, family: int) -> None:
    app = room.app(family)
    call = room.peer.call(family).open(named(CLIENT[family]))
    shows(app, call, CLIENT[family])
    waiting = room.peer.call(family).open()
    guest.run("rmmod", "toa")
    call.say()
    assert app.says(2)[1] == f"name {call} carrier {call}"
    waiting.say(b"n", named(CLIENT[family]))
    assert app.says() == [f"name {waiting} carrier {waiting}"]
    assert not guest.run("test", "-e", "/proc/sys/net/toa", check=False).status == 0
    shows(app, room.peer.call(family).open(named(CLIENT[family])))
    guest.run("modprobe", "toa", seconds=20)
    call.say()
    assert app.says() == [f"name {CLIENT[family]} {CPORT} carrier {call}"]
    shows(app, room.peer.call(family).open(named(CLIENT[family])), CLIENT[family])


def test_load_and_unload_under_traffic(room: Room, guest: Guest) -> None:
    """Names or peers, never anything else, and nobody is refused."""
    ports = {4: 80, 6: 81}
    guest.run("rm", "-f", STOP)
    apps = {family: room.app(6, port, listeners=2) for family, port in ports.items()}
    storms = [
        room.peer.member.start_call(
            "toa:storm", device="eth0", mac=room.peer.mac, source=NEAR[f], target=SERVER[f], port=ports[f],
            option=named(CLIENT[f]).hex(), seconds=60 * guest.scale, stop=STOP, least=50,
        )
        for f in FAMILIES
    ]  # fmt: skip
    for _ in range(5):
        guest.run("rmmod", "toa", seconds=20)
        guest.run("modprobe", "toa", seconds=20)
        assert [storm.poll() for storm in storms] == [None, None]
    guest.write(STOP, "")
    answered = [storm.wait(seconds=60).result for storm in storms]
    assert min(answered) >= 50, answered
    for family, app in apps.items():
        lines = [line.split() for line in app.job.so_far().splitlines()]
        names = {words[1] for words in lines if words[0] in ("accept", "name")}
        assert names == {mapped(CLIENT[family], True), mapped(NEAR[family], True)}


def test_a_namespace_ends_with_named_connections(room: Room, lab: Lab) -> None:
    app = room.app(6)
    for family in FAMILIES:
        shows(app, room.peer.call(family).open(named(CLIENT[family])), CLIENT[family], six=True)
    app.job.stop()
    room.peer.wire.close()
    lab.remove(room.server)


def test_the_kernels_own_selftest(guest: Guest) -> None:
    done = guest.run("sh", "-c", "cd /kernel/selftests/net && exec bash ./toa.sh", seconds=120)
    assert done.out.count("PASS") == 17, str(done)
    assert "FAIL" not in done.out + done.err
