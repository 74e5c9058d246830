"""Proof that a finished image serves: a throw-away overlay is booted with a seed and checked from outside over ssh."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import xml.etree.ElementTree
from collections.abc import Iterator, Mapping
from pathlib import Path

from image import golden
from image.base import ROOM, Recipe
from pipeline import progress, run, seed, settings, store, vm
from pipeline.errors import BuildError
from pipeline.store import Stage, Store

CHECKS = ROOM / "checks"
# Seconds under KVM, multiplied for TCG.
_SSH_SECONDS = 45
_SEED_SECONDS = 60
_CHECKS_SECONDS = 240
# The first NIC has the ssh port; the second leads nowhere, so that a host with an uplink and a downlink can be played.
_SECOND_NIC = (
    "-netdev", "user,id=user1,restrict=on",
    "-device", "virtio-net-pci,netdev=user1,romfile=,mac=52:54:00:12:34:57",
)  # fmt: skip


def stage(where: Store, image: Recipe, finished: Stage) -> Stage:
    """The stage that boots the image under BIOS and UEFI and checks it; its result is report.json and report.xml.

    Args:
        where: the store.
        image: the recipe.
        finished: the image's stage.
    """

    def build(out: Path) -> None:
        where.require_space(2.0, f"checking the {image.role} image")
        verify(where, image, qcow2(where.path(finished)), out)

    inputs = {"checks": store.tree_digest(CHECKS), "code": store.tree_digest(Path(__file__))}
    return Stage(f"checked-{image.role}", inputs, build, [finished], title=f"checking the {image.role} image")


def qcow2(result: Path) -> Path:
    """The image in a result of `golden.stage`."""
    data = json.loads((result / "manifest.json").read_text(encoding="utf-8"))
    return result / str(data["image"]["file"])


def verify(where: Store, image: Recipe, disk: Path, out: Path) -> None:
    """Boot overlays of the image, run the checks, prove that the image is untouched.

    Raises:
        BuildError: it did not boot, its seed was not applied, a check failed, or the image's bytes changed.
    """
    accelerator = vm.Accelerator.probe(where.root)
    before = store.digest(disk)
    report: dict[str, object] = {"image": disk.name, "sha256": before, "accelerator": accelerator.name}
    with booted(where, image, disk, out, accelerator, "bios") as machine:
        with progress.step("booting under BIOS with a seed"):
            report["ssh_seconds"] = round(machine.wait_for_ssh(_SSH_SECONDS), 1)
            status = machine.run("cloud-init status --wait --long", check=False, seconds=_SEED_SECONDS)
            if status.returncode != 0:
                raise BuildError(
                    "cloud-init did not apply the seed without an error",
                    "invoke console --role " + image.role,
                    [*run.tail(status.stdout), *machine.console_tail()],
                )
            report["seed_applied_at"] = uptime(machine)
        with progress.step("checks over ssh"):
            report["checks"] = run_checks(image, machine, out)
        with progress.step("powering off"):
            machine.power_off()
    with (
        progress.step("booting under UEFI"),
        booted(where, image, disk, out, accelerator, "uefi") as machine,
    ):
        report["ssh_seconds_uefi"] = round(machine.wait_for_ssh(_SSH_SECONDS), 1)
        # the firmware must have been UEFI indeed
        machine.run("test -d /sys/firmware/efi", what="looking for UEFI in the guest")
    after = store.digest(disk)
    if after != before:
        raise BuildError(f"{disk} changed while it was checked: {before} became {after}", "invoke bake-image")
    (out / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    progress.note(f"ssh after {report['ssh_seconds']} s, seed applied at {report['seed_applied_at']} s")
    for name in ("bios", "uefi"):
        for secret in (out / name).glob("id*"):
            secret.unlink()


@contextlib.contextmanager
def booted(
    where: Store, image: Recipe, disk: Path, out: Path, accelerator: vm.Accelerator, firmware: str
) -> Iterator[vm.Machine]:
    """A machine on an overlay of the image; what it writes is in `out/FIRMWARE` in the end.

    Raises:
        BuildError: that of the block, with how to look at the machine: with `settings.current.keep` it runs on.
    """
    work = target = out / firmware
    if settings.current.keep:
        # Not below `out`, which goes with a failure: the disk, the key and the console of a kept machine stay.
        golden.remove_abandoned(where, f"{out.name}-{firmware}-")
        work = where.root / "bakes" / f"{out.name}-{firmware}-{os.getpid()}"
        work.parent.mkdir(exist_ok=True)
    machine = describe(image, disk, work, accelerator, firmware=firmware)
    try:
        with machine:
            try:
                yield machine
            except BuildError as error:
                hint = f"invoke check-image --role {image.role} --keep   (leaves the machine running)"
                if settings.current.keep and machine.process.poll() is None:
                    (work / "qemu.pid").write_text(f"{machine.process.pid}\n", encoding="ascii")
                    hint = f"{machine.keep()}; then: rm -r {work}"
                raise BuildError(error.message, hint, error.details) from error
    finally:
        if work != target and work.exists() and not machine.kept:
            work.rename(target)


def describe(
    image: Recipe,
    disk: Path,
    work: Path,
    accelerator: vm.Accelerator,
    *,
    firmware: str = "bios",
    own: Path | None = None,
) -> vm.Machine:
    """A machine on an overlay of an image, with a seed: the user's `own`, or one that lets our key in."""
    machine = vm.Machine(
        image.name,
        work,
        accelerator,
        disks=[vm.Disk(disk, "qcow2", snapshot=True)],
        firmware=firmware,
        login=own is not None,  # the checks prove that the seed's key is what opens the door
        may_keep=settings.current.keep,
        extra=_SECOND_NIC,
    )
    machine.seed = own or work / "seed.iso"
    if own is None:
        seed.write(machine.seed, seed_files(image, machine.public_key))
    return machine


def seed_files(image: Recipe, public_key: str, room: Path = CHECKS) -> Mapping[str, str]:
    """The seed for the checks: `checks/seed/<role>/` where there is one, else a name and a key.

    `@SSH_KEY@` in a file becomes the public key. The instance id follows the contents.
    """
    folder = room / "seed" / image.role
    if not folder.is_dir():
        return seed.minimal(f"{image.role}-check", public_key)
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())}
    files = {name: text.replace("@SSH_KEY@", public_key) for name, text in texts.items()}
    number = seed.instance_id(*files.values())
    files["meta-data"] = f"instance-id: {number}\nlocal-hostname: {image.role}-check\n" + files.get("meta-data", "")
    return files


def uptime(machine: vm.Machine) -> float:
    """Seconds since the guest's kernel started."""
    return float(machine.run("cut -d' ' -f1 /proc/uptime").stdout)


def run_checks(image: Recipe, machine: vm.Machine, out: Path) -> dict[str, int]:
    """Run image/checks by testinfra in a process of its own.

    Returns:
        How many checks passed, failed, were skipped.

    Raises:
        BuildError: one failed, or none ran; each failure in a line.
    """
    report = out / "report.xml"
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hosts=ssh://{machine.name}"]
    argv += [f"--ssh-config={machine.ssh_config}", f"--junitxml={report}", str(CHECKS)]
    result = run.run(
        argv,
        cwd=settings.TOP,
        env={"LVSFORGE_ROLE": image.role, "LVSFORGE_CONSOLE": str(machine.console), "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
        log=out / "checks.log",
        timeout=machine.deadline(_CHECKS_SECONDS),
        what="checking the image",
    )
    if not report.exists():
        raise BuildError(
            f"the checks did not run (pytest ended with {result.returncode})",
            f"read {out / 'checks.log'}",
            run.tail((out / "checks.log").read_text(encoding="utf-8")),
        )
    counts, failures = summary(report.read_text(encoding="utf-8"))
    if failures or result.returncode != 0 or counts["passed"] == 0:
        headline = f"the {image.role} image: {len(failures)} of {sum(counts.values())} checks failed"
        raise BuildError(headline, f"read {out / 'checks.log'}", failures)
    progress.note(f"{counts['passed']} checks passed, {counts['skipped']} skipped")
    return counts


def summary(junit: str) -> tuple[dict[str, int], list[str]]:
    """Counts and one line per failure, from pytest's JUnit report."""
    root = xml.etree.ElementTree.fromstring(junit)  # noqa: S314  pytest wrote it a moment ago
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in root.iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            counts["failed"] += 1
            message = (bad.get("message") or "").split("\n")[0]
            failures.append(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}: {message}")
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts, failures


def console(where: Store, image: Recipe, disk: Path, own: Path | None) -> int:
    """Boot an overlay with its serial console on this terminal; returns QEMU's exit status.

    Args:
        where: the store.
        image: the recipe.
        disk: the image.
        own: a seed of the user's, else a throw-away one.
    """
    accelerator = vm.Accelerator.probe(where.root)
    with run.temporary_directory("lvsforge-console-") as work:
        machine = describe(image, disk, work, accelerator, own=own)
        progress.note(f"Ctrl-A X ends the machine; nothing is written to {disk.name}")
        progress.note(f"from another terminal: {machine.ssh_line}")
        return machine.interactive()
