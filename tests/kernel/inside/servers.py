"""Small servers and clients of the laboratory, run as jobs of the agent: a fork instead of a program's start."""

from __future__ import annotations

import resource
import select
import socket
import time


def fill(path: str, size: int) -> None:
    """A file of so many bytes that no two of its blocks are equal."""
    with open(path, "wb") as stream:
        # Many at once: one by one they take an emulated debug kernel more than half a minute.
        for first in range(0, size, 16 * 1024):
            stream.write(b"%015d\n" * 1024 % tuple(range(first, first + 16 * 1024, 16)))
        stream.truncate(size)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def udp_echo(name: str, port: int, addresses: list[str]) -> None:
    """Answer every datagram with `NAME ADDRESS PORT TEXT`, for ever."""
    links = []
    for address in addresses:
        link = socket.socket(_family(address), socket.SOCK_DGRAM)
        if _family(address) == socket.AF_INET6:
            link.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        link.bind((address, port))
        links.append(link)
    while True:
        for link in select.select(links, [], [])[0]:
            text, peer = link.recvfrom(65536)
            link.sendto(f"{name} {peer[0]} {peer[1]} ".encode() + text, peer)


def udp_ask(address: str, port: int, text: str, sport: int, patience: float) -> str:
    """Send a datagram from a port (0: any) and return the answer; a refusal or silence raises."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as link:
        link.settimeout(patience)
        if sport:
            link.bind(("", sport))
        link.connect((address, port))
        link.send(text.encode())
        return link.recv(65536).decode()


def http_get(address: str, port: int, path: str, count: int, sport: int, patience: float) -> list[str]:
    """Fetch a path so many times, each on its own connection; the bodies.

    A sport other than 0 is the first connection's port; the others follow it.
    """
    bodies = []
    for number in range(count):
        with socket.socket(_family(address)) as link:
            link.settimeout(patience)
            if sport:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                link.bind(("", sport + number))
            link.connect((address, port))
            link.sendall(f"GET {path} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
            data = b""
            while part := link.recv(1 << 18):
                data += part
        head, _, body = data.partition(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise ValueError(head.decode(errors="replace"))
        bodies.append(body.decode())
    return bodies


def hold(address: str, port: int, count: int, sport: int, patience: float) -> None:
    """Open so many connections and keep them open for ever; prints `open` when all are."""
    links = []
    for number in range(count):
        link = socket.socket(_family(address))
        link.settimeout(patience)
        if sport:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            link.bind(("", sport + number))
        link.connect((address, port))
        links.append(link)
    print("open", flush=True)
    select.select([], [], [])


def chat(address: str, port: int, count: int, patience: float) -> None:
    """Open so many connections and ask on each of them again and again, for ever; prints a line for each round.

    An answer that does not come ends it with an error.
    """
    links = [socket.create_connection((address, port), patience) for _ in range(count)]
    rounds = 0
    while True:
        for link in links:
            link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            data = link.recv(4096)
            if not data.startswith(b"HTTP/1.1 200 "):
                raise ValueError(f"round {rounds}: {data!r}")
        rounds += 1
        print(rounds, flush=True)
        if select.select(links, [], [], 0.5)[0]:
            raise ValueError(f"round {rounds}: something came that was not asked for")


def http_post(address: str, port: int, size: int, patience: float) -> str:
    """Send so many bytes to a web server and return its answer."""
    with socket.socket(_family(address)) as link:
        link.settimeout(patience)
        link.connect((address, port))
        link.sendall(f"POST / HTTP/1.0\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
        link.sendall(b"x" * size)
        data = b""
        while part := link.recv(1 << 18):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise ValueError(head.decode(errors="replace"))
    return body.decode()


def _files(count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def udp_tally(address: str, port: int, wanted: int, patience: float) -> dict[str, list[str]]:
    """Take datagrams until so many have come or none comes for a while; what each peer sent, empty ones left out.

    When all have come it stays for a moment: who is refused must have been refused by somebody else.
    """
    seen: dict[str, list[str]] = {}
    with socket.socket(_family(address), socket.SOCK_DGRAM) as link:
        link.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        link.bind((address, port))
        link.settimeout(patience)
        while True:
            try:
                text, peer = link.recvfrom(100)
            except TimeoutError:
                return seen
            if text:
                seen.setdefault(f"{peer[0]} {peer[1]}", []).append(text.decode())
            if sum(map(len, seen.values())) == wanted:
                link.settimeout(patience / 5)


def udp_storm(address: str, port: int, name: str, count: int) -> int:
    """Send a datagram from each of so many ports of this host; how many were refused."""
    _files(count + 100)
    links, refused = [], 0
    for number in range(count):
        link = socket.socket(_family(address), socket.SOCK_DGRAM)
        link.connect((address, port))
        link.send(f"{name}-{number}".encode())
        links.append(link)
    for link in links:
        link.setblocking(False)
        try:
            link.send(b"")  # a refusal of the first one is told now, and an empty one counts for nothing
        except ConnectionRefusedError:
            refused += 1
    return refused


def tcp_tally(address: str, port: int, wanted: int, patience: float) -> list[list[str]]:
    """Take connections until so many are open at once; from each a line, which is sent back. Peers with their lines."""
    _files(wanted + 100)
    found: list[list[str]] = []
    links: list[socket.socket] = []
    with socket.create_server((address, port), family=_family(address), backlog=4096) as listener:
        listener.settimeout(patience)
        while len(links) < wanted:
            try:
                link, peer = listener.accept()
            except TimeoutError:
                break
            link.settimeout(patience)
            links.append(link)
            line = link.recv(100)
            link.sendall(line)
            found.append([f"{peer[0]} {peer[1]}", line.decode()])
        for link in links:
            link.settimeout(patience)
            link.recv(1)  # all stay open until the clients have seen their answers
    return found


def tcp_storm(address: str, port: int, name: str, count: int, patience: float) -> int:
    """Open so many connections at once, send a line on each; how many got just that line back."""
    _files(count + 100)
    poll, waiting, right = select.epoll(), {}, 0
    for number in range(count):
        link = socket.socket(_family(address))
        link.setblocking(False)
        link.connect_ex((address, port))
        poll.register(link, select.EPOLLOUT)
        waiting[link.fileno()] = (link, f"{name}-{number}".encode())
    open_, deadline = dict(waiting), time.monotonic() + patience
    while waiting and time.monotonic() < deadline:
        for descriptor, event in poll.poll(1.0):
            link, line = waiting[descriptor]
            if event & select.EPOLLIN:
                right += link.recv(100) == line
            elif event & select.EPOLLOUT and not event & (select.EPOLLERR | select.EPOLLHUP):
                link.send(line)
                poll.modify(descriptor, select.EPOLLIN)
                continue
            poll.unregister(descriptor)
            del waiting[descriptor]
    for link, _ in open_.values():
        link.close()
    return right


def idle(address: str, port: int, patience: float) -> str:
    """Open a connection, say nothing, and tell how it ends."""
    with socket.socket(_family(address)) as link:
        link.settimeout(patience)
        link.connect((address, port))
        print("open", flush=True)
        try:
            return "closed" if link.recv(1) == b"" else "data"
        except ConnectionResetError:
            return "reset"
        except TimeoutError:
            return "silence"


def accept_idle(address: str, port: int, patience: float) -> str:
    """Take one connection and tell how it ends."""
    with socket.create_server((address, port), family=_family(address)) as listener:
        listener.settimeout(patience)
        link, _ = listener.accept()
        link.settimeout(patience)
        try:
            return "closed" if link.recv(1) == b"" else "data"
        except ConnectionResetError:
            return "reset"
        except TimeoutError:
            return "silence"


def restless(addresses: list[str], port: int) -> None:
    """Open connections and send datagrams from ever new ports, for ever, whatever becomes of them."""
    _files(1000)
    links: list[socket.socket] = []
    while True:
        for address in addresses:
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                link = socket.socket(_family(address), kind)
                link.setblocking(False)
                links.append(link)
                try:
                    link.connect_ex((address, port))
                    if kind == socket.SOCK_DGRAM:
                        link.send(b"x" * 100)
                except OSError:
                    continue
        for link in links[-12:]:
            try:
                if link.type == socket.SOCK_STREAM:
                    link.send(b"GET / HTTP/1.0\r\n\r\n")
            except OSError:
                continue
        for link in select.select(links[-12:], [], [], 0.02)[0]:
            try:
                link.recv(4096)
            except OSError:
                continue
        while len(links) > 100:
            links.pop(0).close()
