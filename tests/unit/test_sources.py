"""The pins, the shelf, what happens when a version is gone, and the rewriting of sources.yaml."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import apt, debsrc, download, run, settings, sources
from pipeline.debsrc import Tarball
from pipeline.download import Gone, Truncated, Unreachable, Wanted, WrongHash
from pipeline.errors import BuildError
from pipeline.sources import Sources
from pipeline.store import Store
from tests.conftest import Recorder

BYTES = b"the tarball of 6.12.107"
NEWER = b"the tarball of 6.12.111"


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


PINS = f"""\
# Kept.
linux:
  version: 6.12.107   # so is this
  series: "6.12"
  why: for the tests
  file: linux_6.12.107.orig.tar.xz
  size: {len(BYTES)}
  sha256: {sha(BYTES)}
  origins:
    - debian: {{package: linux, suites: [trixie]}}

tool:
  version: '1.31'
  why: for the tests too
  file: tool_1.31.orig.tar.gz
  size: {len(BYTES)}
  sha256: {sha(BYTES)}
  origins:
    - folder: local
    - url: https://example.org/tool-{{version}}.tar.gz
"""


class FakeArchive:
    """Lists what the test says, and has of it what the test says."""

    suites = ("trixie",)

    def __init__(self, *tarballs: Tarball) -> None:
        self._tarballs = list(tarballs)

    def tarballs(self, package: str) -> list[Tarball]:
        return self._tarballs

    def proxy_for(self, url: str) -> str | None:
        return None


def tarball(version: str, content: bytes, *hosts: str) -> Tarball:
    name = f"linux_{version}.orig.tar.xz"
    return Tarball(version, name, len(content), sha(content), tuple(f"http://{h}/{name}" for h in hosts or ("a",)))


class Web:
    """Stands for `download.fetch`: address to content, or to the error that it answers with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, bytes | type[BuildError]] = {}
        self.asked: list[str] = []
        monkeypatch.setattr(download, "fetch", self.fetch)
        monkeypatch.setattr(download, "probe", lambda url, proxy=None: url in self.answers)

    def fetch(self, url: str, wanted: Wanted, target: Path, *, proxy: str | None = None) -> None:
        self.asked.append(url)
        answer = self.answers.get(url, Gone)
        if isinstance(answer, type):
            raise answer(f"{url}: no", "hint")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(answer)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Web:
    return Web(monkeypatch)


def make(tmp_path: Path, store: Store, archive: FakeArchive | None = None, **options: Any) -> Sources:
    pins = tmp_path / "sources.yaml"
    if not pins.exists():
        pins.write_text(PINS)
    found = Sources(store, pins, **options)
    found.__dict__["archive"] = archive or FakeArchive()
    return found


def test_the_repositorys_own_pins_are_valid() -> None:
    pins = sources.load()
    assert {"linux", "ipvsadm", "keepalived", "frr"} <= pins.keys()
    assert pins["linux"].series


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "sources.yaml"
    text = PINS.replace("  why: for the tests\n", "").replace("size: 23", "size: many", 1)
    path.write_text(text.replace("folder: local", "folder: local\n      speed: fast") + "  colour: red\n")
    with pytest.raises(BuildError) as caught:
        sources.load(path)
    lines = "\n".join(caught.value.details)
    assert len(caught.value.details) >= 4
    for words in ("linux: missing key why", "linux.size", "tool: unknown key colour", "tool.origins[0]: "):
        assert words in lines


def test_a_pin_must_fit_its_series_and_its_file(tmp_path: Path) -> None:
    path = tmp_path / "sources.yaml"
    path.write_text(PINS.replace("version: 6.12.107", "version: 6.120.1"))
    with pytest.raises(BuildError) as caught:
        sources.load(path)
    assert "linux.series: 6.120.1 is not in 6.12" in caught.value.details
    assert "linux.file: linux_6.12.107.orig.tar.xz is not the file of version 6.120.1" in caught.value.details


def test_an_unknown_source_names_the_known(tmp_path: Path, store: Store) -> None:
    with pytest.raises(BuildError, match=r"no source 'lunix' .it has linux, tool"):
        make(tmp_path, store).resolve("lunix")


def test_the_pinned_version_from_the_archive(tmp_path: Path, store: Store, web: Web) -> None:
    web.answers["http://b/linux_6.12.107.orig.tar.xz"] = BYTES
    got = make(tmp_path, store, FakeArchive(tarball("6.12.107", BYTES, "a", "b"))).resolve("linux")
    assert got.pinned and got.path.read_bytes() == BYTES
    assert got.path == store.root / "sources/sha256" / sha(BYTES) / "linux_6.12.107.orig.tar.xz"
    assert web.asked == ["http://a/linux_6.12.107.orig.tar.xz", "http://b/linux_6.12.107.orig.tar.xz"]
    assert got.record()["resolved"] == {"pinned": "6.12.107", "used": "6.12.107", "why": ""}


def test_what_is_there_is_not_asked_for_again_nor_hashed(
    tmp_path: Path, store: Store, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.answers["http://a/linux_6.12.107.orig.tar.xz"] = BYTES
    archive = FakeArchive(tarball("6.12.107", BYTES))
    make(tmp_path, store, archive).resolve("linux")
    web.asked.clear()
    hashed: list[Path] = []
    monkeypatch.setattr(sources, "digest", lambda path: hashed.append(path) or sha(BYTES))  # type: ignore[func-returns-value]
    make(tmp_path, store, offline=True).resolve("linux")
    assert (web.asked, hashed) == ([], [])
    make(tmp_path, store, offline=True).resolve("linux", verify=True)
    assert len(hashed) == 1


def test_one_changed_byte_in_the_store_is_found_and_mended(
    tmp_path: Path, store: Store, web: Web, events: Recorder
) -> None:
    web.answers["http://a/linux_6.12.107.orig.tar.xz"] = BYTES
    archive = FakeArchive(tarball("6.12.107", BYTES))
    path = make(tmp_path, store, archive).resolve("linux").path
    before = path.stat()
    path.write_bytes(b"T" + BYTES[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # even with size and time as before
    assert make(tmp_path, store, archive).listing()[0].state == "damaged"
    with pytest.raises(BuildError, match="not in the store and --offline"):
        make(tmp_path, store, archive, offline=True).resolve("linux")
    assert make(tmp_path, store, archive).resolve("linux").path.read_bytes() == BYTES
    assert any("damaged" in text for text in events.texts("warn"))


def test_offline_says_what_is_missing_and_how_to_get_it(tmp_path: Path, store: Store, web: Web) -> None:
    with pytest.raises(BuildError) as caught:
        make(tmp_path, store, offline=True).resolve("linux")
    assert "linux 6.12.107 is not in the store" in caught.value.message
    assert sha(BYTES) in caught.value.details[0]
    assert "invoke" in caught.value.hint
    assert web.asked == []


def test_offline_still_looks_into_folders(
    tmp_path: Path, store: Store, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "linux_6.12.107.orig.tar.xz").write_bytes(BYTES)
    monkeypatch.setenv("LVSFORGE_SOURCES", str(folder))
    assert make(tmp_path, store, offline=True).resolve("linux").path.read_bytes() == BYTES


@pytest.mark.parametrize(
    ("content", "kind"), [(BYTES[:-1], Truncated), (b"T" + BYTES[1:], WrongHash)], ids=["truncated", "one byte"]
)
def test_a_wrong_file_in_a_named_folder_ends_the_run(
    tmp_path: Path, store: Store, web: Web, content: bytes, kind: type[BuildError]
) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "tool_1.31.orig.tar.gz").write_bytes(content)
    with pytest.raises(kind):
        make(tmp_path, store).resolve("tool")
    assert web.asked == []
    assert (folder / "tool_1.31.orig.tar.gz").read_bytes() == content


def test_urls_are_filled_in(tmp_path: Path, store: Store, web: Web) -> None:
    web.answers["https://example.org/tool-1.31.tar.gz"] = BYTES
    assert make(tmp_path, store).resolve("tool").path.name == "tool_1.31.orig.tar.gz"


# -- a pinned version that is gone


def gone(monkeypatch: pytest.MonkeyPatch, web: Web) -> FakeArchive:
    """The measured case: newer ones are listed, the newest of them is not there."""
    web.answers["http://a/linux_6.12.111.orig.tar.xz"] = NEWER
    listed = [("7.1.1", b"7"), ("6.12.117", b"x"), ("6.12.111", NEWER), ("6.12.101", b"old")]
    return FakeArchive(*[tarball(version, content) for version, content in listed])


def test_the_newest_of_the_series_stands_in_and_is_recorded(
    tmp_path: Path, store: Store, web: Web, events: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = make(tmp_path, store, gone(monkeypatch, web)).resolve("linux")
    assert (got.version, got.pinned, got.pinned_version) == ("6.12.111", False, "6.12.107")
    assert got.path.read_bytes() == NEWER
    assert web.asked == ["http://a/linux_6.12.117.orig.tar.xz", "http://a/linux_6.12.111.orig.tar.xz"]
    resolved = got.record()["resolved"]
    assert (resolved["pinned"], resolved["used"]) == ("6.12.107", "6.12.111")
    assert "does not list linux 6.12.107" in resolved["why"]
    assert any("6.12.111 is used instead of the pinned 6.12.107" in text for text in events.texts("warn"))
    # The next run asks nobody, and says it again.
    web.asked.clear()
    again = make(tmp_path, store, offline=True)
    assert again.resolve("linux").version == "6.12.111"
    assert again.listing()[0].state == "replaced by 6.12.111"
    assert web.asked == []


def test_locked_forbids_a_stand_in(tmp_path: Path, store: Store, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = gone(monkeypatch, web)
    with pytest.raises(Gone, match="--locked forbids"):
        make(tmp_path, store, archive, locked=True).resolve("linux")
    make(tmp_path, store, archive).resolve("linux")
    with pytest.raises(Gone, match="--locked forbids"):  # also one that an earlier run took
        make(tmp_path, store, archive, locked=True).resolve("linux")


def test_a_new_pin_forgets_the_stand_in_of_the_old(
    tmp_path: Path, store: Store, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, store, gone(monkeypatch, web)).resolve("linux")
    path = tmp_path / "sources.yaml"
    path.write_text(PINS.replace("6.12.107", "6.12.108").replace(sha(BYTES), sha(b"other")))
    assert make(tmp_path, store).present("linux") is None


@pytest.mark.parametrize("answer", [Unreachable, Truncated, WrongHash])
def test_only_gone_is_a_reason_for_a_stand_in(tmp_path: Path, store: Store, web: Web, answer: type[BuildError]) -> None:
    web.answers["http://a/linux_6.12.107.orig.tar.xz"] = answer
    web.answers["http://a/linux_6.12.111.orig.tar.xz"] = NEWER
    archive = FakeArchive(tarball("6.12.111", NEWER), tarball("6.12.107", BYTES))
    with pytest.raises(answer):
        make(tmp_path, store, archive).resolve("linux")


def test_a_source_without_series_is_never_replaced(tmp_path: Path, store: Store, web: Web) -> None:
    with pytest.raises(Gone):
        make(tmp_path, store).resolve("tool")


def test_a_signed_index_that_contradicts_the_pin(tmp_path: Path, store: Store, web: Web) -> None:
    with pytest.raises(WrongHash, match=r"lists linux_6\.12\.107\.orig\.tar\.xz with sha256"):
        make(tmp_path, store, FakeArchive(tarball("6.12.107", NEWER))).resolve("linux")
    assert web.asked == []


# -- moving pins


def test_update_changes_values_and_nothing_else(
    tmp_path: Path, store: Store, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make(tmp_path, store, gone(monkeypatch, web))
    path = tmp_path / "sources.yaml"
    diff = found.update_pins(["linux"], dry_run=True)
    assert path.read_text() == PINS
    assert found.update_pins(["linux"]) == diff
    expected = PINS.replace("6.12.107", "6.12.111").replace(sha(BYTES), sha(NEWER), 1)
    assert path.read_text() == expected
    assert "-  version: 6.12.107   # so is this\n+  version: 6.12.111   # so is this\n" in diff
    assert found.update_pins(["linux"]) == ""
    assert found.pin("linux").version == "6.12.111"


def test_update_needs_a_network(tmp_path: Path, store: Store) -> None:
    with pytest.raises(BuildError, match="--offline"):
        make(tmp_path, store, offline=True).update_pins()


def test_a_number_is_quoted_when_it_is_written() -> None:
    text = "a:\n  version: 1.2.3  # kept\n  size: 4\n"
    assert sources.rewrite(text, "a", {"version": "1.3", "size": 10}) == 'a:\n  version: "1.3"  # kept\n  size: 10\n'


def test_the_listing_is_a_table(store: Store) -> None:
    lines = sources.listing(store=store)
    assert len(lines) == len(sources.load())
    assert all("missing" in line for line in lines)


def test_settings_reach_the_sources(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    monkeypatch.setattr(settings.current, "offline", True)
    monkeypatch.setattr(settings.current, "locked", True)
    found = Sources(store)
    assert (found.offline, found.locked) == (True, True)


# -- the archive's indexes

INDEX = b"""\
Package: linux-extra
Build-Package: linux
Version: 1-1
Directory: pool/main/l/linux-extra
Checksums-Sha256:
 aaaa 1 linux-extra_1.orig.tar.xz

Package: linux
Binary: linux-doc
Version: 6.12.107-1
Checksums-Sha256:
 1111 10 linux_6.12.107-1.dsc
 2222 20 linux_6.12.107.orig.tar.xz
 3333 30 linux_6.12.107-1.debian.tar.xz
Directory: pool/main/l/linux

Package: linux
Version: 1:6.12.9~rc1-2+deb13u1
Directory: pool/main/l/linux
Checksums-Sha256:
 4444 40 linux_6.12.9~rc1.orig.tar.xz
 5555 50 linux_6.12.9~rc1.orig-extra.tar.xz
"""


def test_an_index_is_read_by_source_package() -> None:
    found = [t for stanza in debsrc.stanzas(INDEX, "linux") for t in debsrc.listed(stanza, "http://a/debian")]
    url = "http://a/debian/pool/main/l/linux/"
    assert found == [
        Tarball("6.12.107", "linux_6.12.107.orig.tar.xz", 20, "2222", (f"{url}linux_6.12.107.orig.tar.xz",)),
        Tarball("6.12.9~rc1", "linux_6.12.9~rc1.orig.tar.xz", 40, "4444", (f"{url}linux_6.12.9~rc1.orig.tar.xz",)),
    ]
    assert debsrc.stanzas(INDEX, "inux") == []


def test_versions_sort_as_people_count() -> None:
    order = ["6.9", "6.12~rc7", "6.12", "6.12.9", "6.12.107", "7.0"]
    assert sorted(reversed(order), key=debsrc.version_key) == order


def test_a_series_is_no_prefix_of_a_number() -> None:
    assert sources.in_series("6.12.1", "6.12") and sources.in_series("6.12", "6.12")
    assert not sources.in_series("6.120.1", "6.12")


@pytest.mark.network
@pytest.mark.runs("apt-get", "apt-config", "curl")
def test_a_small_source_really_comes_from_the_archive(store: Store) -> None:
    found = Sources(store)
    pin = found.pin("ipvsadm")
    listed = [t for t in found.archive.tarballs("ipvsadm") if t.version == pin.version]
    assert listed, "the machine's archive does not list the pinned ipvsadm"
    assert (listed[0].size, listed[0].sha256) == (pin.size, pin.sha256)
    assert found.resolve("ipvsadm").path.stat().st_size == pin.size


def test_two_runs_do_not_fetch_indexes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share apt's lists; apt itself would refuse the second, and with nothing fetched yet that is an error."""
    archive = debsrc.SourceArchive(tmp_path, ["trixie"])
    asked: list[str] = []

    def apt_get(words: Sequence[str], **_: Any) -> run.Result:
        with (archive.work / "lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        asked.append("update" if "update" in words else "indextargets")
        return run.Result(tuple(words), 0, "", "")

    monkeypatch.setattr(apt, "archives", list)
    monkeypatch.setattr(run, "run", apt_get)
    with pytest.raises(Unreachable):
        _ = archive.indexes
    assert asked == ["update", "indextargets"]
