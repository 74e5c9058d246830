"""Configuration fragments: what was asked for, and whether the kernel's Kconfig let it stand.

Kconfig drops an option silently when the menu above it is off or a dependency is missing, and a misspelled name is
no error at all. So every option of every fragment is compared with the configuration that came out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import BuildError, Problems

_SET = re.compile(r"^(CONFIG_[A-Za-z0-9_]+)=(y|m|n|-?\d+|0x[0-9a-fA-F]+|\"[^\"]*\")$")
_UNSET = re.compile(r"^# (CONFIG_[A-Za-z0-9_]+) is not set$")
_LOOKS_SET = re.compile(r"^#?\s*CONFIG_\w+(\s*=|\s+is\b)")


@dataclass(frozen=True)
class Option:
    """One line of a fragment.

    Attributes:
        name: `CONFIG_IP_VS`.
        value: as written: `y`, `m`, `n` (also for `is not set`), a number, or a string with its quotes.
        place: `file:line`.
    """

    name: str
    value: str
    place: str


def fragments(*folders: Path) -> list[Path]:
    """The `*.config` files of the folders, each folder's in the order of their names."""
    return [path for folder in folders for path in sorted(folder.glob("*.config"))]


def read(paths: Iterable[Path], top: Path) -> list[Option]:
    """Read fragments.

    Args:
        paths: the files, in order.
        top: what places are named relative to.

    Raises:
        BuildError: a line that is neither an option nor a comment, or an option that stands twice; all at once.
    """
    problems = Problems()
    found: dict[str, Option] = {}
    for path in paths:
        name = path.relative_to(top) if path.is_relative_to(top) else path
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            place = f"{name}:{number}"
            if match := _SET.match(line):
                option = Option(match[1], match[2], place)
            elif match := _UNSET.match(line):
                option = Option(match[1], "n", place)
            elif _LOOKS_SET.match(line) or (line.strip() and not line.startswith("#")):
                problems.add(place, f"neither an option nor a comment: {line!r}")
                continue
            else:
                continue
            if other := found.get(option.name):
                problems.add(place, f"{option.name} stands in {other.place} already")
            found[option.name] = option
    problems.raise_if_any(
        "kernel configuration fragments", 'an option reads CONFIG_NAME=y|m|n|number|"text" and stands once'
    )
    return list(found.values())


def override(options: Sequence[Option], own: Sequence[Option]) -> list[Option]:
    """The options, with those of `own` in place of the ones of the same name."""
    names = {option.name for option in own}
    return [*(option for option in options if option.name not in names), *own]


def text(options: Iterable[Option]) -> str:
    """The options as Kconfig reads them (KCONFIG_ALLCONFIG)."""
    return "".join(f"# {o.name} is not set\n" if o.value == "n" else f"{o.name}={o.value}\n" for o in options)


def parse(config: str) -> dict[str, str]:
    """The options of a finished `.config` that have a value; one that is not set is not in it."""
    return {match[1]: match[2] for line in config.splitlines() if (match := _SET.match(line))}


def check(options: Sequence[Option], result: Mapping[str, str]) -> None:
    """Compare what was asked for with what came out.

    Args:
        options: from `read`.
        result: from `parse`.

    Raises:
        BuildError: an option was dropped or changed; every one is listed with its file and line.
    """
    problems = Problems()
    for option in options:
        got = result.get(option.name, "n")
        if got != option.value:
            problems.add(option.place, f"{option.name}={option.value} was asked for, the kernel has {got}")
    problems.raise_if_any(
        "the kernel's Kconfig did not keep every option of the fragments",
        "set what each option depends on as well (grep -rn 'config NAME' in the kernel's Kconfig files), or drop it",
    )


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What changed between two configurations, a line each: `CONFIG_NAME: old -> new`."""
    names = sorted(before.keys() | after.keys())
    return [
        f"{name}: {before.get(name, 'n')} -> {after.get(name, 'n')}"
        for name in names
        if before.get(name, "n") != after.get(name, "n")
    ]


def require(paths: Sequence[Path], folder: Path) -> Sequence[Path]:
    """Refuse a room without fragments: an empty configuration would build, and boot nowhere.

    Raises:
        BuildError: there is none.
    """
    if not paths:
        raise BuildError(f"{folder}: no *.config fragment", f"git status {folder}")
    return paths
