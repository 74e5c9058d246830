"""The machine under test as fixtures: booted once a session, judged by its kernel's log after every test.

`guest` is the machine, `lab` its namespaces for one test, `site` makes the usual topology in it. A test that asks for
one of them carries the marks `build` and `guest`. A module's `FLAVOURS` are the kernels that it runs on, `STOCK = True`
means all of them; without either it is the director's.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from kernel import develop
from pipeline.errors import BuildError
from pipeline.store import Store
from tests.kernel import machine
from tests.kernel.lab import Lab
from tests.kernel.machine import Guest
from tests.kernel.topology import Site

_DEVELOPED = "tested"  # the parameter for --kernel-under-test
_BRIDGES = re.compile(r"(entered|left) (blocking|disabled|forwarding|allmulticast|promiscuous) (state|mode)")
_REPORT = pytest.StashKey[dict[str, pytest.TestReport]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels")
    group.addoption(
        "--kernel-under-test", type=Path, help="what `invoke test-kernel` built; else the packages' kernels"
    )
    group.addoption("--keep-machine", action="store_true", help="leave the machine of a failed test running")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Which kernels a test boots."""
    if "machines" not in metafunc.fixturenames:
        return
    developed = metafunc.config.getoption("kernel_under_test", None)
    names = [_DEVELOPED] if developed else _flavours(metafunc.module)
    metafunc.parametrize("machines", names, indirect=True, scope="session")


def _flavours(module: Any) -> list[str]:
    return list(getattr(module, "FLAVOURS", ("lvs", "rs") if getattr(module, "STOCK", False) else ("lvs",)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of other kernels than the one under test."""
    option = config.getoption("kernel_under_test", None)
    if not option:
        return
    flavour = develop.Built.load(option).flavour
    others = [item for item in items if flavour not in _flavours(getattr(item, "module", None))]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember how each phase went, and show what the machine said while it did."""
    report = yield
    item.stash.setdefault(_REPORT, {})[report.when or ""] = report
    guest = getattr(item, "funcargs", {}).get("guest")
    if report.failed and isinstance(guest, Guest):
        if guest.alive:
            with contextlib.suppress(AssertionError):
                guest.new_messages()
        told = [line for line in guest.log if not _BRIDGES.search(line)]
        report.sections.append(("the kernel's log", "\n".join(told[-60:])))
        report.sections.append(("the machine's console", "\n".join(guest.machine.console_tail(20))))
    return report


class Machines:
    """One machine at a time with one kernel; another is booted after one that is no longer to be trusted."""

    def __init__(self, kernel: develop.Built, folder: Callable[[], Path], *, may_keep: bool) -> None:
        self.kernel = kernel
        self.folder = folder
        self.may_keep = may_keep
        self.kept = False
        self._stack = contextlib.ExitStack()
        self._guest: Guest | None = None

    def get(self) -> Guest:
        """The machine, booted if there is none that lives."""
        if self._guest is None or not self._guest.alive:
            self.discard()
            booting = machine.booted(self.kernel, self.folder(), Store(), may_keep=self.may_keep)
            self._guest = self._stack.enter_context(booting)
            self._guest.run("modprobe", "ip_vs", seconds=20)
            if self.kernel.debug:  # what was allocated until now is not what is tested
                self._guest.write("/sys/kernel/debug/kmemleak", "clear")
        return self._guest

    def discard(self) -> None:
        """Pull the plug."""
        self._stack.close()
        self._guest = None

    def finish(self) -> None:
        """Take IPVS out of the kernel, look for what it leaves behind, and pull the plug."""
        try:
            if self._guest and self._guest.alive and not self.kept:
                farewell(self._guest)
        finally:
            self.discard()


def farewell(guest: Guest) -> None:
    """Unload IPVS and look for leaks: what it allocated can belong to nobody now."""
    machine.unload(guest)
    leaks = guest.leaks() if guest.kernel.debug else ""
    alarms = guest.alarms()
    if leaks or alarms:
        pytest.fail("\n".join(["after the last test:", *alarms, leaks]), pytrace=False)


@pytest.fixture(scope="session")
def machines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """The machines of one kernel."""
    name = request.param
    option = request.config.getoption("kernel_under_test", None)
    kernel = develop.Built.load(option) if name == _DEVELOPED else develop.packaged(name)

    def folder() -> Path:
        return tmp_path_factory.mktemp(f"machine-{name}")

    found = Machines(kernel, folder, may_keep=bool(request.config.getoption("keep_machine", False)))
    yield found
    found.finish()


@pytest.fixture
def guest(machines: Machines, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """The machine; after the test its kernel's log must hold no report."""
    found = machines.get()
    if early := found.alarms():  # of its boot, of loading ip_vs, or of namespaces that end after the test that had them
        machines.discard()
        pytest.fail("\n".join(["the kernel has reported before this test:", *early]), pytrace=False)
    found.log.clear()
    yield found
    if machines.kept:
        return
    if not found.alive:
        pytest.fail("the machine is gone", pytrace=False)
    if alarms := found.alarms():
        # One report can silence the next (lockdep turns itself off), so the next test gets another machine.
        machines.discard()
        pytest.fail("\n".join(["the kernel reports:", *alarms]), pytrace=False)


@pytest.fixture
def lab(guest: Guest, machines: Machines, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Namespaces for one test."""
    found = Lab(guest)
    yield found
    report = request.node.stash.get(_REPORT, {}).get("call")
    if machines.may_keep and report is not None and report.failed:
        machines.kept = True
        print(guest.keep())
        return
    try:
        found.close()
    except (BuildError, AssertionError):
        guest.close()  # what it still holds would be the next test's trouble
        raise


@pytest.fixture
def site(lab: Lab) -> Callable[..., Site]:
    """Makes a topology; see `Site` for what it takes."""

    def make(**plan: Any) -> Site:
        return Site(lab, **plan)

    return make
