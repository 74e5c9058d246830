"""The harness itself: that the machine does what the tests believe, and that what is wrong is found."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.store import Store
from pipeline.vm import Machine
from tests.kernel import machine, packets
from tests.kernel.conftest import Machines
from tests.kernel.lab import Lab
from tests.kernel.machine import Failed, Guest
from tests.kernel.packets import Ends, Offload, Packet
from tests.kernel.topology import FAMILIES, Connection, Site

pytestmark = [pytest.mark.build, pytest.mark.guest]

CLIENT = {4: "198.51.100.7", 6: "2001:db8:1::7"}
SERVER = {4: "192.0.2.1", 6: "2001:db8:8::1"}
MORE = {4: b"\1\1\1\0", 6: b"\1\4\0\0\0\0"}  # options that mean nothing


def _ends(family: int) -> Ends:
    return Ends(CLIENT[family], 40000, SERVER[family], 80)


def _samples(family: int) -> dict[str, bytes]:
    ends = _ends(family)
    odd = packets.options(packets.NOPS, packets.sack((1, 2), (0xFFFFFFFF, 5)), packets.timestamp(7, 8))
    syn = packets.options(packets.mss(1460), packets.SACK_PERMITTED, packets.timestamp(1, 0), packets.wscale(7))
    found = {
        "syn": packets.tcp(ends, "S", seq=0xFFFFFFFF, option=syn),
        "data": packets.tcp(ends, "PA", seq=5, ack=6, option=odd, data=b"abc"),
        "datagram": packets.udp(ends, b"abcde"),
        "empty datagram": packets.udp(ends),
        "more headers": packets.udp(ends, b"abcde", extra=MORE[family]),
    }
    found["too big"] = packets.frag_needed(SERVER[family], found["data"], 1400)
    found["refused"] = packets.port_unreachable(SERVER[family], found["datagram"])
    return found


def test_it_is_the_kernel_that_was_asked_for(guest: Guest) -> None:
    assert guest.ask("hello")["uname"] == guest.kernel.uname


def test_what_qemu_gets_wrong_is_left_to_programs(guest: Guest) -> None:
    if not isinstance(guest.machine, Machine) or guest.machine.accelerator.name != "tcg":
        pytest.skip("no guest of QEMU's TCG: its processor is the host's")
    flags = next(line for line in guest.read("/proc/cpuinfo").splitlines() if line.startswith("flags"))
    assert "cx8" in flags.split()
    assert "cx16" not in flags.split()
    assert guest.machine.cpu == "qemu64"  # which has it


# --- packets


@pytest.mark.parametrize("family", FAMILIES)
def test_scapy_agrees_about_packets(guest: Guest, family: int) -> None:
    for name, packet in _samples(family).items():
        assert guest.call("crafted:recomputed", packet=packet, seconds=20) == packet, name
        assert Packet(packet).problems() == [], name
    for name in ("syn", "data"):
        packet = _samples(family)[name]
        seen = guest.call("crafted:described", packet=packet)
        ours = Packet(packet)
        assert seen["ports"] == [ours.sport, ours.dport]
        assert (seen["seq"], seen["ack"], seen["payload"]) == (ours.seq, ours.ack, ours.payload)
        assert set(seen["flags"]) == set(ours.flags)
        options = dict(seen["options"])
        assert options.get("Timestamp") == repr(ours.timestamps)
        if name == "data":
            assert options["SAck"] == repr((1, 2, 0xFFFFFFFF, 5))
            assert ours.sacks == [(1, 2), (0xFFFFFFFF, 5)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_damaged_byte_is_found(guest: Guest, family: int) -> None:
    """All bytes that a checksum or a length covers; nothing covers the rest of IPv6 headers and of a quotation."""
    free = {0, 1, 2, 3, 7} if family == 6 else set()
    for name, packet in _samples(family).items():
        options = set(range(42, 48)) if family == 6 and name == "more headers" else set()
        for at in set(range(len(packet))) - free - options:
            damaged = bytearray(packet)
            damaged[at] ^= 0x10
            try:
                found = Packet(bytes(damaged)).problems()
            except (IndexError, ValueError, TypeError):
                continue
            assert found or (family == 6 and at == 6), f"{name}, byte {at}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_partial_checksum_is_found(guest: Guest, family: int) -> None:
    start = 20 if family == 4 else 40
    offload = Offload(packets.NEEDS_CSUM, start=start, offset=16)
    partial = packets.tcp(_ends(family), "A", data=b"x", partial=True)
    whole = packets.tcp(_ends(family), "A", data=b"x")
    assert Packet(partial).problems(offload) == []
    assert "the partial checksum is" in Packet(whole).problems(offload)[0]
    assert Packet(partial).problems() == ["the transport checksum is wrong"]
    misplaced = Offload(packets.NEEDS_CSUM, start=start + 4, offset=16)
    assert "the device would sum from" in Packet(partial).problems(misplaced)[0]


def test_a_wire_carries_what_it_is_given(lab: Lab) -> None:
    """Partial checksums and segmentation included, and both ends see the same bytes."""
    left, right = lab.namespace("left"), lab.namespace("right")
    left.ip(f"link add eth0 type veth peer name eth0 netns {right.handle}", "link set eth0 up")
    right.ip("link set eth0 up")
    here, there = left.wire("eth0"), right.wire("eth0")
    plain = packets.tcp(_ends(4), "S", seq=1)
    partial = packets.tcp(_ends(4), "A", data=b"x" * 4000, partial=True)
    offload = Offload(packets.NEEDS_CSUM, packets.GSO_TCPV4, head=40, size=1000, start=20, offset=16)
    here.send(plain, to=there.address)
    here.send(partial, to=there.address, offload=offload)
    with pytest.raises(Failed, match="not within"):
        there.expect(lambda p: p.dport == 81, "another port", 0.1)
    here.send(plain, to=there.address)
    here.send(partial, to=there.address, offload=offload)
    assert there.expect(lambda p: p.flags == "S", "the SYN").data == plain
    frames = [frame for frame in there.drain() if frame.ethertype == packets.IPV4]
    assert [frame.body for frame in frames] == [partial]
    assert replace(frames[0].offload, head=offload.head) == offload
    assert frames[0].problems() == []


# --- the machine


def test_a_command_that_fails_shows_its_output(lab: Lab) -> None:
    host = lab.namespace("host")
    with pytest.raises(Failed, match=r"(?s)ip netns exec .* \[status 3\].*out: said.*err: moaned"):
        host.run("sh", "-c", "echo said; echo moaned >&2; exit 3")
    with pytest.raises(Failed, match=r"(?s)no end within .* s:.*its time was over.*out: said"):
        host.run("sh", "-c", "echo said; sleep 1000", seconds=1 / host.guest.scale)
    with pytest.raises(Failed, match="no-such-program: No such file or directory"):
        host.run("no-such-program")
    assert host.run("true").status == 0


def test_jobs_end_with_the_test(guest: Guest) -> None:
    lab = Lab(guest)
    host = lab.namespace("host")
    job = host.start("sh", "-c", "sleep 1000 & sleep 1001")
    assert job.poll() is None
    lab.close()
    assert "sleep" not in guest.run("ps", "-eo", "args").out
    assert guest.ask("namespaces") == []


def test_namespaces_are_apart(lab: Lab) -> None:
    one, two = lab.namespace("one"), lab.namespace("two")
    one.ip("link add d0 type dummy")
    assert "d0" in one.run("ip", "link").out
    assert "d0" not in two.run("ip", "link").out
    one.sysctl("net.ipv4.ip_forward", 1)
    assert (one.sysctl("net.ipv4.ip_forward"), two.sysctl("net.ipv4.ip_forward")) == ("1", "0")


@pytest.mark.parametrize(
    "line",
    [
        "WARNING: CPU: 0 PID: 1 at net/core/x.c:1",
        "BUG: KASAN: slab-use-after-free in f+0x1/0x2",
        "WARNING: suspicious RCU usage",
        "ODEBUG: free active (active state 0) object type: timer_list",
        "unregister_netdevice: waiting for eth0 to become free. Usage count = 2",
        "eth0: hw csum failure",
        "kmemleak: 1 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
    ],
)
def test_a_report_in_the_log_is_found(guest: Guest, line: str) -> None:
    assert guest.alarms() == []
    guest.write("/dev/kmsg", f"<4>{line}\n")
    assert any(line in found for found in guest.alarms())
    guest.log.clear()  # or this test would fail for it, as it should


def test_ordinary_lines_are_no_report(guest: Guest) -> None:
    guest.write("/dev/kmsg", "<4>IPVS: no destination available\n")
    assert guest.alarms() == []
    assert "IPVS: no destination available" in "\n".join(guest.log)


def test_a_service_that_is_left_is_found(guest: Guest) -> None:
    """Also what keeps a namespace alive: here a process, in a lost reference it would be the kernel."""
    lab = Lab(guest)
    site = Site(lab, servers=0)
    site.balance(4, "-m")
    used = guest.modules()["ip_vs"]
    with pytest.raises(Exception, match="still hold services of IPVS"):
        lab.wait_for_empty_ipvs(1.0)
    lab.close()
    assert guest.modules()["ip_vs"] == used - 1


# User Mode Linux has no sysrq: there process 1 loses its program, and a kernel without that panics.
SPOIL = r"""
import re
with open("/proc/1/maps") as maps, open("/proc/1/mem", "r+b", 0) as memory:
    for start, end in re.findall(r"(?m)^(\w+)-(\w+) r-xp .*python", maps.read()):
        memory.seek(int(start, 16))
        memory.write(bytes(int(end, 16) - int(start, 16)))
"""


def test_a_dead_machine_says_what_killed_it(machines: Machines, tmp_path: Path) -> None:
    with machine.booted(machines.kernel, tmp_path, Store()) as guest:
        with pytest.raises(
            Failed, match=r"(?s)no longer answers.*sysrq triggered crash|no longer answers.*Kernel panic"
        ):
            crash = ["python3", "-c", SPOIL] if guest.kernel.debug else ["sh", "-c", "echo c >/proc/sysrq-trigger"]
            guest.run(*crash)
        with pytest.raises(Failed, match="the machine is gone"):
            guest.ask("hello")


def test_a_dead_process_says_what_killed_it(machines: Machines, tmp_path: Path) -> None:
    """So that a crash of the emulator is not looked for in the guest's kernel."""
    with machine.booted(machines.kernel, tmp_path, Store()) as guest:
        os.kill(guest.machine.process.pid, signal.SIGKILL)
        with pytest.raises(Failed, match=r"no longer answers \(hello.*\n.*its process was killed by SIGKILL"):
            guest.ask("hello")


def test_every_cpu_is_used(guest: Guest) -> None:
    """An emulated machine starts its kernel with one."""
    assert guest.read("/sys/devices/system/cpu/online") == guest.read("/sys/devices/system/cpu/possible")


def test_a_kept_machine_has_a_shell(machines: Machines, tmp_path: Path) -> None:
    """Where `keep` says, and after the block that the machine was made for."""
    with machine.booted(machines.kernel, tmp_path, Store(), may_keep=True) as guest:
        told, pid = guest.keep(), guest.machine.process.pid
    try:
        place = re.search(r"screen (\S+)|UNIX-CONNECT:(\S+)", told)
        assert place, told
        with socket.socket(socket.AF_UNIX) as link:
            if place[1]:
                line = os.open(place[1], os.O_RDWR | os.O_NOCTTY)
            else:
                link.connect(place[2])
                line = os.dup(link.fileno())
            for typed, wanted in ((b"\r", b"# "), (b"echo $((6 * 7))-said\r", b"42-said")):
                os.write(line, typed)
                said = b""
                while wanted not in said and select.select([line], [], [], 10 * guest.scale)[0]:
                    said += os.read(line, 4096)
                assert wanted in said, said
            os.close(line)
        assert f"kill {pid};" in told
    finally:
        guest.machine.process.end()
    assert guest.machine.process.poll() is not None


def test_requests_and_answers_of_any_size(guest: Guest) -> None:
    """The way to the agent may be a serial line, where some sizes are harder than others."""
    for size in (*range(900, 1000), 5000, 100_000):
        guest.write("/tmp/size", "x" * size)  # noqa: S108  the guest's
        assert len(guest.read("/tmp/size")) == size  # noqa: S108


def test_rows_of_the_connection_table() -> None:
    row = "TCP C0000201 D431 C6336401 0050 0A000002 0050 ESTABLISHED     899 - - 0A000005 1388"
    seen = Connection.parse(row)
    assert (seen.client, seen.cport, seen.vip, seen.vport) == ("192.0.2.1", 0xD431, "198.51.100.1", 80)
    assert (seen.server, seen.sport, seen.local, seen.lport) == ("10.0.0.2", 80, "10.0.0.5", 5000)
    assert (seen.state, seen.expires) == ("ESTABLISHED", 899)
    assert Connection.parse(row.partition(" - ")[0]).local == ""
