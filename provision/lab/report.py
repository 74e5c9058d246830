"""What people see of a lab: its picture, what to type next, and a shell on its nodes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import progress, run, settings
from provision.lab import live, picture
from provision.lab.lab import Lab

SVG = "topology.svg"


def status(folder: Path) -> list[str]:
    """Ask all nodes, write the picture and return it as text.

    Raises:
        BuildError: no lab is up there.
    """
    return _status(Lab.open(folder))


def _status(lab: Lab) -> list[str]:
    with progress.step("asking the nodes"):
        seen = live.look(lab)
    path = lab.folder / SVG
    beside = path.with_suffix(".new")
    beside.write_text(picture.svg(lab.topology, seen, f"{lab.state.source}: {_summary(seen)}"), encoding="utf-8")
    beside.rename(path)
    return [*picture.text(lab.topology, seen), "", f"{_summary(seen)}; drawn in {path}"]


def _summary(seen: dict[str, live.Seen]) -> str:
    states = [each.state for each in seen.values()]
    words = (live.UP, live.STARTING, live.TROUBLED, live.DOWN)
    return ", ".join(f"{states.count(word)} {word}" for word in words if word in states)


def welcome(lab: Lab) -> list[str]:
    """The picture, and what can be typed now."""
    folder, own = _typed(lab.folder), "" if lab.folder == settings.TOP / "out/lab" else f" --dir {_typed(lab.folder)}"
    reach = f"--cluster {folder}/cluster.yaml --ssh-config {folder}/ssh_config"
    vip = lab.urls()[0] if lab.urls() else "http://VIP/"
    director = lab.cluster.directors[0].name
    return [
        *_status(lab),
        "",
        "the cluster is up until lab-down; to try next:",
        f"  invoke lab-status{own}",
        f"  invoke lab-ssh client-1{own} -- curl -s {vip}",
        f"  invoke lab-ssh {director}{own} -- ipvsadm -Ln",
        f"  invoke check {reach}",
        f"  invoke plan {reach}   (after an edit of {folder}/cluster.yaml; then apply)",
        f"  invoke lab-down{own}",
    ]


def _typed(path: Path) -> str:
    """A path as one types it in the checkout."""
    return str(path.relative_to(settings.TOP)) if path.is_relative_to(settings.TOP) else shlex.quote(str(path))


def login(folder: Path, host: str, words: Sequence[str]) -> int:
    """A shell on a node, or a command; returns its exit status.

    Raises:
        BuildError: no lab is up there, or it has no such node, or that does not run.
    """
    lab = Lab.open(folder)
    return run.interactive(lab.command(host, words, terminal=sys.stdin.isatty() and not words))
