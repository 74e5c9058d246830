"""The harness: a test cannot touch the world by accident.

A test outside the integration folders may start no process and open no socket, unless a marker opens that door (see
`markers` in pyproject.toml). Its home, caches and store are folders of its own. What is forbidden is found by Python's
audit events, so it does not matter through which module the process or the socket is asked for.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from pipeline import apt, progress, run, settings
from pipeline.store import Store

TESTS = Path(__file__).parent
# A loaded machine is no failure: how long one example takes says nothing here.
hypothesis.settings.register_profile("lvsforge", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("lvsforge")

# Tests in these folders use what was built: processes, sockets, the user's own store.
INTEGRATION = frozenset({"kernel", "packages", "image", "cluster"})
# The interpreter's own folder: ruff, mypy, shellcheck, yamllint are installed beside it.
VENV_BIN = Path(sys.executable).parent


class TouchedTheWorld(Exception):
    """An unmarked test started a process or opened a socket."""


# --- the guard


@dataclass
class Guard:
    """What the running test may do; `audit` refuses the rest.

    Attributes:
        active: whether anything is refused at all.
        programs: the names that `@pytest.mark.runs` gave.
        sockets: "no", "local" or "any".
        violations: what was refused; a test that swallowed a refusal fails all the same.
    """

    active: bool = False
    programs: frozenset[str] = frozenset()
    sockets: str = "no"
    violations: list[TouchedTheWorld] = field(default_factory=list)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Python's audit hook; it hears of every file that is opened, so it must be quick to say "not mine"."""
        if self.active and (judge := _JUDGES.get(event)) is not None and (refusal := judge(self, args)):
            violation = TouchedTheWorld(refusal)
            self.violations.append(violation)
            raise violation

    @contextmanager
    def expected(self) -> Iterator[list[TouchedTheWorld]]:
        """Within the block refusals are what the test is about; yields those that came."""
        before, self.violations = self.violations, []
        try:
            yield self.violations
        finally:
            self.violations = before

    def process(self, words: Sequence[Any]) -> str:
        """Judge the start of a process; returns the refusal or ""."""
        command = [os.fsdecode(word) if isinstance(word, bytes | os.PathLike) else str(word) for word in words]
        name = program_name(command[0])
        if name in self.programs:
            return ""
        return (
            f"this test starts a process: {shlex.join(command)[:300]}\n"
            f'  → replace pipeline.run.run, or mark the test: @pytest.mark.runs("{name}")'
        )

    def fork(self) -> str:
        """Judge a fork; returns the refusal or ""."""
        if "python3" in self.programs:
            return ""
        return 'this test forks\n  → mark it: @pytest.mark.runs("python3")'

    def new_socket(self, family: int) -> str:
        """Judge a new socket; returns the refusal or ""."""
        local = {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX}
        if self.sockets == "any" or (self.sockets == "local" and family in local):
            return ""
        return (
            f"this test opens a socket (family {family})\n"
            "  → mark it @pytest.mark.network_local (loopback) or @pytest.mark.network (the archive)"
        )

    def address(self, address: Any) -> str:
        """Judge an address that is bound, connected to or looked up; returns the refusal or ""."""
        if self.sockets == "any" or (self.sockets == "local" and is_loopback(address)):
            return ""
        return f"this test uses the network address {address!r}\n  → mark it @pytest.mark.network, or use 127.0.0.1"


def _popen(guard: Guard, args: tuple[Any, ...]) -> str:
    executable, words = args[0], args[1]
    words = [words] if isinstance(words, str | bytes) else list(words)
    return guard.process([executable, *words[1:]] if executable else words)


# The audit events that matter, as "Audit events table" of the Python documentation names them.
_JUDGES: dict[str, Callable[[Guard, tuple[Any, ...]], str]] = {
    "subprocess.Popen": _popen,
    "os.exec": lambda guard, args: guard.process([args[0], *list(args[1])[1:]]),
    "os.posix_spawn": lambda guard, args: guard.process([args[0], *list(args[1])[1:]]),
    "os.system": lambda guard, args: guard.process([args[0]]),
    "os.fork": lambda guard, args: guard.fork(),
    "os.forkpty": lambda guard, args: guard.fork(),
    "pty.spawn": lambda guard, args: guard.process(args[0]),
    "socket.__new__": lambda guard, args: guard.new_socket(int(args[1])),
    "socket.bind": lambda guard, args: guard.address(args[1]),
    "socket.connect": lambda guard, args: guard.address(args[1]),
    "socket.sendto": lambda guard, args: guard.address(args[1]),
    "socket.getaddrinfo": lambda guard, args: guard.address((args[0],)),
    "socket.gethostbyname": lambda guard, args: guard.address((args[0],)),
    "socket.gethostbyaddr": lambda guard, args: guard.address((args[0],)),
}


def program_name(word: str) -> str:
    """The name by which `@pytest.mark.runs` knows a program; every spelling of Python 3 is `python3`."""
    name = Path(word).name
    return "python3" if re.fullmatch(r"python(3(\.\d+)?)?", name) else name


def is_loopback(address: Any) -> bool:
    """Whether a socket address stays on this machine: a path, or a loopback host."""
    if isinstance(address, str | bytes):
        return True  # AF_UNIX
    host = address[0] if isinstance(address, tuple) and address else address
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(os.fsdecode(host)).is_loopback
    except (ValueError, TypeError):
        return False


GUARD = Guard()
sys.addaudithook(GUARD.audit)


def is_integration(item: pytest.Item) -> bool:
    """Whether a test uses what was built, by its folder or by its marker."""
    inside = item.path.relative_to(TESTS).parts if item.path.is_relative_to(TESTS) else ("",)
    return inside[0] in INTEGRATION or item.get_closest_marker("build") is not None


def programs_of(item: pytest.Item) -> list[str]:
    """The programs of all `runs` markers of a test."""
    return [name for mark in item.iter_markers("runs") for name in mark.args]


def find_program(name: str) -> str | None:
    """Where a program is: beside the interpreter, or where `pipeline.run` looks."""
    if name == "python3":
        return sys.executable
    return shutil.which(name, path=f"{VENV_BIN}:{run.environment()['PATH']}")


def _refuse_swallowed() -> Generator[None, Any, Any]:
    """One phase of a test: what is refused in it must come out of it."""
    GUARD.violations = []
    result = yield
    if GUARD.violations:
        raise GUARD.violations[0]
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Arm the guard for everything that belongs to a test, its fixtures included."""
    GUARD.active = not is_integration(item)
    GUARD.programs = frozenset(programs_of(item))
    GUARD.sockets = "no"
    if item.get_closest_marker("network_local"):
        GUARD.sockets = "local"
    if item.get_closest_marker("network"):
        GUARD.sockets = "any"
    try:
        return (yield)
    finally:
        GUARD.active = False


@pytest.hookimpl(wrapper=True, trylast=True)  # inside the wrappers of pytest's own plugins, outside the fixtures
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """Skip a test whose programs are missing; on a CI machine that is a failure, or nobody would ever notice."""
    missing = [name for name in programs_of(item) if find_program(name) is None]
    if missing:
        text = f"not installed: {', '.join(missing)} (named by @pytest.mark.runs)"
        if on_ci():
            pytest.fail(f"{text}; with CI=true nothing may be left out", pytrace=False)
        pytest.skip(text)
    return (yield from _refuse_swallowed())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that swallowed a refusal."""
    return (yield from _refuse_swallowed())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test whose fixtures swallowed one when they ended."""
    return (yield from _refuse_swallowed())


def on_ci() -> bool:
    """Whether this is a CI machine, by the variable that all of them set."""
    return os.environ.get("CI", "").lower() in ("true", "1")


@pytest.fixture
def guard() -> Guard:
    """The guard itself, for the tests of it."""
    return GUARD


# --- every unit test has its own home, store and progress


@dataclass
class Recorder:
    """A progress monitor that keeps what it is told."""

    events: list[tuple[str, str, int]] = field(default_factory=list)

    def event(self, kind: str, text: str, depth: int, seconds: float | None = None) -> None:
        self.events.append((kind, text, depth))

    def texts(self, kind: str) -> list[str]:
        """The texts of one kind of event."""
        return [text for got, text, _ in self.events if got == kind]


@pytest.fixture(autouse=True)
def _own_home(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_integration(request.node):
        return
    home = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith("LVSFORGE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    for variable, folder in {"CACHE": ".cache", "DATA": ".local/share", "CONFIG": ".config", "STATE": ".state"}.items():
        monkeypatch.setenv(f"XDG_{variable}_HOME", str(home / folder))
    monkeypatch.setenv("LVSFORGE_STORE", str(home / "store"))
    monkeypatch.setenv("LVSFORGE_OUT", str(home / "out"))
    monkeypatch.setattr(settings, "current", settings.Settings())
    apt.archives.cache_clear()


@pytest.fixture(autouse=True)
def events(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What the code under test reported as progress; integration tests show it as usual."""
    recorder = Recorder()
    if not is_integration(request.node):
        monkeypatch.setattr(progress, "_state", progress._State(monitor=recorder))
    return recorder


# --- what tests share


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store; the user's own for an integration test."""
    return Store() if is_integration(request.node) else Store(tmp_path / "store")


@pytest.fixture
def wait_until() -> Callable[..., float]:
    """Poll for a state: `wait_until(probe, "what is awaited")`. No test sleeps.

    The deadline is generous (a loaded machine) because reaching it is a failure anyway.
    """

    def wait(probe: Callable[[], bool], what: str, deadline: float = 60.0) -> float:
        return run.wait_until(probe, deadline=deadline, what=what, hint="read the test")

    return wait


@pytest.fixture
def toy_root(tmp_path: Path) -> Path:
    """The smallest tree that `Sandbox` can enter: this machine's /usr behind links, nothing else.

    Bind /usr into it: `ro_binds={Path("/usr"): "/usr"}`. Files below it may be changed by `Sandbox(writable=True)`.
    """
    # two levels, as in the store: STAGE/KEY/root
    root = tmp_path / "root-toy" / "0123456789abcdef" / "root"
    for folder in ("usr", "build", "root", "tmp", "proc", "dev", "run", "etc", "var/tmp"):
        (root / folder).mkdir(parents=True)
    for link in ("bin", "sbin", "lib", "lib64", "lib32"):
        if Path("/", link).is_symlink():
            (root / link).symlink_to(f"usr/{link}")
    return root
