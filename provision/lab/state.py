"""What of a lab runs: written down at once, so that the next command finds all of it, however this one ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline import run
from pipeline.errors import BuildError

FILE = "state.json"
_END_SECONDS = 10.0


@dataclass(frozen=True)
class Running:
    """A process, known by its id and by when it started: an id alone may be another's tomorrow.

    Attributes:
        pid: its id.
        started: in ticks since the machine's boot, as /proc/PID/stat has it.
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Running:
        """A process that runs now.

        Raises:
            BuildError: it does not.
        """
        found = _started(pid)
        if found is None:
            raise BuildError(f"process {pid} has ended already", "the same command with --debug")
        return cls(pid, found)

    @property
    def alive(self) -> bool:
        """Whether it, and no other one of its number, runs."""
        return _started(self.pid) == self.started


def _started(pid: int) -> int | None:
    """When a process started; None where there is none, or only what its parent has not looked at yet."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()
    return None if state in ("Z", "X") else int(rest[18])  # field 22 of proc(5)


@dataclass
class State:
    """A lab as it is written down.

    Attributes:
        folder: where all of it is.
        source: the cluster file that it was made of.
        memory: of each machine, in MiB.
        sockets: the folder of QEMU's sockets, whose paths must be short.
        root: the root file system of what runs in namespaces.
        images: by role, the image of the machines.
        processes: by name of the node, `switch` for the links.
        inner: of a namespace's process, the id of the one inside.
        scale: of deadlines, as it was before its machines ran; 0 where nobody has asked.
        routing: a root with our routing daemons, of which the router takes one; "" where it needs none.
    """

    folder: Path
    source: str = ""
    memory: int = 0
    sockets: str = ""
    root: str = ""
    images: dict[str, str] = field(default_factory=dict)
    processes: dict[str, Running] = field(default_factory=dict)
    inner: dict[str, int] = field(default_factory=dict)
    scale: float = 0.0
    routing: str = ""

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / FILE

    def write(self) -> None:
        """Write it down, whole or not at all."""
        data = {**asdict(self), "folder": str(self.folder)}
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        beside.rename(self.path)

    @classmethod
    def read(cls, folder: Path) -> State | None:
        """What is written in a folder, or None where nothing is.

        Raises:
            BuildError: what is there is no state of a lab.
        """
        path = folder / FILE
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            data["processes"] = {name: Running(**each) for name, each in data["processes"].items()}
            for unread in ("begun", "ports"):  # which labs of before have
                data.pop(unread, None)
            return cls(**{**data, "folder": folder})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError) as error:
            hint = f"look what still runs (ps -C qemu-system-x86), then: rm {path}"
            raise BuildError(f"{path} is no state of a lab: {error}", hint) from None

    @property
    def alive(self) -> dict[str, Running]:
        """Those of its processes that run."""
        return {name: each for name, each in self.processes.items() if each.alive}

    def end(self, *names: str) -> list[str]:
        """End processes, all without names. Nothing of them is to be kept, so nobody is asked first.

        Returns:
            The names of those that ran.

        Raises:
            BuildError: one cannot be ended.
        """
        chosen = {name: each for name, each in self.alive.items() if not names or name in names}
        for each in chosen.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL)
        run.wait_until(
            lambda: not any(each.alive for each in chosen.values()),
            deadline=_END_SECONDS,
            what=f"the end of {', '.join(f'{name} (pid {each.pid})' for name, each in chosen.items())}",
            hint=f"ps {' '.join(str(each.pid) for each in chosen.values())}",
        )
        return list(chosen)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One command at a time that starts or ends something of a lab.

    Raises:
        BuildError: another one is at work.
    """
    # Beside the folder, which may go within the block; what is started must not inherit the lock.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a", encoding="ascii") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(f"another command is at work on the lab in {folder}", "wait for its end") from None
        yield
