"""The tools' stages: each folder with a `recipe.yaml` becomes packages. A new tool is a new folder and no Python.

A folder holds the recipe (data), `NAME.spec.j2`, a patch series, and the files that the recipe lists. The stage's key
hashes all of them, with the source, the build root and rpm's macros; its first eight digits end the release number.

A tool of our own has no `source` in its recipe but a `version`: its files are all there is. One that needs more than
the other tools has a `root.yaml` of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from pipeline import patches, progress, recipe, rpm
from pipeline.debroot import EPOCH, Root
from pipeline.errors import BuildError, Problems
from pipeline.sandbox import Sandbox
from pipeline.settings import current
from pipeline.sources import Pin, Sources
from pipeline.store import Stage, Store, digest

ROOM = Path(__file__).resolve().parent
COMMON = "spec-common.j2"  # what the specs of all tools share
OWN_ROOT = "root.yaml"
_REVISION = 1  # raised when this file builds other bytes from the same inputs
_SPACE = 1.5  # GB; measured 2026-11: FRR's tree with debug information is 0.8 GB

SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "release", "summary", "files"],
    "oneOf": [{"required": ["source"]}, {"required": ["version"]}],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z][a-z0-9-]*$"},
        "source": {"type": "string", "pattern": "^[a-z][a-z0-9-]*$"},
        "version": {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)*$"},
        "release": {"type": "integer", "minimum": 1},
        # rpmlint's rules for a summary: one line, no full stop, at most 79 characters
        "summary": {"type": "string", "minLength": 1, "maxLength": 79, "pattern": "^[A-Z][^\n]*[^.\n]$"},
        "files": {
            "type": "array",
            "uniqueItems": True,
            "items": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_.@-]*$"},
        },
        "units": {
            "type": "array",
            "uniqueItems": True,
            "items": {"type": "string", "pattern": r"^[A-Za-z0-9_.@-]+\.(service|timer|socket|target)$"},
        },
    },
}


@dataclass(frozen=True)
class Tool:
    """A folder of this room.

    Attributes:
        folder: where it is.
        name: of the package.
        source: its entry in `sources.yaml`; empty for a tool of our own.
        version: of a tool of our own, else empty.
        release: the part of the RPM release that a person raises.
        summary: one line.
        files: packaged beside the source, in the order of Source1, Source2, …
        units: those of them that systemd runs, in the order in which they are stopped.
        patches: the files of the series, in order.
    """

    folder: Path
    name: str
    source: str
    version: str
    release: int
    summary: str
    files: tuple[str, ...]
    units: tuple[str, ...]
    patches: tuple[Path, ...]

    @property
    def template(self) -> Path:
        """The spec file's template."""
        return self.folder / f"{self.name}.spec.j2"

    @property
    def root(self) -> Path | None:
        """The recipe of its own build root, if it has one."""
        path = self.folder / OWN_ROOT
        return path if path.exists() else None


def names(room: Path = ROOM) -> list[str]:
    """The tools: the folders that hold a `recipe.yaml`."""
    return sorted(path.parent.name for path in room.glob("*/recipe.yaml"))


def read(name: str, room: Path = ROOM) -> Tool:
    """Read a tool's folder.

    Raises:
        BuildError: there is no such tool; its recipe is wrong; or recipe, series and files disagree, all at once.
    """
    if name not in names(room):
        raise BuildError(
            f"there is no tool {name!r}",
            f"invoke build-tools --tool {'|'.join(names(room))}   (or make tools/{name}/recipe.yaml)",
        )
    folder = room / name
    path = folder / "recipe.yaml"
    data = recipe.load(path, SCHEMA)
    tool = Tool(
        folder,
        data["name"],
        data.get("source", ""),
        data.get("version", ""),
        data["release"],
        data["summary"],
        tuple(data["files"]),
        tuple(data.get("units", ())),
        patches.read(folder).paths,
    )
    problems = Problems()
    own = {"recipe.yaml", "series", OWN_ROOT, tool.template.name}
    present = {p.name for p in folder.iterdir() if p.is_file()}
    if tool.template.name not in present:
        problems.add("name", f"tools/{name}/{tool.template.name} does not exist")
    for index, file in enumerate(tool.files):
        if file not in present:
            problems.add(f"files[{index}]", f"tools/{name}/{file} does not exist")
    for index, unit in enumerate(tool.units):
        if unit not in tool.files:
            problems.add(f"units[{index}]", f"{unit} is not among the files")
    for file in sorted(present - own - set(tool.files)):
        problems.add("files", f"tools/{name}/{file} is not listed; list it or remove it")
    problems.raise_if_any(str(path), f"correct {path}")
    return tool


def spec(tool: Tool, version: str, archive: str, release: str) -> str:
    """The spec file of a tool.

    Args:
        tool: its folder, read.
        version: of upstream, or the tool's own.
        archive: the source's file name; empty for a tool of our own.
        release: `NUMBER.KEY8`.

    Raises:
        BuildError: the template uses a name that it is not given, or is no template.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  a spec file, no web page
        loader=jinja2.FileSystemLoader([tool.folder, tool.folder.parent]),
    )
    try:
        return environment.get_template(tool.template.name).render(
            name=tool.name,
            version=version,
            release=release,
            summary=tool.summary,
            archive=archive,
            files=tool.files,
            units=tool.units,
            patches=[path.name for path in tool.patches],
            sysusers=_sysusers(tool),
        )
    except jinja2.TemplateError as error:
        place = f"{getattr(error, 'name', None) or tool.template.name}:{getattr(error, 'lineno', None) or '?'}"
        raise BuildError(f"{place}: {error}", f"correct {tool.template}") from None


def _sysusers(tool: Tool) -> str:
    """The lines of the sysusers.d files: %pre needs the users before the files are laid down."""
    texts = [(tool.folder / file).read_text(encoding="utf-8") for file in tool.files if file.endswith(".sysusers")]
    return "\n".join(line for text in texts for line in text.splitlines() if line and not line.startswith("#"))


class Tools:
    """The stages of this room.

    Args:
        store: takes results and the compiler cache.
        pins: the sources.
        root: `tools/root.yaml`.
        room: this folder; a test may have another.
    """

    def __init__(self, store: Store, pins: Sources, root: Root, room: Path = ROOM) -> None:
        self.store = store
        self.pins = pins
        self.root = root
        self.room = room

    @functools.cache  # noqa: B019
    def root_of(self, name: str) -> Root:
        """The build root of a tool."""
        own = read(name, self.room).root
        return Root(f"root-{name}", own, self.store, offline=current.offline) if own else self.root

    def roots(self) -> list[Root]:
        """Every build root of the room."""
        others = [self.root_of(name) for name in names(self.room)]
        return [self.root, *(root for root in others if root is not self.root)]

    @functools.cache  # noqa: B019  one object a run; it holds one stage a tool
    def stage(self, name: str) -> Stage:
        """A tool's packages: `*.x86_64.rpm` and `*.src.rpm`.

        Raises:
            BuildError: see `read`; or the source is not in `sources.yaml`.
        """
        tool = read(name, self.room)
        pin = self.pins.pin(tool.source) if tool.source else None
        version = pin.version if pin else tool.version
        return Stage(
            f"tool-{name}",
            self._inputs(tool, pin),
            lambda out: self._build(tool, version, self.release(name), out, self.root_of(name)),
            [self.root_of(name).stage()],
            title=f"building {tool.name} {version}",
        )

    def variant(
        self, name: str, label: str, *, series: bool = True, switches: Sequence[str] = (), root: Root | None = None
    ) -> Stage:
        """A tool's packages made otherwise than they ship, for tests and measurements.

        Args:
            name: the tool.
            label: what the variant is called.
            series: with our patches.
            switches: conditions of its spec (`%bcond_with`) that hold.
            root: the build root, if it needs more than the tool itself.

        Raises:
            BuildError: see `stage`.
        """
        tool = read(name, self.room)
        tool = tool if series else dataclasses.replace(tool, patches=())
        pin = self.pins.pin(tool.source) if tool.source else None
        version = pin.version if pin else tool.version
        where = root or self.root_of(name)

        def build(out: Path) -> None:
            self._build(tool, version, f"{tool.release}.{label}", out, where, switches)

        inputs = {**self._inputs(tool, pin), "switches": list(switches)}
        title = f"building {tool.name} {version}, {label}"
        return Stage(f"tool-{name}-{label}", inputs, build, [where.stage()], title=title)

    def all_stages(self) -> list[Stage]:
        """Every tool's stage."""
        return [self.stage(name) for name in names(self.room)]

    def release(self, name: str) -> str:
        """`NUMBER.KEY8` of a tool's packages."""
        return f"{read(name, self.room).release}.{self.stage(name).key[:8]}"

    def _inputs(self, tool: Tool, pin: Pin | None) -> Mapping[str, Any]:
        source = {"version": pin.version, "file": pin.file, "sha256": pin.sha256} if pin else {"version": tool.version}
        return {
            "source": source,
            "recipe": {
                "name": tool.name,
                "release": tool.release,
                "summary": tool.summary,
                "files": [[file, digest(tool.folder / file)] for file in tool.files],
                "units": list(tool.units),
            },
            "series": [[path.name, digest(path)] for path in tool.patches],
            "spec": digest(tool.template),
            "common": digest(self.room / COMMON),
            "macros": digest(rpm.MACROS),
            "epoch": EPOCH,
            "rev": _REVISION,
        }

    def sandbox(self) -> Sandbox:
        """The build root, built if need be: compilers, rpm, and the libraries that the tools link against."""
        return Sandbox(self.store.ensure(self.root.stage()) / "root")

    def _build(
        self, tool: Tool, version: str, release: str, out: Path, root: Root, switches: Sequence[str] = ()
    ) -> None:
        self.store.require_space(_SPACE, f"building {tool.name}")
        archives = [self.pins.resolve(tool.source).path] if tool.source else []
        cache = self.store.root / "ccache"
        cache.mkdir(parents=True, exist_ok=True)
        progress.note(f"{tool.name} {version}-{release}, {len(tool.patches)} patches")
        rpm.build(
            Sandbox(self.store.path(root.stage()) / "root"),
            spec(tool, version, archives[0].name if archives else "", release),
            tool.name,
            [*archives, *(tool.folder / file for file in tool.files), *tool.patches],
            out,
            what=f"building {tool.name}",
            # The root is read-only: rpm's scripts cannot be in its default, /var/tmp.
            defines={"_tmppath": "/tmp", **{f"_with_{name}": "1" for name in switches}},  # noqa: S108  inside the sandbox
            binds={cache: "/build/ccache"},
            env={
                # gcc is ccache there, without a word of it in a spec: an SRPM rebuilds where there is none
                "PATH": "/usr/lib/ccache:/usr/sbin:/usr/bin:/sbin:/bin",
                "CCACHE_DIR": "/build/ccache",
                "CCACHE_MAXSIZE": "10G",
                "CCACHE_COMPILERCHECK": "content",  # the same compiler in a root made later
                "RPM_BUILD_NCPUS": str(current.jobs),
            },
            hint=f"read {out / 'rpmbuild.log'}; the first error is what counts",
        )


def packages(folder: Path) -> list[Path]:
    """The binary packages among a stage's results, sorted by name."""
    return sorted(path for path in folder.glob("*.rpm") if not path.name.endswith(".src.rpm"))


def room(store: Store | None = None) -> Tools:
    """The tools of this repository."""
    store = store or Store()
    root = Root("root-tools", ROOM / "root.yaml", store, offline=current.offline)
    return Tools(store, Sources(store), root)


def stage(tool: str, store: Store | None = None) -> Stage:
    """One tool's stage."""
    return room(store).stage(tool)


def unpacked(tool: str, store: Store | None = None) -> Stage:
    """A tool's packages as they lie in a root file system: `root/`. For what runs a program of them without rpm."""
    made = room(store)
    package, root = made.stage(tool), made.root.stage()

    def unpack(out: Path) -> None:
        box = Sandbox(made.store.path(root) / "root")
        for file in packages(made.store.path(package)):
            rpm.unpack(box, file, out / "root")

    return Stage(f"unpacked-{tool}", {"rev": 1}, unpack, [package, root], title=f"unpacking {tool}")


def all_stages(store: Store | None = None) -> list[Stage]:
    """Every tool's stage."""
    return room(store).all_stages()


def stages(tool: str = "", store: Store | None = None) -> Sequence[Stage]:
    """One tool's stage, or all of them when no name is given."""
    return [stage(tool, store)] if tool else all_stages(store)
