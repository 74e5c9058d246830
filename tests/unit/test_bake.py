"""What the tasks call: what a dry run leaves undone, and what comes from elsewhere."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import yaml

import tasks
from image import bake, golden
from image.base import roles
from kernel import build as kernels
from pipeline import repository, run, settings
from pipeline.debroot import Root
from pipeline.errors import BuildError
from pipeline.signing import SigningKey
from pipeline.sources import Sources
from pipeline.store import Stage, Store
from tests.conftest import Recorder
from tools import build as tools


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.current, "dry_run", True)


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every root's packages are decided."""
    monkeypatch.setattr(Root, "versions", {"base-files": "12"})
    monkeypatch.setattr(Root, "resolved", True)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("dry", "resolved")
@pytest.mark.parametrize(("role", "kernels"), [("director", {"kernel-lvs"}), ("", {"kernel-lvs", "kernel-rs"})])
def test_a_dry_bake_without_a_key_makes_none(
    role: str, kernels: set[str], capsys: pytest.CaptureFixture[str], events: Recorder
) -> None:
    bake.bake(role)
    names = {line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert {"base-tree", "root-image", "tool-keepalived", *kernels} <= names
    assert {name for name in names if name in ("kernel-lvs", "kernel-rs")} == kernels
    assert not SigningKey.find().exists
    assert any("no signing key yet" in text for text in events.texts("note"))
    assert not files(Store().root)


@pytest.mark.usefixtures("dry", "resolved")
def test_a_dry_bake_with_a_key_names_the_image_and_not_its_check(capsys: pytest.CaptureFixture[str]) -> None:
    key = SigningKey.find().file
    key.parent.mkdir(parents=True)
    key.write_text("a key")
    bake.bake("director")
    names = {line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert "image-director" in names and not names & {"checked-director", "image-realserver"}
    bake.show_plan(bake.final_stages())
    assert {"checked-director", "checked-realserver"} <= {
        line.split()[1] for line in capsys.readouterr().out.splitlines()
    }


@pytest.mark.usefixtures("dry")
def test_a_dry_bundle_says_what_it_would_pack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], events: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    bake.bundle(tmp_path / "out.tar")
    said = capsys.readouterr().out
    assert "linux " in said and "missing" in said
    assert any(text.startswith("root-image: ") for text in events.texts("note"))
    monkeypatch.setattr(Root, "versions", {"base-files": "12"})
    monkeypatch.setattr(Root, "resolved", True)
    bake.bundle(tmp_path / "out.tar")
    assert "· root-image " in capsys.readouterr().out
    assert not files(tmp_path) and not files(Store().root)


@pytest.mark.parametrize("broken", ["", *roles()])
def test_what_has_not_booted_is_not_published(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts take from the repository what stands in it."""
    done: list[str] = []

    def check(role: str, _line: bake.Line) -> None:
        if role == broken:
            raise BuildError(f"the {role} image does not boot", "invoke console")
        done.append(role)

    monkeypatch.setattr(bake, "require_root", lambda _why: None)
    monkeypatch.setattr(Sources, "fetch_all", lambda self: [])
    monkeypatch.setattr(Store, "require_space", lambda *_: None)
    monkeypatch.setattr(bake, "check", check)
    monkeypatch.setattr(bake, "publish", lambda _line: done.append("repository"))
    with pytest.raises(BuildError) if broken else contextlib.nullcontext():
        bake.everything()
    assert ("repository" in done) is not bool(broken)
    assert broken or done == [*roles(), "repository"]


def test_who_may_not_make_roots_is_told_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(Sources, "fetch_all", lambda self: pytest.fail("fetched"))
    with pytest.raises(BuildError, match="root is needed to make build roots"):
        bake.everything()


@pytest.mark.usefixtures("resolved")
def test_packages_are_published_with_the_files_of_their_release_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: dict[Path, Path] = {}
    monkeypatch.setattr(bake.Line, "signed", lambda _self, stage: stage)
    monkeypatch.setattr(bake.Line, "key", "a key")
    monkeypatch.setattr(Store, "ensure", lambda _self, stage: tmp_path / stage.name)
    monkeypatch.setattr(repository, "publish", lambda results, *_: published.update(results))
    bake.publish()
    assert {folder.name: str(recipe.relative_to(settings.TOP)) for folder, recipe in published.items()} == {
        **{f"kernel-{name}": f"kernel/{name}/flavour.yaml" for name in kernels.flavours()},
        **{f"tool-{name}": f"tools/{name}/recipe.yaml" for name in tools.names()},
    }
    assert all(yaml.safe_load(recipe.read_text(encoding="utf-8"))["release"] for recipe in published.values())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Root]:
    """The roots that were asked for a stage."""
    found: list[Root] = []

    def stage(self: Root) -> Stage:
        found.append(self)
        return Stage(self.name, {}, lambda out: None)

    monkeypatch.setattr(Root, "stage", stage)
    monkeypatch.setattr(Root, "refresh", lambda self: found.append(self))
    monkeypatch.setattr(Sources, "fetch_all", lambda self: [])
    return found


SHARED = {"debug": False, "progress_form": "plain"}


def test_every_root_is_fetched(asked: list[Root], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of a root that nobody fetches cannot be made without a network."""
    monkeypatch.chdir(tmp_path)
    rooms = ("image", "kernel", "provision", "tests", "tools")
    recipes = [path for room in rooms for path in (settings.TOP / room).rglob("root.yaml")]
    assert len(recipes) >= 7
    wanted = {*recipes, settings.TOP / "image/base.yaml"}
    tasks.fetch.body(None, locked=False, offline=False, **SHARED)
    assert {root.path for root in asked} == wanted
    asked.clear()
    tasks.refresh_roots.body(None, **SHARED)
    assert {root.path for root in asked} == wanted


def test_a_bundle_holds_every_root(asked: list[Root], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packed: list[str] = []
    monkeypatch.setattr(run, "run", lambda argv, **_: packed.append(Path(argv[argv.index("-cf") + 1]).name))
    tasks.bundle.body(None, out=str(tmp_path / "out.tar"), dry_run=False, **SHARED)
    assert {"root-kernel", "root-guest", "root-keepalived", "root-debian-kernel", "root-lab"} <= {
        name.removesuffix(".tar.zst") for name in packed
    }
    assert set(packed) == {f"{root.name}.tar.zst" for root in asked}


def test_a_bundle_brings_newer_roots(tmp_path: Path) -> None:
    """The list of packages decides which root is used; a result without its record is what a killed prune left."""
    where, fresh = Store(tmp_path / "store"), tmp_path / "fresh"
    for store, what in ((where.root, "old"), (fresh, "new")):
        for path in ("roots/root-lab-1.json", "root-lab/same/inputs.json", "root-lab/same/root", "root-lab/cut/root"):
            (store / path).parent.mkdir(parents=True, exist_ok=True)
            (store / path).write_text(what)
    bake._adopt(fresh, where)
    read = {str(p.relative_to(where.root)): p.read_text() for p in where.root.rglob("*") if p.is_file()}
    assert {name: text for name, text in read.items() if not name.startswith("locks/")} == {
        "roots/root-lab-1.json": "new",
        "root-lab/same/inputs.json": "old",
        "root-lab/same/root": "old",
        "root-lab/cut/root": "new",
    }
    assert not fresh.exists()


def test_folders_of_killed_bakes_are_cleaned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of a bake at work, nor of one whose machine was kept."""
    bakes = Store().root / "bakes"
    gone = 2**22 + 1  # above the highest PID that Linux gives
    for name in (f"director-key-{gone}", f"director-kept-{gone}", f"director-key-{os.getpid()}"):
        (bakes / name).mkdir(parents=True)
    monkeypatch.setattr(golden, "running", lambda folder: "kept" in folder.name)
    monkeypatch.setattr(settings.current, "dry_run", True)
    bake.clean_abandoned()
    assert len(list(bakes.iterdir())) == 3
    monkeypatch.setattr(settings.current, "dry_run", False)
    bake.clean_abandoned()
    assert {p.name for p in bakes.iterdir()} == {f"director-kept-{gone}", f"director-key-{os.getpid()}"}
