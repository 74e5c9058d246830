"""The kernel stages: one common tree, compiled once, and the flavours on top of it.

`kernel-base` is the unpatched source with the common configuration, compiled at `/build/linux`. A flavour lays an
overlay over that tree, applies its series, adds its own fragments and runs make again: Kbuild compiles what the
patches and options touch, links, and rpmbuild packages the result from the same tree. So a second flavour, or
another line in a patch, costs minutes.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jinja2

from kernel import config
from pipeline import patches, progress, recipe, rpm, run, sources
from pipeline.debroot import EPOCH, Root
from pipeline.errors import BuildError
from pipeline.sandbox import Overlay, Sandbox, require_overlays
from pipeline.settings import current
from pipeline.store import Stage, Store, digest, remove_tree

ROOM = Path(__file__).resolve().parent
TREE = "/build/linux"  # in every object's debug information and in __FILE__: the same for every builder
STAMP = "Wed Jan  1 00:00:00 UTC 2025"  # EPOCH, as the kernel prints it in /proc/version
# User Mode Linux: what emulation makes ten times as slow as it is, a process of this machine does at its full speed.
DEBUG_ARCH = "um"
Make = Callable[..., list[str]]
# Raised when this file builds other bytes from the same inputs.
_BASE_REVISION = 1
_FLAVOUR_REVISION = 2
_IPVS_REVISION = 1
_SPACE = {"base": 6.0, "flavour": 4.0}  # GB; measured: the tree 3.3 at its end, an overlay with the packages 2.5
IPVS = "net/netfilter/ipvs"
IPVS_MODULES = ("ip_vs", "ip_vs_rr")  # what comparisons of kernels need of it
# Changes below them alter no object of the kernel.
INERT = ("Documentation/", "tools/", "LICENSES/", "MAINTAINERS", "CREDITS", ".gitignore", ".mailmap")

RECIPE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["source", "make_flags", "debug_fragments"],
    "properties": {
        "source": {"type": "string", "pattern": "^[a-z][a-z0-9-]*$"},
        "debug_fragments": {"type": "array", "items": {"type": "string", "pattern": "^[0-9]+-[a-z-]+$"}},
        "make_flags": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[A-Z_]+=[A-Za-z0-9_.,=+-]+$"},
        },
    },
}

FLAVOUR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["summary", "description", "release"],
    "properties": {
        "summary": {"type": "string", "minLength": 1, "maxLength": 79, "pattern": "^[^\n]*[^.\n]$"},
        "description": {"type": "string", "minLength": 1},
        "release": {"type": "integer", "minimum": 1},
    },
}


class Tarball(Protocol):
    """The kernel's source as `pipeline` hands it to us."""

    @property
    def version(self) -> str:
        """`6.12.107`."""
        ...

    @property
    def sha256(self) -> str:
        """Of the file."""
        ...

    @property
    def filename(self) -> str:
        """The file's name."""
        ...

    def path(self) -> Path:
        """The file, fetched and checked if need be."""
        ...


@dataclass(frozen=True)
class Flavour:
    """A folder of this room: a series, fragments and a few words.

    Attributes:
        name: the folder, and the last part of `uname -r`.
        summary, description: of the package.
        release: the part of the RPM release that a person raises.
        series: its patches, in order.
        options: what its own fragments ask for.
        fragments: those fragments.
    """

    name: str
    summary: str
    description: str
    release: int
    series: patches.Series
    options: tuple[config.Option, ...]
    fragments: tuple[Path, ...]


class PinnedTarball:
    """The kernel of `sources.yaml`: the tarball in the store if there is one (perhaps a stand-in), else the pin.

    Knowing version and hash opens no connection, so that `invoke status` can name keys; `path` fetches.
    """

    def __init__(self, pins: sources.Sources, name: str) -> None:
        self._pins = pins
        self._name = name
        pin = pins.pin(name)
        found = pins.present(name)
        self.version = found.version if found else pin.version
        self.sha256 = found.sha256 if found else pin.sha256
        self.filename = found.path.name if found else pin.file

    def path(self) -> Path:
        """The checked file.

        Raises:
            BuildError: it cannot be had, or the archives offered another version than the key was made for.
        """
        found = self._pins.resolve(self._name)
        if found.sha256 != self.sha256:
            raise BuildError(
                f"{self._name} {self.version} is gone from the archives; {found.version} was fetched in its place",
                "the same command again (it builds that version), or --locked to insist",
            )
        return found.path


def flavours(room: Path = ROOM) -> list[str]:
    """The names of the flavours: the folders that hold a `flavour.yaml`."""
    return sorted(path.parent.name for path in room.glob("*/flavour.yaml"))


def flavour(name: str, room: Path = ROOM) -> Flavour:
    """Read a flavour's folder.

    Raises:
        BuildError: there is no such flavour, or something in its folder is wrong.
    """
    if name not in flavours(room):
        raise BuildError(
            f"there is no kernel flavour {name!r}",
            f"invoke build-kernel --flavour {'|'.join(flavours(room))}   (or make kernel/{name}/flavour.yaml)",
        )
    folder = room / name
    data = recipe.load(folder / "flavour.yaml", FLAVOUR_SCHEMA)
    common = config.require(config.fragments(room / "config.d"), room / "config.d")
    own = config.fragments(folder / "config.d")
    before = len(config.read(common, room.parent))
    # Read together, so that an option which stands in the common fragments as well is refused.
    options = config.read([*common, *own], room.parent)[before:]
    return Flavour(
        name,
        data["summary"],
        data["description"],
        data["release"],
        patches.read(folder),
        tuple(options),
        tuple(own),
    )


def spec(item: Flavour, version: str, tarball: str, release: str, make_flags: Sequence[str], room: Path = ROOM) -> str:
    """The spec file of a flavour.

    Args:
        item: the flavour.
        version: of the kernel.
        tarball: the source's file name.
        release: `NUMBER.KEY8`.
        make_flags: from `kernel.yaml`.
        room: where the template is.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  a spec file, no web page
        loader=jinja2.FileSystemLoader(room),
    )
    return environment.get_template("kernel.spec.j2").render(
        flavour=item.name,
        summary=item.summary,
        description=item.description,
        version=version,
        release=release,
        tarball=tarball,
        patches=item.series.names,
        make_flags=make_flags,
        stamp=STAMP,
    )


class Kernels:
    """The stages of this room.

    Args:
        store: takes results and the compiler cache.
        tarball: the kernel's source.
        root: `kernel/root.yaml`.
        room: this folder; a test may have another.
    """

    def __init__(self, store: Store, tarball: Tarball, root: Root, room: Path = ROOM) -> None:
        self.store = store
        self.tarball = tarball
        self.root = root
        self.room = room
        self.recipe: Mapping[str, Any] = recipe.load(room / "kernel.yaml", RECIPE_SCHEMA)
        paths = config.require(config.fragments(room / "config.d"), room / "config.d")
        self.options = config.read(paths, room.parent)

    # -- what the tasks ask for

    @functools.cache  # noqa: B019  one object a run; it holds no more than two stages
    def base_stage(self) -> Stage:
        """The common tree: `tree/` is what lies at /build/linux, compiled."""
        inputs = {
            "source": {"version": self.tarball.version, "sha256": self.tarball.sha256},
            "options": {option.name: option.value for option in self.options},
            "make_flags": self.recipe["make_flags"],
            "epoch": EPOCH,
            "rev": _BASE_REVISION,
        }
        return Stage(
            "kernel-base",
            inputs,
            lambda out: self._build_base(self.options, out, self.make),
            [self.root.stage()],
            title=f"compiling the common kernel tree, linux {self.tarball.version}",
        )

    @functools.cache  # noqa: B019
    def debug_stage(self) -> Stage:
        """As the common tree, with what finds bugs: for `invoke test-kernel --debug`, in no package."""
        options = self.debug_options()
        inputs = {
            **self.base_stage().inputs,
            "options": {option.name: option.value for option in options},
            "arch": DEBUG_ARCH,
        }
        return Stage(
            "kernel-debug",
            inputs,
            lambda out: self._build_base(options, out, self.make_debug),
            [self.root.stage()],
            title=f"compiling the debug kernel tree, linux {self.tarball.version}; once, half an hour on two cores",
        )

    def debug_options(self) -> list[config.Option]:
        """The common fragments that the recipe names, and `debug.config`, which has the last word.

        Raises:
            BuildError: the recipe names one that is not there; or see `config.read`.
        """
        taken = self.recipe["debug_fragments"]
        paths = {path.stem: path for path in config.fragments(self.room / "config.d")}
        if missing := [name for name in taken if name not in paths]:
            raise BuildError(
                f"kernel/kernel.yaml: debug_fragments: there is no config.d/{missing[0]}.config",
                f"one of {', '.join(paths)}",
            )
        own = config.read([self.room / "debug.config"], self.room.parent)
        return config.override(config.read([paths[name] for name in sorted(taken)], self.room.parent), own)

    @functools.cache  # noqa: B019
    def stage(self, name: str) -> Stage:
        """A flavour's packages: `kernel-NAME`, `kernel-NAME-devel`, the source package; `config` beside them.

        Raises:
            BuildError: see `flavour`.
        """
        item = flavour(name, self.room)
        inputs = {
            "flavour": {"summary": item.summary, "description": item.description, "release": item.release},
            "series": [[path.name, digest(path)] for path in item.series.paths],
            "options": {option.name: option.value for option in item.options},
            "spec": digest(self.room / "kernel.spec.j2"),
            "macros": digest(rpm.MACROS),
            "rev": _FLAVOUR_REVISION,
        }
        return Stage(
            f"kernel-{name}",
            inputs,
            lambda out: self._build_flavour(item, out),
            [self.base_stage()],
            title=f"building kernel-{name}",
        )

    def ipvs_stage(self, uname: str, names: Sequence[str] = ()) -> Stage:
        """The modules of IPVS for a kernel of another series: they name its release, so it loads them.

        They are compiled in the common tree, over which the series and options of these flavours are laid. The first is
        the one that the kernel was made of, so that both agree about structures; none at all is the unpatched kernel.

        Args:
            uname: of the kernel that is to load them.
            names: flavours, of which no two may change the same file of the kernel.
        """
        inputs = {"rev": _IPVS_REVISION, "uname": uname, "make_flags": self.recipe["make_flags"]}
        return Stage(
            f"ipvs-{'-'.join(names) or 'stock'}",
            inputs,
            lambda out: self._build_ipvs([flavour(name, self.room) for name in names], uname, out),
            [self.base_stage(), *(self.stage(name) for name in names)],
            title=f"compiling the modules of IPVS, {' and '.join(names) or 'unpatched'}, for {uname}",
        )

    def release(self, name: str) -> str:
        """`NUMBER.KEY8` of a flavour's packages."""
        return f"{flavour(name, self.room).release}.{self.stage(name).key[:8]}"

    def uname(self, name: str) -> str:
        """What `uname -r` prints under a flavour."""
        return f"{self.tarball.version}-{self.release(name)}.{name}"

    # -- how

    def sandbox(self) -> Sandbox:
        """The build root, which is there by then."""
        return Sandbox(self.store.path(self.root.stage()) / "root")

    def cache(self) -> Path:
        """The compiler cache."""
        folder = self.store.root / "ccache"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/lib/ccache:/usr/sbin:/usr/bin:/sbin:/bin",
            "CCACHE_DIR": "/build/ccache",
            "CCACHE_MAXSIZE": "10G",
            "CCACHE_COMPILERCHECK": "content",  # the same compiler in a root made later
            # Never CCACHE_DEPEND, though it would save a tenth: without the preprocessor's output ccache cannot see
            # .incbin, and hands out a boot image (piggy.S) with the kernel of an earlier build in it. The namespace
            # parts us from caches that were filled that way.
            "CCACHE_NAMESPACE": "2",
            "KBUILD_BUILD_TIMESTAMP": STAMP,
            "KBUILD_BUILD_USER": "lvsforge",
            "KBUILD_BUILD_HOST": "lvsforge",
            "KBUILD_BUILD_VERSION": "1",
            "RPM_BUILD_NCPUS": str(current.jobs),
        }

    def make(self, *words: str) -> list[str]:
        """A make line with the recipe's flags."""
        return ["make", f"-j{current.jobs}", *self.recipe["make_flags"], *words]

    def make_debug(self, *words: str) -> list[str]:
        """A make line for the debug build, which is of another architecture."""
        return self.make(f"ARCH={DEBUG_ARCH}", *words)

    def run_in_tree(
        self, command: Sequence[str], mounts: Mapping[str, Any], log: Path, what: str, hint: str = ""
    ) -> None:
        """Run a command in the build root, at the tree.

        Raises:
            BuildError: it failed.
        """
        self.sandbox().run(command, **mounts, env=self._environment(), cwd=TREE, log=log, what=what, hint=hint)

    def _build_base(self, options: Sequence[config.Option], out: Path, make: Make) -> None:
        self.store.require_space(_SPACE["base"], "compiling the kernel")
        require_overlays(self.store.root)  # which every flavour is built on: half an hour later
        log = out / "base.log"
        tree = out / "tree"
        tree.mkdir()
        tarball = self.tarball.path()
        inside = f"/build/{tarball.name}"
        mounts: dict[str, Any] = {
            "binds": {tree: TREE, self.cache(): "/build/ccache"},
            "ro_binds": {tarball: inside},
        }
        with progress.step(f"unpacking {tarball.name}"):
            unpack = ["tar", "-xf", inside, "--strip-components=1", "--no-same-owner", "-C", TREE]
            self.run_in_tree(unpack, mounts, log, f"unpacking {tarball.name}", f"rm {tarball}   (and fetch it again)")
        self.configure(options, mounts, out, log, make)
        with progress.step(f"compiling with {current.jobs} jobs"):
            # Everything but the link of vmlinux: a flavour has another release string and links it in any case.
            words = make("LOCALVERSION=-base", "modpost", "modules")
            hint = f"read {log}; the first error is what counts"
            self.run_in_tree(words, mounts, log, "compiling the common kernel tree", hint)
        (tree / "vmlinux.o").unlink()  # half a gigabyte of debug information that every flavour links anew

    def _build_flavour(self, item: Flavour, out: Path) -> None:
        self.store.require_space(_SPACE["flavour"], f"building kernel-{item.name}")
        log = out / "make.log"
        base = self.store.path(self.base_stage()) / "tree"
        overlay = Overlay(base, out / "upper", out / "work", TREE)
        mounts: dict[str, Any] = {"binds": {self.cache(): "/build/ccache"}, "overlays": [overlay]}
        self._patch(item, base, mounts, out, log)
        result = self.configure([*self.options, *item.options], mounts, out, log)
        (out / f"kernel-{item.name}.config").write_text(result, encoding="utf-8")
        release = f"{item.release}.{self.stage(item.name).key[:8]}"
        tarball = self.tarball.path()
        text = spec(item, self.tarball.version, tarball.name, release, self.recipe["make_flags"], self.room)
        with progress.step(f"compiling and packaging kernel-{item.name} {self.tarball.version}-{release}"):
            rpm.build(
                self.sandbox(),
                text,
                f"kernel-{item.name}",
                [tarball, out / f"kernel-{item.name}.config", *item.series.paths],
                out,
                what=f"building kernel-{item.name}",
                defines={"lvsforge_tree": TREE},
                binds=mounts["binds"],
                overlays=[overlay],
                env=self._environment(),
                hint=f"read {out / 'rpmbuild.log'}; the first error is what counts",
            )
        for left in (overlay.upper, overlay.work, Path(f"{overlay.upper}.merged")):
            remove_tree(left)

    def _build_ipvs(self, items: Sequence[Flavour], uname: str, out: Path) -> None:
        base = self.store.path(self.base_stage()) / "tree"
        overlay = Overlay(base, out / "upper", out / "work", TREE)
        mounts: dict[str, Any] = {"binds": {self.cache(): "/build/ccache"}, "overlays": [overlay]}
        log = out / "make.log"
        must_be_apart(items)
        for item in items:
            self._patch(item, base, mounts, out, log)
        if items:
            self.configure([*self.options, *(option for item in items for option in item.options)], mounts, out, log)
        # The common tree's vmlinux was never linked, so modpost knows none of its symbols; the loader does.
        local = f"LOCALVERSION={uname.removeprefix(self.tarball.version)}"
        words = [local, "KBUILD_MODPOST_WARN=1", *(f"{IPVS}/{name}.ko" for name in IPVS_MODULES)]
        self.run_in_tree(self.make(*words), mounts, log, "compiling the modules of IPVS", f"read {log}")
        for name in IPVS_MODULES:
            shutil.copyfile(overlay.upper / IPVS / f"{name}.ko", out / f"{name}.ko")
        for left in (overlay.upper, overlay.work, Path(f"{overlay.upper}.merged")):
            remove_tree(left)

    def _patch(self, item: Flavour, base: Path, mounts: Mapping[str, Any], out: Path, log: Path) -> None:
        """Lay the files as the series makes them over the tree."""
        if not item.series.names:
            return
        scratch = out / "patched"
        gone = self.patched(item, base, scratch)
        inside = {**mounts, "ro_binds": {scratch: "/build/patched"}}
        self.run_in_tree(["cp", "-a", "/build/patched/.", TREE], inside, log, "laying the patched files over the tree")
        if gone:
            self.run_in_tree(["rm", "-f", *gone], inside, log, "removing the files that a patch removes")
        remove_tree(scratch)

    def patched(self, item: Flavour, base: Path, scratch: Path) -> list[str]:
        """Apply a series to copies of the files that it touches.

        Args:
            item: the flavour.
            base: the unpatched tree.
            scratch: takes the copies.

        Returns:
            The names of the files that the series removes.

        Raises:
            BuildError: a patch does not apply.
        """
        names = touched(item.series)
        for name in names:
            if (base / name).is_file():
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(base / name, scratch / name)
        patches.apply(scratch, item.series, label=f"linux {self.tarball.version}")
        return [name for name in names if not (scratch / name).exists()]

    def new_warnings(self, name: str, out: Path) -> list[str]:
        """Compile the C files that a series touches with W=1, with and without it; returns the warnings that it adds.

        Args:
            name: the flavour.
            out: an empty directory on a file system that can hold an overlay.

        Raises:
            BuildError: a file does not compile.
        """
        item = flavour(name, self.room)
        base = self.store.path(self.base_stage()) / "tree"
        changes = [change for path in item.series.paths for change in patches.parse(path).changes]
        # A C file that another one includes is compiled with that.
        text = "".join(path.read_text(encoding="utf-8") for path in item.series.paths)
        parts = set(re.findall(r'^\+#include "([^"]+\.c)"$', text, re.MULTILINE))
        units = {c.path for c in changes if c.new and c.path.endswith(".c") and Path(c.path).name not in parts}
        objects = sorted(str(Path(path).with_suffix(".o")) for path in units)
        if not objects:
            return []
        seen: list[set[str]] = []
        for state in ("before", "after"):
            folder = out / state
            folder.mkdir()
            overlay = Overlay(base, folder / "upper", folder / "work", TREE)
            mounts: dict[str, Any] = {"binds": {self.cache(): "/build/ccache"}, "overlays": [overlay]}
            log = folder / "make.log"
            if state == "after":
                self._patch(item, base, mounts, folder, log)
                if item.options:  # without them the compiler would not see what the series adds
                    self.configure([*self.options, *item.options], mounts, folder, log)
            # A file that the series adds has no warnings before it.
            there = [o for o in objects if state == "after" or (base / o).with_suffix(".c").is_file()]
            make = self.make("LOCALVERSION=-base", "KBUILD_MODULES=1", "W=1", *there)
            self.run_in_tree(make, mounts, log, f"compiling what kernel/{name} touches, with W=1")
            text = log.read_text(encoding="utf-8", errors="replace")
            seen.append({re.sub(r":\d+(:\d+)?:", ":", line) for line in text.splitlines() if "warning:" in line})
        return sorted(seen[1] - seen[0])

    def configure(
        self,
        options: Sequence[config.Option],
        mounts: Mapping[str, Any],
        out: Path,
        log: Path,
        make: Make | None = None,
    ) -> str:
        """Make `.config` from nothing but the options, and refuse it if one of them did not survive."""
        asked = out / "asked.config"
        asked.write_text(config.text(options), encoding="utf-8")
        ro_binds = {**mounts.get("ro_binds", {}), asked: "/build/asked.config"}
        mounts = {**mounts, "ro_binds": ro_binds}
        with progress.step("configuring"):
            words = (make or self.make)("-s", "KCONFIG_ALLCONFIG=/build/asked.config", "allnoconfig")
            self.run_in_tree(words, mounts, log, "configuring the kernel")
        shown: run.Result = self.sandbox().run(["cat", f"{TREE}/.config"], **mounts)
        config.check(options, config.parse(shown.stdout))
        asked.unlink()
        return shown.stdout


def touched(series: patches.Series) -> list[str]:
    """The files that a series changes, makes or removes."""
    changes = [change for path in series.paths for change in patches.parse(path).changes]
    return sorted({name for change in changes for name in (change.old, change.new) if name})


def must_be_apart(items: Sequence[Flavour]) -> None:
    """Refuse flavours whose series change the same file of the kernel, because a file is laid as a whole.

    Raises:
        BuildError: two do.
    """
    changed: dict[str, str] = {}
    for item in items:
        for name in touched(item.series):
            if name in changed and not name.startswith(INERT):
                raise BuildError(
                    f"kernel/{item.name} and kernel/{changed[name]} both change {name}",
                    "carry both changes in one series: nothing lays them over each other",
                )
            changed[name] = item.name


def image(packages: Path, name: str) -> Path:
    """The binary package of a flavour among a stage's results.

    Raises:
        BuildError: it is not there.
    """
    found = [path for path in packages.glob(f"kernel-{name}-[0-9]*.x86_64.rpm") if "-devel-" not in path.name]
    if len(found) != 1:
        hint = f"rm -r {packages}   (then the same command again, which makes it anew)"
        raise BuildError(f"{packages}: {len(found)} packages of kernel-{name}", hint)
    return found[0]


def kernels(store: Store | None = None) -> Kernels:
    """The room as it stands in this checkout, on the user's store."""
    store = store or Store()
    name = recipe.load(ROOM / "kernel.yaml", RECIPE_SCHEMA)["source"]
    root = Root("root-kernel", ROOM / "root.yaml", store, offline=current.offline)
    return Kernels(store, PinnedTarball(sources.Sources(store), name), root)


def base_stage(store: Store | None = None) -> Stage:
    """The common tree's stage."""
    return kernels(store).base_stage()


def stage(name: str, store: Store | None = None) -> Stage:
    """A flavour's stage; its result holds the RPMs.

    Raises:
        BuildError: no such flavour, or something in its folder is wrong.
    """
    return kernels(store).stage(name)


def stages(name: str = "", store: Store | None = None) -> list[Stage]:
    """One flavour's stage, or every flavour's for an empty name."""
    room = kernels(store)
    return [room.stage(each) for each in ([name] if name else flavours())]
