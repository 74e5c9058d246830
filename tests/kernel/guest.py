"""Runs as process 1 on a kernel under test: tries every forwarding method on every way into IPVS, and says what it saw.

The root file system is the kernel's build root, which has only Debian's python3-minimal; so this file imports little
and speaks netlink by hand. Each line `NAME VALUE` of the file on the second share is an observation (a Python literal);
judging them is left to the tests on the other side. The console would not do: the kernel writes in the midst of lines.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import subprocess  # noqa: TID251  this is the guest: pipeline/run.py is not here
import time
import traceback

SHARE = "/mnt"
RESULTS = "/tmp/results/observed"  # noqa: S108  the guest's own mount point
SCHEDULERS = ("rr", "wrr", "lc", "wlc", "fo", "ovf", "lblc", "lblcr", "dh", "sh", "mh", "sed", "nq", "twos")
# Besides IPVS: one of each kind that the fragments promise as a module.
MODULES = (
    "ip_vs_ftp", "ip_vs_pe_sip", "ipt_SYNPROXY", "ip6t_SYNPROXY", "nft_synproxy", "nf_tables", "ip_set_hash_net",
    "xt_ipvs", "virtio_net", "vmxnet3", "igb", "ixgbe", "i40e", "iavf", "ice", "mlx5_core", "bnxt_en", "ena", "tg3",
    "bonding", "vrf", "vxlan", "ipip", "tcp_bbr", "tls", "sch_netem", "dummy",
)  # fmt: skip
METHODS = range(8)  # the field has three bits

VIP4, RS4 = "192.0.2.1", "192.0.2.10"
VIP6, RS6 = "2001:db8::1", "2001:db8::10"

# include/uapi/linux/ip_vs.h
NEW_SERVICE, NEW_DEST, SET_DEST, DEL_DEST, GET_DEST, NEW_DAEMON, FLUSH = 1, 5, 6, 7, 8, 9, 17
ATTR_SERVICE, ATTR_DEST, ATTR_DAEMON = 1, 2, 3
DEST_FWD_METHOD = 3
LAST_PORT = 3000  # of the connection that ends the sync messages
SO_BASE = 64 + 1024 + 64
SO_ADD, SO_FLUSH, SO_ADDDEST, SO_DELDEST, SO_EDITDEST = (SO_BASE + n for n in (2, 5, 7, 8, 9))


def say(name: str, value: object) -> None:
    """Report one observation."""
    with open(RESULTS, "a", encoding="utf-8") as results:
        results.write(f"{name} {value!r}\n")


def name_of(error: int) -> str:
    """`EINVAL`, or `ok` for 0."""
    return errno.errorcode.get(error, str(error)) if error else "ok"


# --- generic netlink


def attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by number; a number that repeats keeps its last value."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


class Netlink:
    """A generic netlink socket that knows the number of the family IPVS."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)
        self.socket.settimeout(10)
        self.family = 16
        _, replies = self.call(3, attribute(2, b"IPVS\0"))
        self.family = struct.unpack("=H", attributes(replies[0])[1])[0]

    def call(self, command: int, payload: bytes, *, dump: bool = False) -> tuple[int, list[bytes]]:
        """Send one request; returns the error number (0 for none) and the payloads of the answers."""
        flags = 1 | (0x300 if dump else 4)
        body = struct.pack("=BBH", command, 1, 0) + payload
        self.socket.send(struct.pack("=IHHII", 16 + len(body), self.family, flags, 1, 0) + body)
        replies: list[bytes] = []
        while True:
            data = self.socket.recv(65536)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                message, data = data[16:length], data[(length + 3) & ~3 :]
                if kind in (2, 3):  # NLMSG_ERROR is the acknowledgement too
                    return (-struct.unpack_from("=i", message)[0] if kind == 2 else 0), replies
                replies.append(message[4:])


def packed(address: str) -> bytes:
    """An address as IPVS takes it: 16 bytes."""
    return socket.inet_pton(family(address), address).ljust(16, b"\0")


def family(address: str) -> int:
    """AF_INET or AF_INET6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def service(vip: str, port: int = 80) -> bytes:
    """The attribute that names, and where need be describes, a virtual service."""
    six = family(vip) == socket.AF_INET6
    fields = [
        (1, struct.pack("=H", family(vip))),
        (2, struct.pack("=H", socket.IPPROTO_TCP)),
        (3, packed(vip)),
        (4, struct.pack("!H", port)),
        (6, b"rr\0"),
        (7, struct.pack("=II", 0, 0xFFFFFFFF)),
        (8, struct.pack("=I", 0)),
        (9, struct.pack("=I", 128 if six else 0xFFFFFFFF)),
    ]
    return attribute(ATTR_SERVICE, b"".join(attribute(k, v) for k, v in fields))


def destination(address: str, method: int, port: int = 80) -> bytes:
    """The attribute that describes a destination."""
    fields = [
        (1, packed(address)),
        (2, struct.pack("!H", port)),
        (DEST_FWD_METHOD, struct.pack("=I", method)),
        (4, struct.pack("=I", 1)),
        (5, struct.pack("=I", 0)),
        (6, struct.pack("=I", 0)),
        (11, struct.pack("=H", family(address))),
    ]
    return attribute(ATTR_DEST, b"".join(attribute(k, v) for k, v in fields))


def method_kept(netlink: Netlink, vip: str) -> list[int]:
    """The forwarding methods of a service's destinations, as the kernel lists them."""
    _, replies = netlink.call(GET_DEST, service(vip), dump=True)
    return [struct.unpack("=I", attributes(attributes(reply)[ATTR_DEST])[DEST_FWD_METHOD])[0] for reply in replies]


def try_netlink(netlink: Netlink, label: str, vip: str, real: str) -> None:
    """Add and edit a destination with every method."""
    say(f"netlink.{label}.service", name_of(netlink.call(NEW_SERVICE, service(vip))[0]))
    added, edited, listed, kept = {}, {}, {}, {}
    for method in METHODS:
        request = service(vip) + destination(real, method)
        added[method] = name_of(netlink.call(NEW_DEST, request)[0])
        listed[method] = method_kept(netlink, vip)
        netlink.call(DEL_DEST, request)
    netlink.call(NEW_DEST, service(vip) + destination(real, 0))
    for method in METHODS:
        edited[method] = name_of(netlink.call(SET_DEST, service(vip) + destination(real, method))[0])
        kept[method] = method_kept(netlink, vip)
        netlink.call(SET_DEST, service(vip) + destination(real, 0))
    say(f"netlink.{label}.added", added)
    say(f"netlink.{label}.listed", listed)
    say(f"netlink.{label}.edited", edited)
    say(f"netlink.{label}.kept", kept)
    netlink.call(FLUSH, b"")


# --- socket options


def option(raw: socket.socket, number: int, method: int = 0) -> str:
    """Set one of IPVS' socket options about the IPv4 service and its destination."""
    vip, real = socket.inet_aton(VIP4), socket.inet_aton(RS4)
    data = struct.pack("=H2x4s2s2xI16sIII", 6, vip, struct.pack("!H", 80), 0, b"rr", 0, 0, 0xFFFFFFFF)
    if number in (SO_ADDDEST, SO_DELDEST, SO_EDITDEST):
        data += struct.pack("=4s2s2xIiII", real, struct.pack("!H", 80), method, 1, 0, 0)
    try:
        raw.setsockopt(socket.IPPROTO_IP, number, b"" if number == SO_FLUSH else data)
    except OSError as error:
        return name_of(error.errno or -1)
    return "ok"


def try_options(netlink: Netlink) -> None:
    """The same by the old interface, which ipvsadm uses where netlink is missing."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        say("option.service", option(raw, SO_ADD))
        added, edited, kept = {}, {}, {}
        for method in METHODS:
            added[method] = option(raw, SO_ADDDEST, method)
            option(raw, SO_DELDEST, method)
        option(raw, SO_ADDDEST, 0)
        for method in METHODS:
            edited[method] = option(raw, SO_EDITDEST, method)
            kept[method] = method_kept(netlink, VIP4)
            option(raw, SO_EDITDEST, 0)
        say("option.added", added)
        say("option.edited", edited)
        say("option.kept", kept)
        option(raw, SO_FLUSH)


# --- what becomes of packets


def interface(name: str, address: str) -> None:
    """Give an interface an address and set it up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        word = name.encode().ljust(16, b"\0")
        request = word + struct.pack("=H2s4s8x", socket.AF_INET, b"", socket.inet_aton(address))
        fcntl.ioctl(control, 0x8916, request)  # SIOCSIFADDR
        fcntl.ioctl(control, 0x8914, word + struct.pack("=H14x", 0x1043))  # SIOCSIFFLAGS: up, running, multicast


def try_client(netlink: Netlink) -> None:
    """A client's SYN for a destination whose method is unknown: does a local listener get it?"""
    netlink.call(NEW_SERVICE, service(VIP4))
    error = netlink.call(NEW_DEST, service(VIP4) + destination(RS4, 6))[0]
    with socket.create_server((VIP4, 80)) as listener:
        listener.settimeout(3)
        with socket.socket() as client:
            client.settimeout(3)
            try:
                client.connect((VIP4, 80))
                listener.accept()[0].close()
                reached = True
            except OSError:
                reached = False
    say("client.reaches_local_listener", reached if not error else None)
    netlink.call(FLUSH, b"")


def synced_ports() -> list[int]:
    """The client ports of the connections that came from a master."""
    with open("/proc/net/ip_vs_conn_sync", encoding="ascii") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return sorted(int(row[2], 16) for row in rows if row[8] == "SYNC")


def try_sync(netlink: Netlink) -> None:
    """What a backup makes of connections with every method, in both versions of the protocol."""
    daemon = [(1, struct.pack("=I", 2)), (2, b"dummy0\0"), (3, struct.pack("=I", 0))]
    body = b"".join(attribute(kind, value) for kind, value in daemon)
    say("sync.backup", name_of(netlink.call(NEW_DAEMON, attribute(ATTR_DAEMON, body))[0]))
    client, vip, real = (socket.inet_aton(a) for a in ("198.51.100.1", VIP4, RS4))
    one = zero = b""
    for method in METHODS:
        ports = struct.pack("!HHH", 1000 + method, 80, 80)
        one += struct.pack("!BBHIH", 0, 6, 36, method, 1) + ports + struct.pack("!II", 0, 60) + client + vip + real
        ports = struct.pack("!HHH", 2000 + method, 80, 80)
        zero += struct.pack("!BB", 0, 6) + ports + client + vip + real + struct.pack("!HH", method, 1)
    ports = struct.pack("!HHH", LAST_PORT, 80, 80)
    last = struct.pack("!BB", 0, 6) + ports + client + vip + real + struct.pack("!HH", 0, 1)
    messages = (
        struct.pack("!BBHBbH", 0, 0, 8 + len(one), len(METHODS), 1, 0) + one,
        struct.pack("!BBH", len(METHODS), 0, 4 + len(zero)) + zero,
        struct.pack("!BBH", 1, 0, 4 + len(last)) + last,
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as master:
        master.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(VIP4))
        for message in messages:
            master.sendto(message, ("224.0.0.81", 8848))
    # One thread reads the messages in their order: when the last one has arrived, the others have.
    for _ in range(100):
        if LAST_PORT in synced_ports():
            break
        time.sleep(0.1)  # noqa: TID251  the guest's own poll, with an end
    say("sync.connections", synced_ports())


def modprobe(name: str) -> str:
    """Load a module; "ok" or what modprobe says."""
    done = subprocess.run(["/sbin/modprobe", "-d", SHARE, name], capture_output=True, text=True, check=False)
    return "ok" if done.returncode == 0 else done.stderr.strip()


def observe() -> None:
    """All of it."""
    release = os.uname().release
    say("uname", release)
    with open("/proc/version", encoding="ascii") as version:
        say("version", version.read().strip())
    with open("/tmp/modprobe", "w", encoding="ascii") as wrapper:  # noqa: S108  the guest's own
        wrapper.write(f'#!/bin/sh\nexec /sbin/modprobe -d {SHARE} "$@"\n')
    os.chmod("/tmp/modprobe", 0o755)  # noqa: S103, S108
    with open("/proc/sys/kernel/modprobe", "w", encoding="ascii") as setting:
        setting.write("/tmp/modprobe")  # noqa: S108
    say("ip_vs", modprobe("ip_vs"))
    say("schedulers", {name: modprobe(f"ip_vs_{name}") for name in SCHEDULERS})
    say("modules", {name: modprobe(name) for name in MODULES})
    say("btf", os.path.getsize("/sys/kernel/btf/vmlinux") if os.path.exists("/sys/kernel/btf/vmlinux") else 0)
    netlink = Netlink()
    interface("lo", "127.0.0.1")
    interface("dummy0", VIP4)
    try_netlink(netlink, "ipv4", VIP4, RS4)
    try_netlink(netlink, "ipv6", VIP6, RS6)
    try_options(netlink)
    try_client(netlink)
    try_sync(netlink)


if __name__ == "__main__":
    try:
        observe()
    except BaseException:
        say("failure", traceback.format_exc())
    say("end", True)
    with open("/proc/sysrq-trigger", "w", encoding="ascii") as trigger:
        trigger.write("o")
    while True:
        time.sleep(1)  # noqa: TID251  process 1 may not end
