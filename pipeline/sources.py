"""Upstream sources: pinned in `sources.yaml`, kept in the store under their hash.

`resolve` is what the rooms call: it returns a tarball whose bytes were checked. Everything else is for the
tasks: list, fetch, update the pins, bundle for a builder without a network.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pipeline import debsrc, download, progress, recipe, settings
from pipeline.download import Gone, Truncated, Unreachable, Wanted, WrongHash
from pipeline.errors import BuildError, Problems
from pipeline.store import Store, digest

PINS = settings.TOP / "sources.yaml"
_SCHEMA = Path(__file__).with_name("sources.schema.json")
_FETCH = "invoke fetch   (with a network), or set LVSFORGE_SOURCES to a folder that has it"


@dataclass(frozen=True)
class Pin:
    """One entry of `sources.yaml`; the file describes the fields."""

    name: str
    version: str
    series: str
    why: str
    file: str
    size: int
    sha256: str
    origins: tuple[Mapping[str, Any], ...]

    @property
    def wanted(self) -> Wanted:
        """What a download has to be."""
        return Wanted(self.file, self.size, self.sha256)


@dataclass(frozen=True)
class Resolved:
    """A tarball that is in the store.

    Attributes:
        name: its entry in `sources.yaml`.
        version: of upstream.
        sha256: of the tarball, 64 hex digits.
        size: bytes.
        path: where it is.
        pinned: False when it stands in for a pinned version that the archives dropped.
        pinned_version: what `sources.yaml` asks for.
        why: why it stands in; empty for the pinned one.
    """

    name: str
    version: str
    sha256: str
    size: int
    path: Path
    pinned: bool
    pinned_version: str
    why: str = ""

    def record(self) -> dict[str, Any]:
        """For a manifest: what was asked for, what was used, and why they differ if they do."""
        return {
            "name": self.name,
            "version": self.version,
            "file": self.path.name,
            "size": self.size,
            "sha256": self.sha256,
            "resolved": {"pinned": self.pinned_version, "used": self.version, "why": self.why},
        }


@dataclass(frozen=True)
class Row:
    """One line of `invoke sources-list`.

    Attributes:
        name, version, size, why: of the pin.
        state: `in the store`, `missing`, `damaged` or `replaced by VERSION`.
    """

    name: str
    version: str
    size: int
    why: str
    state: str


def load(path: Path = PINS) -> dict[str, Pin]:
    """Read the pins.

    Raises:
        BuildError: the file is missing or wrong; all problems at once, with dotted paths.
    """
    schema = json.loads(_SCHEMA.read_text(encoding="utf-8"))
    data = recipe.load(path, schema)
    problems = Problems()
    pins = {}
    for name, entry in data.items():
        pin = Pin(**{"name": name, "series": "", **entry, "origins": tuple(entry["origins"])})
        pins[name] = pin
        if pin.series and not in_series(pin.version, pin.series):
            problems.add(f"{name}.series", f"{pin.version} is not in {pin.series}")
        if pin.version not in pin.file:
            problems.add(f"{name}.file", f"{pin.file} is not the file of version {pin.version}")
        if pin.series and not any("debian" in origin for origin in pin.origins):
            problems.add(f"{name}.series", "only an origin `debian` can offer another version of the series")
    problems.raise_if_any(str(path), f"correct {path}")
    return pins


def in_series(version: str, series: str) -> bool:
    """Whether 6.12.107 is of 6.12 (and 6.120.1 is not)."""
    return version == series or version.startswith(f"{series}.")


class Shelf:
    """The tarballs in the store: `sources/sha256/<digest>/<file>`.

    A file gets its name only after its hash was checked. Beside it lies a stamp with its size, inode and change
    time at that moment; the kernel moves the change time with every write, so a file that still fits its stamp
    needs no second look at 150 MB, and one that does not is hashed again.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.root = store.root / "sources"

    def path(self, wanted: Wanted) -> Path:
        """Where the file is, or will be."""
        return self.root / "sha256" / wanted.sha256 / wanted.filename

    def has(self, wanted: Wanted, *, verify: bool = False) -> bool:
        """Whether the file is there with its bytes as they were checked.

        Args:
            wanted: the file.
            verify: hash it even where nothing speaks of a change.
        """
        path = self.path(wanted)
        if not path.is_file() or path.stat().st_size != wanted.size:
            return False
        stamp = path.with_name(f"{path.name}.verified")
        if not verify and stamp.is_file() and stamp.read_text(encoding="utf-8") == _fingerprint(path):
            return True
        if digest(path) != wanted.sha256:
            return False
        self._stamp(path, stamp)
        return True

    def discard_damaged(self, wanted: Wanted) -> None:
        """Take a file away that `has` refuses, and say so."""
        path = self.path(wanted)
        if path.exists():
            progress.warn(f"{path} is damaged (its size or hash is not the pinned one); it is fetched again")
            path.unlink()

    def _stamp(self, path: Path, stamp: Path) -> None:
        try:
            stamp.write_text(_fingerprint(path), encoding="utf-8")
        except OSError:
            progress.debug(f"{stamp} cannot be written (a shared, read-only store?): the next run hashes again")


def _fingerprint(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_ino} {status.st_ctime_ns}\n"


class Sources:
    """The pins of one `sources.yaml` with the store that they go to.

    Args:
        store: where tarballs are kept.
        pins: the file.
        offline: open no connection; None takes the task's setting.
        locked: never use another version than the pinned one; None takes the task's setting.
    """

    def __init__(
        self,
        store: Store | None = None,
        pins: Path = PINS,
        *,
        offline: bool | None = None,
        locked: bool | None = None,
    ) -> None:
        self.store = store or Store()
        self.file = pins
        self.shelf = Shelf(self.store)
        self.offline = settings.current.offline if offline is None else offline
        self.locked = settings.current.locked if locked is None else locked

    @cached_property
    def pins(self) -> dict[str, Pin]:
        """Name to pin, in the order of the file."""
        return load(self.file)

    def pin(self, name: str) -> Pin:
        """One pin.

        Raises:
            BuildError: there is none of that name.
        """
        if name not in self.pins:
            raise BuildError(
                f"{self.file} has no source {name!r} (it has {', '.join(self.pins)})", f"add {name} to {self.file}"
            )
        return self.pins[name]

    @cached_property
    def archive(self) -> debsrc.SourceArchive:
        """The Debian archive with every suite that any pin names, asked at most once a run."""
        suites = [s for p in self.pins.values() for o in p.origins if "debian" in o for s in o["debian"]["suites"]]
        return debsrc.SourceArchive(self.shelf.root / "apt", suites)

    def present(self, name: str, *, verify: bool = False) -> Resolved | None:
        """What a build would use, if it is in the store; never opens a connection."""
        pin = self.pin(name)
        if self.shelf.has(pin.wanted, verify=verify):
            return _resolved(pin, pin.version, pin.wanted, self.shelf.path(pin.wanted))
        record = None if self.locked else self._stand_in(pin)
        if record is None:
            return None
        wanted = Wanted(record["file"], record["size"], record["sha256"])
        if not self.shelf.has(wanted, verify=verify):
            return None
        return _resolved(pin, record["version"], wanted, self.shelf.path(wanted), record["why"])

    def resolve(self, name: str, *, verify: bool = False) -> Resolved:
        """A checked tarball, fetched if it is not in the store.

        Args:
            name: the entry in `sources.yaml`.
            verify: hash it even where nothing speaks of a change since it was checked.

        Raises:
            BuildError: no such pin; or it is nowhere to be had (`Unreachable`, `Gone`, `Truncated`, `WrongHash`);
                or it is missing and `offline` is set.
        """
        pin = self.pin(name)
        found = self.present(name, verify=verify)
        if found is None and self.offline:
            found = self._from_folders(pin)
            if found is None:
                raise BuildError(
                    f"{name} {pin.version} is not in the store and --offline is given",
                    f"{_FETCH}; or: invoke bundle-load BUNDLE",
                    [f"missing: {self.shelf.path(pin.wanted)}"],
                )
        if found is None:
            with self.store.lock(f"source-{name}"):
                # Another run may have fetched it while we waited for the lock.
                found = self.present(name) or self._fetch(pin)
        if not found.pinned:
            progress.warn(
                f"{name} {found.version} is used instead of the pinned {pin.version}: {found.why}. "
                "To pin it: invoke sources-update"
            )
        return found

    def other_version(self, name: str, version: str) -> Resolved:
        """A version that is not the pinned one, to try a series on it; never what a build uses by itself.

        Raises:
            BuildError: neither a folder nor the signed indexes of the archive have it.
        """
        pin = self.pin(name)
        if version == pin.version:
            return self.resolve(name)
        filename = pin.file.replace(pin.version, version)
        for folder in self._folders(pin):
            path = folder / filename
            if path.is_file():
                wanted = Wanted(filename, path.stat().st_size, digest(path))
                progress.warn(f"{path} is used as it is: no pin and no signature vouch for it")
                if not self.shelf.has(wanted):
                    download.copy(path, wanted, self.shelf.path(wanted))
                return _resolved(pin, version, wanted, self.shelf.path(wanted), "asked for by version")
        if self.offline:
            raise BuildError(f"{filename} is in no local folder and --offline is given", _FETCH)
        packages = dict.fromkeys(o["debian"]["package"] for o in pin.origins if "debian" in o)
        for tarball in (t for p in packages for t in debsrc.wanted(self.archive.tarballs(p), version)):
            wanted = Wanted(tarball.filename, tarball.size, tarball.sha256)
            for url in tarball.urls:
                if self.shelf.has(wanted) or self._try(url, wanted):
                    return _resolved(pin, version, wanted, self.shelf.path(wanted), "asked for by version")
        raise Gone(
            f"{name} {version} is not to be had from the archive", f"set LVSFORGE_SOURCES to a folder with {filename}"
        )

    def _try(self, url: str, wanted: Wanted) -> bool:
        try:
            with progress.step(f"fetching {wanted.filename} ({wanted.size / 1e6:.1f} MB)"):
                download.fetch(url, wanted, self.shelf.path(wanted), proxy=self.archive.proxy_for(url))
        except (Unreachable, Gone, Truncated, WrongHash) as error:
            progress.note(error.message)
            return False
        return self.shelf.has(wanted)

    def fetch_all(self, names: Iterable[str] | None = None, *, verify: bool = False) -> list[Resolved]:
        """Bring every source (or those named) into the store.

        Raises:
            BuildError: for the first one that cannot be had; what was fetched stays.
        """
        return [self.resolve(name, verify=verify) for name in (names or self.pins)]

    def listing(self, *, verify: bool = False) -> list[Row]:
        """The pins with their state; opens no connection."""
        rows = []
        for name, pin in self.pins.items():
            found = self.present(name, verify=verify)
            if found is not None:
                state = "in the store" if found.pinned else f"replaced by {found.version}"
            else:
                state = "damaged" if self.shelf.path(pin.wanted).exists() else "missing"
            rows.append(Row(name, pin.version, pin.size, " ".join(pin.why.split()), state))
        return rows

    # -- fetching ------------------------------------------------------------------------------------------------

    def _from_folders(self, pin: Pin) -> Resolved | None:
        """Look into the local folders only."""
        target = self.shelf.path(pin.wanted)
        for folder in self._folders(pin):
            if (folder / pin.file).is_file():
                self.shelf.discard_damaged(pin.wanted)
                download.copy(folder / pin.file, pin.wanted, target)
                return _resolved(pin, pin.version, pin.wanted, target)
        return None

    def _folders(self, pin: Pin) -> list[Path]:
        named = [Path(p) for p in [os.environ.get("LVSFORGE_SOURCES", "")] if p]
        own = [self.file.parent / Path(o["folder"]).expanduser() for o in pin.origins if "folder" in o]
        return [*named, *own]

    def _fetch(self, pin: Pin) -> Resolved:
        self.shelf.discard_damaged(pin.wanted)
        self.store.require_space(pin.size / 1e9 * 1.2, f"fetching {pin.name} {pin.version}")
        with progress.step(f"fetching {pin.name} {pin.version} ({pin.size / 1e6:.1f} MB)"):
            # A folder that the user points to is meant: a wrong file in it ends the run instead of being passed over.
            if (found := self._from_folders(pin)) is not None:
                return found
            failures: list[BuildError] = []
            for attempt in self._attempts(pin):
                try:
                    attempt()
                except (Unreachable, Gone, Truncated, WrongHash) as error:
                    failures.append(error)
                    progress.note(error.message)
                else:
                    target = self.shelf.path(pin.wanted)
                    self.shelf.has(pin.wanted)  # leaves the stamp
                    return _resolved(pin, pin.version, pin.wanted, target)
            if self._may_replace(pin, failures):
                if self.locked:
                    raise Gone(
                        f"{pin.name} {pin.version} is no longer in the archives, and --locked forbids another version",
                        "invoke sources-update   (or set LVSFORGE_SOURCES to a folder that has it)",
                        [error.message for error in failures],
                    )
                return self._replace(pin, failures)
            raise _verdict(pin, failures)

    def _attempts(self, pin: Pin) -> list[Callable[[], None]]:
        """One call an origin, in order."""
        calls: list[Callable[[], None]] = []
        for origin in pin.origins:
            if "debian" in origin:
                calls.append(lambda o=origin["debian"]: self._from_debian(pin, o["package"]))  # type: ignore[misc]
            elif "url" in origin:
                url = origin["url"].replace("{version}", pin.version).replace("{file}", pin.file)
                calls.append(lambda u=url: download.fetch(u, pin.wanted, self.shelf.path(pin.wanted)))  # type: ignore[misc]
        return calls

    def _from_debian(self, pin: Pin, package: str) -> None:
        offered = debsrc.wanted(self.archive.tarballs(package), pin.version)
        where = f"the Debian archive ({', '.join(self.archive.suites)})"
        if not offered:
            raise Gone(f"{where} does not list {package} {pin.version}", "invoke sources-update")
        same = [t for t in offered if t.sha256 == pin.sha256]
        if not same:
            raise WrongHash(
                f"{where} lists {offered[0].filename} with sha256 {offered[0].sha256}, pinned is {pin.sha256}",
                f"correct {pin.name}.sha256 in {self.file}   (the archive's index is signed)",
            )
        failures: list[BuildError] = []
        for url in same[0].urls:
            try:
                return download.fetch(url, pin.wanted, self.shelf.path(pin.wanted), proxy=self.archive.proxy_for(url))
            except (Unreachable, Gone, Truncated, WrongHash) as error:
                failures.append(error)
        raise _verdict(pin, failures)

    # -- a pinned version that is gone -----------------------------------------------------------------------------

    def _may_replace(self, pin: Pin, failures: Sequence[BuildError]) -> bool:
        """Only "no longer there" is a reason; a broken network or a wrong file is not."""
        gone = any(isinstance(f, Gone) for f in failures)
        return bool(pin.series) and gone and all(isinstance(f, Gone | Unreachable) for f in failures)

    def _record_path(self, pin: Pin) -> Path:
        return self.shelf.root / "resolved" / f"{pin.name}.json"

    def _stand_in(self, pin: Pin) -> dict[str, Any] | None:
        """The version that an earlier run found for this very pin."""
        try:
            record: dict[str, Any] = json.loads(self._record_path(pin).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return record if record.get("pinned") == {"version": pin.version, "sha256": pin.sha256} else None

    def _replace(self, pin: Pin, failures: Sequence[BuildError]) -> Resolved:
        why = f"the archives no longer have it ({failures[0].message})"
        tried: list[str] = []
        for tarball in self._candidates(pin):
            wanted = Wanted(tarball.filename, tarball.size, tarball.sha256)
            target = self.shelf.path(wanted)
            for url in tarball.urls:
                try:
                    if not self.shelf.has(wanted):
                        download.fetch(url, wanted, target, proxy=self.archive.proxy_for(url))
                except (Unreachable, Gone, Truncated, WrongHash) as error:
                    tried.append(error.message)
                    continue
                self.shelf.has(wanted)
                record = {
                    "pinned": {"version": pin.version, "sha256": pin.sha256},
                    "version": tarball.version,
                    "file": tarball.filename,
                    "size": tarball.size,
                    "sha256": tarball.sha256,
                    "why": why,
                }
                _write(self._record_path(pin), json.dumps(record, indent=1) + "\n")
                return _resolved(pin, tarball.version, wanted, target, why)
        raise Gone(
            f"{pin.name} {pin.version} is gone, and no other {pin.series} could be fetched",
            _FETCH,
            [*(error.message for error in failures), *tried],
        )

    def _candidates(self, pin: Pin) -> list[debsrc.Tarball]:
        """What the signed indexes list of the pin's series, newest first."""
        packages = dict.fromkeys(o["debian"]["package"] for o in pin.origins if "debian" in o)
        return [t for p in packages for t in self.archive.tarballs(p) if in_series(t.version, pin.series)]

    # -- moving the pins -------------------------------------------------------------------------------------------

    def update_pins(self, names: Iterable[str] | None = None, *, dry_run: bool = False) -> str:
        """Pin the newest version of each source's series that the archive lists and really has.

        Comments, order and layout of the file stay: only the values change. A source without `series` keeps its
        version; what the archive has beyond it is said.

        Args:
            names: only these.
            dry_run: change nothing.

        Returns:
            The change as a unified diff; empty when every pin is the newest.

        Raises:
            BuildError: offline, an unknown name, or an archive that cannot be reached.
        """
        if self.offline:
            raise BuildError("the pins cannot be moved with --offline", "invoke sources-update   (without --offline)")
        before = self.file.read_text(encoding="utf-8")
        after = before
        for name in names or self.pins:
            pin = self.pin(name)
            newest = self._newest(pin)
            if newest is None or newest.version == pin.version:
                continue
            after = rewrite(
                after,
                name,
                {"version": newest.version, "file": newest.filename, "size": newest.size, "sha256": newest.sha256},
            )
        if after != before and not dry_run:
            _write(self.file, after)
            self.__dict__.pop("pins", None)
        label = self.file.name
        return "".join(
            difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{label}", f"b/{label}")
        )

    def _newest(self, pin: Pin) -> debsrc.Tarball | None:
        packages = dict.fromkeys(o["debian"]["package"] for o in pin.origins if "debian" in o)
        listed = [t for p in packages for t in self.archive.tarballs(p)]
        if not listed:
            progress.note(f"{pin.name}: no archive to ask, stays at {pin.version}")
            return None
        if not pin.series:
            if listed[0].version != pin.version:
                progress.note(f"{pin.name}: stays at {pin.version}, has no series; the archive has {listed[0].version}")
            return None
        for tarball in (t for t in listed if in_series(t.version, pin.series)):
            if any(download.probe(url, proxy=self.archive.proxy_for(url)) for url in tarball.urls):
                return tarball
            progress.note(f"{pin.name} {tarball.version} is listed, but the archive does not have {tarball.filename}")
        return None


def rewrite(text: str, name: str, values: Mapping[str, str | int]) -> str:
    """Replace scalar values of one source in the text of `sources.yaml`; every other byte stays.

    The places come from the YAML parser's own marks, so a comment, a quote or an order of keys survives.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)  # noqa: S101  the schema was checked before
    entry = next(value for key, value in root.value if key.value == name)
    spots = {key.value: value for key, value in entry.value}
    for key in sorted(values, key=lambda k: spots[k].start_mark.index, reverse=True):
        node = spots[key]
        quote = node.style if node.style in ("'", '"') else ""
        value = str(values[key])
        if not quote and isinstance(values[key], str) and not isinstance(yaml.safe_load(value), str):
            quote = '"'  # 6.13 would be read as a number
        text = f"{text[: node.start_mark.index]}{quote}{value}{quote}{text[node.end_mark.index :]}"
    return text


def resolve(
    name: str,
    *,
    locked: bool | None = None,
    offline: bool | None = None,
    verify: bool = False,
    store: Store | None = None,
) -> Resolved:
    """`Sources.resolve` with the repository's own pins."""
    return Sources(store, locked=locked, offline=offline).resolve(name, verify=verify)


def listing(*, verify: bool = False, store: Store | None = None) -> list[str]:
    """`Sources.listing` as a table for `invoke sources-list`."""
    rows = Sources(store).listing(verify=verify)
    width = max(len(row.name) for row in rows)
    return [
        f"{row.name:<{width}}  {row.version:<10}  {row.size / 1e6:>7.1f} MB  {row.state:<14}  {row.why}" for row in rows
    ]


def update_pins(name: str | None = None, *, store: Store | None = None) -> list[str]:
    """`Sources.update_pins` for `invoke sources-update`; honours --dry-run; returns the change."""
    diff = Sources(store).update_pins([name] if name else None, dry_run=settings.current.dry_run)
    return diff.splitlines() or ["every pin is the newest of its series"]


def _resolved(pin: Pin, version: str, wanted: Wanted, path: Path, why: str = "") -> Resolved:
    return Resolved(pin.name, version, wanted.sha256, wanted.size, path, not why, pin.version, why)


def _verdict(pin: Pin, failures: Sequence[BuildError]) -> BuildError:
    """One error for all origins that failed, of the kind that needs attention most."""
    if len(failures) == 1:
        return failures[0]
    if not failures:
        return BuildError(
            f"{pin.name} {pin.version} is in none of the folders that sources.yaml names", f"copy {pin.file} there"
        )
    for kind in (WrongHash, Truncated, Unreachable, Gone):
        for failure in failures:
            if isinstance(failure, kind):
                lines = [line for f in failures for line in (f.message, *f.details)]
                return kind(f"{pin.name} {pin.version}: no origin delivered {pin.file}", failure.hint, lines)
    return failures[0]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


__all__ = ["PINS", "Pin", "Resolved", "Row", "Shelf", "Sources", "in_series", "load", "resolve", "rewrite"]
