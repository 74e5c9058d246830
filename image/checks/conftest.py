"""What the checks share.

`LVSFORGE_ROLE` says which image it is, `LVSFORGE_CONSOLE` where its serial console was written.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from testinfra.host import Host

Ask = Callable[[str], str]


@pytest.fixture
def ask(host: Host) -> Ask:
    """Run a shell command on the host and return what it printed; a failing one fails the check with its words."""

    def run(command: str) -> str:
        result = host.run("sh -c " + shlex.quote(command))
        assert result.rc == 0, f"{command}: status {result.rc}: {result.stderr.strip() or result.stdout.strip()}"
        return str(result.stdout).strip()

    return run


@pytest.fixture(scope="session")
def role() -> str:
    """`director` or `realserver`."""
    return os.environ["LVSFORGE_ROLE"]


@pytest.fixture
def director(role: str) -> None:
    """For checks of a director."""
    if role != "director":
        pytest.skip(f"about directors; this is a {role}")


@pytest.fixture
def realserver(role: str) -> None:
    """For checks of a real server."""
    if role != "realserver":
        pytest.skip(f"about real servers; this is a {role}")


@pytest.fixture(scope="session")
def console() -> str:
    """What the machine printed on its serial console."""
    return Path(os.environ["LVSFORGE_CONSOLE"]).read_text(encoding="utf-8", errors="replace")
