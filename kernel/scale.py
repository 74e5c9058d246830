"""`invoke bench-keepalived`: what a large configuration of FULLNAT costs keepalived, as ratios to stock NAT.

The machine of `bench.py`, with its way to count and to compare, runs in every round our keepalived with FNAT, our
keepalived with NAT, and unpatched keepalived with NAT, each with a thousand virtual servers of eight checked real
servers; FNAT has sixteen local addresses. Each is started until it says so, reloaded with the weight of one real server
changed until it says so, watched while it only checks, and ended. What the kernel then has is compared with what it
should have, line by line.

A reload of ours reads the new configuration once more than stock keepalived does, to refuse it if it is broken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kernel import bench, build, develop
from kernel.bench import Comparison, Row
from pipeline import rpm
from pipeline.store import Stage, Store

SERVICES, REALS, LOCALS = 1000, 8, 16
ROUNDS = 3
_REVISION = 1  # of what the stage here makes


def _row(name: str, over: str, what: str) -> Row:
    trial = name.partition("-")[0]
    return Row(name, what, 1.10, (Comparison(trial, over, "stock"),), lower_is_better=True)


ROWS = (
    _row("start", "fullnat", "ms from the start to all programmed, FNAT / stock NAT"),
    _row("reload", "fullnat", "ms of a reload that changes a real server, FNAT / stock NAT"),
    _row("rest", "fullnat", "ms of CPU a second while it only checks, FNAT / stock NAT"),
    _row("start-nat", "nat", "the same, our NAT / stock NAT"),
    _row("reload-nat", "nat", "the same, our NAT / stock NAT"),
    _row("rest-nat", "nat", "the same, our NAT / stock NAT"),
)


def programs_stage(room: build.Kernels, ipvsadm: Stage, ours: Stage, stock: Stage) -> Stage:
    """Our ipvsadm, and each keepalived in a folder of its own."""

    def unpack(out: Path) -> None:
        for packages, name, folder in (
            (ipvsadm, "ipvsadm", ""),
            (ours, "keepalived", "ours"),
            (stock, "keepalived", "old"),
        ):
            for package in sorted(room.store.path(packages).glob(f"{name}-[0-9]*.x86_64.rpm")):
                rpm.unpack(room.sandbox(), package, out / "root" / folder)

    needs = [ipvsadm, ours, stock, room.root.stage()]
    return Stage("scale-programs", {"rev": _REVISION}, unpack, needs, title="unpacking ipvsadm and keepalived")


@dataclass
class Plan(bench.Plan):
    """What to boot, and what to do in it."""

    task: ClassVar[str] = "bench-keepalived"
    script: ClassVar[str] = "scale.py"

    def __post_init__(self) -> None:
        self.rounds = self.rounds or ROUNDS

    def instructions(self) -> Mapping[str, Any]:
        """For inside/scale.py."""
        return {"rounds": self.rounds, "services": SERVICES, "reals": REALS, "locals": LOCALS}


def keepalived(ipvsadm: Stage, ours: Stage, stock: Stage, rounds: int = 0, file: Path | None = None) -> list[str]:
    """Measure and return the table; a missed limit is a notice.

    Args:
        ipvsadm, ours, stock: the stages of our ipvsadm's packages, our keepalived's, and the unpatched one's.
        rounds: how many; 0: three.
        file: takes the rows as JSON.

    Raises:
        BuildError: bad input, or something could not be built or measured.
    """
    bench.check(rounds, file, Plan.task)
    store = Store()
    room = build.kernels(store)
    kernel = develop.chosen(debug=False, store=store)
    programs = programs_stage(room, ipvsadm, ours, stock)
    return bench.measured(Plan, [(kernel, {})], programs, rounds, file, ROWS, store=store)
