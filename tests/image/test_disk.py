"""Packages into a tree, a tree onto a disk, with the real tools: what is refused; equal inputs give equal bytes.

The packages are toys, the base tree and the toolbox are the images' own.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from image import base, packages
from image.base import SECTOR, Layout, Recipe
from pipeline import repository, rpm, store
from pipeline.debroot import tree as built
from pipeline.errors import BuildError
from pipeline.repository import KEY_FILE
from pipeline.sandbox import Sandbox
from pipeline.signing import SigningKey
from pipeline.store import Store

pytestmark = pytest.mark.build

KERNEL = "6.12.0-toy"
SPECS = {
    "kernel-lvs": f"""\
%install
mkdir -p %{{buildroot}}/boot %{{buildroot}}/lib/modules/{KERNEL}
echo kernel >%{{buildroot}}/boot/vmlinuz-{KERNEL}
: >%{{buildroot}}/lib/modules/{KERNEL}/modules.dep
%posttrans
run-parts --report --exit-on-error --arg={KERNEL} --arg=/boot/vmlinuz-{KERNEL} /etc/kernel/postinst.d
%files
/boot/vmlinuz-{KERNEL}
/lib/modules/{KERNEL}
""",
    "toyd": """\
Requires: libc.so.6(GLIBC_2.34)(64bit), /bin/sh, deb(systemd)
%install
mkdir -p %{buildroot}/usr/sbin
echo toy >%{buildroot}/usr/sbin/toyd
%pre
getent passwd toyd >/dev/null || useradd -r toyd
%files
%attr(0755, root, toyd) %caps(cap_net_admin=ep) /usr/sbin/toyd
""",
    "needy": "Requires: libnowhere.so.7()(64bit)\n%files\n",
    "broken": "%post\nexit 3\n%files\n",
}


@dataclass(frozen=True)
class Bench:
    """The toolbox, the base tree, both keys, and a folder of packages that nobody has signed."""

    sandbox: Sandbox
    tree: Path
    ours: SigningKey
    theirs: SigningKey
    plain: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    where = Store()
    sandbox = Sandbox(built(where, base.toolbox_root(where)))
    tree = built(where, base.base_root(where))
    folder = tmp_path_factory.mktemp("bench")
    ours, theirs = (SigningKey(folder / name / "key.asc") for name in ("ours", "theirs"))
    for key in (ours, theirs):
        key.make(sandbox)
    plain = folder / "plain"
    plain.mkdir()
    for name, rest in SPECS.items():
        head = f"Name: {name}\nVersion: 1.0\nRelease: 1.aaaaaaaa\nSummary: A toy\nLicense: GPL-2.0-only\n"
        head += "BuildArch: noarch\nAutoReqProv: no\n%description\nA toy.\n"
        if rest.startswith("Requires"):
            requires, rest = rest.split("\n", 1)
            head = head.replace("%description", f"{requires}\n%description")
        rpm.build(sandbox, head + rest, name, [], plain, what=f"building {name}", mode="-bb")
    where_shim = packages.shim_stage(where, base.base_root(where).stage(), base.toolbox_root(where).stage())
    for path in where.ensure(where_shim).glob("*.rpm"):
        shutil.copy(path, plain)
    return Bench(sandbox, tree, ours, theirs, plain)


def sign_and_index(bench: Bench, folder: Path, *, stranger: str = "", late: str = "") -> Path:
    """A signed repository of all packages but `broken` and `needy`, unless they are asked for.

    Args:
        bench: keys and packages.
        folder: where to.
        stranger: sign this one with the other key.
        late: change one byte of this one after it was signed, before it is indexed.
    """
    for key, names in ((bench.theirs, {stranger} - {""}), (bench.ours, {*SPECS, packages.SHIM} - {stranger})):
        part = folder / key.file.parent.name
        part.mkdir(parents=True)
        for path in bench.plain.glob("*.rpm"):
            if rpm.FileName.parse(path.name).name in names:
                shutil.copy(path, part)
        if names:
            rpm.sign(bench.sandbox, key, part)
    merged = folder / "repository"
    merged.mkdir()
    for path in folder.glob("*/*.rpm"):
        shutil.copy(path, merged)
    if late:
        (victim,) = merged.glob(f"{late}-1.0-*.rpm")
        damage(victim)
    repository.index(bench.sandbox, bench.ours, merged)
    (merged / KEY_FILE).write_text(bench.ours.public(bench.sandbox), encoding="ascii")
    return merged


def damage(path: Path) -> None:
    """Change the last byte: the payload's."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def good(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that nobody touched."""
    return sign_and_index(bench, tmp_path_factory.mktemp("good"))


def install(bench: Bench, folder: Path, source: Path, *names: str) -> Path:
    tree = folder / "tree"
    base.copy_tree(bench.sandbox, bench.tree, tree)
    wanted = packages.choose(source, [packages.SHIM, *names], "test")
    packages.install(bench.sandbox, tree, source, wanted, folder / "dnf.log")
    return tree


def test_install_resolves_and_checks(bench: Bench, good: Path, tmp_path: Path) -> None:
    tree = install(bench, tmp_path, good, "toyd")
    assert "toyd-1.0-1.aaaaaaaa.noarch" in packages.installed(bench.sandbox, tree)
    account = [line for line in (tree / "etc/passwd").read_text().splitlines() if line.startswith("toyd:")]
    assert len(account) == 1
    check = bench.sandbox.run(
        ["chroot", "/build/tree", "rpm", "--dbpath", "/var/lib/rpm", "-V", "toyd"],
        binds={tree: "/build/tree"},
        check=False,
    )
    assert (check.returncode, check.stdout) == (0, "")
    store.remove_tree(tree)


@pytest.mark.parametrize(
    "attack", ["changed after indexing", "changed before indexing", "signed by another key", "not signed"]
)
def test_a_bad_package_is_refused_by_name(attack: str, bench: Bench, tmp_path: Path) -> None:
    if attack == "signed by another key":
        source = sign_and_index(bench, tmp_path / "bad", stranger="toyd")
    elif attack == "changed before indexing":
        source = sign_and_index(bench, tmp_path / "bad", late="toyd")
    else:
        source = sign_and_index(bench, tmp_path / "bad")
        (victim,) = source.glob("toyd-*.rpm")
        if attack == "not signed":
            shutil.copy(bench.plain / victim.name, victim)
            repository.index(bench.sandbox, bench.ours, source)
        else:
            damage(victim)
    tree = tmp_path / "tree"
    tree.mkdir()
    wanted = packages.choose(source, [packages.SHIM, "toyd"], "test")
    with pytest.raises(BuildError, match=r"refused: toyd-1\.0-1\.aaaaaaaa\.noarch\.rpm: changed") as caught:
        packages.install(bench.sandbox, tree, source, wanted, tmp_path / "dnf.log")
    assert any("toyd" in line for line in caught.value.details)
    assert list(tree.iterdir()) == []  # before any work
    store.remove_tree(tree)


def test_changed_metadata_is_refused(bench: Bench, good: Path, tmp_path: Path) -> None:
    source = tmp_path / "repository"
    shutil.copytree(good, source)
    text = (source / "repodata/repomd.xml").read_text()
    (source / "repodata/repomd.xml").write_text(text.replace("<revision>", "<revision>9"))
    with pytest.raises(BuildError, match="dnf refused to install the packages"):
        install(bench, tmp_path, source, "toyd")


def test_a_dependency_that_nobody_has_is_named(bench: Bench, good: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"nothing provides libnowhere\.so\.7\(\)\(64bit\) needed by needy"):
        install(bench, tmp_path, good, "needy")


def test_a_failed_scriptlet_fails_the_build(bench: Bench, good: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="scriptlets failed") as caught:
        install(bench, tmp_path, good, "broken")
    assert any("broken" in line for line in caught.value.details)


@pytest.fixture
def image(tmp_path: Path) -> Recipe:
    """A recipe with the real files of all images and no role of its own."""
    room = tmp_path / "room"
    shutil.copytree(base.ROOM / "common", room / "common", symlinks=True)
    (room / "toy").mkdir()
    (room / "toy" / "image.yaml").write_text(
        "name: lvs-toy\nkernel: lvs\ntools: []\npackages: [toyd]\nkernel_args: [nohz=off]\n"
        "disk_mib: 2048\nqcow2_budget_mb: 300\n"
    )
    return Recipe.load("toy", room)


def test_same_inputs_same_disk(bench: Bench, good: Path, image: Recipe, tmp_path: Path) -> None:
    disks = []
    for name in ("first", "somewhere/else"):
        out = tmp_path / name
        out.mkdir(parents=True)
        base.make_disk(bench.sandbox, image, bench.tree, good, out, "0123456789abcdef")
        disks.append(out / "disk.raw")
    assert store.digest(disks[0]) == store.digest(disks[1])
    assert (tmp_path / "first/packages.json").read_bytes() == (tmp_path / "somewhere/else/packages.json").read_bytes()

    root = Layout(2048, "0123456789abcdef").root

    def ask(command: str) -> str:
        where = f"/build/work/disk.raw?offset={root.start * SECTOR}"
        return bench.sandbox.run(["debugfs", "-R", command, where], ro_binds={tmp_path / "first": "/build/work"}).stdout

    assert f'"vmlinuz-{KERNEL}"' in ask("stat /boot/vmlinuz")
    assert "security.capability" in ask("ea_list /usr/sbin/toyd")
    assert "nohz=off" in ask("cat /boot/grub/grub.cfg")
    assert "IMAGE_ROLE=toy\n" in ask("cat /etc/lvsforge-release")
    assert "File not found" not in ask("stat /var/lib/rpm/rpmdb.sqlite")
    disks[0].unlink()
    disks[1].unlink()
