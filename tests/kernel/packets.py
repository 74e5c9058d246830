"""Packets as bytes: made, taken apart and verified on this side, so that a test decides about every bit of them.

Only what IPVS meets: Ethernet, IPv4, IPv6, TCP, UDP and ICMP errors. scapy reads what is made here in test_harness.py.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

IPV4, IPV6, VLAN = 0x0800, 0x86DD, 0x8100
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
FRAGMENT, DSTOPTS = 44, 60  # IPv6 extension headers
FLAGS = "FSRPAUEC"  # from the lowest bit up
# TCP options
END, NOP, MSS, WSCALE, SACK_OK, SACK, TIMESTAMP = 0, 1, 2, 3, 4, 5, 8
# linux/virtio_net.h; the kernel sends this header in the byte order of the machine
_VIRTIO = struct.Struct("<BBHHHH")
NEEDS_CSUM, DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4 = 0, 1, 4, 5


def family(address: str) -> int:
    """4 or 6."""
    return 6 if ":" in address else 4


def packed(address: str) -> bytes:
    """An address in network order."""
    return ipaddress.ip_address(address).packed


def total(data: bytes) -> int:
    """The ones' complement sum of 16-bit words, not complemented."""
    if len(data) % 2:
        data += b"\0"
    value: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def pseudo(source: bytes, target: bytes, protocol: int, length: int) -> bytes:
    """What a transport checksum covers besides the segment."""
    return source + target + struct.pack("!I", length) + struct.pack("!I", protocol)


# --- options


def mss(value: int) -> bytes:
    """Maximum segment size."""
    return struct.pack("!BBH", MSS, 4, value)


def wscale(shift: int) -> bytes:
    """Window scale."""
    return struct.pack("!BBB", WSCALE, 3, shift)


def timestamp(value: int, echo: int) -> bytes:
    """Timestamps."""
    return struct.pack("!BBII", TIMESTAMP, 10, value & 0xFFFFFFFF, echo & 0xFFFFFFFF)


def sack(*blocks: tuple[int, int]) -> bytes:
    """Selective acknowledgement; its alignment is what stands before it."""
    edges = [edge & 0xFFFFFFFF for block in blocks for edge in block]
    return struct.pack(f"!BB{len(edges)}I", SACK, 2 + 4 * len(edges), *edges)


SACK_PERMITTED = bytes([SACK_OK, 2])
NOPS = bytes([NOP])


def options(*parts: bytes) -> bytes:
    """Options one after the other exactly as given, filled up with END to a multiple of four."""
    joined = b"".join(parts)
    return joined + b"\0" * (-len(joined) % 4)


# --- making


def internet(
    source: str, target: str, protocol: int, payload: bytes, *, ttl: int = 64, df: bool = True, extra: bytes = b""
) -> bytes:
    """A whole IPv4 or IPv6 packet.

    Args:
        source, target: addresses.
        protocol: of the payload.
        payload: what it carries.
        ttl: the hop limit.
        df: of IPv4.
        extra: IPv4: options, a multiple of four bytes; IPv6: what a header of destination options holds, eight times n
            less two bytes.
    """
    if family(source) == 6:
        if extra:
            payload = bytes([protocol, (2 + len(extra)) // 8 - 1]) + extra + payload
            protocol = DSTOPTS
        head = struct.pack("!IHBB", 6 << 28, len(payload), protocol, ttl)
        return head + packed(source) + packed(target) + payload
    words = 5 + len(extra) // 4
    length = words * 4 + len(payload)
    head = struct.pack("!BBHHHBBH", 0x40 | words, 0, length, 0x1234, 0x4000 if df else 0, ttl, protocol, 0)
    head += packed(source) + packed(target) + extra
    return head[:10] + struct.pack("!H", ~total(head) & 0xFFFF) + head[12:] + payload


@dataclass(frozen=True)
class Ends:
    """Who speaks to whom; `back` is the other way."""

    source: str
    sport: int
    target: str
    dport: int

    @property
    def back(self) -> Ends:
        return Ends(self.target, self.dport, self.source, self.sport)


def tcp(
    ends: Ends,
    flags: str,
    *,
    seq: int = 0,
    ack: int = 0,
    window: int = 65535,
    option: bytes = b"",
    data: bytes = b"",
    partial: bool = False,
    ttl: int = 64,
    df: bool = True,
    extra: bytes = b"",
) -> bytes:
    """A TCP segment in its packet.

    Args:
        ends: addresses and ports.
        flags: letters of `FLAGS`.
        seq, ack, window: as they are on the wire.
        option: see `options`.
        data: the payload.
        partial: only the pseudo header is summed up, as for a device that does the rest.
        ttl, df, extra: of the packet, see `internet`.
    """
    bits = sum(1 << FLAGS.index(flag) for flag in flags)
    head = struct.pack("!HHII", ends.sport, ends.dport, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF)
    head += struct.pack("!BBHHH", (5 + len(option) // 4) << 4, bits, window, 0, 0) + option
    segment = _summed(ends, TCP, head + data, 16, partial)
    return internet(ends.source, ends.target, TCP, segment, ttl=ttl, df=df, extra=extra)


def udp(
    ends: Ends,
    data: bytes = b"",
    *,
    checksum: bool = True,
    partial: bool = False,
    ttl: int = 64,
    df: bool = True,
    extra: bytes = b"",
) -> bytes:
    """A UDP datagram in its packet; without `checksum` the field is 0, which IPv4 allows. The rest is as with `tcp`."""
    datagram = struct.pack("!HHHH", ends.sport, ends.dport, 8 + len(data), 0) + data
    if checksum:
        datagram = _summed(ends, UDP, datagram, 6, partial)
    return internet(ends.source, ends.target, UDP, datagram, ttl=ttl, df=df, extra=extra)


def error(source: str, target: str, kind: int, code: int, quoted: bytes, *, rest: int = 0, ttl: int = 64) -> bytes:
    """An ICMP error of the target's family about a packet; `rest` is the second word (a next-hop MTU)."""
    six = family(target) == 6
    body = struct.pack("!BBHI", kind, code, 0, rest) + quoted
    covered = pseudo(packed(source), packed(target), ICMPV6, len(body)) + body if six else body
    body = body[:2] + struct.pack("!H", ~total(covered) & 0xFFFF) + body[4:]
    return internet(source, target, ICMPV6 if six else ICMP, body, ttl=ttl)


def frag_needed(source: str, about: bytes, mtu: int) -> bytes:
    """The error of a router that may not fragment a packet, to the packet's sender."""
    packet = Packet(about)
    quoted = about[: 1280 - 48 if packet.version == 6 else 548]
    if packet.version == 6:
        return error(source, packet.source, 2, 0, quoted, rest=mtu)
    return error(source, packet.source, 3, 4, quoted, rest=mtu)


def port_unreachable(source: str, about: bytes) -> bytes:
    """The error of a host where nobody listens, to the packet's sender."""
    packet = Packet(about)
    six = packet.version == 6
    return error(source, packet.source, 1 if six else 3, 4 if six else 3, about[: 1280 - 48 if six else 548])


def _summed(ends: Ends, protocol: int, segment: bytes, at: int, partial: bool) -> bytes:
    head = pseudo(packed(ends.source), packed(ends.target), protocol, len(segment))
    value = total(head) if partial else ~total(head + segment) & 0xFFFF
    if protocol == UDP and value == 0:
        value = 0xFFFF
    return segment[:at] + struct.pack("!H", value) + segment[at + 2 :]


# --- taking apart


class Packet:
    """An IPv4 or IPv6 packet with what it carries; of extension headers only those that tests make."""

    def __init__(self, data: bytes) -> None:
        self.version = data[0] >> 4
        self.fragment = False
        if self.version not in (4, 6):
            raise ValueError(f"no IP packet: it begins with {data[:4].hex()}")
        if self.version == 6:
            length, self.protocol, self.ttl = struct.unpack("!HBB", data[4:8])
            self.header = 40
            self.data = data[: 40 + length] if length else data  # BIG TCP says 0
            self._addresses = (data[8:24], data[24:40])
            self.tos = (struct.unpack("!H", data[:2])[0] >> 4) & 0xFF
            self.df = True
            if self.protocol == FRAGMENT:
                self.fragment = True
                self.protocol = data[40]
                self.header = 48
            elif self.protocol == DSTOPTS:
                self.protocol = data[40]
                self.header = 48 + data[41] * 8
        else:
            self.header = (data[0] & 15) * 4
            self.tos, length, _, pieces, self.ttl, self.protocol = struct.unpack("!xBHHHBB", data[:10])
            self.data = data[:length] if length else data
            self._addresses = (data[12:16], data[16:20])
            self.df = bool(pieces & 0x4000)
            self.fragment = bool(pieces & 0x3FFF)
        self.length = length + (40 if self.version == 6 else 0)

    @property
    def source(self) -> str:
        """Where it comes from."""
        return str(ipaddress.ip_address(self._addresses[0]))

    @property
    def target(self) -> str:
        """Where it goes to."""
        return str(ipaddress.ip_address(self._addresses[1]))

    @property
    def extra(self) -> bytes:
        """IPv4 options, or the content of a header of IPv6 destination options."""
        return self.data[42 : self.header] if self.version == 6 else self.data[20 : self.header]

    @property
    def segment(self) -> bytes:
        """What follows the IP header."""
        return self.data[self.header :]

    @property
    def sport(self) -> int:
        """The source's port."""
        return int(struct.unpack("!H", self.segment[:2])[0])

    @property
    def dport(self) -> int:
        """The target's port."""
        return int(struct.unpack("!H", self.segment[2:4])[0])

    @property
    def ends(self) -> Ends:
        """Addresses and ports."""
        return Ends(self.source, self.sport, self.target, self.dport)

    @property
    def is_error(self) -> bool:
        """Whether it is an ICMP error."""
        if self.protocol == ICMP:
            return self.segment[0] in (3, 4, 5, 11, 12)
        return self.protocol == ICMPV6 and self.segment[0] < 128

    @property
    def icmp(self) -> tuple[int, int]:
        """An ICMP message's type and code."""
        return self.segment[0], self.segment[1]

    @property
    def mtu(self) -> int:
        """The next-hop MTU of an ICMP error."""
        return int(struct.unpack("!I", self.segment[4:8])[0])

    @cached_property
    def quoted(self) -> Packet:
        """The packet that an ICMP error is about; it may be cut."""
        return Packet(self.segment[8:])

    # -- TCP

    @property
    def seq(self) -> int:
        """The sequence number."""
        return int(struct.unpack("!I", self.segment[4:8])[0])

    @property
    def ack(self) -> int:
        """The acknowledged number."""
        return int(struct.unpack("!I", self.segment[8:12])[0])

    @property
    def flags(self) -> str:
        """Letters, in the order of `FLAGS`."""
        return "".join(flag for bit, flag in enumerate(FLAGS) if self.segment[13] >> bit & 1)

    @property
    def window(self) -> int:
        """The window as it is on the wire."""
        return int(struct.unpack("!H", self.segment[14:16])[0])

    @cached_property
    def option_bytes(self) -> bytes:
        """All options."""
        return self.segment[20 : (self.segment[12] >> 4) * 4]

    @cached_property
    def options(self) -> dict[int, bytes]:
        """The options' contents by kind."""
        found: dict[int, bytes] = {}
        rest = self.option_bytes
        while rest and rest[0] != END:
            if rest[0] == NOP:
                rest = rest[1:]
                continue
            length = rest[1]
            if not 2 <= length <= len(rest):
                raise ValueError(f"a TCP option of length {length}: {self}")
            found[rest[0]] = rest[2:length]
            rest = rest[length:]
        return found

    @property
    def mss(self) -> int | None:
        """The announced maximum segment size."""
        value = self.options.get(MSS)
        return None if value is None else int(struct.unpack("!H", value)[0])

    @property
    def timestamps(self) -> tuple[int, int] | None:
        """Value and echo."""
        value = self.options.get(TIMESTAMP)
        return None if value is None else struct.unpack("!II", value)

    @property
    def sacks(self) -> list[tuple[int, int]]:
        """Selectively acknowledged blocks."""
        data = self.options.get(SACK, b"")
        edges = struct.unpack(f"!{len(data) // 4}I", data)
        return list(zip(edges[::2], edges[1::2], strict=True))

    @property
    def payload(self) -> bytes:
        """What the program sent."""
        return self.segment[(self.segment[12] >> 4) * 4 :] if self.protocol == TCP else self.segment[8:]

    def __repr__(self) -> str:
        where = f"{self.source} > {self.target}"
        if self.fragment:
            return f"<{where} fragment of {self.protocol}, {self.length} bytes>"
        if self.protocol in (TCP, UDP) and len(self.segment) >= 8:
            where = f"{self.source}.{self.sport} > {self.target}.{self.dport}"
            if self.protocol == UDP or len(self.segment) < 20:
                return f"<{where} {'udp' if self.protocol == UDP else 'tcp, cut'} {len(self.segment) - 8}>"
            return f"<{where} {self.flags} seq {self.seq} ack {self.ack} {self.option_bytes.hex()} {len(self.payload)}>"
        if self.is_error:
            return f"<{where} icmp {self.icmp} {self.segment[4:8].hex()} about {self.quoted}>"
        return f"<{where} protocol {self.protocol}, {self.length} bytes>"

    # -- whether it is whole

    def problems(self, offload: Offload | None = None, *, cut: bool = False) -> list[str]:
        """What is wrong with lengths and checksums.

        Args:
            offload: what the kernel says about the packet's checksum and segmentation; without it all must be there.
            cut: it is a quotation, so its end may be missing: only the IP header is judged.
        """
        found = []
        if self.version == 4 and total(self.data[: self.header]) != 0xFFFF:
            found.append("the IP header's checksum is wrong")
        if not cut and self.length != len(self.data):
            found.append(f"the IP header says {self.length} bytes, there are {len(self.data)}")
        if cut or self.fragment:
            return found
        at = {TCP: 16, UDP: 6, ICMPV6: 2}.get(self.protocol)
        if len(self.segment) < (at or 2) + 2:
            return [*found, "the header of what it carries is cut"]
        if self.protocol == ICMP and total(self.segment) != 0xFFFF:
            found.append("the ICMP checksum is wrong")
        if self.protocol in (TCP, UDP, ICMPV6):
            head = pseudo(*self._addresses, self.protocol, len(self.segment))
            given = struct.unpack("!H", self.segment[at : at + 2])[0] if at else None
            if at and offload and offload.flags & NEEDS_CSUM:
                if given != total(head):
                    found.append(f"the partial checksum is {given:#06x}, the pseudo header gives {total(head):#06x}")
                if (offload.start, offload.offset) != (self.header, at):
                    found.append(f"the device would sum from {offload.start}+{offload.offset}, not {self.header}+{at}")
            elif (self.protocol, self.version, given) != (UDP, 4, 0) and total(head + self.segment) != 0xFFFF:
                found.append("the transport checksum is wrong")
        if self.is_error:
            found += [f"quoted: {problem}" for problem in self.quoted.problems(cut=True)]
        return found


@dataclass(frozen=True)
class Offload:
    """What the kernel left to the device for a packet.

    Attributes:
        flags: NEEDS_CSUM: the checksum is partial.
        gso: how to cut it up (`GSO_…`).
        head: bytes of all headers; of a frame that was taken, as much as lay in one piece.
        size: bytes of payload in each piece.
        start, offset: where the checksum begins and where it goes; from the start of the IP header here.
    """

    flags: int = 0
    gso: int = GSO_NONE
    head: int = 0
    size: int = 0
    start: int = 0
    offset: int = 0


# linux/if_packet.h: whom the frame was for, as the device saw it
HOST, BROADCAST, MULTICAST, OTHER, OUTGOING = range(5)


@dataclass(frozen=True)
class Frame:
    """A frame as a packet socket took it.

    Attributes:
        kind: `HOST`, … `OUTGOING`.
        at: seconds, of the machine's monotonic clock, when it was read.
        source, target: Ethernet addresses.
        ethertype: of the payload.
        offload: what was left to the device.
        body: the payload.
    """

    kind: int
    at: float
    source: str
    target: str
    ethertype: int
    offload: Offload
    body: bytes

    @classmethod
    def parse(cls, kind: int, at: float, data: bytes) -> Frame:
        """Take the virtio header and the Ethernet header off."""
        flags, gso, head, size, start, offset = _VIRTIO.unpack_from(data)
        frame = data[_VIRTIO.size :]
        length = 14
        ethertype = struct.unpack("!H", frame[12:14])[0]
        if ethertype == VLAN:
            length = 18
            ethertype = struct.unpack("!H", frame[16:18])[0]
        offload = Offload(flags, gso, head - length, size, start - length, offset)
        return cls(kind, at, mac(frame[6:12]), mac(frame[:6]), ethertype, offload, frame[length:])

    @property
    def is_ip(self) -> bool:
        """Whether it holds a packet."""
        return self.ethertype in (IPV4, IPV6)

    @cached_property
    def packet(self) -> Packet:
        """The packet in it."""
        return Packet(self.body)

    def problems(self) -> list[str]:
        """What is wrong with its packet."""
        return self.packet.problems(self.offload)


def mac(data: bytes) -> str:
    """`02:00:00:00:00:01`."""
    return ":".join(f"{byte:02x}" for byte in data)


def frame(source: str, target: str, packet: bytes, offload: Offload | None = None) -> bytes:
    """A packet on Ethernet with the virtio header before it, as a packet socket sends it."""
    given = offload or Offload()
    moved = 14 if given.flags & NEEDS_CSUM else 0
    head = _VIRTIO.pack(
        given.flags, given.gso, given.head + (14 if given.gso else 0), given.size, given.start + moved, given.offset
    )
    ethertype = IPV6 if packet[0] >> 4 == 6 else IPV4
    addresses = bytes.fromhex((target + source).replace(":", ""))
    return head + addresses + struct.pack("!H", ethertype) + packet


def wrong(frames: Sequence[Frame]) -> list[str]:
    """The problems of all packets, a line each."""
    return [f"{problem}: {each.packet}" for each in frames if each.is_ip for problem in each.problems()]
