"""What every receiver of TOA does, the module and the programs of BPF: tests for both, inherited by test_toa_*.py."""

from __future__ import annotations

import hashlib
import hmac
import struct

import pytest

from tests.kernel import packets
from tests.kernel.lab import Lab, Namespace
from tests.kernel.machine import Guest
from tests.kernel.naming import (
    ANY,
    CLIENT,
    CPORT,
    DEFAULT,
    FAR,
    MSS,
    NEAR,
    SERVER,
    Call,
    Room,
    capable,
    mapping,
    named,
    option,
    shows,
)  # fmt: skip
from tests.kernel.topology import FAMILIES


def mount_for_bpf(guest: Guest) -> None:
    """The file systems that systemd would have mounted."""
    mounts = guest.read("/proc/mounts")
    for kind, place in (("cgroup2", "/sys/fs/cgroup"), ("bpf", "/sys/fs/bpf")):
        if f" {place} " not in mounts:
            guest.run("mount", "-t", kind, kind, place)


def multipath(room: Room, family: int, toa: bytes) -> tuple[Call, int, int]:
    """A connection of MPTCP that has an option in the handshake's ACK and has asked `m` and `n`; our key and theirs."""
    call = room.peer.call(family)
    ours = int.from_bytes(hashlib.sha256(str(call).encode()).digest()[:8], "big")
    answer = call.knock(packets.options(packets.mss(1460), capable(4)))
    theirs = struct.unpack("!Q", answer.options[30][2:10])[0]
    call.send("A", option=packets.options(capable(20, ours, theirs), toa))
    call.say(b"mn", packets.options(capable(22, ours, theirs, data=2)))
    return call, ours, theirs


def joined(server: Namespace) -> int:
    """How many subflows have joined connections of MPTCP."""
    rows = [row.split() for row in server.read("/proc/net/netstat").splitlines()]
    names, values = (row for row in rows if row[0] == "MPTcpExt:")
    return int(dict(zip(names, values, strict=True))["MPJoinAckRx"])


class Scenarios:
    """A fixture `room` says which receiver it is."""

    @pytest.mark.parametrize("kind", [253, 254])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_client_is_shown(self, room: Room, family: int, kind: int) -> None:
        app = room.app(family)
        shows(app, room.peer.call(family).open(named(CLIENT[family], kind=kind)), CLIENT[family])
        stats = room.stats()
        assert {name: count for name, count in stats.items() if count} == {"syn_recv_sock_toa": 1, "getname_toa_ok": 2}

    @pytest.mark.parametrize("family", FAMILIES)
    def test_without_the_option_it_is_the_peer(self, room: Room, family: int) -> None:
        app = room.app(family)
        shows(app, room.peer.call(family).open())
        stats = room.stats()
        assert {n: count for n, count in stats.items() if count} == {"syn_recv_sock_no_toa": 1, "getname_toa_empty": 2}

    def test_a_dual_stack_listener(self, room: Room) -> None:
        """As Java and Go have it: IPv4 arrives at an AF_INET6 socket."""
        app = room.app(6)
        shows(app, room.peer.call(4).open(named(CLIENT[4])), CLIENT[4], six=True)
        shows(app, room.peer.call(6).open(named(CLIENT[6])), CLIENT[6])
        shows(app, room.peer.call(4).open(), six=True)

    def test_a_listener_for_ipv6_only(self, room: Room) -> None:
        app = room.app(6, only_six=True)
        shows(app, room.peer.call(6).open(named(CLIENT[6])), CLIENT[6])

    def test_the_other_family(self, room: Room) -> None:
        """An IPv4 client can be shown everywhere; an IPv6 one not on an AF_INET socket."""
        six, four = room.app(6), room.app(4, 81)
        shows(six, room.peer.call(6).open(named(CLIENT[4])), CLIENT[4])
        shows(six, room.peer.call(4).open(named(CLIENT[6])), CLIENT[6], six=True)
        shows(four, room.peer.call(4, port=81).open(named(CLIENT[6])))
        assert room.stats()["getname_toa_mismatch"] == 2

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_lost_handshake_ack(self, room: Room, family: int) -> None:
        """The first data makes the connection; so does data with FIN, which is all that some clients send."""
        app = room.app(family)
        for flags in ("PA", "PFA"):
            call = room.peer.call(family)
            call.knock()
            call.say(b"n", named(CLIENT[family]), flags)
            name = f"{CLIENT[family]} {CPORT}"
            assert app.says(2) == [f"accept {name}", f"name {name} carrier {call}"]
        assert room.stats()["syn_recv_sock_toa"] == 2

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_late_handshake_ack(self, room: Room, family: int) -> None:
        """Data overtakes the ACK, and not even the first of it."""
        app = room.app(family)
        call = room.peer.call(family)
        call.knock()
        call.send("PA", seq=call.seq + 1, data=b"n", option=named(CLIENT[family]))
        assert app.says() == [f"accept {CLIENT[family]} {CPORT}"]
        call.send("A", option=named(CLIENT[family]))
        call.send("PA", data=b"n", option=named(CLIENT[family]))
        assert app.says(2) == [f"name {CLIENT[family]} {CPORT} carrier {call}"] * 2

    @pytest.mark.parametrize("family", FAMILIES)
    def test_defer_accept(self, room: Room, family: int) -> None:
        app = room.app(family, defer=True)
        call = room.peer.call(family).open(named(CLIENT[family]))
        assert app.silent()
        call.say(b"n", named(CLIENT[family]))
        assert app.says(2)[0] == f"accept {CLIENT[family]} {CPORT}"
        assert room.stats()["syn_recv_sock_toa"] == 1

    @pytest.mark.parametrize("six_socket", [False, True], ids=["own-family", "dual-stack"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_syn_cookies(self, room: Room, family: int, six_socket: bool) -> None:
        room.server.sysctl("net.ipv4.tcp_syncookies", 2)
        app = room.app(6 if six_socket else family)
        shows(app, room.peer.call(family).open(named(CLIENT[family])), CLIENT[family], six=six_socket or family == 6)
        shows(app, room.peer.call(family).open(), six=six_socket or family == 6)
        ext = room.server.read("/proc/net/netstat").splitlines()
        row = dict(zip(ext[0].split(), ext[1].split(), strict=True))
        assert row["SyncookiesRecv"] == "2"

    @pytest.mark.parametrize("family", FAMILIES)
    def test_an_option_on_a_syn_is_none(self, room: Room, family: int) -> None:
        """Port 63881 is the magic number of experimental Fast Open."""
        room.server.sysctl("net.ipv4.tcp_fastopen", 0x203)
        app = room.app(family, fastopen=True)
        call = room.peer.call(family)
        call.knock(packets.options(packets.mss(1460), option(CLIENT[family], 63881)))
        call.send("A")
        shows(app, call)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_carrier_in_a_buffer_that_is_too_small(self, room: Room, family: int) -> None:
        """It is cut. A program of BPF cannot say of how much."""
        app = room.app(family)
        call = room.peer.call(family).open(named(CLIENT[family]))
        call.say(b"c")
        size = {4: 16, 6: 28}[family]
        whole, cut = ([size] * 5, [size, size, size - 1, 3, 0])
        assert app.says(2)[1] in [f"lengths {' '.join(map(str, lengths))}" for lengths in (whole, cut)]

    def test_a_carrier_on_the_same_link(self, room: Room) -> None:
        """Its address means nothing without the device."""
        room.server.ip("addr add fe80::11/64 dev eth0 nodad")
        found = room.server.call("toa:scopes", address="fe80::11", device="eth0")
        assert set(found) == {"connected", "accepted"}
        for name, told in found.values():
            assert told == name and not name.endswith(" 0")

    @pytest.mark.parametrize("family", FAMILIES)
    def test_nobody_carries_what_is_not_connected(self, room: Room, family: int) -> None:
        """Kernels that do not know the option say so."""
        found = room.server.call("toa:carriers", address=SERVER[family], nobody=NEAR[family])
        assert found.pop("connected").startswith(f"{SERVER[family]} ")
        of_tcp = {found.pop(state) for state in ("new", "connecting", "listening", "reset")}
        assert of_tcp in ({"ENOTCONN"}, {"ENOPROTOOPT"})
        assert set(found) == {"datagram", "raw"}
        assert set(found.values()) <= {"ENOPROTOOPT", "EOPNOTSUPP", "ENOTSUP"}, "two names of one of them"

    def test_reuseport(self, room: Room) -> None:
        app = room.app(6, listeners=4)
        for _ in range(8):
            for family in FAMILIES:
                shows(app, room.peer.call(family).open(named(CLIENT[family])), CLIENT[family], six=True)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("flags", ["A", "PA", "PFA"])
    def test_a_later_segment(self, room: Room, family: int, flags: str) -> None:
        """Where the first one had no room: a bare ACK, data, data with FIN."""
        app = room.app(family)
        call = room.peer.call(family).open()
        call.say()
        assert app.says(2) == [f"accept {call}", f"name {call} carrier {call}"]
        if flags == "A":
            call.send("A", option=named(CLIENT[family]))
            call.say()
        else:
            call.say(b"n", named(CLIENT[family]), flags)
        assert app.says() == [f"name {CLIENT[family]} {CPORT} carrier {call}"]
        stats = room.stats()
        assert (stats["syn_recv_sock_no_toa"], stats["later_segment_toa"], stats["syn_recv_sock_toa"]) == (1, 1, 0)

    def test_out_of_order_data_names_the_client(self, room: Room) -> None:
        app = room.app(4)
        call = room.peer.call(4).open()
        call.say()
        app.says(2)
        call.send("PA", seq=call.seq + 5, data=b"n", option=named(CLIENT[4]))
        call.say()
        assert app.says() == [f"name {CLIENT[4]} {CPORT} carrier {call}"]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_first_name_counts(self, room: Room, family: int) -> None:
        """In one segment, and in the next ones."""
        other = {4: "198.51.100.99", 6: "2001:db8:1::99"}[family]
        app = room.app(family)
        call = room.peer.call(family).open(named(CLIENT[family], *([other] if family == 4 else [])))
        call.say(b"n", named(other))
        call.say(b"n", named(other))
        name = f"{CLIENT[family]} {CPORT}"
        assert app.says(3) == [f"accept {name}"] + [f"name {name} carrier {call}"] * 2

    def test_among_other_options(self, room: Room) -> None:
        """With timestamps that are in use, at every alignment, before and after; broken ones end the search."""
        app = room.app(4)
        toa, name = option(CLIENT[4]), f"{CLIENT[4]} {CPORT}"
        for before in range(4):
            call = room.peer.call(4)
            heard = call.knock(packets.options(packets.mss(1460), packets.SACK_PERMITTED, packets.timestamp(77, 0)))
            assert heard.timestamps
            stamp = packets.timestamp(78, heard.timestamps[0])
            call.send("A", option=packets.options(packets.NOPS * before, toa, packets.NOPS, stamp))
            call.say(b"n", packets.options(packets.NOPS * 2, stamp))
            assert app.says(2) == [f"accept {name}", f"name {name} carrier {call}"]
        for broken in (b"\x02\x00", b"\x02\x01", b"\x05\xff", b"\x00"):
            call = room.peer.call(4).open(packets.options(broken, toa))
            shows(app, call)
        for cut in (b"\xfe", b"\xfe\x08", toa[:7], b"\xfe\x07" + toa[2:7], b"\xfe\x09" + toa[2:] + b"\1"):
            option_ = packets.NOPS * (-len(cut) % 4) + cut
            shows(app, room.peer.call(4).open(option_))

    @pytest.mark.parametrize(
        "nobody",
        [ANY[4], "127.1.2.3", "224.0.0.5", "255.255.255.255", "::", "::1", "ff02::1"]
        + [f"::ffff:{address}" for address in (ANY[4], "127.1.2.3", "224.0.0.5", "255.255.255.255")],
    )
    def test_who_cannot_be_a_client(self, room: Room, nobody: str) -> None:
        app = room.app(6)
        shows(app, room.peer.call(6).open(named(nobody)))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_mapped_client_is_one_of_ipv4(self, room: Room, family: int) -> None:
        """Else it could not be shown on a socket of IPv4."""
        app = room.app(family)
        shows(app, room.peer.call(family).open(named(f"::ffff:{CLIENT[4]}")), CLIENT[4])

    @pytest.mark.parametrize("later", [False, True], ids=["handshake", "later"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_mptcp(self, room: Room, family: int, later: bool) -> None:
        """The option comes on the subflow, the application has the socket of the connection."""
        app = room.app(family, mptcp=True)
        toa = option(CLIENT[family])
        call, mine, _ = multipath(room, family, b"" if later else toa)
        first = str(call) if later else f"{CLIENT[family]} {CPORT}"
        assert app.says(3) == [f"accept {first}", "mptcp 1", f"name {first} carrier {call}"]
        if later:
            call.send("A", option=packets.options(toa))
            call.say(b"n", packets.options(mapping(mine, 3, 1)))
            assert app.says() == [f"name {CLIENT[family]} {CPORT} carrier {call}"]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_subflow_that_joins_renames_nobody(self, room: Room, family: int) -> None:
        """Its option is one of IPv4: beside the join there is no room for the other."""
        app = room.app(family, mptcp=True)
        call, mine, theirs = multipath(room, family, option(CLIENT[family]))
        name = f"name {CLIENT[family]} {CPORT} carrier {call}"
        assert app.says(3)[2] == name
        token, nonce = hashlib.sha256(struct.pack("!Q", theirs)).digest()[:4], b"once"
        other = room.peer.call(family)
        answer = other.knock(packets.options(packets.mss(1460), bytes([30, 12, 0x10, 1]) + token + nonce))
        proof = hmac.digest(struct.pack("!QQ", mine, theirs), nonce + answer.options[30][10:14], "sha256")[:20]
        other.send("A", option=packets.options(bytes([30, 24, 0x10, 0]) + proof, option("198.51.100.99")))
        room.server.wait_until(lambda: joined(room.server) == 1, "the subflow that joins")
        call.say(b"n", packets.options(mapping(mine, 3, 1)))
        assert app.says() == [name]
        assert room.stats()["syn_recv_sock_toa"] == 2

    @pytest.mark.parametrize("family", FAMILIES)
    def test_tcp_at_an_mptcp_listener(self, room: Room, family: int) -> None:
        app = room.app(family, mptcp=True)
        shows(app, room.peer.call(family).open(named(CLIENT[family])), CLIENT[family])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_stranger_names_nobody(self, room: Room, family: int) -> None:
        app = room.app(family)
        call = room.peer.call(family, source=FAR[family]).open(named(CLIENT[family]))
        shows(app, call)
        call.say(b"n", named(CLIENT[family]))
        assert app.says() == [f"name {call} carrier {call}"]
        assert (room.stats()["untrusted_toa"], room.stats()["syn_recv_sock_no_toa"]) == (1, 1)
        room.trust(f"{FAR[4]}/32 {FAR[6]}")
        shows(app, room.peer.call(family, source=FAR[family]).open(named(CLIENT[family])), CLIENT[family])
        shows(app, room.peer.call(family).open(named(CLIENT[family])))

    def test_trust_is_asked_again_for_later_segments(self, room: Room) -> None:
        app = room.app(4)
        call = room.peer.call(4).open()
        room.trust("")
        call.send("A", option=named(CLIENT[4]))
        shows(app, call)
        room.trust(DEFAULT)
        call.say(b"n", named(CLIENT[4]))
        assert app.says() == [f"name {CLIENT[4]} {CPORT} carrier {call}"]

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("six_socket", [False, True], ids=["own-family", "dual-stack"])
    def test_a_disconnected_socket_forgets(self, room: Room, family: int, six_socket: bool) -> None:
        app = room.app(6 if six_socket else family)
        for word, wanted in ((b"d", "disconnected ENOTCONN, then the other"), (b"l", "listening the other")):
            call = room.peer.call(family).open(named(CLIENT[family]))
            call.send("PA", data=word)
            assert app.says(2)[1] == wanted

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_connection_that_the_server_makes(self, room: Room, family: int) -> None:
        """Whoever answers it cannot pretend to be somebody else."""
        job = room.server.start_call("toa:connect", address=NEAR[family], port=99, count=1, patience=20)
        wire = room.peer.wire
        syn = wire.expect(lambda p: p.protocol == packets.TCP and p.flags == "S", "the server's SYN")
        call = Call(room.peer, syn.ends.back)
        call.ack, call.seq = syn.seq + 1, 5000
        call.send("SA", option=packets.options(packets.mss(1400), option(CLIENT[family])) if family == 4 else MSS)
        call.seq += 1
        call.hears("PA")
        call.ack += 1
        call.send("PA", data=b"n", option=named(CLIENT[family]))
        job.wait()
        stats = room.stats()
        assert stats == dict.fromkeys(stats, 0)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_direct_clients(self, room: Room, lab: Lab, family: int) -> None:
        """With a stack, from another host."""
        friend = lab.namespace("friend")
        room.server.ip(f"link add eth1 type veth peer name eth0 netns {friend.handle}")
        ours, theirs = {4: ("192.168.9.1", "192.168.9.2"), 6: ("fd00:9::1", "fd00:9::2")}[family]
        length = {4: 24, 6: 64}[family]
        room.server.ip(f"addr add {ours}/{length} dev eth1", "link set eth1 up")
        friend.ip(f"addr add {theirs}/{length} dev eth0", "link set eth0 up")
        app = room.app(family)
        mine = friend.call("toa:connect", address=ours, port=80, count=5, patience=10, seconds=20)
        assert sorted(app.says(10)) == sorted([f"accept {m}" for m in mine] + [f"name {m} carrier {m}" for m in mine])
