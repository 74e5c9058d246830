"""A source tree as a git repository: the series as commits, to be changed with git and written back.

    unpack       tarball + series -> one commit for the release, one for each patch
    regenerate   the commits -> patches/ and series
    rebase       another release + the series, with a three-way merge where the old tarball is at hand

The commits are made with fixed committer and dates, so the same inputs give the same hashes.
"""

from __future__ import annotations

import difflib
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import patches, progress, run
from pipeline.errors import BuildError
from pipeline.patches import Overlay, Patch, Section, Series
from pipeline.sources import Resolved
from pipeline.store import remove_tree

_STATE = "lvsforge.json"  # in .git: which series and release this tree was made from
_NOBODY = {"NAME": "lvsforge", "EMAIL": "lvsforge@localhost"}
# A user's or machine's git configuration (signing, hooks, diff styles, line ends) must not change our bytes.
_ISOLATED = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "GIT_TERMINAL_PROMPT": "0"}
_FIXED = [
    "-c", "core.autocrlf=false",
    "-c", "core.hooksPath=/dev/null",
    "-c", "core.excludesFile=/dev/null",
    "-c", "core.quotePath=false",
    "-c", "core.fsync=none",  # the tarball is the original; speed counts
    "-c", "core.looseCompression=0",  # a kernel is added in 20 s instead of 70, for 1.4 GB of disk
    "-c", "gc.auto=0",
    "-c", "commit.gpgSign=false",
    "-c", "init.defaultBranch=main",
    "-c", "advice.mergeConflict=false",
]  # fmt: skip
_FORMAT = [
    "format-patch", "--zero-commit", "--no-signature", "--no-numbered", "--no-renames", "--no-ext-diff",
    "--no-textconv", "--no-notes", "--no-attach", "--no-thread", "--no-base", "--no-cover-letter", "--no-color",
    "--no-indent-heuristic", "--diff-algorithm=myers", "--unified=3", "--abbrev=12", "--subject-prefix=PATCH",
    "--src-prefix=a/", "--dst-prefix=b/", "--encode-email-headers", "--suffix=.patch", "--quiet",
    "--filename-max-length=120",  # a subject of 75 characters fits whole
]  # fmt: skip


def unpack(source: Resolved, series: Series, dest: Path, *, hint: str = "") -> Path:
    """Make a git repository with the release as one commit and each patch as one.

    Args:
        source: the tarball.
        series: the patches.
        dest: the directory to make.
        hint: the next step when a patch does not apply.

    Returns:
        `dest`. It appears only when all patches are in.

    Raises:
        BuildError: `dest` exists; the tarball is damaged; or a patch does not apply, with file, hunk and line.
    """
    _refuse_existing(dest)
    work = dest.with_name(f".{dest.name}.unpacking")
    remove_tree(work)
    try:
        _base(source, work)
        label = f"{source.name} {source.version}"
        with progress.step(f"committing {len(series.names)} patches"):
            # The strict engine first: its refusal names hunk and line, and git only repeats what it allowed.
            check(work, series, label, hint)
            if series.names:
                git(work, "am", "--quiet", "--committer-date-is-author-date", *_absolute(series), env=_committer())
        _remember(work, source, series)
        work.replace(dest)
    finally:
        remove_tree(work)
    return dest


def regenerate(tree: Path, *, check_only: bool = False) -> list[str]:
    """Write the commits of a tree back to its series; an untouched tree gives the same bytes.

    Headings of the series file stay above the patches that they stood above; a new commit joins the group of the
    one before it.

    Args:
        tree: what `unpack` or `rebase` made.
        check_only: change nothing.

    Returns:
        The files that changed (or would), with `+` (new), `-` (gone) or `~` before their names.

    Raises:
        BuildError: uncommitted changes, a patch half applied, a merge, no commit; or no tree of ours.
    """
    state = _state(tree)
    _refuse_unfinished(tree)
    base = state["base"]
    root = Path(state["series"])
    old = patches.read(root)
    commits = git(tree, "rev-list", "--reverse", f"{base}..HEAD").split()
    if not commits:
        raise BuildError(f"{tree} has no commit on top of {state['label']}", f"git -C {tree} log --oneline -3")
    if merges := git(tree, "rev-list", "--merges", f"{base}..HEAD").split():
        raise BuildError(
            f"{tree}: {merges[0][:12]} is a merge; a series is a line", f"git -C {tree} rebase {base[:12]}"
        )
    with run.temporary_directory("lvsforge-series-") as work:
        git(tree, *_FORMAT, f"--output-directory={work}", f"{base}..HEAD")
        fresh = sorted(work.glob("*.patch"))
        content = {path.name: path.read_bytes() for path in fresh}
        subjects = [patches.parse(path).subject for path in fresh]
    if len(set(subjects)) < len(subjects):
        twice = next(subject for subject in subjects if subjects.count(subject) > 1)
        raise BuildError(f"{tree}: two commits have the subject {twice!r}", f"git -C {tree} rebase -i {base[:12]}")
    new = Series(root, arrange(old, [patches.parse(p).subject for p in old.paths], list(content), subjects))
    folder = root / "patches"
    before = {path.name: path.read_bytes() for path in folder.glob("*.patch")}
    changed = [f"+ {n}" for n in content if n not in before]
    changed += [f"~ {n}" for n in content if n in before and before[n] != content[n]]
    changed += [f"- {n}" for n in before if n not in content]
    if new.text() != (root / "series").read_text(encoding="utf-8"):
        changed.append("~ series")
    if check_only or not changed:
        return changed
    folder.mkdir(exist_ok=True)
    # New files, then the list, then what it no longer names: stopped anywhere, nothing is lost.
    for name, data in content.items():
        if before.get(name) != data:
            _write(folder / name, data)
    _write(root / "series", new.text().encode())
    for name in before.keys() - content.keys():
        (folder / name).unlink()
    for line in patches.lint(new).lines:
        progress.warn(line)
    return changed


def rebase(series: Series, source: Resolved, dest: Path, *, old: Resolved | None = None) -> Path:
    """Put a series on another release, as commits in a new tree; `regenerate` then writes it back.

    Args:
        series: the patches.
        source: the release to put them on.
        dest: the directory to make.
        old: the release that the patches fit. With it git can merge three ways: what moved or changed nearby
            is then no conflict.

    Returns:
        `dest`, with all patches in.

    Raises:
        BuildError: a patch conflicts; with patch, file and hunk. `dest` then stands at that patch, for git.
    """
    _refuse_existing(dest)
    remaining = list(series.paths)
    _base(source, dest)
    _remember(dest, source, series)
    if not remaining:
        return dest
    if old is not None:
        _add_ancestors(dest, series, old)
    result = run.run(
        _argv(dest, "am", "--3way", "--committer-date-is-author-date", *_absolute(series)),
        env={**_ISOLATED, **_committer()},
        check=False,
    )
    if result.returncode == 0:
        return dest
    done = int(git(dest, "rev-list", "--count", f"{_state(dest)['base']}..HEAD"))
    failed = patches.parse(remaining[done])
    refusals, _ = patches.try_patch(_committed(dest, failed), failed)
    raise BuildError(
        f"patch {failed.name} ({done + 1} of {len(remaining)}) does not apply to {source.name} {source.version}",
        f"cd {dest}, correct the files, git add them, git am --continue (or --skip); then: "
        f"invoke series-regenerate {series.root} --tree {dest}",
        [*(str(refusal) for refusal in refusals), *_conflicts(dest)],
    )


def series_of(tree: Path) -> Path:
    """The series folder that a tree was made from.

    Raises:
        BuildError: it is no tree of ours.
    """
    return Path(_state(tree)["series"])


def differences(tree: Path) -> tuple[str, list[str]]:
    """What a tree changes in its release, committed or not.

    Returns:
        The release (`linux 6.12.107`), and the names of the files that were changed, added or removed.

    Raises:
        BuildError: it is no tree of ours.
    """
    state = _state(tree)
    quiet = {"GIT_OPTIONAL_LOCKS": "0"}  # a look at somebody's tree must not write to it
    changed = git(tree, "diff", "--name-only", "--no-renames", "-z", state["base"], env=quiet)
    added = git(tree, "ls-files", "--others", "--exclude-standard", "-z", env=quiet)
    return state["label"], sorted({name for name in (changed + added).split("\0") if name})


def check(tree: Path, series: Series, label: str, hint: str = "") -> None:
    """Whether a series fits a tree exactly; nothing is written.

    Raises:
        BuildError: a patch does not, with file, hunk and line.
    """
    overlay = Overlay(tree)
    for path in series.paths:
        patch = patches.parse(path)
        refusals, _ = patches.try_patch(overlay, patch)
        if refusals:
            raise patches.refused(patch, refusals, label, hint or f"invoke series-rebase {series.root}")


def arrange(
    old: Series, old_subjects: Sequence[str], names: Sequence[str], subjects: Sequence[str]
) -> tuple[Section, ...]:
    """Sort new patches into the sections of an old series.

    A patch is known again by its subject, as long as it kept its order among the others; one that is new or was
    moved joins the section of the patch before it.
    """
    section_of = [number for number, section in enumerate(old.sections) for _ in section.names]
    home: dict[int, int] = {}
    matcher = difflib.SequenceMatcher(None, old_subjects, subjects, autojunk=False)
    for block in matcher.get_matching_blocks():
        home.update({block.b + i: section_of[block.a + i] for i in range(block.size)})
    first = next((n for n, section in enumerate(old.sections) if section.names), max(len(old.sections) - 1, 0))
    members: dict[int, list[str]] = {}
    current = first
    for index, name in enumerate(names):
        current = max(current, home.get(index, current))
        members.setdefault(current, []).append(name)
    sections = old.sections or (Section((), ()),)
    return tuple(Section(s.heading, tuple(members.get(n, ()))) for n, s in enumerate(sections))


def extract(source: Resolved, dest: Path) -> None:
    """Unpack a tarball without its top directory into a directory that is made.

    Raises:
        BuildError: the tarball is damaged.
    """
    dest.mkdir(parents=True)
    run.require("xz", "to unpack tarballs", "xz-utils")
    run.run(
        ["tar", "--extract", "--file", source.path, "--directory", dest, "--strip-components=1", "--no-same-owner"],
        what=f"unpacking {source.path.name}",
        hint="invoke sources-list --verify   (a damaged tarball is fetched again)",
    )


def git(tree: Path, *words: str | Path, env: dict[str, str] | None = None) -> str:
    """Run git in a tree with our configuration and nobody else's; returns what it printed.

    Raises:
        BuildError: it failed.
    """
    argv = _argv(tree, *words)
    return run.run(argv, env={**_ISOLATED, **(env or {})}, what=f"git {words[0]} in {tree}").stdout


def _argv(tree: Path, *words: str | Path) -> list[str]:
    program = run.require("git", "to handle patch series as commits", "git")
    # safe.directory: a tree that another user (root, in a build) unpacked is ours all the same.
    return [program, *_FIXED, "-c", f"safe.directory={tree.resolve()}", "-C", str(tree), *(str(w) for w in words)]


def _base(source: Resolved, dest: Path) -> None:
    """The release as the first commit, dated by the newest of its top-level files."""
    label = f"{source.name} {source.version}"
    with progress.step(f"unpacking {label}"):
        extract(source, dest)
    with progress.step(f"committing {label}"):
        # A folder that the tarball does not name has the time of unpacking; a file never has.
        date = f"@{max((int(p.lstat().st_mtime) for p in dest.iterdir() if not p.is_dir()), default=0)} +0000"
        git(dest, "init", "--quiet")
        git(dest, "add", "--all", "--force", ".")  # force: a release's own .gitignore must not hide a file of it
        who = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in _NOBODY.items()}
        git(
            dest, "commit", "--quiet", "--allow-empty", "--no-verify", "-m", label,
            env={**who, "GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date},
        )  # fmt: skip


def _committer() -> dict[str, str]:
    return {f"GIT_COMMITTER_{key}": value for key, value in _NOBODY.items()}


def _absolute(series: Series) -> list[str]:
    return [str(path.resolve()) for path in series.paths]


def _remember(tree: Path, source: Resolved, series: Series) -> None:
    base = git(tree, "rev-list", "--max-parents=0", "HEAD").strip()
    state = {"series": str(series.root.resolve()), "base": base, "label": f"{source.name} {source.version}"}
    (tree / ".git" / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def _state(tree: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((tree / ".git" / _STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BuildError(f"{tree} was not made by `invoke unpack`", "invoke unpack SERIES") from None
    return state


def _refuse_existing(dest: Path) -> None:
    if dest.exists():
        raise BuildError(f"{dest} exists already", f"choose another directory, or: rm -r {dest}")


def _refuse_unfinished(tree: Path) -> None:
    for name, command in (("rebase-apply", "am"), ("rebase-merge", "rebase"), ("MERGE_HEAD", "merge")):
        if (tree / ".git" / name).exists():
            raise BuildError(f"{tree}: a git {command} is not finished", f"git -C {tree} {command} --continue")
    status = git(tree, "status", "--porcelain", "--untracked-files=no")
    if status:
        raise BuildError(
            f"{tree} has uncommitted changes", f"git -C {tree} commit   (or git stash)", status.splitlines()[:10]
        )


def _add_ancestors(dest: Path, series: Series, old: Resolved) -> None:
    """Give git the file versions that the patches were made from, so that it can merge three ways.

    Only the touched files are read from the old tarball; the patches are applied to them one by one, and each
    state is stored as an object, which is what the `index` lines of the patches name.
    """
    mails = [patches.parse(path) for path in series.paths]
    touched = {change.old for mail in mails for change in mail.changes if change.old is not None}
    with progress.step(f"reading {len(touched)} files of {old.name} {old.version}"):
        with run.temporary_directory("lvsforge-ancestors-") as work:
            tree, blobs = work / "tree", work / "blobs"
            tree.mkdir()
            blobs.mkdir()
            _extract_some(old.path, touched, tree)
            overlay = Overlay(tree)
            files = [path for path in tree.rglob("*") if path.is_file()]
            for mail in mails:
                refusals, _ = patches.try_patch(overlay, mail)
                if refusals:
                    progress.note(
                        f"{mail.name} does not fit {old.name} {old.version} either: no three-way merge for it"
                    )
                    break
                for change in mail.changes:
                    content = overlay.read(change.path)
                    if content is not None:
                        blob = blobs / str(len(files))
                        blob.write_bytes(content)
                        files.append(blob)
            names = "".join(f"{path}\n" for path in files)
            argv = _argv(dest, "hash-object", "-w", "--no-filters", "--stdin-paths")
            run.run(argv, env=_ISOLATED, stdin=names, what="storing ancestors")


def _extract_some(tarball: Path, names: set[str], dest: Path) -> None:
    """Some files of a tarball, without its top directory."""
    with tarfile.open(tarball) as tar:
        left = set(names)
        for member in tar:
            inside = member.name.partition("/")[2]
            if inside in left and member.isreg() and (content := tar.extractfile(member)):
                target = dest / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
                left.discard(inside)
            if not left:
                return


def _committed(tree: Path, patch: Patch) -> Overlay:
    """What HEAD holds of the files that a patch touches; the working tree has conflict marks in them."""
    overlay = Overlay(tree)
    for name in {n for change in patch.changes for n in (change.old, change.new) if n is not None}:
        argv = _argv(tree, "show", f"HEAD:{name}")
        result = run.run(argv, env=_ISOLATED, check=False)
        overlay.files[name] = result.stdout.encode("utf-8", "replace") if result.returncode == 0 else None
    return overlay


def _conflicts(tree: Path) -> list[str]:
    names = git(tree, "diff", "--name-only", "--diff-filter=U").split("\n")
    found = []
    for name in filter(None, names):
        text = (tree / name).read_bytes()
        starts = [text.count(b"\n", 0, m.start()) + 1 for m in re.finditer(rb"^<<<<<<< ", text, re.M)]
        found.append(f"{name}: conflict marks at line {', '.join(map(str, starts))}")
    return found


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(data)
    beside.replace(path)
