"""Running the tests: fast ones first, then what they test is built, then the tests of that."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pipeline import progress, run, settings
from pipeline.errors import BuildError

# For tests that drive a machine of 1 GiB: alone, one leaves half of two processors idle. A worker begins with its share
# in the order of collection, and takes from another's only when it has none left: to change the kernel is a boot.
MACHINES = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal")


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
        BuildError: a build or a test failed, or the expression matches none.
    """
    chosen = ["-k", expression] if expression else []
    with progress.step("tests that need nothing built"):
        found = _run_part("not build", [*chosen, "-n", "auto"])
    if not fast:
        build()
        with progress.step("tests of the kernels"):
            found |= _run_part("guest and not long", [*chosen, *MACHINES])
        with progress.step("tests of what else was built"):
            # One at a time: they boot images, and compile.
            found |= _run_part("build and not guest and not long", chosen)
    if not found:
        raise BuildError(f"no test matches -k {expression!r}", "pytest --collect-only shows their names")


def _run_part(marker: str, chosen: list[str]) -> bool:
    """Whether any test was chosen."""
    arguments = ["-m", "pytest", "-m", marker, *chosen, str(settings.TOP / "tests")]
    status = run.interactive([sys.executable, *arguments], env=_variables())
    if status == 5 and "-k" in chosen:
        return False
    if status != 0:
        raise BuildError(f"tests failed: pytest -m '{marker}' {' '.join(chosen)}", "read the failures above")
    return True
