"""The disk: where things are, what GRUB is told, how files are laid over a tree."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from image import base
from image.base import MIB, SECTOR, Layout, Recipe
from pipeline import debroot, recipe
from pipeline.debroot import EPOCH
from pipeline.errors import BuildError

GOOD = """\
name: lvs-toy
kernel: lvs
tools: []
packages: [toyd]
kernel_args: [nohz=off]
disk_mib: 2048
qcow2_budget_mb: 300
"""


@pytest.fixture
def room(tmp_path: Path) -> Path:
    (tmp_path / "toy" / "rootfs" / "etc").mkdir(parents=True)
    (tmp_path / "toy" / "rootfs" / "etc" / "toy.conf").write_text("x\n")
    (tmp_path / "toy" / "image.yaml").write_text(GOOD)
    return tmp_path


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Who was made owner of what, instead of doing it: that takes root."""
    given: list[tuple[str, int, int]] = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: given.append((Path(path).name, uid, gid)))
    monkeypatch.setattr(os, "lchown", lambda path, uid, gid: given.append((Path(path).name, uid, gid)))
    return given


# --- layout


@pytest.mark.parametrize("mib", [1024, 2048, 3001, 65536])
def test_partitions_are_aligned_apart_and_inside(mib: int) -> None:
    layout = Layout(mib, "seed")
    parts = [layout.bios, layout.esp, layout.root]
    end = 34  # the first partition table
    for part in parts:
        assert part.offset % MIB == 0
        assert part.sectors * SECTOR % MIB == 0
        assert part.start >= end
        end = part.start + part.sectors
    # the second partition table takes the last 33 sectors
    assert end <= mib * MIB // SECTOR - 33
    assert layout.root.kib * 1024 == layout.root.sectors * SECTOR


def test_every_partition_is_sized_explicitly() -> None:
    layout = Layout(2048, "seed")
    lines = [line for line in layout.sfdisk_script().splitlines() if line.startswith("start=")]
    assert len(lines) == 3
    for line, part in zip(lines, [layout.bios, layout.esp, layout.root], strict=True):
        assert f"start={part.start}, size={part.sectors}, type={part.kind}, uuid={part.guid}," in line


def test_identifiers_follow_the_seed() -> None:
    first, again, other = Layout(2048, "a"), Layout(2048, "a"), Layout(2048, "b")
    assert first.sfdisk_script() == again.sfdisk_script()
    assert first.root.guid != other.root.guid
    assert len({first.bios.guid, first.esp.guid, first.root.guid, first.file_system, first.identifier("disk")}) == 5


# --- boot loader


def test_grub_configuration(room: Path) -> None:
    layout = Layout(2048, "seed")
    text = base.grub_configuration(layout, Recipe.load("toy", room))
    arguments = f"root=PARTUUID={layout.root.guid} ro panic=10 console=tty0 console=ttyS0,115200 nohz=off\n"
    assert f"    linux /boot/vmlinuz {arguments}" in text
    assert f"    linux /boot/vmlinuz.old {arguments}" in text
    # no entry for a kernel that is not there, and no way to it
    entries, conditional = text.split("if [ -e /boot/vmlinuz.old ]; then\n")
    assert entries.count("menuentry ") == 1 and "fallback" not in entries
    assert conditional.startswith("set fallback=1\nmenuentry ") and "previous kernel" in conditional
    assert "set timeout=1\n" in text
    assert "initrd" not in text


def test_grub_finds_the_file_system_that_fstab_mounts() -> None:
    layout = Layout(2048, "seed")
    assert f"--fs-uuid --set=root {layout.file_system}\n" in base.grub_start(layout)
    assert f"PARTUUID={layout.root.guid} / ext4 " in base.fstab(layout)


def test_boot_sector_points_at_the_core_image() -> None:
    place = Layout(2048, "seed").bios
    boot, core = base.bios_images(b"\xeb" * 512, b"\x11" * 4096, place)
    assert len(boot) == 440  # what follows is the disk's signature and the protective partition table
    assert struct.unpack_from("<Q", boot, 0x5C) == (place.start,)
    assert boot[0x66:0x68] == b"\x90\x90"
    assert struct.unpack_from("<Q", core, 0x1F4) == (place.start + 1,)
    assert len(core) == 4096


def test_core_image_that_does_not_fit_is_refused() -> None:
    place = Layout(2048, "seed").bios
    with pytest.raises(BuildError, match="core image has 1048577 bytes"):
        base.bios_images(bytes(512), bytes(MIB + 1), place)


def test_used_inodes_are_those_not_free() -> None:
    dump = (
        "Inode count:              32\nFirst inode:              11\n\nGroup 0: (Blocks 0-1)\n"
        "  Free inodes: 15-16\nGroup 1: (Blocks 2-3)\n  Free inodes: 18, 20-32\nGroup 2:\n  Free inodes: \n"
    )
    assert base.used_inodes(dump) == [2, 11, 12, 13, 14, 17, 19]
    with pytest.raises(BuildError, match="inode count"):
        base.used_inodes("dumpe2fs: No such file")


# --- recipes


def test_recipe(room: Path) -> None:
    image = Recipe.load("toy", room)
    assert image.packages == ("kernel-lvs", "toyd")
    assert image.boot_menu_seconds == 1


def test_all_problems_of_a_recipe_at_once(room: Path) -> None:
    text = GOOD.replace("disk_mib: 2048", "disk_mib: big").replace("tools: []", "tolls: []")
    (room / "toy" / "image.yaml").write_text(text + "modes: {etc/x: '644'}\n")
    with pytest.raises(BuildError) as caught:
        Recipe.load("toy", room)
    problems = "\n".join(caught.value.details)
    assert "unknown key tolls" in problems
    assert "missing key tools" in problems
    assert "disk_mib" in problems
    assert "modes.etc/x" in problems


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("[nohz=off]", "[root=/dev/sda1]", "root=/dev/sda1 is set by"),
        ("[nohz=off]", "[panic=0]", "panic=0 is set by"),
        ("[nohz=off]", '["a b"]', "kernel_args"),
        ("[nohz=off]", "['x;reboot']", "kernel_args"),
        ("[toyd]", "[kernel-lvs]", "comes by itself"),
        ("disk_mib: 2048", "disk_mib: 2048\nmodes: {etc/none: '0600'}", "no such file"),
    ],
)
def test_rules_of_a_recipe(room: Path, before: str, after: str, said: str) -> None:
    assert before in GOOD
    (room / "toy" / "image.yaml").write_text(GOOD.replace(before, after))
    with pytest.raises(BuildError) as caught:
        Recipe.load("toy", room)
    assert any(said in line for line in caught.value.details)


def test_unknown_role_names_the_known_ones(room: Path) -> None:
    with pytest.raises(BuildError, match=r"no image role 'other' \(known: toy\)"):
        Recipe.load("other", room)


def test_shipped_recipes() -> None:
    found = base.roles()
    assert {"director", "realserver"} <= set(found)
    for role in found:
        image = Recipe.load(role)
        assert (base.ROOM.parent / "kernel" / image.kernel).is_dir()
        for tool in image.tools:
            assert (base.ROOM.parent / "tools" / tool / "recipe.yaml").is_file()
    assert "nohz=off" in Recipe.load("director").kernel_args
    assert Recipe.load("director").qcow2_budget_mb <= 300
    recipe.load(base.ROOM / "root.yaml", debroot.SCHEMA)
    recipe.load(base.ROOM / "base.yaml", debroot.SCHEMA)


# --- laying files


def test_lay_normalises_owner_and_mode(room: Path, tmp_path: Path, owners: list[tuple[str, int, int]]) -> None:
    tree, rootfs = tmp_path / "tree", room / "toy" / "rootfs"
    tree.mkdir()
    (rootfs / "etc" / "toy.conf").chmod(0o666)
    (rootfs / "etc" / "run").write_text("#!/bin/sh\n")
    (rootfs / "etc" / "run").chmod(0o775)
    (rootfs / "etc" / "secret").write_text("s\n")
    (rootfs / "etc" / "link").symlink_to("toy.conf")
    laid = base.lay(rootfs, tree, {"etc/secret": "0600"})
    assert laid == ["etc/link", "etc/run", "etc/secret", "etc/toy.conf"]
    modes = {path.name: path.stat().st_mode & 0o7777 for path in (tree / "etc").iterdir() if not path.is_symlink()}
    assert modes == {"toy.conf": 0o644, "run": 0o755, "secret": 0o600}
    assert os.readlink(tree / "etc" / "link") == "toy.conf"
    assert {name for name, uid, gid in owners if (uid, gid) == (0, 0)} >= {"etc", "link", "run", "secret", "toy.conf"}


def test_lay_only_some(room: Path, tmp_path: Path, owners: list[tuple[str, int, int]]) -> None:
    tree, rootfs = tmp_path / "tree", room / "toy" / "rootfs"
    tree.mkdir()
    (rootfs / "etc" / "kernel").mkdir()
    (rootfs / "etc" / "kernel" / "hook").write_text("")
    (rootfs / "etc" / "kernelish").write_text("")
    assert base.lay(rootfs, tree, {}, only=("etc/kernel",)) == ["etc/kernel/hook"]


def test_lay_follows_the_images_own_links(room: Path, tmp_path: Path, owners: list[tuple[str, int, int]]) -> None:
    tree, rootfs = tmp_path / "tree", room / "toy" / "rootfs"
    (tree / "usr" / "lib").mkdir(parents=True)
    (tree / "lib").symlink_to("usr/lib")
    (tree / "usr" / "srv").symlink_to("/var/srv")  # absolute: meant inside the image, from its top
    for name in ("lib/x", "usr/srv/y"):
        (rootfs / name).parent.mkdir(parents=True, exist_ok=True)
        (rootfs / name).write_text(name)
    base.lay(rootfs, tree, {})
    assert (tree / "lib").is_symlink()
    assert (tree / "usr/lib/x").read_text() == "lib/x"
    assert (tree / "var/srv/y").read_text() == "usr/srv/y"


def test_no_path_leaves_the_tree(tmp_path: Path, owners: list[tuple[str, int, int]]) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "up").symlink_to("../../../..")
    assert base.inside(tree, Path("up/etc/passwd")) == tree / "etc/passwd"
    (tree / "a").symlink_to("b")
    (tree / "b").symlink_to("a")
    with pytest.raises(BuildError, match="circles"):
        base.inside(tree, Path("a/x"))


@pytest.mark.parametrize("kind", ["file over directory", "directory over file"])
def test_lay_refuses_a_change_of_kind(
    kind: str, room: Path, tmp_path: Path, owners: list[tuple[str, int, int]]
) -> None:
    tree, rootfs = tmp_path / "tree", room / "toy" / "rootfs"
    tree.mkdir()
    if kind == "file over directory":
        (tree / "etc" / "toy.conf").mkdir(parents=True)
    else:
        (tree / "etc").write_text("")
    with pytest.raises(BuildError, match="in the image"):
        base.lay(rootfs, tree, {})


# --- the finished tree


def test_boot_link_must_lead_to_a_kernel_with_modules(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    with pytest.raises(BuildError, match="put no kernel"):
        base.boot_links(tmp_path, "kernel-lvs")
    (tmp_path / "boot/vmlinuz-6").write_text("")
    with pytest.raises(BuildError, match="leads to no kernel"):
        base.boot_links(tmp_path, "kernel-lvs")
    (tmp_path / "boot/vmlinuz").symlink_to("vmlinuz-6")
    with pytest.raises(BuildError, match="no modules"):
        base.boot_links(tmp_path, "kernel-lvs")
    (tmp_path / "usr/lib/modules/6").mkdir(parents=True)
    (tmp_path / "usr/lib/modules/6/modules.dep").write_text("")
    base.boot_links(tmp_path, "kernel-lvs")


def test_nothing_is_newer_than_the_build(tmp_path: Path) -> None:
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    for path in (old, new):
        path.write_text("")
    link.symlink_to("nowhere")
    os.utime(old, (EPOCH - 5, EPOCH - 5))
    base.still(tmp_path)
    assert old.stat().st_mtime == EPOCH - 5
    for path in (new, link, tmp_path):
        assert path.lstat().st_mtime_ns == EPOCH * 10**9


def test_leftovers_go_and_apt_keeps_its_folders(tmp_path: Path) -> None:
    for name in ("var/cache/dnf/x", "var/cache/apt/x", "etc/ssh/ssh_host_rsa_key", "etc/ssh/sshd_config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    base.finish(tmp_path)
    assert not (tmp_path / "var/cache/dnf").exists()
    assert list((tmp_path / "var/cache/apt").iterdir()) == []
    assert [p.name for p in (tmp_path / "etc/ssh").iterdir()] == ["sshd_config"]
