"""Hosts that are roots on this machine, in which a shell runs every script for real.

The programs of a host that are not there (systemctl, keepalived, zebra …) write down how they were called; those that
work on files (tar, cp, cmp, chown) are this machine's own.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import BuildError
from pipeline.sandbox import Overlay, Sandbox
from provision import apply as applying
from provision import cluster as clusters
from provision.host import Host
from provision.model import Cluster
from provision.remote import Answer, Remote, braced
from tests.unit.clusters import OSPF

IMAGE = Path(__file__).parents[2] / "image/common/rootfs"

# What a test has whose hosts are here.
IN_ROOTS = [
    pytest.mark.runs("bwrap", "unshare"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts an overlay over /usr, which only root may"),
]

# Says how it was called; fails when the test says so; the timer is a file.
FAKE = """#!/bin/sh
name=${0##*/}
case "$name $*" in
    "systemctl is-active --quiet lvs-rollback.timer") [ -e /var/lib/timer ]; exit ;;
    "systemctl is-active --quiet lvs-rollback.service") exit 3 ;;
    "systemctl stop lvs-rollback.timer") [ -e /var/lib/timer ] || exit 5; rm /var/lib/timer; exit 0 ;;
    "systemctl reset-failed"*) exit 1 ;;
    systemd-run*) : >/var/lib/timer ;;
    "sysctl -e -q -p"*) sed 's/^/restored: /' "$4" >>/var/lib/calls ;;
    "sysctl -e "*) shift; for key; do echo "$key = 7"; done; exit 0 ;;
    "ipvsadm -Ln") cat /var/lib/table 2>/dev/null ;;
    "ipvsadm -Gn") cat /var/lib/ipvsadm 2>/dev/null; : >/var/lib/ipvsadm ;;
    "ip -4 route show proto 254") cat /var/lib/routes 2>/dev/null ;;
    "ip -o address show") cat /var/lib/addresses 2>/dev/null ;;
esac
echo "$name $*" >>/var/lib/calls
! grep -qxF -- "$name $*" /var/lib/failing 2>/dev/null
"""
# A checker that reads: a file with the word `broken` in it does not pass. Routing daemons say so, and exit with 0.
CHECKER = """#!/bin/sh
for file; do :; done
case "$*" in *new*) ;; *) exit 9 ;; esac
case ${0##*/} in
    keepalived) ! grep -rq broken "${file%/*}" || { echo "$file: broken" >&2; exit 1; } ;;
    *) ! grep -q broken "$file" || echo "No such command on config line 2: hostname broken" >&2 ;;
esac
"""
FAKES = ("systemctl", "systemd-run", "ipvsadm", "ip", "networkctl", "cloud-init", "logger", "toa-bpf", "nft", "sleep")


@dataclass
class Lab:
    """Hosts that are roots on this machine."""

    folder: Path
    roots: dict[str, Path] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    down: set[str] = field(default_factory=set)

    def root(self, name: str) -> Path:
        """A host's root; made as an image leaves it."""
        if name not in self.roots:
            root = self.folder / f"host-{name}" / "key" / "root"
            for part in ("usr", "etc", "tmp", "proc", "dev", "run", "var/lib", "var/tmp", "root"):
                (root / part).mkdir(parents=True)
            for link in ("bin", "sbin", "lib", "lib64"):
                (root / link).symlink_to(f"usr/{link}")
            (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nfrr:x:920:920::/:/bin/sh\n")
            (root / "etc/group").write_text("root:x:0:\nfrr:x:920:\n")
            self.roots[name] = root
        return self.roots[name]

    def layers(self, name: str) -> Overlay:
        """This machine's /usr with the fakes above it."""
        upper, work = (self.folder / f"{part}-{name}" for part in ("upper", "work"))
        if not upper.exists():
            work.mkdir(parents=True)
            texts = {f"bin/{fake}": FAKE for fake in FAKES}
            texts |= {f"sbin/{daemon}": CHECKER for daemon in ("keepalived", *applying.ROUTING)}
            # How many connections there are is test_provision_local_addresses' concern.
            texts["bin/awk"] = '#!/bin/sh\nfor file; do :; done\necho "awk $file" >>/var/lib/calls\necho 0\n'
            texts["bin/hostname"] = f"#!/bin/sh\necho {name}\n"
            texts |= dict.fromkeys(("sbin/sysctl", "lib/systemd/systemd-sysctl"), FAKE)
            texts["lib/lvsforge/drop-stale-files"] = (IMAGE / "usr/lib/lvsforge/drop-stale-files").read_text()
            for path, text in texts.items():
                (upper / path).parent.mkdir(parents=True, exist_ok=True)
                (upper / path).write_text(text)
                (upper / path).chmod(0o755)
        return Overlay(Path("/usr"), upper, work, "/usr")

    @contextlib.contextmanager
    def connect(self, host: Host) -> Iterator[Remote]:
        if host.name in self.down:
            raise BuildError(f"{host.name}: no connection: refused", f"ssh root@{host.name}")
        yield LabRemote(host.name, self)

    def calls(self, name: str, *, marks: bool = False) -> list[str]:
        """What was called since it was last asked; marks in the log, which all changes begin with, only if wanted."""
        file = self.root(name) / "var/lib/calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line for line in lines if marks or not line.startswith("logger ")]

    def files(self, name: str) -> dict[str, tuple[bytes, int, int]]:
        """A host's /etc, without what every host has: content, mode, owner."""
        root = self.root(name)
        return {
            f"/{p.relative_to(root)}": (p.read_bytes(), p.stat().st_mode & 0o7777, p.stat().st_uid)
            for p in (root / "etc").rglob("*")
            if p.is_file() and p.name not in ("passwd", "group")
        }


@dataclass
class LabRemote:
    """A `Remote` whose host is a root of the lab."""

    name: str
    lab: Lab
    login: str = "ssh"

    def run(self, script: str, *, check: bool = True, what: str = "") -> Answer:
        result = Sandbox(self.lab.root(self.name), writable=True).run(
            ["/bin/sh", "-eu"],
            stdin=braced(script),
            overlays=[self.lab.layers(self.name)],
            check=False,
        )
        if check and result.returncode != 0:
            raise BuildError(f"{self.name}: {what} failed", "look", result.stderr.splitlines())
        return Answer(result.returncode, result.stdout, result.stderr)

    def put(self, data: bytes, path: str) -> None:
        self.lab.puts.append(path)
        (self.lab.root(self.name) / path.lstrip("/")).write_bytes(data)


def folder_of(place: Path) -> Path:
    """A new folder with the passwords that cluster files of `clusters.py` name."""
    place.mkdir()
    for name, text in {"ospf": "k3y\n", "vrrp": "s3cret"}.items():
        (place / name).write_text(text, encoding="utf-8")
        (place / name).chmod(0o600)
    return place


def cluster_of(folder: Path, base: dict[str, Any] = OSPF, **changes: Any) -> Cluster:
    """A cluster of that folder."""
    data = {**copy.deepcopy(base), **changes}
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return clusters.load(path)


LOAD = "ip -force -batch /etc/lvs/vips.routes"
# With fewer routes on the host than in the file, or more.
FLUSH = ["sleep 5", "ip -4 route flush proto 254", "ip -6 route flush proto 254"]
VIP_ROUTES = [LOAD, *FLUSH, LOAD]


def well(_host: Host, _down: frozenset[str]) -> None:
    """A gate that is open."""


def sick(host: Host, _down: frozenset[str]) -> None:
    """One that is not."""
    raise BuildError(f"{host.name} is not well", "look at it")


def acts(calls: list[str]) -> list[str]:
    """Without what every change does, and what only looks."""
    looks = (
        LOAD,
        "ip -4 route show",
        "ip -6 route show",
        "systemd-run",
        "cloud-init",
        "networkctl",
        "ipvsadm -Ln",
        "systemctl is-active --quiet lvs-rollback",
    )
    return [call for call in calls if not call.startswith(looks)]
