"""Signed RPM repositories: a snapshot for one image in the store, and the published one with older versions."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pipeline import progress, store
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
            for package in sorted(result(stage).glob("*.rpm")):
                if not package.name.endswith(".src.rpm"):
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


def superseded(present: Iterable[str], coming: Iterable[str]) -> list[str]:
    """Which published packages a new build replaces: same name, version, release number and arch, other inputs.

    A release number that was not raised says "still the same release", and two builds of it must not compete in
    one repository: which of their keys sorts higher is an accident. Other numbers and versions stay.
    """
    new = {FileName.parse(name).line: name for name in coming}
    return sorted(name for name in present if name != new.get(FileName.parse(name).line, name))


def publish(
    results: Sequence[Path], target: Path, where: Store, toolbox: Callable[[], Sandbox], key: SigningKey
) -> list[str]:
    """Add signed packages to the published repository.

    Args:
        results: folders of signed packages.
        target: the repository; `x86_64/`, `source/`, the public key and a `.repo` file for clients.
        where: its lock keeps two publishers apart.
        toolbox: gives a root with createrepo_c and gpg.
        key: signs the metadata.

    Returns:
        The names of the packages that were not there before.

    The new state is made beside and put in place by renaming; a crash leaves the old or the new one.
    """
    with where.lock("publish"):
        old = target.with_name(f".{target.name}.old")
        if not target.exists() and old.exists():  # a crash between the two renames below
            old.rename(target)
        parts = ("x86_64", "source")
        packages = [p for folder in results for p in sorted(folder.glob("*.rpm"))]
        public = key.public(toolbox())
        known = (target / KEY_FILE).read_text(encoding="ascii") if (target / KEY_FILE).exists() else ""
        added = [p.name for p in packages if not any((target / part / p.name).exists() for part in parts)]
        if not added and known == public:
            return []
        with progress.step(f"publishing {len(added)} packages to {target}"):
            beside = target.with_name(f".{target.name}.new")
            store.remove_tree(beside)
            for part in parts:
                folder = beside / part
                folder.mkdir(parents=True)
                coming = {p.name: p for p in packages if p.name.endswith(".src.rpm") == (part == "source")}
                present = {p.name: p for p in (target / part).glob("*.rpm")} if target.exists() else {}
                for name in superseded(present, coming):
                    progress.note(f"{name} is replaced by a build of the same release from other inputs")
                    del present[name]
                for name, path in coming.items():
                    # copies, no hard links: what a user does to out/ must not reach the store
                    shutil.copyfile(path, folder / name)
                for name, path in present.items():
                    if name not in coming:
                        link_or_copy(path, folder / name)
                index(toolbox(), key, folder)
            (beside / KEY_FILE).write_text(public, encoding="ascii")
            (beside / "lvsforge.repo").write_text(client_configuration(), encoding="ascii")
            store.remove_tree(old)
            with contextlib.suppress(FileNotFoundError):
                target.rename(old)
            beside.rename(target)
            store.remove_tree(old)
    return added


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
