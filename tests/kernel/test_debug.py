"""What the debug build is for: that its checks are on, and the tests that run inside the kernel."""

from __future__ import annotations

import re

import pytest

from tests.kernel.machine import Guest

pytestmark = [pytest.mark.build, pytest.mark.guest]
CHECKS = (
    "KASAN", "PROVE_LOCKING", "PROVE_RCU", "DEBUG_KMEMLEAK", "DEBUG_OBJECTS_TIMERS", "DEBUG_OBJECTS_RCU_HEAD",
    "DEBUG_OBJECTS_WORK", "DEBUG_LIST", "DEBUG_ATOMIC_SLEEP", "SLUB_DEBUG", "DEBUG_NET", "UBSAN", "KUNIT",
    "IP_VS_DEBUG", "INIT_STACK_NONE", "KASAN_STACK",
)  # fmt: skip


@pytest.fixture
def debug(guest: Guest) -> Guest:
    if not guest.kernel.debug:
        pytest.skip(f"{guest.kernel.title} is no debug build: invoke test-kernel --debug")
    return guest


def test_the_checks_are_compiled_in(debug: Guest) -> None:
    config = debug.run("zcat", "/proc/config.gz").out.splitlines()
    assert [name for name in CHECKS if f"CONFIG_{name}=y" not in config] == []


def test_the_checks_are_at_work(debug: Guest) -> None:
    """Lockdep ends with its first report and kmemleak when it is short of memory: nothing would be found after that."""
    assert "debug_locks:                             1" in debug.read("/proc/lockdep_stats")
    debug.write("/sys/kernel/debug/kmemleak", "scan=off")
    assert debug.read("/proc/sys/kernel/prove_locking").strip() == "1"
    used = re.search(r"(?m)^pool_used +:(\d+)", debug.read("/sys/kernel/debug/debug_objects/stats"))
    assert used, "the line in which debug objects are counted has another name"
    assert int(used[1]) > 100, "debug objects turned themselves off: they gave all back"


def test_the_kernels_own_unit_tests(debug: Guest) -> None:
    """KUnit ran them when ip_vs was loaded."""
    folder = "/sys/kernel/debug/kunit"
    suites = [name for name in debug.ask("listing", path=folder) if "vs" in name or "fnat" in name]
    assert suites, "no suite of IPVS: is its option in kernel/lvs/debug.config?"
    for suite in suites:
        results = debug.read(f"{folder}/{suite}/results")
        assert re.search(r"(?m)^ *ok \d+", results), results
        assert "not ok" not in results, results
