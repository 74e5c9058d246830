"""Bundles: everything out, everything in, and nothing of a damaged one."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from pipeline import bundle
from pipeline.errors import BuildError
from pipeline.sources import Sources
from pipeline.store import Store

BYTES = b"a tarball" * 1000
SHA = hashlib.sha256(BYTES).hexdigest()
PINS = f"""\
tool:
  version: "1.0"
  why: for the tests
  file: tool_1.0.orig.tar.gz
  size: {len(BYTES)}
  sha256: {SHA}
  origins:
    - folder: local
"""


@pytest.fixture
def sources(tmp_path: Path, store: Store) -> Sources:
    (tmp_path / "local").mkdir()
    (tmp_path / "local/tool_1.0.orig.tar.gz").write_bytes(BYTES)
    (tmp_path / "sources.yaml").write_text(PINS)
    return Sources(store, tmp_path / "sources.yaml")


@pytest.fixture
def made(tmp_path: Path, sources: Sources) -> Path:
    debs = tmp_path / "debs/pool"
    debs.mkdir(parents=True)
    (debs / "a.deb").write_bytes(b"a package")
    return bundle.bundle(tmp_path / "out/b.tar", sources, {"debs": tmp_path / "debs"})


def files(root: Path) -> list[str]:
    """The files in a folder but for locks."""
    found = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()] if root.exists() else []
    return sorted(name for name in found if not name.startswith("locks/"))


def test_a_builder_without_a_network_gets_everything(tmp_path: Path, made: Path) -> None:
    other = Store(tmp_path / "other")
    taken = bundle.load(made, other, {"debs": tmp_path / "here"})
    assert taken == ["extra/debs/pool/a.deb", f"sources/sha256/{SHA}/tool_1.0.orig.tar.gz"]
    assert (tmp_path / "here/pool/a.deb").read_bytes() == b"a package"
    (tmp_path / "local/tool_1.0.orig.tar.gz").unlink()
    got = Sources(other, tmp_path / "sources.yaml", offline=True).resolve("tool")
    assert got.path.read_bytes() == BYTES


def test_same_contents_same_bytes(tmp_path: Path, made: Path, sources: Sources) -> None:
    (tmp_path / "debs/pool/a.deb").touch()
    again = bundle.bundle(tmp_path / "out/c.tar", sources, {"debs": tmp_path / "debs"})
    assert again.read_bytes() == made.read_bytes()
    assert files(tmp_path / "out") == ["b.tar", "c.tar"]


def test_an_extra_directory_that_nobody_asks_for_is_left_out(tmp_path: Path, made: Path) -> None:
    assert len(bundle.load(made, Store(tmp_path / "other"))) == 1


@pytest.mark.parametrize("where", [700, 5000, -1])
def test_a_truncated_bundle_gives_nothing(tmp_path: Path, made: Path, where: int) -> None:
    data = made.read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(data[: data.rindex(b"a tarball") if where == -1 else where])
    with pytest.raises(BuildError) as caught:
        bundle.load(cut, Store(tmp_path / "other"))
    assert str(cut) in caught.value.message
    assert files(tmp_path / "other") == []


def test_cleaning_leaves_a_load_at_work_alone(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a killed one has left is no obstacle."""
    store = Store(tmp_path / "other")
    (left := store.root / "tmp/bundle/left").mkdir(parents=True)
    place = bundle._place

    def cleaned(*given: object) -> list[str]:
        assert not left.exists()
        assert store.prune(0, dry_run=False) == []
        return place(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(bundle, "_place", cleaned)
    assert bundle.load(made, store)


def test_one_changed_byte_gives_nothing(tmp_path: Path, made: Path) -> None:
    data = bytearray(made.read_bytes())
    data[data.index(b"a package")] ^= 1
    bad = tmp_path / "bad.tar"
    bad.write_bytes(data)
    with pytest.raises(BuildError, match="1 problem") as caught:
        bundle.load(bad, Store(tmp_path / "other"), {"debs": tmp_path / "here"})
    assert "extra/debs/pool/a.deb: wrong hash" in caught.value.details[0]
    assert files(tmp_path / "other") == files(tmp_path / "here") == []


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "sources/../../evil", "locks/evil"])
def test_a_member_outside_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "evil.tar"
    entry = [4, hashlib.sha256(b"evil").hexdigest()]
    with tarfile.open(path, "w") as tar:
        for member, data in (
            ("index.json", json.dumps({"format": 1, "files": {name: entry}}).encode()),
            (name, b"evil"),
        ):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(BuildError, match="problem"):
        bundle.load(path, Store(tmp_path / "other"))
    assert not list(tmp_path.rglob("evil"))


def test_something_else_is_no_bundle(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"hello" * 1000)
    with pytest.raises(BuildError, match="truncated or no bundle"):
        bundle.load(path, Store(tmp_path / "other"))
    with pytest.raises(BuildError, match="does not exist"):
        bundle.load(tmp_path / "none", Store(tmp_path / "other"))


def test_links_cannot_go_into_a_bundle(tmp_path: Path, sources: Sources) -> None:
    (tmp_path / "debs").mkdir()
    (tmp_path / "debs/link").symlink_to("/etc/passwd")
    with pytest.raises(BuildError, match="no regular file"):
        bundle.bundle(tmp_path / "b.tar", sources, {"debs": tmp_path / "debs"})
    assert not (tmp_path / "b.tar").exists()
