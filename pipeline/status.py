"""Each stage, its key, built or not, and why it would be rebuilt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.store import Stage, Store


@dataclass(frozen=True)
class Row:
    """One stage of the report.

    Attributes:
        name: the stage.
        key: its key.
        built: whether the store has it.
        why: why it would be built, or "".
        damage: what differs from the record of a built result (only looked at when asked).
    """

    name: str
    key: str
    built: bool
    why: str
    damage: tuple[str, ...] = ()


def closure(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and all that they need, each once, what is needed before what needs it."""
    ordered: dict[tuple[str, str], Stage] = {}

    def visit(stage: Stage) -> None:
        if (stage.name, stage.key) not in ordered:
            for need in stage.needs:
                visit(need)
            ordered[(stage.name, stage.key)] = stage

    for stage in stages:
        visit(stage)
    return list(ordered.values())


def report(stages: Iterable[Stage], store: Store, *, verify: bool = False) -> list[Row]:
    """Look every stage up.

    Args:
        stages: the final ones; what they need is found.
        store: where results are.
        verify: hash the top-level files of built results again and compare.
    """
    rows = []
    for stage in closure(stages):
        built = store.has(stage)
        damage = tuple(store.verify(store.path(stage))) if built and verify else ()
        rows.append(Row(stage.name, stage.key, built, "" if built else store.why(stage), damage))
    return rows


def table(rows: Iterable[Row]) -> list[str]:
    """The rows as text, one line a stage."""
    listed = list(rows)
    width = max((len(row.name) for row in listed), default=0)
    lines = []
    for row in listed:
        text = "built" if row.built else f"to build: {row.why}"
        lines.append(f"{'✓' if row.built and not row.damage else '·'} {row.name:<{width}}  {row.key}  {text}")
        lines += [f"    ✗ {fact}" for fact in row.damage]
    return lines
