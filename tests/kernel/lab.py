"""Network namespaces of the machine under test, and topologies of them that live for one test.

    clients ── front ── director ── back ── real servers          two arms
    clients, director, real servers ── front                      one arm: the same addresses on one link

The links are bridges in a namespace of their own (`switch`), so that one can listen there, too. Every program that a
namespace runs is real: curl, nginx, iperf3, ipvsadm, nft.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline import run
from tests.kernel import packets
from tests.kernel.machine import Background, Done, Failed, Guest
from tests.kernel.packets import Frame, Offload

_NUMBER = itertools.count(1)
_CAPTURE = 64 << 20  # bytes that a capture may hold before it loses frames
# What one does with a namespace's IPv6 when one wants to wait for nothing: addresses are good at once, nobody asks
# for routers.
_SYSCTL = {
    "net.ipv6.conf.all.accept_dad": "0",
    "net.ipv6.conf.default.accept_dad": "0",
    "net.ipv6.conf.default.router_solicitations": "0",
    "net.ipv6.conf.all.forwarding": "0",
}


class Namespace:
    """A host of the laboratory."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.guest = lab.guest
        self.name = name
        self.handle = f"{lab.prefix}-{name}"
        settings = {key.replace(".", "/"): value for key, value in _SYSCTL.items()}
        self.guest.ask("namespace_add", name=self.handle, settings=settings)

    # -- programs

    def run(self, *argv: str, seconds: float = 5.0, check: bool = True, stdin: str = "") -> Done:
        """Run a program; see `Guest.run`."""
        return self.guest.run(*argv, namespace=self.handle, seconds=seconds, check=check, stdin=stdin)

    def start(self, *argv: str, stdin: str = "") -> Background:
        """Start a program; it ends with the test at the latest."""
        return self.guest.start(*argv, namespace=self.handle, stdin=stdin)

    def call(self, function: str, *, seconds: float = 5.0, **arguments: Any) -> Any:
        """Call a function of inside/; see `Guest.call`."""
        return self.guest.call(function, namespace=self.handle, seconds=seconds, **arguments)

    def start_call(self, function: str, **arguments: Any) -> Background:
        """Call a function of inside/ in the background."""
        return self.guest.start_call(function, namespace=self.handle, **arguments)

    # -- settings

    def ip(self, *lines: str) -> None:
        """Lines for ip(8), done by one process: its start is what takes time."""
        self.start_ip(*lines).wait()

    def start_ip(self, *lines: str) -> Background:
        """As `ip`, in the background."""
        return self.start("ip", "-batch", "-", stdin="".join(f"{line}\n" for line in lines))

    def read(self, path: str) -> str:
        """A file's text, as this namespace sees it."""
        return self.guest.read(path, self.handle)

    def sysctl(self, name: str, value: str | int | None = None) -> str:
        """Set a sysctl, or return its value."""
        path = "/proc/sys/" + name.replace(".", "/")
        if value is None:
            return self.read(path).strip()
        self.guest.write(path, str(value), self.handle)
        return str(value)

    def write_sysfs(self, name: str, text: str) -> None:
        """Write a file of /sys, which shows the devices of the namespace in which it was mounted."""
        self.guest.run("ip", "netns", "exec", self.handle, "sh", "-c", f"echo {text} >/sys/{name}")

    def offload(self, device: str, **switches: bool) -> None:
        """Turn offloads of a device on or off: `offload("eth0", tx=False, gso=True)`."""
        words = [word for name, on in switches.items() for word in (name.replace("_", "-"), "on" if on else "off")]
        self.run("ethtool", "-K", device, *words)

    def nft(self, rules: str) -> None:
        """Load an nftables script."""
        self.run("nft", "-f", "-", stdin=rules)

    def mac(self, device: str) -> str:
        """A device's Ethernet address."""
        return str(self.guest.ask("mac", device=device, namespace=self.handle))

    # -- clients and servers

    def curl(self, url: str, *words: str, seconds: float = 10.0, check: bool = True) -> Done:
        """Fetch with curl, on its own connection."""
        limit = str(int(seconds * self.guest.scale))
        return self.run(
            "curl", "--silent", "--show-error", "--globoff", "--max-time", limit, *words, url,
            seconds=seconds + 1, check=check,
        )  # fmt: skip

    def serve(self, *, port: int = 80, size: int = 0, addresses: Sequence[str] = ()) -> None:
        """Start nginx: any path answers this host's name, the client's address and port; `/bulk` has `size` bytes."""
        listen = [f"{bracketed(a)}:{port}" for a in addresses] or [str(port), f"[::]:{port} ipv6only=on"]
        folder = f"/tmp/{self.handle}-{port}"  # noqa: S108  the guest's
        lines = "".join(f"listen {each} reuseport;" for each in listen)
        answer = f'return 200 "{self.name} $remote_addr $remote_port\\n";'
        self.guest.write(
            f"{folder}.conf",
            f"""daemon off; master_process off; pid {folder}.pid; error_log stderr;
events {{ worker_connections 1024; }}
http {{ access_log off; client_max_body_size 0; keepalive_timeout 600; client_body_temp_path {folder}.body;
server {{ {lines} default_type text/plain;
location / {{ {answer} }} location = /bulk {{ root {folder}.files; }} }} }}\n""",
        )
        if size:
            self.guest.run("mkdir", "-p", f"{folder}.files")
            self.guest.call("servers:fill", path=f"{folder}.files/bulk", size=size)
        self.start("nginx", "-e", "stderr", "-c", f"{folder}.conf")
        self.wait_for_port(port)

    def echo(self, *, port: int = 53, addresses: Sequence[str] = ()) -> None:
        """Start a UDP server that answers `NAME ADDRESS PORT` and what it was sent."""
        self.start_call("servers:udp_echo", name=self.name, port=port, addresses=list(addresses) or ["", "::"])
        self.wait_for_port(port, "udp")

    def get(self, address: str, path: str = "/", *, port: int = 80, count: int = 1, sport: int = 0) -> list[str]:
        """Fetch a path so many times with little more than a socket, where curl's own start would be most of it."""
        bodies: list[str] = self.call(
            "servers:http_get", address=address, port=port, path=path, count=count, sport=sport,
            patience=5 * self.guest.scale, seconds=10 + count,
        )  # fmt: skip
        return bodies

    def hold(self, address: str, *, port: int = 80, count: int = 1, sport: int = 0) -> Background:
        """Open connections that stay; returns when all are open."""
        job = self.start_call(
            "servers:hold", address=address, port=port, count=count, sport=sport, patience=5 * self.guest.scale
        )
        self.wait_until(lambda: job.so_far().startswith("open"), f"{count} connections to {address}")
        return job

    def ask(self, address: str, *, port: int = 53, text: str = "hello", sport: int = 0, patience: float = 2.0) -> str:
        """Send a datagram and return the answer, for which it waits so many (scaled) seconds."""
        limit = patience * self.guest.scale
        asked = {"address": address, "port": port, "text": text, "sport": sport, "patience": limit}
        return str(self.call("servers:udp_ask", seconds=patience + 3, **asked))

    def wait_for_port(self, port: int, protocol: str = "tcp") -> None:
        """Wait until somebody here is bound to a port."""
        pattern = re.compile(rf"^\s*\d+: [0-9A-F]+:{port:04X} ", re.M)

        def bound() -> bool:
            return any(pattern.search(self.read(f"/proc/net/{protocol}{six}")) for six in ("", "6"))

        self.wait_until(bound, f"port {port} of {self.name}")

    def wait_until(self, probe: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
        """Poll for a state; see `run.wait_until`."""
        tail = self.guest.machine.console_tail
        hint = f"read {self.guest.machine.console}"
        run.wait_until(probe, deadline=seconds * self.guest.scale, what=what, hint=hint, tail_of=tail)

    # -- frames

    def wire(self, device: str) -> Wire:
        """A packet socket on a device; it closes with the test at the latest."""
        return self.lab.plug(Wire(self, device))

    @contextmanager
    def capture(self, device: str) -> Iterator[Capture]:
        """Take every frame of a device for the length of a block; read the result after it.

        Raises:
            Failed: frames were lost.
        """
        wire = self.wire(device)
        taken = Capture(f"{self.name}:{device}")
        try:
            yield taken
        finally:
            taken.frames += wire.drain()
        lost = wire.close()
        if lost:
            raise Failed(f"{taken.place}: {lost} frames were lost; capture less")


def bracketed(address: str) -> str:
    """An address as it stands in a URL."""
    return f"[{address}]" if ":" in address else address


@dataclass
class Capture:
    """Frames that passed a device, both ways."""

    place: str
    frames: list[Frame] = field(default_factory=list)

    def seen(self, wanted: Callable[[packets.Packet], bool] = lambda _: True) -> list[packets.Packet]:
        """The IP packets, in order."""
        return [frame.packet for frame in self.frames if frame.is_ip and wanted(frame.packet)]

    def tcp(self, flags: str = "", **fields: Any) -> list[packets.Packet]:
        """The TCP segments that carry all of these flags and have these values (`source=`, `dport=` …)."""
        return self.seen(
            lambda p: p.protocol == packets.TCP
            and not p.fragment
            and set(flags) <= set(p.flags)
            and all(getattr(p, name) == value for name, value in fields.items())
        )

    def must_be_sound(self) -> None:
        """Fail on any wrong length or checksum, quoted packets included; and when there was nothing to look at."""
        assert any(frame.is_ip for frame in self.frames), f"{self.place}: no packet was seen"
        found = packets.wrong(self.frames)
        assert not found, f"{self.place}: {len(found)} problems in {len(self.frames)} frames:\n" + "\n".join(found[:20])

    def __str__(self) -> str:
        return "\n".join([f"{self.place}:", *(str(p) for p in self.seen())])


class Wire:
    """Frames sent and taken by hand on a device; what the host's own stack does goes on beside it."""

    def __init__(self, owner: Namespace, device: str) -> None:
        self.owner = owner
        self.device = device
        self.address = owner.mac(device)
        self.number: int | None = owner.guest.ask("wire", device=device, namespace=owner.handle, size=_CAPTURE)
        self._waiting: list[Frame] = []

    def send(self, *packets_: bytes, to: str, source: str = "", offload: Offload | None = None) -> None:
        """Send packets to an Ethernet address."""
        frames = [packets.frame(source or self.address, to, packet, offload) for packet in packets_]
        self.owner.guest.ask("send", number=self.number, frames=frames)

    def receive(self, seconds: float = 0.0, most: int = 64) -> list[Frame]:
        """Frames that came by; waits for the first no longer than `seconds` (of this machine)."""
        rows = self.owner.guest.ask("receive", seconds + 10, number=self.number, seconds=seconds, most=most)
        return [Frame.parse(kind, at, data) for kind, at, data in rows]

    def expect(self, wanted: Callable[[packets.Packet], bool], what: str, seconds: float = 2.0) -> packets.Packet:
        """The first incoming packet that is wanted; those before it are dropped, those after it wait.

        Raises:
            Failed: none came in time; with what came instead.
        """
        seen: list[str] = []
        limit = seconds * self.owner.guest.scale
        left = limit
        while left > 0:
            frames = self._waiting or self.receive(min(left, 1.0))
            self._waiting = []
            for index, frame in enumerate(frames):
                if not frame.is_ip or frame.kind == packets.OUTGOING:
                    continue
                seen.append(str(frame.packet))
                if wanted(frame.packet):
                    self._waiting = frames[index + 1 :]
                    found = packets.wrong([frame])
                    assert not found, "\n".join(found)
                    return frame.packet
            left -= 1.0 if not frames else 0.05
        raise Failed("\n".join([f"{self.owner.name}:{self.device}: {what}: not within {limit:.0f} s; came:", *seen]))

    def silence(self, wanted: Callable[[packets.Packet], bool], what: str, seconds: float = 0.3) -> None:
        """Fail if a packet that is wanted by nobody comes in this time."""
        try:
            packet = self.expect(wanted, what, seconds)
        except Failed:
            return
        raise Failed(f"{self.owner.name}:{self.device}: {what}: {packet}")

    def drain(self) -> list[Frame]:
        """Everything that is left."""
        found, self._waiting = self._waiting, []
        while more := self.receive(0, 256):
            found += more
        return found

    def close(self) -> int:
        """Close it; returns how many frames were lost."""
        if self.number is None:
            return 0
        statistics = self.owner.guest.ask("unplug", number=self.number)
        self.number = None
        self.owner.lab.wires.remove(self)
        return int(statistics["drops"])


class Lab:
    """The namespaces of one test."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.prefix = f"t{next(_NUMBER)}"
        self.members: dict[str, Namespace] = {}
        self.wires: list[Wire] = []

    def namespace(self, name: str) -> Namespace:
        """A new namespace."""
        self.members[name] = Namespace(self, name)
        return self.members[name]

    def remove(self, member: Namespace) -> None:
        """Take a namespace away, as a container's end does."""
        for wire in [wire for wire in self.wires if wire.owner is member]:
            wire.close()
        self.guest.ask("namespace_del", name=member.handle)
        del self.members[member.name]

    def plug(self, wire: Wire) -> Wire:
        """Remember a wire, to be closed at the end."""
        self.wires.append(wire)
        return wire

    def close(self) -> None:
        """End all programs, drop all namespaces, and wait until IPVS holds nothing of them."""
        if not self.guest.alive:
            return
        for wire in list(self.wires):
            wire.close()
        self.guest.ask("left", 60)
        for member in list(self.members.values()):
            self.remove(member)
        self.wait_for_empty_ipvs()

    def wait_for_empty_ipvs(self, seconds: float = 20.0) -> None:
        """Wait until nothing but its own modules uses ip_vs: each service, in whichever namespace, holds it once.

        Raises:
            BuildError: something is left.
        """

        def empty() -> bool:
            used = self.guest.modules().get("ip_vs", 0)
            holders = self.guest.ask("listing", path="/sys/module/ip_vs/holders")
            # A scheduler holds it twice: by the symbols that it uses, and by being registered.
            return used == sum(2 if name.startswith("ip_vs_") else 1 for name in holders)

        run.wait_until(
            empty,
            deadline=seconds * self.guest.scale,
            what="namespaces that are gone still hold services of IPVS",
            hint=f"read {self.guest.machine.console}",
            tail_of=lambda: self.guest.log[-20:],
        )


def selftest(guest: Guest, script: str) -> Done:
    """Run one of the kernel's own tests, a script of tools/testing/selftests/net/netfilter.

    Its time limits and pauses are those of real hardware, and scaled here as all others are: by programs of the same
    names that it finds first.
    """
    folder = "/tmp/scaled"  # noqa: S108  the guest's
    scale = int(guest.scale)
    programs = {
        "sleep": "exec /usr/bin/sleep" + ' "$1"' * scale,  # it adds them up, parts of seconds as well
        "timeout": f'limit=$(($1 * {scale}))\nshift\nexec /usr/bin/timeout "$limit" "$@"',
    }
    guest.run("mkdir", "-p", folder)
    for name, line in programs.items():
        guest.write(f"{folder}/{name}", f"#!/bin/sh\n{line}\n")
        guest.run("chmod", "+x", f"{folder}/{name}")
    path = f"{folder}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    command = f"cd /kernel/selftests/net/netfilter && exec bash ./{script}"
    done = guest.run("sh", "-c", command, seconds=60, env={"PATH": path})
    said = (done.out + done.err).upper()
    if "PASS" not in said or "FAIL" in said or "SKIP" in said:
        raise Failed(str(done))
    return done
