"""What this machine has and lacks, each lack with the command that mends it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import apt, run, settings, vm
from pipeline.errors import BuildError
from pipeline.sandbox import require_overlays
from pipeline.signing import SigningKey
from pipeline.store import MORE_SPACE, Store

# Measured with `du -sh` after `make image` from empty: 8.5, and 4 more while a kernel is packaged; rounded up.
STORE_GB = 15
# Two linkers over vmlinux with debug information, and a guest of 1 GiB beside them.
MEMORY_GB = 4
_PROGRAMS = {  # program → Debian package, why
    "mmdebstrap": ("mmdebstrap", "makes the build roots"),
    "bwrap": ("bubblewrap", "enters a build root"),
    "qemu-system-x86_64": ("qemu-system-x86", "boots what was built"),
    "qemu-img": ("qemu-utils", "makes overlays and compressed images"),
    "packer": ("packer", "bakes the images"),
    "ip": ("iproute2", "makes the links of a lab"),
    "sysctl": ("procps", "prepares the networks of a lab"),
    "ssh": ("openssh-client", "reaches a booted image"),
    "git": ("git", "holds patch series as commits"),
    "patch": ("patch", "applies a series"),
    "curl": ("curl", "fetches sources"),
    "xz": ("xz-utils", "unpacks tarballs"),
    "zstd": ("zstd", "packs bundles"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        good: whether the machine has it.
        subject: what was looked at.
        fact: what was found.
        mend: the command that mends it, where it is not good.
    """

    good: bool
    subject: str
    fact: str
    mend: str = ""


def examine(store: Store) -> Iterator[Finding]:
    """Look at the machine; starts a tiny guest to find the accelerator that really works."""
    root = os.geteuid() == 0
    yield Finding(root, "user", "root" if root else "not root: root file systems cannot be made", "sudo make image")
    for program, (package, why) in _PROGRAMS.items():
        found = shutil.which(program, path=run.environment()["PATH"])
        yield Finding(found is not None, program, found or f"missing; it {why}", f"apt-get install {package}")
    try:
        suites = ", ".join(f"{a.suite}" for a in apt.archives())
        apt.main_archive("bookworm")
        yield Finding(True, "archive", f"apt knows {suites}")
    except BuildError as error:
        yield Finding(False, "archive", error.message, error.hint)
    memory = _memory_gb()
    yield Finding(memory >= MEMORY_GB, "memory", f"{memory:.0f} GB, {MEMORY_GB} GB are needed", "use a larger machine")
    yield Finding(True, "processors", f"{settings.current.jobs}")
    store.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store.root).free / 1e9
    yield Finding(
        free >= STORE_GB or _size_hint(store) > 0,
        "disk",
        f"{free:.0f} GB free under {store.root}; a full build from empty uses up to {STORE_GB} GB",
        MORE_SPACE,
    )
    try:
        if root:
            require_overlays(store.root)
            yield Finding(True, "overlays", f"can be mounted under {store.root}")
    except BuildError as error:
        yield Finding(False, "overlays", error.message, error.hint)
    try:
        accelerator = vm.Accelerator.probe(store.root, anew=True)  # who asks may just have mended it
        slow = f"   (machines are emulated, which is slow: {accelerator.why})" if accelerator.why else ""
        yield Finding(True, "accelerator", " ".join(accelerator.options) + slow)
    except BuildError as error:
        yield Finding(False, "accelerator", error.message, error.hint)
    key = SigningKey.find()
    yield Finding(True, "signing key", str(key.file) if key.exists else f"none yet; one is made at {key.file}")


def _memory_gb() -> float:
    match = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.M)
    return int(match[1]) * 1024 / 1e9 if match else 0.0


def _size_hint(store: Store) -> int:
    """How many kernels the store already holds: a warm store needs little more room."""
    return len(store.results("kernel-base"))


def show(store: Store) -> None:
    """Print the report.

    Raises:
        BuildError: the machine lacks something.
    """
    findings = list(examine(store))
    for finding in findings:
        print(f"{'✓' if finding.good else '✗'} {finding.subject:<18} {finding.fact}")
        if not finding.good:
            print(f"  → {finding.mend}")
    bad = [finding.subject for finding in findings if not finding.good]
    if bad:
        raise BuildError(f"this machine lacks: {', '.join(bad)}", "make setup   (and the lines marked → above)")
