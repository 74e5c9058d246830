"""The arithmetic and the table of `invoke bench-forwarding`, on figures that a run left; what goes into the machine."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest

from kernel import bench, build, develop
from kernel.inside import forwarding
from pipeline import progress, vm
from pipeline.errors import BuildError
from pipeline.store import Stage, Store

ROUNDS = 3
# Three rounds with -icount, of a series that was too slow with bulk data in small segments.
FIGURES: dict[tuple[str, str], list[float]] = {
    ("connrate-v4", "fullnat"): [2636.1, 2635.1, 2637.6],
    ("connrate-v4", "nat"): [2753.3, 2718.2, 2747.2],
    ("connrate-v4", "stock"): [2734.5, 2738.4, 2743.2],
    ("connrate-v6", "fullnat"): [2394.5, 2395.0, 2387.3],
    ("connrate-v6", "nat"): [2471.7, 2473.4, 2467.3],
    ("connrate-v6", "stock"): [2473.7, 2458.2, 2474.3],
    ("bulk-v4-up-large", "fullnat"): [5917.5, 5883.2, 5828.5],
    ("bulk-v4-up-large", "nat"): [6029.4, 6017.8, 6006.4],
    ("bulk-v4-up-large", "stock"): [6022.1, 5997.5, 6034.0],
    ("bulk-v4-down-large", "fullnat"): [5892.0, 5874.0, 5905.4],
    ("bulk-v4-down-large", "nat"): [5904.6, 5945.8, 5961.7],
    ("bulk-v4-down-large", "stock"): [5974.6, 5951.9, 5916.8],
    ("bulk-v4-up-small", "fullnat"): [599.3, 595.5, 597.3],
    ("bulk-v4-up-small", "nat"): [642.5, 643.5, 645.7],
    ("bulk-v4-up-small", "stock"): [643.4, 645.2, 643.0],
    ("bulk-v4-down-small", "fullnat"): [591.5, 591.4, 595.2],
    ("bulk-v4-down-small", "nat"): [606.0, 607.7, 612.9],
    ("bulk-v4-down-small", "stock"): [612.9, 607.1, 607.4],
    ("bulk-v6-up-large", "fullnat"): [5657.6, 5655.0, 5631.3],
    ("bulk-v6-up-large", "nat"): [5748.5, 5771.3, 5746.5],
    ("bulk-v6-up-large", "stock"): [5758.0, 5747.3, 5769.9],
    ("bulk-v6-down-large", "fullnat"): [5550.0, 5591.0, 5554.7],
    ("bulk-v6-down-large", "nat"): [5589.8, 5565.5, 5609.4],
    ("bulk-v6-down-large", "stock"): [5622.8, 5628.2, 5599.0],
    ("bulk-v6-up-small", "fullnat"): [522.2, 520.7, 516.0],
    ("bulk-v6-up-small", "nat"): [573.4, 574.0, 576.3],
    ("bulk-v6-up-small", "stock"): [576.1, 571.3, 570.4],
    ("bulk-v6-down-small", "fullnat"): [507.5, 503.7, 506.5],
    ("bulk-v6-down-small", "nat"): [507.1, 507.8, 507.4],
    ("bulk-v6-down-small", "stock"): [506.7, 507.2, 509.6],
    ("connrate-ports", "empty"): [2634.9, 2631.0, 2627.9],
    ("connrate-ports", "scattered"): [2649.0, 2649.4, 2648.7],
    ("connrate-ports", "block"): [2646.9, 2649.6, 2645.3],
    ("toa-v4", "on"): [2684.0, 2681.5, 2688.2],
    ("toa-v4", "off"): [2702.3, 2699.8, 2704.1],
    ("toa-v6", "on"): [2450.9, 2449.0, 2452.7],
    ("toa-v6", "off"): [2466.0, 2468.3, 2463.9],
    ("shown-v4", "none"): [2684.0, 2681.5, 2688.2],
    ("shown-v4", "module"): [2680.1, 2679.2, 2683.3],
    ("shown-v4", "bpf"): [2650.6, 2648.8, 2655.9],
    ("shown-v6", "none"): [2450.9, 2449.0, 2452.7],
    ("shown-v6", "module"): [2448.8, 2446.1, 2450.0],
    ("shown-v6", "bpf"): [2421.7, 2420.3, 2425.5],
    ("memory", "fullnat"): [451.54, 451.51, 451.54],
    ("memory", "stock"): [341.31, 341.36, 341.44],
}
TCG = vm.Accelerator("tcg", "qemu64", 6.0, "no kvm")
KVM = vm.Accelerator("kvm", "host", 1.0)


def lines(figures: dict[tuple[str, str], list[float]]) -> list[str]:
    """What the machine leaves."""
    rows: list[dict[str, object]] = []
    for number in range(1, ROUNDS + 1):
        rows.append({"begins": number})
        for (trial, side), values in figures.items():
            row: dict[str, object] = {"trial": trial, "side": side, "round": number, "value": values[number - 1]}
            rows.append(row if trial == "memory" else {**row, "user": 11, "kernel": 69})
    return [json.dumps(row) for row in [*rows, {"ends": ROUNDS}]]


def report(changed: dict[tuple[str, str], list[float]] | None = None) -> bench.Report:
    text = "\n".join(lines({**FIGURES, **(changed or {})}))
    return bench.Report.of("a kernel, linux 6.12.107", bench.parse(text), ROUNDS)


# --- arithmetic


def test_a_comparison_is_the_median_of_the_rounds_ratios() -> None:
    """Not the ratio of the medians: what disturbs a round disturbs both of its figures."""
    samples = bench.parse("\n".join(lines({("t", "a"): [90.0, 60.0, 99.0], ("t", "b"): [100.0, 50.0, 90.0]})))
    result = bench.compare(bench.Comparison("t", "a", "b"), samples, ROUNDS)
    assert (result.low, result.ratio, result.high, result.rounds) == pytest.approx((0.9, 1.1, 1.2, 3))
    assert (result.over, result.under) == (90.0, 90.0)
    assert result.user == pytest.approx(11 / 80)


def test_an_even_number_of_rounds_has_a_median_too() -> None:
    samples = [
        bench.Sample("t", side, n, value) for side, n, value in (("a", 1, 8), ("a", 2, 10), ("b", 1, 10), ("b", 2, 10))
    ]
    result = bench.compare(bench.Comparison("t", "a", "b"), samples, 2)
    assert result.ratio == pytest.approx(0.9)
    assert result.user is None


def test_the_rows_of_a_run() -> None:
    rows = {row["name"]: row for row in report().data()}
    assert list(rows) == [
        "bulk-v4",
        "bulk-v6",
        "connrate-v4",
        "connrate-v6",
        "stock-nat-unchanged",
        "connrate-90pct-ports",
        "memory-per-connection",
        "toa-insert",
        "toa-module",
        "toa-bpf",
    ]
    assert rows["bulk-v4"] == {"name": "bulk-v4", "ratio": 0.9254, "low": 0.9250, "high": 0.9328, "rounds": 3}
    assert rows["connrate-v6"]["ratio"] == 0.9683
    assert rows["stock-nat-unchanged"]["ratio"] >= 0.99
    assert rows["connrate-90pct-ports"]["ratio"] == 1.0066
    assert rows["memory-per-connection"]["ratio"] == 1.3227
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows.values())


def test_the_limits_are_those_that_were_agreed() -> None:
    assert {row.name: (row.limit, row.lower_is_better) for row in bench.ROWS} == {
        "bulk-v4": (0.95, False),
        "bulk-v6": (0.95, False),
        "connrate-v4": (0.90, False),
        "connrate-v6": (0.90, False),
        "stock-nat-unchanged": (0.99, False),
        "connrate-90pct-ports": (0.80, False),
        "memory-per-connection": (1.35, True),
        "toa-insert": (0.98, False),
        "toa-module": (0.98, False),
        "toa-bpf": (0.98, False),
    }


@pytest.mark.parametrize(("pool", "rate"), [("scattered", 2000.0), ("block", 1900.0)])
def test_the_worst_comparison_is_the_row(pool: str, rate: float) -> None:
    row, results = report({("connrate-ports", pool): [rate] * 3}).rows[5]
    assert row.name == "connrate-90pct-ports"
    assert results[0].comparison.over == pool
    assert results[0].ratio == pytest.approx(rate / 2631.0)
    assert len(results) == 2


def test_what_should_be_low_is_worst_when_it_is_high() -> None:
    memory = next(row for row in bench.ROWS if row.lower_is_better)
    low, high = (
        bench.Result(bench.Comparison("t", side, "b"), ratio, ratio, ratio, 1, ratio, 1.0, None)
        for side, ratio in (("a", 1.2), ("c", 1.3))
    )
    assert bench.worst(memory, [high, low]) is high
    assert bench.worst(bench.ROWS[0], [high, low]) is low
    assert memory.met(1.35)
    assert not memory.met(1.351)
    assert bench.ROWS[0].met(0.95)
    assert not bench.ROWS[0].met(0.9499)


def test_a_figure_that_is_missing_is_an_error() -> None:
    samples = [
        s for s in bench.parse("\n".join(lines(FIGURES))) if (s.trial, s.side, s.round) != ("memory", "stock", 2)
    ]
    with pytest.raises(BuildError, match=r"memory, stock: not measured in round 2"):
        bench.Report.of("x", samples, ROUNDS)


def test_a_figure_that_is_none_is_an_error() -> None:
    with pytest.raises(BuildError, match="not a figure"):
        bench.parse('{"trial": "memory", "side": "stock", "round": 1, "value": 0.0}')


def test_what_the_machine_says_of_a_failure_is_shown() -> None:
    text = "\n".join(
        [*lines(FIGURES)[:5], json.dumps({"error": "$ ipvsadm -R   [status 1]\nFULLNAT is not in the kernel"})]
    )
    with pytest.raises(BuildError) as caught:
        bench.parse(text)
    assert "FULLNAT is not in the kernel" in caught.value.details


# --- the table


def test_the_table_shows_rows_limits_and_verdicts() -> None:
    found = report()
    table = found.table()
    assert table[0] == "a kernel, linux 6.12.107"
    shown = {line.split()[0]: line for line in table[3:10]}
    assert shown["bulk-v4"].split()[1:7] == ["0.925", "0.925", "0.933", ">=", "0.95", "MISSED"]
    assert shown["connrate-v4"].split()[1:7] == ["0.960", "0.957", "0.969", ">=", "0.90", "met"]
    assert shown["memory-per-connection"].split()[4:7] == ["<=", "1.35", "met"]
    assert found.missed == ["bulk-v4", "bulk-v6"]
    assert max(map(len, table)) <= 100
    assert not any(line != line.rstrip() for line in table)


def test_the_table_shows_every_comparison_and_marks_those_that_miss() -> None:
    table = report().table()
    rows = table[table.index("") :]
    for row in bench.ROWS:
        for own in row.comparisons:
            assert sum(f"{own.trial}: {own.over} / {own.under} " in line for line in rows) == 1
    assert [line.split(":")[0] for line in rows if line.startswith("!")] == ["! bulk-v4-up-small", "! bulk-v6-up-small"]
    assert next(line for line in rows if line.startswith("connrate-v4: fullnat")).endswith("14%")


# --- bad input


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("work began before the input was checked")

    monkeypatch.setattr(develop, "chosen", refuse)


@pytest.mark.parametrize(
    ("rounds", "file", "said"),
    [
        (-1, "", "--rounds -1"),
        (101, "", "--rounds 101"),
        (3, "nowhere/rows.json", "its folder does not exist"),
        (3, ".", "is a folder"),
    ],
)
@pytest.mark.usefixtures("nothing_is_built")
def test_bad_input_is_refused_before_anything_is_built(rounds: int, file: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=re.escape(said)):
        bench.forwarding([Stage("x", {}, lambda _: None)], rounds, tmp_path / file if file else None)


@pytest.mark.usefixtures("nothing_is_built")
def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"--rounds 1000.*--json"):
        bench.forwarding([Stage("x", {}, lambda _: None)], 1000, tmp_path)


# --- the whole, without a machine


class Root:
    """A root that is there."""

    def stage(self) -> Stage:
        return Stage("root", {}, lambda _: None)


def plan(accelerator: vm.Accelerator, tmp_path: Path, rounds: int = 0) -> bench.Plan:
    kernel = develop.Built("kernel-lvs 6.12.107-1.abc", "6.12.107-1.abc.lvs", tmp_path / "kernel")
    return bench.Plan(
        kernel, tmp_path, tmp_path, accelerator, rounds, tmp_path / "work", bench.DIRECTOR_TRIALS, tmp_path
    )


def test_a_run_leaves_the_rows_and_warns_of_missed_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = develop.Built("the series", "6.12.107-develop", tmp_path)
    monkeypatch.setattr(develop, "chosen", lambda **_: kernel)
    monkeypatch.setattr(develop, "guest_root", lambda _store: Root())
    monkeypatch.setattr(Store, "ensure", lambda _self, _stage: tmp_path)
    monkeypatch.setattr(vm.Accelerator, "probe", staticmethod(lambda _cache: TCG))
    monkeypatch.setattr(develop, "joint", lambda _store: dataclasses.replace(kernel, title="both"))
    monkeypatch.setattr(build.Kernels, "ipvs_stage", lambda *_: None)
    monkeypatch.setattr(bench, "programs_stage", lambda *_: None)

    def run(own: bench.Plan) -> str:
        shown = own.trials == bench.SERVER_TRIALS
        return "\n".join(lines({key: row for key, row in FIGURES.items() if key[0].startswith("shown") == shown}))

    monkeypatch.setattr(bench.Plan, "run", run)
    progress.configure("plain")
    file = tmp_path / "rows.json"
    file.write_text("older")
    table = bench.forwarding([Stage("ipvsadm", {}, lambda _: None)], ROUNDS, file)
    assert json.loads(file.read_text()) == report().data()
    assert [path.name for path in tmp_path.glob("*rows.json*")] == ["rows.json"]
    assert "the series, linux 6.12.107-develop; 3 rounds; instructions counted" in table[0]
    assert table[0].endswith("both")
    assert "limits were missed: bulk-v4, bulk-v6" in capsys.readouterr().err


def test_instructions_are_counted_where_that_is_possible(tmp_path: Path) -> None:
    counted = bench.Counted(**TCG.__dict__)
    words = " ".join(counted.options)
    assert "thread=single" in words
    assert "-icount shift=1,sleep=on" in words
    assert plan(counted, tmp_path).rounds == 5
    assert "instructions counted" in plan(counted, tmp_path).title


def test_under_kvm_there_are_more_rounds_and_it_says_why(tmp_path: Path) -> None:
    timed = plan(KVM, tmp_path)
    assert timed.rounds == 20
    assert timed.effort.connections > bench.COUNTED.connections
    assert "WALL CLOCK" in timed.title
    assert plan(KVM, tmp_path, 7).rounds == 7


def test_the_machine_finds_everything_that_it_is_told_of(tmp_path: Path) -> None:
    own = plan(bench.Counted(**TCG.__dict__), tmp_path)
    machine = own.machine(tmp_path / "out")
    assert machine.cpus == 1
    tags = {share.tag: share.readonly for share in machine.shares}
    assert tags == {"/dev/root": True, "programs": True, "inside": True, "kernel": True, "stock": True, "out": False}
    for tag in set(tags) - {"/dev/root"}:
        assert f" {tag} {'/mnt/programs' if tag == 'programs' else tag}" in machine.append
    assert len(machine.append) < 2048  # what x86 takes
    told = own.instructions()
    without = dataclasses.replace(own, stock=None)
    assert "stock" not in {share.tag for share in without.machine(tmp_path / "out").shares}
    assert "stock" not in without.machine(tmp_path / "out").append
    assert without.instructions()["stock"] == ""
    assert all(callable(getattr(forwarding.Bench, name)) for name in (*bench.DIRECTOR_TRIALS, *bench.SERVER_TRIALS))
    assert told["ours"] == "/kernel/lib/modules/6.12.107-1.abc.lvs/kernel/net/netfilter/ipvs"
    text = inspect.getsource(forwarding)
    read = set(re.findall(r'plan\["(\w+)"\]', text)) | {f"bytes_{size}" for size in ("large", "small")}
    assert read == set(told)


@pytest.mark.parametrize("effort", [bench.COUNTED, bench.TIMED])
def test_a_pool_has_more_free_ports_than_are_used(effort: bench.Effort) -> None:
    free = forwarding.PORTS * (1 - forwarding.TAKEN)
    assert effort.connections // 2 + 200 < free
    assert effort.half_open < forwarding.PORTS  # of one local address
    assert effort.half_open > 65536 * 3 / 4
    assert all(value > 0 for value in dataclasses.astuple(effort))


def test_a_service_as_ipvsadm_reads_it() -> None:
    assert forwarding.service(4, 80, 80, "-m", "") == [
        "-A -t 192.0.2.1:80 -s rr",
        "-a -t 192.0.2.1:80 -r 10.0.2.11:80 -m",
    ]
    assert forwarding.service(6, 82, 80, "-b", "fd00:2::200") == [
        "-A -t [2001:db8:8::1]:82 -s rr",
        "-P -t [2001:db8:8::1]:82 -z fd00:2::200",
        "-a -t [2001:db8:8::1]:82 -r [fd00:2::11]:80 -b",
    ]
