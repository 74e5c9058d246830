"""The golden image: the seal, what a failed bake says, the manifest, how it reaches out/, and Packer's template."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from image import bake, golden, verify
from image.base import ROOM, Recipe
from pipeline import run, settings, store, vm
from pipeline.errors import BuildError
from pipeline.store import Stage, Store

TCG = vm.Accelerator("tcg", "qemu64", 6.0, "no kvm")
RULES = {"stop": ["rsyslog.service"], "remove": ["/etc/ssh/ssh_host_*", "/root/.ssh"], "empty": ["/etc/machine-id"]}


@pytest.fixture
def director() -> Recipe:
    return Recipe.load("director")


# --- sealing


def test_seal_stops_then_removes_then_looks_then_trims() -> None:
    script = golden.seal_script(RULES)
    order = [
        "systemctl stop rsyslog.service",
        "rm -rf /etc/ssh/ssh_host_*",
        ": >/etc/machine-id",
        "for found in /etc/ssh/ssh_host_*;",
        "[ ! -s /etc/machine-id ]",
        "fstrim --all",
    ]
    places = [script.index(text) for text in order]
    assert places == sorted(places)
    assert script.startswith("#!/bin/sh\n")
    assert "set -eu" in script


@pytest.mark.runs("sh")
def test_seal_fails_when_something_is_still_there(tmp_path: Path) -> None:
    """The script itself, with its paths moved into a folder and a `rm` that does nothing."""
    (tmp_path / "etc/ssh").mkdir(parents=True)
    (tmp_path / "etc/ssh/ssh_host_key").write_text("secret")
    (tmp_path / "etc/machine-id").write_text("1234")
    script = golden.seal_script(RULES).replace(" /etc/", f" {tmp_path}/etc/").replace(">/etc/", f">{tmp_path}/etc/")
    script = script.replace("'/etc", f"'{tmp_path}/etc")
    tools = "systemctl() { :; }\nfstrim() { :; }\nsync() { :; }\n"
    env = {"IMAGE_VERSION": "1"}
    broken = run.run(["sh", "-c", tools + "rm() { :; }\n" + script], check=False, env=env)
    assert broken.returncode == 1
    assert broken.stderr == f"lvsforge: {tmp_path}/etc/ssh/ssh_host_key is still there\n"


@pytest.mark.runs("sh", "rm")
def test_seal_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "etc/ssh").mkdir(parents=True)
    (tmp_path / "etc/ssh/ssh_host_key").write_text("secret")
    (tmp_path / "etc/machine-id").write_text("1234")
    rules = {"stop": [], "remove": [f"{tmp_path}/etc/ssh/ssh_host_*"], "empty": [f"{tmp_path}/etc/machine-id"]}
    script = golden.seal_script(rules).replace("/etc/lvsforge-release", f"{tmp_path}/etc/release")
    run.run(["sh", "-c", "fstrim() { :; }\nsync() { :; }\n" + script], env={"IMAGE_VERSION": "6.12-x"})
    assert sorted(p.name for p in (tmp_path / "etc").rglob("*") if p.is_file()) == ["machine-id", "release"]
    assert (tmp_path / "etc/machine-id").stat().st_size == 0
    assert (tmp_path / "etc/release").read_text() == "IMAGE_VERSION=6.12-x\n"


def test_shipped_hygiene_covers_identity() -> None:
    rules = golden.hygiene()
    for path in ("/etc/ssh/ssh_host_*", "/root/.ssh", "/var/lib/systemd/random-seed"):
        assert path in rules["remove"]
    assert rules["empty"] == ["/etc/machine-id"]
    assert "systemd-random-seed.service" in rules["stop"]


def test_hygiene_refuses_what_the_shell_would_act_on(tmp_path: Path) -> None:
    (tmp_path / "hygiene.yaml").write_text("stop: [x]\nremove: ['/a; rm -rf $HOME']\nempty: []\nkeep: []\n")
    with pytest.raises(BuildError) as caught:
        golden.hygiene(tmp_path)
    text = "\n".join(caught.value.details)
    assert "stop[0]" in text
    assert "remove[0]" in text
    assert "unknown key keep" in text


# --- failures

PACKER_LOG = """\
+ packer build
2025-01-01T00:00:00Z: ==> qemu.image: Waiting for SSH to become available...
2025-01-01T00:00:00Z: ==> qemu.image: foo.service loaded failed failed Foo
2025-01-01T00:00:00Z: ==> qemu.image: lvsforge: the system is degraded after its boot
2025-01-01T00:00:00Z: ==> qemu.image: Deleting output directory...
Build 'qemu.image' errored after 40 seconds: Script exited with non-zero exit status: 1.
"""


def test_a_failed_bake_says_first_what_our_script_said() -> None:
    assert golden.complaints(PACKER_LOG)[0] == "the system is degraded after its boot"
    assert any("errored after 40 seconds" in line for line in golden.complaints(PACKER_LOG))


def test_a_failed_bake_shows_the_console_and_how_to_look(tmp_path: Path, director: Recipe) -> None:
    (tmp_path / "console.log").write_text("Kernel panic - not syncing\n")
    (tmp_path / "qemu.pid").write_text("4711\n")
    log = tmp_path / "packer.log"
    log.write_text(PACKER_LOG)
    variables = {"ssh_port": "2222", "ssh_key": str(tmp_path / "id")}
    error = BuildError("packer failed", "x")
    gone = golden.failure(director, error, log, tmp_path, variables, False)
    assert "the system is degraded" in gone.message
    assert "console | Kernel panic - not syncing" in gone.details
    assert "invoke bake-image --role director --keep" in gone.hint
    kept = golden.failure(director, error, log, tmp_path, variables, True)
    assert kept.hint.startswith(f"ssh -F {tmp_path}/ssh_config lvs-director")
    assert "kill 4711" in kept.hint
    assert "  Port 2222\n" in (tmp_path / "ssh_config").read_text()


# --- papers


def test_version_is_kernel_and_key(director: Recipe) -> None:
    installed = ["frr-8.4-1.x.x86_64", "kernel-lvs-6.12.30-1.abcdef01.x86_64"]
    assert golden.image_version(director, installed, "0123456789abcdef") == "6.12.30-01234567"
    with pytest.raises(BuildError, match="kernel-lvs is not installed"):
        golden.image_version(director, installed[:1], "0123456789abcdef")


@pytest.fixture
def finished(tmp_path: Path, director: Recipe, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A result as `write_papers` leaves it, around an image of a few bytes."""
    monkeypatch.setattr(golden, "tool_version", lambda program, argument: f"{program} 1")
    kernel = Stage("kernel-lvs", {"sources": {"linux": "sha256:aa"}, "patches": {"0001.patch": "bb"}}, lambda out: None)
    made = Stage("image-director", {"packer": "cc"}, lambda out: None, [kernel])
    result, disk = tmp_path / "result", tmp_path / "disk"
    for folder in (result, disk):
        folder.mkdir()
    (disk / "dnf.log").write_text("dnf said\n")
    target = result / "lvs-director-6.12-x.qcow2"
    target.write_bytes(b"image")
    present = {"rpm": ["kernel-lvs-6.12-1.x.x86_64"], "deb": {"bash": "5.2"}}
    golden.write_papers(Store(tmp_path), director, "6.12-x", present, result, target, disk, made, TCG)
    return result


def test_manifest_names_every_input(finished: Path) -> None:
    report = json.loads((finished / "manifest.json").read_text())
    assert report["image"]["sha256"] == store.digest(finished / "lvs-director-6.12-x.qcow2")
    assert report["packages"] == {"rpm": ["kernel-lvs-6.12-1.x.x86_64"], "deb": {"bash": "5.2"}}
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert stages["kernel-lvs"]["inputs"]["patches"] == {"0001.patch": "bb"}
    assert stages["image-director"]["inputs"]["needs"] == {"kernel-lvs": stages["kernel-lvs"]["key"]}
    assert "===== dnf.log\ndnf said\n" in (finished / "build.log").read_text()


def test_checksums_are_right(finished: Path) -> None:
    lines = (finished / "SHA256SUMS").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == ["build.log", "lvs-director-6.12-x.qcow2", "manifest.json"]
    for line in lines:
        digest, name = line.split("  ")
        assert store.digest(finished / name) == digest


def test_publish_is_whole_or_not_at_all(
    finished: Path, tmp_path: Path, director: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    target = golden.publish(finished, director, out)
    assert target == out / "lvs-director" / "6.12-x"
    assert sorted(p.name for p in target.iterdir()) == [
        "SHA256SUMS", "build.log", "lvs-director-6.12-x.qcow2", "manifest.json",
    ]  # fmt: skip
    before = (target / "manifest.json").stat().st_mtime_ns
    golden.publish(finished, director, out)  # the same again: nothing is written
    assert (target / "manifest.json").stat().st_mtime_ns == before

    def full(_source: Path, copy: Path) -> None:
        copy.write_bytes(b"im")
        raise OSError(28, "full")

    (target / "SHA256SUMS").write_text("")  # damaged; the next one fails half way
    with monkeypatch.context() as broken:
        broken.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="full"):
            golden.publish(finished, director, out)
    assert (target / "lvs-director-6.12-x.qcow2").read_bytes() == b"image"
    assert list(target.parent.iterdir()) == [target]

    golden.publish(finished, director, out)
    assert (target / "SHA256SUMS").read_bytes() == (finished / "SHA256SUMS").read_bytes()
    image = target / "lvs-director-6.12-x.qcow2"
    image.write_bytes(b"")  # by a power cut
    golden.publish(finished, director, out)
    assert image.read_bytes() == b"image"
    image.unlink()
    golden.publish(finished, director, out)
    assert image.read_bytes() == b"image"


def test_abandoned_bakes_go_and_kept_machines_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = Store(tmp_path)
    for name in ("toy-key-1", "toy-key-2", "other-key-1"):
        (tmp_path / "bakes" / name).mkdir(parents=True)
    monkeypatch.setattr(golden, "running", lambda folder: folder.name == "toy-key-2")
    golden.remove_abandoned(where, "toy-key-")
    assert sorted(p.name for p in (tmp_path / "bakes").iterdir()) == ["other-key-1", "toy-key-2"]


def test_a_process_id_of_somebody_else_is_not_our_machine(tmp_path: Path) -> None:
    (tmp_path / "qemu.pid").write_text("1\n")
    assert not golden.running(tmp_path)
    (tmp_path / "qemu.pid").write_text("nonsense")
    assert not golden.running(tmp_path)
    assert not golden.running(tmp_path / "none")


# --- checks


def test_summary_counts_and_names_failures() -> None:
    text = (
        '<testsuites><testsuite><testcase classname="image.checks.test_net" name="test_a"/>'
        '<testcase classname="image.checks.test_net" name="test_b">'
        '<failure message="assert 1 == 2&#10;more">x</failure></testcase>'
        '<testcase classname="c" name="d"><skipped message="why"/></testcase>'
        '<testcase classname="c" name="e"><error message="broke"/></testcase></testsuite></testsuites>'
    )
    counts, failures = verify.summary(text)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failures == ["test_net::test_b: assert 1 == 2", "c::e: broke"]


def test_seed_of_the_checks(tmp_path: Path, director: Recipe) -> None:
    assert "hostname: director-check" in verify.seed_files(director, "ssh-ed25519 KEY", tmp_path)["user-data"]
    folder = tmp_path / "seed" / "director"
    folder.mkdir(parents=True)
    (folder / "user-data").write_text("#cloud-config\nssh_authorized_keys: ['@SSH_KEY@']\n")
    first = verify.seed_files(director, "ssh-ed25519 KEY", tmp_path)
    assert "'ssh-ed25519 KEY'" in first["user-data"]
    assert first["meta-data"] != verify.seed_files(director, "ssh-ed25519 OTHER", tmp_path)["meta-data"]


class Halting:
    """A machine whose ssh answers once, or never."""

    def __init__(self, work: Path, boots: list[str]) -> None:
        self.work, self.boots, self.kept = work, boots, False
        self.process = SimpleNamespace(pid=os.getpid(), poll=lambda: None)
        work.mkdir(parents=True)
        (work / "id").write_text("a private key")

    def __enter__(self) -> Halting:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def wait_for_ssh(self, _seconds: float) -> float:
        if self.boots.pop(0) == "fails":
            raise BuildError("no ssh", "look")
        return 1.0

    def run(self, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=0, stdout="1")

    def power_off(self) -> None:
        pass

    def keep(self) -> str:
        self.kept = True
        return f"ssh -F {self.work}/ssh_config"


@pytest.mark.parametrize("boots", [["fails"], ["answers", "fails"]])
@pytest.mark.parametrize("keep", [False, True])
def test_a_kept_machine_can_be_logged_in_to(
    tmp_path: Path, director: Recipe, monkeypatch: pytest.MonkeyPatch, boots: list[str], keep: bool
) -> None:
    """Its key and its disk are not in the folder of the failed check, which goes."""
    left_to_do = list(boots)
    monkeypatch.setattr(settings.current, "keep", keep)
    monkeypatch.setattr(vm.Accelerator, "probe", staticmethod(lambda _cache: TCG))
    monkeypatch.setattr(verify, "describe", lambda _image, _disk, work, *_, **__: Halting(work, left_to_do))
    monkeypatch.setattr(verify, "run_checks", lambda *_: {"passed": 1})
    where, disk = Store(tmp_path / "store"), tmp_path / "disk"
    disk.write_text("an image")
    checked = Stage("checked-director", {}, lambda out: verify.verify(where, director, disk, out))
    with pytest.raises(BuildError, match="no ssh") as caught:
        where.ensure(checked)
    left = list(where.root.rglob("id"))
    assert len(left) == keep
    if keep:
        assert (
            f"ssh -F {left[0].parent}/ssh_config" in caught.value.hint
            and f"rm -r {left[0].parent}" in caught.value.hint
        )
    else:
        assert "invoke check-image --role director --keep" in caught.value.hint


def test_with_keep_a_good_check_leaves_nothing_beside_its_result(
    tmp_path: Path, director: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings.current, "keep", True)
    monkeypatch.setattr(vm.Accelerator, "probe", staticmethod(lambda _cache: TCG))
    monkeypatch.setattr(verify, "describe", lambda _image, _disk, work, *_, **__: Halting(work, ["answers"]))
    monkeypatch.setattr(verify, "run_checks", lambda *_: {"passed": 1})
    where, disk = Store(tmp_path / "store"), tmp_path / "disk"
    disk.write_text("an image")
    result = where.ensure(Stage("checked-director", {}, lambda out: verify.verify(where, director, disk, out)))
    assert sorted(p.name for p in result.iterdir()) == ["bios", "inputs.json", "report.json", "uefi"]
    assert not list(where.root.rglob("id")) and not list((where.root / "bakes").iterdir())


# --- Packer


@pytest.fixture
def variables(tmp_path: Path, director: Recipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the bake would give to Packer."""

    def make_key(folder: Path) -> Path:
        (folder / "id").write_text("a key")
        (folder / "id.pub").write_text("ssh-ed25519 KEY lvsforge\n")
        return folder / "id"

    monkeypatch.setattr(vm, "make_key", make_key)
    monkeypatch.setattr(vm, "free_port", lambda: 2222)
    (tmp_path / "disk.raw").write_text("")
    return golden.packer_variables(director, tmp_path, tmp_path, TCG, "6.12-x")


def test_template_and_code_agree_on_variables(variables: dict[str, str]) -> None:
    text = (golden.PACKER / "image.pkr.hcl").read_text()
    blocks = dict(re.findall(r'^variable "(\w+)" \{\n(.*?)^\}', text, re.M | re.S))
    assert len(blocks) > 10
    required = {name for name, body in blocks.items() if "default" not in body}
    assert required <= set(variables) <= set(blocks)


def test_template_forwards_on_the_loopback_only() -> None:
    text = (golden.PACKER / "image.pkr.hcl").read_text()
    assert re.findall(r"hostfwd=([^\"]+)", text) == ["tcp:127.0.0.1:{{ .SSHHostPort }}-:22"]
    assert not re.search(r"required_plugins|efi_|cpu_model|vtpm", re.sub(r"#.*", "", text))


@pytest.mark.runs("packer", "ssh-keygen")
def test_packer_accepts_the_template(variables: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    key = tmp_path / "own" / "id"
    run.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key])  # Packer reads it already now
    env = golden.packer_environment(tmp_path)
    run.run(["packer", "fmt", "-check", "-diff", golden.PACKER], env=env)
    given = {**variables, "ssh_key": str(key)}
    words = [word for name, value in given.items() for word in ("-var", f"{name}={value}")]
    run.run(["packer", "validate", *words, golden.PACKER], env=env)


@pytest.mark.runs("packer")
def test_packer_refuses_an_unproven_accelerator(variables: dict[str, str], tmp_path: Path) -> None:
    words = [w for name, value in {**variables, "accelerator": "none"}.items() for w in ("-var", f"{name}={value}")]
    result = run.run(
        ["packer", "validate", *words, golden.PACKER], env=golden.packer_environment(tmp_path), check=False
    )
    assert result.returncode != 0
    assert "accelerator must be kvm or tcg" in result.stdout + result.stderr


# --- the line


def test_roles_are_all_or_the_one_asked_for() -> None:
    assert bake.chosen("") == sorted(path.parent.name for path in ROOM.glob("*/image.yaml"))
    assert bake.chosen("director") == ["director"]


def test_console_refuses_a_seed_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="does not exist"):
        bake.console("director", tmp_path / "none.iso")


@pytest.mark.runs("sh")
def test_finish_refuses_a_degraded_system(tmp_path: Path) -> None:
    """The script with stand-ins for the system's tools."""
    script = (golden.PACKER / "finish.sh").read_text()
    stubs = 'systemctl() { [ "$1" = --failed ] && echo foo.service >&2 && return 0; echo degraded; return 1; }\n'
    result = run.run(["sh", "-c", stubs + script], check=False, env={"KERNEL_ARGS": ""})
    assert result.returncode == 1
    assert result.stderr == "foo.service\nlvsforge: the system is degraded after its boot\n"
