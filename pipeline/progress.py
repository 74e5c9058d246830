"""Progress as an interface: nested steps on a terminal, plain lines without one, JSON lines on request.

The rooms call `step`, `note`, `warn`, `reused`; what becomes of it is chosen once, by `configure`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, ClassVar, Protocol


class Monitor(Protocol):
    """Where progress goes."""

    def event(self, kind: str, text: str, depth: int, seconds: float | None = None) -> None:
        """Take one event: kind is begin, end, fail, reused, note, warn, error or debug."""
        ...


class Plain:
    """One line an event: for logs and CI."""

    MARKS: ClassVar = {
        "begin": "·",
        "end": "✓",
        "fail": "✗",
        "reused": "=",
        "note": " ",
        "warn": "!",
        "error": "✗",
        "debug": "+",
    }

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def event(self, kind: str, text: str, depth: int, seconds: float | None = None) -> None:
        mark = self.MARKS[kind]
        took = f"  ({_duration(seconds)})" if seconds is not None else ""
        print(f"{'  ' * depth}{mark} {text}{took}", file=self.stream, flush=True)


class Terminal(Plain):
    """Like `Plain`, with colour: what fails stands out, what was reused recedes."""

    COLOURS: ClassVar = {"end": "32", "fail": "2", "reused": "2", "warn": "33", "error": "31", "debug": "2"}

    def event(self, kind: str, text: str, depth: int, seconds: float | None = None) -> None:
        colour = self.COLOURS.get(kind)
        mark = self.MARKS[kind]
        took = f"  ({_duration(seconds)})" if seconds is not None else ""
        line = f"{'  ' * depth}{mark} {text}{took}"
        print(f"\x1b[{colour}m{line}\x1b[0m" if colour else line, file=self.stream, flush=True)


class JsonLines:
    """One JSON object a line, for other programs."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def event(self, kind: str, text: str, depth: int, seconds: float | None = None) -> None:
        record: dict[str, object] = {
            "time": round(time.time(), 3),
            "event": kind,
            "text": text,
            "depth": depth,
        }
        if seconds is not None:
            record["seconds"] = round(seconds, 3)
        print(json.dumps(record, ensure_ascii=False), file=self.stream, flush=True)


@dataclass
class _State:
    monitor: Monitor = field(default_factory=lambda: Plain(sys.stderr))
    depth: int = 0
    begun: int = 0
    debug: bool = False
    durations: list[tuple[int, str, float]] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


_state = _State()


def configure(form: str = "auto", *, debug: bool = False) -> None:
    """Choose where progress goes.

    Args:
        form: `auto` (colour on a terminal, else plain), `plain` or `json`.
        debug: also show every command that is started.
    """
    stream = sys.stderr
    if form == "json":
        monitor: Monitor = JsonLines(stream)
    elif form == "auto" and stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
        monitor = Terminal(stream)
    else:
        monitor = Plain(stream)
    _state.monitor = monitor
    _state.debug = debug


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """A named piece of work with its elapsed time; nests."""
    _state.monitor.event("begin", text, _state.depth)
    _state.begun += 1
    order, begun = _state.begun, time.monotonic()
    _state.depth += 1
    try:
        yield
    except BaseException:
        _state.depth -= 1
        _state.monitor.event("fail", text, _state.depth, time.monotonic() - begun)
        raise
    _state.depth -= 1
    took = time.monotonic() - begun
    _state.durations.append((order, "  " * _state.depth + text, took))
    _state.monitor.event("end", text, _state.depth, took)


def note(text: str) -> None:
    """A fact worth a line."""
    _state.monitor.event("note", text, _state.depth)


def warn(text: str) -> None:
    """Something that the user should act on, but that stops nothing; repeated in the summary."""
    _state.notices.append(text)
    _state.monitor.event("warn", text, _state.depth)


def error(text: str) -> None:
    """The failure that ends the task; for the task boundary only."""
    for line in text.splitlines():
        _state.monitor.event("error" if line == text.splitlines()[0] else "note", line, 0)


def reused(stage: str, why: str) -> None:
    """A stage whose result was already there."""
    if stage not in _state.reused:
        _state.reused.append(stage)
        _state.monitor.event("reused", f"{stage}: {why}", _state.depth)


def debug(text: str) -> None:
    """Shown only with `--debug`."""
    if _state.debug:
        _state.monitor.event("debug", text, _state.depth)


def debugging() -> bool:
    """Whether commands and tracebacks are shown."""
    return _state.debug


def worked() -> bool:
    """Whether any step was taken since the start."""
    return bool(_state.durations)


def summary() -> list[str]:
    """The durations of all steps in the order they began, what was reused, and the notices once more."""
    lines = [f"{_duration(took):>12}  {text}" for _, text, took in sorted(_state.durations)]
    if _state.reused:
        lines.append(f"{'reused':>12}  {', '.join(_state.reused)}")
    return lines + [f"{'!':>12}  {text}" for text in dict.fromkeys(_state.notices)]


def table() -> None:
    """Show the summary."""
    _state.monitor.event("note", "", 0)
    for line in summary():
        _state.monitor.event("note", line, 0)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
