"""What a developer does with a patch series: unpack, regenerate, rebase, lint.

A series is known by its folder (`kernel/lvs`). Its source is named by the key `source` of a recipe in that folder
or in the one above.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from pipeline import checkpatch, patches, progress, run, settings, worktree
from pipeline.errors import BuildError, Problems
from pipeline.sources import Resolved, Sources
from pipeline.store import Stage, Store

# What checkpatch.pl --strict looks at in its tree: its own tables, all headers (for names in mixed case), and the
# entries by which it knows the top of a kernel tree.
_CHECKER_PARTS = ("scripts", "include", "COPYING", "CREDITS", "Kbuild", "MAINTAINERS", "Makefile", "README")
_CHECKER_FOLDERS = ("Documentation", "arch", "drivers", "fs", "init", "ipc", "kernel", "lib")


def everywhere(top: Path = settings.TOP) -> list[Path]:
    """Every series folder of the checkout."""
    return sorted(path.parent for path in top.glob("*/*/series") if path.is_file())


def find(name: str, top: Path = settings.TOP) -> Path:
    """The folder of a series, by its path from the checkout or its last word (`lvs`).

    Raises:
        BuildError: there is none of that name, or several.
    """
    known = everywhere(top)
    wanted = name.strip("/")
    found = [p for p in known if wanted in (str(p), p.relative_to(top).as_posix(), p.name)]
    if len(found) != 1:
        names = ", ".join(p.relative_to(top).as_posix() for p in known)
        raise BuildError(f"there is no series {name!r}", f"one of: {names}")
    return found[0]


def source_of(folder: Path) -> str:
    """The entry in `sources.yaml` that a series belongs to.

    Raises:
        BuildError: no recipe beside or above it names one.
    """
    for path in (*sorted(folder.glob("*.yaml")), *sorted(folder.parent.glob("*.yaml"))):
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and isinstance(data.get("source"), str):
            return str(data["source"])
    raise BuildError(f"no recipe in {folder} or {folder.parent} has the key source", f"add it to {folder}/recipe.yaml")


def workplace(folder: Path) -> Path:
    """Where a series is unpacked when no other place is said: `out/work/kernel-lvs`."""
    return settings.out() / "work" / f"{folder.parent.name}-{folder.name}"


def unpack(name: str, dest: Path | None = None, *, sources: Sources | None = None) -> list[str]:
    """Unpack a source with its series as git commits.

    Raises:
        BuildError: see `worktree.unpack`.
    """
    folder = find(name)
    sources = sources or Sources()
    tree = dest or workplace(folder)
    if settings.current.dry_run:
        return [f"would unpack {source_of(folder)} with {folder.relative_to(settings.TOP)} into {tree}"]
    series = patches.read(folder)
    source = sources.resolve(source_of(folder))
    worktree.unpack(source, series, tree, hint=f"invoke series-rebase {name} --version {source.version}")
    return [
        f"{tree}: {source.name} {source.version} and {len(series.names)} patches as commits",
        f"change them with git (commit --amend, rebase -i), then: invoke series-regenerate {name}"
        + (f" --tree {tree}" if dest else ""),
    ]


def regenerate(name: str, tree: Path | None = None) -> list[str]:
    """Write the patches anew from the commits of an unpacked tree; --dry-run only says which files would change.

    Raises:
        BuildError: see `worktree.regenerate`; or the tree was made from another series.
    """
    folder = find(name)
    tree = tree or workplace(folder)
    made_from = worktree.series_of(tree)
    if made_from != folder.resolve():
        raise BuildError(f"{tree} was made from {made_from}, not from {folder}", f"invoke unpack {name}")
    changed = worktree.regenerate(tree, check_only=settings.current.dry_run)
    return changed or [f"{folder.relative_to(settings.TOP)}: nothing changed"]


def rebase(name: str, version: str = "", dest: Path | None = None, *, sources: Sources | None = None) -> list[str]:
    """Put a series on another version of its source, as commits in a new tree.

    Args:
        name: the series.
        version: of the source; empty for the pinned one (to mend a series that does not apply).
        dest: the new tree.
        sources: the pins.

    Raises:
        BuildError: see `worktree.rebase`.
    """
    folder = find(name)
    sources = sources or Sources()
    source = source_of(folder)
    tree = dest or workplace(folder).with_name(f"{folder.parent.name}-{folder.name}-{version or 'rebase'}")
    if settings.current.dry_run:
        return [f"would put {folder.relative_to(settings.TOP)} on {source} {version} in {tree}"]
    new = sources.other_version(source, version) if version else sources.resolve(source)
    old = sources.present(source)
    series = patches.read(folder)
    worktree.rebase(series, new, tree, old=None if old is None or old.sha256 == new.sha256 else old)
    return [
        f"{tree}: all {len(series.names)} patches are on {source} {new.version}",
        f"invoke series-regenerate {name} --tree {tree}",
    ]


def lint(names: list[str] | None = None, *, sources: Sources | None = None, store: Store | None = None) -> list[str]:
    """Hold series against the rules of a letter, and the kernel's own checker where their source brings it.

    Raises:
        BuildError: what is wrong, all of it.
    """
    sources = sources or Sources(store)
    folders = [find(name) for name in names] if names else everywhere()
    lines = []
    problems = Problems()
    for folder in folders:
        series = patches.read(folder)
        for text in patches.lint(series).lines:
            problems.add("", text)
        place = folder.relative_to(settings.TOP).as_posix()
        accepted = 0
        if series.names and (checker := checker_of(sources.resolve(source_of(folder)), sources.store)):
            try:
                accepted = len(checkpatch.check(checker, series))
            except BuildError as error:
                for text in error.details or (error.message,):
                    problems.add(place, text)
        lines.append(f"{place}: {len(series.names)} patches, {accepted} findings tolerated with reasons")
    problems.raise_if_any("patch series", "correct the patches, or: invoke series-regenerate SERIES")
    return lines


def checker_of(source: Resolved, store: Store) -> Path | None:
    """A tree with just what `scripts/checkpatch.pl` needs, from the source itself; None where it brings none."""

    def build(out: Path) -> None:
        tree = out / "tree"
        tree.mkdir()
        members = [f"*/{part}" for part in _CHECKER_PARTS]
        result = run.run(
            [
                *("tar", "--extract", "--file", source.path, "--directory", tree, "--strip-components=1"),
                *("--no-same-owner", "--wildcards", "--no-wildcards-match-slash", *members),
            ],
            check=False,
        )
        # tar complains of members that are not there: not every source is a kernel.
        if not (tree / "scripts/checkpatch.pl").is_file():
            progress.debug(f"{source.path.name} brings no checkpatch.pl: {result.stderr[-200:]}")
            return
        for name in _CHECKER_FOLDERS:
            (tree / name).mkdir(exist_ok=True)

    inputs = {"sha256": source.sha256, "parts": [*_CHECKER_PARTS, *_CHECKER_FOLDERS]}
    stage = Stage("checkpatch", inputs, build, title=f"taking checkpatch.pl from {source.name} {source.version}")
    tree = store.ensure(stage) / "tree"
    return tree if (tree / "scripts/checkpatch.pl").is_file() else None
