"""`invoke test`: which tests run in which part, and what is said when none does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from _pytest.mark.expression import Expression

from pipeline import testing
from pipeline.errors import BuildError


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of pytest."""
    taken: list[list[str]] = []

    def interactive(argv: list[str], **_: Any) -> int:
        taken.append(argv)
        return 0

    monkeypatch.setattr("pipeline.run.interactive", interactive)
    return taken


def chooses(argv: list[str], marks: set[str]) -> bool:
    """Whether it runs a test that has these marks."""

    def has(name: str, /, **_: Any) -> bool:
        return name in marks

    return Expression.compile(argv[argv.index("-m", 2) + 1]).evaluate(has)


def test_every_test_that_is_not_long_runs_once(parts: list[list[str]]) -> None:
    testing.run_all("", fast=False, build=lambda: None)
    for marks in ({"build"}, {"build", "guest"}, {"build", "long"}, {"build", "guest", "long"}, set()):
        assert sum(chooses(part, marks) for part in parts) == (0 if "long" in marks else 1), marks


def test_fast_builds_nothing(parts: list[list[str]]) -> None:
    testing.run_all("", fast=True, build=lambda: pytest.fail("something is built"))
    assert len(parts) == 1


@pytest.mark.parametrize("fast", [True, False])
def test_a_name_that_no_test_has(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr("pipeline.run.interactive", lambda *_, **__: 5)
    with pytest.raises(BuildError, match="no test matches -k 'lbolc'"):
        testing.run_all("lbolc", fast=fast, build=lambda: None)


@pytest.mark.parametrize("part", range(3))
def test_a_name_that_one_part_has(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    count = itertools.count()
    monkeypatch.setattr("pipeline.run.interactive", lambda *_, **__: 0 if next(count) == part else 5)
    testing.run_all("block", fast=False, build=lambda: None)


def test_a_part_without_tests_is_no_success_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.run.interactive", lambda *_, **__: 5)
    with pytest.raises(BuildError, match="tests failed: pytest -m 'not build'"):
        testing.run_all("", fast=False, build=lambda: None)
