"""The task boundary: a failure is a fact and an arrow, never a traceback unless it was asked for."""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from invoke.collection import Collection
from invoke.program import Program

from pipeline import progress, settings
from pipeline.cli import FLAGS, boundary, command, fail, goes_with
from pipeline.errors import BuildError
from provision import tasks as provision


def ending(
    function: Callable[[], object], capsys: pytest.CaptureFixture[str], *, debug: bool = False
) -> tuple[int, list[str]]:
    """The exit status of a failing task and what it printed."""
    progress.configure("plain", debug=debug)
    with pytest.raises(SystemExit) as caught:
        boundary(function)()
    out, err = capsys.readouterr()
    assert out == ""
    assert isinstance(caught.value.code, int)
    return caught.value.code, err.splitlines()


def raising(error: BaseException) -> Callable[[], object]:
    def task() -> None:
        raise error

    return task


def test_a_failure_is_a_fact_its_details_and_an_arrow(capsys: pytest.CaptureFixture[str]) -> None:
    error = BuildError("kernel/lvs/series:3: missing", "invoke series-lint", ["one", "two"])
    status, lines = ending(raising(error), capsys)
    assert status == 1
    assert [line.strip() for line in lines] == [
        "✗ kernel/lvs/series:3: missing",
        "one",
        "two",
        "→ invoke series-lint",
    ]


def test_a_traceback_only_when_debugging(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = ending(raising(BuildError("it broke", "mend it")), capsys, debug=True)
    assert status == 1
    assert lines[0].startswith("Traceback")
    assert lines[-1].strip() == "→ mend it"


def test_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = ending(raising(OSError(errno.ENOSPC, "No space left on device", "/store/x")), capsys)
    assert status == 1
    assert lines[0] == "✗ /store/x: the disk is full"
    assert "→ invoke clean --store --keep-results 1 " in lines[1]


def test_any_other_system_error_names_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = ending(lambda: open("/nonexistent/file"), capsys)
    assert status == 1
    assert lines[0] == "✗ /nonexistent/file: No such file or directory"
    assert "→" in lines[1]
    progress.configure("plain", debug=True)
    with pytest.raises(FileNotFoundError):
        boundary(lambda: open("/nonexistent/file"))()


def test_an_interrupt_is_no_failure_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = ending(raising(KeyboardInterrupt()), capsys)
    assert status == 130
    assert lines[0] == "✗ interrupted"
    assert "goes on where it stopped" in lines[1]


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        boundary(raising(ZeroDivisionError()))()


def test_work_done_is_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    def task() -> str:
        with progress.step("kernel-lvs"):
            progress.warn("the pinned source is gone")
        return "result"

    progress.configure("plain")
    assert boundary(task)() == "result"
    lines = capsys.readouterr().err.splitlines()
    table = lines[lines.index("✓ kernel-lvs  (0.0 s)") + 1 :]
    assert [line.split() for line in table if line.strip()] == [
        ["0.0", "s", "kernel-lvs"],
        "! the pinned source is gone".split(),
    ]


def test_no_work_prints_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    progress.configure("plain")
    assert boundary(lambda: 3)() == 3
    assert capsys.readouterr().err == ""


def test_fail_ends_the_program() -> None:
    with pytest.raises(SystemExit) as caught:
        fail(BuildError("a", "b"), status=7)
    assert caught.value.code == 7


# --- commands


def make(*flags: str, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A task that keeps what it was called with."""
    calls: list[dict[str, Any]] = []

    @command(*flags, help={"role": "which image"}, **options)
    def bake(_c: Any, role: str = "director") -> None:
        """Bake."""
        calls.append({"role": role, "cwd": os.getcwd(), **vars(settings.current)})

    return bake, calls


def test_a_task_takes_its_flags_and_the_common_ones() -> None:
    task, _ = make("offline", "keep")
    arguments = task.get_arguments()  # asking twice gives no help the second time
    assert [argument.name for argument in arguments] == ["role", "offline", "keep", "debug", "progress_form"]
    assert all(argument.help for argument in arguments)
    assert inspect.getdoc(task) == "Bake."


def test_a_number_that_is_none_is_said_and_nothing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    @command()
    def measure(_c: Any, most_rounds: int = 3) -> None:
        """Measure."""
        calls.append(most_rounds)

    program = Program(namespace=Collection(measure))
    program.run(["invoke", "measure", "--most-rounds", "7"], exit=False)
    assert calls == [7]
    with pytest.raises(SystemExit) as caught:
        program.run(["invoke", "measure", "--most-rounds", "many"])
    said = capsys.readouterr().err
    assert caught.value.code == 1 and said.splitlines()[0] == "--most-rounds takes a whole number, not 'many'"
    assert "  → " in said and calls == [7]


def test_flags_reach_the_settings_and_not_the_function(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    task, calls = make("offline", "keep")
    task.body(None, role="realserver", offline=True, keep=False, debug=False, progress_form="plain")
    assert calls == [
        {
            "role": "realserver",
            "cwd": str(settings.TOP),
            "offline": True,
            "keep": False,
            "locked": False,
            "dry_run": False,
            "jobs": settings.current.jobs,
        }
    ]


def test_debug_and_the_form_of_progress_are_set_for_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    task, _ = make()
    task.body(None, debug=True, progress_form="json")
    assert progress.debugging()
    assert isinstance(progress._state.monitor, progress.JsonLines)


def test_a_failing_task_ends_at_its_boundary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    @command()
    def broken(_c: Any) -> None:
        """Break."""
        raise BuildError("it broke", "mend it")

    with pytest.raises(SystemExit):
        broken.body(None, debug=False, progress_form="plain")
    assert capsys.readouterr().err.splitlines() == ["✗ it broke", "    → mend it"]


def test_every_shared_flag_is_a_setting_of_the_same_default() -> None:
    for name, (default, text) in FLAGS.items():
        assert getattr(settings.Settings(), name) == default
        assert text


def test_results_go_where_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVSFORGE_OUT", "/somewhere")
    assert str(settings.out()) == "/somewhere"
    monkeypatch.delenv("LVSFORGE_OUT")
    assert settings.out() == settings.TOP / "out"
    assert (settings.TOP / "pyproject.toml").exists()


# --- options that go together


@pytest.mark.parametrize("given", [{"port": 80}, {"most_rounds": "3"}])
def test_an_option_that_would_be_passed_over_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(BuildError) as caught:
        goes_with("like", "", **given)
    (name,) = (key.replace("_", "-") for key in given)
    assert caught.value.message == f"--{name} goes with --like only"
    goes_with("like", "shop", **given)
    goes_with("like", "", port=0)


def test_a_port_of_a_vip_is_one_of_a_new_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before the cluster file is looked at."""
    task = next(task for task in Collection.from_module(provision).tasks.values() if task.name == "add-vip")
    words = ["--cluster", str(tmp_path / "none.yaml"), "--service", "shop", "--vip", "203.0.113.9", "--port", "80"]
    with pytest.raises(SystemExit) as caught:
        Program(namespace=Collection(task)).run(["invoke", "add-vip", *words])
    assert caught.value.code == 1
    assert "✗ --port goes with --like only" in capsys.readouterr().err
