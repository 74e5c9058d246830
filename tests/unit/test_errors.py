"""Failures say the fact, the place and the next step."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import pipeline
from pipeline.errors import BuildError, Problems


def test_the_text_is_fact_then_details_then_arrow() -> None:
    error = BuildError("series:3: 0004.patch is missing", "ls patches", ["one", "two"])
    assert str(error).splitlines() == ["series:3: 0004.patch is missing", "  one", "  two", "  → ls patches"]


def test_an_error_without_a_next_step_is_refused() -> None:
    with pytest.raises(ValueError, match="a BuildError without a next step: it broke"):
        BuildError("it broke", "")


def test_problems_are_raised_together_sorted_and_once() -> None:
    problems = Problems()
    problems.add("b[1].x", "wrong")
    problems.add("a", "wrong")
    problems.add("b[1].x", "wrong")
    problems.add("", "no place")
    with pytest.raises(BuildError) as caught:
        problems.raise_if_any("cluster.yaml", "correct it")
    assert caught.value.message == "cluster.yaml: 3 problems"
    assert caught.value.details == ("a: wrong", "b[1].x: wrong", "no place")
    assert caught.value.hint == "correct it"


def test_one_problem_is_not_plural() -> None:
    problems = Problems()
    problems.add("a", "wrong")
    with pytest.raises(BuildError, match=r"^x: 1 problem\n"):
        problems.raise_if_any("x", "correct it")


def test_no_problem_raises_nothing_and_is_false() -> None:
    problems = Problems()
    problems.raise_if_any("x", "y")
    assert not problems
    assert len(problems) == 0
    problems.add("a", "b")
    assert problems
    assert len(problems) == 1


def test_every_kind_of_error_needs_a_hint() -> None:
    """Subclasses may not open a second door: they are made like their parent."""
    for module in pkgutil.iter_modules(pipeline.__path__):
        if module.name != "enter":  # a program, not a module: it runs when it is imported
            importlib.import_module(f"pipeline.{module.name}")
    for kind in BuildError.__subclasses__():
        with pytest.raises((ValueError, TypeError)):
            kind("fact", "")
