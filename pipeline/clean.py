"""Removing what was built."""

from __future__ import annotations

from pipeline import progress, settings
from pipeline.store import Store, remove_tree


def clean(store: Store, *, store_too: bool, keep: int) -> None:
    """Remove `out/`, and with `store_too` all but the `keep` newest results of each stage.

    The compiler cache and the downloaded sources stay: both are cheap to keep and dear to make again.
    """
    dry = settings.current.dry_run
    out = settings.out()
    if out.exists():
        progress.note(f"{'would remove' if dry else 'removing'} {out}")
        if not dry:
            remove_tree(out)
    if store_too:
        for path in store.prune(keep, dry_run=dry):
            progress.note(f"{'would remove' if dry else 'removed'} {path}")
