"""`invoke bench-forwarding`: what FULLNAT costs, as ratios to stock NAT.

One machine with one CPU runs client, director and real server in namespaces, and `inside/forwarding.py` measures in it.
Where machines are emulated, QEMU's -icount lets the guest's clock count instructions (two nanoseconds each): a rate is
then instructions a second, does not depend on what else the host does, and repeats to about half a per cent. It knows
nothing of caches, locks and cards. Under KVM nothing counts instructions: there the wall clock is what is measured, in
more rounds, and the machine had better be idle.

What is compared runs in every round, in the other order in every second one. A round's ratio is that of its two
figures; what is shown is the median of the rounds' ratios, and their lowest and highest. A row that consists of several
comparisons shows the worst of them, by its median; the second table has them all.

Bulk data is compared in both directions (`up`: from the client), in segments of 64 KiB as cards that coalesce deliver
them (`large`) and of the MTU (`small`), where the work on each packet weighs most.

A second machine, with the real server's kernel and the director's IPVS in it, compares what the receivers of the
client's address cost: the module, and the programs of toa-bpf.

A missed limit is shown and is no failure: the exit status tells whether everything could be measured.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kernel import build, develop
from pipeline import progress, rpm, run, settings
from pipeline.errors import BuildError
from pipeline.store import Stage, Store, remove_tree
from pipeline.vm import Accelerator, Machine, Share

INSIDE = Path(__file__).resolve().parent / "inside"
_REVISION = 1  # of what the stages here make
_MEMORY = 1536  # MiB
_9P = "trans=virtio,version=9p2000.L,msize=512000"
_MOST_ROUNDS = 100
_REPORT = re.compile(r"WARNING: CPU|\bBUG:|Oops|Call Trace|general protection|rcu: INFO")
# Seconds that a round may take. Measured: 55 s on two idle cores, 110 s on two cores with five processes.
_ROUND_DEADLINE = 900.0
_BOOT_DEADLINE = 300.0


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: unless the user says how many.
        connections: of one connection rate. Half of them at a time come from a pool with 6053 free ports.
        bytes_large, bytes_small: of bulk data in segments of 64 KiB and of the MTU.
        half_open: connections whose memory is measured. 50000 is just above where the table of FULLNAT connections
            doubles (3/4 of 65536): as much memory for each connection as there can be.
    """

    rounds: int
    connections: int
    bytes_large: int
    bytes_small: int
    half_open: int = 50_000


# About half a second of the guest's clock for each figure.
COUNTED = Effort(rounds=5, connections=2000, bytes_large=300_000_000, bytes_small=36_000_000)
TIMED = Effort(rounds=20, connections=8000, bytes_large=3_000_000_000, bytes_small=360_000_000)


# --- what is compared


@dataclass(frozen=True)
class Comparison:
    """Two sides of a trial: `over` divided by `under`; the names are those of inside/forwarding.py."""

    trial: str
    over: str
    under: str


@dataclass(frozen=True)
class Row:
    """A line of the result.

    Attributes:
        name: fixed; others read it.
        what: for people.
        limit: of the ratio.
        comparisons: the worst of them is the row.
        lower_is_better: the limit is an upper one.
    """

    name: str
    what: str
    limit: float
    comparisons: tuple[Comparison, ...]
    lower_is_better: bool = False

    def met(self, ratio: float) -> bool:
        """Whether a ratio keeps the limit."""
        return ratio <= self.limit if self.lower_is_better else ratio >= self.limit


def _bulk(family: int) -> list[str]:
    return [f"bulk-v{family}-{direction}-{size}" for size in ("large", "small") for direction in ("up", "down")]


def _against(trials: Iterable[str], over: str, under: str) -> tuple[Comparison, ...]:
    return tuple(Comparison(trial, over, under) for trial in trials)


_EVERY = ["connrate-v4", "connrate-v6", *_bulk(4), *_bulk(6)]
ROWS = (
    Row("bulk-v4", "FULLNAT / NAT, throughput", 0.95, _against(_bulk(4), "fullnat", "nat")),
    Row("bulk-v6", "FULLNAT / NAT, throughput", 0.95, _against(_bulk(6), "fullnat", "nat")),
    Row("connrate-v4", "FULLNAT / NAT, connections/s", 0.90, _against(["connrate-v4"], "fullnat", "nat")),
    Row("connrate-v6", "FULLNAT / NAT, connections/s", 0.90, _against(["connrate-v6"], "fullnat", "nat")),
    Row("stock-nat-unchanged", "NAT, our modules / unpatched", 0.99, _against(_EVERY, "nat", "stock")),
    Row(
        "connrate-90pct-ports",
        "90 % of the ports taken / none",
        0.80,
        (Comparison("connrate-ports", "scattered", "empty"), Comparison("connrate-ports", "block", "empty")),
    ),
    Row(
        "memory-per-connection",
        "bytes, FULLNAT / unpatched NAT",
        1.35,
        (Comparison("memory", "fullnat", "stock"),),
        lower_is_better=True,
    ),
    Row("toa-insert", "client named to the server / not", 0.98, _against(["toa-v4", "toa-v6"], "on", "off")),
    Row("toa-module", "shown by the module / not at all", 0.98, _against(["shown-v4", "shown-v6"], "module", "none")),
    Row("toa-bpf", "shown by BPF programs / not at all", 0.98, _against(["shown-v4", "shown-v6"], "bpf", "none")),
)


# --- arithmetic


@dataclass(frozen=True)
class Sample:
    """One figure.

    Attributes:
        value: connections per second, Mbit/s, or bytes.
        user, kernel: clock ticks that the guest spent in user space and in the kernel meanwhile.
    """

    trial: str
    side: str
    round: int
    value: float
    user: int = 0
    kernel: int = 0


_HEAD = f"{'ratio':>6} {'low':>6} {'high':>6}"


@dataclass(frozen=True)
class Result:
    """A comparison's outcome.

    Attributes:
        ratio: the median of the rounds' ratios; low, high: the lowest and the highest.
        over, under: the medians of the two sides' figures.
        user: user space's share of the time, 0 to 1; None where no time was measured.
    """

    comparison: Comparison
    ratio: float
    low: float
    high: float
    rounds: int
    over: float
    under: float
    user: float | None

    @property
    def spread(self) -> str:
        """Its columns, under `_HEAD`."""
        return f"{self.ratio:>6.3f} {self.low:>6.3f} {self.high:>6.3f}"


def parse(text: str) -> list[Sample]:
    """The figures among the lines that the machine left.

    Raises:
        BuildError: it tells of a failure, or of a figure that cannot be one.
    """
    samples = []
    for line in text.splitlines():
        data = json.loads(line)
        if "error" in data:
            raise BuildError(
                "a measurement failed", "the same command again, or invoke test-kernel", data["error"].splitlines()
            )
        if "trial" in data:
            samples.append(Sample(**data))
            if not samples[-1].value > 0:
                raise BuildError(f"not a figure: {line}", "the same command again")
    return samples


def compare(comparison: Comparison, samples: Iterable[Sample], rounds: int) -> Result:
    """Compare two sides round by round.

    Raises:
        BuildError: a round lacks a figure.
    """
    found = [sample for sample in samples if sample.trial == comparison.trial]
    sides = {
        side: {sample.round: sample for sample in found if sample.side == side}
        for side in (comparison.over, comparison.under)
    }
    for side, figures in sides.items():
        if missing := [number for number in range(1, rounds + 1) if number not in figures]:
            rounds_ = ", ".join(map(str, missing))
            raise BuildError(f"{comparison.trial}, {side}: not measured in round {rounds_}", "the same command again")
    over, under = (list(sides[side].values()) for side in (comparison.over, comparison.under))
    ratios = [
        sides[comparison.over][number].value / sides[comparison.under][number].value for number in range(1, rounds + 1)
    ]
    user = sum(sample.user for sample in [*over, *under])
    ticks = user + sum(sample.kernel for sample in [*over, *under])
    return Result(
        comparison,
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        rounds,
        statistics.median(sample.value for sample in over),
        statistics.median(sample.value for sample in under),
        user / ticks if ticks else None,
    )


def worst(row: Row, results: Sequence[Result]) -> Result:
    """The comparison that counts for a row."""
    choose = max if row.lower_is_better else min
    return choose(results, key=lambda result: result.ratio)


@dataclass(frozen=True)
class Report:
    """Everything that was found out.

    Attributes:
        title: what was measured, and how.
        rows: every row with its comparisons, the one that counts first.
    """

    title: str
    rows: tuple[tuple[Row, tuple[Result, ...]], ...]

    @classmethod
    def of(cls, title: str, samples: Sequence[Sample], rounds: int, lines: Sequence[Row] = ROWS) -> Report:
        """Work the figures of some rows out.

        Raises:
            BuildError: some are missing.
        """
        rows = []
        for row in lines:
            results = [compare(comparison, samples, rounds) for comparison in row.comparisons]
            first = worst(row, results)
            rows.append((row, (first, *(result for result in results if result is not first))))
        return cls(title, tuple(rows))

    @property
    def missed(self) -> list[str]:
        """The names of the rows that miss their limits."""
        return [row.name for row, results in self.rows if not row.met(results[0].ratio)]

    def data(self) -> list[dict[str, Any]]:
        """The rows for other programs."""
        return [
            {
                "name": row.name,
                "ratio": round(results[0].ratio, 4),
                "low": round(results[0].low, 4),
                "high": round(results[0].high, 4),
                "rounds": results[0].rounds,
            }
            for row, results in self.rows
        ]

    def table(self) -> list[str]:
        """The rows for people, then the comparisons that they are made of."""
        lines = [self.title, "", f"{'row':<23} {_HEAD} {'limit':>9}           what"]
        for row, results in self.rows:
            limit = f"{'<=' if row.lower_is_better else '>='} {row.limit:.2f}"
            verdict = "met" if row.met(results[0].ratio) else "MISSED"
            lines.append(f"{row.name:<23} {results[0].spread} {limit:>9}  {verdict:<6}   {row.what}")
        lines += [
            "",
            "A row is the worst of its comparisons. ratio: the median of the rounds; low, high: their range.",
            "",
            f"{'comparison':<41} {_HEAD} {'figures':>19} {'user space':>11}",
        ]
        for row, results in self.rows:
            for result in results:
                own = result.comparison
                name = f"{'' if row.met(result.ratio) else '! '}{own.trial}: {own.over} / {own.under}"
                share = "" if result.user is None else f"{result.user:.0%}"
                lines.append(
                    f"{name:<41} {result.spread} {result.over:>9.1f} {result.under:>9.1f} {share:>11}".rstrip()
                )
        return lines


# --- what is measured

DIRECTOR_TRIALS = ("forwarding", "naming", "pools", "memory")
SERVER_TRIALS = ("showing",)


def programs_stage(room: build.Kernels, tools: Sequence[Stage]) -> Stage:
    """Our programs, unpacked."""

    def unpack(out: Path) -> None:
        for package in sorted(path for tool in tools for path in room.store.path(tool).glob("*.x86_64.rpm")):
            rpm.unpack(room.sandbox(), package, out / "root")

    needs = [*tools, room.root.stage()]
    return Stage("bench-programs", {"rev": _REVISION}, unpack, needs, title="unpacking the programs")


@dataclass(frozen=True)
class Counted(Accelerator):
    """TCG that counts instructions: one thread, and a clock that only they move while the guest is busy."""

    @property
    def options(self) -> list[str]:
        # Not sleep=off, which makes idle time pass at once: a wait for the disk then took minutes of the guest's clock,
        # and half-open connections were gone before they were measured.
        return ["-accel", "tcg,thread=single,tb-size=512", "-icount", "shift=1,sleep=on"]


@dataclass
class Plan:
    """What to boot, and what to do in it.

    Attributes:
        kernel: has the director's IPVS.
        root, programs: the machine's root file system, and our programs that lie over it.
        accelerator: of the machine.
        rounds: how many; 0: as many as usual.
        work: a folder of its own.
        trials: methods of inside/forwarding.py, done in every round.
        stock: the folder of unpatched modules, where a trial needs them.
    """

    kernel: develop.Built
    root: Path
    programs: Path
    accelerator: Accelerator
    rounds: int
    work: Path
    trials: tuple[str, ...] = ()
    stock: Path | None = None
    effort: Effort = field(init=False)
    task: ClassVar[str] = "bench-forwarding"
    script: ClassVar[str] = "forwarding.py"  # of inside/

    def __post_init__(self) -> None:
        self.effort = TIMED if self.accelerator.name == "kvm" else COUNTED
        self.rounds = self.rounds or self.effort.rounds

    @property
    def title(self) -> str:
        """For the head of the table."""
        how = "instructions counted (QEMU -icount)"
        if self.accelerator.name == "kvm":
            how = "WALL CLOCK under KVM, where nothing counts instructions: the machine should be idle"
        return f"{self.kernel.title}, linux {self.kernel.uname}; {self.rounds} rounds; {how}"

    @property
    def shares(self) -> Mapping[str, Path]:
        """Folders that are in the machine under these names."""
        found = {"inside": INSIDE, "kernel": self.work / "kernel"}
        return {**found, "stock": self.stock} if self.stock else found

    def instructions(self) -> Mapping[str, Any]:
        """For inside/forwarding.py."""
        return {
            "rounds": self.rounds,
            "trials": self.trials,
            "connections": self.effort.connections,
            "bytes_large": self.effort.bytes_large,
            "bytes_small": self.effort.bytes_small,
            "half_open": self.effort.half_open,
            "ours": f"/kernel/lib/modules/{self.kernel.uname}/kernel/{build.IPVS}",
            "stock": "/stock" if self.stock else "",
        }

    def machine(self, out: Path) -> Machine:
        """The machine; its first process is forwarding.py."""
        mounts = [
            "mount -t tmpfs tmpfs /mnt",
            "mkdir /mnt/upper /mnt/work /mnt/root /mnt/programs",
            f"mount -t 9p -o {_9P},cache=loose,ro programs /mnt/programs",
            "mount -t overlay -o lowerdir=/mnt/programs:/,upperdir=/mnt/upper,workdir=/mnt/work root /mnt/root",
            "cd /mnt/root",
            f"mkdir -p {' '.join(self.shares)} out usr/lib/modules",
            *(
                f"mount -t {kind} {kind} {place}"
                for kind, place in (("proc", "proc"), ("sysfs", "sys"), ("tmpfs", "run"))
            ),
            "mount -t devtmpfs dev dev",
            "mount -t tmpfs tmp tmp",
            *(f"mount -t 9p -o {_9P},cache=loose,ro {tag} {tag}" for tag in self.shares),
            f"mount -t 9p -o {_9P} out out",
            "mount --bind kernel/lib/modules usr/lib/modules",
            f"exec chroot . python3 /inside/{self.script}",
        ]
        words = [
            "console=ttyS0 quiet loglevel=5 panic=-1",
            f"root=/dev/root rootfstype=9p ro rootflags={_9P},cache=loose",
            # A switch of page tables at every system call, and a device's clock at every packet, are not what is asked.
            "mitigations=off nokaslr audit=0 tsc=reliable",
            f'init=/bin/sh -- -ec "{"; ".join(mounts)}"',
        ]
        return Machine(
            self.task,
            self.work / "machine",
            self.accelerator,
            kernel=self.work / "kernel" / "boot" / self.kernel.image.name,
            append=" ".join(words),
            shares=[
                Share(self.root, "/dev/root"),
                Share(self.programs, "programs"),
                *(Share(path, tag) for tag, path in self.shares.items()),
                Share(out, "out", readonly=False),
            ],
            memory=_MEMORY,
            cpus=1,
            network=False,
        )

    def run(self) -> str:
        """Boot it and wait for its end; returns the lines that it left.

        Raises:
            BuildError: it does not boot or does not come to an end.
        """
        remove_tree(self.work)
        out = self.work / "out"
        out.mkdir(parents=True)
        # A kernel that is worked on may be compiled anew while we measure, and modules are loaded in every round.
        for part in ("boot", "lib"):
            shutil.copytree(self.kernel.folder / part, self.work / "kernel" / part, copy_function=rpm.link_or_copy)
        (out / "plan.json").write_text(json.dumps(self.instructions()) + "\n", encoding="utf-8")
        results = out / "results.jsonl"
        results.touch()
        with self.machine(out) as machine:
            rounds = [-1]

            def moved() -> bool:
                """Whether another round began, or all is over."""
                begun = results.read_text(encoding="utf-8").count('{"begins"')
                ended = machine.process.poll() is not None
                changed = begun != rounds[0] or ended
                rounds[0] = begun
                return changed

            while machine.process.poll() is None:
                run.wait_until(
                    moved,
                    deadline=_ROUND_DEADLINE if rounds[0] > 0 else _ROUND_DEADLINE + _BOOT_DEADLINE,
                    what=f"{machine.name}: the end of round {rounds[0]}",
                    hint=f"read {machine.console}",
                    tail_of=machine.console_tail,
                )
                if machine.process.poll() is None:
                    progress.note(f"round {rounds[0]} of {self.rounds}" if rounds[0] else "booting, warming up")
            text = results.read_text(encoding="utf-8")
            if '{"ends"' not in text and '{"error"' not in text:
                raise BuildError(
                    f"{machine.name}: the machine ended in the midst of it",
                    f"read {machine.console}",
                    machine.console_tail(),
                )
        if _REPORT.search(machine.console.read_text(encoding="utf-8", errors="replace")):
            raise BuildError("the kernel reported a fault of its own meanwhile", f"read {machine.console}")
        return text


def forwarding(tools: Sequence[Stage], rounds: int = 0, file: Path | None = None) -> list[str]:
    """Measure and return the table; a missed limit is a notice.

    Args:
        tools: the stages of our ipvsadm's and toa-bpf's packages.
        rounds: how many; 0: five, or twenty where instructions cannot be counted.
        file: takes the rows as JSON.

    Raises:
        BuildError: bad input, or something could not be built or measured.
    """
    check(rounds, file)
    store = Store()
    room = build.kernels(store)
    kernel = develop.chosen(debug=False, store=store)
    servers = develop.joint(store)
    stock = store.ensure(room.ipvs_stage(kernel.uname))
    machines: list[tuple[develop.Built, dict[str, Any]]] = [
        (kernel, {"trials": DIRECTOR_TRIALS, "stock": stock}),
        (servers, {"trials": SERVER_TRIALS}),
    ]
    more = f"toa-module, toa-bpf: {servers.title}"
    return measured(Plan, machines, programs_stage(room, tools), rounds, file, ROWS, store=store, more=more)


def measured(
    kind: type[Plan],
    machines: Sequence[tuple[develop.Built, Mapping[str, Any]]],
    programs: Stage,
    rounds: int,
    file: Path | None,
    rows: Sequence[Row],
    *,
    store: Store,
    more: str = "",
) -> list[str]:
    """Let one machine after the other measure, and return the table; a missed limit is a notice.

    Args:
        kind: of the plans.
        machines: of each its kernel, and what else its plan has.
        programs: the stage of our programs.
        rounds: see `Plan`.
        file: takes the rows as JSON.
        rows: of the table.
        store: where everything is built.
        more: for the table's head.

    Raises:
        BuildError: something could not be built or measured.
    """
    root = store.ensure(develop.guest_root(store).stage()) / "root"
    over = store.ensure(programs) / "root"
    accelerator = Accelerator.probe(store.root)
    if accelerator.name == "tcg":
        accelerator = Counted(**accelerator.__dict__)
    work = settings.out() / kind.task
    plans = [
        kind(kernel, root, over, accelerator, rounds, work / kernel.flavour, **fields) for kernel, fields in machines
    ]
    samples = []
    with store.lock(kind.task):
        for plan in plans:
            with progress.step(f"measuring on {plan.kernel.title} in {plan.rounds} rounds"):
                samples += parse(plan.run())
    title = "; ".join(filter(None, (plans[0].title, more)))
    return shown(Report.of(title, samples, plans[0].rounds, rows), file)


def shown(report: Report, file: Path | None) -> list[str]:
    """Save a report for other programs, if there is a file for it, and return its table."""
    if file:
        beside = file.with_name(f".{file.name}.new")
        beside.write_text(json.dumps(report.data(), indent=1) + "\n", encoding="utf-8")
        beside.replace(file)
    if report.missed:
        progress.warn(f"limits were missed: {', '.join(report.missed)}")
    return report.table()


def check(rounds: int, file: Path | None, task: str = "bench-forwarding") -> None:
    """Refuse bad input before anything is built."""
    wrong = []
    if not 0 <= rounds <= _MOST_ROUNDS:
        wrong.append(f"--rounds {rounds}: 1 to {_MOST_ROUNDS}, or 0 for as many as usual")
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        wrong.append(f"--json {file}: {'is a folder' if file.is_dir() else 'its folder does not exist'}")
    if wrong:
        raise BuildError("; ".join(wrong), f"invoke --help {task}")
