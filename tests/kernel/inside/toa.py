"""What an application sees of its peers, and many clients that have no stack: for the tests of TOA's receivers."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
import threading
import time
from typing import Any

CARRIER = 254  # TCP_TOA_CARRIER, linux/tcp.h
MPTCP = 262  # IPPROTO_MPTCP
SO_PROTOCOL = 38
FASTOPEN, DEFER_ACCEPT = 23, 9
SYN, RST, PSH, ACK = 2, 4, 8, 16


def _named(address: tuple[Any, ...]) -> str:
    return f"{address[0]} {address[1]}"


def _size(link: socket.socket) -> int:
    """Of an address of its family: a program gives no more room than that."""
    return 28 if link.family == socket.AF_INET6 else 16


def carrier(link: socket.socket) -> str:
    """What TCP_TOA_CARRIER says, or the name of its error."""
    try:
        raw = link.getsockopt(socket.IPPROTO_TCP, CARRIER, _size(link))
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    family, port = struct.unpack_from("=H", raw)[0], struct.unpack_from("!H", raw, 2)[0]
    at = raw[4:8] if family == socket.AF_INET else raw[8:24]
    return f"{socket.inet_ntop(family, at)} {port}"


def _try_getsockopt(link: socket.socket, level: int, option: int, room: int) -> tuple[int, bytes, int]:
    """Ask with a buffer of so many bytes: the error (0 for none); the buffer, with 40 more behind it, all of them `?`
    before; the length that is said, in which Python's own believes.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    buffer, length = ctypes.create_string_buffer(b"?" * (room + 40)), ctypes.c_int(room)
    failed = libc.getsockopt(link.fileno(), level, option, buffer, ctypes.byref(length)) != 0
    return ctypes.get_errno() if failed else 0, buffer.raw[: room + 40], length.value


def _getsockopt(link: socket.socket, level: int, option: int, room: int) -> tuple[bytes, int]:
    """As `_try_getsockopt`, where an error is one."""
    error, data, length = _try_getsockopt(link, level, option, room)
    if error:
        raise OSError(error, "getsockopt")
    return data, length


def groups(room: int) -> int:
    """How long a netlink socket says that the list of its groups is, whatever room there is for it."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
        link.bind((0, 1))
        return _getsockopt(link, 270, 9, room)[1]  # SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS


def refusals() -> dict[str, list[Any]]:
    """Of getsockopt() calls that fail with room for 8 bytes: the error, the length that is said, what was written."""
    os.setgroups([1, 2, 3])  # a socket's peer can ask for them
    left, right = socket.socketpair()
    with left, right, socket.socket() as link:
        asked = {
            "too little room": (left, socket.SOL_SOCKET, 59),  # SO_PEERGROUPS
            "no such option": (link, socket.IPPROTO_TCP, 9999),
        }
        found: dict[str, list[Any]] = {}
        for name, (each, level, option) in asked.items():
            error, data, length = _try_getsockopt(each, level, option, 8)
            found[name] = [errno.errorcode.get(error, error), length, data.strip(b"?").hex()]
    return found


def scopes(address: str, device: str) -> dict[str, list[str]]:
    """Of both ends of a connection to this link-local address: what getpeername() says, and what TCP_TOA_CARRIER."""
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET6) as listener, socket.socket(socket.AF_INET6) as link:
        listener.bind((address, 0, 0, socket.if_nametoindex(device)))
        listener.listen()
        link.connect(listener.getsockname())
        child, _ = listener.accept()
        with child:
            for name, each in (("connected", link), ("accepted", child)):
                _, peer, _, scope = each.getpeername()
                raw = each.getsockopt(socket.IPPROTO_TCP, CARRIER, _size(each))
                told = struct.unpack_from("!H", raw, 2)[0], struct.unpack_from("=I", raw, 24)[0]
                found[name] = [f"{peer} {scope}", f"{told[0]} {told[1]}"]
    return found


def carriers(address: str, nobody: str) -> dict[str, str]:
    """What TCP_TOA_CARRIER says of sockets in all states, at an address of this host and one that does not answer."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found: dict[str, str] = {}
    with socket.socket(family) as link:
        found["new"] = carrier(link)
        link.setblocking(False)
        link.connect_ex((nobody, 9))
        found["connecting"] = carrier(link)
    with socket.create_server((address, 0), family=family) as listener:
        found["listening"] = carrier(listener)
        with socket.create_connection(listener.getsockname()[:2]) as link:
            child, _ = listener.accept()
            found["connected"] = carrier(link)
            child.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
            child.close()
            try:
                link.recv(1)
            except ConnectionResetError:
                found["reset"] = carrier(link)
    for name, kind in (("datagram", socket.SOCK_DGRAM), ("raw", socket.SOCK_RAW)):
        with socket.socket(family, kind, socket.IPPROTO_TCP if name == "raw" else 0) as link:
            link.connect((address, 9))
            found[name] = carrier(link)
    return found


def _listener(
    address: str, port: int, *, only_six: bool = False, mptcp: bool = False, fastopen: bool = False, defer: bool = False
) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    link = socket.socket(family, socket.SOCK_STREAM, MPTCP if mptcp else 0)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        link.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_six)
    link.bind((address, port))
    if fastopen:
        link.setsockopt(socket.IPPROTO_TCP, FASTOPEN, 16)
    if defer:
        link.setsockopt(socket.IPPROTO_TCP, DEFER_ACCEPT, 30)
    link.listen(4096)
    return link


def serve(address: str, port: int, listeners: int = 1, **kind: bool) -> None:
    """Accept for ever; of each connection a line for what accept() said, and one for each message that it sends.

    A message is one byte, which is asked about and sent back: `n` for getpeername() and the carrier, `m` whether it is
    MPTCP, `c` for the carrier in small buffers, `d` to disconnect the socket and ask, `l` to let it listen, connect to
    it, and say what that child shows.
    """
    links = [_listener(address, port, **kind) for _ in range(listeners)]
    for link in links[1:]:
        if os.fork() == 0:
            links = [link]
            break
    while True:
        link, peer = links[0].accept()
        _say(f"accept {_named(peer)}")
        threading.Thread(target=_answer, args=(link,), daemon=True).start()


def _say(line: str) -> None:
    """A whole line at once: there are several threads."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _answer(link: socket.socket) -> None:
    with link:
        try:
            while word := link.recv(1):
                _say(_answers[word](link))
                if word in b"dl":
                    break
                link.send(word)
        except (OSError, KeyError) as error:
            _say(f"error {error}")


def _ask_mptcp(link: socket.socket) -> str:
    return f"mptcp {int(link.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL) == MPTCP)}"


def _ask_cut(link: socket.socket) -> str:
    """How long it is said to be in ever smaller buffers, of which each has as much of it as it takes, and no more."""
    size, lengths = _size(link), []
    whole = _getsockopt(link, socket.IPPROTO_TCP, CARRIER, size)[0][:size]
    for room in (size + 8, size, size - 1, 3, 0):
        data, length = _getsockopt(link, socket.IPPROTO_TCP, CARRIER, room)
        beginning = whole[:room]
        lengths.append(str(length) if data == beginning + b"?" * (len(data) - len(beginning)) else repr(data))
    return f"lengths {' '.join(lengths)}"


def _disconnect(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    _connect(link, struct.pack("=H14x", 0))  # AF_UNSPEC, which Python's connect() cannot say


def _connect(link: socket.socket, address: bytes) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(link.fileno(), address, len(address)) != 0:
        raise OSError(ctypes.get_errno(), "connect")


def _ask_disconnected(link: socket.socket) -> str:
    """The socket connects to another one of this host: who is its peer now?"""
    host = link.getsockname()[0]
    with socket.create_server((host, 0), family=link.family, dualstack_ipv6=link.family == socket.AF_INET6) as other:
        _disconnect(link)
        try:
            name = _named(link.getpeername())
        except OSError as error:
            name = errno.errorcode[error.errno or 0]
        link.connect(other.getsockname())
        same = link.getpeername()[1] == other.getsockname()[1]
        return f"disconnected {name}, then {'the other' if same else _named(link.getpeername())}"


def _ask_listening(link: socket.socket) -> str:
    """The socket listens: who is the peer of its child?"""
    host = link.getsockname()[0]
    _disconnect(link)
    link.bind((host, 0))
    link.listen(1)
    with socket.create_connection(link.getsockname()[:2]) as other:
        child, peer = link.accept()
        right = peer[:2] == child.getpeername()[:2] == other.getsockname()[:2]
        child.close()
        return f"listening {'the other' if right else _named(peer)}"


_answers = {
    b"n": lambda link: f"name {_named(link.getpeername())} carrier {carrier(link)}",
    b"m": _ask_mptcp,
    b"c": _ask_cut,
    b"d": _ask_disconnected,
    b"l": _ask_listening,
}


def connect(address: str, port: int, count: int, patience: float) -> list[str]:
    """Real connections, one after the other, each asking for its name; their own addresses."""
    mine = []
    for _ in range(count):
        with socket.create_connection((address, port), patience) as link:
            link.sendall(b"n")
            link.recv(1)
            mine.append(_named(link.getsockname()))
    return mine


def web(address: str, port: int) -> None:
    """Python's own web server: every answer is the client, as it knows it."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(_named(self.client_address).encode())

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    class Server(HTTPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

    Server((address, port), Handler).serve_forever()


def introduce(address: str, port: int) -> None:
    """Answer a line on each of many connections with a line for each of accept() and getpeername(), for ever."""
    listener, poll = _listener(address, port), select.epoll()
    poll.register(listener, select.EPOLLIN)
    links: dict[int, tuple[socket.socket, str]] = {}
    while True:
        for number, _ in poll.poll():
            if number == listener.fileno():
                link, peer = listener.accept()
                links[link.fileno()] = (link, _named(peer))
                poll.register(link, select.EPOLLIN)
                continue
            link, peer_then = links[number]
            try:
                data = link.recv(100)
                if data and not data.endswith(b"\n"):
                    continue
                link.sendall(f"{peer_then}\n{_named(link.getpeername())}\n".encode())
            except OSError:
                pass  # the client has given up, and says so
            poll.unregister(number)
            links.pop(number)[0].close()


def crowd(address: str, port: int, count: int, at_once: int, patience: float) -> dict[str, Any]:
    """Open so many connections, so many of them at once, and ask who the other end thinks that we are.

    The question is two segments. Returns how many were told right, twice, and what others were told.
    """
    poll, left, right = select.epoll(), count, 0
    links: dict[int, tuple[socket.socket, bytearray]] = {}
    wrong: list[str] = []
    deadline = time.monotonic() + patience
    while (left or links) and time.monotonic() < deadline:
        while left and len(links) < at_once:
            link = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            link.setblocking(False)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.connect_ex((address, port))
            poll.register(link, select.EPOLLOUT)
            links[link.fileno()] = (link, bytearray())
            left -= 1
        for number, event in poll.poll(1.0):
            link, told = links[number]
            try:
                if not event & select.EPOLLIN:
                    link.send(b"wh")
                    link.send(b"o\n")
                    poll.modify(link, select.EPOLLIN)
                    continue
                if data := link.recv(200):
                    told += data
                    continue
                if told.decode().splitlines() == [_named(link.getsockname())] * 2:
                    right += 1
                else:
                    wrong.append(f"{_named(link.getsockname())} was told {told.decode()!r}")
            except OSError as error:
                wrong.append(f"{_named(link.getsockname())}: {error}")
            poll.unregister(link)
            links.pop(number)[0].close()
    wrong += [f"{_named(link.getsockname())}: told {bytes(told)!r} until the end" for link, told in links.values()]
    return {"right": right, "wrong": wrong[:20], "others": len(wrong) + left}


# --- many clients without a stack


def _total(data: bytes) -> int:
    value: int = sum(struct.unpack(f"!{len(data) // 2}H", data)) if len(data) % 2 == 0 else _total(data + b"\0")
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


class _Raw:
    """A device's end of TCP, below the stack."""

    def __init__(self, device: str, mac: str, source: str, target: str, port: int) -> None:
        self.six = ":" in source
        family = socket.AF_INET6 if self.six else socket.AF_INET
        self.ends = socket.inet_pton(family, source) + socket.inet_pton(family, target)
        kind = 0x86DD if self.six else 0x0800
        self.to = (device, kind, 0, 0, bytes.fromhex(mac.replace(":", "")))
        self.port = port
        self.link = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(kind))
        self.link.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        self.link.bind((device, kind))
        self.link.settimeout(0.5)

    def send(self, sport: int, flags: int, seq: int, ack: int = 0, option: bytes = b"", data: bytes = b"") -> None:
        head = struct.pack("!HHIIBBHHH", sport, self.port, seq, ack, (5 + len(option) // 4) << 4, flags, 65535, 0, 0)
        segment = head + option + data
        check = ~_total(self.ends + struct.pack("!II", len(segment), 6) + segment) & 0xFFFF
        segment = segment[:16] + struct.pack("!H", check) + segment[18:]
        if self.six:
            head = struct.pack("!IHBB", 6 << 28, len(segment), 6, 64) + self.ends
        else:
            head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0x4000, 64, 6, 0) + self.ends
            head = head[:10] + struct.pack("!H", ~_total(head) & 0xFFFF) + head[12:]
        self.link.sendto(head + segment, self.to)

    def receive(self) -> tuple[int, int, int, int, bytes] | None:
        """Our port, flags, sequence number, acknowledgement and data of the next segment; None after a while."""
        try:
            packet = self.link.recv(4096)
        except TimeoutError:
            return None
        size = 40 if self.six else (packet[0] & 15) * 4
        if packet[6 if self.six else 9] != 6:
            return 0, 0, 0, 0, b""
        _, dport, seq, ack, off, flags = struct.unpack_from("!HHIIBB", packet, size)
        return dport, flags, seq, ack, packet[size + (off >> 4) * 4 :]


def storm(
    device: str, mac: str, source: str, target: str, port: int, option: str, seconds: float, stop: str, least: int
) -> int:
    """Open, ask for the name and reset, again and again from other ports; how many connections were answered.

    It goes on until there is the file `stop` and so many were, but no longer than so many seconds.
    """
    raw, sport, count, toa = _Raw(device, mac, source, target, port), 1024, 0, bytes.fromhex(option)
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (count >= least and os.path.exists(stop)):
        batch = range(sport, sport + 50)
        for each in batch:
            raw.send(each, SYN, 1000, option=bytes.fromhex("020405b4"))
        left = set(batch)
        while left and (answer := raw.receive()):
            mine, flags, seq, ack, data = answer
            if mine not in left:
                continue
            if flags & SYN:
                raw.send(mine, ACK, 1001, seq + 1, toa)
                raw.send(mine, ACK | PSH, 1001, seq + 1, toa, b"n")
            elif data or flags & RST:
                count += bool(data)
                raw.send(mine, RST, 1002, ack)
                left.discard(mine)
        sport = sport + 50 if sport < 60000 else 1024
    return count
