"""Removing what was built."""

from __future__ import annotations

from pathlib import Path

from pipeline import progress, settings
from pipeline.store import Store, remove_tree

_RUNS = "machines may run on its disks; invoke lab-down{} removes it"
# What nothing could make again, or what somebody may be using.
KEPT = {
    "lab": _RUNS.format(""),
    "work": "it may hold commits that are nowhere else; remove it by hand",
    "repository": "it has older versions of packages, which are nowhere else; remove it by hand",
}
_LAB = "state.json"  # in every lab's folder, whatever its name (provision.lab.state)


def clean_out(out: Path) -> None:
    """Remove the finished artefacts; the trees of `invoke unpack` stay, the repository of packages, and a lab."""
    for path in sorted(out.iterdir()) if out.is_dir() else []:
        if path.name.startswith(".") and path.suffix == ".lock":
            continue  # somebody may hold it; who came next would make another one
        if why := _kept(path):
            progress.note(f"{path} stays: {why}")
            continue
        progress.note(f"{'would remove' if settings.current.dry_run else 'removing'} {path}")
        if not settings.current.dry_run:
            remove_tree(path)


def _kept(path: Path) -> str:
    """Why something in `out/` must not go, or nothing."""
    if (path / _LAB).exists():
        return _RUNS.format(f" --dir {path}")
    # A crash of `publish` leaves the repository under another name: .repository.old
    name = path.name.removeprefix(".").partition(".")[0] if path.name.startswith(".") else path.name
    return KEPT.get(name, "")


def clean_store(store: Store, keep: int) -> None:
    """Remove all but the `keep` newest results of each stage.

    The compiler cache and the downloaded sources stay: both are cheap to keep and dear to make again.
    """
    for path in store.prune(keep, dry_run=settings.current.dry_run):
        progress.note(f"{'would remove' if settings.current.dry_run else 'removed'} {path}")
