"""The kernel that is tested: what the packages hold, or what a developer is working on, compiled as far as it changed.

A developer's build lives in the store under `kernel-develop/`: an overlay over the compiled common tree (or over the
debug tree) that stays from one run to the next. Only files that differ from the release are laid into it, and only
those that changed since the last time are laid again, so that make compiles what they touch and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kernel import build, config
from pipeline import progress, rpm, series, settings, testing, worktree
from pipeline.debroot import Root
from pipeline.errors import BuildError
from pipeline.sandbox import Overlay, Sandbox
from pipeline.store import Stage, Store, digest, remove_tree

TESTED = "lvs"  # the flavour that is meant when none is named
DEBIAN = "debian"  # is no flavour of ours, but one to test
JOINT = "joint"  # nor is this: see `joint`
TESTS = settings.TOP / "tests" / "kernel"
# Of each flavour the folder that only modules are made of, most of which its series writes.
_MODULES = {"lvs": build.IPVS, "rs": "net/toa"}
# What the kernel's own tests of the network need to run: scripts, nothing compiled.
_SELFTESTS = "tools/testing/selftests"
_SCRIPTS = ("net/netfilter", "net/lib.sh", "net/lib", "net/toa.sh", "net/toa_peer.py", "kselftest")
_REVISION = 1  # of the layout of a developer's folder
_UNKNOWN = "?"  # in the place of a digest: the file may be there in part
_SPACE = {"develop": 4.0, "unpacked": 0.5}  # GB; measured: an overlay with vmlinux and the installed modules 2.6


@dataclass(frozen=True)
class Built:
    """A kernel to boot.

    Attributes:
        title: for messages.
        uname: what `uname -r` prints.
        folder: holds boot/vmlinuz-UNAME, lib/modules/UNAME, selftests/.
        debug: whether it is the debug build.
        flavour: whose series it has.
    """

    title: str
    uname: str
    folder: Path
    debug: bool = False
    flavour: str = TESTED

    @property
    def image(self) -> Path:
        """What QEMU loads; of a debug build, which is one of User Mode Linux, the program."""
        return self.folder / "boot" / f"vmlinuz-{self.uname}"

    @property
    def initrd(self) -> Path | None:
        """What it loads beside that, if the kernel needs it to mount its root file system."""
        path = self.folder / "boot" / f"initrd-{self.uname}"
        return path if path.exists() else None

    def save(self, path: Path) -> Path:
        """Write it down for another process; returns `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**asdict(self), "folder": str(self.folder)}) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> Built:
        """Read what `save` wrote.

        Raises:
            BuildError: there is no such file.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BuildError(
                f"{path} does not exist", "invoke test-kernel   (it builds a kernel and names it)"
            ) from None
        return cls(**{**data, "folder": Path(data["folder"])})


def guest_root(store: Store | None = None) -> Root:
    """The Debian root in which kernels are tested."""
    return Root("root-guest", TESTS / "root.yaml", store or Store(), offline=settings.current.offline)


def keepalived_root(store: Store | None = None) -> Root:
    """The build root of the keepalived that is tested there: with sanitizers, SNMP and dbus."""
    return Root(
        "root-keepalived", TESTS / "keepalived" / "root.yaml", store or Store(), offline=settings.current.offline
    )


# --- what ships


def packaged(name: str, store: Store | None = None) -> Built:
    """A flavour's kernel as its package holds it, built if need be; or Debian's, or the joint one."""
    store = store or Store()
    if name == DEBIAN:
        return debian(store)
    if name == JOINT:
        return joint(store)
    room = build.kernels(store)
    folder = store.ensure(_unpacked_stage(room, name))
    title = f"kernel-{name} {room.tarball.version}-{room.release(name)}"
    return Built(title, room.uname(name), folder, flavour=name)


def _unpacked_stage(room: build.Kernels, name: str) -> Stage:
    package, base = room.stage(name), room.base_stage()

    def unpack(out: Path) -> None:
        room.store.require_space(_SPACE["unpacked"], f"unpacking kernel-{name}")
        rpm.unpack(room.sandbox(), build.image(room.store.path(package), name), out)
        changes = _Changes.of_series(room, name, room.store.path(base) / "tree", out / "patched")
        _selftests(room.store.path(base) / "tree", changes, out / "selftests")
        remove_tree(out / "patched")

    needs = [package, base, room.root.stage()]
    return Stage(f"unpacked-kernel-{name}", {"rev": _REVISION}, unpack, needs, title=f"unpacking kernel-{name}")


def _selftests(base: Path, changes: _Changes, out: Path) -> None:
    """The scripts of the kernel's network selftests, as the changes leave them."""
    for name in _SCRIPTS:
        source = base / _SELFTESTS / name
        if source.is_dir():
            shutil.copytree(source, out / name, ignore=shutil.ignore_patterns("*.c", "packetdrill"))
        elif source.is_file():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, out / name)
    for name, path in changes.files.items():
        inside = name.removeprefix(f"{_SELFTESTS}/")
        if inside == name or not inside.startswith(_SCRIPTS):
            continue
        target = out / inside
        if path is None:
            target.unlink(missing_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def joint(store: Store | None = None) -> Built:
    """The real server's kernel with the director's IPVS: both in one machine, as the packages hold them.

    Raises:
        BuildError: see `build.Kernels.ipvs_stage`.
    """
    store = store or Store()
    room = build.kernels(store)
    rs = packaged("rs", store)
    modules = room.ipvs_stage(rs.uname, ("rs", TESTED))
    unpacked = _unpacked_stage(room, "rs")

    def make(out: Path) -> None:
        for part in ("boot", "lib", "selftests"):
            shutil.copytree(store.path(unpacked) / part, out / part, symlinks=True, copy_function=rpm.link_or_copy)
        folder = out / "lib/modules" / rs.uname / "kernel" / build.IPVS
        remove_tree(folder)  # no module of another IPVS may stay beside ours
        folder.mkdir()
        for name in build.IPVS_MODULES:
            shutil.copyfile(store.path(modules) / f"{name}.ko", folder / f"{name}.ko")
        for path in (out / "lib/modules" / rs.uname).glob("modules.*"):
            # What depmod writes it writes anew; the rest is read only, and shares its bytes with the unpacked package.
            if path.name not in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
                path.unlink()
        room.sandbox().run(["depmod", "-b", "/build/out", rs.uname], binds={out: "/build/out"}, what="depmod")

    stage = Stage("joint-kernel", {"rev": _REVISION}, make, [unpacked, modules, room.root.stage()])
    return Built(f"{rs.title} with the IPVS of kernel-{TESTED}", rs.uname, store.ensure(stage), flavour=JOINT)


# --- what a distribution ships


def debian_root(store: Store | None = None) -> Root:
    """The Debian root that holds Debian's own kernel."""
    return Root(
        "root-debian-kernel", TESTS / "debian" / "root.yaml", store or Store(), offline=settings.current.offline
    )


def debian(store: Store | None = None) -> Built:
    """Debian's own kernel, with an initial file system that mounts what our kernels can mount by themselves."""
    store = store or Store()
    root = debian_root(store)
    folder = store.ensure(_debian_stage(store, root))
    (image,) = (folder / "boot").glob("vmlinuz-*")
    uname = image.name.removeprefix("vmlinuz-")
    return Built(f"Debian's kernel {uname}", uname, folder, flavour=DEBIAN)


def _debian_stage(store: Store, root: Root) -> Stage:
    def make(out: Path) -> None:
        tree = store.path(root.stage()) / "root"
        (image,) = (tree / "boot").glob("vmlinuz-*")
        uname = image.name.removeprefix("vmlinuz-")
        (out / "boot").mkdir()
        (out / "selftests").mkdir()
        shutil.copy(image, out / "boot" / image.name)
        shutil.copytree(tree / "usr/lib/modules" / uname, out / "lib/modules" / uname, symlinks=True)
        sandbox = Sandbox(tree)
        sandbox.run(["depmod", "-b", "/build/out", uname], binds={out: "/build/out"}, what="depmod")
        (out / "init").write_text(_INIT, encoding="utf-8")
        (out / "init").chmod(0o755)
        sandbox.run(["sh", "-ec", _INITRD, "-", uname], binds={out: "/build/out"}, what="making its initrd")
        (out / "init").unlink()

    return Stage("debian-kernel", {"init": _INIT, "initrd": _INITRD, "rev": _REVISION}, make, [root.stage()])


# The rest of the command line, which the kernel gives to it, is what our kernels start in the root file system.
_INIT = """#!/bin/busybox sh
set -e
mkdir -p /proc /root
mount -t proc proc /proc
for module in $(cat /modules); do insmod "/lib/$module"; done
options=$(sed -n 's/.*rootflags=\\([^ ]*\\).*/\\1/p' /proc/cmdline)
mount -t 9p -o "ro,$options" /dev/root /root
umount /proc
exec switch_root /root /bin/sh "$@"
"""
_INITRD = """
mkdir -p /tmp/initrd/bin /tmp/initrd/lib
cp /bin/busybox /tmp/initrd/bin/
for name in sh mkdir mount umount cat sed insmod switch_root; do ln -s busybox "/tmp/initrd/bin/$name"; done
cp /build/out/init /tmp/initrd/init
for name in virtio_pci 9pnet_virtio 9p overlay virtio_console; do
    modprobe -d /build/out -S "$1" --show-depends "$name"
done | sed -n 's/^insmod //p' | awk '!seen[$1]++ {print $1}' >/tmp/paths
for path in $(cat /tmp/paths); do
    cp "$path" /tmp/initrd/lib/
    basename "$path"
done >/tmp/initrd/modules
cd /tmp/initrd
find . | cpio -o -H newc --quiet | gzip -1n >"/build/out/boot/initrd-$1"
"""


# --- what a developer is working on


@dataclass(frozen=True)
class _Changes:
    """Files that differ from the release: where each lies now, or None for one that is gone."""

    title: str
    files: Mapping[str, Path | None] = field(default_factory=dict)

    @classmethod
    def of_series(cls, room: build.Kernels, name: str, base: Path, scratch: Path) -> _Changes:
        """What a flavour's series changes."""
        remove_tree(scratch)
        scratch.mkdir(parents=True)
        files: dict[str, Path | None] = dict.fromkeys(room.patched(build.flavour(name, room.room), base, scratch))
        files |= {str(path.relative_to(scratch)): path for path in sorted(scratch.rglob("*")) if path.is_file()}
        return cls(f"the series of kernel/{name}", files)

    @classmethod
    def of_tree(cls, room: build.Kernels, tree: Path, flavour: str = TESTED) -> _Changes:
        """What a git tree of `invoke unpack` changes, committed or not.

        Raises:
            BuildError: it was made from another release than the one that is pinned.
        """
        label, names = worktree.differences(tree)
        wanted = f"{room.recipe['source']} {room.tarball.version}"
        if label != wanted:
            raise BuildError(
                f"{tree} was made from {label}, the pinned source is {wanted}",
                f"invoke series-rebase kernel/{flavour} --version {room.tarball.version}, or move the tree away",
            )
        files = {name: tree / name if (tree / name).is_file() else None for name in names}
        return cls(f"the tree {tree}", files)


class Workshop:
    """A developer's folder: `upper` over a compiled tree, and the kernel that came out of it.

    Args:
        room: the kernels.
        debug: on the debug tree.
        flavour: whose series or tree is laid into it.
    """

    def __init__(self, room: build.Kernels, *, debug: bool, flavour: str = TESTED) -> None:
        self.room = room
        self.debug = debug
        self.flavour = flavour
        self.modules = _MODULES[flavour]
        self.stage = room.debug_stage() if debug else room.base_stage()
        kind = "debug" if debug else "plain"
        self.name = kind if flavour == TESTED else f"{kind}-{flavour}"
        self.folder = room.store.root / "kernel-develop" / self.name
        self.base = room.store.path(self.stage) / "tree"
        self.result = self.folder / "kernel"
        self.log = self.folder / "make.log"
        self._local = "debug" if debug else "develop"
        self._make = room.make_debug if debug else room.make
        self.uname = f"{room.tarball.version}-{self._local}"

    @property
    def _state_file(self) -> Path:
        return self.folder / "state.json"

    @contextmanager
    def open(self) -> Iterator[dict[str, Any]]:
        """Hold the folder; yields what is known about it, to be changed and given to `save`."""
        with self.room.store.lock(f"kernel-develop-{self.name}"):
            fresh = {"base": self.stage.key, "rev": _REVISION, "laid": {}, "pending": [], "config": "", "whole": False}
            state = fresh
            if self._state_file.exists():
                state = json.loads(self._state_file.read_text(encoding="utf-8"))
            if (state["base"], state["rev"]) != (fresh["base"], fresh["rev"]):
                progress.note(f"{self.folder} was made over another tree: it is made anew")
                remove_tree(self.folder)
                state = fresh
            self.folder.mkdir(parents=True, exist_ok=True)
            yield state

    def save(self, state: Mapping[str, Any]) -> None:
        """Write down what is known."""
        beside = self._state_file.with_suffix(".new")
        beside.write_text(json.dumps(state, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        beside.replace(self._state_file)

    def lay(self, changes: _Changes, state: dict[str, Any]) -> list[str]:
        """Bring the files of the tree up to date; returns the names of those that changed.

        Each gets the time of now, also where it becomes what it was in the release: the object beside it may be newer
        than the release's file.
        """
        laid: dict[str, str] = state["laid"]
        wanted = {name: digest(path) if path else "" for name, path in changes.files.items()}
        touched = sorted(name for name in {*laid, *wanted} if laid.get(name) != wanted.get(name))
        state["pending"] = sorted({*state["pending"], *touched})
        # Whatever a killed run leaves of these files, the next one lays them again.
        state["laid"] = {**laid, **dict.fromkeys(touched, _UNKNOWN)}
        self.save(state)
        for name in touched:
            # The overlay is not mounted now, so its upper layer may be changed as any folder.
            target = self.folder / "upper" / name
            source = changes.files[name] if name in changes.files else self.base / name
            if target.exists() or target.is_symlink() or _is_whiteout(target):
                target.unlink()
            if source is not None and source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                target.chmod(stat.S_IMODE(source.stat().st_mode))
            elif (self.base / name).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.mknod(target, stat.S_IFCHR, os.makedev(0, 0))  # how overlayfs says "gone"
        state["laid"] = wanted
        self.save(state)
        return touched

    def make(self, state: dict[str, Any]) -> None:
        """Compile and install what the pending changes touch.

        Raises:
            BuildError: it does not compile, or an option did not survive.
        """
        mounts = self._mounts()
        configured = self._configure(state, mounts)
        names = [name for name in state["pending"] if not name.startswith(build.INERT)]
        if state["whole"] and not configured and not names:
            return
        local = f"LOCALVERSION=-{self._local}"
        if state["whole"] and not configured and all(self._is_of_modules(name) for name in names):
            with progress.step(f"compiling the modules of {self.modules}"):
                make = self._make(local, f"M={self.modules}", "modules")
                self._run(make, mounts, f"compiling {self.modules}")
                self._install_modules(mounts)
            return
        state["whole"] = False
        self.save(state)
        with progress.step("compiling what changed"):
            self._run(self._make(local, "all"), mounts, "compiling the kernel")
        with progress.step("installing modules"):
            self._install(local)
        state["whole"] = True

    def _mounts(self) -> dict[str, Any]:
        overlay = Overlay(self.base, self.folder / "upper", self.folder / "work", build.TREE)
        return {"binds": {self.room.cache(): "/build/ccache"}, "overlays": [overlay]}

    def _run(self, command: list[str], mounts: Mapping[str, Any], what: str) -> None:
        self.log.unlink(missing_ok=True)
        self.room.run_in_tree(command, mounts, self.log, what, f"read {self.log}; the first error is what counts")

    def _options(self) -> list[config.Option]:
        item = build.flavour(self.flavour, self.room.room)
        if not self.debug:
            return [*self.room.options, *item.options]
        own = self.room.debug_options()
        kept = [option for option in item.options if option.name not in {o.name for o in own}]
        more = self.room.room / self.flavour / "debug.config"  # options that only the series knows
        extra = config.read([more], self.room.room.parent) if more.exists() else []
        return config.override([*own, *kept], extra)

    def _configure(self, state: dict[str, Any], mounts: Mapping[str, Any]) -> bool:
        """Configure where options or Kconfig files changed; returns whether the result is another."""
        options = self._options()
        kconfig = {name: value for name, value in state["laid"].items() if "Kconfig" in Path(name).name}
        asked = json.dumps([[[o.name, o.value] for o in options], kconfig])
        if state["config"] == asked:
            return False
        current = self.folder / "upper" / ".config"
        before = current.read_text(encoding="utf-8") if current.exists() else ""
        after = self.room.configure(options, mounts, self.folder, self.log, self._make)
        state["config"] = asked
        return after != before

    def _install(self, local: str) -> None:
        fresh = self.folder / "kernel.new"
        remove_tree(fresh)
        (fresh / "boot").mkdir(parents=True)
        mounts = self._mounts()
        mounts["binds"][fresh] = "/build/kernel"
        install = self._make("-s", local, "INSTALL_MOD_PATH=/build/kernel", "INSTALL_MOD_STRIP=1", "modules_install")
        self._run(install, mounts, "installing modules")
        image = "vmlinux" if self.debug else "arch/x86/boot/bzImage"  # User Mode Linux is a program
        shutil.copy(self.folder / "upper" / image, fresh / "boot" / f"vmlinuz-{self.uname}")
        for link in ("build", "source"):
            (fresh / "lib/modules" / self.uname / link).unlink(missing_ok=True)
        remove_tree(self.result)
        fresh.rename(self.result)

    def _install_modules(self, mounts: Mapping[str, Any]) -> None:
        """Copy the modules that make M= rebuilt; depmod, because one of them may need another than before."""
        target = self.result / "lib/modules" / self.uname / "kernel" / self.modules
        for module in sorted((self.folder / "upper" / self.modules).glob("*.ko")):
            beside = target / f".{module.name}.new"
            shutil.copyfile(module, beside)
            beside.replace(target / module.name)
        inside = {**mounts, "binds": {**mounts["binds"], self.result: "/build/kernel"}}
        self._run(["depmod", "-b", "/build/kernel", self.uname], inside, "depmod")

    def build(self, changes: _Changes) -> Built:
        """Bring the kernel up to date with the changes.

        Raises:
            BuildError: it does not compile.
        """
        self.room.store.ensure(self.stage)
        with self.open() as state:
            if not state["whole"]:
                self.room.store.require_space(_SPACE["develop"], "building a kernel to test")
            touched = self.lay(changes, state)
            if touched:
                more = f" and {len(touched) - 5} more" if len(touched) > 5 else ""
                progress.note(f"changed: {', '.join(touched[:5])}{more}")
            try:
                self.make(state)
            finally:
                self.save(state)
            remove_tree(self.result / "selftests")
            _selftests(self.base, changes, self.result / "selftests")
            state["pending"] = []
            self.save(state)
        return Built(changes.title, self.uname, self.result, self.debug, self.flavour)

    def _is_of_modules(self, name: str) -> bool:
        """Whether only those modules are made of it, and the same ones as before."""
        return name.startswith(f"{self.modules}/") and name.endswith((".c", ".h"))


def _is_whiteout(path: Path) -> bool:
    try:
        return stat.S_ISCHR(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def chosen(*, debug: bool, flavour: str = TESTED, store: Store | None = None) -> Built:
    """The kernel for `invoke test-kernel`: the unpacked tree if there is one; else the package, or the series to debug.

    Raises:
        BuildError: there is no such flavour, or it does not compile.
    """
    store = store or Store()
    if flavour in (DEBIAN, JOINT) and not debug:
        return packaged(flavour, store)
    room = build.kernels(store)
    if flavour not in _MODULES:
        known = "|".join(_MODULES if debug else [*_MODULES, DEBIAN, JOINT])
        kind = "flavour with a debug build" if debug else "flavour"
        raise BuildError(f"there is no {kind} {flavour!r} to test", f"invoke test-kernel --flavour {known}")
    tree = series.workplace(build.ROOM / flavour)
    if tree.exists():
        return Workshop(room, debug=debug, flavour=flavour).build(_Changes.of_tree(room, tree, flavour))
    if not debug:
        return packaged(flavour, store)
    workshop = Workshop(room, debug=True, flavour=flavour)
    store.ensure(workshop.stage)
    scratch = store.root / "tmp" / f"kernel-develop-series-{flavour}"
    with store.lock(scratch.name):  # of a second run, and of `clean`, which takes what nobody holds
        try:
            return workshop.build(_Changes.of_series(room, flavour, workshop.base, scratch))
        finally:
            remove_tree(scratch)


def test(expression: str, *, debug: bool, flavour: str = TESTED) -> None:
    """Build the kernel that is worked on, boot it and run its tests.

    Args:
        expression: pytest's `-k`, or "".
        debug: on the debug build.
        flavour: whose kernel.

    Raises:
        BuildError: it does not compile, or a test failed.
    """
    built = chosen(debug=debug, flavour=flavour)
    note = built.save(settings.out() / "test-kernel" / f"kernel-{flavour}.json")
    arguments = [str(TESTS), "-m", "guest", "--kernel-under-test", str(note)]
    if expression:
        arguments += ["-k", expression]
    if settings.current.keep:
        arguments += ["--keep-machine", "--exitfirst"]
    testing.pytest(*arguments)
