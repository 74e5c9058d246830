"""Virtual machines: QEMU under KVM where it really works, else under TCG; the serial console kept, nothing left over.

with Machine("director", work, Accelerator.probe(cache), disks=[Disk(image)], seed=seed) as machine:
    machine.wait_for_ssh()
    print(machine.run("uname -r").stdout)
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pipeline import progress, qmp, run
from pipeline.errors import BuildError

QEMU = "qemu-system-x86_64"
# Every deadline in this project is written for KVM and multiplied for TCG. Measured on two idle cores: ssh after 20 to
# 30 s under TCG where KVM needs about 5; a loaded machine doubles that.
_TCG_SCALE = 6.0
# qemu64 boots about 15 % faster than max (udev loads fewer modules), and Debian is built for it. Without cmpxchg16b:
# QEMU before 8.0 takes its flags from an operation before the last one, and can leave half of an operand as EFLAGS.
# Linux allocates memory with it; interrupted right then, it ran on with a wrong direction flag, and panicked.
_TCG_CPU = "qemu64,-cx16"
_CONSOLE_TAIL = 30
_BANNER = b"SSH-"
# Where Debian, Fedora and Arch keep the firmware: code, and the empty variable store that goes with it.
_FIRMWARE = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
)

# --- the accelerator --------------------------------------------------------------------------------------------

PROBE_DEADLINE = 10.0  # seconds; TCG takes 0.4 and KVM less, a KVM that emulates every instruction takes minutes
_PROBE_SECONDS = 0.5  # under TCG, with QEMU's start, on two idle cores
_PROBE_EXIT = 0x2A * 2 + 1  # what QEMU exits with when the guest writes 0x2a to isa-debug-exit
# A boot sector that is a whole guest. It turns on paging and 64-bit mode, counts 2^27 down to 0, writes 0x2a to port
# 0xf4:
#
#       cli; xor %ax,%ax; mov %ax,%ds; mov %ax,%es
#       mov $0x1000,%di; mov $0x1800,%cx; rep stosw            # three empty page tables
#       movl $0x2003,0x1000; movl $0x3003,0x2000; movl $0x83,0x3000  # the first 2 MiB, mapped onto themselves
#       mov $0x1000,%eax; mov %eax,%cr3
#       mov %cr4,%eax; or $0x20,%al; mov %eax,%cr4             # PAE
#       mov $0xc0000080,%ecx; rdmsr; or $1,%ah; wrmsr          # EFER.LME
#       mov %cr0,%eax; or $0x80000001,%eax; mov %eax,%cr0      # paging, protection
#       lgdtl gdtr; ljmp $8,$long
#   long: mov $(1<<27),%ecx                                    # 64-bit code from here
#   1:  dec %ecx; jnz 1b
#       mov $0x2a,%al; out %al,$0xf4
#   2:  hlt; jmp 2b
#   gdt (at 0x70): 0, 0x00209a0000000000;  gdtr: 15, gdt
#
# Why count: a hypervisor that starts guests and then emulates each instruction (nested virtualisation without the
# hardware for it) passes every test but this one, and would take hours to boot an image.
_PROBE_SECTOR = (
    bytes.fromhex(
        "fa31c08ed88ec0bf0010b90018f3ab66c70600100320000066c70600200330000066c70600308300000066b800100000"
        "0f22d80f20e00c200f22e066b9800000c00f3280cc010f300f20c0660d010000800f22c0660f0116807cea5f7c0800b9"
        "00000008ffc975fcb02ae6f4f4ebfd90000000000000000000000000009a20000f00707c0000"
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)


@dataclass(frozen=True)
class Accelerator:
    """How guests run on this machine, as proven by a guest that ran.

    Attributes:
        name: `kvm` or `tcg`; what Packer calls them too.
        cpu: the model for `-cpu`.
        scale: what to multiply a deadline with.
        why: why not KVM, or "".
        translated: MiB of translated code that TCG keeps for a guest, beside the guest's own memory.
    """

    name: str
    cpu: str
    scale: float
    why: str = ""
    translated: int = 512

    @property
    def options(self) -> list[str]:
        """`-accel` with what makes it fast: a thread for each vCPU, and room for translated code."""
        return ["-accel", "kvm" if self.name == "kvm" else f"tcg,thread=multi,tb-size={self.translated}"]

    @staticmethod
    def probe(cache: Path | None = None, *, anew: bool = False) -> Accelerator:
        """Find the accelerator by starting a guest, KVM first.

        Args:
            cache: a directory that remembers the answer until the machine reboots, or /dev/kvm comes or goes.
            anew: look once more, whatever is remembered.

        Raises:
            BuildError: no guest runs at all; it says what each attempt answered.
        """
        note = cache / f"kvm-of-boot-{_boot_id()}.json" if cache else None
        lacking = _lacking_device()
        if note and note.exists() and not anew:
            known = json.loads(note.read_text(encoding="utf-8"))
            if known.pop("lacking", None) == lacking:
                return Accelerator._of(**known)
        run.require(QEMU, "to run virtual machines", "qemu-system-x86")
        refused: list[str] = []
        answer: Accelerator | None = None
        if lacking:
            refused.append(lacking)
        elif not (problem := _try("kvm", "host")):
            answer = Accelerator._of("kvm")
        else:
            refused.append(f"kvm: {problem}")
        if answer is None:
            if problem := _try("tcg", _TCG_CPU):
                raise BuildError(
                    "no virtual machine runs here: neither kvm nor tcg executed the probe guest",
                    "invoke doctor   (qemu-system-x86 from Debian has tcg; check that it is the one in PATH)",
                    [*refused, f"tcg: {problem}"],
                )
            answer = Accelerator._of("tcg", refused[0])
            progress.note(f"machines are emulated, about 5 to 10 times slower: {answer.why}")
        if note:
            note.parent.mkdir(parents=True, exist_ok=True)
            beside = note.with_suffix(f".{os.getpid()}")
            # Only what was found out: the rest is this program's, whichever version of it reads this.
            found = {"name": answer.name, "why": answer.why, "lacking": lacking}
            beside.write_text(json.dumps(found), encoding="utf-8")
            beside.rename(note)
        return answer

    @staticmethod
    def _of(name: str, why: str = "") -> Accelerator:
        return Accelerator(name, "host", 1.0) if name == "kvm" else Accelerator(name, _TCG_CPU, _TCG_SCALE, why)


def _lacking_device() -> str:
    """Why KVM's device cannot be used, or nothing."""
    if not Path("/dev/kvm").exists():
        return "kvm: there is no /dev/kvm"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "kvm: /dev/kvm may not be opened by this user (group kvm?)"
    return ""


@dataclass(frozen=True)
class Turns(Accelerator):
    """TCG whose CPUs take turns in one thread: for several machines at once, and for boots that must not be lost.

    With a thread for each, QEMU before 8.1 can die. Whenever the guest switches a PCI device's registers off and on, as
    Linux does for each one at boot, the table of the machine's memory is replaced at once, and the other CPUs forget
    their places in the old one a little later. What they write in between, mostly to their interrupt controller, goes
    to whatever stands in that place now: a NIC's interrupts (an assertion in msix_table_mmio_write), nothing, or what
    is no device at all. A guest of two CPUs that did nothing else killed QEMU 7.2 in 20 s, and not in 200 s like this.
    No NIC and no number of vectors helps: they only change what is hit.
    """

    @property
    def options(self) -> list[str]:
        return [word.replace("thread=multi", "thread=single") for word in super().options]


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:13]
    return "unknown"


def _try(accelerator: str, cpu: str) -> str:
    """Run the probe guest; returns what went wrong, or "" when it ran to its end in time."""
    with run.temporary_directory("lvsforge-probe-") as folder:
        disk, log = folder / "probe.img", folder / "probe.log"
        disk.write_bytes(_PROBE_SECTOR)
        argv = [QEMU, "-nodefaults", "-display", "none", "-accel", accelerator, "-cpu", cpu, "-m", "32"]
        argv += ["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-drive", f"file={disk},format=raw,if=ide"]
        # Slowness rules KVM out. TCG is what is left then, and on a machine with much else to do it takes longer.
        deadline = PROBE_DEADLINE if accelerator == "kvm" else PROBE_DEADLINE * _TCG_SCALE
        with run.start(argv, log=log) as guest:
            try:
                status = guest.wait(deadline)
            except BuildError:
                return f"the probe guest did not finish within {deadline:.0f} s (every instruction is emulated?)"
        if status == _PROBE_EXIT:
            return ""
        said = log.read_text(encoding="utf-8", errors="replace").split("\n")
        return f"{said[0].removeprefix(QEMU + ': ') or 'no message'} (qemu ended with status {status})"


def slowdown(accelerator: Accelerator) -> float:
    """How many times as long as on an idle machine the probe guest takes just now; 1 under KVM, which is not asked.

    Raises:
        BuildError: it does not run any more.
    """
    if accelerator.name == "kvm":
        return 1.0
    begun = time.monotonic()
    if problem := _try(accelerator.name, accelerator.cpu):
        raise BuildError(f"no virtual machine runs here: {problem}", "invoke doctor")
    return max(1.0, (time.monotonic() - begun) / _PROBE_SECONDS)


# --- a machine --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    """A virtio disk.

    Attributes:
        path: the image file.
        format: `qcow2` or `raw`.
        snapshot: writes go to a temporary file that is gone with the machine.
        readonly: the guest cannot write at all (a seed).
    """

    path: Path
    format: str = "qcow2"
    snapshot: bool = False
    readonly: bool = False

    def options(self, name: str) -> list[str]:
        """QEMU's words for it. The host's cache is never flushed: these disks are thrown away when QEMU dies."""
        words = f"file={_comma(self.path)},format={self.format},if=none,id={name},cache=unsafe,discard=unmap"
        words += ",snapshot=on" if self.snapshot else ""
        words += ",readonly=on" if self.readonly else ""
        return ["-drive", words, "-device", f"virtio-blk-pci,drive={name}"]


@dataclass(frozen=True)
class Share:
    """A host directory that the guest mounts over 9p under `tag` (`/dev/root` for a root file system)."""

    path: Path
    tag: str
    readonly: bool = True


class Machine:
    """A QEMU guest for the length of a `with` block.

    Its directory takes `console.log` (the serial console), `qemu.log`, `ssh_config` and the ssh key.
    """

    def __init__(
        self,
        name: str,
        work: Path,
        accelerator: Accelerator,
        *,
        disks: Sequence[Disk] = (),
        seed: Path | None = None,
        shares: Sequence[Share] = (),
        memory: int = 1024,
        cpus: int = 2,
        cpu: str | None = None,
        firmware: str = "bios",
        kernel: Path | None = None,
        initrd: Path | None = None,
        append: str = "",
        network: bool = True,
        mac: str = "",
        ssh_key: Path | None = None,
        login: bool = True,
        control: Path | None = None,
        credentials: Mapping[str, str] | None = None,
        may_keep: bool = False,
        extra: Sequence[str] = (),
        prefix: Sequence[str] = (),
    ) -> None:
        """Describe it; nothing is started before the `with` block.

        Args:
            name: for messages and as the host in `ssh_config`.
            work: its directory, made if need be.
            accelerator: from `Accelerator.probe`.
            disks: in this order vda, vdb, …; the seed comes last.
            seed: a NoCloud disk (`pipeline.seed`).
            shares: host directories over 9p.
            memory: MiB.
            cpus: virtual CPUs.
            cpu: a model other than the accelerator's (`max` for programs built for x86-64-v2).
            firmware: `bios` or `uefi`.
            kernel, initrd, append: boot this kernel without a boot loader.
            network: a user-mode NIC whose ssh port is forwarded from 127.0.0.1.
            mac: that NIC's hardware address. With it the guest finds the NIC behind those of `extra`, and nobody but
                the forwarded ssh: its network leads nowhere and names no router.
            ssh_key: the private key for root; without it a key is made.
            login: let root in with that key by a systemd credential (no cloud-init needed). A test that wants to prove
                that the seed's key is what counts says False.
            control: an existing directory for its sockets, with a path of at most 90 bytes. Without it they are gone
                with the `with` block, also where the machine is kept.
            credentials: more systemd credentials for this boot.
            may_keep: whether `keep` may be called. Without it the guest dies with us even when SIGKILL ends us.
            extra: more QEMU arguments (tap NICs, -icount …).
            prefix: words before QEMU (`ip netns exec lab`).
        """
        self.name = name
        self.work = work
        self.accelerator = accelerator
        self.disks = list(disks)
        self.seed = seed
        self.shares = list(shares)
        self.memory = memory
        self.cpus = cpus
        self.cpu = cpu or accelerator.cpu
        self.firmware = firmware
        self.kernel = kernel
        self.initrd = initrd
        self.append = append
        self.network = network
        self.mac = mac
        self.ssh_key = ssh_key
        self.login = login
        self.credentials = dict(credentials or {})
        self.may_keep = may_keep
        self.extra = list(extra)
        self.prefix = list(prefix)
        self.port = 0
        self.kept = False
        self._stack = contextlib.ExitStack()
        self._process: run.Process | None = None
        self._connected = False
        self._given = control
        self._control = Path()  # sockets live in a directory of their own: their paths must be shorter than 108 bytes

    # -- its files

    @property
    def console(self) -> Path:
        """What the guest wrote to its serial console."""
        return self.work / "console.log"

    @property
    def ssh_config(self) -> Path:
        """For `ssh -F`, and for testinfra's `--ssh-config`."""
        return self.work / "ssh_config"

    @property
    def ssh_line(self) -> str:
        """The command that a person types to log in."""
        return shlex.join(["ssh", "-F", str(self.ssh_config), self.name])

    @property
    def public_key(self) -> str:
        """The line for authorized_keys; the key is made now if it is not there yet."""
        if self.ssh_key is None:
            self.work.mkdir(parents=True, exist_ok=True)
            self.ssh_key = make_key(self.work)
        return Path(f"{self.ssh_key}.pub").read_text(encoding="ascii").strip()

    def console_tail(self, lines: int = _CONSOLE_TAIL) -> list[str]:
        """The console's last lines, printable, each once where a line repeats."""
        return console_tail(self.console, lines)

    # -- its life

    def __enter__(self) -> Machine:
        self.work.mkdir(parents=True, exist_ok=True)
        self.work = self.work.resolve()  # QEMU, ssh and the user each stand in another directory
        self.console.write_bytes(b"")
        try:
            self._control = self._given or self._stack.enter_context(run.temporary_directory("lvsforge-vm-"))
            self._launch()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def argv(self) -> list[str]:
        """QEMU's command line."""
        qemu = run.require(QEMU, "to run virtual machines", "qemu-system-x86")
        line = [*self.prefix]
        if not self.may_keep:
            guard = run.require("setpriv", "to end machines with their owner", "util-linux")
            line += [guard, "--pdeathsig", "KILL", "--"]
        line += [qemu, "-name", self.name, "-nodefaults", "-display", "none", "-machine", "q35"]
        line += [*self.accelerator.options, "-cpu", self.cpu, "-smp", str(self.cpus), "-m", str(self.memory)]
        line += ["-device", "virtio-rng-pci", "-no-reboot"]
        line += ["-chardev", f"file,id=console,path={_comma(self.console)}", "-serial", "chardev:console"]
        line += ["-qmp", f"unix:{self._control / 'q'},server=on,wait=off"]
        line += self._body()
        return line

    def interactive(self) -> int:
        """Run the machine on this terminal until it ends, instead of in a `with` block; returns QEMU's status.

        The terminal is the serial console; Ctrl-A X pulls the plug. `ssh_line` works from another terminal.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        self.work = self.work.resolve()
        self.port = free_port() if self.network else 0
        if self.network:
            self._control = self.work
            _ = self.public_key
            self._write_ssh_config()
        return run.interactive(self.console_argv())

    def console_argv(self) -> list[str]:
        """The same machine for a person: the serial console is this terminal (Ctrl-A X ends it)."""
        qemu = run.require(QEMU, "to run virtual machines", "qemu-system-x86")
        line = [*self.prefix, qemu, "-name", self.name, "-nodefaults", "-display", "none", "-machine", "q35"]
        line += [*self.accelerator.options, "-cpu", self.cpu, "-smp", str(self.cpus), "-m", str(self.memory)]
        line += ["-device", "virtio-rng-pci", "-no-reboot", "-serial", "mon:stdio"]
        return line + self._body()

    def _body(self) -> list[str]:
        line: list[str] = []
        if self.firmware == "uefi":
            code, variables = firmware()
            own = self.work / "uefi-variables.fd"
            if not own.exists():
                shutil.copyfile(variables, own)
            line += ["-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}"]
            line += ["-drive", f"if=pflash,format=raw,unit=1,file={_comma(own)}"]
        for number, disk in enumerate(self.disks):
            line += disk.options(f"disk{number}")
        if self.seed:
            line += Disk(self.seed, "raw", readonly=True).options("seed")
        for number, share in enumerate(self.shares):
            access = "on" if share.readonly else "off"
            line += [
                "-fsdev",
                f"local,id=share{number},path={_comma(share.path)},security_model=none,readonly={access}",
            ]
            line += ["-device", f"virtio-9p-pci,fsdev=share{number},mount_tag={share.tag}"]
        if self.kernel:
            line += ["-kernel", str(self.kernel), "-append", self.append]
        if self.initrd:
            line += ["-initrd", str(self.initrd)]
        control: list[str] = []
        if self.network:
            alone, mac = (",restrict=on,ipv6=off", f",mac={self.mac}") if self.mac else ("", "")
            control += ["-netdev", f"user,id=user0{alone},hostfwd=tcp:127.0.0.1:{self.port}-:22"]
            control += ["-device", f"virtio-net-pci,netdev=user0,romfile={mac}"]
        line += [] if self.mac else control
        values = dict(self.credentials)
        if self.network and self.login:
            values["ssh.authorized_keys.root"] = self.public_key
        if values:
            line += ["-smbios", credentials(values)]
        return line + self.extra + (control if self.mac else [])

    def _launch(self) -> None:
        # A free port can be taken by somebody else before QEMU binds it: then QEMU ends at once and we take another.
        for _ in range(5):
            self.port = free_port() if self.network else 0
            log = self.work / "qemu.log"
            log.write_bytes(b"")
            process = self._stack.enter_context(run.start(self.argv(), log=log, keep=lambda: self.kept))
            self._process = process
            if self.network:
                self._write_ssh_config()
            run.wait_until(
                lambda process=process: process.poll() is not None or qmp.listening(self._control / "q"),  # type: ignore[misc]
                deadline=20.0,
                what=f"machine {self.name}: QEMU did not start",
                hint=f"read {log}",
                tail_of=process.tail,
            )
            if process.poll() is None:
                return
            if "host forwarding" not in log.read_text(encoding="utf-8", errors="replace"):
                raise BuildError(
                    f"machine {self.name}: {run.describe(['qemu'], process.poll() or 0)} at its start",
                    "invoke doctor",
                    [f"$ {shlex.join(process.argv)}", *process.tail()],
                )
        raise BuildError(f"machine {self.name}: five free ports were taken before QEMU could bind them", "try again")

    @property
    def process(self) -> run.Process:
        """The running QEMU."""
        if self._process is None:
            raise RuntimeError("the machine is used outside of its with block")
        return self._process

    def deadline(self, seconds: float) -> float:
        """Seconds as they are for KVM, turned into seconds for this machine's accelerator."""
        return seconds * self.accelerator.scale

    def wait_for(self, pattern: str, seconds: float) -> float:
        """Wait until the serial console shows `pattern`; returns the seconds it took.

        Raises:
            BuildError: it did not, or the machine ended first; with the console's tail.
        """
        return self._wait(lambda: pattern in self._console_text(), seconds, f"{pattern!r} on the console")

    def wait_for_ssh(self, seconds: float = 45.0) -> float:
        """Wait for the ssh server's banner and log in; returns the seconds until the banner.

        Args:
            seconds: the deadline under KVM; scaled for TCG.

        Raises:
            BuildError: no banner, or no login, in time; with the console's tail.
        """
        took = self._wait(lambda: banner(self.port), seconds, "ssh")
        if not self._connected:
            # One connection for everything that follows: a handshake costs about a second under emulation.
            master = ["ssh", "-F", str(self.ssh_config), "-o", "ControlMaster=yes", "-N", self.name]
            log = self.work / "ssh.log"
            log.write_bytes(b"")
            process = self._stack.enter_context(run.start(master, log=log))
            check = ["ssh", "-F", str(self.ssh_config), "-O", "check", self.name]

            def ready() -> bool:
                if process.poll() is not None:
                    raise BuildError(
                        f"machine {self.name}: the ssh login failed",
                        self.ssh_line,
                        [*process.tail(), *self.console_tail()],
                    )
                return run.run(check, check=False).returncode == 0

            self._wait(ready, 20.0, "the ssh login")
            self._connected = True
        return took

    def run(
        self,
        command: str,
        *,
        check: bool = True,
        seconds: float = 60.0,
        stdin: str | None = None,
        what: str = "",
    ) -> run.Result:
        """Run a shell command line in the guest as root.

        Args:
            command: for the guest's shell.
            check: raise when it fails.
            seconds: the deadline under KVM; scaled for TCG.
            stdin: text on its standard input.
            what: what was being done, for the error.

        Raises:
            BuildError: it failed (with `check`) or took too long.
        """
        argv = ["ssh", "-F", str(self.ssh_config), self.name, command]
        return run.run(
            argv,
            check=check,
            stdin=stdin,
            timeout=self.deadline(seconds),
            what=what or f"in machine {self.name}",
            hint=f"the console is in {self.console}",
            shown=shlex.join(["ssh", self.name, command]),
        )

    def power_off(self, seconds: float = 30.0) -> None:
        """Shut the guest down in order and wait for QEMU's end.

        Raises:
            BuildError: it did not end in time; with the console's tail.
        """
        self.run("systemctl --no-block poweroff || poweroff", check=False)
        self.wait_for_end(seconds)

    def wait_for_end(self, seconds: float) -> int:
        """Wait until QEMU ends by itself; returns its exit status.

        Raises:
            BuildError: it did not in time; with the console's tail.
        """
        run.wait_until(
            lambda: self.process.poll() is not None,
            deadline=self.deadline(seconds),
            what=f"machine {self.name}: power-off",
            hint=f"read {self.console}",
            tail_of=self.console_tail,
        )
        return self.process.poll() or 0

    def kill(self) -> None:
        """Pull the plug, as a power cut does: SIGKILL, nothing is flushed by the guest."""
        os.kill(self.process.pid, 9)
        self.process.wait(10)

    def keep(self) -> str:
        """Leave the machine running after the `with` block; returns what to tell the user."""
        if not self.may_keep:
            raise RuntimeError("the machine was not started with may_keep")
        self.kept = True
        pid = self.process.pid
        return f"{self.ssh_line}   (the machine still runs; end it: kill {pid}; its console: {self.console})"

    # -- inside

    def _wait(self, probe: Callable[[], bool], seconds: float, what: str) -> float:
        def done() -> bool:
            if probe():
                return True
            status = self.process.poll()
            if status is not None:
                raise BuildError(
                    f"machine {self.name} ended (status {status}) while we waited for {what}",
                    f"read {self.console}",
                    [*self.process.tail(), *self.console_tail()],
                )
            return False

        return run.wait_until(
            done,
            deadline=self.deadline(seconds),
            what=f"machine {self.name}: {what}",
            hint=f"read {self.console}; log in while it runs: {self.ssh_line}",
            tail_of=self.console_tail,
        )

    def _console_text(self) -> str:
        return self.console.read_text(encoding="utf-8", errors="replace")

    def _write_ssh_config(self) -> None:
        text = ssh_config(self.name, self.port, self.ssh_key or Path(), self._control / "s")
        self.ssh_config.write_text(text, encoding="utf-8")


def ssh_config(name: str, port: int, key: Path, control: Path) -> str:
    """An ssh client configuration for a machine whose host key nobody has seen and nobody will see again."""
    return (
        f"Host {name}\n"
        f"  HostName 127.0.0.1\n  Port {port}\n  User root\n"
        f'  IdentityFile "{key}"\n'
        "  IdentitiesOnly yes\n  BatchMode yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        f'  ControlPath "{control}"\n'
        "  ControlMaster no\n"
        "  ConnectTimeout 60\n  ServerAliveInterval 15\n  ServerAliveCountMax 8\n"
    )


def make_key(folder: Path) -> Path:
    """A new ed25519 key pair in `folder`; returns the private half (`id`, beside `id.pub`)."""
    key = folder / "id"
    if not key.exists():
        run.require("ssh-keygen", "to log in to machines", "openssh-client")
        run.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lvsforge", "-f", key])
    return key


def credentials(values: Mapping[str, str]) -> str:
    """The value of QEMU's `-smbios` that hands systemd (250 or later) credentials for one boot."""
    words = ["type=11"]
    for name, value in values.items():
        words.append(f"value=io.systemd.credential.binary:{name}={base64.b64encode(value.encode()).decode('ascii')}")
    return ",".join(words)


def firmware() -> tuple[Path, Path]:
    """UEFI firmware: its code and its empty variable store.

    Raises:
        BuildError: none is installed.
    """
    for code, variables in _FIRMWARE:
        if Path(code).exists() and Path(variables).exists():
            return Path(code), Path(variables)
    raise BuildError("no UEFI firmware for machines is installed", "apt-get install ovmf   (or: make setup)")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def banner(port: int) -> bool:
    """Whether an ssh server answers: QEMU's forwarder accepts connections long before the guest listens."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as link:
        link.settimeout(5)
        return link.recv(len(_BANNER)) == _BANNER
    return False


def console_tail(path: Path, lines: int = _CONSOLE_TAIL) -> list[str]:
    """The last lines of a console log, without control characters and repetitions."""
    if not path.exists():
        return ["(there is no console log)"]
    text = path.read_bytes()[-64 * 1024 :].decode("utf-8", errors="replace")
    plain: list[str] = []
    for raw in _strip_escapes(text).splitlines():
        line = "".join(c for c in raw if c.isprintable()).rstrip()
        if line and (not plain or plain[-1] != line):
            plain.append(line)
    if not plain:
        return ["(the console is empty: the machine wrote nothing to its serial port)"]
    return [f"console | {line}" for line in plain[-lines:]]


def _strip_escapes(text: str) -> str:
    out: list[str] = []
    rest = iter(text)
    for char in rest:
        if char != "\x1b":
            out.append(char)
            continue
        if next(rest, "") == "[":  # a control sequence ends with its first letter
            for inner in rest:
                if inner.isalpha():
                    break
    return "".join(out)


def _comma(path: Path) -> str:
    """A path inside a QEMU option, where a comma is doubled."""
    return str(path).replace(",", ",,")
