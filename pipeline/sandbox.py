"""Running a command inside a root file system: bubblewrap, no network, fixed paths, a fixed environment."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import run
from pipeline.debroot import EPOCH
from pipeline.errors import BuildError


@dataclass(frozen=True)
class Overlay:
    """A directory whose lower layer stays as it is while changes go to an upper one (overlayfs).

    Attributes:
        lower: what is read.
        upper: what takes the changes; must be empty or the upper of an earlier run.
        work: an empty directory on the same file system as `upper`.
        target: the path inside the sandbox.
    """

    lower: Path
    upper: Path
    work: Path
    target: str


@dataclass(frozen=True)
class Sandbox:
    """A root file system to run commands in.

    Attributes:
        root: the tree; mounted read-only unless `writable`.
        writable: whether commands may change the tree itself (installing packages into an image).
        hostname: what it calls itself.
    """

    root: Path
    writable: bool = False
    hostname: str = "builder"

    def argv(
        self,
        command: Sequence[str],
        *,
        binds: Mapping[Path, str] | None = None,
        ro_binds: Mapping[Path, str] | None = None,
        overlays: Sequence[Overlay] = (),
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
    ) -> list[str]:
        """The whole command line; see `run`."""
        bwrap = [run.require("bwrap", "to run builds inside a clean root", "bubblewrap")]
        bwrap += ["--bind" if self.writable else "--ro-bind", str(self.root), "/"]
        bwrap += ["--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", "--tmpfs", "/run", "--tmpfs", "/var/tmp"]  # noqa: S108
        if not self.writable:
            # Mount points for binds under these need not exist in the read-only root.
            bwrap += ["--tmpfs", "/build", "--tmpfs", "/root"]
        for host, inside in (ro_binds or {}).items():
            bwrap += ["--ro-bind", str(host), inside]
        for host, inside in (binds or {}).items():
            bwrap += ["--bind", str(host), inside]
        for number, overlay in enumerate(overlays):
            bwrap += ["--bind", f"@overlay{number}@", overlay.target]
        bwrap += ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--hostname", self.hostname]
        bwrap += ["--die-with-parent", "--new-session", "--cap-add", "ALL", "--clearenv", "--chdir", cwd]
        settings = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            "SOURCE_DATE_EPOCH": str(EPOCH),
            **(env or {}),
        }
        for name, value in settings.items():
            bwrap += ["--setenv", name, value]
        bwrap += ["--", *command]
        if not overlays:
            return bwrap
        layers = [
            {"lower": str(o.lower), "upper": str(o.upper), "work": str(o.work), "token": f"@overlay{n}@"}
            for n, o in enumerate(overlays)
        ]
        # bubblewrap of Debian 12 cannot mount overlays: a helper does it in a mount namespace of its own,
        # so that nothing stays mounted however the build ends.
        unshare = run.require("unshare", "to mount overlays privately", "util-linux")
        enter = Path(__file__).with_name("enter.py")
        spec = json.dumps({"overlays": layers, "argv": bwrap})
        return [unshare, "--mount", "--propagation", "private", "--", sys.executable, "-I", str(enter), spec]

    def run(
        self,
        command: Sequence[str],
        *,
        binds: Mapping[Path, str] | None = None,
        ro_binds: Mapping[Path, str] | None = None,
        overlays: Sequence[Overlay] = (),
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        stdin: str | None = None,
        log: Path | None = None,
        check: bool = True,
        timeout: float | None = None,
        what: str = "",
        hint: str = "",
    ) -> run.Result:
        """Run a command inside.

        Args:
            command: argv, as seen inside.
            binds: host directories made writable at a path inside. `/build`, `/tmp`, `/var/tmp`, `/run` and `/root` are
                empty and in memory otherwise; put large things on a bind.
            ro_binds: host directories or files made readable at a path inside.
            overlays: copy-on-write directories.
            env: added to the fixed environment (SOURCE_DATE_EPOCH is set there).
            cwd: working directory inside.
            stdin, log, check, timeout, what, hint: as for `pipeline.run.run`.

        Raises:
            BuildError: the command failed; its message shows the command as typed inside.
        """
        line = self.argv(command, binds=binds, ro_binds=ro_binds, overlays=overlays, env=env, cwd=cwd)
        return run.run(
            line,
            stdin=stdin,
            log=log,
            check=check,
            timeout=timeout,
            what=what,
            hint=hint,
            shown=f"{shlex.join(command)}   # in {self.root.parent.parent.name}",
        )


def require_overlays(folder: Path) -> None:
    """Find out before long work whether overlays can be mounted in a folder.

    Raises:
        BuildError: they cannot, as on overlayfs itself, where a container has its files.
    """
    unshare = run.require("unshare", "to mount overlays privately", "util-linux")
    with run.temporary_directory("overlay-", folder) as place:
        for name in ("lower", "upper", "work", "merged"):
            (place / name).mkdir()
        options = ",".join(f"{name}dir={place / name}" for name in ("lower", "upper", "work"))
        argv = [unshare, "--mount", "--", "mount", "-t", "overlay", "overlay", "-o", options, str(place / "merged")]
        result = run.run(argv, check=False)
    if result.returncode != 0:
        raise BuildError(
            f"no overlay can be mounted under {folder}: {result.stderr.strip()}",
            "set LVSFORGE_STORE to a folder on ext4, xfs, btrfs or tmpfs (in a container: a volume)",
        )
