"""The files that are laid into the images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from pipeline import run

IMAGE = Path(__file__).parents[2] / "image"
ROOTFS = sorted(IMAGE.glob("*/rootfs"))
LINK_KERNELS = IMAGE / "common/rootfs/usr/lib/lvsforge/link-kernels"


def test_there_are_three_folders() -> None:
    assert [path.parent.name for path in ROOTFS] == ["common", "director", "realserver"]


def test_a_running_host_leaves_out_what_the_image_left_out() -> None:
    base = yaml.safe_load((IMAGE / "base.yaml").read_text(encoding="utf-8"))
    lines = (IMAGE / "common/rootfs/etc/dpkg/dpkg.cfg.d/50-lvsforge").read_text(encoding="utf-8").splitlines()
    assert [line.split("=")[1] for line in lines if line.startswith("path-exclude=")] == base["exclude_paths"]
    assert [line.split("=")[1] for line in lines if line.startswith("path-include=")] == base["include_paths"]


@pytest.mark.parametrize("folder", ROOTFS, ids=lambda path: path.parent.name)
def test_what_is_executable_has_an_interpreter_and_the_other_way_round(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    for path in files:
        assert path.read_bytes().startswith(b"#!") == bool(path.stat().st_mode & 0o100), path


@pytest.mark.parametrize("folder", ROOTFS, ids=lambda path: path.parent.name)
def test_links_to_our_own_files_lead_somewhere(folder: Path) -> None:
    """Those to /lib and /usr/lib are Debian's and the RPMs' units, which the image's checks look at."""
    for path in (path for path in folder.rglob("*") if path.is_symlink()):
        target = os.readlink(path)
        if target.startswith("/etc/"):
            assert any((root / target[1:]).exists() for root in ROOTFS), path
        elif not target.startswith("/"):
            ours = "lvsforge" in target
            assert path.exists() or not ours, path


def test_the_stages_of_cloud_init_depend_on_nothing_but_the_first() -> None:
    """They require cloud-init-local.service, which fails with every command of it that has no "-"."""
    lines = (IMAGE / "common/rootfs/etc/systemd/system/cloud-init-local.service").read_text("ascii").splitlines()
    after = [line.partition("=")[2] for line in lines if line.startswith("ExecStartPost=")]
    assert after and [command for command in after if not command.startswith("-")] == []


@pytest.mark.runs("sh")
@pytest.mark.parametrize(
    ("kernels", "removed", "running", "newest", "previous"),
    [
        ("6.12.9-1.lvs", None, None, "6.12.9-1.lvs", None),
        ("6.12.9-1.lvs 6.12.10-1.lvs", None, None, "6.12.10-1.lvs", "6.12.9-1.lvs"),
        ("6.12.9-1.lvs 6.12.10-1.lvs 6.6.100-1.lvs", None, None, "6.12.10-1.lvs", "6.12.9-1.lvs"),
        ("6.12.9-1.lvs 6.12.10-1.lvs", "6.12.10-1.lvs", None, "6.12.9-1.lvs", None),
        ("6.12.9-1.lvs 6.12.10-1.lvs 6.12.11-1.lvs", "6.12.10-1.lvs", None, "6.12.11-1.lvs", "6.12.9-1.lvs"),
        ("", None, None, None, None),
        # What runs has booted, what two upgrades without a reboot have brought has not.
        ("6.12.9-1.lvs 6.12.10-1.lvs 6.12.11-1.lvs", None, "6.12.9-1.lvs", "6.12.11-1.lvs", "6.12.9-1.lvs"),
        ("6.12.9-1.lvs 6.12.10-1.lvs 6.12.11-1.lvs", None, "6.12.11-1.lvs", "6.12.11-1.lvs", "6.12.10-1.lvs"),
        ("6.12.9-1.lvs 6.12.10-1.lvs 6.12.11-1.lvs", "6.12.9-1.lvs", "6.12.9-1.lvs", "6.12.11-1.lvs", "6.12.10-1.lvs"),
        ("6.12.9-1.lvs", None, "6.12.9-1.lvs", "6.12.9-1.lvs", None),
    ],
)
def test_boot_links(
    tmp_path: Path, kernels: str, removed: str | None, running: str | None, newest: str | None, previous: str | None
) -> None:
    for version in kernels.split():
        (tmp_path / f"vmlinuz-{version}").touch()
    tools = tmp_path / "bin"
    tools.mkdir()
    # The links are the old ones yet when the disk gets the files that they will lead to.
    for name, script in {
        "uname": f"echo {running or '6.1.0-builder'}",
        "sync": 'echo "$*"; readlink "$2/vmlinuz" "$2/vmlinuz.old"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
        (tools / name).chmod(0o755)
    for stale in ("vmlinuz", "vmlinuz.old", "vmlinuz.new"):
        (tmp_path / stale).symlink_to("vmlinuz-gone")
    folder = "postrm.d/zz-link-removed" if removed else "postinst.d/zz-link-kernels"
    hook = IMAGE / "common/rootfs/etc/kernel" / folder
    argument = removed or (kernels.split() or ["0"])[-1]
    said = run.run(
        ["sh", hook, argument, f"/boot/vmlinuz-{argument}"],
        env={"LVS_BOOT": str(tmp_path), "PATH": f"{tools}:{os.environ['PATH']}"},
        what="the hook of kernel packages",
    ).stdout
    assert said.splitlines() == ([f"-f {tmp_path}", "vmlinuz-gone", "vmlinuz-gone"] if newest else [])
    wanted = {"vmlinuz": newest, "vmlinuz.old": previous}
    for name, release in wanted.items():
        link = tmp_path / name
        found = os.readlink(link) if link.is_symlink() else None
        assert found == (f"vmlinuz-{release}" if release else None), name
    assert not (tmp_path / "vmlinuz.new").is_symlink()
