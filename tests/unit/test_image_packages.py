"""Packages: what the base is said to provide, which package is meant, what dnf's output means."""

from __future__ import annotations

from pathlib import Path

import pytest

from image import packages
from pipeline import rpm
from pipeline.errors import BuildError
from pipeline.store import Stage, Store


@pytest.mark.parametrize(
    ("debian", "expected"),
    [
        ("2.36-9+deb12u10", "2.36-9+deb12u10"),
        ("1:1.2.13.dfsg-1", "1:1.2.13.dfsg-1"),
        ("20230311", "20230311"),
        ("1.2-rc3-4~x", "1.2.rc3-4~x"),  # rpm would take rc3 for a release
    ],
)
def test_rpm_version(debian: str, expected: str) -> None:
    assert packages.rpm_version(debian) == expected


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(
        "Package: procps\nStatus: install ok installed\nVersion: 2:4.0.2-3\nDescription: x\n more: text\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n"
        "Package: passwd\nStatus: install ok installed\nVersion: 1:4.13-1\n"
    )
    for folder in ("usr/bin", "usr/sbin"):
        (tmp_path / folder).mkdir(parents=True)
    for name, mode in (("usr/bin/tool", 0o755), ("usr/bin/[", 0o755), ("usr/bin/data", 0o644), ("usr/sbin/d", 0o755)):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(mode)
    (tmp_path / "usr/bin/vi").symlink_to("/etc/alternatives/vi")
    return tmp_path


def test_only_what_is_installed_is_provided(tree: Path) -> None:
    assert packages.debian_packages(tree) == {"passwd": "1:4.13-1", "procps": "2:4.0.2-3"}
    assert packages.packages(tree) == {
        "deb(passwd) = 1:4.13-1",
        "deb(procps) = 2:4.0.2-3",
        "procps-ng = 2:4.0.2-3",
        "shadow-utils = 1:4.13-1",
        "user(root)",
        "group(root)",
    }


def test_programs_in_both_spellings(tree: Path) -> None:
    found = packages.programs(tree)
    assert found == {"/usr/bin/tool", "/bin/tool", "/usr/bin/vi", "/bin/vi", "/usr/sbin/d", "/sbin/d"}


def test_shim_owns_nothing_and_is_named_like_our_packages() -> None:
    spec = packages.shim_spec(["libc.so.6()(64bit)", "/bin/sh"], "0123456789abcdef")
    assert "Provides: libc.so.6()(64bit)\nProvides: /bin/sh\n" in spec
    assert spec.endswith("%files\n")
    assert "Requires" not in spec
    assert rpm.FileName.parse(f"{packages.SHIM}-12-1.01234567.noarch.rpm").key8 == "01234567"
    assert "Release: 1.01234567\n" in spec


def test_choose_takes_exactly_one_of_each(tmp_path: Path) -> None:
    for name in ("a-1-1.x.noarch.rpm", "a-b-2-1.x.x86_64.rpm", "c-1-1.x.noarch.rpm", "c-2-1.x.noarch.rpm"):
        (tmp_path / name).write_text("")
    assert [w.nevra for w in packages.choose(tmp_path, ["a-b", "a"], "r")] == ["a-b-2-1.x.x86_64", "a-1-1.x.noarch"]
    with pytest.raises(BuildError) as caught:
        packages.choose(tmp_path, ["a", "c", "d"], "r")
    assert caught.value.details == (
        "c: more than one: c-1-1.x.noarch, c-2-1.x.noarch",
        "d: not in the repository (there: a, a-b, c)",
    )


def test_dnf_checks_both_signatures() -> None:
    lines = packages.configuration().splitlines()
    for wanted in ("gpgcheck=1", "repo_gpgcheck=1", "plugins=0", "install_weak_deps=0"):
        assert wanted in lines
    assert sum(line.startswith("[") for line in lines) == 2  # [main] and one repository


MISSING = "nothing provides libfoo.so.1 needed by y"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"+ dnf x\nError: \n Problem: x\n  - {MISSING}\n", f"- {MISSING}"),
        ("Importing\nError: GPG check FAILED\n", "Error: GPG check FAILED"),
        ("", "no output"),
    ],
)
def test_refusal_is_the_line_that_says_why(text: str, line: str) -> None:
    assert packages.refusal(text) == line


def test_failed_scriptlets_are_found() -> None:
    text = "  Running scriptlet: toyd\nwarning: %post(toyd-1-1.x86_64) scriptlet failed, exit status 1\n\nComplete!\n"
    assert len(packages.failed_scriptlets(text)) == 1
    shell = "/var/tmp/rpm-tmp.FZJmlq: 4: cannot create /dev/null: Permission denied"  # noqa: S108  what dash says
    assert packages.failed_scriptlets(f"{shell}\n") == [shell]
    assert packages.failed_scriptlets("  Running scriptlet: toyd-1 1/1\nComplete!\n") == []


def test_a_base_tree_that_lacks_nearly_everything_is_to_be_made_anew(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, toolbox = (Stage(name, {}, lambda out: None) for name in ("base-tree", "root-image"))
    for name in ("libraries", "programs", "packages"):
        monkeypatch.setattr(packages, name, lambda *_: {"/bin/sh"})
    with pytest.raises(BuildError, match="provides only 2 things") as caught:
        packages.shim_stage(store, base, toolbox).build(tmp_path)
    assert caught.value.hint.startswith(f"rm -r {store.path(base)} ")
