"""From recipes to images: which stage stands on which, and what the tasks call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from image import base as disks
from image import golden, packages, verify
from image.base import Recipe, roles
from kernel import build as kernels
from kernel import develop
from pipeline import bundle as bundles
from pipeline import clean as cleaning
from pipeline import progress, repository, rpm, run, settings, status, store
from pipeline.debroot import Root, require_root
from pipeline.errors import BuildError
from pipeline.sandbox import Sandbox
from pipeline.signing import SigningKey
from pipeline.sources import Sources, listing
from pipeline.store import Stage, Store
from tools import build as tools


class Line:
    """Everything that can be built, as stages; nothing is built by asking for one."""

    def __init__(self, where: Store | None = None) -> None:
        self.store = where or Store()
        self.offline = settings.current.offline

    @cached_property
    def toolbox(self) -> Root:
        """The root with the tools of this room."""
        return disks.toolbox_root(self.store, offline=self.offline)

    @cached_property
    def tree(self) -> Root:
        """The Debian tree of the images."""
        return disks.base_root(self.store, offline=self.offline)

    def sandbox(self) -> Sandbox:
        """The toolbox, built if need be."""
        return Sandbox(self.store.ensure(self.toolbox.stage()) / "root")

    @cached_property
    def key(self) -> SigningKey:
        """The signing key; made now if there is none."""
        key = SigningKey.find()
        if not key.exists:
            key.make(self.sandbox())
        return key

    def signed(self, stage: Stage) -> Stage:
        """The stage that signs another's packages."""
        return rpm.signed(stage, self.sandbox, self.key, self.store.path)

    def package_stages(self, image: Recipe) -> list[Stage]:
        """What builds the packages of an image."""
        return [kernels.stage(image.kernel, self.store), *(tools.stage(tool, self.store) for tool in image.tools)]

    def image(self, role: str) -> Image:
        """All stages of one image."""
        recipe = Recipe.load(role)
        toolbox, tree = self.toolbox.stage(), self.tree.stage()
        shim = packages.shim_stage(self.store, tree, toolbox)
        signed = [self.signed(stage) for stage in (*self.package_stages(recipe), shim)]
        snapshot = repository.snapshot(role, signed, self.sandbox, self.key, self.store.path)
        disk = disks.disk_stage(self.store, recipe, tree, toolbox, snapshot)
        finished = golden.stage(self.store, recipe, disk)
        return Image(recipe, disk, finished, verify.stage(self.store, recipe, finished))


@dataclass(frozen=True)
class Image:
    """One image's recipe and stages."""

    recipe: Recipe
    disk: Stage
    finished: Stage
    checked: Stage


def chosen(role: str) -> list[str]:
    """The given role, or all."""
    return [role] if role else roles()


def roots() -> list[Root]:
    """Every root that packages and images are made with, or tested."""
    line = Line()
    tested = [develop.guest_root(line.store), develop.keepalived_root(line.store), develop.debian_root(line.store)]
    return [kernels.kernels(line.store).root, *tools.room(line.store).roots(), line.toolbox, line.tree, *tested]


def final_stages(role: str = "", *, checked: bool = True) -> list[Stage]:
    """What is built in the end; without a signing key yet, only what comes before it.

    Args:
        role: whose image; all where it is "".
        checked: as `invoke image` does it; else as `invoke bake-image`.
    """
    line = Line()
    if not SigningKey.find().exists:
        progress.note("no signing key yet: what is signed has no key in the store before the first build")
        packages = [*kernels.stages("", line.store), *tools.stages("", line.store)]
        if role:
            packages = line.package_stages(Recipe.load(role))
        return [*packages, line.tree.stage(), line.toolbox.stage()]
    images = [line.image(each) for each in chosen(role)]
    return [image.checked if checked else image.finished for image in images]


def everything() -> None:
    """Build, bake and check all images, and publish packages and images in out/."""
    if settings.current.dry_run:
        show_plan(final_stages())
        return
    if not settings.current.offline:
        if not all(root.resolved for root in roots()):
            require_root("to make build roots")
        # Before any key is computed: where the archives have dropped a pinned release, its stand-in is what is built.
        Sources(Store()).fetch_all()
    line = Line()
    line.store.require_space(15.0 if not line.store.results("image-director") else 5.0, "building everything")
    for role in roles():
        check(role, line)
    # Last: hosts take from the repository what stands in it, so no kernel goes there before it has booted. The images
    # are made from repositories of their own.
    publish(line)


def bake(role: str, line: Line | None = None) -> None:
    """Bake an image, or all, into out/."""
    if settings.current.dry_run:  # first of all: to ask for an image's stages makes the key where there is none
        show_plan(final_stages(role, checked=False))
        return
    line = line or Line()
    for each in chosen(role):
        image = line.image(each)
        golden.publish(line.store.ensure(image.finished), image.recipe, settings.out())


def check(role: str, line: Line | None = None) -> None:
    """Bake an image, or all; check it; only then put it into out/."""
    line = line or Line()
    for each in chosen(role):
        image = line.image(each)
        result = line.store.ensure(image.finished)
        line.store.ensure(image.checked)
        golden.publish(result, image.recipe, settings.out())


def console(role: str, seed: Path | None) -> None:
    """Boot an overlay of an image on this terminal.

    Raises:
        BuildError: the seed does not exist, or the machine could not be started.
    """
    if seed and not seed.is_file():
        raise BuildError(f"{seed} does not exist", "invoke render --cluster FILE")
    line = Line()
    image = line.image(role)
    disk = verify.qcow2(line.store.ensure(image.finished))
    code = verify.console(line.store, image.recipe, disk, seed.resolve() if seed else None)
    if code != 0:
        raise BuildError(f"the machine ended with status {code}", "invoke doctor")


def ready(given: Mapping[str, str], role: str) -> Path:
    """A golden image that is there: the given file, this checkout's own, or else the newest one in out/.

    Args:
        given: files by role, "" for none.
        role: whose image.

    Raises:
        BuildError: the given file is no image, or none is baked.
    """
    if file := given.get(role):
        path = Path(file)
        if not path.is_file():
            raise BuildError(f"--image-{role}: {path} does not exist", f"invoke bake-image --role {role}")
        if _start(path) != b"QFI\xfb":
            raise BuildError(f"--image-{role}: {path} is no qcow2 image", f"ls {settings.out()}/*/*/*.qcow2")
        return path.resolve()
    line = Line()
    others = [verify.qcow2(result) for result in line.store.results(f"image-{role}")]
    # Without any there is no need for this checkout's key, which may need the toolbox.
    if others and line.store.has(finished := line.image(role).finished):
        return verify.qcow2(line.store.path(finished))
    name = Recipe.load(role).name
    # no name with a dot before it: that is half an image, of which the copying was killed
    baked = sorted(settings.out().glob(f"{name}/[!.]*/*.qcow2"), key=lambda path: path.stat().st_mtime)
    if baked:
        return baked[-1].resolve()
    older = [f"an image of another state of the checkout is there: --image-{role} {others[0]}"] if others else []
    raise BuildError(f"no {role} image is baked", f"invoke bake-image --role {role}", older)


def _start(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(4)


def toa_bpf() -> Path:
    """The signed package toa-bpf, built if need be."""
    line = Line()
    (package,) = tools.packages(line.store.ensure(line.signed(tools.stage("toa-bpf", line.store))))
    return package


def routing() -> Path:
    """A root file system with nothing but our routing daemons in it, built if need be."""
    store = Line().store
    return store.ensure(tools.unpacked("quagga", store)) / "root"


def build(stages: Sequence[Stage]) -> None:
    """Build package stages and say where the results are."""
    if settings.current.dry_run:
        show_plan(stages)
        return
    line = Line()
    for stage in stages:
        result = line.store.ensure(stage)
        for package in sorted(result.glob("*.rpm")):
            progress.note(str(package))


def publish(line: Line | None = None) -> None:
    """Sign all packages and add them to out/repository."""
    line = line or Line()
    # with the file in which the release number of the packages stands
    plain = [(kernels.stage(name, line.store), kernels.ROOM / name / "flavour.yaml") for name in kernels.flavours()]
    plain += [(tools.stage(name, line.store), tools.ROOM / name / "recipe.yaml") for name in tools.names()]
    if settings.current.dry_run:
        show_plan([stage for stage, _ in plain])
        return
    results = {line.store.ensure(line.signed(stage)): recipe for stage, recipe in plain}
    repository.publish(results, settings.out() / "repository", line.store, line.sandbox, line.key)


def signing_key() -> list[str]:
    """Where the key is, and its public half."""
    line = Line()
    return [f"{line.key.file}", *line.key.public(line.sandbox()).splitlines()]


def fetch(*more: Root) -> None:
    """Everything that comes from elsewhere: sources, roots, and these roots."""
    line = Line()
    Sources(line.store).fetch_all()
    for root in (*roots(), *more):
        line.store.ensure(root.stage())


def show_plan(stages: Sequence[Stage]) -> None:
    """Say what a run would build, and do nothing."""
    for text in status.table(status.report(stages, Store())):
        print(text)


def clean(keep: int, *, the_store: bool) -> None:
    """Clean `out/`, or the store of all but the `keep` newest results of each stage and of what killed runs left."""
    if the_store:
        cleaning.clean_store(Store(), keep)
        clean_abandoned()
    else:
        cleaning.clean_out(settings.out())


def clean_abandoned() -> None:
    """Remove the folders of bakes and checks that were killed; their names end with the process that made them."""
    for folder in sorted((Store().root / "bakes").glob("*")):
        if Path("/proc", folder.name.rpartition("-")[2]).exists() or golden.running(folder):
            continue
        progress.note(f"{'would remove' if settings.current.dry_run else 'removing'} {folder}")
        if not settings.current.dry_run:
            store.remove_tree(folder)


# --- for a builder without a network ----------------------------------------------------------------------------


def bundle(out: Path, *more: Root) -> None:
    """Pack what `fetch` fetches, each root as one tar of its stage's result."""
    line = Line()
    wanted = [*roots(), *more]
    if settings.current.dry_run:
        print("\n".join(listing(store=line.store)))
        show_plan([root.stage() for root in wanted if root.resolved])
        for root in wanted:
            if not root.resolved:
                progress.note(f"{root.name}: which packages it holds is not decided before it is fetched")
        return
    fetch(*more)
    tar = run.require("tar", "to pack build roots", "tar")
    with run.temporary_directory("bundle-", line.store.root) as folder:
        held = folder / "roots"
        held.mkdir()
        for root in wanted:
            stage = root.stage()
            with progress.step(f"packing {stage.name}"):
                argv = [tar, "--zstd", "--xattrs", "--numeric-owner", "--sort=name", "-C", str(line.store.root)]
                members = [f"{stage.name}/{stage.key}", *root_lists(line.store, root)]
                run.run([*argv, "-cf", held / f"{stage.name}.tar.zst", *members])
        bundles.bundle(out, Sources(line.store), {"roots": held})


def root_lists(where: Store, root: Root) -> list[str]:
    """The files below the store that say which package versions were resolved for a root."""
    return [str(path.relative_to(where.root)) for path in sorted((where.root / "roots").glob(f"{root.name}-*.json"))]


def bundle_load(file: Path) -> None:
    """Take a bundle into the store."""
    line = Line()
    tar = run.require("tar", "to unpack build roots", "tar")
    with run.temporary_directory("bundle-", line.store.root) as folder:
        bundles.load(file, line.store, {"roots": folder})
        for archive in sorted(folder.glob("*.tar.zst")):
            fresh = folder / archive.name.removesuffix(".tar.zst")
            fresh.mkdir()
            with progress.step(f"unpacking {fresh.name}"):
                argv = [tar, "--zstd", "--xattrs", "--xattrs-include=*", "--numeric-owner"]
                run.run([*argv, "-C", fresh, "-xpf", archive])
                _adopt(fresh, line.store)


def _adopt(fresh: Path, where: Store) -> None:
    """Give unpacked results and package lists their names in the store: results that it lacks, and all lists.

    A list of before would have its root built for ever, of which the bundle has a newer one.
    """
    os.sync()  # as for what is built here: data before the name
    for found in sorted(p for top in fresh.iterdir() for p in top.iterdir()):
        if found.is_dir():
            where.adopt(found, found.parent.name, found.name)
        else:
            target = where.root / found.relative_to(fresh)
            target.parent.mkdir(parents=True, exist_ok=True)
            found.replace(target)
    store.remove_tree(fresh)
