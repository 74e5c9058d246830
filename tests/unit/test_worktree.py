"""Series as git commits: there and back without a changed byte, and onto another release."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from pipeline import patches, series, settings, worktree
from pipeline.errors import BuildError
from pipeline.patches import Series
from pipeline.sources import Resolved, Sources
from pipeline.store import Store, digest
from tests.conftest import Recorder

pytestmark = pytest.mark.runs("git", "tar")

LINES = [f"line {n}" for n in range(1, 41)]
HEADINGS = "# Fixes that everybody wants\n\n# Ours\n"


def release(folder: Path, version: str, lines: list[str]) -> Resolved:
    """A tarball of a toy kernel."""
    folder.mkdir(exist_ok=True)
    path = folder / f"toy_{version}.orig.tar.xz"
    content = {
        "Makefile": f"VERSION = {version}\n",
        ".gitignore": "*.o\nkept.o\n",
        "kept.o": "a release may hold what its own .gitignore names\n",
        "net/core.c": "".join(f"{line}\n" for line in lines),
        "net/other.c": "one\ntwo\nthree\n",
        "net/odd.c": "\n".join("b}bd}cbcacea") + "\n",
    }
    with tarfile.open(path, "w:xz") as tar:
        for name, text in content.items():
            info = tarfile.TarInfo(f"toy-{version}/{name}")
            info.size, info.mtime = len(text), 1_700_000_000
            tar.addfile(info, io.BytesIO(text.encode()))
    return Resolved("toy", version, digest(path), path.stat().st_size, path, True, version)


def commit(tree: Path, name: str, old: str, new: str, subject: str) -> None:
    """Do what a developer does."""
    path = tree / name
    text = path.read_text()
    assert text.count(f"{old}\n") == 1
    path.write_text(text.replace(f"{old}\n", f"{new}\n"))
    who = {f"GIT_{r}_{k}": v for r in ("AUTHOR", "COMMITTER") for k, v in (("NAME", "Ä Writer"), ("EMAIL", "a@b.org"))}
    message = f"{subject}\n\nIt was wrong for people who count.\n\nSigned-off-by: Ä Writer <a@b.org>"
    worktree.git(tree, "commit", "-qam", message, env={**who, "GIT_AUTHOR_DATE": "@1767225600 +0100"})


@pytest.fixture
def toy(tmp_path: Path) -> Resolved:
    return release(tmp_path / "src", "1.0", LINES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty series with headings."""
    path = tmp_path / "series"
    path.mkdir()
    (path / "series").write_text(HEADINGS)
    return path


@pytest.fixture
def made(tmp_path: Path, toy: Resolved, folder: Path) -> Series:
    """Two patches of one file and one of another, made by the tools themselves."""
    tree = worktree.unpack(toy, patches.read(folder), tmp_path / "first")
    commit(tree, "net/core.c", "line 10", "line ten", "toy: spell ten")
    commit(tree, "net/core.c", "line 12", "line twelve", "toy: spell twelve, in the context of the patch before")
    commit(tree, "net/other.c", "two", "2", "toy: write 2 as a figure, with a subject of seventy-five characters or so")
    assert worktree.regenerate(tree) == [
        "+ 0001-toy-spell-ten.patch",
        "+ 0002-toy-spell-twelve-in-the-context-of-the-patch-before.patch",
        "+ 0003-toy-write-2-as-a-figure-with-a-subject-of-seventy-five-characters-or-so.patch",
        "~ series",
    ]
    return patches.read(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_there_and_back_without_a_changed_byte(tmp_path: Path, toy: Resolved, made: Series) -> None:
    assert patches.lint(made).lines == ()
    before = contents(made.root)
    one = worktree.unpack(toy, made, tmp_path / "one")
    two = worktree.unpack(toy, made, tmp_path / "two")
    assert worktree.git(one, "rev-parse", "HEAD") == worktree.git(two, "rev-parse", "HEAD")
    # The dates are the tarball's and the mails', not today's.
    assert set(worktree.git(one, "log", "--format=%ct").split()) == {"1700000000", "1767225600"}
    assert "kept.o" in worktree.git(one, "ls-files").split()
    assert worktree.regenerate(one) == []
    assert contents(made.root) == before
    # Commits made by somebody else at another time, with a configuration of his own, give the same patches.
    worktree.git(two, "config", "diff.noprefix", "true")
    worktree.git(two, "config", "diff.algorithm", "histogram")
    worktree.git(two, "config", "format.signature", "me")
    worktree.git(
        two, "commit", "-q", "--amend", "--no-edit", env={"GIT_COMMITTER_NAME": "B", "GIT_COMMITTER_EMAIL": "b@c"}
    )
    assert worktree.regenerate(two) == []


def test_the_diff_algorithm_is_ours(tmp_path: Path, toy: Resolved, folder: Path) -> None:
    """These two contents differ by Myers' algorithm otherwise than by the histogram one."""
    tree = worktree.unpack(toy, patches.read(folder), tmp_path / "one")
    (tree / "net/odd.c").write_text("\n".join("b}bd}cbcabcace") + "\n")
    commit(tree, "net/other.c", "two", "2", "toy: change an odd file")
    worktree.regenerate(tree)
    worktree.git(tree, "config", "diff.algorithm", "histogram")
    assert worktree.regenerate(tree) == []


def test_the_engine_and_git_agree(tmp_path: Path, toy: Resolved, made: Series) -> None:
    tree = worktree.unpack(toy, made, tmp_path / "one")
    worktree.extract(toy, tmp_path / "plain")
    assert patches.apply(tmp_path / "plain", made) == list(made.names)
    assert contents(tmp_path / "plain") == {k: v for k, v in contents(tree).items() if not k.startswith(".git/")}


def test_a_changed_commit_changes_its_patch_only(tmp_path: Path, toy: Resolved, made: Series) -> None:
    tree = worktree.unpack(toy, made, tmp_path / "one")
    (tree / "net/other.c").write_text("one\nII\nthree\n")
    worktree.git(
        tree, "commit", "-qa", "--amend", "--no-edit", env={"GIT_COMMITTER_NAME": "B", "GIT_COMMITTER_EMAIL": "b@c"}
    )
    name = made.names[2]
    assert worktree.regenerate(tree, check_only=True) == [f"~ {name}"]
    assert b"+II" not in (made.root / "patches" / name).read_bytes()
    worktree.regenerate(tree)
    assert b"+II" in (made.root / "patches" / name).read_bytes()


def test_a_dropped_commit_renumbers_and_leaves_nothing_behind(tmp_path: Path, toy: Resolved, made: Series) -> None:
    tree = worktree.unpack(toy, made, tmp_path / "one")
    worktree.git(tree, "reset", "-q", "--hard", "HEAD~3")
    commit(tree, "net/other.c", "two", "2", "toy: write 2 as a figure")
    worktree.regenerate(tree)
    assert sorted(p.name for p in (made.root / "patches").iterdir()) == ["0001-toy-write-2-as-a-figure.patch"]
    text = (made.root / "series").read_text()
    assert text.startswith("# Fixes that everybody wants\n") and "# Ours\n" in text
    assert patches.read(made.root).names == ("0001-toy-write-2-as-a-figure.patch",)


def test_unfinished_work_is_not_written_back(tmp_path: Path, toy: Resolved, made: Series) -> None:
    tree = worktree.unpack(toy, made, tmp_path / "one")
    before = contents(made.root)
    (tree / "net/other.c").write_text("changed\n")
    with pytest.raises(BuildError, match="uncommitted changes") as caught:
        worktree.regenerate(tree)
    assert "net/other.c" in caught.value.details[0]
    worktree.git(tree, "reset", "-q", "--hard", "HEAD~3")
    with pytest.raises(BuildError, match=r"no commit on top of toy 1\.0"):
        worktree.regenerate(tree)
    with pytest.raises(BuildError, match="not made by"):
        worktree.regenerate(tmp_path)
    assert contents(made.root) == before


def test_a_patch_that_does_not_apply_leaves_no_tree(tmp_path: Path, made: Series) -> None:
    other = release(tmp_path / "src", "1.1", [line.replace("line 10", "line X") for line in LINES])
    with pytest.raises(BuildError) as caught:
        worktree.unpack(other, made, tmp_path / "tree", hint="do this")
    assert caught.value.message == "patch 0001-toy-spell-ten.patch does not apply to toy 1.1"
    assert caught.value.details == ("net/core.c, hunk 1 of 1, line 7: expected 'line 10' in line 10, found 'line X'",)
    assert caught.value.hint == "do this"
    assert not (tmp_path / "tree").exists()
    assert not list(tmp_path.glob(".tree*"))


def test_a_damaged_tarball_says_so(tmp_path: Path, toy: Resolved, made: Series) -> None:
    toy.path.write_bytes(toy.path.read_bytes()[:200])
    with pytest.raises(BuildError, match=r"unpacking toy_1\.0\.orig\.tar\.xz: tar failed"):
        worktree.unpack(toy, made, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_nothing_is_unpacked_over_something(tmp_path: Path, toy: Resolved, made: Series) -> None:
    (tmp_path / "tree").mkdir()
    with pytest.raises(BuildError, match="exists already"):
        worktree.unpack(toy, made, tmp_path / "tree")


# -- another release


def test_rebase_merges_three_ways_where_the_old_release_is_at_hand(tmp_path: Path, toy: Resolved, made: Series) -> None:
    # Upstream changed a line of the context, far away ones moved: strictly the patches fit no more.
    lines = ["new first line", *[line.replace("line 8", "line eight") for line in LINES]]
    newer = release(tmp_path / "src", "1.1", lines)
    with pytest.raises(BuildError, match=r"patch 0001-.* \(1 of 3\) does not apply to toy 1\.1"):
        worktree.rebase(made, newer, tmp_path / "without")
    tree = worktree.rebase(made, newer, tmp_path / "with", old=toy)
    text = (tree / "net/core.c").read_text()
    assert "line eight\nline 9\nline ten\nline 11\nline twelve\n" in text
    changed = worktree.regenerate(tree)
    assert {f"~ {name}" for name in made.names[:2]} <= set(changed)
    # Written back, the series applies strictly to the new release.
    worktree.unpack(newer, patches.read(made.root), tmp_path / "strict")


def test_a_conflict_names_patch_file_and_hunk_and_git_goes_on_from_there(
    tmp_path: Path, toy: Resolved, made: Series
) -> None:
    newer = release(tmp_path / "src", "2.0", [line.replace("line 12", "line dozen") for line in LINES])
    tree = tmp_path / "tree"
    with pytest.raises(BuildError) as caught:
        worktree.rebase(made, newer, tree, old=toy)
    # The first patch has the changed line in its context only, which a three-way merge takes.
    assert caught.value.message == f"patch {made.names[1]} (2 of 3) does not apply to toy 2.0"
    assert any("net/core.c, hunk 1 of 1, line" in line for line in caught.value.details)
    assert any("net/core.c: conflict marks at line" in line for line in caught.value.details)
    assert str(tree) in caught.value.hint and "git am --continue" in caught.value.hint
    with pytest.raises(BuildError, match="not finished"):
        worktree.regenerate(tree)
    who = {"GIT_COMMITTER_NAME": "B", "GIT_COMMITTER_EMAIL": "b@c"}
    while (tree / ".git/rebase-apply").exists():
        (tree / "net/core.c").write_text("".join(f"{line}\n" for line in LINES).replace("line 12\n", "line twelve\n"))
        worktree.git(tree, "add", "-A")
        worktree.git(tree, "am", "--continue", env=who)
    worktree.regenerate(tree)
    worktree.unpack(newer, patches.read(made.root), tmp_path / "strict")


# -- by name, as the tasks do it


@pytest.fixture
def checkout(tmp_path: Path, toy: Resolved, made: Series, monkeypatch: pytest.MonkeyPatch) -> Sources:
    """A checkout with one room, and the toy release as its source."""
    top = tmp_path / "top"
    (top / "kernel").mkdir(parents=True)
    made.root.rename(top / "kernel/lvs")
    (top / "kernel/kernel.yaml").write_text("source: toy\n")
    (top / "tests/cases/series").mkdir(parents=True)  # a folder of that name is no series
    (top / "sources.yaml").write_text(
        f"toy:\n  version: '1.0'\n  why: for the tests\n  file: {toy.path.name}\n  size: {toy.size}\n"
        f"  sha256: {toy.sha256}\n  origins:\n    - folder: {toy.path.parent}\n"
    )
    monkeypatch.setattr(settings, "TOP", top)
    monkeypatch.setenv("LVSFORGE_OUT", str(top / "out"))
    for name in ("everywhere", "find"):
        monkeypatch.setattr(getattr(series, name), "__defaults__", (top,))
    return Sources(Store(tmp_path / "store"), top / "sources.yaml")


def test_tasks_know_a_series_by_its_name(tmp_path: Path, checkout: Sources, events: Recorder) -> None:
    assert [p.name for p in series.everywhere()] == ["lvs"]
    assert series.find("lvs") == series.find("kernel/lvs/") == checkout.file.parent / "kernel/lvs"
    with pytest.raises(BuildError, match="no series 'rs'") as caught:
        series.find("rs")
    assert caught.value.hint == "one of: kernel/lvs"
    assert series.source_of(series.find("lvs")) == "toy"
    lines = series.unpack("lvs", sources=checkout)
    assert (checkout.file.parent / "out/work/kernel-lvs/.git").is_dir()
    assert lines[1].endswith("invoke series-regenerate lvs")
    assert series.regenerate("lvs") == ["kernel/lvs: nothing changed"]
    assert series.lint(sources=checkout) == ["kernel/lvs: 3 patches, 0 findings tolerated with reasons"]


def test_rebase_by_version_takes_a_tarball_from_a_folder(tmp_path: Path, checkout: Sources, events: Recorder) -> None:
    release(tmp_path / "src", "1.1", [*LINES, "and a last one"])
    lines = series.rebase("lvs", "1.1", sources=checkout)
    assert "all 3 patches are on toy 1.1" in lines[0]
    assert any("no signature" in text for text in events.texts("warn"))


def test_lint_says_everything_at_once(checkout: Sources) -> None:
    folder = checkout.file.parent / "kernel/lvs/patches"
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"Signed-off-by", b"Seen-by"))
    with pytest.raises(BuildError, match="patch series: 3 problems"):
        series.lint(sources=checkout)


def test_dry_runs_change_nothing(checkout: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.current, "dry_run", True)
    assert series.unpack("lvs", sources=checkout)[0].startswith("would unpack toy")
    assert series.rebase("lvs", "1.1", sources=checkout)[0].startswith("would put")
    assert not os.path.lexists(checkout.file.parent / "out")
