"""Signing, indexing and publishing with the real tools, and what a client refuses of a repository that was changed.

The packages are toys; the tools are those of the toolbox (image/root.yaml), the client is dnf with the configuration
that we publish. Each row of the table of refusals is an attack that one of the two signatures, or only both, can stop.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline import progress, repository, rpm, run, settings
from pipeline.debroot import Root, tree
from pipeline.errors import BuildError
from pipeline.repository import KEY_FILE
from pipeline.rpm import FileName
from pipeline.sandbox import Sandbox
from pipeline.signing import PASSPHRASE, VARIABLE, SigningKey
from pipeline.store import Store

pytestmark = pytest.mark.build

NAME = "toy-1.0-1.aaaaaaaa.noarch.rpm"
RECIPE = Path("tools/toy/recipe.yaml")
SPEC = """\
Name: {name}
Version: {version}
Release: {number}.{key8}
Summary: A toy
License: GPL-2.0-only
BuildArch: noarch
AutoReqProv: no

%description
A package with one file.

%install
mkdir -p %{{buildroot}}/usr/share/toy
echo "{text}" >%{{buildroot}}/usr/share/toy/{name}

%files
/usr/share/toy/{name}
"""


@pytest.fixture(scope="module")
def toolbox() -> Sandbox:
    """The tools that sign and index, as the images' room uses them."""
    store = Store()
    return Sandbox(tree(store, Root("root-image", settings.TOP / "image" / "root.yaml", store)))


@pytest.fixture(scope="module")
def keys(toolbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SigningKey]:
    """Our key and somebody else's; made for this run, none is kept."""
    folder = tmp_path_factory.mktemp("keys")
    made = {name: SigningKey(folder / name / "signing-key.asc") for name in ("ours", "theirs")}
    for key in made.values():
        key.make(toolbox)
    return made


def build(
    toolbox: Sandbox, out: Path, *, version: str = "1.0", number: int = 1, key8: str = "a" * 8, text: str = "toy"
) -> Path:
    """Build one toy package, unsigned."""
    out.mkdir(parents=True, exist_ok=True)
    spec = SPEC.format(name="toy", version=version, number=number, key8=key8, text=text)
    (package,) = rpm.build(toolbox, spec, "toy", [], out, what="building toy", mode="-bb")
    (out / "rpmbuild.log").unlink()
    return package


@pytest.fixture(scope="module")
def unsigned(toolbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy package that nobody signed."""
    return build(toolbox, tmp_path_factory.mktemp("unsigned"))


def folder_with(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copyfile(source, folder / source.name)
    return folder


@pytest.fixture(scope="module")
def good(
    toolbox: Sandbox, keys: dict[str, SigningKey], unsigned: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A published repository of one signed package; tests change copies of it."""
    top = tmp_path_factory.mktemp("good")
    folder = folder_with(unsigned, top / "signed")
    rpm.sign(toolbox, keys["ours"], folder)
    target = top / "repository"
    added = repository.publish({folder: RECIPE}, target, Store(top / "store"), lambda: toolbox, keys["ours"])
    assert added == [NAME]
    return target


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "repository"))


def checksig(toolbox: Sandbox, key_file: Path, package: Path, level: str = "all") -> run.Result:
    """rpmkeys with nothing but one public key."""
    script = (
        "rpmkeys --dbpath /tmp/db --import /build/key && "
        f'rpmkeys --dbpath /tmp/db --define "_pkgverify_level {level}" --checksig /build/{package.name}'
    )
    binds = {key_file: "/build/key", package: f"/build/{package.name}"}
    return toolbox.run(["sh", "-c", f"mkdir /tmp/db; {script}"], ro_binds=binds, check=False)


def install(
    toolbox: Sandbox, published: Path, where: Path, words: str = "install toy", *, gpgcheck: bool = True
) -> tuple[int, str, Path]:
    """Install toy into a tree with dnf and our published client configuration; status, output, tree."""
    root = where / "tree"
    root.mkdir(parents=True, exist_ok=True)
    client = (published / "lvsforge.repo").read_text()
    client = client.replace("https://REPOSITORY.EXAMPLE/", "file:///build/repository/")
    assert "EXAMPLE" not in client
    if not gpgcheck:
        client = client.replace("\ngpgcheck=1", "\ngpgcheck=0")
    configuration = where / "dnf.conf"
    configuration.write_text("[main]\nreposdir=/nowhere\nplugins=0\ncachedir=/var/cache/dnf\n" + client)
    macros = where / "macros"
    macros.write_text("%_dbpath /var/lib/rpm\n%__gpg /usr/bin/gpg\n")
    dnf = f"dnf --refresh --config /build/dnf.conf --installroot /build/tree --releasever 12 --assumeyes {words}"
    result = toolbox.run(
        ["sh", "-c", f"{dnf} 2>&1"],
        binds={root: "/build/tree"},
        ro_binds={published: "/build/repository", configuration: "/build/dnf.conf", macros: "/root/.rpmmacros"},
        check=False,
        timeout=300,
    )
    return result.returncode, result.stdout, root


def installed(root: Path) -> bool:
    return (root / "usr/share/toy/toy").exists()


# --- what is good


def test_a_signed_package_is_accepted_and_an_unsigned_one_is_not(
    toolbox: Sandbox, keys: dict[str, SigningKey], good: Path, unsigned: Path, tmp_path: Path
) -> None:
    ours = good / KEY_FILE
    accepted = checksig(toolbox, ours, good / "x86_64" / NAME)
    assert (accepted.returncode, accepted.stdout.strip()) == (0, f"/build/{NAME}: digests signatures OK")
    refused = checksig(toolbox, ours, unsigned)
    assert refused.returncode != 0
    # Debian's rpm by itself is content with digests: the reason for _pkgverify_level in every check of ours
    assert checksig(toolbox, ours, unsigned, level="digest").returncode == 0
    theirs = tmp_path / "theirs"
    theirs.write_text(keys["theirs"].public(toolbox))
    assert checksig(toolbox, theirs, good / "x86_64" / NAME).returncode != 0


def test_the_published_repository_installs(toolbox: Sandbox, copy: Path, tmp_path: Path) -> None:
    status, text, root = install(toolbox, copy, tmp_path / "client")
    assert status == 0, text
    assert (root / "usr/share/toy/toy").read_text() == "toy\n"
    assert sorted(p.name for p in copy.iterdir()) == [KEY_FILE, "lvsforge.repo", "source", "x86_64"]


def test_the_metadata_is_the_same_bytes_each_time(
    toolbox: Sandbox, keys: dict[str, SigningKey], good: Path, tmp_path: Path
) -> None:
    again = folder_with(good / "x86_64" / NAME, tmp_path / "again")
    repository.index(toolbox, keys["ours"], again)
    for name in ("repomd.xml", *(p.name for p in (good / "x86_64/repodata").glob("*.xz"))):
        assert (again / "repodata" / name).read_bytes() == (good / "x86_64/repodata" / name).read_bytes()


def test_a_key_with_a_passphrase_signs(
    toolbox: Sandbox, unsigned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "set -eu; export GNUPGHOME=/tmp/gnupg; mkdir -m 700 $GNUPGHOME\n"
        "gpg --batch --quiet --passphrase words --quick-generate-key toy rsa3072 sign never\n"
        "gpg --batch --pinentry-mode loopback --passphrase words --armor --export-secret-keys"
    )
    file, phrase = tmp_path / "key.asc", tmp_path / "phrase"
    file.write_text(toolbox.run(["sh", "-c", script]).stdout)
    phrase.write_text("words\n")
    monkeypatch.setenv(VARIABLE, str(file))
    monkeypatch.setenv(PASSPHRASE, str(phrase))
    folder = folder_with(unsigned, tmp_path / "signed")
    rpm.sign(toolbox, SigningKey.find(), folder)
    public = tmp_path / "public"
    public.write_text(SigningKey.find().public(toolbox))
    assert checksig(toolbox, public, folder / NAME).returncode == 0
    phrase.write_text("wrong\n")
    with pytest.raises(BuildError, match="signing 1 packages"):
        rpm.sign(toolbox, SigningKey.find(), folder_with(unsigned, tmp_path / "other"))


# --- what is refused


def change_a_byte(package: Path) -> None:
    """One bit of the payload, near its end, the length unchanged."""
    data = bytearray(package.read_bytes())
    data[-10] ^= 1
    package.unlink()  # it may share its bytes with the good one
    package.write_bytes(data)


@dataclass(frozen=True)
class Attacker:
    """Who changes a copy of a repository, and with what."""

    published: Path
    toolbox: Sandbox
    keys: dict[str, SigningKey]
    unsigned: Path

    @property
    def folder(self) -> Path:
        return self.published / "x86_64"

    @property
    def package(self) -> Path:
        return self.folder / NAME

    def index(self, key: str) -> None:
        shutil.rmtree(self.folder / "repodata")
        repository.index(self.toolbox, self.keys[key], self.folder)

    def replace(self, package: Path) -> None:
        self.package.unlink()
        shutil.copyfile(package, self.package)


def package_changed(attacker: Attacker) -> None:
    change_a_byte(attacker.package)


def metadata_made_again_with_the_old_signature(attacker: Attacker) -> None:
    old = (attacker.folder / "repodata/repomd.xml.asc").read_bytes()
    change_a_byte(attacker.package)
    attacker.index("theirs")
    (attacker.folder / "repodata/repomd.xml.asc").write_bytes(old)


def metadata_made_again_without_a_signature(attacker: Attacker) -> None:
    change_a_byte(attacker.package)
    attacker.index("theirs")
    (attacker.folder / "repodata/repomd.xml.asc").unlink()


def metadata_signed_by_another_key(attacker: Attacker) -> None:
    change_a_byte(attacker.package)
    attacker.index("theirs")


def package_changed_and_metadata_signed_by_our_key(attacker: Attacker) -> None:
    change_a_byte(attacker.package)
    attacker.index("ours")


def unsigned_package_and_metadata_signed_by_our_key(attacker: Attacker) -> None:
    attacker.replace(attacker.unsigned)
    attacker.index("ours")


def package_signed_by_another_key_and_metadata_by_ours(attacker: Attacker) -> None:
    attacker.replace(attacker.unsigned)
    rpm.sign(attacker.toolbox, attacker.keys["theirs"], attacker.folder)
    attacker.index("ours")


def package_list_changed(attacker: Attacker) -> None:
    (listing,) = (attacker.folder / "repodata").glob("*-primary.xml.xz")
    change_a_byte(listing)


# The attack and what dnf says of it.
REFUSALS: dict[Callable[[Attacker], None], str] = {
    package_changed: "checksum",
    metadata_made_again_with_the_old_signature: "GPG signature",
    metadata_made_again_without_a_signature: "signature",
    metadata_signed_by_another_key: "GPG signature",
    package_changed_and_metadata_signed_by_our_key: "GPG check FAILED",
    unsigned_package_and_metadata_signed_by_our_key: "is not signed",
    package_signed_by_another_key_and_metadata_by_ours: "not installed",
    package_list_changed: "checksum",
}


@pytest.fixture
def attacker(copy: Path, toolbox: Sandbox, keys: dict[str, SigningKey], unsigned: Path) -> Attacker:
    return Attacker(copy, toolbox, keys, unsigned)


@pytest.mark.parametrize("attack", REFUSALS, ids=lambda attack: attack.__name__)
def test_a_client_refuses(attack: Callable[[Attacker], None], attacker: Attacker, tmp_path: Path) -> None:
    attack(attacker)
    status, text, root = install(attacker.toolbox, attacker.published, tmp_path / "client")
    assert status != 0
    assert not installed(root)
    assert REFUSALS[attack] in text, text


def test_the_metadatas_signature_does_not_stand_in_for_the_packages(attacker: Attacker, tmp_path: Path) -> None:
    """Why the client configuration demands both: with gpgcheck off, an unsigned package gets in."""
    unsigned_package_and_metadata_signed_by_our_key(attacker)
    status, text, root = install(attacker.toolbox, attacker.published, tmp_path / "client", gpgcheck=False)
    assert (status, installed(root)) == (0, True), text


def test_signing_notices_what_it_cannot_sign(toolbox: Sandbox, keys: dict[str, SigningKey], tmp_path: Path) -> None:
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / NAME).write_bytes(gzip.compress(b"no package"))
    with pytest.raises(BuildError, match="signing 1 packages"):
        rpm.sign(toolbox, keys["ours"], folder)


def test_signing_checks_each_signature_afterwards(
    toolbox: Sandbox, keys: dict[str, SigningKey], unsigned: Path, tmp_path: Path
) -> None:
    """A rpmsign that says it signed and did not: Debian's own does so where it finds no gpg2, once a pipe hides it."""

    class Careless(Sandbox):
        def run(self, command: Sequence[str], **options: Any) -> run.Result:
            return super().run([word.replace("rpmsign ", ": rpmsign ") for word in command], **options)

    with pytest.raises(BuildError, match="signing 1 packages"):
        rpm.sign(Careless(toolbox.root), keys["ours"], folder_with(unsigned, tmp_path / "packages"))


# --- publishing


def test_older_versions_stay_installable(
    toolbox: Sandbox, keys: dict[str, SigningKey], copy: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")

    def publish(key8: str, *, version: str = "1.0", number: int = 1) -> list[str]:
        folder = tmp_path / f"{version}-{number}-{key8}"
        build(toolbox, folder, version=version, number=number, key8=key8, text=key8)
        rpm.sign(toolbox, keys["ours"], folder)
        return repository.publish({folder: RECIPE}, copy, store, lambda: toolbox, keys["ours"])

    def names() -> list[FileName]:
        return [FileName.parse(p.name) for p in sorted((copy / "x86_64").glob("*.rpm"))]

    assert publish("b" * 8, number=2) == ["toy-1.0-2.bbbbbbbb.noarch.rpm"]
    assert [(n.version, n.number) for n in names()] == [("1.0", 1), ("1.0", 2)]
    publish("c" * 8, number=2)  # the same release from other inputs
    assert [(n.number, n.key8) for n in names()] == [(1, "a" * 8), (2, "c" * 8)]
    publish("d" * 8, version="1.1")
    published = {path.stat().st_ino for path in (copy / "x86_64").glob("*.rpm")}
    built = {path.stat().st_ino for path in tmp_path.glob("*/toy-*.rpm")}
    assert len(built) == 3, "no build was found"
    assert not published & built, "what a user does to the repository would reach the store"
    assert [(n.version, n.number) for n in names()] == [("1.0", 1), ("1.0", 2), ("1.1", 1)]
    status, text, root = install(toolbox, copy, tmp_path / "client")
    assert status == 0, text
    assert (root / "usr/share/toy/toy").read_text() == "d" * 8 + "\n"  # the newest


@pytest.mark.parametrize(("key8", "taken"), [("b" * 8, True), ("a0000000", False)])
def test_a_rebuild_of_the_same_release_is_taken_or_warned_of(
    toolbox: Sandbox,
    keys: dict[str, SigningKey],
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key8: str,
    taken: bool,
) -> None:
    """What dnf upgrade does not take, the command of the warning does."""
    warnings: list[str] = []
    monkeypatch.setattr(progress, "warn", warnings.append)
    status, text, root = install(toolbox, copy, tmp_path)
    assert status == 0, text
    build(toolbox, tmp_path / "rebuilt", key8=key8, text=key8)
    rpm.sign(toolbox, keys["ours"], tmp_path / "rebuilt")
    store = Store(tmp_path / "store")
    repository.publish({tmp_path / "rebuilt": RECIPE}, copy, store, lambda: toolbox, keys["ours"])
    status, text, _ = install(toolbox, copy, tmp_path, "upgrade")
    assert status == 0, text
    assert ((root / "usr/share/toy/toy").read_text() == f"{key8}\n") is taken
    assert bool(warnings) is not taken
    if warnings:
        status, text, _ = install(toolbox, copy, tmp_path, warnings[0].rpartition("on hosts: dnf ")[2])
        assert status == 0, text
        assert (root / "usr/share/toy/toy").read_text() == f"{key8}\n"


def test_older_versions_stay_installable_after_a_change_of_the_key(
    toolbox: Sandbox, keys: dict[str, SigningKey], copy: Path, tmp_path: Path
) -> None:
    """A host that was set up afterwards knows the new key and no other."""
    build(toolbox, tmp_path / "next", version="1.1")
    rpm.sign(toolbox, keys["theirs"], tmp_path / "next")
    store = Store(tmp_path / "store")
    repository.publish({tmp_path / "next": RECIPE}, copy, store, lambda: toolbox, keys["theirs"])
    assert (copy / KEY_FILE).read_text() == keys["theirs"].public(toolbox)
    status, text, root = install(toolbox, copy, tmp_path, f"install {NAME.removesuffix('.noarch.rpm')}")
    assert status == 0, text
    assert installed(root)


def test_releases_are_ordered_as_rpm_orders_them(toolbox: Sandbox) -> None:
    pairs = [("1.9a000000", "1.10a00000"), ("1.0a000000", "1.00a00000"), ("1.b0000000", "1.a0000000")]
    assert rpm.compare(toolbox, pairs) == [-1, 0, 1]


def test_the_same_inputs_give_the_same_package(toolbox: Sandbox, unsigned: Path, tmp_path: Path) -> None:
    """Before signing; built at another place, at another time."""
    assert build(toolbox, tmp_path / "elsewhere").read_bytes() == unsigned.read_bytes()
