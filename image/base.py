"""A root file system becomes a bootable disk: partitions, ext4, boot loaders in a plain file, nothing mounted.

The same inputs give the same bytes: identifiers come from the stage's key, times from one date. The disk boots under
BIOS and UEFI. There is no initramfs: storage and ext4 are built into our kernels.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image import packages
from pipeline import progress, recipe, store
from pipeline.debroot import EPOCH, Root
from pipeline.errors import BuildError, Problems
from pipeline.sandbox import Sandbox
from pipeline.store import Stage, Store

ROOM = Path(__file__).parent
SECTOR = 512
MIB = 1024 * 1024
_PER_MIB = MIB // SECTOR
BIOS_MIB = 1  # GRUB's core image, 60 to 120 KiB
ESP_MIB = 32  # one GRUB binary; FAT16 can be as small as this, and mtools reads it (FAT32 this small it does not)
_NAMESPACE = uuid.UUID("5d6c2a52-7d54-4ad5-93d4-6d0a6a4f7a10")  # ours, random; identifiers are derived below it

# All that GRUB needs to read its configuration and start a kernel is inside its image: no module directory in /boot.
_GRUB_MODULES = (
    "normal", "linux", "ext2", "part_gpt", "search", "search_fs_uuid", "configfile", "echo", "test", "true",
    "serial", "terminal", "sleep", "halt", "reboot", "ls", "cat", "minicmd", "regexp",
)  # fmt: skip
_BIOS_MODULES = ("biosdisk", "vga_text")
_UEFI_MODULES = ("fat", "efi_gop", "all_video", "gfxterm")

# Laid into the tree before packages are installed as well as after: scriptlets ask them.
_EARLY = (
    "etc/kernel",  # hooks that run when a kernel arrives (the boot link) …
    "usr/lib/lvsforge",  # … and what they call
    "etc/rpm",  # where rpm's database is
    "etc/systemd/system-preset",  # which units `systemctl preset` turns on: Debian's default is all of them
    "usr/lib/systemd/system-preset",
)

# Left behind by the installation; each holds times, or paths of the build, or a copy of the repository.
_LEFTOVERS = (
    "var/cache/dnf",
    "var/lib/dnf",
    "var/log/dnf.log",
    "var/log/dnf.librepo.log",
    "var/log/dnf.rpm.log",
    "var/log/hawkey.log",
    "var/cache/ldconfig/aux-cache",  # inode numbers and times of the builder's file system
    "var/log/bootstrap.log",
    "var/log/alternatives.log",
    "var/log/dpkg.log",
    "var/log/apt",
    "var/lib/apt/lists",
    "var/cache/apt",
    "var/cache/debconf/templates.dat-old",
    "var/cache/debconf/config.dat-old",
    "var/lib/dpkg/status-old",
    "var/lib/dpkg/diversions-old",
    "var/lib/dpkg/statoverride-old",
    "etc/passwd-",
    "etc/group-",
    "etc/shadow-",
    "etc/gshadow-",
    "etc/subuid-",
    "etc/subgid-",
    "root/.rpmdb",
)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "kernel", "tools", "packages", "kernel_args", "disk_mib", "qcow2_budget_mb"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z][a-z0-9-]*$"},
        "kernel": {"type": "string", "pattern": "^[a-z]+$"},
        "tools": {"type": "array", "uniqueItems": True, "items": {"type": "string", "pattern": "^[a-z][a-z0-9-]*$"}},
        "packages": {
            "type": "array",
            "uniqueItems": True,
            "items": {"type": "string", "pattern": "^[a-z][a-z0-9+._-]*$"},
        },
        "kernel_args": {
            "type": "array",
            "uniqueItems": True,
            # no blanks, quotes or `$`: the words go into grub.cfg as they are
            "items": {"type": "string", "pattern": "^[A-Za-z0-9_.,:=/+-]+$"},
        },
        "modules": {
            "type": "array",
            "uniqueItems": True,
            "items": {"type": "string", "pattern": "^[a-z0-9_]+$"},
        },
        "disk_mib": {"type": "integer", "minimum": 1024, "maximum": 65536},
        "qcow2_budget_mb": {"type": "integer", "minimum": 1},
        "boot_menu_seconds": {"type": "integer", "minimum": 0, "maximum": 60},
        "modes": {
            "type": "object",
            "propertyNames": {"pattern": "^[^/].*$"},
            "additionalProperties": {"type": "string", "pattern": "^0[0-7]{3,4}$"},
        },
    },
}


@dataclass(frozen=True)
class Recipe:
    """An image's `image.yaml`.

    Attributes:
        role: the folder's name (`director`).
        path: the recipe.
        name: the image's name (`lvs-director`).
        kernel: the flavour it boots (a folder of kernel/); its package is added to `packages`.
        tools: folders of tools/ whose packages the image's repository holds.
        packages: what dnf installs, the kernel first.
        kernel_args: added to the kernel's command line.
        modules: kernel modules that the bake must be able to load.
        disk_mib: the disk's size.
        qcow2_budget_mb: more than this (10^6 bytes) fails the bake.
        boot_menu_seconds: how long GRUB waits for a key.
        modes: permissions of files in rootfs that differ from 0644 and 0755 (git keeps no others).
    """

    role: str
    path: Path
    name: str
    kernel: str
    tools: tuple[str, ...]
    packages: tuple[str, ...]
    kernel_args: tuple[str, ...]
    modules: tuple[str, ...]
    disk_mib: int
    qcow2_budget_mb: int
    boot_menu_seconds: int
    modes: Mapping[str, str]

    @classmethod
    def load(cls, role: str, room: Path = ROOM) -> Recipe:
        """Read `image/<role>/image.yaml`.

        Raises:
            BuildError: there is no such role, or the recipe is wrong; all problems at once.
        """
        path = room / role / "image.yaml"
        if not path.exists():
            known = ", ".join(roles(room)) or "none"
            raise BuildError(f"there is no image role {role!r} (known: {known})", f"ls {room}/*/image.yaml")
        data = recipe.load(path, SCHEMA)
        problems = Problems()
        kernel_package = f"kernel-{data['kernel']}"
        if kernel_package in data["packages"]:
            problems.add("packages", f"{kernel_package} comes by itself; leave it out")
        for name in data.get("modes", {}):
            if not any(os.path.lexists(folder / name) for folder in rootfs_folders(role, room)):
                problems.add(f"modes.{name}", "no such file in common/rootfs or the role's rootfs")
        for argument in data["kernel_args"]:
            if argument.split("=")[0] in ("root", "ro", "rw", "init", "panic", "console"):
                problems.add("kernel_args", f"{argument} is set by image/base.py")
        problems.raise_if_any(str(path), f"correct {path}")
        return cls(
            role=role,
            path=path,
            name=data["name"],
            kernel=data["kernel"],
            tools=tuple(data["tools"]),
            packages=(kernel_package, *data["packages"]),
            kernel_args=tuple(data["kernel_args"]),
            modules=tuple(data.get("modules", ())),
            disk_mib=data["disk_mib"],
            qcow2_budget_mb=data["qcow2_budget_mb"],
            boot_menu_seconds=data.get("boot_menu_seconds", 1),
            modes=data.get("modes", {}),
        )


def roles(room: Path = ROOM) -> list[str]:
    """Every folder that holds an image.yaml."""
    return sorted(path.parent.name for path in room.glob("*/image.yaml"))


def rootfs_folders(role: str, room: Path = ROOM) -> list[Path]:
    """The folders laid over the tree, in this order: what all images share, then the role's own."""
    return [path for path in (room / "common" / "rootfs", room / role / "rootfs") if path.is_dir()]


# --- layout -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """A partition: name and GPT type, place in sectors, identifier."""

    name: str
    kind: str
    start: int
    sectors: int
    guid: str

    @property
    def offset(self) -> int:
        """Its first byte."""
        return self.start * SECTOR

    @property
    def kib(self) -> int:
        """Its size as mke2fs takes it."""
        return self.sectors * SECTOR // 1024


@dataclass(frozen=True)
class Layout:
    """Where everything is on a disk of `mib` MiB whose identifiers derive from `seed`."""

    mib: int
    seed: str

    def identifier(self, what: str) -> str:
        """A UUID that depends on the seed and on what it identifies."""
        return str(uuid.uuid5(_NAMESPACE, f"{self.seed}/{what}"))

    @property
    def bios(self) -> Partition:
        """GRUB's core image."""
        kind = "21686148-6449-6E6F-744E-656564454649"
        return Partition("bios", kind, _PER_MIB, BIOS_MIB * _PER_MIB, self.identifier("part-bios"))

    @property
    def esp(self) -> Partition:
        """The EFI system partition."""
        kind = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
        start = self.bios.start + self.bios.sectors
        return Partition("esp", kind, start, ESP_MIB * _PER_MIB, self.identifier("part-esp"))

    @property
    def root(self) -> Partition:
        """The rest but for the last MiB, which holds the second partition table: whole MiB, sized explicitly.

        sfdisk rounds a partition without a size down by itself, and a file system sized by the unrounded range would
        only be found out by the guest's kernel (bad geometry).
        """
        kind = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"  # root of x86-64: systemd-repart and growfs find it by this
        start = self.esp.start + self.esp.sectors
        return Partition("root", kind, start, (self.mib - 1) * _PER_MIB - start, self.identifier("part-root"))

    @property
    def file_system(self) -> str:
        """The UUID of the root file system."""
        return self.identifier("root-file-system")

    def sfdisk_script(self) -> str:
        """The partition table in sfdisk's words."""
        lines = ["label: gpt", f"label-id: {self.identifier('disk')}", "unit: sectors", "first-lba: 34"]
        for part in (self.bios, self.esp, self.root):
            lines.append(
                f'start={part.start}, size={part.sectors}, type={part.kind}, uuid={part.guid}, name="{part.name}"'
            )
        return "\n".join(lines) + "\n"


def kernel_command_line(layout: Layout, extra: Sequence[str]) -> str:
    """The kernel's arguments: the root file system, both consoles (the last one is /dev/console), the role's own.

    A machine that panics comes back by itself after 10 s: its neighbours carry its traffic meanwhile, and nobody is at
    the console. Here and not as a sysctl, for a kernel that does not get as far as those.
    """
    root = f"root=PARTUUID={layout.root.guid}"
    return " ".join([root, "ro", "panic=10", "console=tty0", "console=ttyS0,115200", *extra])


def grub_configuration(layout: Layout, image: Recipe) -> str:
    """`/boot/grub/grub.cfg`: the newest kernel, and the one that ran before it when there is one.

    It names links, not versions: a kernel package's hook moves the links, and nothing has to rewrite this file. A
    newest kernel that GRUB cannot load (a damaged file) is no reason to stay in the menu.
    """
    arguments = kernel_command_line(layout, image.kernel_args)
    return f"""\
# Written by the image build. The kernels are links kept by /etc/kernel/postinst.d; edit the arguments here.
set default=0
set timeout={image.boot_menu_seconds}
if serial --unit=0 --speed=115200; then
    terminal_input console serial
    terminal_output console serial
fi
menuentry "{image.name}" {{
    linux /boot/vmlinuz {arguments}
}}
if [ -e /boot/vmlinuz.old ]; then
set fallback=1
menuentry "{image.name}, previous kernel" {{
    linux /boot/vmlinuz.old {arguments}
}}
fi
"""


def grub_start(layout: Layout) -> str:
    """The configuration inside GRUB's own image: find the root file system, go on from there."""
    return f"search --no-floppy --fs-uuid --set=root {layout.file_system}\nset prefix=($root)/boot/grub\n"


def fstab(layout: Layout) -> str:
    """`/etc/fstab`: by it root is checked, and remounted read-write."""
    return f"# Written by the image build.\nPARTUUID={layout.root.guid} / ext4 rw,errors=remount-ro 0 1\n"


# --- the tree ---------------------------------------------------------------------------------------------------


def lay(source: Path, tree: Path, modes: Mapping[str, str], only: Sequence[str] = ()) -> list[str]:
    """Lay a rootfs folder over a tree: root owns everything, permissions are 0755 or 0644 or as `modes` says.

    Links inside the tree are followed as the image would follow them (`/lib` is `usr/lib`), never out of it.

    Args:
        source: a folder with files at their final path.
        tree: the root file system.
        modes: path to octal permissions, for what git cannot keep.
        only: lay only what is below these paths.

    Returns:
        The paths laid, relative to the tree.

    Raises:
        BuildError: a file would replace a directory or the other way round.
    """
    laid = []
    for path in sorted(source.rglob("*")):
        name = str(path.relative_to(source))
        if "__pycache__" in path.parts or (only and not any(name == o or name.startswith(o + "/") for o in only)):
            continue
        target = inside(tree, Path(name).parent) / Path(name).name
        if path.is_symlink():
            if target.is_dir() and not target.is_symlink():
                raise BuildError(f"{path} is a link, but a directory in the image", f"rm {path}")
            target.unlink(missing_ok=True)
            target.symlink_to(os.readlink(path))
            os.lchown(target, 0, 0)
        elif path.is_dir():
            made = inside(tree, Path(name))
            if made.exists() and not made.is_dir():
                raise BuildError(f"{path} is a directory, but a file in the image", f"rm -r {path}")
            if not made.exists():
                made.mkdir(parents=True)
                os.chown(made, 0, 0)
                made.chmod(int(modes.get(name, "0755"), 8))
            elif name in modes:
                made.chmod(int(modes[name], 8))
            continue
        else:
            if target.is_dir() and not target.is_symlink():
                raise BuildError(f"{path} is a file, but a directory in the image", f"rm {path}")
            target.unlink(missing_ok=True)
            shutil.copyfile(path, target)
            os.chown(target, 0, 0)
            default = "0755" if path.stat().st_mode & 0o100 else "0644"
            target.chmod(int(modes.get(name, default), 8))
        laid.append(name)
    return laid


def inside(tree: Path, name: Path) -> Path:
    """Where a path of the image is on this machine, links resolved below the tree; parents that miss are made."""
    here = tree
    todo = list(name.parts)
    hops = 0
    while todo:
        part = todo.pop(0)
        if part in ("/", "."):
            continue
        if part == "..":
            here = here.parent if here != tree else tree
            continue
        step = here / part
        if step.is_symlink():
            hops += 1
            if hops > 40:
                raise BuildError(f"{name}: links in circles in the image", f"ls -l {step}")
            link = os.readlink(step)
            if link.startswith("/"):
                here = tree
            todo = [*Path(link).parts, *todo]
            continue
        if not step.exists() and todo:
            step.mkdir()
            os.chown(step, 0, 0)
            step.chmod(0o755)
        here = step
    return here


def boot_links(tree: Path, kernel: str) -> None:
    """Check that `/boot/vmlinuz` leads to a kernel with its modules.

    Raises:
        BuildError: it does not.
    """
    found = sorted(p.name for p in (tree / "boot").glob("vmlinuz-*"))
    link = tree / "boot" / "vmlinuz"
    hint = "read image/common/rootfs/etc/kernel/postinst.d and the %posttrans of kernel/kernel.spec.j2"
    if not found:
        raise BuildError(f"{kernel} put no kernel into /boot", hint)
    if not link.is_symlink() or not (tree / "boot" / os.readlink(link)).is_file():
        message = "/boot/vmlinuz leads to no kernel: the hook in /etc/kernel/postinst.d did not run"
        raise BuildError(message, hint, found)
    release = os.readlink(link).removeprefix("vmlinuz-")
    if not (tree / "usr/lib/modules" / release / "modules.dep").is_file():
        raise BuildError(f"the kernel {release} has no modules in /lib/modules/{release}", hint)


def still(tree: Path) -> int:
    """Give everything newer than the build's date that date; returns how many were newer."""
    count = 0
    for path in walk(tree):
        stat = path.lstat()
        if stat.st_mtime_ns > EPOCH * 10**9:
            os.utime(path, ns=(EPOCH * 10**9, EPOCH * 10**9), follow_symlinks=False)
            count += 1
    return count


def walk(tree: Path) -> Iterator[Path]:
    """Every path of a tree, the tree itself last."""
    for folder, folders, files in os.walk(tree, topdown=False):
        for name in [*files, *folders]:
            yield Path(folder) / name
    yield tree


# --- the disk ---------------------------------------------------------------------------------------------------


def write_disk(sandbox: Sandbox, tree: Path, disk: Path, layout: Layout, log: Path) -> None:
    """Write a root file system to a raw disk image that boots under BIOS and UEFI.

    Args:
        sandbox: the toolbox.
        tree: the finished tree.
        disk: the image to make; sparse.
        layout: where everything goes.
        log: takes the tools' output.

    Raises:
        BuildError: a tool failed, or the finished file system does not pass e2fsck.
    """
    work = disk.parent
    with disk.open("wb") as stream:
        stream.truncate(layout.mib * MIB)
    inside_disk, inside_work = f"/build/work/{disk.name}", "/build/work"
    env = {"E2FSPROGS_FAKE_TIME": str(EPOCH)}

    def tool(*argv: str, stdin: str | None = None, what: str, ro: Mapping[Path, str] | None = None) -> None:
        sandbox.run(
            argv, binds={work: inside_work}, ro_binds=ro, env=env, cwd=inside_work, stdin=stdin, log=log, what=what
        )

    with progress.step("partitions and file system"):
        tool("sfdisk", "--quiet", inside_disk, stdin=layout.sfdisk_script(), what="writing the partition table")
        root = layout.root
        tool(
            "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "1", "-L", "root", "-U", layout.file_system,
            # GRUB 2.06 cannot read these two features
            "-O", "^metadata_csum_seed,^orphan_file",
            # A new file reads as zeros: nobody has to write zeros, not the guest's kernel after its first boot either.
            "-E", f"offset={root.offset},hash_seed={layout.identifier('hash')},root_owner=0:0,"
            "assume_storage_prezeroed=1,lazy_itable_init=1,lazy_journal_init=1",
            "-d", "/build/tree", inside_disk, f"{root.kib}k",
            what="making the root file system", ro={tree: "/build/tree"},
        )  # fmt: skip
        _fix_times(sandbox, disk, root, env, log)
        tool("e2fsck", "-f", "-n", f"{inside_disk}?offset={root.offset}", what="checking the root file system")
    with progress.step("boot loaders"):
        _write_esp(tool, disk, layout)
        _write_bios(tool, disk, layout)


def _fix_times(sandbox: Sandbox, disk: Path, root: Partition, env: Mapping[str, str], log: Path) -> None:
    """Set ctime, atime and crtime of every inode: mke2fs copies them from the builder's own file system."""
    inside_disk = f"/build/work/{disk.name}?offset={root.offset}"
    binds = {disk.parent: "/build/work"}
    dump = sandbox.run(["dumpe2fs", inside_disk], binds=binds, env=env, what="reading the root file system").stdout
    commands = [
        f"set_inode_field <{number}> {field} {value}\n"
        for number in used_inodes(dump)
        for field, value in (
            ("ctime", f"@{EPOCH}"), ("atime", f"@{EPOCH}"), ("crtime", f"@{EPOCH}"),
            ("ctime_extra", "0"), ("atime_extra", "0"), ("crtime_extra", "0"),
        )
    ]  # fmt: skip
    script = disk.parent / "debugfs.script"
    script.write_text("".join(commands), encoding="ascii")
    argv = ["sh", "-c", 'debugfs -w -f /build/work/debugfs.script "$1" >/dev/null', "debugfs", inside_disk]
    sandbox.run(argv, binds=binds, env=env, log=log, what="setting the times of the root file system")
    script.unlink()


def used_inodes(dump: str) -> list[int]:
    """The inodes in use according to `dumpe2fs`: the root's, and all from the first ordinary one that are not free."""
    match = re.search(r"^Inode count:\s+(\d+)", dump, re.M)
    first = re.search(r"^First inode:\s+(\d+)", dump, re.M)
    if not match or not first:
        raise BuildError("dumpe2fs did not name an inode count", "invoke doctor", dump.splitlines()[:20])
    free: set[int] = set()
    for line in re.findall(r"^\s+Free inodes:[ \t]*(\S.*)?$", dump, re.M):
        for part in filter(None, (p.strip() for p in line.split(","))):
            low, _, high = part.partition("-")
            free.update(range(int(low), int(high or low) + 1))
    return [2, *(n for n in range(int(first[1]), int(match[1]) + 1) if n not in free)]


def _write_esp(tool: Any, disk: Path, layout: Layout) -> None:
    work = disk.parent
    (work / "start.cfg").write_text(grub_start(layout), encoding="ascii")
    inside_work = "/build/work"
    tool(
        "grub-mkimage", "-O", "x86_64-efi", "-o", f"{inside_work}/BOOTX64.EFI", "-p", "/boot/grub",
        "-c", f"{inside_work}/start.cfg", *_GRUB_MODULES, *_UEFI_MODULES, what="making GRUB for UEFI",
    )  # fmt: skip
    fat = work / "esp.img"
    with fat.open("wb") as stream:
        stream.truncate(layout.esp.sectors * SECTOR)
    volume = uuid.UUID(layout.identifier("esp")).hex[:8]
    os.utime(work / "BOOTX64.EFI", (EPOCH, EPOCH))
    inside_fat = f"{inside_work}/esp.img"
    tool("mkfs.fat", "-F", "16", "--invariant", "-i", volume, "-n", "ESP", inside_fat, what="making the ESP")
    tool("mmd", "-i", inside_fat, "::/EFI", "::/EFI/BOOT", what="making the ESP")
    # -m keeps the file's date; directories made by mmd take SOURCE_DATE_EPOCH
    tool("mcopy", "-m", "-i", inside_fat, f"{inside_work}/BOOTX64.EFI", "::/EFI/BOOT/", what="filling the ESP")
    _copy_into(disk, layout.esp.offset, fat)
    for name in ("BOOTX64.EFI", "esp.img"):
        (work / name).unlink()


def _write_bios(tool: Any, disk: Path, layout: Layout) -> None:
    work = disk.parent
    tool(
        "grub-mkimage", "-O", "i386-pc", "-o", "/build/work/core.img", "-p", "/boot/grub",
        "-c", "/build/work/start.cfg", *_GRUB_MODULES, *_BIOS_MODULES, what="making GRUB for BIOS",
    )  # fmt: skip
    tool("cp", "/usr/lib/grub/i386-pc/boot.img", "/build/work/boot.img", what="making GRUB for BIOS")
    core = (work / "core.img").read_bytes()
    boot, core = bios_images((work / "boot.img").read_bytes(), core, layout.bios)
    with disk.open("r+b") as stream:
        stream.write(boot)  # 440 bytes: the disk's signature and the protective partition table follow them
        stream.seek(layout.bios.offset)
        stream.write(core)
    for name in ("core.img", "boot.img", "start.cfg"):
        (work / name).unlink()


def bios_images(boot: bytes, core: bytes, place: Partition) -> tuple[bytes, bytes]:
    """Point GRUB's boot sector and its core image at the place where the core image will be.

    What `grub-bios-setup` does on a device: the boot sector gets the core's first sector (at 0x5c), the core's own
    first sector gets the list of the others (start at 0x1f4), and the test for a floppy drive (0x66) is removed.

    Returns:
        The first 440 bytes of the disk, and the core image.

    Raises:
        BuildError: the core image does not fit its partition.
    """
    if len(core) > place.sectors * SECTOR:
        message = f"GRUB's core image has {len(core)} bytes, its partition {place.sectors * SECTOR}"
        raise BuildError(message, "git diff image/")
    sector = bytearray(boot[:440])
    struct.pack_into("<Q", sector, 0x5C, place.start)
    sector[0x66:0x68] = b"\x90\x90"
    patched = bytearray(core)
    struct.pack_into("<Q", patched, 0x1F4, place.start + 1)
    return bytes(sector), bytes(patched)


def _copy_into(disk: Path, offset: int, part: Path) -> None:
    """Copy a file into the disk, leaving holes where it holds zeros."""
    zero = bytes(MIB)
    with disk.open("r+b") as target, part.open("rb") as source:
        while block := source.read(MIB):
            if block != zero[: len(block)]:
                target.seek(offset)
                target.write(block)
            offset += len(block)


# --- stages -----------------------------------------------------------------------------------------------------


def base_root(where: Store, *, offline: bool = False) -> Root:
    """The Debian tree that every image starts from."""
    return Root("base-tree", ROOM / "base.yaml", where, offline=offline)


def toolbox_root(where: Store, *, offline: bool = False) -> Root:
    """The build root that has the tools of this room."""
    return Root("root-image", ROOM / "root.yaml", where, offline=offline)


def disk_stage(where: Store, image: Recipe, base: Stage, toolbox: Stage, repository: Stage) -> Stage:
    """The stage whose result is `disk.raw`: the base tree with packages and the role's files, ready to boot.

    Args:
        where: the store.
        image: the recipe.
        base: the base tree.
        toolbox: the build root with the tools.
        repository: the signed repository with exactly the packages of this image, and the shim.
    """
    folders = rootfs_folders(image.role, image.path.parent.parent)
    inputs = {
        "recipe": {
            "name": image.name,
            "packages": list(image.packages),
            "kernel_args": list(image.kernel_args),
            "disk_mib": image.disk_mib,
            "boot_menu_seconds": image.boot_menu_seconds,
            "modes": dict(image.modes),
        },
        "rootfs": {path.parent.name: store.tree_digest(path) for path in folders},
        "code": store.tree_digest(ROOM / "base.py", ROOM / "packages.py"),
    }
    stage: Stage

    def build(out: Path) -> None:
        where.require_space(3.0, f"the disk of the {image.role} image")
        sandbox = Sandbox(where.path(toolbox) / "root")
        make_disk(sandbox, image, where.path(base) / "root", where.path(repository), out, stage.key)

    stage = Stage(
        f"disk-{image.role}", inputs, build, [base, toolbox, repository], title=f"disk of the {image.role} image"
    )
    return stage


def make_disk(sandbox: Sandbox, image: Recipe, base: Path, repository: Path, out: Path, key: str) -> None:
    """Make `disk.raw` and `packages.json` in `out` from a base tree and a repository.

    Raises:
        BuildError: a package is refused, a scriptlet failed, no kernel boots, a tool failed.
    """
    tree = out / "tree"
    log = out / "disk.log"
    layout = Layout(image.disk_mib, key)
    folders = rootfs_folders(image.role, image.path.parent.parent)
    with progress.step("packages"):
        wanted = packages.choose(repository, [packages.SHIM, *image.packages], str(image.path))
        copy_tree(sandbox, base, tree)
        for folder in folders:
            lay(folder, tree, image.modes, only=_EARLY)
        packages.install(sandbox, tree, repository, wanted, out / "dnf.log")
    with progress.step("files of the image"):
        for folder in folders:
            lay(folder, tree, image.modes)
        boot_links(tree, image.packages[0])
        (tree / "boot/grub").mkdir(parents=True, exist_ok=True)
        (tree / "boot/grub/grub.cfg").write_text(grub_configuration(layout, image), encoding="ascii")
        (tree / "etc/fstab").write_text(fstab(layout), encoding="ascii")
        (tree / "etc/lvsforge-release").write_text(release(image, key), encoding="ascii")
        present = {"rpm": packages.installed(sandbox, tree), "deb": packages.debian_packages(tree)}
        finish(tree)
    write_disk(sandbox, tree, out / "disk.raw", layout, log)
    (out / "packages.json").write_text(recipe_json(present), encoding="utf-8")
    store.remove_tree(tree)
    for name in ("dnf.conf", "rpm.macros"):
        (out / name).unlink(missing_ok=True)


def copy_tree(sandbox: Sandbox, source: Path, target: Path) -> None:
    """Copy a tree with owners, links, capabilities; a copy, because rpm changes files in place."""
    target.mkdir()
    binds = {target: "/build/copy"}
    argv = ["cp", "-a", "--reflink=auto", "/build/source/.", "/build/copy/"]
    sandbox.run(argv, binds=binds, ro_binds={source: "/build/source"}, what="copying the base tree")


def release(image: Recipe, key: str) -> str:
    """`/etc/lvsforge-release`; the bake adds IMAGE_VERSION."""
    return f"IMAGE_NAME={image.name}\nIMAGE_ROLE={image.role}\nIMAGE_DISK={key}\n"


def finish(tree: Path) -> None:
    """Remove what the installation left, and everything that differs between two builds."""
    for name in _LEFTOVERS:
        path = tree / name
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            store.remove_tree(path)
            if name.startswith(("var/cache/apt", "var/lib/apt", "var/log/apt")):
                path.mkdir()  # apt expects its folders
    for path in tree.glob("etc/ssh/ssh_host_*"):
        path.unlink()
    still(tree)


def recipe_json(data: Any) -> str:
    """JSON as this room writes it: sorted, indented, one newline at the end."""
    return json.dumps(data, indent=1, sort_keys=True) + "\n"
