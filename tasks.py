"""The tasks of lvsforge: names, flags and wiring. The work is in the rooms; those of a cluster: provision/tasks.py.

Run `invoke --list` for the contents and `invoke --help TASK` for one task.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from invoke.collection import Collection

from image import bake
from kernel import bench, defence, develop, scale
from kernel import build as kernel_build
from pipeline import doctor as doctoring
from pipeline import series as series_tasks
from pipeline import sources, testing
from pipeline import status as reporting
from pipeline.cli import command
from pipeline.settings import TOP
from pipeline.store import Store
from provision import tasks as provision
from provision.lab import lab, report
from tools import build as tools_build

_ROLE = {"role": "director or realserver; both when not given"}
_FLAVOUR = {"flavour": "lvs (director) or rs (real server); both when not given"}


def _show(lines: list[str]) -> None:
    print("\n".join(lines))


# --- everything


@command("offline", "locked", "dry_run", "keep")
def image(_c: Any) -> None:
    """Build everything: fetch, kernels, tools, then bake, boot and check both images, and publish the repository."""
    bake.everything()


@command(
    help={"k": "only tests whose name matches this pytest expression", "fast": "only what needs no built artefact"}
)
def test(_c: Any, k: str = "", fast: bool = False) -> None:
    """Run the tests; what they need is built first."""
    testing.run_all(k, fast=fast, build=bake.everything)


@command(
    "offline",
    "locked",
    "keep",
    name="test-kernel",
    help={
        "k": "only tests whose name matches this pytest expression",
        "debug": "on a build with KASAN, lockdep, kmemleak and other checks, compiled once for that",
        "flavour": "whose kernel: lvs (director), rs (real server), joint (rs with the IPVS of lvs), debian (Debian's)",
    },
)
def test_kernel(_c: Any, k: str = "", debug: bool = False, flavour: str = develop.TESTED) -> None:
    """Compile what changed in out/work/kernel-lvs (without it: the packages' kernel), boot it and run its tests."""
    develop.test(k, debug=debug, flavour=flavour)


@command(
    "offline",
    "locked",
    name="bench-forwarding",
    help={
        "json": "a file that takes the rows as JSON",
        "rounds": "how many; 0: five, or twenty where instructions cannot be counted",
    },
)
def bench_forwarding(_c: Any, json: str = "", rounds: int = 0) -> None:
    """Compare FULLNAT with stock NAT, and stock NAT with that of the unpatched kernel; about ten minutes."""
    tools = [tools_build.stage("ipvsadm"), tools_build.stage("toa-bpf")]
    _show(bench.forwarding(tools, rounds, Path(json) if json else None))


@command(
    "offline",
    "locked",
    name="bench-keepalived",
    help={"json": "a file that takes the rows as JSON", "rounds": "how many; 0: three"},
)
def bench_keepalived(_c: Any, json: str = "", rounds: int = 0) -> None:
    """Compare keepalived with FULLNAT with stock keepalived with NAT, 1,000 virtual servers each; 20 minutes."""
    room = tools_build.room()
    stages = room.stage("ipvsadm"), room.stage("keepalived"), room.variant("keepalived", "stock", series=False)
    _show(scale.keepalived(*stages, rounds, Path(json) if json else None))


@command(
    "offline",
    "locked",
    name="bench-synproxy",
    help={
        "json": "a file that takes the rows as JSON",
        "rounds": "how many; 0: five, or ten where instructions cannot be counted",
    },
)
def bench_synproxy(_c: Any, json: str = "", rounds: int = 0) -> None:
    """Compare SYNPROXY with that of nftables, with SYN cookies, and with going without it; about half an hour."""
    _show(defence.synproxy(tools_build.stage("ipvsadm"), rounds, Path(json) if json else None))


@command()
def lint(_c: Any) -> None:
    """Run only the linters (they are tests too)."""
    testing.pytest("tests/unit/test_linters.py")


@command(help={"verify": "hash the results' files again (packages, images; not root file systems and build trees)"})
def status(_c: Any, verify: bool = False) -> None:
    """Show each stage, its key, whether it is built, and why it would be rebuilt."""
    _show(reporting.table(reporting.report(bake.final_stages(), Store(), verify=verify)))


@command()
def doctor(_c: Any) -> None:
    """Look at what this machine has and lacks, and how to mend it."""
    doctoring.show(Store())


@command(
    "dry_run",
    help={
        "store": "prune the artefact store instead",
        "keep_results": "how many of the newest results of each stage the store keeps; 0: none",
    },
)
def clean(_c: Any, store: bool = False, keep_results: int = 0) -> None:
    """Remove what is in out/ but for packages, unpacked trees and a lab; with --store the artefact store's results."""
    bake.clean(keep_results, the_store=store)


# --- sources


@command(name="sources-list", help={"verify": "hash the stored tarballs again"})
def sources_list(_c: Any, verify: bool = False) -> None:
    """List the pinned sources, where they come from and whether they are here."""
    _show(sources.listing(verify=verify))


@command("locked", "offline")
def fetch(_c: Any) -> None:
    """Fetch every source and root file system, so that the other tasks with --offline work with it."""
    bake.fetch(lab.root(Store()))


@command("dry_run", name="sources-update", help={"name": "only this source"})
def sources_update(_c: Any, name: str = "") -> None:
    """Pin the newest release of each source's series in sources.yaml."""
    _show(sources.update_pins(name or None))


@command(name="refresh-roots")
def refresh_roots(_c: Any) -> None:
    """Take the archive's newest packages into the build roots and the images' base."""
    for root in [*bake.roots(), lab.root(Store())]:
        root.refresh()


@command("dry_run", help={"out": "the file to write"})
def bundle(_c: Any, out: str = "lvsforge-bundle.tar") -> None:
    """Pack what `invoke fetch` fetches for a builder without a network."""
    bake.bundle(Path(out), lab.root(Store()))


@command(name="bundle-load", help={"file": "what `invoke bundle` wrote"}, positional=["file"])
def bundle_load(_c: Any, file: str) -> None:
    """Take a bundle into this machine's store; then every task with --offline works with it."""
    bake.bundle_load(Path(file))


# --- patch series


@command(help={"series": "kernel/lvs, kernel/rs, tools/ipvsadm, …", "dest": "the new tree"}, positional=["series"])
def unpack(_c: Any, series: str, dest: str = "") -> None:
    """Unpack a source with its series applied as git commits, to work on it."""
    _show(series_tasks.unpack(series, Path(dest) if dest else None))


@command(
    "dry_run",
    name="series-regenerate",
    help={"series": "whose patches are written", "tree": "the git tree"},
    positional=["series"],
)
def series_regenerate(_c: Any, series: str, tree: str = "") -> None:
    """Write a series' patches anew from the commits of an unpacked tree."""
    _show(series_tasks.regenerate(series, Path(tree) if tree else None))


@command(
    "dry_run",
    name="series-rebase",
    help={"series": "which", "version": "the source's other version"},
    positional=["series"],
)
def series_rebase(_c: Any, series: str, version: str = "") -> None:
    """Carry a series over to another version of its source; names the patch, file and hunk that fails."""
    _show(series_tasks.rebase(series, version))


@command(name="series-lint")
def series_lint(_c: Any) -> None:
    """Check every series: mail headers, order, zero fuzz, and checkpatch for kernels."""
    _show(series_tasks.lint())


# --- packages


@command("offline", "locked", "dry_run", name="build-kernel", help=_FLAVOUR)
def build_kernel(_c: Any, flavour: str = "") -> None:
    """Build the kernel RPMs."""
    bake.build(kernel_build.stages(flavour))


@command(
    "offline",
    "locked",
    "dry_run",
    name="build-tools",
    help={"tool": "ipvsadm, keepalived, quagga or toa-bpf; all when not given"},
)
def build_tools(_c: Any, tool: str = "") -> None:
    """Build the ipvsadm, keepalived, routing and toa-bpf RPMs."""
    bake.build(tools_build.stages(tool))


@command("offline", "locked", "dry_run", name="build-repository")
def build_repository(_c: Any) -> None:
    """Sign all packages and publish them in out/repository, beside older versions."""
    bake.publish()


@command(name="signing-key")
def signing_key(_c: Any) -> None:
    """Show the key that signs packages, and make one if there is none."""
    _show(bake.signing_key())


# --- images


@command("offline", "locked", "dry_run", "keep", name="bake-image", help=_ROLE)
def bake_image(_c: Any, role: str = "") -> None:
    """Bake a golden image into out/."""
    bake.bake(role)


@command("keep", name="check-image", help=_ROLE)
def check_image(_c: Any, role: str = "") -> None:
    """Boot a throw-away overlay of an image and check the running machine."""
    bake.check(role)


@command(help={"role": "director or realserver", "seed": "a NoCloud ISO (see render); else a throw-away one"})
def console(_c: Any, role: str, seed: str = "") -> None:
    """Boot a throw-away overlay of an image with its console on this terminal; the ssh line that it prints logs in."""
    bake.console(role, Path(seed) if seed else None)


@command(
    "offline",
    name="lab-up",
    help={
        "cluster": "the cluster file (provision/examples/)",
        **provision.LAB_DIR,
        "memory": "of each machine, in MiB",
        "image_director": "a qcow2 file; without it this checkout's image, or the newest in out/",
        "image_realserver": "likewise",
    },
)
def lab_up(
    _c: Any,
    cluster: str,
    dir: str = provision.LAB,
    memory: int = 512,
    image_director: str = "",
    image_realserver: str = "",
) -> None:
    """Boot a cluster from golden images and its seeds on this machine, with a router and clients; it stays up."""
    given = {"director": image_director, "realserver": image_realserver}
    parts = lab.Parts(image=partial(bake.ready, given), toa_bpf=bake.toa_bpf, routing=bake.routing)
    _show(report.welcome(lab.up(Path(cluster), TOP / dir, memory, parts)))


namespace = Collection.from_module(__import__(__name__))
for _task in Collection.from_module(provision).tasks.values():
    namespace.add_task(_task)
