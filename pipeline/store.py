"""The artefact store: every stage's result under a key that hashes all of its inputs.

Same inputs, no work. A result is built in a directory beside its place and renamed into it whole, so a
directory under its key is always finished; two builders of one key wait for each other on a file lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline import progress, settings
from pipeline.errors import BuildError

KEY_LENGTH = 16  # hex digits of the SHA-256 that name a directory: 64 bits, no accident among thousands
_RECORD = "inputs.json"
# Hooks and fstab split at blanks, mount's options and QEMU's at commas, overlayfs its layers at colons.
_NOT_IN_PATHS = frozenset(" \t\n,:\\\"'")
_NO_SPACE = os.strerror(errno.ENOSPC)
MORE_SPACE = "invoke clean --store --keep-results 1   (or set LVSFORGE_STORE to a folder on a larger disk)"
_NO_STAGES = frozenset({"tmp", "failed", "locks", "roots"})  # what else lies in the store; a build at work is in tmp


def location() -> Path:
    """Where the store is: $LVSFORGE_STORE, else $XDG_CACHE_HOME/lvsforge, else ~/.cache/lvsforge."""
    if explicit := settings.named("LVSFORGE_STORE"):
        return explicit
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lvsforge"


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tree_digest(*paths: Path) -> str:
    """One SHA-256 over files and folders: names, modes, link targets and contents, in a fixed order.

    Raises:
        BuildError: a path does not exist.
    """
    total = hashlib.sha256()
    for number, top in enumerate(paths):
        # a file that moves from one tree to the next is a change
        total.update(f"tree {number}\n".encode())
        if not top.exists():
            raise BuildError(f"{top} does not exist", "git status   (was it deleted or moved?)")
        members = [top] if not top.is_dir() else sorted(p for p in top.rglob("*") if "__pycache__" not in p.parts)
        for path in members:
            name = path.name if path == top else str(path.relative_to(top))
            if path.is_symlink():
                total.update(f"link {name} {os.readlink(path)}\n".encode())
            elif path.is_file():
                # git keeps only the owner's execute bit, so a checkout under another umask must hash the same
                total.update(f"file {name} {path.stat().st_mode & 0o100:o} {digest(path)}\n".encode())
    return total.hexdigest()


@dataclass(frozen=True)
class Stage:
    """One step from inputs to a directory.

    Attributes:
        name: the directory in the store, unique per kind of result (`kernel-lvs`).
        inputs: everything that can change the bytes, as plain JSON; the code that builds included.
        build: fills the empty directory that it is given.
        needs: stages whose results `build` reads; their keys become inputs of this one.
        title: what the user reads while it runs.
    """

    name: str
    inputs: Mapping[str, Any]
    build: Callable[[Path], None]
    needs: Sequence[Stage] = field(default=())
    title: str = ""

    @cached_property
    def full_inputs(self) -> dict[str, Any]:
        """The inputs with the keys of the needed stages."""
        return {**self.inputs, "needs": {stage.name: stage.key for stage in self.needs}}

    @cached_property
    def key(self) -> str:
        """The first `KEY_LENGTH` hex digits of the SHA-256 of the canonical JSON of name and inputs."""
        text = json.dumps([self.name, self.full_inputs], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


class Store:
    """A directory of finished results."""

    def __init__(self, root: Path | None = None) -> None:
        """Say where it is.

        Raises:
            BuildError: the path has a character that one of the tools which get it reads as the end of a path.
        """
        self.root = root or location()
        if bad := sorted(_NOT_IN_PATHS.intersection(str(self.root))):
            raise BuildError(
                f"the store's path must not have {' or '.join(map(repr, bad))} in it: {self.root}",
                "set LVSFORGE_STORE to another folder",
            )

    def path(self, stage: Stage) -> Path:
        """Where the stage's result is, or will be."""
        return self.root / stage.name / stage.key

    def has(self, stage: Stage) -> bool:
        """Whether the result is there; a directory under its key is always finished."""
        return (self.path(stage) / _RECORD).exists()

    def ensure(self, stage: Stage) -> Path:
        """Return the stage's result, building it and what it needs where it is missing.

        Raises:
            BuildError: a build failed, or the disk is full. Nothing is left under the key then.
        """
        if self.has(stage):
            progress.reused(stage.name, f"same inputs ({stage.key})")
            self._touch(stage)
            return self.path(stage)
        for need in stage.needs:
            self.ensure(need)
        with self.lock(f"{stage.name}-{stage.key}"):
            if self.has(stage):  # another builder finished while we waited
                progress.reused(stage.name, f"built by another run ({stage.key})")
                return self.path(stage)
            for need in stage.needs:  # `prune` may have taken one while the others were built
                if not self.has(need):
                    self.ensure(need)
            reason = self.why(stage)
            with progress.step(f"{stage.title or stage.name}   [{reason}]"):
                self._build(stage)
        return self.path(stage)

    def _build(self, stage: Stage) -> None:
        work = self.root / "tmp" / f"{stage.name}-{stage.key}"
        # We hold the lock of this key: whatever lies here is what a killed run left.
        remove_tree(work)
        work.mkdir(parents=True)
        try:
            stage.build(work)
            record = {
                "name": stage.name,
                "key": stage.key,
                "inputs": stage.full_inputs,
                "files": _listing(work),
            }
            (work / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            target = self.path(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_tree(target)  # without its record it is no result, but what a killed `prune` left
            os.sync()  # data before the name: a power cut must not leave a key over empty files
            work.rename(target)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise disk_full(self.root, error) from None
            raise
        except BuildError as error:
            logs = sorted(work.rglob("*.log"))
            if logs:
                kept = self.root / "failed" / stage.name
                remove_tree(kept)
                kept.mkdir(parents=True)
                for log in logs:
                    place = kept / log.relative_to(work)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(log, place)
                text = [line.replace(str(work), str(kept)) for line in error.details]
                error = BuildError(error.message, error.hint.replace(str(work), str(kept)), text)
            if any(_NO_SPACE in line for line in error.details):  # what a child said of the same thing
                raise BuildError(f"the disk is full: {error.message}", MORE_SPACE, error.details) from None
            raise error
        finally:
            remove_tree(work)

    def adopt(self, result: Path, name: str, key: str) -> None:
        """Take a finished result that another store has made, where there is none under its key."""
        with self.lock(f"{name}-{key}"):
            target = self.root / name / key
            if not (target / _RECORD).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                remove_tree(target)  # what a killed `prune` left
                result.rename(target)

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold a named lock; the kernel drops it when we die.

        Args:
            name: what it stands for.
            wait: let a second holder wait, who is told for whom; else the block gets False, without the lock.
        """
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.lock").open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                stream.seek(0)
                holder = stream.read().strip() or "unknown"
                progress.note(f"{name} is being built by process {holder}; waiting for it")
                fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            stream.truncate()
            stream.write(str(os.getpid()))
            stream.flush()
            yield True

    def why(self, stage: Stage) -> str:
        """Why the stage has to be built: which inputs differ from the newest result of its name."""
        results = self.results(stage.name)
        if not results:
            return "never built"
        before = json.loads((results[0] / _RECORD).read_text(encoding="utf-8"))["inputs"]
        wanted = json.loads(json.dumps(stage.full_inputs))  # as it would be read back: tuples become lists
        changed = sorted(_differences(before, wanted))
        if not changed:
            return "the result was removed"
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return "changed: " + ", ".join(changed[:3]) + more

    def results(self, name: str) -> list[Path]:
        """The finished results of a stage name, most recently used first."""
        folder = self.root / name
        found = [p.parent for p in folder.glob(f"*/{_RECORD}")]
        return sorted(found, key=lambda p: (p / _RECORD).stat().st_mtime, reverse=True)

    def _touch(self, stage: Stage) -> None:
        with contextlib.suppress(OSError):  # a read-only shared store serves as well; only pruning loses precision
            os.utime(self.path(stage) / _RECORD)

    def verify(self, path: Path) -> list[str]:
        """Compare a result's top-level files with the sizes and hashes of its record; returns what differs."""
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        wrong = []
        for name, (size, sha256) in record["files"].items():
            file = path / name
            if not file.is_file():
                wrong.append(f"{name}: missing")
            elif file.stat().st_size != size:
                wrong.append(f"{name}: {file.stat().st_size} bytes instead of {size}")
            elif digest(file) != sha256:
                wrong.append(f"{name}: wrong hash")
        return wrong

    def prune(self, keep: int, *, dry_run: bool) -> list[Path]:
        """Remove all but the `keep` most recently used results of each stage, and what killed runs have left.

        Returns:
            What goes. A result that a process reads stays, also one that is a lab's.
        """
        going = [path for path in self._surplus(keep) if not _is_read(path)]
        if not dry_run:
            for path in going:
                # Under the key's lock: nobody may start to read what we take away.
                with self.lock(f"{path.parent.name}-{path.name}"):
                    (path / _RECORD).unlink()
                    remove_tree(path)
        return going + list(self._abandoned(dry_run=dry_run))

    def _surplus(self, keep: int) -> Iterator[Path]:
        for folder in sorted(p for p in self.root.iterdir() if p.is_dir()) if self.root.exists() else []:
            if folder.name not in _NO_STAGES:
                yield from self.results(folder.name)[keep:]

    def _abandoned(self, *, dry_run: bool) -> Iterator[Path]:
        """Remove unfinished results of runs that are gone: those at work hold their lock."""
        for path in sorted((self.root / "tmp").glob("*")):
            with self.lock(path.name, wait=False) as ours:
                if ours:
                    if not dry_run:
                        remove_tree(path)
                    yield path

    def require_space(self, gigabytes: float, what: str) -> None:
        """Refuse to start what cannot finish.

        Raises:
            BuildError: less than `gigabytes` (10^9 bytes) are free where the store is.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free / 1e9
        if free < gigabytes:
            raise BuildError(
                f"{what} needs {gigabytes:g} GB free under {self.root}, there are {free:.1f} GB",
                MORE_SPACE,
            )


def disk_full(where: Path, error: OSError) -> BuildError:
    """The error for a disk that filled up under way."""
    place = error.filename or where
    return BuildError(
        f"the disk is full: {place}",
        MORE_SPACE,
        [f"{shutil.disk_usage(where).free / 1e9:.1f} GB are free under {where}"],
    )


def remove_tree(path: Path) -> None:
    """Delete a tree, also one with read-only directories, or a file; nothing happens where there is none."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return

    def make_writable(function: Callable[..., Any], name: str, _info: Any) -> None:
        os.chmod(os.path.dirname(name), 0o700)
        function(name)

    shutil.rmtree(path, onerror=make_writable)


def _is_read(result: Path) -> bool:
    """Whether a process has a file of a result open or its tree mounted; says so. Of others' only root can know."""
    name = f"/{result.parent.name}/{result.name}"  # no other path has a key in it
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            links = (os.readlink(each) for each in (process / "fd").iterdir())
            if name in (process / "mountinfo").read_text(encoding="utf-8") or any(name in link for link in links):
                progress.note(f"{result} stays: process {process.name} uses it")
                return True
    return False


def _listing(work: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of the top-level files; trees below (a root file system, a build tree) are too large to hash."""
    return {p.name: (p.stat().st_size, digest(p)) for p in sorted(work.iterdir()) if p.is_file()}


def _differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from _differences(before.get(name), after.get(name), f"{path}.{name}" if path else name)
    elif before != after:
        yield path


def now() -> float:
    """Seconds since the epoch; one place, so that tests can stop the clock."""
    return time.time()
