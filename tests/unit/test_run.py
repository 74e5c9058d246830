"""The one runner: what a child sees, how its end is told, and that nothing of it survives."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import progress, run
from pipeline.errors import BuildError
from tests.conftest import Guard, Recorder

Wait = Callable[..., float]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def pid_in(file: Path, wait_until: Wait) -> int:
    wait_until(lambda: file.exists() and file.read_text().endswith("\n"), f"a pid in {file.name}")
    return int(file.read_text())


# --- what comes back


@pytest.mark.runs("sh")
def test_output_errors_and_status_come_back() -> None:
    result = run.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=False)
    assert (result.stdout, result.stderr, result.returncode) == ("out\n", "err\n", 3)
    assert result.argv == ("sh", "-c", "echo out; echo err >&2; exit 3")


@pytest.mark.runs("cat")
def test_stdin_is_the_given_text_or_closed(tmp_path: Path) -> None:
    """Ours may be a terminal or a pipe that never ends; a build that asks a question must not wait for an answer."""
    assert run.run(["cat"], stdin="a\nb").stdout == "a\nb"
    saved, (reader, writer) = os.dup(0), os.pipe()
    try:
        os.dup2(reader, 0)
        assert run.run(["cat"], timeout=10).stdout == ""
        with run.start(["cat"], log=tmp_path / "log") as process:
            assert process.wait(10) == 0
    finally:
        os.dup2(saved, 0)
        for descriptor in (saved, reader, writer):
            os.close(descriptor)


@pytest.mark.runs("printf")
def test_output_that_is_not_utf8_is_kept_readable() -> None:
    assert run.run(["printf", r"a\377b"]).stdout == "a�b"


@pytest.mark.runs("env")
def test_a_child_sees_a_minimal_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-O9")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("LC_MESSAGES", "de_DE.UTF-8")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    lines = run.run(["env"], env={"MINE": "1"}).stdout.splitlines()
    seen = dict(line.split("=", 1) for line in lines)
    assert {"MINE": "1", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TZ": "UTC"}.items() <= seen.items()
    assert seen["http_proxy"] == "http://127.0.0.1:1"
    proxies = {f"{kind}_proxy" for kind in ("http", "https", "no")}
    proxies |= {name.upper() for name in proxies}
    assert set(seen) <= {"MINE", "LANG", "LC_ALL", "TZ", "HOME", "PATH", "TMPDIR", *proxies}


@pytest.mark.parametrize("path", ["/usr/bin:/bin", "/opt/x", ""])
def test_sbin_is_in_the_path_after_the_users_own(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("PATH", path)
    folders = run.environment()["PATH"].split(":")
    assert {"/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"} <= set(folders)
    assert len(folders) == len(set(folders))
    assert "" not in folders  # an empty element would be the current folder
    assert ":".join(folders).startswith(path)


# --- how a failure is told


@pytest.mark.runs("sh")
def test_a_failure_shows_a_line_that_can_be_pasted(tmp_path: Path) -> None:
    argv = ["sh", "-c", 'echo "it broke: $1" >&2; exit 4', "name", "two words; $HOME"]
    with pytest.raises(BuildError) as caught:
        run.run(argv, what="compiling keepalived", cwd=tmp_path)
    error = caught.value
    assert error.message == "compiling keepalived: sh failed with exit status 4"
    assert error.details[0].startswith("$ ")
    assert shlex.split(error.details[0][2:]) == argv
    assert error.details[1:] == ("it broke: two words; $HOME",)
    again = run.run(["sh", "-c", error.details[0][2:]], check=False)
    assert (again.returncode, again.stderr) == (4, "it broke: two words; $HOME\n")


@pytest.mark.runs("sh")
@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("kill -SEGV $$", "sh was killed by SIGSEGV"),
        ("kill -KILL $$", "sh was killed by SIGKILL"),
        ("exit 127", "sh could not be started (exit status 127)"),
        ("exit 1", "sh failed with exit status 1"),
        # bubblewrap and shells pass the signal of what they ran on in this form
        ("exit 137", "sh failed with exit status 137"),
    ],
)
def test_signal_missing_program_and_failure_are_told_apart(script: str, text: str) -> None:
    with pytest.raises(BuildError) as caught:
        run.run(["sh", "-c", script])
    assert caught.value.message == text


@given(st.integers(min_value=-64, max_value=255).filter(bool))
def test_every_status_has_words(status: int) -> None:
    assert run.describe(["/usr/bin/cc"], status).startswith("cc ")


def test_a_missing_program_is_an_error_with_a_next_step(guard: Guard, tmp_path: Path) -> None:
    missing = tmp_path / "no-such-program"
    with pytest.raises(BuildError, match="no-such-program was not found, needed to run") as caught:
        _unguarded(missing, guard)
    assert caught.value.hint


def test_a_program_that_may_not_be_executed_is_an_error_with_a_next_step(guard: Guard, tmp_path: Path) -> None:
    program = tmp_path / "not-executable"
    program.write_text("#!/bin/sh\n")
    with pytest.raises(BuildError, match=r"not-executable.*ermission denied"):
        _unguarded(program, guard)


def _unguarded(program: Path, guard: Guard) -> None:
    guard.programs = frozenset({program.name})
    run.run([program])


@pytest.mark.runs("true")
def test_a_missing_working_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="gone was not found, needed to run: true"):
        run.run(["true"], cwd=tmp_path / "gone")


@pytest.mark.runs("sh")
def test_the_shown_command_replaces_the_real_one() -> None:
    with pytest.raises(BuildError) as caught:
        run.run(["sh", "-c", "exit 1"], shown="rpmbuild -ba x.spec   # in root-tools", hint="look there")
    assert caught.value.details[0] == "$ rpmbuild -ba x.spec   # in root-tools"
    assert caught.value.hint == "look there"


def test_require_says_why_and_what_to_install() -> None:
    with pytest.raises(BuildError) as caught:
        run.require("no-such-tool", "to write seeds", "seed-tools")
    assert caught.value.message == "no-such-tool is not installed; it is needed to write seeds"
    assert caught.value.hint.startswith("apt-get install seed-tools")
    assert Path(run.require("sh", "to run scripts", "dash")).is_absolute()


def test_require_finds_what_is_only_in_sbin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.require("ldconfig", "to test", "libc-bin").endswith("sbin/ldconfig")


# --- logs


@pytest.mark.runs("sh")
def test_a_log_keeps_the_command_and_everything_it_said(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "build.log"
    result = run.run(["sh", "-c", "echo one; echo two >&2"], log=log)
    assert (result.stdout, result.stderr) == ("", "")
    with pytest.raises(BuildError) as caught:
        run.run(["sh", "-c", "echo three; exit 1"], log=log)
    assert log.read_text() == "+ sh -c 'echo one; echo two >&2'\none\ntwo\n+ sh -c 'echo three; exit 1'\nthree\n"
    assert caught.value.hint == f"read {log}"
    assert caught.value.details[-1] == "three"


@pytest.mark.runs("seq")
def test_an_error_shows_the_end_of_a_long_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(BuildError) as caught:
        run.run(["seq", "1", "1000", "x"], log=log)  # seq refuses the last operand
    assert 1 < len(caught.value.details) <= 1 + run._TAIL_LINES
    run.run(["seq", "1", "1000"], log=log)
    assert run.tail(log.read_text()) == [str(n) for n in range(1001 - run._TAIL_LINES, 1001)]
    assert run.tail("a\n\n\n") == ["a"]


@pytest.mark.runs("true")
def test_commands_are_shown_when_debugging(events: Recorder) -> None:
    run.run(["true", "a b"])
    assert events.texts("debug") == []
    progress._state.debug = True
    run.run(["true", "a b"])
    assert events.texts("debug") == ["+ true 'a b'"]


# --- nothing survives


@pytest.mark.runs("sh")
def test_a_time_out_ends_the_whole_family(tmp_path: Path, wait_until: Wait) -> None:
    pid_file = tmp_path / "pid"
    script = f"sleep 1000 & echo $! >{pid_file}; wait"
    with pytest.raises(BuildError, match=r"no end within 1 s: sh -c"):
        run.run(["sh", "-c", script], timeout=1)
    pid = pid_in(pid_file, wait_until)
    wait_until(lambda: not alive(pid), "the end of the grandchild")


@pytest.mark.runs("sh")
def test_a_time_out_ends_those_who_do_not_listen(tmp_path: Path, wait_until: Wait) -> None:
    """The leader ends at SIGTERM, its child ignores it."""
    pid_file = tmp_path / "pid"
    script = f"sh -c 'trap \"\" TERM; echo $$ >{pid_file}; while :; do sleep 1; done' & wait"
    with pytest.raises(BuildError, match="no end within"):
        run.run(["sh", "-c", script], timeout=1)
    pid = pid_in(pid_file, wait_until)
    wait_until(lambda: not alive(pid), "the end of the deaf grandchild", 15)


@pytest.mark.runs("sh")
def test_a_time_out_lets_a_program_clean_up_first(tmp_path: Path) -> None:
    """Packer, for one, removes its machine."""
    farewell = tmp_path / "farewell"
    script = f"trap 'echo bye >{farewell}; exit' TERM; sleep 1000 & wait"
    with pytest.raises(BuildError, match="no end within"):
        run.run(["sh", "-c", script], timeout=1)
    assert farewell.read_text() == "bye\n"


@pytest.mark.runs("sh")
def test_an_interrupt_ends_the_child(tmp_path: Path, wait_until: Wait) -> None:
    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    pid_file = tmp_path / "pid"
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.run(["sh", "-c", f"echo $$ >{pid_file}; sleep 1000"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    pid = pid_in(pid_file, wait_until)
    wait_until(lambda: not alive(pid), "the end of the child")


ORPHANS = {
    "run": "run.run(argv)",
    "start": "with run.start(argv, log=log) as process: process.wait(1000)",
    "start, perhaps kept": "with run.start(argv, log=log, keep=lambda: False) as process: process.wait(1000)",
}


@pytest.mark.runs("python3")
@pytest.mark.parametrize("how", ORPHANS)
def test_kill_9_of_the_task_ends_its_children(tmp_path: Path, wait_until: Wait, how: str) -> None:
    """An orphan would go on writing where the next run of the same command builds.

    Only a machine that `--keep` may leave running must outlive us; such a process outlives SIGKILL, too.
    """
    pid_file = tmp_path / "pid"
    script = (
        "import pathlib, sys\nfrom pipeline import run\n"
        f"argv, log = ['sh', '-c', sys.argv[1]], pathlib.Path({str(tmp_path / 'inner.log')!r})\n{ORPHANS[how]}"
    )
    beat = tmp_path / "beat"
    line = f"echo $$ >{pid_file}; while :; do date +%N >{beat}; sleep 0.05; done"
    with run.start(
        [sys.executable, "-c", script, line], log=tmp_path / "log", env={"PYTHONPATH": str(Path(__file__).parents[2])}
    ) as task:
        pid = pid_in(pid_file, wait_until)
        assert alive(pid)
        os.kill(task.pid, signal.SIGKILL)
        task.wait(30)
        if "kept" in how:
            for _ in range(3):
                before = beat.read_text()
                wait_until(lambda before=before: beat.read_text() not in ("", before), "one more beat", 10)
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid), "the end of the orphan", 10)


# --- background processes


@pytest.mark.runs("sh")
def test_a_background_process_ends_with_its_block(tmp_path: Path) -> None:
    with run.start(["sh", "-c", "echo hello; exec sleep 1000"], log=tmp_path / "log") as process:
        assert process.poll() is None
        assert alive(process.pid)
    assert not alive(process.pid)
    assert process.poll() is not None


@pytest.mark.runs("sh")
@pytest.mark.parametrize("given", [True, False])
def test_a_background_process_has_the_descriptors_that_it_is_given(tmp_path: Path, given: bool) -> None:
    reader, writer = os.pipe()
    with (
        os.fdopen(reader) as heard,
        run.start(
            ["sh", "-c", f"echo heard >/dev/fd/{writer}"], log=tmp_path / "log", inherit=[writer] if given else []
        ) as process,
    ):
        process.wait(30)
        os.close(writer)
        assert heard.read() == ("heard\n" if given else "")


@pytest.mark.runs("sleep")
def test_a_background_process_ends_when_its_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run.start(["sleep", "1000"], log=tmp_path / "log") as process:
        raise ZeroDivisionError
    assert not alive(process.pid)


@pytest.mark.runs("sleep")
def test_a_kept_process_outlives_its_block(tmp_path: Path) -> None:
    with run.start(["sleep", "1000"], log=tmp_path / "log", keep=lambda: True) as process:
        pass
    try:
        assert alive(process.pid)
    finally:
        process.end()
    assert not alive(process.pid)


@pytest.mark.runs("sleep")
def test_a_process_that_may_be_kept_is_noted_before_it_is_used(tmp_path: Path) -> None:
    noted: list[int] = []
    argv, log = ["sleep", "1000"], tmp_path / "log"
    with run.noting(noted.append), run.start(argv, log=log), run.start(argv, log=log, keep=lambda: False) as kept:
        assert noted == [kept.pid]
    with run.start(argv, log=log, keep=lambda: False):
        assert len(noted) == 1

    def fail(pid: int) -> None:
        noted.append(pid)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), run.noting(fail), run.start(argv, log=log, keep=lambda: False):
        pytest.fail("it is not used")
    assert not alive(noted[1])


@pytest.mark.runs("sleep")
def test_a_process_that_need_not_be_kept_ends(tmp_path: Path) -> None:
    with run.start(["sleep", "1000"], log=tmp_path / "log", keep=lambda: False) as process:
        pass
    assert not alive(process.pid)


@pytest.mark.runs("sh")
def test_waiting_for_a_background_process(tmp_path: Path, wait_until: Wait) -> None:
    log = tmp_path / "log"
    with run.start(["sh", "-c", "echo still here; exec sleep 1000"], log=log) as process:
        wait_until(lambda: "still" in log.read_text(), "its first line")
        with pytest.raises(BuildError, match=r"sh \(pid \d+\) still runs after 0.1 s") as caught:
            process.wait(0.1)
        assert caught.value.details == ("still here",)
        assert process.tail() == ["still here"]
    with run.start(["sh", "-c", "exit 5"], log=log) as process:
        assert process.wait(30) == 5


def test_a_background_program_that_is_missing(guard: Guard, tmp_path: Path) -> None:
    guard.programs = frozenset({"missing"})
    with (
        pytest.raises(BuildError, match="missing was not found"),
        run.start([tmp_path / "missing"], log=tmp_path / "l"),
    ):
        pass


@pytest.mark.runs("sh")
def test_an_interactive_command_gives_its_status() -> None:
    assert run.interactive(["sh", "-c", 'exit "$CODE"'], env={"CODE": "7"}) == 7


# --- polling


class Clock:
    """Time that passes only while somebody sleeps, and a little with each look at it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.naps: list[float] = []

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("pipeline.run.time.monotonic", clock.monotonic)
    monkeypatch.setattr("pipeline.run.time.sleep", clock.sleep)
    return clock


def test_polling_stops_at_the_first_yes(clock: Clock) -> None:
    answers = iter([False, False, True])
    took = run.wait_until(lambda: next(answers), deadline=10, what="x", hint="y")
    assert len(clock.naps) == 2
    assert took == pytest.approx(sum(clock.naps), abs=0.1)


def test_polling_says_what_was_awaited_and_shows_why(clock: Clock) -> None:
    asked = []
    with pytest.raises(BuildError) as caught:
        run.wait_until(
            lambda: bool(asked.append(clock.now)),  # type: ignore[func-returns-value]
            deadline=30,
            what="ssh on director",
            hint="read the console",
            tail_of=lambda: ["login:"],
        )
    assert str(caught.value) == "ssh on director: not within 30 s\n  login:\n  → read the console"
    assert 30 < clock.now - 1000 < 31
    assert asked[-1] - 1000 >= 30  # one more look when the time is up: what came at the last moment counts
    assert max(clock.naps) <= 1.0
    assert clock.naps[0] <= 0.1


def test_polling_reads_the_tail_only_when_it_failed(clock: Clock) -> None:
    def tail() -> list[str]:
        raise AssertionError("read although all went well")

    run.wait_until(lambda: True, deadline=1, what="x", hint="y", tail_of=tail)
    assert clock.naps == []


# --- folders


def test_a_temporary_folder_is_gone_afterwards(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run.temporary_directory("x-", tmp_path) as folder:
        (folder / "file").touch()
        assert folder.parent == tmp_path
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_directory_needs_no_parent(tmp_path: Path) -> None:
    """Seen with `bundle-load` into a store that did not exist yet."""
    with run.temporary_directory("x-", tmp_path / "new" / "store") as folder:
        assert folder.is_dir()
    assert not folder.exists()
