"""Progress: the same events on a terminal, as plain lines, as JSON, and summed up."""

from __future__ import annotations

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import progress
from tests.conftest import Recorder


def story() -> None:
    """One of each kind of event."""
    with progress.step("kernel-lvs"):
        progress.note("6.12.9")
        with progress.step("compiling"):
            progress.warn("a loud notice")
        progress.reused("root-kernel", "same inputs")
    with pytest.raises(ZeroDivisionError), progress.step("signing"):
        raise ZeroDivisionError


def test_events_nest_and_a_failure_unwinds(events: Recorder) -> None:
    story()
    assert events.events == [
        ("begin", "kernel-lvs", 0),
        ("note", "6.12.9", 1),
        ("begin", "compiling", 1),
        ("warn", "a loud notice", 2),
        ("end", "compiling", 1),
        ("reused", "root-kernel: same inputs", 1),
        ("end", "kernel-lvs", 0),
        ("begin", "signing", 0),
        ("fail", "signing", 0),
    ]
    assert progress._state.depth == 0


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress.configure("auto")  # captured output is no terminal
    story()
    progress.error("it broke\n  → mend it")
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line.split("  (")[0] for line in err.splitlines()]
    assert lines == [
        "· kernel-lvs",
        "    6.12.9",
        "  · compiling",
        "    ! a loud notice",
        "  ✓ compiling",
        "  = root-kernel: same inputs",
        "✓ kernel-lvs",
        "· signing",
        "✗ signing",
        "✗ it broke",
        "    → mend it",
    ]
    assert "\x1b" not in err


def test_json_lines_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    progress.configure("json")
    story()
    progress.note('quotes " and\nnewlines')
    out, err = capsys.readouterr()
    assert out == ""
    records = [json.loads(line) for line in err.splitlines()]
    assert [(r["event"], r["depth"]) for r in records[:3]] == [("begin", 0), ("note", 1), ("begin", 1)]
    assert records[-1]["text"] == 'quotes " and\nnewlines'
    assert all(set(r) <= {"time", "event", "text", "depth", "seconds"} for r in records)
    assert [r["event"] for r in records if "seconds" in r] == ["end", "end", "fail"]


class Tty(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)], ids=str
)
def test_colour_only_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], colour: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    terminal = Tty()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress.configure("auto")
    progress.warn("careful")
    assert ("\x1b[33m" in terminal.getvalue()) is colour
    assert "! careful" in terminal.getvalue()


def test_plain_can_be_asked_for_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Tty())
    monkeypatch.setenv("TERM", "xterm")
    progress.configure("plain")
    assert type(progress._state.monitor) is progress.Plain


def test_debug_lines_only_when_debugging(capsys: pytest.CaptureFixture[str]) -> None:
    progress.configure("plain")
    progress.debug("+ ls")
    assert not progress.debugging()
    assert capsys.readouterr().err == ""
    progress.configure("plain", debug=True)
    progress.debug("+ ls")
    assert progress.debugging()
    assert "+ ls" in capsys.readouterr().err


def test_a_stage_is_reported_as_reused_once(events: Recorder) -> None:
    progress.reused("root-tools", "same inputs")
    progress.reused("root-tools", "same inputs")
    assert events.texts("reused") == ["root-tools: same inputs"]


def test_the_summary_lists_steps_in_their_order_then_reuse_then_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 11.0, 131.5])  # begin outer, begin inner, end inner, end outer
    monkeypatch.setattr("pipeline.progress.time.monotonic", lambda: next(times))
    with progress.step("bake"), progress.step("boot"):
        progress.warn("no accelerator")
        progress.warn("no accelerator")
    progress.reused("a", "x")
    progress.reused("b", "x")
    lines = [line.strip() for line in progress.summary()]
    assert lines == ["2 min 11 s  bake", "10.0 s    boot", "reused  a, b", "!  no accelerator"]


def test_the_table_says_the_summary(events: Recorder) -> None:
    assert not progress.worked()
    with progress.step("bake"):
        pass
    assert progress.worked()
    progress.table()
    assert [text for text in events.texts("note") if text] == progress.summary()


def test_only_the_first_line_of_an_error_is_the_error(events: Recorder) -> None:
    progress.error("fact\n  detail\n  → hint")
    assert events.events == [("error", "fact", 0), ("note", "  detail", 0), ("note", "  → hint", 0)]


@given(st.floats(min_value=0, max_value=1e6))
def test_durations_read_as_seconds_or_minutes(seconds: float) -> None:
    text = progress._duration(seconds)
    if text.endswith(" s") and "min" in text:
        minutes, _, rest = text.partition(" min ")
        shown = int(minutes) * 60 + int(rest.removesuffix(" s"))
        assert int(rest.removesuffix(" s")) < 60
        assert abs(shown - seconds) <= 1
    else:
        assert abs(float(text.removesuffix(" s")) - seconds) <= 0.051


def test_every_kind_of_event_has_a_mark() -> None:
    stream = io.StringIO()
    for kind in ("begin", "end", "fail", "reused", "note", "warn", "error", "debug"):
        for monitor in (progress.Plain(stream), progress.Terminal(stream), progress.JsonLines(stream)):
            monitor.event(kind, "text", 1, 2.0)
    assert stream.getvalue().count("text") >= 24
