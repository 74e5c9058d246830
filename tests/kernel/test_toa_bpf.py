"""`toa-bpf`: what the module does, without it, on a kernel that knows nothing of TOA and on Debian's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.kernel import packets
from tests.kernel.lab import Lab, Namespace
from tests.kernel.machine import Background, Done, Guest
from tests.kernel.naming import CLIENT, CPORT, DEFAULT, FAR, MSS, NEAR, SERVER, Room, mapping, named, option, shows
from tests.kernel.receivers import Scenarios, mount_for_bpf, multipath
from tests.kernel.topology import FAMILIES

pytestmark = [pytest.mark.build, pytest.mark.guest]
FLAVOURS = ("rs", "debian")
STOP = "/tmp/no-more"  # noqa: S108  the guest's
CONFIG = "/tmp/toa-bpf.conf"  # noqa: S108  the guest's
PINS = "/sys/fs/bpf/toa"


class BpfRoom(Room):
    """Served by the programs of BPF."""

    def __init__(self, lab: Lab, guest: Guest) -> None:
        super().__init__(lab)
        self.guest = guest

    def toa_bpf(self, *words: str, check: bool = True) -> Done:
        """Run it."""
        return self.guest.run("toa-bpf", "-c", CONFIG, *words, seconds=20, check=check)

    def write(self, **values: str) -> None:
        """Write the configuration, in which `carrier` is on."""
        lines = [f"{key} = {value}\n" for key, value in {"carrier": "yes", **values}.items()]
        self.guest.write(CONFIG, "".join(lines))

    def configure(self, **values: str) -> None:
        """Write it, and load it."""
        self.write(**values)
        self.toa_bpf("load")

    def counters(self) -> str:
        return self.toa_bpf("stats").out

    def trust(self, prefixes: str) -> None:
        self.configure(trusted=prefixes)


@pytest.fixture
def machine_with_bpf(guest: Guest) -> Guest:
    """Without the module, and with the file systems that systemd would have mounted."""
    if guest.run("test", "-e", "/sys/kernel/btf/vmlinux", check=False).status != 0:
        pytest.skip(f"{guest.kernel.title} has no /sys/kernel/btf/vmlinux, which programs of BPF are fitted to")
    if "toa" in guest.modules():
        guest.run("rmmod", "toa", seconds=20)
    mount_for_bpf(guest)
    return guest


@pytest.fixture
def room(lab: Lab, machine_with_bpf: Guest) -> Iterator[BpfRoom]:
    found = BpfRoom(lab, machine_with_bpf)
    found.configure()
    yield found
    if found.guest.alive:
        found.toa_bpf("unload")


class TestPrograms(Scenarios):
    """What the module does as well."""


def test_the_verifier_is_far_from_its_limit(room: BpfRoom) -> None:
    """Which is a million; how many it looks at differs from kernel to kernel, and these are not all that there are."""
    assert 0 < room.guest.call("sockops:verified", link=f"{PINS}/link_toa_sockops") < 300_000


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_open(room: BpfRoom, family: int) -> None:
    """The kernel does not show the segment that ends such a handshake; the next one that has the option counts."""
    room.server.sysctl("net.ipv4.tcp_fastopen", 0x203)
    app = room.app(family, fastopen=True)
    call = room.peer.call(family)
    assert call.knock(MSS, b"n").ack == 1002, "it was no Fast Open"
    assert app.says(2) == [f"accept {call}", f"name {call} carrier {call}"]
    call.send("A", option=named(CLIENT[family]))
    call.say(b"n", named(CLIENT[family]))
    assert app.says() == [f"name {CLIENT[family]} {CPORT} carrier {call}"]


@pytest.mark.parametrize("wrong", ["seq", "old"])
def test_a_segment_outside_of_the_window_names_nobody(room: BpfRoom, wrong: str) -> None:
    app = room.app(4)
    call = room.peer.call(4).open()
    call.say()
    app.says(2)
    call.send("A", option=named(CLIENT[4]), seq=call.seq + 10_000_000 if wrong == "seq" else call.seq - 500)
    call.say()
    assert app.says() == [f"name {call} carrier {call}"]


def test_an_answer_that_says_more_than_it_writes(room: BpfRoom) -> None:
    """Every getsockopt() of the host passes here; this is how one asks how much room there has to be."""
    length = room.server.call("toa:groups", room=100)
    assert 4 <= length < 100
    assert room.server.call("toa:groups", room=0) == length


def test_an_error_stays_the_kernels_own(room: BpfRoom) -> None:
    """With what it wrote, which can be how much room there has to be; kernels before 5.18 would take zeros of ours."""
    for _ in range(2):
        refused = room.server.call("toa:refusals")
        assert refused == {"too little room": ["ERANGE", 12, ""], "no such option": ["ENOPROTOOPT", 8, ""]}
        room.toa_bpf("unload")


@contextmanager
def no_memory(room: BpfRoom) -> Iterator[None]:
    """Nothing more can be kept for a socket. The limit is one for all namespaces before 6.8."""
    path = "/proc/sys/net/core/optmem_max"
    own = room.server.run("test", "-e", path, check=False).status == 0
    where = room.server.handle if own else ""
    before = room.guest.read(path, where)
    room.guest.write(path, "0", where)
    try:
        yield
    finally:
        room.guest.write(path, before, where)


def test_a_client_that_cannot_be_kept(room: BpfRoom) -> None:
    app = room.app(4)
    with no_memory(room):
        call = room.peer.call(4).open(named(CLIENT[4]))
        shows(app, call)
    stats = room.stats()
    assert (stats["no_memory_toa"], stats["syn_recv_sock_toa"], stats["syn_recv_sock_no_toa"]) == (1, 0, 1)


def test_a_connection_that_cannot_be_watched(room: BpfRoom) -> None:
    """No later segment names it, and that is counted."""
    app = room.app(4)
    with no_memory(room):
        call = room.peer.call(4).open()
        shows(app, call)
    call.say(b"n", named(CLIENT[4]))
    assert app.says() == [f"name {call} carrier {call}"]
    stats = room.stats()
    assert (stats["no_memory_toa"], stats["syn_recv_sock_no_toa"], stats["later_segment_toa"]) == (1, 1, 0)


def test_a_client_that_cannot_be_kept_for_mptcp(room: BpfRoom) -> None:
    """The socket that programs have is without it, so the next option counts, although the subflow had room."""
    app = room.app(4, mptcp=True)
    call, mine, _ = multipath(room, 4, b"")
    toa = packets.options(option(CLIENT[4]))
    assert app.says(3)[2] == f"name {call} carrier {call}"
    with no_memory(room):
        call.send("A", option=toa)
        call.say(b"n", packets.options(mapping(mine, 3, 1)))
    assert app.says() == [f"name {call} carrier {call}"]
    assert (room.stats()["no_memory_toa"], room.stats()["later_segment_toa"]) == (1, 0)
    call.send("A", option=toa)
    call.say(b"n", packets.options(mapping(mine, 4, 1)))
    assert app.says() == [f"name {CLIENT[4]} {CPORT} carrier {call}"]
    assert room.stats()["later_segment_toa"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_other_programs_asked_for_stays(room: BpfRoom, family: int) -> None:
    """A socket has one flag for all: of one that connects, and of one that was accepted when they had it already."""
    cgroup = f"/sys/fs/cgroup/watched{family}"
    flags = room.server.call("sockops:flags", address=SERVER[family], cgroup=cgroup)
    room.guest.run("rmdir", cgroup)
    assert flags == {"new": [0, 16], "accepted": [16, 16]}


# --- the loader


@contextmanager
def storm(room: BpfRoom, family: int) -> Iterator[Background]:
    """Connections by the dozen for the length of a block. Not one of them may be nameless."""
    app = room.app(family, 90)
    room.guest.run("rm", "-f", STOP)
    job = room.peer.member.start_call(
        "toa:storm", device="eth0", mac=room.peer.mac, source=NEAR[family], target=SERVER[family], port=90,
        option=named(CLIENT[family]).hex(), seconds=60 * room.guest.scale, stop=STOP, least=30,
    )  # fmt: skip
    yield job
    room.guest.write(STOP, "")
    assert job.wait(seconds=60).result >= 30
    names = {line.split()[1] for line in app.job.so_far().splitlines() if not line.startswith("error")}
    assert names == {CLIENT[family]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restart_loses_nothing(room: BpfRoom, family: int) -> None:
    """What was named, what waits for a name, what is counted; under traffic, nobody is nameless."""
    app = room.app(family)
    call = room.peer.call(family).open(named(CLIENT[family]))
    shows(app, call, CLIENT[family])
    waiting = room.peer.call(family).open()
    with storm(room, family) as job:
        for _ in range(3):
            room.toa_bpf("load")
            assert job.poll() is None
    call.say()
    assert app.says(2)[1] == f"name {CLIENT[family]} {CPORT} carrier {call}"
    waiting.say(b"n", named(CLIENT[family]))
    assert app.says() == [f"name {CLIENT[family]} {CPORT} carrier {waiting}"]
    assert room.stats()["later_segment_toa"] == 1


def test_unload_and_load(room: BpfRoom) -> None:
    app = room.app(4)
    call = room.peer.call(4).open(named(CLIENT[4]))
    shows(app, call, CLIENT[4])
    room.toa_bpf("unload")
    call.say()
    name, carrier = app.says()[0].split(" carrier ")
    assert name == f"name {call}"
    assert carrier in (str(call), "ENOPROTOOPT")
    assert room.guest.ask("listing", path="/sys/fs/bpf") == []
    assert room.toa_bpf("check").err == "", "the file alone is judged"
    failed = room.toa_bpf("stats", check=False)
    assert (failed.status, "toa-bpf load" in failed.err) == (1, True)
    room.toa_bpf("unload")
    room.configure()
    shows(app, room.peer.call(4).open(named(CLIENT[4])), CLIENT[4])


@pytest.fixture
def elsewhere(room: BpfRoom) -> Iterator[str]:
    """A cgroup below the root, and the programs there; the agent, of which every program is a child, is not in it."""
    cgroup = "/sys/fs/cgroup/elsewhere"
    room.guest.run("mkdir", cgroup)
    room.configure(cgroup=cgroup)
    yield cgroup
    if room.guest.alive and "elsewhere" in room.guest.ask("listing", path="/sys/fs/cgroup"):
        for process in room.guest.read(f"{cgroup}/cgroup.procs").split():
            room.guest.write("/sys/fs/cgroup/cgroup.procs", process)
        room.guest.run("rmdir", cgroup)


def test_another_cgroup(room: BpfRoom, elsewhere: str) -> None:
    """Only the sockets made in it show clients, wherever their programs go; moving back leaves nothing behind."""
    outside = room.app(4)
    room.guest.write(f"{elsewhere}/cgroup.procs", "1")
    inside = room.app(4, 81)
    room.guest.write("/sys/fs/cgroup/cgroup.procs", "1")
    for app, port, told in ((outside, 80, ""), (inside, 81, f"accept {CLIENT[4]} {CPORT}")):
        call = room.peer.call(4, port=port).open(named(CLIENT[4]))
        call.say()
        assert app.says(2)[0] == (told or f"accept {call}")
    room.write()
    moved = room.toa_bpf("check", check=False)
    assert (moved.status, "is at another cgroup than /sys/fs/cgroup: toa-bpf load" in moved.err) == (0, True)
    room.toa_bpf("load")
    shows(outside, room.peer.call(4).open(named(CLIENT[4])), CLIENT[4])


def test_the_programs_end_with_their_cgroup(room: BpfRoom, elsewhere: str) -> None:
    """As systemd removes that of a service which stops; the links are there still."""

    def dead() -> bool:
        done = room.toa_bpf("stats", check=False)
        return done.status == 1 and "its cgroup is gone" in done.err and "toa-bpf load" in done.err

    assert not dead()
    assert room.toa_bpf("check").err == ""
    room.guest.run("rmdir", elsewhere)
    room.server.wait_until(dead, "the end of the programs")
    for command in ("check", "load"):
        done = room.toa_bpf(command, check=False)
        assert (done.status, f"toa-bpf.conf:2: cgroup {elsewhere}: No such file" in done.err) == (1, True)
    room.guest.run("mkdir", elsewhere)
    done = room.toa_bpf("check", check=False)
    assert (done.status, "toa-bpf load" in done.err) == (0, True), "the file is right, and not in force"
    room.toa_bpf("load")
    assert room.toa_bpf("check").err == ""
    assert not dead()


def test_trust_and_kinds_are_replaced_as_a_whole(room: BpfRoom) -> None:
    six = room.app(6)
    room.configure(trusted=", ".join(f"10.{n}.0.0/16" for n in range(2, 66)), kinds="200")
    shows(six, room.peer.call(4).open(named(CLIENT[4])), six=True)
    room.configure(trusted=", ".join(f"10.0.{n}.0/24" for n in range(64)), kinds="200 28")
    shows(six, room.peer.call(4).open(named(CLIENT[4], kind=28)), CLIENT[4], six=True)
    shows(six, room.peer.call(4).open(named(CLIENT[4])), six=True)
    room.configure(trusted=f"{FAR[6]} fd00:2::/64")
    shows(six, room.peer.call(6).open(named(CLIENT[6])), CLIENT[6])
    shows(six, room.peer.call(4).open(named(CLIENT[4])), six=True)
    room.configure(trusted=DEFAULT)
    shows(six, room.peer.call(4).open(named(CLIENT[4])), CLIENT[4], six=True)


@pytest.mark.parametrize("family", [pytest.param(4, marks=pytest.mark.long), 6])  # forty seconds each
def test_who_is_in_both_lists_is_believed_at_every_moment(room: BpfRoom, family: int) -> None:
    """By another prefix in each: what is new comes before what is old goes."""
    wide, narrow = {4: ("10.0.0.0/8", "10.0.2.0/24"), 6: ("fd00::/8", "fd00:2::/64")}[family]
    with storm(room, family) as job:
        for trusted in (narrow, wide) * 5:
            room.trust(trusted)
            assert job.poll() is None
    assert room.stats()["untrusted_toa"] == 0


def test_a_full_list_is_loaded_again(room: BpfRoom) -> None:
    """Older kernels have no room in it even for what is there; one prefix makes room for another."""
    app = room.app(6)
    full = {4: [f"10.0.{n}.0/24" for n in range(64)], 6: [f"fd00:{n:x}::/32" for n in range(64)]}
    for family in FAMILIES:
        room.configure(trusted=" ".join(full[family]))
        room.toa_bpf("load")
        shows(app, room.peer.call(family).open(named(CLIENT[family])), CLIENT[family], six=True)
        room.configure(trusted=" ".join([*full[family][:2], *full[family][3:], FAR[family]]))
        shows(app, room.peer.call(family).open(named(CLIENT[family])), six=True)
        call = room.peer.call(family, source=FAR[family])
        shows(app, call.open(named(CLIENT[family])), CLIENT[family], six=True)


def test_a_file_that_is_not_loaded(room: BpfRoom) -> None:
    """`check` says what of it, in a line for each, and nothing of what is the same."""
    steps = [
        ({"trusted": f"{DEFAULT} 10.1.0.0/16"}, ["trusted: 10.1.0.0/16 is not loaded"]),
        ({}, ["trusted: 10.1.0.0/16 is loaded"]),
        ({"trusted": f"{DEFAULT} fd00::/8"}, ["trusted: fd00::/8 is not loaded"]),
        ({}, ["trusted: fd00::/8 is loaded"]),
        ({"kinds": "253"}, ["kinds: 254 is loaded"]),
        ({"kinds": "200 253"}, ["kinds: 200 is not loaded"]),
        ({"kinds": "200 253", "carrier": "no"}, ["carrier: yes is loaded"]),
        (
            {"kinds": "253", "trusted": f"{DEFAULT} 10.1.0.0/16 fd00::/8"},
            [
                "carrier: yes is not loaded",
                "trusted: 10.1.0.0/16 is not loaded",
                "trusted: fd00::/8 is not loaded",
                "kinds: 200 is loaded",
            ],
        ),
    ]
    assert room.toa_bpf("check").err == ""
    for values, differs in steps:
        room.write(**values)
        done = room.toa_bpf("check", check=False)
        ends = [f"by {CONFIG} it should {'' if ' not ' in each else 'not '}be: toa-bpf load" for each in differs]
        lines = [f"toa-bpf: {each}; {end}" for each, end in zip(differs, ends, strict=True)]
        assert (done.status, done.err.splitlines()) == (0, lines)
        room.toa_bpf("load")
        assert room.toa_bpf("check").err == ""


def test_a_wrong_configuration_changes_nothing(room: BpfRoom) -> None:
    room.guest.write(
        CONFIG,
        "trusted = 10.0.0.1/8, 10.0.0.0/33 host ::ffff:10.0.0.0/104 ::ffff:10.0.0.1\nkinds = 254 2 x 256\n"
        "carrier = maybe\n\nthrusted = 10.0.0.0/8\n"
        "cgroup = here\nwords # a comment\nkinds = 200\n",
    )
    for command in ("check", "load"):
        done = room.toa_bpf(command, check=False)
        assert done.status == 1
        places = re.findall(r"toa-bpf\.conf:(\d+): ", done.err)
        assert places == ["1"] * 5 + ["2"] * 3 + ["3", "5", "6", "7", "8"], done.err
        assert ":8: kinds is in line 2 already" in done.err
        assert ": write 10.0.0.0/8\n" in done.err and ": write 10.0.0.1/32\n" in done.err
    app = room.app(4)
    shows(app, room.peer.call(4).open(named(CLIENT[4])), CLIENT[4])


@pytest.mark.parametrize("place", ["/proc", "/nowhere"])
def test_a_wrong_cgroup_changes_nothing(room: BpfRoom, place: str) -> None:
    """Neither whom one believes, nor which kinds of option count."""
    told = "no cgroup of version 2" if place == "/proc" else "No such file or directory"
    room.guest.write(CONFIG, f"trusted = {FAR[4]}\nkinds = 200\ncgroup = {place}\n")
    for command in ("check", "load"):
        done = room.toa_bpf(command, check=False)
        assert (done.status, "toa-bpf.conf:3: " in done.err, told in done.err) == (1, True, True)
    app = room.app(4)
    shows(app, room.peer.call(4).open(named(CLIENT[4])), CLIENT[4])
    shows(app, room.peer.call(4, source=FAR[4]).open(named(CLIENT[4])))
    room.toa_bpf("unload")
    assert room.toa_bpf("load", check=False).status == 1
    assert room.guest.ask("listing", path="/sys/fs/bpf") == []


def test_a_load_that_fails_leaves_nothing(room: BpfRoom) -> None:
    """A part of the programs would be a server that says that it is loaded, and shows nobody."""
    room.toa_bpf("unload")
    room.guest.call("sockops:alone", cgroup="/sys/fs/cgroup", there=True)
    failed = room.toa_bpf("load", check=False)
    listing = room.guest.ask("listing", path="/sys/fs/bpf")
    room.guest.call("sockops:alone", cgroup="/sys/fs/cgroup", there=False)
    assert (failed.status, "attaching toa_sockops to /sys/fs/cgroup: " in failed.err) == (1, True)
    assert listing == []
    room.toa_bpf("load")
    room.toa_bpf("stats")


def test_what_cannot_be_read_is_no_empty_file(room: BpfRoom) -> None:
    """Which would say that the defaults hold."""
    room.trust(FAR[4])
    room.guest.write("/tmp/zeros", "\0" * 100)  # noqa: S108  the guest's
    for file, told in (("/etc", "/etc:1: Is a directory"), ("/tmp/zeros", "/tmp/zeros:1: this is no text")):  # noqa: S108
        for command in ("check", "load"):
            done = room.guest.run("toa-bpf", "-c", file, command, check=False, seconds=20)
            assert (done.status, told in done.err) == (1, True)
    app = room.app(4)
    shows(app, room.peer.call(4).open(named(CLIENT[4])))
    shows(app, room.peer.call(4, source=FAR[4]).open(named(CLIENT[4])), CLIENT[4])


def test_without_the_option_for_the_carrier(room: BpfRoom) -> None:
    """Then getsockopt() passes through no program; the pinned link of an earlier load goes."""
    assert "link_toa_getsockopt" in room.guest.ask("listing", path=PINS)
    room.configure(carrier="no")
    assert "link_toa_getsockopt" not in room.guest.ask("listing", path=PINS)
    app = room.app(4)
    call = room.peer.call(4).open(named(CLIENT[4]))
    call.say()
    assert app.says()[0] == f"accept {CLIENT[4]} {CPORT}"


def test_beside_the_module(room: BpfRoom, guest: Guest) -> None:
    """Both know the client, and neither spoils it for the other."""
    if guest.run("modprobe", "toa", check=False, seconds=20).status != 0:
        pytest.skip(f"{guest.kernel.title} has no module toa")
    app = room.app(6)
    for family in FAMILIES:
        shows(app, room.peer.call(family).open(named(CLIENT[family])), CLIENT[family], six=True)
    guest.run("rmmod", "toa")


def test_a_namespace_ends_with_named_connections(room: BpfRoom, lab: Lab) -> None:
    app = room.app(6)
    for family in FAMILIES:
        shows(app, room.peer.call(family).open(named(CLIENT[family])), CLIENT[family], six=True)
    server: Namespace = room.server
    app.job.stop()
    lab.remove(server)
