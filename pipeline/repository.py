"""Signed RPM repositories: a snapshot for one image in the store, and the published one with older versions."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pipeline import progress, rpm, store
from pipeline.errors import BuildError
from pipeline.rpm import FileName, link_or_copy
from pipeline.sandbox import Sandbox
from pipeline.signing import SigningKey
from pipeline.store import Stage, Store

KEY_FILE = "RPM-GPG-KEY-lvsforge"


def snapshot(
    name: str,
    signed: Sequence[Stage],
    toolbox: Callable[[], Sandbox],
    key: SigningKey,
    result: Callable[[Stage], Path],
) -> Stage:
    """The stage that holds exactly the packages of the given signed stages, source packages left out.

    Its result is a repository folder: `*.rpm`, `repodata/` with a detached signature, the public key.
    """

    def build(out: Path) -> None:
        for stage in signed:
            packages = sorted(path for path in result(stage).glob("*.rpm") if not path.name.endswith(".src.rpm"))
            if not packages:
                raise BuildError(f"{result(stage)} holds no package", "the same command makes it again")
            for package in packages:
                link_or_copy(package, out / package.name)
        index(toolbox(), key, out)
        (out / KEY_FILE).write_text(key.public(toolbox()), encoding="ascii")

    inputs = {"signing_key": key.digest, "rev": 1}
    return Stage(f"repository-{name}", inputs, build, list(signed), title=f"repository of the {name} image")


def index(sandbox: Sandbox, key: SigningKey, folder: Path) -> None:
    """Write and sign the metadata of a folder of packages.

    All times in the metadata are SOURCE_DATE_EPOCH, so equal packages give equal metadata.

    Raises:
        BuildError: createrepo_c or gpg failed.
    """
    script = [
        "set -eu",
        key.import_script,
        # the times of the packages' files are in the metadata too
        'find . -maxdepth 1 -name "*.rpm" -exec touch --date "@$SOURCE_DATE_EPOCH" -- {} +',
        # xz: Debian's createrepo_c has no zstd; no sqlite databases: dnf stopped reading them long ago
        'createrepo_c --quiet --no-database --general-compress-type xz --revision "$SOURCE_DATE_EPOCH" '
        "--set-timestamp-to-revision .",
        'gpg --batch --yes --local-user "$KEYID" --detach-sign --armor repodata/repomd.xml',
    ]
    with key.lent() as secret:
        sandbox.run(
            ["sh", "-c", "\n".join(script)],
            binds={folder: "/build/repository"},
            ro_binds=secret,
            cwd="/build/repository",
            what="indexing the repository",
        )


def superseded(present: Iterable[str], coming: Iterable[str]) -> dict[str, str]:
    """Which published packages a new build replaces, and by what: same name, version, number and arch, other inputs.

    A release number that was not raised says "still the same release", and two builds of it must not compete in
    one repository: which of their keys sorts higher is an accident. Other numbers and versions stay.
    """
    new = {FileName.parse(name).line: name for name in coming}
    found = {name: new.get(FileName.parse(name).line, name) for name in sorted(present)}
    return {name: other for name, other in found.items() if name != other}


def publish(
    results: Mapping[Path, Path], target: Path, where: Store, toolbox: Callable[[], Sandbox], key: SigningKey
) -> list[str]:
    """Add signed packages to the published repository, and warn of those that no `dnf upgrade` takes.

    Args:
        results: folders of signed packages, each with the file in which their release number stands.
        target: the repository; `x86_64/`, `source/`, the public key and a `.repo` file for clients.
        where: its lock keeps two publishers apart.
        toolbox: gives a root with createrepo_c and gpg.
        key: signs the metadata.

    Returns:
        The names of the packages that were not there before.

    Raises:
        BuildError: the key is another one than before, and a package that stays is not signed by the one before.

    The new state is made beside and put in place by renaming; a crash leaves the old or the new one.
    """
    with where.lock("publish"):
        old = target.with_name(f".{target.name}.old")
        if not target.exists() and old.exists():  # a crash between the two renames below
            old.rename(target)
        parts = ("x86_64", "source")
        recipes = {p: recipe for folder, recipe in results.items() for p in sorted(folder.glob("*.rpm"))}
        public = key.public(toolbox())
        known = (target / KEY_FILE).read_text(encoding="ascii") if (target / KEY_FILE).exists() else ""
        added = [p.name for p in recipes if not any(_whole(target / part / p.name, p) for part in parts)]
        if not added and known == public:
            return []
        replaced: dict[str, Path] = {}
        with progress.step(f"publishing {len(added)} packages to {target}"):
            beside = target.with_name(f".{target.name}.new")
            store.remove_tree(beside)
            for part in parts:
                folder = beside / part
                folder.mkdir(parents=True)
                coming = {p.name: p for p in recipes if p.name.endswith(".src.rpm") == (part == "source")}
                present = {p.name: p for p in (target / part).glob("*.rpm")} if target.exists() else {}
                for name, other in superseded(present, coming).items():
                    progress.note(f"{name} is replaced by a build of the same release from other inputs")
                    del present[name]
                    if part != "source":  # which no host has installed
                        replaced[name] = coming[other]
                for name, path in coming.items():
                    # copies, no hard links: what a user does to out/ must not reach the store
                    shutil.copyfile(path, folder / name)
                staying = {name: path for name, path in present.items() if name not in coming}
                if staying and known and known != public:
                    # To leave the old key beside the new one would be no way to get rid of a key that leaked.
                    sign_anew(toolbox(), key, target / KEY_FILE, staying, beside / "signed")
                    staying = {name: beside / "signed" / name for name in staying}
                for name, path in staying.items():
                    link_or_copy(path, folder / name)
                store.remove_tree(beside / "signed")
                index(toolbox(), key, folder)
            (beside / KEY_FILE).write_text(public, encoding="ascii")
            (beside / "lvsforge.repo").write_text(client_configuration(), encoding="ascii")
            store.remove_tree(old)
            os.sync()  # data before the name: a power cut must not leave empty packages where the old ones were
            with contextlib.suppress(FileNotFoundError):
                target.rename(old)
            beside.rename(target)
            store.remove_tree(old)
        warn_of_downgrades(toolbox, replaced, recipes)
    return added


def _whole(published: Path, package: Path) -> bool:
    return published.exists() and published.stat().st_size == package.stat().st_size


def sign_anew(sandbox: Sandbox, key: SigningKey, before: Path, packages: Mapping[str, Path], folder: Path) -> None:
    """Sign copies of published packages with another key, so that hosts which know only this one can go back to them.

    Args:
        sandbox: has rpmsign and gpg.
        key: signs.
        before: the public key by which the packages must be signed now.
        packages: names and files, all in one folder.
        folder: takes the copies; made here.

    Raises:
        BuildError: a package is not as it was signed, or signed by another key.
    """
    places = list(packages.values())
    rpm.verify(sandbox, before, places[0].parent, list(packages), f"cd {places[0].parent}, and rm what is named above")
    folder.mkdir()
    for name, path in packages.items():
        shutil.copyfile(path, folder / name)
    rpm.sign(sandbox, key, folder)


def warn_of_downgrades(
    toolbox: Callable[[], Sandbox], replaced: Mapping[str, Path], recipes: Mapping[Path, Path]
) -> None:
    """Say which new builds a host with the build before will not take: half of all, as keys are no numbers that grow.

    Args:
        toolbox: gives a root with rpm.
        replaced: names of packages that were in the repository, with the package that is there instead.
        recipes: packages with the file in which their release number stands.
    """
    if not replaced:
        return
    releases = [(FileName.parse(p.name).release, FileName.parse(old).release) for old, p in replaced.items()]
    for (old, package), order in zip(replaced.items(), rpm.compare(toolbox(), releases), strict=True):
        if order > 0:
            continue
        before, after = (name.rsplit(".", 2)[0] for name in (old, package.name))
        # dnf puts a kernel beside the others instead of taking them away
        beside = "installonlypkg(" in rpm.query(toolbox(), package, "[%{PROVIDENAME}\n]")
        progress.warn(
            f"hosts that have {before} will not take {after} by dnf upgrade: the number is the same, and rpm does not "
            f"take its key for the newer one. Raise release in {recipes[package]} and build again; or, on hosts: "
            f"dnf distro-sync {FileName.parse(old).name}"
            f"{', then choose it in the boot menu, where the other may stay the first' if beside else ''}"
        )


def client_configuration() -> str:
    """The `.repo` file for hosts; both signatures are demanded, since neither implies the other.

    Its priority is before the 99 that repositories have by default: a distribution's package of the same name with a
    higher version (Enterprise Linux 9 has ipvsadm, keepalived and frr) would replace ours at the next `dnf upgrade`,
    and know nothing of FULLNAT.
    """
    return (
        "# Serve the repository, set its address below, and copy this file to /etc/yum.repos.d/.\n"
        "[lvsforge]\n"
        "name=lvsforge\n"
        "baseurl=https://REPOSITORY.EXAMPLE/x86_64/\n"
        f"gpgkey=https://REPOSITORY.EXAMPLE/{KEY_FILE}\n"
        "gpgcheck=1\n"
        "repo_gpgcheck=1\n"
        "enabled=1\n"
        "# Before the distribution's repositories, which have packages of the same names.\n"
        "priority=10\n"
    )
