"""`invoke bench-synproxy`: what SYNPROXY is worth in a flood, and what it costs without one.

The machine, the way of counting and the table are those of `kernel/bench.py`; `inside/synproxy.py` measures. Rates of
answers are in SYNs per second of the time that the machine spends in softirqs: the director's receiving, deciding and
answering. Neither the sender is in it nor who receives the answers: they leave by a device that counts and forgets
them, the same for all that are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kernel import bench, build, develop
from kernel.bench import Comparison, Row
from pipeline.store import Stage, Store


@dataclass(frozen=True)
class Effort(bench.Effort):
    """How much is measured.

    Attributes:
        syns: of a flood that is measured.
        requests: of a client that means it, while there is one.
    """

    syns: int = 100_000
    requests: int = 100


# As much data as in bench-forwarding: the rest of a window makes a segment of its own by chance, about 1 % of 24 MB.
COUNTED = Effort(rounds=5, connections=0, bytes_large=300_000_000, bytes_small=36_000_000)
TIMED = Effort(rounds=10, connections=0, bytes_large=3_000_000_000, bytes_small=360_000_000, syns=2_000_000)

_FAMILIES = (4, 6)
_BULK = [
    f"bulk-{method}-v{family}-{direction}-{size}"
    for method in ("nat", "fullnat")
    for family in _FAMILIES
    for size in ("large", "small")
    for direction in ("up", "down")
]
ROWS = (
    Row(
        "syn-vs-nftables",
        "SYNs answered / by SYNPROXY of nftables",
        1.5,
        (Comparison("syn-v4", "ipvs", "nftables"),),  # which drops IPv6: see inside/synproxy.py
    ),
    Row(
        "syn-vs-cookies",
        "SYNs answered / by a socket with cookies",
        1.0,
        tuple(Comparison(f"syn-v{family}", "ipvs", "cookies") for family in _FAMILIES),
    ),
    Row("bulk", "throughput with SYNPROXY / without", 0.98, tuple(Comparison(t, "proxied", "plain") for t in _BULK)),
    Row(
        "legit-under-flood",
        "requests answered in a flood / made",
        1.0,
        tuple(Comparison(f"legit-v{family}", "answered", "asked") for family in _FAMILIES),
    ),
)


@dataclass
class Plan(bench.Plan):
    """What to boot, and what to do in it."""

    effort: Effort = field(init=False)
    task: ClassVar[str] = "bench-synproxy"
    script: ClassVar[str] = "synproxy.py"

    def __post_init__(self) -> None:
        self.effort = TIMED if self.accelerator.name == "kvm" else COUNTED
        self.rounds = self.rounds or self.effort.rounds

    def instructions(self) -> Mapping[str, Any]:
        """For inside/synproxy.py."""
        return {
            "rounds": self.rounds,
            "syns": self.effort.syns,
            "requests": self.effort.requests,
            "bytes_large": self.effort.bytes_large,
            "bytes_small": self.effort.bytes_small,
            "ours": f"/kernel/lib/modules/{self.kernel.uname}/kernel/net/netfilter/ipvs",
        }


def synproxy(ipvsadm: Stage, rounds: int = 0, file: Path | None = None) -> list[str]:
    """Measure and return the table; a missed limit is a notice.

    Args:
        ipvsadm: the stage of our ipvsadm's packages.
        rounds: how many; 0: five, or ten where instructions cannot be counted.
        file: takes the rows as JSON.

    Raises:
        BuildError: bad input, or something could not be built or measured.
    """
    bench.check(rounds, file, Plan.task)
    store = Store()
    room = build.kernels(store)
    kernel = develop.chosen(debug=False, store=store)
    programs = bench.programs_stage(room, [ipvsadm])
    return bench.measured(Plan, [(kernel, {})], programs, rounds, file, ROWS, store=store)
