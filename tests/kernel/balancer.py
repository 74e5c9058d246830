"""keepalived on a director: files as an operator writes them, the daemon, what it says, and what the kernel then has.

It runs in the foreground and logs to its standard error. The build with sanitizers writes what it finds about addresses
to files, which must not be there when it has ended, and undefined behaviour to its standard error.
"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Iterable, Sequence

from pipeline.errors import BuildError
from tests.kernel.lab import Namespace
from tests.kernel.machine import SANITIZED, Background, Done, Failed

ETC = "/etc/keepalived"
PROGRAM = "/usr/sbin/keepalived"
DUMPED = "/tmp/keepalived_check.data"  # noqa: S108  the guest's; where SIGUSR1 makes it write what it knows
SYN_PROXY = 0x8000  # the service flag
_REPORTS = "/tmp/keepalived-sanitizer"  # noqa: S108  the guest's; keepalived/core/sanitizer.c
_UNDEFINED = ": runtime error: "
_STAMP = re.compile(r"^\w{3} \w{3} [ \d]\d [\d:]{8} \d{4}: ")


class Balancer:
    """keepalived in one namespace.

    Args:
        host: where.
        program: `PROGRAM`, as it ships, or the one with sanitizers; on a debug kernel always as it ships: the memory
            that the sanitizers want for themselves is in use in User Mode Linux.
        options: for its command line.
    """

    def __init__(self, host: Namespace, *, program: str = f"{SANITIZED}{PROGRAM}", options: Sequence[str] = ()) -> None:
        self.host = host
        self.guest = host.guest
        self.program = PROGRAM if self.guest.kernel.debug else program
        self.options = options
        self.job: Background | None = None
        self.guest.run("sh", "-ec", f"rm -rf {ETC} {_REPORTS}.* /run/keepalived.pid /run/checkers.pid; mkdir {ETC}")

    # -- the daemon

    def configure(self, text: str, name: str = "keepalived.conf") -> None:
        """Write a file of its configuration."""
        self.guest.write(f"{ETC}/{name}", text)

    def check(self) -> Done:
        """`--config-test`, of the configuration that stands there."""
        return self.host.run(self.program, "--config-test", seconds=20, check=False)

    def start(self, *, complete: bool = True) -> None:
        """Start it; returns when it says that it has started."""
        words = [self.program, "--dont-fork", "--log-console", "--log-detail", *self.options]
        self.job = self.host.start("sh", "-c", 'exec "$@" 2>&1', "sh", *words)
        if complete:
            self.wait_for("Startup complete")

    def log(self) -> list[str]:
        """What it has said, without the times."""
        assert self.job
        return [_STAMP.sub("", line) for line in self.job.so_far().splitlines()]

    def said(self, pattern: str, since: int = 0) -> list[str]:
        """The lines of its log that match, from a number of lines on."""
        return [line for line in self.log()[since:] if re.search(pattern, line)]

    def wait_for(self, pattern: str, since: int = 0, seconds: float = 20.0) -> None:
        """Wait until it says something."""
        try:
            self.host.wait_until(lambda: bool(self.said(pattern, since)), f"keepalived says {pattern!r}", seconds)
        except BuildError as error:
            raise Failed("\n".join([str(error), *self.log()[since:][-40:]])) from None

    def reload(self) -> list[str]:
        """SIGHUP; returns what it said until the new configuration was in effect, or refused."""
        assert self.job
        since = len(self.log())
        self.job.hit(signal.SIGHUP)
        self.wait_for("Reload complete|keeping the old one", since)
        return self.log()[since:]

    def dump(self) -> list[str]:
        """SIGUSR1; returns what it wrote about its checkers and services."""
        assert self.job
        self.guest.run("rm", "-f", DUMPED)
        since = len(self.log())
        self.job.hit(signal.SIGUSR1)
        self.wait_for("Printing checker data", since)
        self.host.wait_until(lambda: self._dumped() != "" and self._dumped() == self._dumped(), "the dump")
        return self._dumped().splitlines()

    def _dumped(self) -> str:
        return self.guest.run("sh", "-c", f"cat {DUMPED} 2>/dev/null || :").out

    def stop(self) -> list[str]:
        """SIGTERM, as `service keepalived stop` sends; returns all that it said.

        Raises:
            Failed: it does not end, or not well; or a sanitizer found something.
        """
        assert self.job
        job, self.job = self.job, None
        job.hit(signal.SIGTERM)
        done = job.wait(30, check=False)
        self.must_be_sound(done)
        if done.status != 0:
            raise Failed(str(done))
        return [_STAMP.sub("", line) for line in done.out.splitlines()]

    def must_be_sound(self, done: Done | None = None) -> None:
        """Fail if a sanitizer found something."""
        found = self.guest.run("sh", "-c", f"cat {_REPORTS}.* 2>/dev/null || :").out
        found += "\n".join(line for line in (done.out if done else "").splitlines() if _UNDEFINED in line)
        if found:
            raise Failed("\n".join([found[:8000], str(done or "")]))

    def end(self) -> None:
        """Whatever happened, nothing of it is left; a sanitizer's findings are a failure in any case."""
        if self.job and self.guest.alive:
            job, self.job, done = self.job, None, None
            with contextlib.suppress(Failed):  # if it has ended by itself, the test has failed of that
                job.hit(signal.SIGTERM)
                done = job.wait(30, check=False)
            self.must_be_sound(done)

    # -- what it did

    def programmed(self) -> list[str]:
        """What IPVS has, as ipvsadm saves it, in ipvsadm's order of lines and our order of services."""
        return sorted(self.host.run("ipvsadm", "-S", "-n").out.splitlines())

    def must_program(self, lines: Sequence[str], seconds: float = 20.0) -> None:
        """Wait until IPVS has just these, and fail with the difference."""
        wanted = sorted(lines)
        try:
            self.host.wait_until(lambda: self.programmed() == wanted, "the services", seconds)
        except BuildError as error:
            found = self.programmed()
            difference = [f"- {line}" for line in wanted if line not in found]
            difference += [f"+ {line}" for line in found if line not in wanted]
            said = self.log()[-40:] if self.job else []
            raise Failed("\n".join([str(error).splitlines()[0], *difference, "keepalived said:", *said])) from None

    def flags(self, address: str, port: int = 80) -> int:
        """The flags of a service."""
        return int(self.host.call("genl:listed", of={"address": address, "port": port})["flags"])

    def bound(self, device: str) -> set[str]:
        """The addresses of a device with the prefix length of a host, the loopback's own apart."""
        lines = self.host.run("ip", "-o", "addr", "show", "dev", device).out.splitlines()
        found = (re.search(r" inet6? (\S+?)(?:/(\d+))? ", line) for line in lines)
        return {m[1] for m in found if m and m[1] != "::1" and m[2] in (None, "32", "128")}

    def must_bind(self, device: str, addresses: Iterable[str], seconds: float = 20.0) -> None:
        """Wait until these, and no others, are bound to a device."""
        self.wait_until(
            lambda: self.bound(device) == set(addresses),
            lambda: f"{device} has {sorted(self.bound(device))} and not {sorted(addresses)}",
            seconds,
        )

    def wait_until(self, probe: Callable[[], bool], what: Callable[[], str], seconds: float) -> None:
        """Wait for a state; the failure says what is instead."""
        try:
            self.host.wait_until(probe, "the state", seconds)
        except BuildError:
            raise Failed("\n".join([what(), *(self.log()[-40:] if self.job else [])])) from None
