"""Process 1 of the machine under test: does what the host asks for over a virtio port, one request after the other.

A machine of User Mode Linux has no such ports: there it is the first serial line. READY says that the line is raw, and
again after each PIECE bytes of a request that they were read: the line's driver never wakes up again from being told to
wait, which it is when 4 KiB are not read.

A message is its length (4 bytes, network order) and JSON; bytes travel as {"bytes": base64}. A request names an
operation of `Agent` and its arguments; the answer is {"value": …} or {"error": text}. Not the console: the kernel
writes into the midst of its lines.

Commands and functions run as jobs: a forked child in a network namespace, in a session of its own, its output in
files. Functions are Python of this folder; what they import once (scapy takes seconds) later children have already.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import glob
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import time
import traceback
import tty
from typing import Any

PORT = "lvsforge.agent"
LINE, READY, PIECE = "/dev/ttyS0", b"!", 1024
NAMESPACES = "/run/netns"  # where ip-netns(8) looks for them
JOBS = "/run/jobs"
OUTPUT = 1 << 20  # bytes of a job's output that are answered; its end is what explains a failure
CLONE_NEWNET = 0x40000000
MS_BIND, MS_REC, MS_SHARED, MNT_DETACH = 0x1000, 0x4000, 0x100000, 2
# linux/if_packet.h
SOL_PACKET, PACKET_STATISTICS, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 6, 15, 23
SO_RCVBUFFORCE = 33
SIOCSIFFLAGS, SIOCGIFHWADDR, IFF_UP = 0x8914, 0x8927, 1  # linux/sockios.h, linux/if.h
ETH_P_ALL = 3
LIBC = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def enter(namespace: str) -> None:
    """Move this thread into a network namespace; "" is the one of the machine."""
    if not namespace:
        _checked(LIBC.setns(Agent.first, CLONE_NEWNET), "the machine's own namespace")
        return
    descriptor = os.open(f"{NAMESPACES}/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(LIBC.setns(descriptor, CLONE_NEWNET), f"namespace {namespace}")
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def inside(namespace: str) -> Any:
    """A block of this process in a network namespace."""
    if not namespace:
        yield
        return
    enter(namespace)
    try:
        yield
    finally:
        enter("")


class Job:
    """A child: a program, or a function of this folder."""

    def __init__(self, number: int, words: str) -> None:
        self.number = number
        self.words = words
        self.pid = 0  # until it has been started
        self.status: int | None = None

    def streams(self, stdin: str) -> list[tuple[int, str, int]]:
        """What its descriptors are, each with the flags to open it with; its input is a file if it has any."""
        fresh = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        return [
            (0, self.path("in") if stdin else "/dev/null", os.O_RDONLY),
            (1, self.path("out"), fresh),
            (2, self.path("err"), fresh),
        ]

    def path(self, what: str) -> str:
        """Where its `out`, `err` or `result` is."""
        return f"{JOBS}/{self.number}.{what}"

    def text(self, what: str) -> str:
        """The end of one of its files."""
        try:
            with open(self.path(what), "rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - OUTPUT))
                return stream.read().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return ""


class Agent:
    """The operations; each public method is one."""

    first = -1  # the namespace that the machine booted with

    def __init__(self) -> None:
        Agent.first = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.jobs: dict[int, Job] = {}
        self.wires: dict[int, socket.socket] = {}
        self.count = 0
        self.log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.makedirs(JOBS)
        os.makedirs(NAMESPACES)
        # ip-netns(8) does the same before its first namespace: mounts below must reach its children
        _checked(LIBC.mount(NAMESPACES.encode(), NAMESPACES.encode(), b"none", MS_BIND | MS_REC, None), "bind")
        _checked(LIBC.mount(b"", NAMESPACES.encode(), b"none", MS_SHARED | MS_REC, None), "share")

    # -- the machine

    def hello(self) -> dict[str, Any]:
        """What runs here."""
        with open("/proc/uptime", encoding="ascii") as uptime:
            return {"uname": os.uname().release, "uptime": float(uptime.read().split()[0])}

    def messages(self) -> list[str]:
        """What the kernel logged since this was last asked, as `SECONDS TEXT`."""
        lines: list[str] = []
        while True:
            try:
                record = os.read(self.log, 8192).decode("utf-8", errors="replace")
            except BlockingIOError:
                return lines
            except BrokenPipeError:  # EPIPE: the buffer went round; the next read is the oldest that is left
                lines.append("(messages were lost: the log's buffer is too small)")
                continue
            head, _, text = record.partition(";")
            # What follows the first line says for which device the message was.
            lines.append(f"{int(head.split(',')[2]) / 1e6:.6f} {text.partition(chr(10))[0]}")

    def namespace_add(self, name: str, settings: dict[str, str]) -> None:
        """Make a network namespace that ip-netns(8) knows too; its loopback device is up, /proc/sys as told."""
        path = f"{NAMESPACES}/{name}"
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o444))
        try:
            _checked(LIBC.unshare(CLONE_NEWNET), "unshare")
            try:
                _checked(LIBC.mount(b"/proc/self/ns/net", path.encode(), b"none", MS_BIND, None), f"mount {path}")
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
                for file, text in settings.items():
                    self.write(f"/proc/sys/{file}", text)
            finally:
                enter("")
        except OSError:
            os.unlink(path)
            raise

    def namespace_del(self, name: str) -> None:
        """Drop a network namespace; the kernel takes it down when the last process has left it."""
        path = f"{NAMESPACES}/{name}"
        _checked(LIBC.umount2(path.encode(), MNT_DETACH), f"umount {path}")
        os.unlink(path)

    def namespaces(self) -> list[str]:
        """Their names."""
        return sorted(os.listdir(NAMESPACES))

    def mac(self, device: str, namespace: str) -> str:
        """A device's Ethernet address."""
        with inside(namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            request = struct.pack("40s", device.encode())  # struct ifreq: the address follows its family's two bytes
            return fcntl.ioctl(any_socket, SIOCGIFHWADDR, request)[18:24].hex(":")

    # -- files

    def read(self, path: str, namespace: str = "") -> str:
        """A file's text; what /proc/net and /proc/sys/net show depends on the namespace."""
        with inside(namespace), open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()

    def write(self, path: str, text: str, namespace: str = "") -> None:
        """Write a file, in one write(2)."""
        with inside(namespace):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)

    def listing(self, path: str, namespace: str = "") -> list[str]:
        """The names in a directory, or [] where there is none."""
        with inside(namespace):
            return sorted(os.listdir(path)) if os.path.isdir(path) else []

    # -- jobs

    def start(self, argv: list[str], namespace: str = "", stdin: str = "", env: dict[str, str] | None = None) -> int:
        """Start a program; returns the job's number.

        Without fork(2): to copy this process's page tables, and then the pages that either side writes, takes longer
        than most of the programs.
        """
        job = self._job(" ".join(argv), stdin)
        actions = [(os.POSIX_SPAWN_OPEN, number, path, flags, 0o600) for number, path, flags in job.streams(stdin)]
        try:
            with inside(namespace):
                job.pid = os.posix_spawnp(
                    argv[0], argv, {**os.environ, **(env or {})}, file_actions=actions, setsid=True, setsigmask=()
                )
        except OSError as error:
            self._forget(job)
            raise OSError(error.errno, f"{argv[0]}: {error.strerror}") from None
        return job.number

    def call(self, function: str, arguments: dict[str, Any], namespace: str = "") -> int:
        """Start `module:function` of this folder; returns the job's number."""
        name, _, attribute = function.partition(":")
        code = getattr(importlib.import_module(name), attribute)  # here, so that the next child has it already
        job, pid = self._fork(namespace, function)
        if pid:
            return job.number
        status = 0
        try:
            value = code(**arguments)
            with open(job.path("result"), "w", encoding="utf-8") as stream:
                json.dump(value, stream, default=_pack)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _job(self, words: str, stdin: str) -> Job:
        self.count += 1
        job = self.jobs[self.count] = Job(self.count, words)
        if stdin:
            with open(job.path("in"), "w", encoding="utf-8") as stream:
                stream.write(stdin)
        return job

    def _fork(self, namespace: str, words: str) -> tuple[Job, int]:
        job = self._job(words, "")
        pid = os.fork()
        if pid:
            job.pid = pid
            return job, pid
        try:
            os.setsid()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            for number, path, flags in job.streams(""):
                descriptor = os.open(path, flags, 0o600)
                os.dup2(descriptor, number)
                os.close(descriptor)
            if namespace:
                enter(namespace)
            for wire in self.wires.values():
                wire.close()
        except BaseException:
            traceback.print_exc()
            os._exit(126)
        return job, 0

    def wait(self, number: int, seconds: float, end: bool = True) -> dict[str, Any]:
        """Wait for a job; with `end` it is killed when the time is over, and forgotten in any case."""
        job = self.jobs[number]
        deadline = time.monotonic() + seconds
        while not self._ended(job) and (left := deadline - time.monotonic()) > 0:
            signal.sigtimedwait({signal.SIGCHLD}, min(left, 0.25))
        late = job.status is None
        if late and end:
            self._kill(job)
        answer = {"status": job.status, "late": late, "out": job.text("out"), "err": job.text("err")}
        if result := job.text("result"):
            answer["result"] = json.loads(result)
        if job.status is not None:
            self._forget(job)
        return answer

    def output(self, number: int) -> str:
        """What a job wrote until now."""
        return self.jobs[number].text("out")

    def stop(self, number: int, seconds: float) -> dict[str, Any]:
        """End a job, kindly at first; what else is left of its session is killed."""
        job = self.jobs[number]
        if not self._ended(job):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGTERM)
        return self.wait(number, seconds)

    def hit(self, number: int, signum: int) -> None:
        """Send a signal to a job."""
        os.kill(self.jobs[number].pid, signum)

    def left(self) -> list[str]:
        """End every job that still runs; returns their command lines."""
        names = []
        for job in list(self.jobs.values()):
            if not self._ended(job):
                names.append(job.words)
                self._kill(job)
            self._forget(job)
        return names

    def _ended(self, job: Job) -> bool:
        """Reap everything that ended: as process 1 we get the orphans, too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            for each in self.jobs.values():
                if each.pid == pid:
                    each.status = os.waitstatus_to_exitcode(status)
        return job.status is not None

    def _kill(self, job: Job) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not self._ended(job) and time.monotonic() < deadline:
            signal.sigtimedwait({signal.SIGCHLD}, 0.05)

    def _forget(self, job: Job) -> None:
        self.jobs.pop(job.number, None)
        if job.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)  # children that it left behind
        for what in ("in", "out", "err", "result"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(job.path(what))

    # -- frames as they are on the wire

    def wire(self, device: str, namespace: str, size: int) -> int:
        """Open a packet socket on a device; each frame has the virtio header that tells its offloads."""
        with inside(namespace):
            link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
            link.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
            link.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            link.bind((device, ETH_P_ALL))
        link.setblocking(False)
        self.count += 1
        self.wires[self.count] = link
        return self.count

    def send(self, number: int, frames: list[bytes]) -> None:
        """Send frames, each with its virtio header before it."""
        for frame in frames:
            self.wires[number].send(frame)

    def receive(self, number: int, seconds: float, most: int) -> list[list[Any]]:
        """Frames that arrived, in order, at most so many: [kind (linux/if_packet.h), time, header and frame].

        Waits until there is one, but no longer than `seconds`; then takes what is there.
        """
        wire = self.wires[number]
        found: list[list[Any]] = []
        if seconds > 0:
            select.select([wire], [], [], seconds)
        while len(found) < most:
            try:
                data, address = wire.recvfrom(1 << 18)
            except BlockingIOError:
                break
            except OSError as error:  # the device is gone or down: what was queued before comes first
                if found:
                    break
                raise OSError(error.errno, f"wire: {error.strerror}") from None
            found.append([address[2], time.monotonic(), data])
        return found

    def unplug(self, number: int) -> dict[str, int]:
        """Close a packet socket; returns how many frames it took and how many it lost."""
        wire = self.wires.pop(number)
        packets, drops = struct.unpack("=II", wire.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        wire.close()
        return {"packets": packets, "drops": drops}


def _pack(value: Any) -> Any:
    """What JSON does not know."""
    if isinstance(value, bytes | bytearray):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    raise TypeError(f"{type(value).__name__} cannot be answered")


def _unpack(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["bytes"]) if set(value) == {"bytes"} else value


class Line:
    """The serial line, as if it were a port."""

    def __init__(self) -> None:
        self.stream = open(LINE, "r+b", buffering=0)
        self.taken = 0
        fcntl.fcntl(self.stream, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        tty.setraw(self.stream.fileno(), termios.TCSANOW)
        self.stream.write(READY)

    def read(self, count: int) -> bytes:
        data = self.stream.read(min(count, PIECE - self.taken))
        self.taken += len(data)
        if self.taken == PIECE:
            self.taken = 0
            self.stream.write(READY)
        return data

    def write(self, data: bytes) -> int:
        self.taken = 0  # an answer: the next request begins
        return self.stream.write(data)


def channel() -> Any:
    """The way to the host."""
    if not os.path.isdir("/sys/class/virtio-ports"):
        return Line()
    stream = open(port(), "r+b", buffering=0)
    fcntl.fcntl(stream, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return stream


def port() -> str:
    """The device of our virtio port; nobody runs udev here."""
    for name in glob.glob("/sys/class/virtio-ports/*/name"):
        with open(name, encoding="ascii") as stream:
            if stream.read().strip() == PORT:
                return f"/dev/{name.split('/')[-2]}"
    raise FileNotFoundError(f"no virtio port is named {PORT}")


def exactly(stream: Any, count: int) -> bytes:
    """So many bytes; the port gives what it has, and nothing at all while the host is not there yet."""
    data = b""
    while len(data) < count:
        part = stream.read(count - len(data))
        if not part:
            time.sleep(0.05)  # noqa: TID251  pipeline/run.py is not here; read(2) of an unconnected port returns at once
        data += part or b""
    return data


def serve() -> None:
    """Answer requests for ever."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # for sigtimedwait
    agent = Agent()
    stream = channel()
    while True:
        (length,) = struct.unpack("!I", exactly(stream, 4))
        request = json.loads(exactly(stream, length), object_hook=_unpack)
        try:
            answer = {"value": getattr(agent, request["op"])(**request["with"])}
        except Exception as error:
            short = isinstance(error, OSError)
            answer = {"error": str(error) if short else traceback.format_exc(), "errno": getattr(error, "errno", 0)}
        data = json.dumps(answer, default=_pack).encode()
        data = struct.pack("!I", len(data)) + data
        while data:
            data = data[stream.write(data) :]


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    sys.dont_write_bytecode = True
    os.environ.update(PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", HOME="/root", LANG="C.UTF-8")
    try:
        serve()
    except BaseException:
        traceback.print_exc()  # on the console, whose tail the host shows
        with open("/proc/sysrq-trigger", "w", encoding="ascii") as trigger:
            trigger.write("o")
        time.sleep(60)  # noqa: TID251  process 1 may not end before the power is off
