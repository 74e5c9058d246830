"""Series, flavours and the spec template."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jinja2
import pytest

from kernel import build
from pipeline import patches
from pipeline.debroot import EPOCH, Root
from pipeline.errors import BuildError
from pipeline.store import Stage, Store


@dataclass(frozen=True)
class _Tarball:
    version: str = "6.12.107"
    sha256: str = "0" * 64
    filename: str = "linux_6.12.107.orig.tar.xz"

    def path(self) -> Path:
        raise AssertionError("a key must not need the tarball")


class _Root:
    def stage(self) -> Stage:
        return Stage("root-kernel", {}, lambda _out: None)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A copy of the room that a test may spoil."""
    return Path(shutil.copytree(build.ROOM, tmp_path / "kernel"))


def _kernels(room: Path, store: Path, tarball: _Tarball | None = None) -> build.Kernels:
    return build.Kernels(Store(store), tarball or _Tarball(), cast(Root, _Root()), room)


def _spec(name: str = "lvs", **changes: Any) -> str:
    item = replace(build.flavour(name), **changes)
    return build.spec(item, "6.12.107", "linux_6.12.107.orig.tar.xz", "1.0a1b2c3d", ["CFLAGS_MODULE=-g0"])


def test_flavours() -> None:
    assert build.flavours() == ["lvs", "rs"]


@pytest.mark.parametrize("name", build.flavours())
def test_series_is_what_lies_on_the_disk_and_is_sound(name: str) -> None:
    series = build.flavour(name).series
    assert set(series.names) == {p.name for p in (build.ROOM / name / "patches").glob("*")}
    assert patches.lint(series).lines == ()


def test_a_stray_patch_is_refused(room: Path) -> None:
    (room / "lvs" / "patches" / "0099-stray.patch").write_text("", encoding="utf-8")
    with pytest.raises(BuildError, match="1 problem") as caught:
        build.flavour("lvs", room)
    assert "0099-stray.patch" in caught.value.details[0]


def test_an_unknown_flavour_names_the_known_ones() -> None:
    with pytest.raises(BuildError) as caught:
        build.flavour("lvss")
    assert "lvs|rs" in caught.value.hint


def test_a_flavour_may_not_change_a_common_option(room: Path) -> None:
    """It would recompile nearly everything: flavours differ by leaves only."""
    (room / "rs" / "config.d").mkdir(exist_ok=True)
    (room / "rs" / "config.d" / "10-toa.config").write_text("# why: a test\nCONFIG_SMP=n\n", encoding="utf-8")
    with pytest.raises(BuildError) as caught:
        build.flavour("rs", room)
    assert re.fullmatch(
        r"kernel/rs/config.d/10-toa.config:2: CONFIG_SMP stands in kernel/config.d/20-platform.config:\d+ already",
        caught.value.details[0],
    )


@pytest.mark.parametrize("name", build.flavours())
def test_spec(name: str) -> None:
    lines = _spec(name).splitlines()
    assert f"%global flavour {name}" in lines
    assert "Version: 6.12.107" in lines
    assert "Release: 1.0a1b2c3d" in lines
    named = [line.split(": ")[1] for line in lines if re.match(r"Patch\d+: ", line)]
    assert named == [path.name for path in build.flavour(name).series.paths]
    assert "{{" not in "\n".join(lines)
    assert "{%" not in "\n".join(lines)


def test_spec_needs_every_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    render: Callable[..., str] = jinja2.Template.render
    monkeypatch.setattr(jinja2.Template, "render", lambda self, **words: render(self, **{**words, "summary": None}))
    assert "Summary: None" in _spec()
    monkeypatch.setattr(
        jinja2.Template,
        "render",
        lambda self, **words: render(self, **{k: v for k, v in words.items() if k != "summary"}),
    )
    with pytest.raises(jinja2.UndefinedError):
        _spec()


def test_the_stamp_is_the_epoch() -> None:
    from datetime import UTC, datetime

    assert datetime.strptime(build.STAMP, "%a %b %d %H:%M:%S UTC %Y").replace(tzinfo=UTC).timestamp() == EPOCH


def test_a_patch_changes_only_its_flavours_key(room: Path, tmp_path: Path) -> None:
    before = _kernels(room, tmp_path)
    keys = {name: before.stage(name).key for name in build.flavours(room)}
    patch = build.flavour("lvs", room).series.paths[0]
    patch.write_text(patch.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    after = _kernels(room, tmp_path)
    assert after.base_stage().key == before.base_stage().key
    assert after.stage("rs").key == keys["rs"]
    assert after.stage("lvs").key != keys["lvs"]
    assert after.uname("lvs") == f"6.12.107-1.{after.stage('lvs').key[:8]}.lvs"


def test_a_common_option_or_another_source_changes_all(room: Path, tmp_path: Path) -> None:
    before = _kernels(room, tmp_path)
    other = _kernels(room, tmp_path, _Tarball(version="6.12.108", sha256="1" * 64))
    assert other.base_stage().key != before.base_stage().key
    with (room / "config.d" / "40-net.config").open("a", encoding="utf-8") as stream:
        stream.write("CONFIG_NET_SCH_ETS=m\n")
    after = _kernels(room, tmp_path)
    assert after.base_stage().key != before.base_stage().key
    assert after.stage("rs").key != before.stage("rs").key


def test_a_comment_in_a_fragment_costs_no_compile(room: Path, tmp_path: Path) -> None:
    before = _kernels(room, tmp_path).base_stage().key
    path = room / "config.d" / "40-net.config"
    path.write_text("# another word\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert _kernels(room, tmp_path).base_stage().key == before


def test_a_fragment_of_the_debug_build_must_be_there(room: Path, tmp_path: Path) -> None:
    """Without one of them the kernel would build, and lack what is tested."""
    recipe = room / "kernel.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("  - 40-net\n", "  - 40-nett\n"), encoding="utf-8")
    with pytest.raises(BuildError, match=r"debug_fragments: there is no config\.d/40-nett\.config") as caught:
        _kernels(room, tmp_path).debug_stage()
    assert "40-net," in caught.value.hint


def test_two_series_that_change_one_file_are_not_laid_over_each_other(room: Path, tmp_path: Path) -> None:
    """The second would take the first one's change away without a word."""
    kernels = _kernels(room, tmp_path)
    for name in ("rs", "lvs"):
        assert build.touched(build.flavour(name, room).series)
    patch = build.flavour("rs", room).series.paths[-1]
    text = patch.read_text(encoding="utf-8")
    patch.write_text(text.replace("tools/testing/selftests/net/toa.sh", "net/toa/other.sh"), encoding="utf-8")
    other = room / "lvs" / "patches" / "0099-more.patch"
    shutil.copy(patch, other)
    with (room / "lvs" / "series").open("a", encoding="utf-8") as stream:
        stream.write(f"{other.name}\n")
    items = [build.flavour(name, room) for name in ("rs", "lvs")]
    with pytest.raises(BuildError, match=r"kernel/lvs and kernel/rs both change net/toa/other\.sh"):
        build.must_be_apart(items)
    build.must_be_apart([build.flavour(name) for name in ("rs", "lvs")])
    assert kernels.ipvs_stage("6.12.107-x", ("rs", "lvs")).key != kernels.ipvs_stage("6.12.107-x").key


def test_an_unknown_key_in_a_flavour_is_refused(room: Path) -> None:
    with (room / "rs" / "flavour.yaml").open("a", encoding="utf-8") as stream:
        stream.write("relese: 2\n")
    with pytest.raises(BuildError) as caught:
        build.flavour("rs", room)
    assert "unknown key relese" in caught.value.details[0]


def test_a_result_without_its_package_is_to_be_made_anew(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="0 packages of kernel-lvs") as caught:
        build.image(tmp_path, "lvs")
    assert caught.value.hint.startswith(f"rm -r {tmp_path} ")
