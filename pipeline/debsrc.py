"""Upstream tarballs (`.orig.tar.*`) of the Debian archive, through a private apt configuration.

A fresh machine has no deb-src entries, and its suites may lack the version that is wanted. So apt gets a
configuration of its own below the store: source indexes of the suites that `sources.yaml` names, at the
addresses that the machine's apt uses. apt checks each suite's Release signature against Debian's keyring, and
the indexes against the Release file; the size and SHA-256 of a tarball come from there.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pipeline import apt, progress, run
from pipeline.download import Unreachable


@dataclass(frozen=True)
class Tarball:
    """One upstream tarball that a signed index lists.

    Attributes:
        version: upstream's, without epoch and Debian revision.
        filename: as the archive calls it.
        size: bytes.
        sha256: 64 hex digits.
        urls: where it should be; an index can list what its server has dropped.
    """

    version: str
    filename: str
    size: int
    sha256: str
    urls: tuple[str, ...]


class SourceArchive:
    """The source side of the machine's Debian archive.

    Args:
        work: a directory that the private configuration and the indexes live in; later runs refresh them.
        suites: `trixie`, `trixie-security`, `sid`, …
    """

    def __init__(self, work: Path, suites: Iterable[str]) -> None:
        self.work = work
        self.suites = tuple(dict.fromkeys(suites))

    @property
    def _options(self) -> list[str]:
        settings = {
            "Dir::Etc::sourcelist": self.work / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferences": "-",
            "Dir::Etc::preferencesparts": "-",
            "Dir::State": self.work / "state",
            "Dir::State::lists": self.work / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": self.work / "cache",
            "Dir::Cache::archives": self.work / "cache/archives",
            # apt would otherwise drop to a user that cannot enter a private store (~/.cache).
            "APT::Sandbox::User": "root",
            "Acquire::GzipIndexes": "false",  # read here as they are
            "Acquire::Languages": "none",
            "Acquire::AllowInsecureRepositories": "false",  # whatever the machine allows for its own packages
            "Acquire::AllowWeakRepositories": "false",
            "Acquire::AllowDowngradeToInsecureRepositories": "false",
        }
        return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    def _lines(self) -> list[str]:
        """One deb-src line for each wanted suite and each site of the machine that may have it."""
        known = apt.archives()
        lines = []
        for suite in self.suites:
            security = suite.endswith("-security")
            sites = dict.fromkeys(a.site for a in known if a.suite.endswith("-security") == security)
            if not sites:
                progress.note(f"apt has no archive for {suite}; going on without it")
            lines += [f"deb-src [signed-by={apt.KEYRING}] {site} {suite} main" for site in sites]
        return lines

    @cached_property
    def indexes(self) -> tuple[tuple[Path, str], ...]:
        """The verified source indexes and the addresses they speak of, fetched once a run.

        Raises:
            Unreachable: no wanted suite could be had.
        """
        for folder in ("state", "lists/partial", "cache/archives/partial"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        lines = self._lines()
        form = "$(ORIGIN)|$(REPO_URI)|$(FILENAME)"
        with (self.work / "lock").open("w") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            (self.work / "sources.list").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            with progress.step(f"reading the archive's source indexes ({', '.join(self.suites)})"):
                update = run.run(["apt-get", *self._options, "-q", "update"], check=False)
            listing = run.run(
                ["apt-get", *self._options, "indextargets", "--format", form, "Created-By: Sources"], check=False
            )
        found = []
        for line in listing.stdout.splitlines():
            origin, address, name = line.split("|")
            if origin == "Debian" and Path(name).exists():
                found.append((Path(name), address.rstrip("/")))
        said = [line for line in update.stderr.splitlines() if line[:2] in ("E:", "W:")]
        if not found:
            raise Unreachable(
                f"no source index of {', '.join(self.suites)} could be fetched and verified",
                "apt-get update   (does the machine reach its archive?)",
                said or run.tail(update.stderr or update.stdout, 5),
            )
        if update.returncode != 0:
            for text in said[:3]:
                progress.note(text)
        return tuple(found)

    def tarballs(self, package: str) -> list[Tarball]:
        """Every upstream tarball of a source package in the wanted suites, newest version first.

        Raises:
            Unreachable: see `indexes`.
        """
        merged: dict[tuple[str, str], Tarball] = {}
        for index, address in self.indexes:
            for stanza in stanzas(index.read_bytes(), package):
                for tarball in listed(stanza, address):
                    key = (tarball.filename, tarball.sha256)
                    before = merged.get(key)
                    urls = tuple(dict.fromkeys((*(before.urls if before else ()), *tarball.urls)))
                    merged[key] = replace(tarball, urls=urls)
        return sorted(merged.values(), key=lambda t: version_key(t.version), reverse=True)

    def proxy_for(self, url: str) -> str | None:
        """The proxy that the machine's apt would use for an address; None when apt has no opinion."""
        settings = dict(line.split("=", 1) for line in apt.proxy_options())
        scheme, _, rest = url.partition("://")
        host = rest.split("/", 1)[0].split(":", 1)[0]
        value = settings.get(f"Acquire::{scheme}::Proxy::{host}") or settings.get(f"Acquire::{scheme}::Proxy")
        if value is None:
            return None
        return "" if value == "DIRECT" else value


def stanzas(index: bytes, package: str) -> list[str]:
    """The paragraphs of a Sources index that describe one source package."""
    head = b"\nPackage: " + package.encode() + b"\n"
    text = b"\n" + index
    found = []
    at = text.find(head)
    while at >= 0:
        end = text.find(b"\n\n", at + 1)
        end = len(text) if end < 0 else end
        found.append(text[at + 1 : end].decode("utf-8", "replace"))
        at = text.find(head, end)
    return found


def listed(stanza: str, address: str) -> list[Tarball]:
    """The upstream tarball of one paragraph; additional component tarballs are left out."""
    version = re.search(r"^Version: (?:\d+:)?(\S+?)(?:-[^-\s]+)?$", stanza, re.M)
    directory = re.search(r"^Directory: (\S+)$", stanza, re.M)
    sums = re.search(r"^Checksums-Sha256:\n((?: .+\n?)+)", stanza, re.M)
    if not (version and directory and sums):
        return []
    found = []
    for line in sums[1].splitlines():
        sha256, size, name = line.split()
        if re.search(r"\.orig\.tar\.\w+$", name):
            url = f"{address}/{directory[1]}/{name}"
            found.append(Tarball(version[1], name, int(size), sha256, (url,)))
    return found


def version_key(version: str) -> tuple[tuple[int, str], ...]:
    """A sort key for upstream versions: numbers by value, `~` before everything (6.12~rc1 < 6.12)."""
    parts = re.findall(r"\d+|[^\d.]+", version)
    return tuple([(int(p), "") if p.isdigit() else (-1 if p.startswith("~") else 0, p) for p in parts] + [(0, "")])


def wanted(tarballs: Sequence[Tarball], version: str) -> list[Tarball]:
    """Those of exactly one version."""
    return [t for t in tarballs if t.version == version]
