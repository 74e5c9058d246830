"""Building RPMs from a spec inside a root, and signing them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import run, store
from pipeline.errors import BuildError
from pipeline.sandbox import Overlay, Sandbox
from pipeline.signing import SigningKey
from pipeline.store import Stage

MACROS = Path(__file__).with_name("rpm.macros")
# Our releases read NUMBER.KEY8: the number is a person's decision, the key names the inputs.
_FILE = re.compile(
    r"^(?P<name>.+)-(?P<version>[^-]+)-(?P<number>\d+)\.(?P<key8>[0-9a-f]{8})(?P<dist>[^-]*)\.(?P<arch>[a-z0-9_]+)\.rpm$"
)


@dataclass(frozen=True)
class FileName:
    """What the file name of one of our packages says."""

    name: str
    version: str
    number: int
    key8: str
    arch: str

    @classmethod
    def parse(cls, file: str) -> FileName:
        """Take `keepalived-2.3.4-1.0a1b2c3d.x86_64.rpm` apart.

        Raises:
            BuildError: it is not named like our packages.
        """
        match = _FILE.match(file)
        if match is None:
            raise BuildError(
                f"{file}: not a package name of the form NAME-VERSION-NUMBER.KEY8.ARCH.rpm",
                "remove it from the repository folder (only packages built here belong there)",
            )
        return cls(match["name"], match["version"], int(match["number"]), match["key8"], match["arch"])

    @property
    def line(self) -> tuple[str, str, int, str]:
        """Name, version, number and arch: equal for two builds of which the later replaces the earlier."""
        return (self.name, self.version, self.number, self.arch)

    @property
    def release(self) -> str:
        """`1.0a1b2c3d`, without a distribution's tag."""
        return f"{self.number}.{self.key8}"


def build(
    sandbox: Sandbox,
    spec: str,
    name: str,
    sources: Sequence[Path],
    out: Path,
    *,
    what: str,
    defines: Mapping[str, str] | None = None,
    mode: str = "-ba",
    binds: Mapping[Path, str] | None = None,
    ro_binds: Mapping[Path, str] | None = None,
    overlays: Sequence[Overlay] = (),
    env: Mapping[str, str] | None = None,
    hint: str = "",
) -> list[Path]:
    """Run rpmbuild at the fixed path `/build/rpmbuild` and keep the packages.

    Args:
        sandbox: the build root.
        spec: the spec file's text.
        name: the spec file's name without `.spec`.
        sources: files for SOURCES.
        out: takes the packages and `rpmbuild.log`.
        what: for the error ("building keepalived").
        defines: macros set on the command line.
        mode: `-ba` packages and source package, `-bb` only packages, `-bs` only the source package.
        binds, ro_binds, overlays, env: as for `Sandbox.run`.
        hint: for the error.

    Returns:
        The packages in `out`, sorted by name.

    Raises:
        BuildError: rpmbuild failed; its log's tail is in the error.
    """
    top = out / "rpmbuild"
    store.remove_tree(top)
    for folder in ("SPECS", "SOURCES", "BUILD", "BUILDROOT", "RPMS", "SRPMS"):
        (top / folder).mkdir(parents=True)
    (top / "SPECS" / f"{name}.spec").write_text(spec, encoding="utf-8")
    for source in sources:
        link_or_copy(source, top / "SOURCES" / source.name)
    command = ["rpmbuild", mode, "--load", "/build/rpm.macros", "--define", "_topdir /build/rpmbuild"]
    for macro, value in (defines or {}).items():
        command += ["--define", f"{macro} {value}"]
    command.append(f"/build/rpmbuild/SPECS/{name}.spec")
    sandbox.run(
        command,
        binds={top: "/build/rpmbuild", **(binds or {})},
        ro_binds={MACROS: "/build/rpm.macros", **(ro_binds or {})},
        overlays=overlays,
        env=env,
        cwd="/build",
        log=out / "rpmbuild.log",
        what=what,
        hint=hint,
    )
    packages = []
    for package in sorted([*top.glob("RPMS/*/*.rpm"), *top.glob("SRPMS/*.rpm")]):
        target = out / package.name
        package.rename(target)
        packages.append(target)
    store.remove_tree(top)
    if not packages:
        raise BuildError(f"{what}: rpmbuild made no package", f"read {out / 'rpmbuild.log'}")
    return packages


def signed(packages: Stage, toolbox: Callable[[], Sandbox], key: SigningKey, result: Callable[[Stage], Path]) -> Stage:
    """The stage that signs another stage's packages.

    Args:
        packages: its result holds `*.rpm`.
        toolbox: gives a root with rpmsign and gpg.
        key: signs.
        result: where a finished stage's result is (`Store.path`).
    """

    def build_signed(out: Path) -> None:
        for package in sorted(result(packages).glob("*.rpm")):
            shutil.copyfile(package, out / package.name)
        sign(toolbox(), key, out)

    inputs = {"signing_key": key.digest, "rev": 1}
    return Stage(f"signed-{packages.name}", inputs, build_signed, [packages], title=f"signing {packages.name}")


def sign(sandbox: Sandbox, key: SigningKey, folder: Path) -> None:
    """Sign every package of a folder and check each signature with nothing but the public key.

    Raises:
        BuildError: gpg or rpmsign failed, or a package is not signed afterwards.
    """
    names = sorted(p.name for p in folder.glob("*.rpm"))
    script = [
        "set -eu",
        key.import_script,
        # Debian's rpm looks for gpg2, which Debian does not have
        'rpmsign --define "__gpg /usr/bin/gpg" --define "_gpg_name $KEYID" --addsign -- "$@"',
        'mkdir /tmp/db; gpg --batch --armor --export "$KEYID" >/tmp/key.asc',
        "rpmkeys --dbpath /tmp/db --import /tmp/key.asc",
        'rpmkeys --dbpath /tmp/db --define "_pkgverify_level all" --checksig -- "$@"',
    ]
    with key.lent() as secret:
        sandbox.run(
            ["sh", "-c", "\n".join(script), "sign", *names],
            binds={folder: "/build/packages"},
            ro_binds=secret,
            cwd="/build/packages",
            what=f"signing {len(names)} packages",
            hint="look at the key that LVSFORGE_SIGNING_KEY names",
        )


def verify(sandbox: Sandbox, public: Path, folder: Path, files: Sequence[str], hint: str) -> None:
    """Check digests and signatures of packages against nothing but one public key, naming every bad one.

    Args:
        sandbox: a root with rpm.
        public: the armoured key.
        folder: where the packages are.
        files: their names.
        hint: for the error.

    Raises:
        BuildError: packages were changed, are not signed, or are signed by another key.
    """
    script = (
        "set -eu; mkdir /tmp/db\n"
        "rpmkeys --dbpath /tmp/db --import /build/key.asc\n"
        'rpmkeys --dbpath /tmp/db --define "_pkgverify_level all" --checksig -- "$@" || :\n'
    )
    result = sandbox.run(
        ["sh", "-c", script, "verify", *files],
        ro_binds={folder: "/build/packages", public: "/build/key.asc"},
        cwd="/build/packages",
        what="checking the packages' signatures",
    )
    good = {line.split(":")[0] for line in result.stdout.splitlines() if line.endswith(": digests signatures OK")}
    bad = [name for name in files if name not in good]
    if bad:
        said = [*result.stdout.splitlines(), *result.stderr.splitlines()]
        details = [line for line in said if any(name in line for name in bad)]
        raise BuildError(
            f"refused: {', '.join(bad)}: changed after it was signed, not signed, or signed by another key",
            hint,
            details or said,
        )


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A hard link where both are on one file system, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def unpack(sandbox: Sandbox, package: Path, folder: Path) -> None:
    """Lay a package's files into a folder, which is made where it is missing; no scriptlet runs.

    Raises:
        BuildError: the package is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sandbox.run(
        ["sh", "-ec", "rpm2cpio /build/package.rpm >/build/tree/.cpio; cpio -idm --quiet <.cpio; rm .cpio"],
        binds={folder: "/build/tree"},
        ro_binds={package: "/build/package.rpm"},
        cwd="/build/tree",
        what=f"unpacking {package.name}",
    )


def compare(sandbox: Sandbox, pairs: Sequence[tuple[str, str]]) -> list[int]:
    """How rpm orders the two versions or releases of each pair: -1 where the first is the older one, 0, or 1.

    Keys are no numbers to it and no words: 9a is older than 10a, and 0a0 is the same as 00a.
    """
    words = [word for a, b in pairs for word in ("--eval", f"%{{lua:print(rpm.vercmp('{a}', '{b}'))}}")]
    return [int(word) for word in sandbox.run(["rpm", *words]).stdout.split()]


def query(sandbox: Sandbox, package: Path, form: str) -> str:
    """Ask a package file (`rpm -qp --queryformat`) inside a root."""
    result: run.Result = sandbox.run(
        ["rpm", "-qp", "--nosignature", "--queryformat", form, f"/build/{package.name}"],
        ro_binds={package: f"/build/{package.name}"},
    )
    return result.stdout
