"""The patch engine beyond the golden cases: what difflib can say, it can apply; and checkpatch's verdicts."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline import checkpatch, patches
from pipeline.errors import BuildError, Problems
from pipeline.patches import Overlay, Section, Series
from pipeline.worktree import arrange

LINES = st.lists(st.sampled_from(["a", "b", "{", "}", "", "\tx = 1;", "- minus", "+ plus", "@@ -1 +1 @@", "--- a"]))
quick = hypothesis_settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def mail(old: str, new: str, path: str = "f.c") -> bytes:
    body = difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{path}", f"b/{path}")
    diff = "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in body)
    return f"From: A <a@example.org>\nSubject: [PATCH] x: y\n\nWhy.\n---\n\n{diff}".encode()


def parsed(raw: bytes, tmp_path: Path) -> patches.Patch:
    path = tmp_path / "0001-x.patch"
    path.write_bytes(raw)
    return patches.parse(path)


@quick
@given(old=LINES, new=LINES, end=st.sampled_from(["", "\n"]))
def test_what_difflib_says_is_applied(tmp_path: Path, old: list[str], new: list[str], end: str) -> None:
    before, after = "\n".join([*old, "last"]) + "\n", "\n".join([*new, "last"]) + end
    if before == after:
        return
    overlay = Overlay(tmp_path, {"f.c": before.encode()})
    refusals, moved = patches.try_patch(overlay, parsed(mail(before, after), tmp_path))
    assert (refusals, moved) == ([], [])
    assert overlay.files["f.c"] == after.encode()


@quick
@given(old=LINES, new=LINES, at=st.integers(0, 40))
def test_context_that_differs_is_never_passed_over(tmp_path: Path, old: list[str], new: list[str], at: int) -> None:
    """Change one line: either the patch is refused, or that line was none of its business."""
    before, after = [*old, "last"], [*new, "last"]
    text = "".join(f"{line}\n" for line in before)
    if before == after:
        return
    patch = parsed(mail(text, "".join(f"{line}\n" for line in after)), tmp_path)
    other = [line if n != at else "another" for n, line in enumerate(before)]
    overlay = Overlay(tmp_path, {"f.c": "".join(f"{line}\n" for line in other).encode()})
    refusals, moved = patches.try_patch(overlay, patch)
    spoken_of = {hunk.start - 1 + n for c in patch.changes for hunk in c.hunks for n in range(len(hunk.old))}
    if at in spoken_of and at < len(before):
        assert refusals or moved  # refused, or found elsewhere and said so
    else:
        assert not refusals


@given(raw=st.binary(max_size=300) | st.text(alphabet="@-+ ,01ab/\n\\diffgtFrom:", max_size=300).map(str.encode))
@quick
def test_the_parser_refuses_noise_in_our_own_words(tmp_path: Path, raw: bytes) -> None:
    problems = Problems()
    patches.lint_patch(tmp_path / "noise.patch", b"diff --git a/f b/f\n" + raw, problems)
    assert problems
    with pytest.raises(BuildError):
        parsed(raw, tmp_path)


def test_an_overlay_does_not_follow_links_out_of_the_tree(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s\n")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "f.c").symlink_to("../secret")
    with pytest.raises(BuildError, match="out of the tree"):
        patches.try_patch(Overlay(tree), parsed(mail("s\n", "t\n"), tmp_path))


def test_a_disk_that_fills_up_leaves_the_tree_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    real = Path.write_bytes

    def write_bytes(self: Path, data: Any) -> int:
        if self.name == ".b.patching":
            raise OSError(28, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space"):
        Overlay(tmp_path, {"a": b"new", "b": b"new"}).write()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}


def test_folded_and_encoded_headers_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "0001-x.patch"
    raw = mail("a\n", "b\n").replace(
        b"Subject: [PATCH] x: y\n",
        b"Date: Sun, 1 Mar 2026 12:00:00 +0000\nSubject: [PATCH] ipvs: a subject that is\n folded\n"
        b"MIME-Version: 1.0\nContent-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n",
    )
    raw = raw.replace(b"From: A", b"From: =?UTF-8?q?J=C3=B6rg?=").replace(
        b"Why.\n", "Grund: Größe.\n\nSigned-off-by: Jörg <a@example.org>\n".encode()
    )
    problems = Problems()
    patches.lint_patch(path, raw, problems)
    assert problems.lines == ()
    path.write_bytes(raw)
    assert patches.parse(path).subject == "ipvs: a subject that is folded"


# -- the series file


def test_headings_stay_above_their_patches() -> None:
    old = Series(
        Path("s"), (Section(("# one", ""), ("1", "2")), Section(("", "# two"), ("3",)), Section(("# end",), ()))
    )
    names = ["0001-a", "0002-new", "0003-b", "0004-c", "0005-last"]
    sections = arrange(old, ["a", "b", "c"], names, ["a", "new", "b", "c", "last"])
    assert Series(Path("s"), sections).text().splitlines() == [
        "# one", "", "0001-a", "0002-new", "0003-b", "", "# two", "0004-c", "0005-last", "# end",
    ]  # fmt: skip


def test_a_patch_that_moved_joins_its_new_neighbours() -> None:
    old = Series(Path("s"), (Section(("# one",), ("1", "2")), Section(("# two",), ("3",))))
    sections = arrange(old, ["a", "b", "c"], ["x", "y", "z"], ["c", "a", "b"])
    assert [section.names for section in sections] == [("x", "y", "z"), ()]


def test_a_first_patch_goes_below_the_comments() -> None:
    old = Series(Path("s"), (Section(("# None yet.",), ()),))
    assert Series(Path("s"), arrange(old, [], ["0001-a"], ["a"])).text() == "# None yet.\n0001-a\n"


# -- checkpatch

OUTPUT = """\
/x/0001-a.patch:12: WARNING:LONG_LINE: line length of 103 exceeds 100 columns
/x/0001-a.patch:40: CHECK:CAMELCASE: Avoid CamelCase: <fooBar>
"""


def test_findings_need_reasons_and_reasons_need_findings() -> None:
    found = checkpatch.parse(OUTPUT, "0001-a.patch")
    assert [(f.line, f.level, f.type) for f in found] == [(12, "WARNING", "LONG_LINE"), (40, "CHECK", "CAMELCASE")]
    tolerated = [
        {"type": "LONG_LINE", "patch": "0001-a.patch", "why": "as its neighbours"},
        {"type": "CAMELCASE", "text": "<other>", "why": "another name"},
        {"type": "SPACING", "patch": "0009-gone.patch", "why": "a patch that was dropped"},
    ]
    problems, accepted = checkpatch.judge(found, tolerated, ["0001-a.patch"])
    assert [f.type for f in accepted] == ["LONG_LINE"]
    assert problems.lines == (
        "0001-a.patch:40: CHECK CAMELCASE: Avoid CamelCase: <fooBar>",
        "checkpatch.yaml: tolerated[1]: CAMELCASE is not found any more; remove it",
        "checkpatch.yaml: tolerated[2].patch: 0009-gone.patch is not in the series",
    )


def test_a_tolerance_without_a_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpatch.yaml"
    path.write_text("tolerated:\n  - type: LONG_LINE\n    reason: x\n")
    with pytest.raises(BuildError) as caught:
        checkpatch.tolerances(path)
    assert len(caught.value.details) == 2
    assert checkpatch.tolerances(tmp_path / "none.yaml") == []
