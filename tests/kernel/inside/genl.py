"""IPVS by generic netlink without ipvsadm in between: what the kernel itself answers to right and wrong requests."""

from __future__ import annotations

import errno
import socket
import struct
from typing import Any

# include/uapi/linux/ip_vs.h
COMMANDS = {
    "NEW_SERVICE": 1, "SET_SERVICE": 2, "DEL_SERVICE": 3, "GET_SERVICE": 4,
    "NEW_DEST": 5, "SET_DEST": 6, "DEL_DEST": 7, "GET_DEST": 8,
    "NEW_LADDR": 18, "DEL_LADDR": 19, "GET_LADDR": 20,
}  # fmt: skip
NESTED = 0x8000  # NLA_F_NESTED: requests that are judged strictly must say so
ATTR_SERVICE, ATTR_DEST, ATTR_LADDR = 1, 2, 7
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 1, 4, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
CTRL, GETFAMILY, FAMILY_NAME, FAMILY_ID = 16, 3, 2, 1


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by number."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def packed(address: str) -> bytes:
    """As IPVS takes it: 16 bytes."""
    return socket.inet_pton(_family(address), address).ljust(16, b"\0")


def service(spec: dict[str, Any]) -> bytes:
    """The attribute of a service: address, port, protocol, or fwmark; and `more`, whole of it or only its name."""
    six = _family(spec.get("address", "0.0.0.0")) == socket.AF_INET6 or spec.get("six")  # noqa: S104  only a family
    fields = [(1, struct.pack("=H", socket.AF_INET6 if six else socket.AF_INET))]
    if "fwmark" in spec:
        fields.append((5, struct.pack("=I", spec["fwmark"])))
    else:
        fields.append((2, struct.pack("=H", {"tcp": 6, "udp": 17, "sctp": 132}[spec.get("protocol", "tcp")])))
        fields += [(3, packed(spec["address"])), (4, struct.pack("!H", spec["port"]))]
    if spec.get("whole"):
        fields += [
            (6, b"rr\0"),
            (7, struct.pack("=II", spec.get("flags", 0), 0xFFFFFFFF)),
            (8, struct.pack("=I", 0)),
            (9, struct.pack("=I", 128 if six else 0xFFFFFFFF)),
        ]
    if "est_timeout" in spec:
        fields.append((32, struct.pack("=I", spec["est_timeout"])))
    return attribute(NESTED | ATTR_SERVICE, b"".join(attribute(kind, value) for kind, value in fields))


def destination(spec: dict[str, Any]) -> bytes:
    """The attribute of a destination."""
    fields = [
        (1, packed(spec["address"])),
        (2, struct.pack("!H", spec["port"])),
        (3, struct.pack("=I", spec.get("method", 0))),
        (4, struct.pack("=I", 1)),
        (5, struct.pack("=I", 0)),
        (6, struct.pack("=I", 0)),
        (11, struct.pack("=H", _family(spec["address"]))),
    ]
    return attribute(NESTED | ATTR_DEST, b"".join(attribute(kind, value) for kind, value in fields))


def laddr(address: str) -> bytes:
    """The attribute of a local address."""
    return attribute(NESTED | ATTR_LADDR, attribute(1, packed(address)))


class Netlink:
    """A socket that knows the number of the family IPVS."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)
        self.socket.settimeout(20)
        self.family = CTRL
        _, replies = self.call(GETFAMILY, attribute(FAMILY_NAME, b"IPVS\0"))
        self.family = struct.unpack("=H", attributes(replies[0])[FAMILY_ID])[0]

    def call(self, command: int, payload: bytes, *, dump: bool = False, flags: int = 0) -> tuple[int, list[bytes]]:
        """Send a request; the error number (0: none) and the answers' payloads."""
        flags |= NLM_F_REQUEST | (NLM_F_DUMP if dump else NLM_F_ACK)
        body = struct.pack("=BBH", command, 1, 0) + payload
        self.socket.send(struct.pack("=IHHII", 16 + len(body), self.family, flags, 1, 0) + body)
        replies: list[bytes] = []
        while True:
            data = self.socket.recv(1 << 18)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                message, data = data[16:length], data[(length + 3) & ~3 :]
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    # a dump that fails says so in its end
                    return -struct.unpack_from("=i", message.ljust(4, b"\0"))[0], replies
                replies.append(message[4:])


def do(requests: list[dict[str, Any]]) -> list[str]:
    """Requests one after the other; each is answered with the name of its error, or `ok`."""
    link, answers = Netlink(), []
    for request in requests:
        payload = service(request["service"]) if "service" in request else b""
        payload += destination(request["dest"]) if "dest" in request else b""
        payload += laddr(request["laddr"]) if "laddr" in request else b""
        error, _ = link.call(
            COMMANDS[request["command"]], payload, dump=request.get("dump", False), flags=request.get("flags", 0)
        )
        # 95 has two names
        name = errno.errorcode.get(error, str(error)).replace("ENOTSUP", "EOPNOTSUPP")
        answers.append(name if error else "ok")
    return answers


def listed(of: dict[str, Any]) -> dict[str, Any]:
    """What the kernel says of a service: its local addresses, its destinations' methods, its own timeout."""
    link = Netlink()
    _, replies = link.call(COMMANDS["GET_LADDR"], service(of), dump=True)
    locals_ = {}
    for reply in replies:
        fields = attributes(attributes(reply)[ATTR_LADDR])
        size = 16 if ":" in of.get("address", "") or of.get("six") else 4
        name = socket.inet_ntop(socket.AF_INET6 if size == 16 else socket.AF_INET, fields[1][:size])
        locals_[name] = [struct.unpack("=Q", fields[2])[0], struct.unpack("=I", fields[3])[0]]
    _, replies = link.call(COMMANDS["GET_DEST"], service(of), dump=True)
    methods = [struct.unpack("=I", attributes(attributes(reply)[ATTR_DEST])[3])[0] for reply in replies]
    _, replies = link.call(COMMANDS["GET_SERVICE"], service(of))
    own = attributes(attributes(replies[0])[ATTR_SERVICE]) if replies else {}
    timeout = struct.unpack("=I", own[32])[0] if 32 in own else None
    flags = struct.unpack_from("=I", own[7])[0] if 7 in own else None
    return {
        "locals": locals_, "methods": methods, "est_timeout": timeout, "flags": flags, "attributes": sorted(own),
    }  # fmt: skip
