"""A kernel of User Mode Linux as the machine under test: the debug build (kernel/debug.config), a host's process."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from pipeline import run
from pipeline.vm import console_tail

# What time limits are multiplied with: that of an emulated plain kernel, which takes as long for a test. With it all
# tests keep their limits on a host with a load of ten.
SCALE = 6.0
READY, PIECE = b"!", 1024  # as in inside/agent.py
_TERMINAL = re.compile(r"Serial line 1 assigned device '([^']+)'")


class Line:
    """Our end of the serial line, as a socket: see inside/agent.py.

    Raises:
        OSError: as a socket does; TimeoutError, too, when the guest does not read.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self.settimeout, self.recv, self.close = end.settimeout, end.recv, end.close

    def ready(self) -> None:
        """Wait until the guest has read what it was sent."""
        if (said := self._end.recv(1)) != READY:
            raise OSError(f"the guest says {said!r} where it should say {READY!r}")

    def sendall(self, data: bytes) -> None:
        """Send a request."""
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            self._end.sendall(piece)
            if len(piece) == PIECE:
                self.ready()


class UserMode:
    """Such a kernel for the length of a `with` block.

    Its directory takes `console.log`.

    Args:
        name: for messages.
        work: its directory, made if need be.
        kernel: the program.
        words: the command line, a part for each argument.
        memory: MiB; what is not used is not taken.
        line: a descriptor that the guest's ttyS0 is.
        may_keep: whether `keep` may be called.
    """

    scale = SCALE

    def __init__(
        self, name: str, work: Path, kernel: Path, words: Sequence[str], *, memory: int, line: int, may_keep: bool
    ) -> None:
        self.name = name
        self.work = work
        self.may_keep = may_keep
        self.kept = False
        self.line = line
        self.argv = [str(kernel), f"mem={memory}M", f"ssl0=fd:{line}", "ssl1=pts", *words]
        self._stack = contextlib.ExitStack()
        self._process: run.Process | None = None

    @property
    def console(self) -> Path:
        """What the kernel wrote to its console."""
        return self.work / "console.log"

    def console_tail(self, lines: int = 40) -> list[str]:
        """The console's last lines, printable, each once where a line repeats."""
        return console_tail(self.console, lines)

    def __enter__(self) -> UserMode:
        self.work.mkdir(parents=True, exist_ok=True)
        self.console.write_bytes(b"")
        words = [*self.argv[:1], f"uml_dir={self.work}", *self.argv[1:]]
        keep = (lambda: self.kept) if self.may_keep else None
        self._process = self._stack.enter_context(run.start(words, log=self.console, keep=keep, inherit=[self.line]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def process(self) -> run.Process:
        """The kernel."""
        if self._process is None:
            raise RuntimeError("the machine is used outside of its with block")
        return self._process

    def keep(self) -> None:
        """Leave it running after the `with` block."""
        self.kept = True

    def terminal(self, log: Callable[[], list[str]]) -> str:
        """The terminal of this host that the guest's ttyS1 is; the guest must have opened that.

        Args:
            log: what its kernel has logged: the console shows no such messages.
        """
        found: list[str] = []

        def assigned() -> bool:
            found[:] = _TERMINAL.findall("\n".join(log()))
            return bool(found)

        run.wait_until(assigned, deadline=10.0, what="the second serial line", hint=f"read {self.console}")
        return found[-1]
