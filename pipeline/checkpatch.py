"""The kernel's own `scripts/checkpatch.pl --strict` over a series; every tolerated finding has its reason.

`checkpatch.yaml` beside the series:

    tolerated:
      - type: LONG_LINE                 # what checkpatch --show-types calls it
        patch: 0003-ipvs-x.patch        # only there; left out: in the whole series
        text: "sysctl"                  # only where the message holds this; left out: any
        why: the table is aligned as its neighbours in the file are
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import recipe, run
from pipeline.errors import BuildError, Problems
from pipeline.patches import Series

_SCHEMA = Path(__file__).with_name("checkpatch.schema.json")
_LINE = re.compile(r"^(?P<patch>.+?):(?P<line>\d+): (?P<level>ERROR|WARNING|CHECK):(?P<type>\w+): (?P<text>.*)$")


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        patch: the file's name.
        line: in that file, from 1.
        level: ERROR, WARNING or CHECK.
        type: the name that checkpatch gives to the rule.
        text: what it says.
    """

    patch: str
    line: int
    level: str
    type: str
    text: str


def check(tree: Path, series: Series) -> list[Finding]:
    """Run the checker and hold its findings against `checkpatch.yaml`.

    Args:
        tree: an unpacked kernel, which brings the checker.
        series: the patches.

    Returns:
        The findings that are tolerated.

    Raises:
        BuildError: findings that are not, or tolerances that nothing needs any more; all at once.
    """
    found = [finding for path in series.paths for finding in findings(tree, path)]
    tolerated = tolerances(series.root / "checkpatch.yaml")
    problems, accepted = judge(found, tolerated, series.names)
    problems.raise_if_any(
        f"{series.root}: scripts/checkpatch.pl --strict",
        f"correct the patch, or give the finding a reason in {series.root / 'checkpatch.yaml'}",
    )
    return accepted


def findings(tree: Path, patch: Path) -> list[Finding]:
    """What the checker says of one patch.

    Raises:
        BuildError: the tree has no checker, or it could not run.
    """
    script = tree / "scripts/checkpatch.pl"
    if not script.is_file():
        raise BuildError(f"{tree} is no kernel tree: it has no scripts/checkpatch.pl", "invoke unpack kernel/lvs")
    perl = run.require("perl", "to run the kernel's checkpatch.pl", "perl")
    options = ["--strict", "--terse", "--show-types", "--no-summary", "--color=never", f"--root={tree.resolve()}"]
    result = run.run([perl, script, *options, patch.resolve()], cwd=tree, check=False)
    found = parse(result.stdout, patch.name)
    # 1 means findings; anything else, or 1 without one, is the checker itself failing.
    if result.returncode != (1 if found else 0) and (result.returncode > 1 or not found):
        raise BuildError(
            f"checkpatch.pl failed on {patch} with status {result.returncode}",
            f"perl {script} --strict {patch}",
            run.tail(result.stderr or result.stdout, 5),
        )
    return found


def parse(output: str, patch: str) -> list[Finding]:
    """The findings in the checker's terse output."""
    matches = (_LINE.match(line) for line in output.splitlines())
    return [Finding(patch, int(m["line"]), m["level"], m["type"], m["text"]) for m in matches if m]


def tolerances(path: Path) -> list[dict[str, Any]]:
    """The entries of `checkpatch.yaml`; none where there is no such file.

    Raises:
        BuildError: it is wrong.
    """
    if not path.exists():
        return []
    data = recipe.load(path, json.loads(_SCHEMA.read_text(encoding="utf-8")))
    entries: list[dict[str, Any]] = data["tolerated"]
    return entries


def judge(
    found: Sequence[Finding], tolerated: Sequence[dict[str, Any]], names: Sequence[str]
) -> tuple[Problems, list[Finding]]:
    """Tell findings that have a reason from those that have none, and reasons from those that have no finding."""
    problems = Problems()
    accepted = []
    used: set[int] = set()
    for finding in found:
        matching = [number for number, entry in enumerate(tolerated) if _covers(entry, finding)]
        if matching:
            used.update(matching)
            accepted.append(finding)
        else:
            problems.add(f"{finding.patch}:{finding.line}", f"{finding.level} {finding.type}: {finding.text}")
    for number, entry in enumerate(tolerated):
        if entry.get("patch") and entry["patch"] not in names:
            problems.add(f"checkpatch.yaml: tolerated[{number}].patch", f"{entry['patch']} is not in the series")
        elif number not in used:
            problems.add(f"checkpatch.yaml: tolerated[{number}]", f"{entry['type']} is not found any more; remove it")
    return problems, accepted


def _covers(entry: dict[str, Any], finding: Finding) -> bool:
    return (
        entry["type"] == finding.type
        and entry.get("patch", finding.patch) == finding.patch
        and entry.get("text", "") in finding.text
    )
