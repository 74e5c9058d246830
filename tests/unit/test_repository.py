"""Repositories: which packages stay, which go, and what is left when publishing is cut short."""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline import repository, rpm
from pipeline.errors import BuildError
from pipeline.repository import KEY_FILE, publish, snapshot, superseded
from pipeline.run import Result
from pipeline.sandbox import Sandbox
from pipeline.signing import SigningKey
from pipeline.store import Stage, Store
from tests.conftest import Recorder

A1 = "ipvsadm-1.31-1.aaaaaaaa.x86_64.rpm"
A1_AGAIN = "ipvsadm-1.31-1.bbbbbbbb.x86_64.rpm"
A2 = "ipvsadm-1.31-2.cccccccc.x86_64.rpm"
A_NEXT = "ipvsadm-1.32-1.dddddddd.x86_64.rpm"
B1 = "ipvsadm-libs-1.31-1.aaaaaaaa.x86_64.rpm"
KERNEL = "kernel-lvs-6.12.9-1.bbbbbbbb.x86_64.rpm"
KERNEL_AGAIN = "kernel-lvs-6.12.9-1.aaaaaaaa.x86_64.rpm"
RECIPE = Path("tools/ipvsadm/recipe.yaml")
SRC = "ipvsadm-1.31-1.aaaaaaaa.src.rpm"


@pytest.mark.parametrize(
    ("present", "coming", "going"),
    [
        ([], [A1], []),
        ([A1], [], []),
        ([A1], [A1], []),
        ([A1], [A1_AGAIN], [A1]),
        ([A1_AGAIN], [A1], [A1_AGAIN]),  # which key sorts higher is an accident
        ([A1], [A2], []),
        ([A1, A2], [A_NEXT], []),
        ([A1, A2, A_NEXT], [A1_AGAIN], [A1]),
        ([A1, B1], [A1_AGAIN], [A1]),
        ([SRC], [A1_AGAIN], []),  # another arch
        ([B1, A1], [B1.replace("aaaaaaaa", "12345678"), A1_AGAIN], [A1, B1]),
    ],
)
def test_only_another_build_of_the_same_release_is_replaced(
    present: list[str], coming: list[str], going: list[str]
) -> None:
    assert list(superseded(present, coming)) == going


def test_each_is_told_what_replaces_it() -> None:
    again = B1.replace("aaaaaaaa", "12345678")
    assert superseded([B1, A1, A2], [again, A1_AGAIN, A2]) == {A1: A1_AGAIN, B1: again}


def test_a_stranger_in_the_folder_is_refused() -> None:
    with pytest.raises(BuildError, match="not a package name"):
        superseded(["stranger-1.0-1.x86_64.rpm"], [A1])


def test_clients_are_told_to_check_both_signatures() -> None:
    lines = repository.client_configuration().splitlines()
    assert "gpgcheck=1" in lines
    assert "repo_gpgcheck=1" in lines
    assert any(line.startswith("gpgkey=") and line.endswith(KEY_FILE) for line in lines)


def test_clients_prefer_our_packages_to_a_distributions_newer_ones() -> None:
    """99 is what a repository has that says nothing; the lower number wins."""
    configuration = configparser.ConfigParser()
    configuration.read_string(repository.client_configuration())
    assert configuration.getint("lvsforge", "priority") < 99


# --- publishing, with the tools that sign and index replaced


class FakeKey:
    """A key whose public half is a text."""

    def __init__(self, name: str = "key") -> None:
        self.name = name
        self.digest = f"digest of {name}"
        self.import_script = "true"

    def public(self, _sandbox: object) -> str:
        return f"public half of {self.name}\n"

    @contextmanager
    def lent(self) -> Iterator[Mapping[Path, str]]:
        yield {}


class FakeSandbox:
    """Writes an index that lists the packages, so that a test can see what was indexed; orders releases as words."""

    def run(self, command: Sequence[str], *, binds: Mapping[Path, str] | None = None, **_rest: Any) -> Result:
        if command[:2] == ["rpm", "--eval"]:
            pairs = re.findall(r"rpm\.vercmp\('(.+?)', '(.+?)'\)", " ".join(command))
            return Result((), 0, "".join(f"{(a > b) - (a < b)}\n" for a, b in pairs), "")
        if command[:2] == ["rpm", "-qp"]:
            return Result((), 0, "installonlypkg(kernel)\n" if "kernel" in command[-1] else "ipvsadm\n", "")
        (folder,) = binds or {}
        (folder / "repodata").mkdir()
        (folder / "repodata/repomd.xml").write_text(" ".join(sorted(p.name for p in folder.glob("*.rpm"))))
        return Result((), 0, "", "")


def toolbox() -> Sandbox:
    return cast(Sandbox, FakeSandbox())


def key(name: str = "key") -> SigningKey:
    return cast(SigningKey, FakeKey(name))


def folder_of(tmp_path: Path, name: str, *packages: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    for package in packages:
        (folder / package).write_text(f"{name}: {package}")
    (folder / "rpmbuild.log").write_text("no package")
    return folder


def state(target: Path) -> dict[str, list[str]]:
    return {part: sorted(p.name for p in (target / part).glob("*.rpm")) for part in ("x86_64", "source")}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out" / "repository"


@pytest.fixture
def published(tmp_path: Path, target: Path, store: Store) -> Path:
    publish({folder_of(tmp_path, "first", A1, SRC): RECIPE}, target, store, toolbox, key())
    return target


def test_the_first_publication(published: Path) -> None:
    assert state(published) == {"x86_64": [A1], "source": [SRC]}
    assert (published / KEY_FILE).read_text() == "public half of key\n"
    assert (published / "lvsforge.repo").read_text() == repository.client_configuration()
    assert (published / "x86_64/repodata/repomd.xml").read_text() == A1
    assert (published / "source/repodata/repomd.xml").read_text() == SRC
    assert [p.name for p in published.parent.iterdir()] == ["repository"]


def test_older_versions_stay_and_the_same_release_is_replaced(
    tmp_path: Path, published: Path, store: Store, events: Recorder
) -> None:
    assert publish({folder_of(tmp_path, "second", A2): RECIPE}, published, store, toolbox, key()) == [A2]
    assert publish({folder_of(tmp_path, "third", A1_AGAIN): RECIPE}, published, store, toolbox, key()) == [A1_AGAIN]
    assert state(published) == {"x86_64": [A1_AGAIN, A2], "source": [SRC]}
    assert (published / "x86_64/repodata/repomd.xml").read_text() == f"{A1_AGAIN} {A2}"
    assert any(A1 in text and "replaced" in text for text in events.texts("note"))


def test_a_rebuild_that_hosts_take_for_the_older_one_is_warned_of(
    tmp_path: Path, target: Path, store: Store, events: Recorder
) -> None:
    """With the two ways out, and not where the key happens to be the higher one."""
    flavour = Path("kernel/lvs/flavour.yaml")
    first = {folder_of(tmp_path, "a1", A1_AGAIN, B1, SRC): RECIPE, folder_of(tmp_path, "k1", KERNEL): flavour}
    publish(first, target, store, toolbox, key())
    assert not events.texts("warn")
    libs, src = B1.replace("aaaaaaaa", "bbbbbbbb"), SRC.replace("aaaaaaaa", "00000000")
    second = {folder_of(tmp_path, "a2", A1, libs, src): RECIPE, folder_of(tmp_path, "k2", KERNEL_AGAIN): flavour}
    publish(second, target, store, toolbox, key())
    tool, kernel = events.texts("warn")
    assert tool.startswith("hosts that have ipvsadm-1.31-1.bbbbbbbb will not take ipvsadm-1.31-1.aaaaaaaa by dnf up")
    assert tool.endswith(f"Raise release in {RECIPE} and build again; or, on hosts: dnf distro-sync ipvsadm")
    assert kernel.startswith("hosts that have kernel-lvs-6.12.9-1.bbbbbbbb will not take kernel-lvs-6.12.9-1.aaaaaaaa")
    assert f"Raise release in {flavour} and build again; or, on hosts: dnf distro-sync kernel-lvs, then" in kernel
    assert "boot menu" in kernel
    kinds = [kind for kind, *_ in events.events]
    assert kinds.index("warn") > max(i for i, kind in enumerate(kinds) if kind == "end"), "it is the last that is read"
    assert state(target)["x86_64"] == [A1, libs, KERNEL_AGAIN]


def test_releases_that_are_equal_to_rpm_are_warned_of(
    tmp_path: Path, published: Path, store: Store, events: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 0a0 and 00a: to dnf the new one is installed already."""
    monkeypatch.setattr(rpm, "compare", lambda _sandbox, pairs: [0 for _ in pairs])
    publish({folder_of(tmp_path, "again", A1_AGAIN): RECIPE}, published, store, toolbox, key())
    assert len(events.texts("warn")) == 1


def test_nothing_new_is_no_work(tmp_path: Path, published: Path, store: Store, events: Recorder) -> None:
    before = published.stat().st_ino
    events.events.clear()
    assert publish({tmp_path / "first": RECIPE}, published, store, toolbox, key()) == []
    assert published.stat().st_ino == before
    assert events.events == []


def test_a_package_that_a_power_cut_emptied_is_published_anew(tmp_path: Path, published: Path, store: Store) -> None:
    (published / "x86_64" / A1).write_bytes(b"")
    assert publish({tmp_path / "first": RECIPE}, published, store, toolbox, key()) == [A1]
    assert (published / "x86_64" / A1).stat().st_size == (tmp_path / "first" / A1).stat().st_size


def test_another_key_writes_the_metadata_anew(tmp_path: Path, published: Path, store: Store) -> None:
    publish({tmp_path / "first": RECIPE}, published, store, toolbox, key("other"))
    assert (published / KEY_FILE).read_text() == "public half of other\n"


@pytest.fixture
def signing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed is what its last line says; a package of `folder_of` is as if the first key had signed it."""

    def sign(_sandbox: Sandbox, by: SigningKey, folder: Path) -> None:
        for package in folder.glob("*.rpm"):
            package.write_text(f"{package.read_text()}\n{by.public(_sandbox)}")

    def verify(_sandbox: Sandbox, public: Path, folder: Path, files: Sequence[str], hint: str) -> None:
        signatures = {name: (folder / name).read_text().splitlines(keepends=True)[1:] for name in files}
        if bad := [name for name, lines in signatures.items() if (lines or [FIRST])[-1] != public.read_text()]:
            raise BuildError(f"refused: {bad}", hint)

    monkeypatch.setattr(rpm, "sign", sign)
    monkeypatch.setattr(rpm, "verify", verify)


FIRST = "public half of key\n"


@pytest.mark.usefixtures("signing")
def test_after_a_change_of_the_key_what_stays_is_signed_by_the_new_one(
    tmp_path: Path, published: Path, store: Store
) -> None:
    """And only that: what comes is signed by it already, and without a change nothing is."""
    next_one, last = (folder_of(tmp_path, name, package) for name, package in (("next", A_NEXT), ("last", A2)))
    publish({next_one: RECIPE}, published, store, toolbox, key("other"))
    texts = {path.name: path.read_text().splitlines()[1:] for path in published.glob("*/*.rpm")}
    assert texts == {A1: ["public half of other"], SRC: ["public half of other"], A_NEXT: []}
    assert state(published) == {"x86_64": [A1, A_NEXT], "source": [SRC]}
    assert sorted(p.name for p in published.iterdir()) == [KEY_FILE, "lvsforge.repo", "source", "x86_64"]
    publish({last: RECIPE}, published, store, toolbox, key("other"))
    assert (published / "x86_64" / A1).read_text().splitlines()[1:] == ["public half of other"]


@pytest.mark.usefixtures("signing")
def test_what_the_key_before_did_not_sign_is_not_signed_by_the_new_one(
    tmp_path: Path, published: Path, store: Store
) -> None:
    stranger = published / "x86_64" / A1
    stranger.write_text("a package\npublic half of somebody\n")
    with pytest.raises(BuildError, match="refused") as caught:
        publish({folder_of(tmp_path, "next", A_NEXT): RECIPE}, published, store, toolbox, key("other"))
    assert str(stranger.parent) in caught.value.hint
    assert state(published)["x86_64"] == [A1]
    assert (published / KEY_FILE).read_text() == FIRST


def test_a_package_that_was_signed_anew_is_published_anew(tmp_path: Path, published: Path, store: Store) -> None:
    """Another key signs the same build: same name, other bytes."""
    again = folder_of(tmp_path, "again", A1, SRC)
    publish({again: RECIPE}, published, store, toolbox, key("other"))
    assert (published / "x86_64" / A1).read_text() == f"again: {A1}"


class Crash(BaseException):
    """Stands for SIGKILL: nobody catches it."""


@pytest.mark.parametrize("cut", [1, 2])
def test_a_crash_between_the_renames_loses_nothing(
    tmp_path: Path, published: Path, store: Store, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Publishing renames twice: the old state aside, then the new one into its place."""
    second = folder_of(tmp_path, "second", A2)
    rename = Path.rename
    done: list[Path] = []

    def cut_short(self: Path, other: Path) -> Path:
        if len(done) == cut - 1:
            raise Crash
        done.append(other)
        return rename(self, other)

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(Path, "rename", cut_short)
        publish({second: RECIPE}, published, store, toolbox, key())
    assert published.exists() is (cut == 1)
    assert publish({second: RECIPE}, published, store, toolbox, key()) == [A2]
    assert state(published) == {"x86_64": [A1, A2], "source": [SRC]}
    assert [p.name for p in published.parent.iterdir()] == ["repository"]


def test_a_failure_while_indexing_leaves_the_old_state(tmp_path: Path, published: Path, store: Store) -> None:
    class Broken(FakeSandbox):
        def run(self, command: Sequence[str], *, binds: Mapping[Path, str] | None = None, **_rest: Any) -> Result:
            raise BuildError("createrepo_c failed", "read the log")

    second = folder_of(tmp_path, "second", A2)
    with pytest.raises(BuildError, match="createrepo_c failed"):
        publish({second: RECIPE}, published, store, lambda: cast(Sandbox, Broken()), key())
    assert state(published) == {"x86_64": [A1], "source": [SRC]}
    assert publish({second: RECIPE}, published, store, toolbox, key()) == [A2]


# --- the snapshot for an image


def test_a_snapshot_holds_exactly_its_stages_packages_without_sources(tmp_path: Path, store: Store) -> None:
    def made(name: str, *packages: str) -> Stage:
        def build(out: Path) -> None:
            for package in packages:
                (out / package).write_text(package)

        return Stage(name, {}, build)

    signed = [made("signed-a", A1, SRC), made("signed-b", B1)]
    stage = snapshot("director", signed, toolbox, key(), store.path)
    path = store.ensure(stage)
    with pytest.raises(BuildError, match=r"signed-c/.* holds no package"):
        store.ensure(snapshot("director", [made("signed-c", SRC)], toolbox, key(), store.path))
    assert sorted(p.name for p in path.glob("*.rpm")) == [A1, B1]
    assert (path / "repodata/repomd.xml").read_text() == f"{A1} {B1}"
    assert (path / KEY_FILE).read_text() == "public half of key\n"
    keys = {
        snapshot("director", signed[:1], toolbox, key(), store.path).key,
        snapshot("director", signed, toolbox, key("other"), store.path).key,
        snapshot("realserver", signed, toolbox, key(), store.path).key,
        stage.key,
    }
    assert len(keys) == 4
