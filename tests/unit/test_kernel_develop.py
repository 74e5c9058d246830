"""A developer's build: what is laid into the tree, and how little is compiled for it."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kernel import build, config, develop
from pipeline import series, worktree
from pipeline.errors import BuildError
from pipeline.store import Stage, Store

IPVS = "net/netfilter/ipvs/ip_vs_core.c"
HEADER = "include/net/ip_vs.h"
NEW = "net/netfilter/ipvs/ip_vs_fnat.c"
GONE = "net/netfilter/ipvs/ip_vs_old.c"
FILES = {IPVS: "core\n", HEADER: "header\n", GONE: "old\n", "Documentation/a.rst": "words\n", "net/x/Kconfig": "k\n"}


@dataclass
class _Room:
    """The kernels of build.py, with commands that are only noted."""

    store: Store
    commands: list[list[str]] = field(default_factory=list)
    configured: int = 0
    fails: bool = False
    key: str = "1"

    recipe: dict[str, str] = field(default_factory=lambda: {"source": "linux"})
    tarball: Any = field(default_factory=lambda: SimpleNamespace(version="6.12.107"))
    options: tuple[config.Option, ...] = ()

    @property
    def room(self) -> Path:
        return build.ROOM

    def base_stage(self) -> Stage:
        def tree(out: Path) -> None:
            for name, text in FILES.items():
                (out / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
                (out / "tree" / name).write_text(text)
                os.utime(out / "tree" / name, (1, 1))
            (out / "tree/tools/testing/selftests/net/netfilter").mkdir(parents=True)
            (out / "tree/tools/testing/selftests/net/netfilter/ipvs.sh").write_text("#!/bin/sh\n")

        return Stage("kernel-base", {"key": self.key}, tree)

    def debug_stage(self) -> Stage:
        return Stage("kernel-debug", {}, self.base_stage().build)

    def debug_options(self) -> list[config.Option]:
        return []

    def cache(self) -> Path:
        return self.store.root

    def make(self, *words: str) -> list[str]:
        return ["make", *words]

    def make_debug(self, *words: str) -> list[str]:
        return self.make("ARCH=um", *words)

    def run_in_tree(self, command: list[str], mounts: dict[str, Any], *_: Any) -> None:
        if self.fails:
            raise BuildError("it does not compile", "read the log")
        self.commands.append([word for word in command if not word.startswith(("LOCALVERSION", "INSTALL", "-s"))])
        upper = mounts["overlays"][0].upper
        if "all" in command:
            (upper / "arch/x86/boot").mkdir(parents=True, exist_ok=True)
            (upper / "arch/x86/boot/bzImage").write_text("image")
            (upper / "vmlinux").write_text("program")
        if "modules_install" in command:
            (kernel,) = (path for path, inside in mounts["binds"].items() if inside == "/build/kernel")
            (local,) = (word.removeprefix("LOCALVERSION=") for word in command if word.startswith("LOCALVERSION="))
            (kernel / f"lib/modules/6.12.107{local}/kernel/net/netfilter/ipvs").mkdir(parents=True)
        if "modules" in command:
            (upper / "net/netfilter/ipvs").mkdir(parents=True, exist_ok=True)
            (upper / "net/netfilter/ipvs/ip_vs.ko").write_text("module")

    def configure(self, *_: Any) -> str:
        self.configured += 1
        return "CONFIG_A=y\n"


@pytest.fixture
def room(tmp_path: Path) -> _Room:
    return _Room(Store(tmp_path / "store"))


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., develop._Changes]:
    """What a developer changed: texts, or None for a file that is gone."""

    def changes(**texts: str | None) -> develop._Changes:
        found: dict[str, Path | None] = {}
        names = {"core": IPVS, "header": HEADER, "new": NEW, "old": GONE, "doc": "Documentation/a.rst",
                 "kconfig": "net/x/Kconfig"}  # fmt: skip
        for short, text in texts.items():
            name = names[short]
            found[name] = None
            if text is not None:
                path = tmp_path / "work" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                found[name] = path
        return develop._Changes("a tree", found)

    return changes


def _workshop(room: _Room) -> develop.Workshop:
    return develop.Workshop(cast(build.Kernels, room), debug=False)


def _build(room: _Room, changes: develop._Changes) -> list[list[str]]:
    """Build; returns the commands that it took."""
    room.commands = []
    _workshop(room).build(changes)
    return room.commands


ALL = [["make", "all"], ["make", "modules_install"]]
MODULES = [["make", "M=net/netfilter/ipvs", "modules"], ["depmod", "-b", "/build/kernel", "6.12.107-develop"]]


def test_first_everything_then_as_little_as_possible(room: _Room, tree: Callable[..., develop._Changes]) -> None:
    assert _build(room, tree(core="mine\n")) == ALL
    assert _build(room, tree(core="mine\n")) == []
    assert _build(room, tree(core="other\n")) == MODULES
    assert _build(room, tree(core="other\n", new="more\n")) == MODULES
    assert _build(room, tree(core="other\n", new="more\n", doc="words words\n")) == []
    assert _build(room, tree(core="other\n", new="more\n", header="h\n")) == ALL
    assert room.configured == 1


def test_flavours_do_not_share_a_folder(room: _Room, tree: Callable[..., develop._Changes]) -> None:
    """What is a module of one flavour's is compiled into the other's kernel, for all that is known."""
    _build(room, tree(core="mine\n"))
    other = develop.Workshop(cast(build.Kernels, room), debug=False, flavour="rs")
    assert other.folder != _workshop(room).folder
    assert other.build(tree(core="mine\n")).flavour == "rs"
    room.commands = []
    other.build(tree(core="other\n"))
    assert room.commands == ALL


def test_the_debug_build_is_a_program(room: _Room, tree: Callable[..., develop._Changes]) -> None:
    workshop = develop.Workshop(cast(build.Kernels, room), debug=True)
    built = workshop.build(tree(core="mine\n"))
    assert [command[:2] for command in room.commands] == [["make", "ARCH=um"]] * 2
    assert (built.debug, built.uname, built.image.read_text()) == (True, "6.12.107-debug", "program")
    room.commands = []
    workshop.build(tree(core="other\n"))
    assert room.commands[0] == ["make", "ARCH=um", "M=net/netfilter/ipvs", "modules"]


def test_a_flavour_that_nobody_knows(room: _Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "kernels", lambda _store: room)
    with pytest.raises(BuildError) as caught:
        develop.chosen(debug=False, flavour="sr", store=room.store)
    assert "lvs|rs|debian" in caught.value.hint
    with pytest.raises(BuildError, match="no flavour with a debug build 'debian'") as caught:
        develop.chosen(debug=True, flavour="debian", store=room.store)
    assert caught.value.hint.endswith("lvs|rs")


def test_the_result_can_be_booted(room: _Room, tree: Callable[..., develop._Changes]) -> None:
    built = _workshop(room).build(tree(core="mine\n"))
    assert built.image.read_text() == "image"
    assert (built.folder / "selftests/net/netfilter/ipvs.sh").exists()
    built = _workshop(room).build(tree(core="other\n"))
    module = built.folder / "lib/modules/6.12.107-develop/kernel/net/netfilter/ipvs/ip_vs.ko"
    assert module.read_text() == "module"


def test_what_is_laid(room: _Room, tree: Callable[..., develop._Changes]) -> None:
    workshop = _workshop(room)
    upper = workshop.folder / "upper"
    _build(room, tree(core="mine\n", old=None))
    assert (upper / IPVS).read_text() == "mine\n"
    assert stat.S_ISCHR((upper / GONE).lstat().st_mode), "overlayfs must hide the file below"
    assert not (upper / HEADER).exists()
    # Taken back: as in the release again, but newer than any object that was made of it.
    _build(room, tree(old="new words\n"))
    assert (upper / IPVS).read_text() == "core\n"
    assert (upper / IPVS).stat().st_mtime > 1000
    assert (upper / GONE).read_text() == "new words\n"
    _build(room, tree())
    assert (upper / GONE).read_text() == "old\n"


def test_a_new_file_that_is_taken_back_is_gone(room: _Room, tree: Callable[..., develop._Changes]) -> None:
    _build(room, tree(new="more\n"))
    _build(room, tree())
    assert not os.path.lexists(_workshop(room).folder / "upper" / NEW)


def test_what_did_not_compile_is_compiled_the_next_time(room: _Room, tree: Callable[..., develop._Changes]) -> None:
    _build(room, tree(core="mine\n"))
    room.fails = True
    with pytest.raises(BuildError):
        _build(room, tree(core="wrong\n"))
    room.fails = False
    assert _build(room, tree(core="wrong\n")) == MODULES
    room.fails = True
    with pytest.raises(BuildError):
        _build(room, tree(core="wrong\n", header="h\n"))
    room.fails = False
    # Only the .c changes now, but the header's objects are still those of before.
    assert _build(room, tree(core="right\n", header="h\n")) == ALL


@pytest.mark.parametrize("then", ["mine\n", "core\n"])
def test_what_a_killed_run_did_not_lay_is_laid(
    room: _Room, tree: Callable[..., develop._Changes], monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Also where the file is meanwhile as it was before that run."""
    _build(room, tree())
    upper = _workshop(room).folder / "upper"
    copy = shutil.copyfile

    def killed(source: Path, target: Path, **how: Any) -> Any:
        if upper not in Path(target).parents:
            return copy(source, target, **how)
        target.write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "copyfile", killed)
        _build(room, tree(core="mine\n"))
    assert (upper / IPVS).read_text() == "half"
    _build(room, tree(core=then))
    assert (upper / IPVS).read_text() == then


def test_kconfig_asks_for_a_new_configuration(room: _Room, tree: Callable[..., develop._Changes]) -> None:
    _build(room, tree())
    assert _build(room, tree(kconfig="config X\n")) == ALL
    assert room.configured == 2


def test_another_base_starts_anew(room: _Room, tree: Callable[..., develop._Changes]) -> None:
    _build(room, tree(core="mine\n"))
    room.key = "2"
    assert _build(room, tree(core="mine\n")) == ALL


def test_a_tree_of_another_release_is_refused(room: _Room, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(worktree, "differences", lambda _tree: ("linux 6.12.106", []))
    with pytest.raises(BuildError, match=r"was made from linux 6\.12\.106, the pinned source is linux 6\.12\.107"):
        develop._Changes.of_tree(cast(build.Kernels, room), tmp_path)


def test_a_built_kernel_is_remembered(tmp_path: Path) -> None:
    built = develop.Built("a tree", "6.12.107-debug", tmp_path, debug=True)
    assert develop.Built.load(built.save(tmp_path / "kernel.json")) == built
    with pytest.raises(BuildError, match="does not exist"):
        develop.Built.load(tmp_path / "none.json")


def test_a_debug_run_holds_what_it_works_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run would empty the folder of the series that the first one lays, and `clean` would take it."""
    store = Store(tmp_path / "store")
    held: list[bool] = []

    def built(_: object) -> str:
        with store.lock("kernel-develop-series-lvs", wait=False) as ours:
            held.append(not ours)
        return "built"

    workshop = SimpleNamespace(stage=Stage("toy", {}, lambda out: None), base=tmp_path, build=built)
    monkeypatch.setattr(develop, "Workshop", lambda *_, **__: workshop)
    monkeypatch.setattr(develop._Changes, "of_series", lambda *_: None)
    monkeypatch.setattr(series, "workplace", lambda _: tmp_path / "none")
    assert cast(str, develop.chosen(debug=True, flavour="lvs", store=store)) == "built"
    assert held == [True]
