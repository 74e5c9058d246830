"""Running the tests: fast ones first, then what they test is built, then the tests of that."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pipeline import progress, run, settings
from pipeline.errors import BuildError


def pytest(*arguments: str) -> None:
    """Run pytest on this terminal.

    Raises:
        BuildError: a test failed, or none ran.
    """
    status = run.interactive([sys.executable, "-m", "pytest", *arguments], env=_variables())
    if status == 5:
        raise BuildError(f"no test matches: pytest {' '.join(arguments)}", "pytest --collect-only shows their names")
    if status != 0:
        raise BuildError(f"tests failed: pytest {' '.join(arguments)}", "read the failures above")


def _variables() -> dict[str, str]:
    names = ("CI", "LVSFORGE_STORE", "LVSFORGE_OUT", "LVSFORGE_SIGNING_KEY", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TERM")
    return {name: os.environ[name] for name in names if name in os.environ}


def run_all(expression: str, *, fast: bool, build: Callable[[], object]) -> None:
    """Run the tests.

    Args:
        expression: pytest's `-k`, or "".
        fast: leave out what needs built artefacts.
        build: builds them.

    Raises:
        BuildError: a build or a test failed.
    """
    chosen = ["-k", expression] if expression else []
    with progress.step("tests that need nothing built"):
        # As many at once as there are processors. Not so below: there each test has machines, which use them all.
        _run_part("not build", [*chosen, "-n", "auto"], may_be_empty=bool(expression) and not fast)
    if fast:
        return
    build()
    with progress.step("tests of what was built"):
        _run_part("build and not long", chosen, may_be_empty=bool(expression))


def _run_part(marker: str, chosen: list[str], *, may_be_empty: bool) -> None:
    arguments = ["-m", "pytest", "-m", marker, *chosen, str(settings.TOP / "tests")]
    status = run.interactive([sys.executable, *arguments], env=_variables())
    if status == 5 and may_be_empty:
        return
    if status != 0:
        raise BuildError(f"tests failed: pytest -m '{marker}' {' '.join(chosen)}", "read the failures above")
