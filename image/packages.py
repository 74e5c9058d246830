"""RPMs into a Debian tree: what dpkg has installed is made known to rpm, then dnf installs, offline, checking all.

The shim is a package without files that provides what the Debian base has: sonames with their symbol versions,
programs by their path, `deb(NAME) = VERSION`. With it dnf resolves every dependency for real; nothing is installed
with --nodeps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import rpm, run
from pipeline.errors import BuildError, Problems
from pipeline.repository import KEY_FILE
from pipeline.sandbox import Sandbox
from pipeline.store import Stage, Store

SHIM = "lvsforge-debian-base"
_TREE = "/build/tree"
_REPOSITORY = "/build/repository"
# rpmbuild writes its scripts to /var/tmp by default, which is read-only in the sandbox
_DEFINES = {"_tmppath": "/tmp"}  # noqa: S108  of the sandbox

# Scriptlets run in a chroot, and the device nodes in the tree itself are dead on a bind mount (nodev): `>/dev/null`
# would fail there. The mounts end with the sandbox.
_WITH_DEVICES = f'mount --rbind /dev {_TREE}/dev && mount -t proc proc {_TREE}/proc && exec "$@"'

# The loader's default path on Debian amd64; a library elsewhere is not found by who merely links to its soname.
_LIBRARY_FOLDERS = ("usr/lib/x86_64-linux-gnu", "usr/lib64", "usr/lib")
_PROGRAM_FOLDERS = ("usr/bin", "usr/sbin")
# Names that packages made for Enterprise Linux require, with the Debian package that is the same thing. A name is
# provided only where that package is installed.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "systemd": ("systemd", "systemd-units", "systemd-sysv"),
    "passwd": ("shadow-utils", "user(root)", "group(root)"),
    "bash": ("bash",),
    "coreutils": ("coreutils",),
    "kmod": ("kmod", "module-init-tools"),
    "logrotate": ("logrotate",),
    "libc-bin": ("glibc-common",),
    "procps": ("procps-ng",),
    "iproute2": ("iproute",),
    "iputils-ping": ("iputils",),
    "ca-certificates": ("ca-certificates",),
    "tzdata": ("tzdata",),
    "python3": ("python3",),
    "rsyslog": ("rsyslog", "syslog"),
    "util-linux": ("util-linux",),
}
# elfdeps never generates this one: it says that the loader reads the GNU hash table, as every glibc since 2006 does.
_LOADER = "rtld(GNU_HASH)"


def shim_stage(store: Store, base: Stage, toolbox: Stage) -> Stage:
    """The stage that builds the shim for a base tree; it follows the base's key, so it is never older than the base.

    Args:
        store: where the results are.
        base: the base tree (`root/` and `packages.json`).
        toolbox: the build root that has rpmbuild.
    """

    def build(out: Path) -> None:
        tree = store.path(base) / "root"
        sandbox = Sandbox(store.path(toolbox) / "root")
        provides = sorted({*libraries(sandbox, tree), *programs(tree), *packages(tree), _LOADER})
        if len(provides) < 500:  # a plain minbase gives 2400
            result = store.path(base)
            hint = f"rm -r {result}   (then the same command again, which makes it anew)"
            raise BuildError(f"the base tree provides only {len(provides)} things", hint)
        spec = shim_spec(provides, base.key)
        rpm.build(sandbox, spec, SHIM, [], out, what="building the base's provides", mode="-bb", defines=_DEFINES)

    inputs = {"aliases": {k: list(v) for k, v in _ALIASES.items()}, "rev": 2}
    return Stage("base-provides", inputs, build, [base, toolbox], title="what the base provides to rpm")


def shim_spec(provides: Sequence[str], base_key: str) -> str:
    """The shim's spec. `Release` carries the base's key in the form that all our packages have."""
    lines = "\n".join(f"Provides: {item}" for item in provides)
    return (
        f"Name: {SHIM}\nVersion: 12\nRelease: 1.{base_key[:8]}\nSummary: What the Debian base of this image provides\n"
        "License: GPL-2.0-only\nBuildArch: noarch\nAutoReqProv: no\n"
        f"{lines}\n\n%description\nOwns no file. Says to rpm and dnf what dpkg has installed in this image,\n"
        "at the time the image was baked: libraries, programs, deb(NAME) = VERSION.\n\n%files\n"
    )


def libraries(sandbox: Sandbox, tree: Path) -> set[str]:
    """The sonames and symbol versions of every shared library in the loader's default path, in rpm's notation."""
    found = []
    for folder in _LIBRARY_FOLDERS:
        found += [p for p in sorted((tree / folder).glob("*.so*")) if p.is_file() and not p.is_symlink()]
    listing = "".join(f"{_TREE}/{p.relative_to(tree)}\n" for p in found)
    argv = ["/usr/lib/rpm/elfdeps", "--provides"]
    result = sandbox.run(argv, stdin=listing, ro_binds={tree: _TREE}, what="reading the base's libraries")
    return {line for line in result.stdout.splitlines() if line}


def programs(tree: Path) -> set[str]:
    """The paths of every program, in both spellings of the merged /usr (`/bin/sh` and `/usr/bin/sh`)."""
    found = set()
    for folder in _PROGRAM_FOLDERS:
        for path in (tree / folder).iterdir():
            # an absolute link (/etc/alternatives/…) would be looked up on this machine, so links count as they stand
            if path.is_symlink() or (path.is_file() and path.stat().st_mode & 0o111):
                name = f"/{folder}/{path.name}"
                if re.fullmatch(r"[A-Za-z0-9/._+-]+", name):  # `[` is no rpm dependency
                    found |= {name, name.removeprefix("/usr")}
    return found


def packages(tree: Path) -> set[str]:
    """`deb(NAME) = VERSION` for every installed Debian package, and the other names of some (see _ALIASES)."""
    provides = set()
    for name, version in debian_packages(tree).items():
        provides.add(f"deb({name}) = {rpm_version(version)}")
        provides |= {f"{alias} = {rpm_version(version)}" for alias in _ALIASES.get(name, ()) if "(" not in alias}
        provides |= {alias for alias in _ALIASES.get(name, ()) if "(" in alias}
    return provides


def rpm_version(debian: str) -> str:
    """A Debian version as an rpm EVR: the revision after the last `-` becomes the release, other `-` become `.`.

    rpm splits at the first `-`; a version without revision stays without release.
    """
    upstream, dash, revision = debian.rpartition("-")
    if not dash:
        return debian
    return f"{upstream.replace('-', '.')}-{revision}"


def debian_packages(tree: Path) -> dict[str, str]:
    """Name and version of what dpkg's database of the tree says is installed."""
    found: dict[str, str] = {}
    for fields in _stanzas((tree / "var/lib/dpkg/status").read_text(encoding="utf-8")):
        if fields.get("Status", "").endswith(" installed"):
            found[fields["Package"]] = fields["Version"]
    return dict(sorted(found.items()))


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != " ")
        if "Package" in fields:
            yield fields


@dataclass(frozen=True)
class Wanted:
    """One package of the repository, by everything that rpm knows of its name."""

    name: str
    version: str
    release: str
    arch: str

    @property
    def nevra(self) -> str:
        """As dnf takes it; our packages have no epoch."""
        return f"{self.name}-{self.version}-{self.release}.{self.arch}"


def choose(repository: Path, names: Iterable[str], where: str) -> list[Wanted]:
    """Find exactly one package for each name in a repository folder.

    Args:
        repository: the folder with `*.rpm`.
        names: package names without version.
        where: the recipe that asks, for the error.

    Raises:
        BuildError: a name is missing there, or stands for more than one package; all at once.
    """
    present: dict[str, list[Wanted]] = {}
    for path in sorted(repository.glob("*.rpm")):
        stem, arch = path.name.removesuffix(".rpm").rsplit(".", 1)
        name, version, release = stem.rsplit("-", 2)
        present.setdefault(name, []).append(Wanted(name, version, release, arch))
    problems = Problems()
    chosen = []
    for name in names:
        found = present.get(name, [])
        if len(found) == 1:
            chosen.append(found[0])
        elif not found:
            problems.add(name, f"not in the repository (there: {', '.join(sorted(present)) or 'nothing'})")
        else:
            problems.add(name, "more than one: " + ", ".join(w.nevra for w in found))
    problems.raise_if_any(where, f"correct the package list in {where}")
    return chosen


def install(sandbox: Sandbox, tree: Path, repository: Path, wanted: Sequence[Wanted], log: Path) -> None:
    """Install exactly these packages into a tree with dnf, offline, all signatures and dependencies checked.

    Args:
        sandbox: the toolbox.
        tree: the tree, changed in place.
        repository: the signed repository folder with its public key (`KEY_FILE`).
        wanted: the packages; the shim among them.
        log: takes dnf's output.

    Raises:
        BuildError: a package or the metadata is not as it was signed, a dependency is not there, or a scriptlet failed.
            The tree is of no further use then.
    """
    verify(sandbox, repository, [f"{w.nevra}.rpm" for w in wanted])
    settings = tree.parent / "dnf.conf"
    settings.write_text(configuration(), encoding="ascii")
    macros = tree.parent / "rpm.macros"
    # Debian's rpm keeps its database in the caller's home directory, and by itself does not insist on signatures
    macros.write_text("%_dbpath /var/lib/rpm\n%_pkgverify_level all\n%__gpg /usr/bin/gpg\n", encoding="ascii")
    binds = {repository: _REPOSITORY, settings: "/build/dnf.conf", macros: "/root/.rpmmacros"}
    command = ["dnf", "--config", "/build/dnf.conf", f"--installroot={_TREE}", "--releasever=12", "--assumeyes"]
    result = sandbox.run(
        ["sh", "-c", _WITH_DEVICES, "install", *command, "install", *(w.nevra for w in wanted)],
        binds={tree: _TREE},
        ro_binds=binds,
        cwd="/build",
        log=log,
        check=False,
        what="installing the packages",
    )
    text = log.read_text(encoding="utf-8", errors="replace")
    if result.returncode != 0:
        raise BuildError(
            f"dnf refused to install the packages: {refusal(text)}",
            f"read {log}",
            run.tail(text),
        )
    if failed := failed_scriptlets(text):
        # dnf counts a failed %post as a warning; an image with a half-made package is worth nothing
        raise BuildError("scriptlets failed while packages were installed", f"correct the spec; read {log}", failed)
    present = installed(sandbox, tree)
    missing = sorted({w.nevra for w in wanted} - set(present))
    if missing:
        raise BuildError(f"dnf did not install {', '.join(missing)}", f"read {log}")


def configuration() -> str:
    """The whole configuration of dnf: one local repository, both signatures demanded (neither implies the other)."""
    return (
        "[main]\n"
        "gpgcheck=1\nrepo_gpgcheck=1\ninstall_weak_deps=0\nbest=1\nplugins=0\nzchunk=0\nreposdir=/nowhere\n"
        # these are looked up below the installroot, whatever one writes; finish() removes them
        "cachedir=/var/cache/dnf\nlogdir=/var/log\npersistdir=/var/lib/dnf\n"
        "tsflags=nodocs\n"
        "[lvsforge]\nname=lvsforge\n"
        f"baseurl=file://{_REPOSITORY}\ngpgkey=file://{_REPOSITORY}/{KEY_FILE}\n"
    )


def verify(sandbox: Sandbox, repository: Path, files: Sequence[str]) -> None:
    """Check digests and signatures of packages against nothing but the repository's own key, naming every bad one.

    dnf checks again while it installs; it stops at the first, and in words that do not say which package to look at.

    Raises:
        BuildError: packages were changed, are not signed, or are signed by another key.
    """
    hint = f"remove {repository} and build the packages again: invoke build-repository"
    rpm.verify(sandbox, repository / KEY_FILE, repository, files, hint)


def refusal(text: str) -> str:
    """The one line of dnf's output that says why, or its last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for pattern in ("nothing provides", "GPG", "signature", "hecksum", "conflicts with", "Error", "rror:"):
        for line in lines:
            if pattern in line and not line.startswith("+"):
                return line
    return lines[-1] if lines else "no output"


def failed_scriptlets(text: str) -> list[str]:
    """The warnings of dnf about scriptlets that did not end well."""
    # the last: what a shell says of a scriptlet's line; the scriptlet may have gone on without what the line was for
    pattern = re.compile(
        r"scriptlet failed|Error in .* scriptlet|Non-fatal .* scriptlet failure|^/var/tmp/rpm-tmp\.\w+: ", re.I
    )
    return [line.strip() for line in text.splitlines() if pattern.search(line)]


def installed(sandbox: Sandbox, tree: Path) -> list[str]:
    """The NEVRAs in the tree's rpm database, sorted; keys that rpm keeps as packages are left out."""
    form = "%{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}\n"
    argv = ["rpm", "--root", _TREE, "--dbpath", "/var/lib/rpm", "-qa", "--qf", form]
    # rpm opens its database for writing (WAL) even to read it
    listing = sandbox.run(argv, binds={tree: _TREE}, what="reading the rpm database").stdout
    return sorted(line for line in listing.splitlines() if not line.startswith("gpg-pubkey-"))
