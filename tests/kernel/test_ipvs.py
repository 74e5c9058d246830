"""The kernels as built, booted: what they are, and which forwarding methods they take, on every way in.

The kernel of the real server is unpatched, so it shows what the director's patches change, and that these tests can
fail.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernel import build
from pipeline.sandbox import Sandbox
from pipeline.store import Store
from pipeline.vm import Accelerator, Machine, Share

pytestmark = pytest.mark.build

HERE = Path(__file__).resolve().parent
KNOWN, FULLNAT, UNKNOWN = range(5), 5, range(6, 8)  # masq, local node, tunnel, direct routing, bypass
WAYS = ("netlink.ipv4", "netlink.ipv6", "option")

Observed = dict[str, Any]


def _boot(name: str, work: Path) -> Observed:
    store = Store()
    room = build.kernels(store)
    package = build.image(store.ensure(room.stage(name)), name)
    root = store.ensure(room.root.stage()) / "root"
    share = work / "share"
    results = work / "results"
    share.mkdir()
    results.mkdir()
    (share / "guest.py").write_bytes((HERE / "guest.py").read_bytes())
    Sandbox(root).run(
        ["sh", "-ec", "rpm2cpio /build/kernel.rpm >/build/share/cpio; cpio -idm --quiet <cpio; rm cpio"],
        binds={share: "/build/share"},
        ro_binds={package: "/build/kernel.rpm"},
        cwd="/build/share",
        what=f"unpacking {package.name}",
    )
    script = "; ".join(
        [
            "mount -t proc proc /proc",
            "mount -t sysfs sysfs /sys",
            "mount -t tmpfs tmpfs /tmp",
            "mkdir /tmp/results",
            "mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,ro guest /mnt",
            "mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 results /tmp/results",
            "exec python3 /mnt/guest.py",
        ]
    )
    words = "console=ttyS0 quiet panic=-1 root=/dev/root rootfstype=9p ro"
    words += " rootflags=trans=virtio,version=9p2000.L,msize=262144"
    machine = Machine(
        f"kernel-{name}",
        work,
        Accelerator.probe(store.root),
        kernel=share / "boot" / f"vmlinuz-{room.uname(name)}",
        append=f'{words} init=/bin/sh -- -c "{script}"',
        shares=[Share(root, "/dev/root"), Share(share, "guest"), Share(results, "results", readonly=False)],
        network=False,
    )
    with machine:
        machine.wait_for_end(60)
    observations = results / "observed"
    assert observations.exists(), "\n".join(machine.console_tail())
    found = [line.split(" ", 1) for line in observations.read_text(encoding="utf-8").splitlines()]
    observed = {words[0]: ast.literal_eval(words[1]) for words in found}
    assert "failure" not in observed, observed["failure"]
    assert observed["end"] is True
    observed["console"] = machine.console.read_text(encoding="utf-8", errors="replace")
    observed["expected uname"] = room.uname(name)
    return observed


@pytest.fixture(scope="session")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Observed]:
    """What a flavour's kernel showed; each boots once."""
    seen: dict[str, Observed] = {}

    def observed(name: str) -> Observed:
        if name not in seen:
            seen[name] = _boot(name, tmp_path_factory.mktemp(f"kernel-{name}"))
        return seen[name]

    return observed


@pytest.mark.parametrize("name", build.flavours())
def test_it_is_the_kernel_that_was_built(booted: Callable[[str], Observed], name: str) -> None:
    seen = booted(name)
    assert seen["uname"] == seen["expected uname"]
    assert build.STAMP in seen["version"]
    assert "(lvsforge@lvsforge)" in seen["version"]


@pytest.mark.parametrize("name", build.flavours())
def test_everything_of_ipvs_loads(booted: Callable[[str], Observed], name: str) -> None:
    seen = booted(name)
    assert seen["ip_vs"] == "ok"
    assert len(seen["schedulers"]) == 14
    assert {k: v for k, v in {**seen["schedulers"], **seen["modules"]}.items() if v != "ok"} == {}
    assert seen["btf"] > 1_000_000


@pytest.mark.parametrize("name", build.flavours())
def test_nothing_warns(booted: Callable[[str], Observed], name: str) -> None:
    console = booted(name)["console"]
    for word in ("WARNING:", "BUG:", "Oops", "Traceback", "Call Trace"):
        assert word not in console


@pytest.mark.parametrize("name", build.flavours())
@pytest.mark.parametrize("way", WAYS)
def test_known_methods_are_taken(booted: Callable[[str], Observed], name: str, way: str) -> None:
    seen = booted(name)
    for method in KNOWN:
        assert seen[f"{way}.added"][method] == "ok", method
        assert seen[f"{way}.edited"][method] == "ok", method
        assert seen[f"{way}.kept"][method] == [method]


@pytest.mark.parametrize("way", WAYS)
def test_director_takes_fullnat(booted: Callable[[str], Observed], way: str) -> None:
    seen = booted("lvs")
    assert seen[f"{way}.added"][FULLNAT] == "ok"
    assert seen[f"{way}.edited"][FULLNAT] == "ok"
    assert seen[f"{way}.kept"][FULLNAT] == [FULLNAT]


@pytest.mark.parametrize("way", WAYS)
def test_director_refuses_unknown_methods(booted: Callable[[str], Observed], way: str) -> None:
    seen = booted("lvs")
    for method in UNKNOWN:
        assert seen[f"{way}.added"][method] == "EINVAL", method
        assert seen[f"{way}.edited"][method] == "EINVAL", method
        assert seen[f"{way}.kept"][method] == [0], "a refused edit changed the destination"
    assert seen["client.reaches_local_listener"] is None


@pytest.mark.parametrize("way", WAYS)
def test_mainline_takes_unknown_methods(booted: Callable[[str], Observed], way: str) -> None:
    """Without this the test above could pass on any kernel; when it fails, mainline has mended it: drop our patch."""
    seen = booted("rs")
    for method in (FULLNAT, *UNKNOWN):
        assert seen[f"{way}.added"][method] == "ok", method
        assert seen[f"{way}.edited"][method] == "ok", method
    assert seen["client.reaches_local_listener"] is True


def test_director_as_backup_drops_what_it_cannot_forward(booted: Callable[[str], Observed]) -> None:
    seen = booted("lvs")
    assert seen["sync.backup"] == "ok"
    assert seen["sync.connections"] == [1000 + m for m in KNOWN] + [2000 + m for m in KNOWN] + [3000]


def test_mainline_as_backup_keeps_unknown_methods(booted: Callable[[str], Observed]) -> None:
    seen = booted("rs")
    assert seen["sync.connections"] == [1000 + m for m in range(8)] + [2000 + m for m in range(8)] + [3000]
