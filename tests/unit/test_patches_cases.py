"""Patch series by golden cases: `tests/cases/series/<case>/`.

series, patches/    the input
tree/               what it is applied to
expected/           the tree afterwards; left out where the series is refused
refused.txt         the error, when it is refused; nothing in the tree may have changed then
lint.txt            what the linter says; left out where it says nothing
moved.txt           the warnings about hunks that were not at their lines
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline import patches
from pipeline.errors import BuildError
from tests.conftest import Recorder

CASES = sorted(p for p in (Path(__file__).parent.parent / "cases/series").iterdir() if p.is_dir())


def contents(root: Path) -> dict[str, tuple[bytes, bool]]:
    """Every file with its content and whether it can be executed."""
    return {
        p.relative_to(root).as_posix(): (p.read_bytes(), bool(p.stat().st_mode & 0o100))
        for p in root.rglob("*")
        if p.is_file()
    }


def expected(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def test_there_are_cases() -> None:
    assert len(CASES) >= 15


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_case(case: Path, tmp_path: Path, events: Recorder) -> None:
    shutil.copytree(case / "tree", tmp_path / "tree")
    before = contents(tmp_path / "tree")
    refusal = lint = ""
    try:
        series = patches.read(case)
        lint = "".join(f"{line}\n" for line in patches.lint(series).lines)
        patches.apply(tmp_path / "tree", series, label="the tree", hint="look")
    except BuildError as error:
        refusal = f"{error}\n"
    after = contents(tmp_path / "tree")
    place = f"{case}/"
    assert refusal.replace(place, "").replace(str(case), ".") == expected(case / "refused.txt")
    assert lint.replace(place, "") == expected(case / "lint.txt")
    assert "".join(f"{text}\n" for text in events.texts("warn")) == expected(case / "moved.txt")
    if (case / "refused.txt").exists():
        assert not (case / "expected").exists()
        assert after == before
    else:
        assert after == contents(case / "expected")
        assert after != before
