"""A line of numbers for each story, in out/cluster-stories.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.traffic import Request, failed, outage

_HEAD = [
    "| story | what happened | outage, s | slowest, s | failed / requests | limit, s | also |",
    "|---|---|---|---|---|---|---|",
]


@dataclass(frozen=True)
class Row:
    """What was measured.

    Attributes:
        story: its name.
        event: what happened in it, in the same words each time: by them a later row finds the one that it replaces.
        outage: seconds of the longest outage; None where no requests were made.
        slowest: seconds that the slowest good answer took, as SYNs are sent again; None where there was none.
        failed, total: requests.
        limit: what the story allows, as text.
        also: what else was measured, as text.
    """

    story: str
    event: str
    outage: float | None
    slowest: float | None
    failed: int
    total: int
    limit: str = ""
    also: str = ""

    @classmethod
    def of(cls, story: str, event: str, requests: Sequence[Request], limit: str = "", also: str = "") -> Row:
        """A row about requests."""
        took = outage(requests) if requests else None
        slowest = max((each.took for each in requests if not each.error), default=None)
        return cls(story, event, took, slowest, len(failed(requests)), len(requests), limit, also)

    @property
    def line(self) -> str:
        """It in the table."""
        took, slowest = ("" if each is None else f"{each:.1f}" for each in (self.outage, self.slowest))
        counts = f"{self.failed} / {self.total}"
        return f"| {self.story} | {self.event} | {took} | {slowest} | {counts} | {self.limit} | {self.also} |"


def merged(text: str, row: Row) -> str:
    """The table with a row, in place of an older one of the same story and event."""
    same = f"| {row.story} | {row.event} |"
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| story |")]
    place = next((n for n, line in enumerate(lines) if line.startswith(same)), len(lines))
    lines[place : place + 1] = [row.line]
    return "\n".join([*_HEAD, *lines]) + "\n"


def note(file: Path, row: Row) -> None:
    """Put a row into the file's table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    beside = file.with_suffix(".new")
    beside.write_text(merged(before, row), encoding="utf-8")
    beside.rename(file)
