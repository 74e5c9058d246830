"""Runs in the build root: plays the IPVS family of generic netlink to ipvsadm, and says what came of it.

It stands where a kernel with FULLNAT would, so that what ipvsadm sends, prints and exits with can be tested in a
second, every error included. It is written from the same rules that the kernel follows, and as strict; it forwards no
packet. That the kernel follows them too is seen with the kernel, under tests/kernel.

    stand_in.py SCENARIO SENT READY

SCENARIO is a file (JSON): {"fullnat": true, "synproxy": true, "late": false, "refuse": {"NEW_LADDR": 12}, "disguise":
{"3": 6}}. `late`: a dump reports an error in the message that ends it, not at once. `refuse`: an errno for a command,
whatever it asks for. `disguise`: destinations are listed with this value of an attribute, whatever it is: what other
programs may have set. The commands that come are written to SENT, a name a line; and a line to READY when it listens.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import socket
import struct
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

ENDPOINT = "/tmp/stand-in"  # noqa: S108  the sandbox's own
FAMILY = 25
CONTROL = 16  # GENL_ID_CTRL
ERROR, DONE, MULTI, ACK, DUMP, NESTED = 2, 3, 2, 4, 0x300, 0x8000

# include/uapi/linux/ip_vs.h
COMMANDS = (
    "UNSPEC NEW_SERVICE SET_SERVICE DEL_SERVICE GET_SERVICE NEW_DEST SET_DEST DEL_DEST GET_DEST NEW_DAEMON DEL_DAEMON"
    " GET_DAEMON SET_TIMEOUT GET_TIMEOUT SET_INFO GET_INFO ZERO FLUSH NEW_LADDR DEL_LADDR GET_LADDR"
).split()
LADDR_COMMANDS = ("NEW_LADDR", "DEL_LADDR", "GET_LADDR")
SERVICE, DEST, LADDR = 1, 2, 7
AF, PROTOCOL, ADDR, PORT, FWMARK, SCHED, FLAGS, TIMEOUT, NETMASK, PE, EST_TIMEOUT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 32
ONEPACKET, SYNPROXY, MASQ, FULLNAT = 4, 0x8000, 0, 5
EST_TIMEOUT_MAX = 2147483
# number: form, of what a destination has besides its address
DEST_FIELDS = {3: "=I", 4: "=I", 5: "=I", 6: "=I", 13: "=B", 14: "!H", 15: "=H"}
# Of each local address, so that tests can see big numbers and their order.
CONFLICTS, CONNS = 5_000_000_000, 7


class Refused(Exception):
    """A command fails with this errno."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode.get(number, str(number)))
        self.number = number


def attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def attributes(data: bytes, *, strict: bool = False, known: tuple[int, ...] = ()) -> dict[int, bytes]:
    """Attributes by number.

    Args:
        data: their bytes.
        strict: refuse numbers that are not `known`.
        known: those that a strictly validated command may carry.
    """
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if strict and kind & ~NESTED not in known:
            raise Refused(errno.EINVAL)
        if strict and kind & ~NESTED in (SERVICE, LADDR) and len(known) == 2 and not kind & NESTED:
            raise Refused(errno.EINVAL)
        found[kind & ~NESTED] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


@dataclass
class Service:
    """A virtual service, its values as they came.

    Attributes:
        identity: the attributes that name it.
        values: the others, by number.
        dests: values of each destination by (family, address, port).
        laddrs: local addresses, in their order.
    """

    identity: dict[int, bytes]
    values: dict[int, bytes]
    dests: dict[tuple[int, bytes, bytes], dict[int, bytes]] = field(default_factory=dict)
    laddrs: list[bytes] = field(default_factory=list)

    @property
    def onepacket(self) -> bool:
        return bool(struct.unpack_from("=I", self.values[FLAGS])[0] & ONEPACKET)

    @property
    def synproxy(self) -> bool:
        return bool(struct.unpack_from("=I", self.values[FLAGS])[0] & SYNPROXY)

    def methods(self) -> list[int]:
        return [struct.unpack("=I", dest[3])[0] for dest in self.dests.values()]


class Kernel:
    """The IPVS table, and what its commands answer."""

    def __init__(self, scenario: dict[str, Any], sent: str) -> None:
        self.sent = sent
        self.fullnat: bool = scenario.get("fullnat", True)
        self.synproxy: bool = scenario.get("synproxy", True)
        self.late: bool = scenario.get("late", False)
        self.refuse: dict[str, int] = scenario.get("refuse", {})
        self.disguise: dict[str, int] = scenario.get("disguise", {})
        self.services: dict[tuple[bytes, ...], Service] = {}

    def answer(self, name: str, flags: int, body: bytes) -> list[tuple[str, bytes]]:
        """Carry out a command; returns the messages of its answer, as command and attributes.

        Raises:
            Refused: it fails.
        """
        with open(self.sent, "a", encoding="ascii") as log:
            log.write(f"{name}\n")
        if name in self.refuse:
            raise Refused(self.refuse[name])
        if name == "GET_INFO":
            return [("SET_INFO", attribute(1, struct.pack("=I", 0x010201)) + attribute(2, struct.pack("=I", 4096)))]
        if name == "FLUSH":
            self.services.clear()
            return []
        if name in LADDR_COMMANDS:
            return self.local(name, flags, body)
        top = attributes(body)
        if name == "GET_SERVICE" and flags & DUMP:
            return [("NEW_SERVICE", self.describe(service)) for service in self.services.values()]
        given = attributes(top.get(SERVICE, b""))
        key = self.key(given)
        service = self.services.get(key)
        if name == "NEW_SERVICE":
            if service is not None:
                raise Refused(errno.EEXIST)
            self.services[key] = self.judged(Service({}, {}), given)
            return []
        if service is None:
            if name == "GET_DEST":
                return []  # as the kernel does
            raise Refused(errno.ESRCH)
        if name == "SET_SERVICE":
            self.judged(service, given)
            return []
        if name == "DEL_SERVICE":
            del self.services[key]
            return []
        if name == "GET_SERVICE":
            return [("NEW_SERVICE", self.describe(service))]
        if name == "GET_DEST":
            return [("NEW_DEST", self.describe_dest(*item)) for item in service.dests.items()]
        if name in ("NEW_DEST", "SET_DEST", "DEL_DEST"):
            self.dest(name, service, attributes(top[DEST]))
            return []
        raise Refused(errno.EOPNOTSUPP)

    def key(self, given: dict[int, bytes]) -> tuple[bytes, ...]:
        if AF not in given or not (FWMARK in given or {PROTOCOL, ADDR, PORT} <= given.keys()):
            raise Refused(errno.EINVAL)
        if struct.unpack("=H", given[AF])[0] not in (socket.AF_INET, socket.AF_INET6):
            raise Refused(errno.EAFNOSUPPORT)
        return tuple(given[n] for n in ((AF, FWMARK) if FWMARK in given else (AF, PROTOCOL, ADDR, PORT)))

    def judged(self, service: Service, given: dict[int, bytes]) -> Service:
        """The service with new values, or a refusal that leaves it as it was."""
        if not {SCHED, FLAGS, TIMEOUT, NETMASK} <= given.keys():
            raise Refused(errno.EINVAL)
        values = {n: given[n] for n in (SCHED, FLAGS, TIMEOUT, NETMASK, PE) if n in given}
        if self.fullnat:
            values[EST_TIMEOUT] = given.get(EST_TIMEOUT, service.values.get(EST_TIMEOUT, struct.pack("=I", 0)))
            seconds = struct.unpack("=I", values[EST_TIMEOUT])[0]
            tcp = FWMARK in given or struct.unpack("=H", given[PROTOCOL])[0] == socket.IPPROTO_TCP
            if seconds > EST_TIMEOUT_MAX or (seconds and not tcp):
                raise Refused(errno.EINVAL)
            if struct.unpack_from("=I", values[FLAGS])[0] & ONEPACKET and FULLNAT in service.methods():
                raise Refused(errno.EOPNOTSUPP)
        flags = struct.unpack_from("=I", values[FLAGS])[0]
        if self.synproxy and flags & SYNPROXY and set(service.methods()) - {MASQ, FULLNAT}:
            raise Refused(errno.EOPNOTSUPP)
        service.identity = {n: given[n] for n in (AF, PROTOCOL, ADDR, PORT, FWMARK) if n in given}
        service.values = values
        return service

    def describe(self, service: Service) -> bytes:
        """A service as GET_SERVICE answers."""
        every = {**service.identity, **service.values}
        return attribute(SERVICE, b"".join(attribute(number, value) for number, value in every.items()))

    def dest(self, name: str, service: Service, given: dict[int, bytes]) -> None:
        key = (struct.unpack("=H", given[11])[0], given[1], given[2])
        if name == "DEL_DEST":
            if service.dests.pop(key, None) is None:
                raise Refused(errno.ENOENT)
            return
        method, _, upper, lower = (struct.unpack("=I", given[n])[0] for n in (3, 4, 5, 6))
        if lower > upper:
            raise Refused(errno.ERANGE)
        if self.fullnat and method == FULLNAT:
            protocol = service.identity.get(PROTOCOL)
            known = protocol is None or struct.unpack("=H", protocol)[0] in (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
            if service.onepacket or not known:
                raise Refused(errno.EOPNOTSUPP)
        if self.synproxy and service.synproxy and method not in (MASQ, FULLNAT):
            raise Refused(errno.EOPNOTSUPP)
        if (name == "NEW_DEST") == (key in service.dests):
            raise Refused(errno.EEXIST if name == "NEW_DEST" else errno.ENOENT)
        service.dests[key] = {number: given[number] for number in DEST_FIELDS}

    def describe_dest(self, key: tuple[int, bytes, bytes], values: dict[int, bytes]) -> bytes:
        """A destination as GET_DEST answers."""
        every = {1: key[1], 2: key[2], 11: struct.pack("=H", key[0]), **values}
        every |= {number: struct.pack("=I", 0) for number in (7, 8, 9)}  # connections
        every |= {int(number): struct.pack(DEST_FIELDS[int(number)], v) for number, v in self.disguise.items()}
        return attribute(DEST, b"".join(attribute(number, value) for number, value in every.items()))

    def local(self, name: str, flags: int, body: bytes) -> list[tuple[str, bytes]]:
        """The commands for local addresses, validated strictly."""
        if not self.fullnat:
            raise Refused(errno.EOPNOTSUPP)
        if (name == "GET_LADDR") != bool(flags & DUMP) or flags & ~(1 | ACK | DUMP):
            raise Refused(errno.EOPNOTSUPP)
        top = attributes(body, strict=True, known=(SERVICE, LADDR))
        given = attributes(top.get(SERVICE, b""), strict=True, known=(AF, PROTOCOL, ADDR, PORT, FWMARK))
        service = self.services.get(self.key(given))
        if service is None:
            raise Refused(errno.ESRCH)
        if name == "GET_LADDR":
            found = []
            for number, address in enumerate(service.laddrs):
                counters = {2: struct.pack("=Q", CONFLICTS + number), 3: struct.pack("=I", CONNS + number)}
                inner = b"".join(attribute(n, v) for n, v in {1: address, 4: b"", **counters}.items())
                found.append(("NEW_LADDR", attribute(LADDR, inner)))
            return found
        address = attributes(top.get(LADDR, b""), strict=True, known=(1,)).get(1, b"")
        if len(address) != 16:
            raise Refused(errno.EINVAL)
        if name == "DEL_LADDR":
            if address not in service.laddrs:
                raise Refused(errno.ENOENT)
            service.laddrs.remove(address)
            return []
        family = struct.unpack("=H", service.identity[AF])[0]
        plain = ipaddress.ip_address(address if family == socket.AF_INET6 else address[:4])
        if plain.is_multicast or plain.is_unspecified or plain.is_loopback or plain.is_link_local:
            raise Refused(errno.EINVAL)
        if family == socket.AF_INET and (any(address[4:]) or address[:4] == b"\xff" * 4):
            raise Refused(errno.EINVAL)
        if address in service.laddrs:
            raise Refused(errno.EEXIST)
        service.laddrs.append(address)
        return []


def serve(kernel: Kernel, link: socket.socket) -> None:
    """Answer one program's socket until it closes it, be it in the midst of an answer."""
    with contextlib.suppress(ConnectionError), link:
        while request := link.recv(65536):
            _, kind, flags, sequence, port = struct.unpack_from("=IHHII", request)

            def send(kind: int, flags: int, body: bytes, *, sequence: int = sequence, port: int = port) -> None:
                link.send(struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, port) + body)

            if kind == CONTROL:
                found = attribute(1, struct.pack("=H", FAMILY)) + attribute(2, b"IPVS\0")
                send(CONTROL, 0, struct.pack("=BBH", 1, 2, 0) + found)
                if flags & ACK:
                    send(ERROR, 0, struct.pack("=i", 0) + request[:16])
                continue
            name = COMMANDS[request[16]]
            dump = bool(flags & DUMP)
            try:
                answer = kernel.answer(name, flags, request[20:])
            except Refused as refused:
                if dump and kernel.late and refused.number != errno.EOPNOTSUPP:
                    send(DONE, MULTI, struct.pack("=i", -refused.number))
                else:
                    send(ERROR, 0, struct.pack("=i", -refused.number) + request[:16])
                continue
            for command, body in answer:
                head = struct.pack("=BBH", COMMANDS.index(command), 1, 0)
                send(FAMILY, MULTI if dump else 0, head + body)
            if dump:
                send(DONE, MULTI, struct.pack("=i", 0))
            elif flags & ACK:
                send(ERROR, 0, struct.pack("=i", 0) + request[:16])


def main(scenario: str, sent: str, ready: str) -> None:
    """Wait for programs, until somebody ends it."""
    with open(scenario, encoding="utf-8") as file:
        kernel = Kernel(json.load(file), sent)
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    door.bind(ENDPOINT)
    door.listen(8)
    with open(ready, "w", encoding="ascii") as file:
        file.write("ready\n")
    while True:
        link, _ = door.accept()
        threading.Thread(target=serve, args=(kernel, link), daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
