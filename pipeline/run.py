"""The only module that starts processes: argv lists, a minimal environment, no shell, the log kept."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline import progress
from pipeline.errors import BuildError

# What a child may see of the caller's environment: where programs and temporary files are, and the
# proxy through which the machine reaches its mirrors. Everything else could change a build's bytes.
_INHERITED = (
    "PATH",
    "TMPDIR",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)
_TAIL_LINES = 25


@dataclass(frozen=True)
class Result:
    """What a finished process left.

    Attributes:
        argv: the command.
        returncode: its exit status; negative for death by that signal.
        stdout: what it printed, or "" where `log` took the output or `capture` was off.
        stderr: likewise.
    """

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of every child: fixed locale and time zone, plus `extra`."""
    env = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    path = env.get("PATH", "")
    # sbin holds mke2fs, losetup and friends, and is not in an ordinary user's PATH on Debian.
    missing = [d for d in ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin") if d not in path.split(":")]
    env["PATH"] = ":".join([*([path] if path else []), *missing])
    env.update({"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": os.environ.get("HOME", "/root")})
    env.update(extra or {})
    return env


def require(name: str, why: str, package: str) -> str:
    """Find a program on this machine.

    Args:
        name: the program.
        why: what it is needed for, said in the error.
        package: the Debian package that holds it.

    Returns:
        Its absolute path.

    Raises:
        BuildError: it is not installed.
    """
    found = shutil.which(name, path=environment()["PATH"])
    if found is None:
        raise BuildError(
            f"{name} is not installed; it is needed {why}", f"apt-get install {package}   (or: make setup)"
        )
    return found


def describe(argv: Sequence[str], returncode: int) -> str:
    """How a process ended, in words: a signal, a missing program and a plain failure are told apart."""
    name = Path(argv[0]).name
    if returncode < 0:
        names = {int(s): s.name for s in signal.Signals}  # most real-time signals have none
        return f"{name} was killed by {names.get(-returncode, f'signal {-returncode}')}"
    if returncode == 127:
        return f"{name} could not be started (exit status 127)"
    return f"{name} failed with exit status {returncode}"


def tail(text: str, lines: int = _TAIL_LINES) -> list[str]:
    """The last lines of an output, without trailing blanks."""
    return text.rstrip().splitlines()[-lines:]


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    log: Path | None = None,
    check: bool = True,
    capture: bool = True,
    timeout: float | None = None,
    what: str = "",
    hint: str = "",
    shown: str = "",
) -> Result:
    """Run a command to its end.

    Args:
        argv: the command; never a string, never through a shell.
        cwd: where it runs.
        env: added to the minimal environment of `environment()`.
        stdin: text given on standard input, else it is closed.
        log: a file that output and errors are appended to, with the command above them.
        check: raise when the exit status is not 0.
        capture: keep stdout and stderr (where no `log` is given); else they go to the terminal.
        timeout: seconds after which it is killed.
        what: what was being done, for the error ("compiling kernel-lvs").
        hint: the next step, for the error.
        shown: the line to print instead of `argv` (a wrapped command without its wrapper).

    Raises:
        BuildError: it failed (with `check`), could not be started, or took longer than `timeout`. The command
            is in the error as a line that can be pasted.
    """
    words = tuple(os.fspath(word) for word in argv)
    pasteable = shown or shlex.join(words)
    progress.debug(f"+ {pasteable}")
    sink: IO[str] | None = None
    try:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            sink = log.open("a", encoding="utf-8", errors="replace")
            sink.write(f"+ {pasteable}\n")
            sink.flush()
        out: IO[str] | int | None = sink if sink is not None else (subprocess.PIPE if capture else None)
        child = subprocess.Popen(
            words,
            cwd=cwd,
            env=environment(env),
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if sink is not None else out,
            text=True,
            errors="replace",
            start_new_session=True,  # a time-out must end the whole family, and Ctrl-C must not race us
            preexec_fn=_die_with(os.getpid()),
        )
        try:
            stdout, stderr = child.communicate(stdin, timeout=timeout)
        except subprocess.TimeoutExpired:
            _end_family(child)
            raise BuildError(
                f"{what or Path(words[0]).name}: no end within {timeout:g} s: {pasteable}",
                hint or "look at the log and try again",
                _log_tail(log),
            ) from None
        except BaseException:
            _end_family(child)
            raise
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        said = "was not found" if isinstance(error, FileNotFoundError) else f"cannot be used ({error.strerror})"
        raise BuildError(f"{error.filename} {said}, needed to run: {pasteable}", hint or "invoke doctor") from None
    finally:
        if sink is not None:
            sink.close()
    result = Result(words, child.returncode, stdout or "", stderr or "")
    if check and result.returncode != 0:
        lines = _log_tail(log) if log else tail(result.stderr or result.stdout)
        prefix = f"{what}: " if what else ""
        raise BuildError(
            f"{prefix}{describe(shown.split()[:1] or words, result.returncode)}",
            hint or (f"read {log}" if log else "run the line above by hand"),
            [f"$ {pasteable}", *lines],
        )
    return result


def _log_tail(log: Path | None) -> list[str]:
    if log is None or not log.exists():
        return []
    return tail(log.read_text(encoding="utf-8", errors="replace"))


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # prctl(2)


def _die_with(parent: int) -> Callable[[], None]:
    """What a child does before its program: ask the kernel to end it with us, also when we are killed by SIGKILL.

    An orphan would go on writing where the next run of the same command builds.
    """

    def ask() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # we were killed before the child could ask
            os._exit(1)

    return ask


def _end_family(child: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)
    # also when the leader heard SIGTERM: its own children may not have
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def interactive(argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str] | None = None) -> int:
    """Run a command that owns the terminal (a console, an ssh login) and return its exit status."""
    words = [os.fspath(word) for word in argv]
    progress.debug(f"+ {shlex.join(words)}")
    return subprocess.call(words, env=environment(env))


class Process:
    """A process in the background, ended by its pid when the `start` block ends."""

    def __init__(self, child: subprocess.Popen[str], argv: tuple[str, ...], log: Path) -> None:
        self._child = child
        self.argv = argv
        self.log = log

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._child.poll()

    def wait(self, timeout: float) -> int:
        """Wait for its end.

        Raises:
            BuildError: it still runs after `timeout` seconds.
        """
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise BuildError(
                f"{Path(self.argv[0]).name} (pid {self.pid}) still runs after {timeout:g} s",
                f"read {self.log}",
                _log_tail(self.log),
            ) from None

    def end(self) -> None:
        """Terminate it, with SIGKILL when SIGTERM is not heard within 5 s."""
        if self._child.poll() is None:
            _end_family(self._child)

    def tail(self) -> list[str]:
        """The last lines of its log."""
        return _log_tail(self.log)


_note: ContextVar[Callable[[int], None]] = ContextVar("_note", default=lambda _: None)


@contextlib.contextmanager
def noting(note: Callable[[int], None]) -> Iterator[None]:
    """Within the block, `note` is told the pid of each process that `start` may leave running, before it is used.

    Whoever must find such a process again can write it down then, however we end.
    """
    token = _note.set(note)
    try:
        yield
    finally:
        _note.reset(token)


@contextlib.contextmanager
def start(
    argv: Sequence[str | os.PathLike[str]],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    keep: Callable[[], bool] | None = None,
    inherit: Sequence[int] = (),
) -> Iterator[Process]:
    """Run a command in the background for the length of a `with` block.

    Args:
        argv: the command.
        log: the file that takes its output.
        cwd: where it runs.
        env: added to the minimal environment.
        keep: asked at the end; where it answers True the process is left running (a failed bake with `--keep`). A
            process that may be kept must outlive us, so it also outlives our death by SIGKILL.
        inherit: descriptors that it has under the same numbers.

    Raises:
        BuildError: it could not be started.
    """
    words = tuple(os.fspath(word) for word in argv)
    progress.debug(f"+ {shlex.join(words)} &")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", errors="replace") as sink:
        try:
            child = subprocess.Popen(
                words,
                cwd=cwd,
                env=environment(env),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                pass_fds=inherit,
                preexec_fn=None if keep else _die_with(os.getpid()),
            )
        except FileNotFoundError as error:
            raise BuildError(f"{error.filename} was not found", "invoke doctor") from None
    process = Process(child, words, log)
    try:
        if keep:
            _note.get()(process.pid)
        yield process
    finally:
        if keep is None or not keep():
            process.end()


def wait_until(
    probe: Callable[[], bool],
    *,
    deadline: float,
    what: str,
    hint: str,
    tail_of: Callable[[], Sequence[str]] = tuple,
) -> float:
    """Ask `probe` until it says yes; the only place that sleeps.

    Args:
        probe: answers whether the awaited state is there.
        deadline: seconds to wait at the most.
        what: the awaited state, for the error.
        hint: the next step, for the error.
        tail_of: lines that explain a failure (a console's tail), asked only then.

    Returns:
        The seconds it took.

    Raises:
        BuildError: the deadline passed.
    """
    begun = time.monotonic()
    pause = 0.05
    while not probe():
        elapsed = time.monotonic() - begun
        if elapsed > deadline:
            raise BuildError(f"{what}: not within {deadline:.0f} s", hint, list(tail_of()))
        time.sleep(min(pause, max(0.0, deadline - elapsed)))
        pause = min(pause * 1.5, 1.0)
    return time.monotonic() - begun


@contextlib.contextmanager
def temporary_directory(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A directory that is gone when the block ends; its parent is made where it is missing."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as path:
        yield Path(path)
