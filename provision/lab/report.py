"""What people see of a lab: its picture, what to type next, and a shell on its nodes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import progress, run
from provision.lab import live, picture
from provision.lab.lab import Lab, own, typed

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
    folder, which = typed(lab.folder), own(lab.folder)
    reach = f"--cluster {folder}/cluster.yaml --ssh-config {folder}/ssh_config"
    vip = lab.urls()[0] if lab.urls() else "http://VIP/"
    director = lab.cluster.directors[0].name
    return [
        *_status(lab),
        "",
        "the cluster is up until lab-down; to try next:",
        f"  invoke lab-status{which}",
        f"  invoke lab-ssh client-1{which} -- curl -s {vip}",
        f"  invoke lab-ssh {director}{which} -- ipvsadm -Ln",
        f"  invoke check {reach}",
        f"  invoke plan {reach}   (after an edit of {folder}/cluster.yaml; then apply)",
        f"  invoke lab-down{which}",
    ]


def login(folder: Path, host: str, words: Sequence[str]) -> int:
    """A shell on a node, or a command; returns its exit status.

    Raises:
        BuildError: no lab is up there, or it has no such node, or that does not run.
    """
    lab = Lab.open(folder)
    return run.interactive(lab.command(host, words, terminal=sys.stdin.isatty() and not words))
