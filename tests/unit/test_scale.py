"""What `invoke bench-keepalived` configures, what it takes for done, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel import bench, scale
from kernel.inside import scale as inside
from pipeline.errors import BuildError
from pipeline.store import Stage


def test_a_configuration_and_what_must_come_of_it() -> None:
    plan = inside.Plan(2, 2, 3, "fullnat")
    text = plan.text()
    assert text.splitlines()[:3] == ["local_address_group all {", "    10.200.0.1-3", "}"]
    assert text.count("virtual_server ") == 2
    assert text.count("lvs_method FNAT") == text.count("laddr_group_name all") == 2
    assert text.count("TCP_CHECK {") == text.count("real_server ") == 4
    assert text.count("{") == text.count("}")
    locals_ = [f"10.200.0.{n}" for n in (1, 2, 3)]
    assert plan.lines() == sorted(
        line
        for vip, reals in (("10.1.0.1", ("10.2.0.1", "10.2.0.2")), ("10.1.0.2", ("10.2.0.3", "10.2.0.4")))
        for line in (
            f"-A -t {vip}:80 -s rr",
            *(f"-P -t {vip}:80 -z {local}" for local in locals_),
            *(f"-a -t {vip}:80 -r {real}:80 -b -w 1" for real in reals),
        )
    )


@pytest.mark.parametrize("side", ["nat", "stock"])
def test_the_other_sides_have_no_local_addresses(side: str) -> None:
    plan = inside.Plan(3, 2, 16, side)
    assert "local" not in plan.text()
    assert "laddr" not in plan.text()
    assert "FNAT" not in plan.text()
    assert {line.split()[0] for line in plan.lines()} == {"-A", "-a"}
    assert all(" -m " in line for line in plan.lines() if line.startswith("-a"))


def test_the_size_is_the_one_that_was_asked_for() -> None:
    plan = inside.Plan(scale.SERVICES, scale.REALS, scale.LOCALS, "fullnat")
    lines = plan.lines()
    assert [sum(line.startswith(word) for line in lines) for word in ("-A", "-a", "-P")] == [1000, 8000, 16000]
    assert len(set(lines)) == 25_000
    assert len(set(plan.vips) | set(plan.reals) | set(plan.locals)) == 1000 + 8000 + 16


def test_a_reload_changes_one_real_server() -> None:
    plan = inside.Plan(10, 8, 16, "fullnat")
    text = set(plan.text(heavy=True).splitlines()) - set(plan.text().splitlines())
    assert text == {f"        weight {inside.HEAVY}"}
    changed = set(plan.lines(heavy=True)) ^ set(plan.lines())
    assert len(changed) == 2


def test_the_rows() -> None:
    samples = [
        bench.Sample(trial, side, number, value * number)
        for number in (1, 2, 3)
        for trial in ("start", "reload", "rest")
        for side, value in (("fullnat", 120.0), ("nat", 105.0), ("stock", 100.0))
    ]
    report = bench.Report.of("title", samples, 3, scale.ROWS)
    assert {row["name"]: row["ratio"] for row in report.data()} == {
        "start": 1.2, "reload": 1.2, "rest": 1.2, "start-nat": 1.05, "reload-nat": 1.05, "rest-nat": 1.05,
    }  # fmt: skip
    assert report.missed == ["start", "reload", "rest"]
    assert any(line.startswith("start-nat") and "met" in line for line in report.table())


def test_bad_input_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    def never(_: Path) -> None:
        raise AssertionError("built")

    stage = Stage("none", {}, never)
    with pytest.raises(BuildError, match="--rounds 101") as error:
        scale.keepalived(stage, stage, stage, 101, tmp_path / "none" / "rows.json")
    assert "its folder does not exist" in str(error.value)
    assert "invoke --help bench-keepalived" in error.value.hint
