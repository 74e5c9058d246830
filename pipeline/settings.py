"""What the user asked for on the command line that every room must honour."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# The checkout: every recipe and patch is found from here.
TOP = Path(__file__).resolve().parent.parent


@dataclass
class Settings:
    """Set once by the task boundary (`pipeline.cli`), read by the rooms.

    Attributes:
        offline: never open a connection; what is missing is an error.
        locked: a source that the archives dropped is an error, never replaced by a newer one.
        dry_run: say what would be done and stop before it.
        keep: leave a failed machine running for a look.
        jobs: processes that a build may run at once.
    """

    offline: bool = False
    locked: bool = False
    dry_run: bool = False
    keep: bool = False
    jobs: int = os.cpu_count() or 1


current = Settings()


def out() -> Path:
    """Where finished artefacts are laid out for the user: $LVSFORGE_OUT, else `out/` in the checkout."""
    return named("LVSFORGE_OUT") or TOP / "out"


def named(variable: str) -> Path | None:
    """The path that a variable of the environment names, if it is set: absolute, and a ~ that no shell has read too.

    What we start, as Packer, may run in a folder of its own.
    """
    text = os.environ.get(variable)
    return Path(text).expanduser().absolute() if text else None
