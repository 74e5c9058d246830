"""Debian 12 root file systems by mmdebstrap: build roots, and the base of the images.

A root's recipe names packages; apt decides their versions. The decision is written down once in the store
(`roots/`) and is part of every key that depends on the root, so nothing moves until `refresh` is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline import apt, progress, recipe, run
from pipeline.errors import BuildError
from pipeline.store import Stage, Store

CODENAME = "bookworm"
# One date for everything that is created inside a root; the value is of no consequence, its constancy is.
EPOCH = 1735689600  # 2025-01-01T00:00:00Z

SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["packages"],
    "properties": {
        "packages": {
            "type": "array",
            "minItems": 1,
            "uniqueItems": True,
            "items": {"type": "string", "pattern": "^[a-z0-9][a-z0-9+.-]+$"},
        },
        "exclude_paths": {"type": "array", "items": {"type": "string", "pattern": "^/"}},
        "include_paths": {"type": "array", "items": {"type": "string", "pattern": "^/"}},
    },
}


class Root:
    """A root file system that a recipe describes."""

    def __init__(self, name: str, path: Path, store: Store, *, offline: bool = False) -> None:
        """Read the recipe.

        Args:
            name: the stage's name (`root-kernel`).
            path: the recipe (`kernel/root.yaml`).
            store: where the result and the resolved versions are.
            offline: never ask the archive.

        Raises:
            BuildError: the recipe is wrong.
        """
        self.name = name
        self.path = path
        self.store = store
        self.offline = offline
        self.recipe: Mapping[str, Any] = recipe.load(path, SCHEMA)

    @property
    def _lock_file(self) -> Path:
        text = json.dumps([CODENAME, self.recipe], sort_keys=True)
        return self.store.root / "roots" / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    @property
    def resolved(self) -> bool:
        """Whether the versions are decided."""
        return self._lock_file.exists()

    @cached_property
    def versions(self) -> dict[str, str]:
        """Every package of the root with its version, as apt resolved it.

        Raises:
            BuildError: a package does not exist, or the archive cannot be asked.
        """
        if not self.resolved:
            if self.offline:
                raise BuildError(
                    f"{self.path}: its packages were never resolved and --offline is given",
                    "invoke fetch   (on a machine with a network, then: invoke bundle)",
                )
            # Two builds at once must not decide differently; the second takes the first one's decision.
            with self.store.lock(f"resolve-{self.name}"):
                if not self.resolved:
                    self.refresh()
        try:
            data: dict[str, str] = json.loads(self._lock_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BuildError(
                f"{self._lock_file} is damaged: {error}", f"rm {self._lock_file}, then the same command"
            ) from None
        return data

    def refresh(self) -> None:
        """Ask the archive for the newest versions and write them down.

        Raises:
            BuildError: the archive cannot be asked, or we are not root, as which alone mmdebstrap resolves.
        """
        require_root(f"to resolve the packages of {self.name}")
        with progress.step(f"resolving the packages of {self.path.parent.name}/{self.path.name}"):
            text = run.run(
                [*self._command(), "--simulate", "--verbose", CODENAME, "/dev/null", "-"],
                stdin=self._sources(),
                env={"SOURCE_DATE_EPOCH": str(EPOCH)},
                what=f"resolving {self.path}",
                hint="apt-get update   (then look at the package names in the recipe)",
            )
        found = dict(re.findall(r"^Inst (\S+) (?:\[\S+\] )?\((\S+) ", text.stdout + text.stderr, re.M))
        missing = [p for p in self.recipe["packages"] if p not in found]
        if missing:
            raise BuildError(f"{self.path}: apt did not choose {', '.join(missing)}", f"correct {self.path}")
        self._lock_file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._lock_file.with_suffix(".new")
        with beside.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(found, indent=1, sort_keys=True) + "\n")
            stream.flush()
            os.fsync(stream.fileno())  # a power cut must leave no empty file, which would count as resolved
        beside.rename(self._lock_file)
        self.__dict__.pop("versions", None)

    def stage(self) -> Stage:
        """The stage whose result holds the tree in `root/` and its packages in `packages.json`."""
        inputs = {
            "recipe": self.recipe,
            "versions": self.versions,
            "codename": CODENAME,
            "epoch": EPOCH,
            "rev": 1,
        }
        title = f"build root of {self.path.parent.name}/" if self.path.name == "root.yaml" else "base root file system"
        return Stage(self.name, inputs, self._build, title=title)

    def _command(self) -> list[str]:
        argv = [
            run.require("mmdebstrap", "to make Debian root file systems", "mmdebstrap"),
            "--mode=root",
            "--variant=minbase",
            "--include=" + ",".join(self.recipe["packages"]),
            "--aptopt=APT::Install-Recommends false",
            # The address of this machine's mirror or proxy is no part of what we build.
            '--customize-hook=cd "$1/etc" && rm -f apt/apt.conf.d/99mmdebstrap dpkg/dpkg.cfg.d/99mmdebstrap',
            '--customize-hook=: >"$1/etc/apt/sources.list"',
        ]
        argv += [f"--aptopt={_apt_line(line)}" for line in apt.proxy_options()]
        argv += [f"--dpkgopt=path-exclude={path}" for path in self.recipe.get("exclude_paths", ())]
        argv += [f"--dpkgopt=path-include={path}" for path in self.recipe.get("include_paths", ())]
        return argv

    def _sources(self) -> str:
        main = apt.main_archive(CODENAME)
        lines = [a.line() for a in apt.archives() if a.suite.split("-")[0] == main.suite]
        return "\n".join(lines) + "\n"

    def _build(self, out: Path) -> None:
        if self.offline:
            raise BuildError(
                f"{self.name} is not in the store and --offline is given",
                "invoke bundle   (on a machine with a network), then: invoke bundle-load FILE",
            )
        require_root(f"to make {self.name}")
        tree = out / "root"
        # apt and dpkg would outlive a killed mmdebstrap and go on unpacking where the next run builds. In a process
        # namespace of its own all of it ends with the first of them, and its mounts with it.
        alone = [run.require("unshare", "to end mmdebstrap whole", "util-linux"), "--pid", "--fork", "--kill-child"]
        command = [*self._command(), CODENAME, str(tree), "-"]
        run.run(
            [*alone, "--mount-proc", "--", *command],
            shown=shlex.join(command),
            stdin=self._sources(),
            env={"SOURCE_DATE_EPOCH": str(EPOCH)},
            log=out / "mmdebstrap.log",
            what=f"making {self.name}",
            hint="apt-get update   (a package list may be older than the archive)",
        )
        listing = run.run(
            ["dpkg-query", f"--admindir={tree}/var/lib/dpkg", "-W", "-f", "${Package} ${Version}\n"]
        ).stdout
        installed = dict(line.split(" ") for line in listing.splitlines())
        # Resolving starts from nothing, installing from the essential packages: an alternative (lsb-base or
        # sysvinit-utils) may be resolved and then not needed. What is installed must be what was resolved.
        moved = sorted(p for p, v in installed.items() if self.versions.get(p) != v)
        if moved:
            raise BuildError(
                f"{self.name}: the archive moved while the root was made: {', '.join(moved[:5])}",
                "invoke refresh-roots   (then the same command again)",
            )
        if self.path.name == "root.yaml":
            (tree / "build").mkdir()  # where pipeline.sandbox mounts the work
        (out / "packages.json").write_text(json.dumps(installed, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def tree(store: Store, root: Root) -> Path:
    """The directory of a root, built if need be."""
    return store.ensure(root.stage()) / "root"


def require_root(why: str) -> None:
    """Root file systems hold files of many owners, so making them takes root.

    Raises:
        BuildError: we are somebody else.
    """
    if os.geteuid() != 0:
        raise BuildError(f"root is needed {why}", "sudo make image   (or run the same command as root)")


def _apt_line(option: str) -> str:
    name, _, value = option.partition("=")
    return f'{name} "{value}"'


def all_versions(roots: Sequence[Root]) -> dict[str, dict[str, str]]:
    """The resolved packages of several roots, for a manifest."""
    return {root.name: root.versions for root in roots}
