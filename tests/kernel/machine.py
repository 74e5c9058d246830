"""The machine in which a kernel is tested: booted once, spoken to through its agent (inside/agent.py).

Its root is the Debian tree of root.yaml with our programs over it, read-only, with an overlay in memory for what is
written. Modules and the kernel's own selftests come with the kernel under test.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shlex
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel import develop
from pipeline import progress, rpm, run, sandbox
from pipeline.debroot import Root
from pipeline.errors import BuildError
from pipeline.store import Stage, Store, digest
from pipeline.vm import Accelerator, Machine, Share
from tests.kernel.usermode import Line, UserMode
from tools import build as tools

HERE = Path(__file__).resolve().parent
_9P = "trans=virtio,version=9p2000.L,msize=512000,cache=loose"
_PORT = "lvsforge.agent"  # as in inside/agent.py
_PROGRAMS = ("ipvsadm", "keepalived", "quagga", "toa-bpf")  # folders of tools/
SANITIZED = "/opt/sanitized"  # where the keepalived is that is tested
_MEMORY = 1024  # MiB
# What a healthy kernel never logs. Each is the start of a report, or its only line.
_ALARMS = re.compile(
    r"WARNING:|BUG:|\bKASAN\b|KFENCE|UBSAN|ODEBUG|Oops|Call Trace|general protection|kernel NULL pointer"
    r"|INFO: (possible|trying|task|rcu)|suspicious RCU|possible (recursive|circular|irq|deadlock|unsafe)"
    r"|DEBUG_LOCKS_WARN_ON|inconsistent lock state|held lock freed|unregister_netdevice: waiting"
    r"|refcount_t:|list_(add|del) corruption|hw csum failure|leaked reference|scheduling while atomic"
    r"|sleeping function called|soft lockup|hard LOCKUP|self-detected stall|detected stalls|slab .* objects remaining"
    r"|suspected memory leaks|kobject.*refcount|messages were lost"
    r"|(EXPECTATION|ASSERTION) FAILED|^[\d.]+ +not ok "
)
# The same letters in a line that reports nothing.
_CALM = re.compile(r"kmemleak: Kernel memory leak detector|Lock dependency validator|lockdep is turned on")
# Reports about 6.12 itself: nft_set_lookup() walks, under the mutex that protects it, a list in the way of readers.
# Such a report comes once and leaves lockdep on.
_UPSTREAM = re.compile(r"net/netfilter/nf_tables_api\.c:\d+ RCU-list traversed in non-reader section")


class Failed(AssertionError):
    """A command in the machine did not do what the test asked for; its text holds the command and its output."""


@dataclass(frozen=True)
class Done:
    """What a command left.

    Attributes:
        command: as it could be typed, with the namespace before it.
        status: exit status; negative for death by that signal; None when its time was over.
        out, err: its output, the last MiB of it.
        result: what a function returned.
    """

    command: str
    status: int | None
    out: str
    err: str
    result: Any = None

    def __str__(self) -> str:
        how = "its time was over" if self.status is None else f"status {self.status}"
        parts = [f"$ {self.command}   [{how}]"]
        parts += [f"{name}: {line}" for name in ("out", "err") for line in getattr(self, name).splitlines()[-40:]]
        return "\n".join(parts)


class Guest:
    """A booted machine; see the operations of inside/agent.py, which the methods here call."""

    def __init__(
        self,
        machine: Machine | UserMode,
        scale: float,
        link: socket.socket | Line,
        kernel: develop.Built,
        shell: Callable[[], str],
    ) -> None:
        self.machine = machine
        self.scale = scale
        self.kernel = kernel
        self.shell = shell
        self.alive = True
        self._link = link
        self.log: list[str] = []  # the kernel's messages since the test began

    # -- the channel

    def ask(self, operation: str, patience: float = 20.0, /, **arguments: Any) -> Any:
        """One request.

        Args:
            operation: a method of the agent.
            patience: how long it may take on this machine, in its own seconds (not scaled).
            arguments: for the method.

        Raises:
            Failed: the operation failed, or the machine is gone.
        """
        if not self.alive:
            raise Failed("the machine is gone: an earlier failure ended it")
        message = json.dumps({"op": operation, "with": arguments}, default=_pack).encode()
        try:
            self._link.settimeout(patience + 30 * self.scale)  # the agent keeps the limit, this is for a hung kernel
            self._link.sendall(struct.pack("!I", len(message)) + message)
            (length,) = struct.unpack("!I", self._exactly(4))
            answer = json.loads(self._exactly(length), object_hook=_unpack)
        except (OSError, EOFError) as error:
            self.alive = False
            how = f"{operation}: {error or type(error).__name__}"
            tail = "\n".join([*self._death(), *self.machine.console_tail(60)])
            raise Failed(f"the machine no longer answers ({how})\n{tail}") from None
        if "error" in answer:
            raise Failed(f"{operation} {arguments}: {answer['error']}")
        return answer["value"]

    def _death(self) -> list[str]:
        """How its process ended, where no panic of the guest's kernel explains that."""
        try:
            status = self.machine.process.wait(2.0)  # its sockets are closed a moment before
        except BuildError:
            return []
        return [run.describe(["its process"], status)] if status else []

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._link.recv(count - len(data))
            if not part:
                raise EOFError("the channel was closed")
            data += part
        return bytes(data)

    # -- commands

    def run(
        self,
        *argv: str,
        namespace: str = "",
        seconds: float = 5.0,
        check: bool = True,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
    ) -> Done:
        """Run a program to its end.

        Args:
            argv: the command.
            namespace: where; "" is the namespace that the machine booted with.
            seconds: its limit under KVM; scaled for this machine.
            check: fail unless it ends with 0.
            stdin: its standard input.
            env: added to its environment.

        Raises:
            Failed: it did not end in time, or (with `check`) not with 0.
        """
        job = self.start(*argv, namespace=namespace, stdin=stdin, env=env)
        return self.wait(job, seconds, check=check)

    def start(
        self, *argv: str, namespace: str = "", stdin: str = "", env: Mapping[str, str] | None = None
    ) -> Background:
        """Start a program in the background."""
        number = self.ask("start", argv=argv, namespace=namespace, stdin=stdin, env=dict(env or {}))
        return Background(self, number, _shown(namespace, shlex.join(argv)))

    def call(self, function: str, *, namespace: str = "", seconds: float = 5.0, **arguments: Any) -> Any:
        """Call a function of inside/ and return what it returned; see `run`."""
        return self.wait(self.start_call(function, namespace=namespace, **arguments), seconds).result

    def start_call(self, function: str, *, namespace: str = "", **arguments: Any) -> Background:
        """Call a function of inside/ in the background."""
        # The first job that needs scapy pays for its import: about ten seconds under emulation.
        number = self.ask("call", 60, function=function, arguments=arguments, namespace=namespace)
        return Background(self, number, _shown(namespace, f"{function}({arguments})"))

    def wait(self, job: Background, seconds: float, *, check: bool = True) -> Done:
        """Wait for a job's end; see `run`."""
        limit = seconds * self.scale
        answer = self.ask("wait", limit, number=job.number, seconds=limit)
        done = Done(job.command, answer["status"], answer["out"], answer["err"], answer.get("result"))
        if answer["late"]:
            late = Done(job.command, None, done.out, done.err)
            raise Failed(f"no end within {limit:.0f} s:\n{late}")
        if check and done.status != 0:
            raise Failed(str(done))
        return done

    # -- files and settings

    def read(self, path: str, namespace: str = "") -> str:
        """A file's text."""
        return str(self.ask("read", path=path, namespace=namespace))

    def write(self, path: str, text: str, namespace: str = "") -> None:
        """Write a file."""
        self.ask("write", path=path, text=text, namespace=namespace)

    def modules(self) -> dict[str, int]:
        """The loaded modules and their use counts."""
        rows = (line.split() for line in self.read("/proc/modules").splitlines())
        return {row[0]: int(row[2]) for row in rows}

    # -- the kernel's log

    def new_messages(self) -> list[str]:
        """What the kernel logged since the last time."""
        fresh: list[str] = self.ask("messages")
        self.log += fresh
        return fresh

    def alarms(self) -> list[str]:
        """The reports among the messages of this test, each with the lines that follow it."""
        self.new_messages()
        log = without_upstreams(self.log)
        hits = [n for n, line in enumerate(log) if _ALARMS.search(line) and not _CALM.search(line)]
        shown = sorted({n for hit in hits for n in range(max(0, hit - 1), min(len(log), hit + 40))})
        return [log[n] for n in shown]

    def leaks(self) -> str:
        """Let kmemleak look twice, because an object that is being moved is seen at no place; returns its report."""
        file = "/sys/kernel/debug/kmemleak"
        for _ in range(2):
            # It judges nothing that is younger than five seconds.
            begun = self.ask("hello")["uptime"]
            run.wait_until(
                lambda begun=begun: self.ask("hello")["uptime"] > begun + 6,  # type: ignore[misc]
                deadline=120,
                what="the guest's clock",
                hint=f"read {self.machine.console}",
            )
            self.ask("write", 600 * self.scale, path=file, text="scan")
        return self.read(file)

    def close(self) -> None:
        """Forget it; the machine ends with its `with` block."""
        self.alive = False
        self._link.close()

    def keep(self) -> str:
        """Leave the machine running with a shell on a socket; returns what to tell the developer."""
        if self.alive:
            shell = "setsid bash -i </dev/ttyS1 >/dev/ttyS1 2>&1"
            self.start("sh", "-c", f"stty -F /dev/ttyS1 sane; while :; do {shell}; done")
        self.machine.keep()
        pid = self.machine.process.pid
        return (
            f"the machine still runs; its shell: {self.shell()}\n"
            f"its namespaces: ip netns; end it: kill {pid}; its console: {self.machine.console}"
        )


@dataclass(frozen=True)
class Background:
    """A job that runs.

    Attributes:
        guest: where.
        number: the agent's.
        command: as it could be typed.
    """

    guest: Guest
    number: int
    command: str

    def wait(self, seconds: float = 5.0, *, check: bool = True) -> Done:
        """Wait for its end; see `Guest.run`."""
        return self.guest.wait(self, seconds, check=check)

    def stop(self, seconds: float = 2.0) -> Done:
        """End it, with SIGKILL when SIGTERM is not heard; how it ended is in the answer and no failure."""
        limit = seconds * self.guest.scale
        answer = self.guest.ask("stop", limit, number=self.number, seconds=limit)
        return Done(self.command, answer["status"], answer["out"], answer["err"], answer.get("result"))

    def hit(self, signum: int) -> None:
        """Send it a signal."""
        self.guest.ask("hit", number=self.number, signum=signum)

    def so_far(self) -> str:
        """What it wrote until now.

        Raises:
            Failed: it has ended.
        """
        if done := self.poll():
            raise Failed(str(done))
        return str(self.guest.ask("output", number=self.number))

    def poll(self) -> Done | None:
        """How it ended, or None while it runs. Once it has ended it is forgotten."""
        answer = self.guest.ask("wait", number=self.number, seconds=0, end=False)
        if answer["late"]:
            return None
        return Done(self.command, answer["status"], answer["out"], answer["err"], answer.get("result"))


def without_upstreams(log: list[str]) -> list[str]:
    """A kernel's log without the reports that are known of the unpatched kernel, each from its title to its end."""
    kept = list(log)
    while (at := next((n for n, line in enumerate(kept) if _UPSTREAM.search(line)), None)) is not None:
        first = next((n for n in range(at, max(at - 6, -1), -1) if "WARNING: suspicious RCU usage" in kept[n]), at)
        last = next((n for n in range(at, len(kept)) if "</TASK>" in kept[n]), at)
        del kept[first : last + 1]
    return kept


def _shown(namespace: str, words: str) -> str:
    return f"ip netns exec {namespace} {words}" if namespace else words


def _pack(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _unpack(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["bytes"]) if set(value) == {"bytes"} else value


# --- what it is made of


def root(store: Store) -> Root:
    """The Debian tree of the machine."""
    return develop.guest_root(store)


def sanitized_keepalived(store: Store) -> Stage:
    """Our keepalived with the compiler's sanitizers for addresses and undefined behaviour, and with SNMP."""
    own = develop.keepalived_root(store)
    return tools.room(store).variant("keepalived", "sanitized", switches=["sanitizers"], root=own)


def programs_stage(store: Store) -> Stage:
    """Our packages that are used in the machine, unpacked."""
    room = tools.room(store)
    packages = [room.stage(name) for name in _PROGRAMS]
    sanitized = sanitized_keepalived(store)

    source = HERE / "inside" / "peer.c"

    def unpack(out: Path) -> None:
        box = sandbox.Sandbox(store.path(room.root.stage()) / "root")
        for file in (file for package in packages for file in tools.packages(store.path(package))):
            rpm.unpack(box, file, out / "root")
        for file in tools.packages(store.path(sanitized)):
            rpm.unpack(box, file, out / f"root{SANITIZED}")
        box.run(
            ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", "/build/root/usr/bin/peer", "/build/peer.c"],
            binds={out / "root": "/build/root"},
            ro_binds={source: "/build/peer.c"},
            what=f"compiling {source.name}",
        )

    title = f"unpacking {', '.join(_PROGRAMS)}"
    inputs = {"rev": 2, source.name: digest(source)}
    return Stage("test-programs", inputs, unpack, [*packages, sanitized, room.root.stage()], title=title)


@contextlib.contextmanager
def booted(kernel: develop.Built, work: Path, store: Store, *, may_keep: bool = False) -> Iterator[Guest]:
    """A machine with this kernel for the length of a `with` block; its console is in `work`.

    Raises:
        BuildError: it does not boot; with the console's tail.
    """
    shares = [
        Share(store.ensure(root(store).stage()) / "root", "/dev/root"),
        Share(store.ensure(programs_stage(store)) / "root", "programs"),
        Share(HERE / "inside", "inside"),
        Share(kernel.folder, "kernel"),
    ]
    start = _in_user_mode if kernel.debug else _emulated
    with progress.step(f"booting {kernel.title}"), contextlib.ExitStack() as stack:
        guest = stack.enter_context(start(kernel, work, store, shares, may_keep))
        greeting = _greeting(guest)
        if greeting["uname"] != kernel.uname:
            raise BuildError(f"{kernel.title} is {kernel.uname}, {greeting['uname']} booted", "invoke clean --store")
        alive = stack.pop_all()
    with alive:
        try:
            yield guest
        finally:
            guest.close()


def _mounts(share: Callable[[str, str], str], *more: str) -> str:
    """What /bin/sh does before the agent starts.

    Args:
        share: the command that mounts a share's tag at a place.
        more: commands that need /sys.
    """
    return "; ".join(
        [
            "mount -t tmpfs tmpfs /mnt",
            "mkdir /mnt/upper /mnt/work /mnt/root /mnt/programs",
            share("programs", "/mnt/programs"),
            "mount -t overlay -o lowerdir=/mnt/programs:/,upperdir=/mnt/upper,workdir=/mnt/work root /mnt/root",
            "cd /mnt/root",
            "mount -t proc proc proc",
            "mount -t sysfs sys sys",
            "mount -t devtmpfs dev dev",
            "mkdir -p dev/pts inside kernel usr/lib/modules",
            "mount -t devpts pts dev/pts",
            "mount -t tmpfs run run",
            "mount -t tmpfs tmp tmp",
            "mount -t debugfs debug sys/kernel/debug",
            share("inside", "inside"),
            share("kernel", "kernel"),
            "mount --bind kernel/lib/modules usr/lib/modules",
            *more,
            "exec chroot . python3 /inside/agent.py",
        ]
    )


def _words(kernel: develop.Built) -> list[str]:
    """Of the command line, what every machine has."""
    return [
        "quiet loglevel=5",
        # A loaded host is no bug of the guest's kernel.
        "rcupdate.rcu_cpu_stall_timeout=180 sysctl.kernel.watchdog_thresh=60 sysctl.kernel.hung_task_timeout_secs=300",
        # An interface that a module makes for every namespace (tunl0, sit0, erspan0, …) costs time in each test.
        "sysctl.net.core.fb_tunnels_only_for_init_net=2",
        # No red zones: here slub's own memset(3) over them is one that KASAN, which has its own, looks at.
        *(["kasan_multi_shot slub_debug=F,ip_vs* kunit.enable=1"] if kernel.debug else []),
    ]


@contextlib.contextmanager
def _emulated(
    kernel: develop.Built, work: Path, store: Store, shares: Sequence[Share], may_keep: bool
) -> Iterator[Guest]:
    accelerator = Accelerator.probe(store.root)
    cpu: str | None = None
    emulated: list[str] = []
    late: list[str] = []
    if accelerator.name == "tcg":
        # Programs may need cmpxchg16b (haproxy dies without it), but the kernel must not use it there: see pipeline.vm.
        cpu, emulated = "qemu64", ["clearcpuid=cx16"]
        # QEMU before 8.1.1 dies (memory_region_dispatch_write, of no region) when one CPU moves a PCI device's
        # registers while another one, which has not flushed its TLB yet, writes to its APIC: so the others come when
        # the devices have their places.
        emulated.append("maxcpus=1")
        late.append("echo 1 | tee sys/devices/system/cpu/cpu[1-9]*/online >/dev/null")
    mounts = _mounts(lambda tag, place: f"mount -t 9p -o {_9P},ro {tag} {place}", *late)
    words = [
        f"console=ttyS0 panic=-1 root=/dev/root rootfstype=9p ro rootflags={_9P}",
        # Under emulation a page-table switch at every system call costs more than anything that is measured here.
        "mitigations=off nokaslr audit=0",
        # A host that has other work at that moment makes the emulated timer look broken, and the kernel panics.
        "no_timer_check",
        *_words(kernel),
        *emulated,
        f'init=/bin/sh -- -ec "{mounts}"',
    ]
    with run.temporary_directory("lvsforge-guest-") as sockets, contextlib.ExitStack() as stack:
        # A kept machine's shell must outlive this block, so its socket lies with the console when the path is short.
        place = work.resolve() / "shell" if may_keep and len(str(work.resolve())) < 90 else sockets / "shell"
        agent = sockets / "agent"
        machine = Machine(
            f"test-{kernel.uname}",
            work,
            accelerator,
            cpu=cpu,
            kernel=kernel.image,
            initrd=kernel.initrd,
            append=" ".join(words),
            shares=shares,
            memory=_MEMORY,
            network=False,
            may_keep=may_keep,
            extra=[
                *("-chardev", f"socket,id=shell,path={place},server=on,wait=off", "-serial", "chardev:shell"),
                *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={agent},server=on,wait=off"),
                *("-device", f"virtserialport,chardev=agent,name={_PORT}"),
            ],
        )
        stack.enter_context(machine)
        link = stack.enter_context(socket.socket(socket.AF_UNIX))
        link.connect(str(agent))
        connect = f"socat -,rawer,escape=0x1d UNIX-CONNECT:{place}   (Ctrl-] leaves)"
        yield Guest(machine, machine.accelerator.scale, link, kernel, lambda: connect)


@contextlib.contextmanager
def _in_user_mode(
    kernel: develop.Built, work: Path, store: Store, shares: Sequence[Share], may_keep: bool
) -> Iterator[Guest]:
    paths = {share.tag: share.path for share in shares}
    words = [
        f"root=/dev/root rootfstype=hostfs ro rootflags={paths['/dev/root']}",
        *_words(kernel),
        "init=/bin/sh",
        "--",
        "-ec",
        f'"{_mounts(lambda tag, place: f"mount -t hostfs -o ro,{paths[tag]} none {place}")}"',
    ]
    with contextlib.ExitStack() as stack:
        here, line = (stack.enter_context(end) for end in socket.socketpair())
        link = Line(here)
        name = f"test-{kernel.uname}"
        machine = UserMode(name, work, kernel.image, words, memory=_MEMORY, line=line.fileno(), may_keep=may_keep)
        stack.enter_context(machine)
        line.close()  # so that the guest's end is the end of the line
        link.settimeout(60 * machine.scale)
        try:
            link.ready()
        except OSError as error:
            raise BuildError(
                f"{kernel.title} does not get as far as its agent: {error}",
                f"read {machine.console}",
                machine.console_tail(),
            ) from None

        def log() -> list[str]:
            guest.new_messages()
            return guest.log

        guest = Guest(machine, machine.scale, link, kernel, lambda: f"screen {machine.terminal(log)}")
        yield guest


def _greeting(guest: Guest) -> dict[str, Any]:
    """What the agent says first."""
    try:
        answer: dict[str, Any] = guest.ask("hello", 15 * guest.scale)
    except Failed as error:
        raise BuildError(
            f"{guest.kernel.title} does not get as far as its agent",
            f"read {guest.machine.console}",
            str(error).splitlines(),
        ) from None
    return answer


def unload(guest: Guest) -> None:
    """Unload every module of IPVS, users first."""
    while names := [n for n, used in guest.modules().items() if n.startswith(("ip_vs", "xt_ipvs")) and not used]:
        guest.run("rmmod", *names, seconds=20)
    left = [name for name in guest.modules() if name.startswith("ip_vs")]
    assert not left, f"these modules are still used: {left}"
