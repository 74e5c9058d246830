"""The golden image: Packer boots the disk once and seals it; out come a compressed qcow2, manifest and checksums."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from image.base import ROOM, Recipe
from pipeline import progress, recipe, run, settings, store, vm
from pipeline.errors import BuildError
from pipeline.status import closure
from pipeline.store import Stage, Store

PACKER = ROOM / "packer"
# Seconds under KVM; multiplied for TCG (30 s to ssh on an idle machine, 90 on a loaded one).
_SSH_SECONDS = 60
_SHUTDOWN_SECONDS = 30
_BAKE_SECONDS = 240
_NEEDED_GB = 3.0

HYGIENE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["stop", "remove", "empty"],
    "properties": {
        "stop": {"type": "array", "items": {"type": "string", "pattern": r"^[A-Za-z0-9@_.-]+\.[a-z]+$"}},
        "remove": {"type": "array", "items": {"type": "string", "pattern": "^/[^'$`\\\\]+$"}},
        "empty": {"type": "array", "items": {"type": "string", "pattern": "^/[^'$`\\\\]+$"}},
    },
}


def stage(where: Store, image: Recipe, disk: Stage) -> Stage:
    """The stage whose result is the finished image: qcow2, manifest, checksums, build log.

    Args:
        where: the store.
        image: the recipe.
        disk: the stage with `disk.raw` and `packages.json`.
    """
    inputs = {
        "packer": store.tree_digest(PACKER),
        "hygiene": store.tree_digest(ROOM / "hygiene.yaml"),
        "code": store.tree_digest(Path(__file__)),
        "modules": list(image.modules),
        "budget": image.qcow2_budget_mb,
    }
    made: Stage

    def build(out: Path) -> None:
        where.require_space(_NEEDED_GB, f"baking the {image.role} image")
        bake(where, image, where.path(disk), out, made)

    made = Stage(f"image-{image.role}", inputs, build, [disk], title=f"{image.role} image")
    return made


def bake(where: Store, image: Recipe, disk: Path, out: Path, made: Stage) -> None:
    """Boot, finish, seal, compress; see `stage`.

    Raises:
        BuildError: the machine did not come up, was not in order, or the image is over its budget; with the tail of its
            serial console. With `settings.current.keep` the machine is left running and its ssh line is in the error.
    """
    present = json.loads((disk / "packages.json").read_text(encoding="utf-8"))
    version = image_version(image, present["rpm"], made.key)
    accelerator = vm.Accelerator.probe(where.root)
    # Not below `out`: a kept machine's disk must outlive the failed build. A name of our own: the Packer of a killed
    # run may still be cleaning up after itself.
    work = where.root / "bakes" / f"{image.name}-{made.key}-{os.getpid()}"
    remove_abandoned(where, f"{image.name}-{made.key}-")
    work.mkdir(parents=True)
    log = out / "packer.log"
    kept = False
    try:
        variables = packer_variables(image, disk, work, accelerator, version)
        with progress.step(f"Packer boots, finishes and seals it ({accelerator.name})"):
            try:
                run_packer(variables, work, log, accelerator, keep=settings.current.keep)
            except BuildError as error:
                if (work / "console.log").exists():
                    shutil.copyfile(work / "console.log", out / "console.log")
                kept = settings.current.keep and running(work)
                raise failure(image, error, log, work, variables, kept) from None
        shutil.copyfile(work / "console.log", out / "console.log")
        target = out / f"{image.name}-{version}.qcow2"
        with progress.step("compressing"):
            compress(work / "machine" / image.name, target)
        size = target.stat().st_size
        if size > image.qcow2_budget_mb * 10**6:
            raise BuildError(
                f"{target.name} has {size / 1e6:.0f} MB, its budget is {image.qcow2_budget_mb} MB",
                f"invoke console --role {image.role}   (du -x / shows what grew; qcow2_budget_mb is the limit)",
            )
        write_papers(where, image, version, present, out, target, disk, made, accelerator)
    finally:
        if not kept:
            store.remove_tree(work)


def image_version(image: Recipe, installed: Sequence[str], key: str) -> str:
    """`6.12.30-1a2b3c4d`: the kernel's version, and the key that stands for every input.

    Raises:
        BuildError: the kernel's package is not among the installed ones.
    """
    for nevra in installed:
        name, version, _ = nevra.rsplit("-", 2)
        if name == image.packages[0]:
            return f"{version}-{key[:8]}"
    raise BuildError(f"{image.packages[0]} is not installed in the disk of the {image.role} image", "invoke status")


# --- Packer -----------------------------------------------------------------------------------------------------


def packer_variables(
    image: Recipe, disk: Path, work: Path, accelerator: vm.Accelerator, version: str
) -> dict[str, str]:
    """The values for packer/image.pkr.hcl; writes the key and the seal script that some of them name."""
    key = vm.make_key(work)
    seal = work / "seal.sh"
    seal.write_text(seal_script(hygiene()), encoding="utf-8")
    public = Path(f"{key}.pub").read_text(encoding="ascii").strip()
    return {
        "name": image.name,
        "disk": str(disk / "disk.raw"),
        "disk_mib": str(image.disk_mib),
        "work": str(work),
        "accelerator": accelerator.name,
        "cpu": accelerator.cpu,
        "ssh_key": str(key),
        "ssh_port": str(vm.free_port()),
        # lvsforge.bake: the image's files give the first NIC an address by DHCP and leave cloud-init out for this boot
        "credentials": vm.credentials({"ssh.authorized_keys.root": public, "lvsforge.bake": "1"}),
        "ssh_timeout": f"{_SSH_SECONDS * accelerator.scale:.0f}s",
        "shutdown_timeout": f"{_SHUTDOWN_SECONDS * accelerator.scale:.0f}s",
        "kernel_args": " ".join(image.kernel_args),
        "modules": " ".join(image.modules),
        "finish": str(PACKER / "finish.sh"),
        "seal": str(seal),
        "version": version,
    }


def run_packer(variables: Mapping[str, str], work: Path, log: Path, accelerator: vm.Accelerator, *, keep: bool) -> None:
    """Run the build; Packer's own files stay in `work`.

    Raises:
        BuildError: it failed or took too long.
    """
    packer = run.require("packer", "to bake images", "packer")
    # With us goes Packer, and it takes its machine along: SIGTERM makes it clean up.
    guard = [run.require("setpriv", "to end Packer with its owner", "util-linux"), "--pdeathsig", "TERM", "--"]
    scratch = work / "tmp"
    scratch.mkdir()
    argv = [packer, "build", "-color=false", "-timestamp-ui", f"-on-error={'abort' if keep else 'cleanup'}"]
    for name, value in variables.items():
        argv += ["-var", f"{name}={value}"]
    run.run(
        [*guard, *argv, str(PACKER)],
        cwd=work,
        env=packer_environment(scratch),
        log=log,
        timeout=_BAKE_SECONDS * accelerator.scale,
        what="baking with Packer",
        shown=shlex.join([*argv, str(PACKER)]),
    )


def packer_environment(scratch: Path) -> dict[str, str]:
    """No call home, no configuration or plugin of the user's, and its litter where we remove it."""
    return {
        "CHECKPOINT_DISABLE": "1",
        "PACKER_CACHE_DIR": str(scratch / "cache"),
        "PACKER_CONFIG_DIR": str(scratch),
        "TMPDIR": str(scratch),
        "PACKER_NO_COLOR": "1",
    }


def failure(
    image: Recipe, error: BuildError, log: Path, work: Path, variables: Mapping[str, str], kept: bool
) -> BuildError:
    """Packer's failure in our words: what it or a script said, the console's tail, and how to look."""
    said = complaints(log.read_text(encoding="utf-8", errors="replace") if log.exists() else "")
    console = vm.console_tail(work / "console.log")
    headline = said[0] if said else error.message
    if not kept:
        hint = f"invoke bake-image --role {image.role} --keep   (leaves the failed machine running; log: {log})"
        return BuildError(f"baking the {image.role} image: {headline}", hint, [*said[1:], *console])
    config = work / "ssh_config"
    login = vm.ssh_config(image.name, int(variables["ssh_port"]), Path(variables["ssh_key"]), work / "none")
    config.write_text(login, encoding="utf-8")
    pid = (work / "qemu.pid").read_text(encoding="ascii").strip()
    hint = f"ssh -F {config} {image.name}   (then end the machine: kill {pid}; rm -r {work})"
    details = [*said[1:], *console, f"console log: {work / 'console.log'}"]
    return BuildError(f"baking the {image.role} image: {headline}", hint, details)


def complaints(log: str) -> list[str]:
    """What went wrong, from Packer's log: our own scripts' words first, then what Packer calls an error."""
    plain = [re.sub(r"^\S+: (?:==> |\s+)?(?:qemu\.\w+: )?", "", line).strip() for line in log.splitlines()]
    ours = [line.removeprefix("lvsforge: ") for line in plain if line.startswith("lvsforge: ")]
    packer = [
        line
        for line in plain
        if re.search(r"^Build '.*' errored|rror launching|Timeout waiting|Script exited|^Error|qemu-system.*: ", line)
    ]
    return list(dict.fromkeys([*ours, *packer]))[:8]


def running(work: Path) -> bool:
    """Whether the machine of a bake directory still runs: its pid, and that the pid is this machine's."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((work / "qemu.pid").read_text(encoding="ascii"))
        return str(work) in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return False


def remove_abandoned(where: Store, prefix: str) -> None:
    """Remove bake directories of this stage that a killed run left; one whose machine still runs was kept on purpose.

    The caller holds the stage's lock, so no live bake of it exists.
    """
    for folder in (where.root / "bakes").glob(f"{prefix}*"):
        if running(folder):
            progress.note(f"a machine of an earlier bake still runs in {folder}")
        else:
            store.remove_tree(folder)


# --- sealing ----------------------------------------------------------------------------------------------------


def hygiene(room: Path = ROOM) -> dict[str, Any]:
    """What no image may carry, from hygiene.yaml.

    Raises:
        BuildError: the file is wrong.
    """
    return recipe.load(room / "hygiene.yaml", HYGIENE_SCHEMA)


def seal_script(rules: Mapping[str, Any]) -> str:
    """The shell script that seals a running machine: stop what writes, remove, empty, look, trim."""
    lines = [
        "#!/bin/sh",
        "# Made from hygiene.yaml. Removes what is this machine's own, and looks whether it is gone.",
        "set -eu",
        "printf 'IMAGE_VERSION=%s\\n' \"$IMAGE_VERSION\" >>/etc/lvsforge-release",
    ]
    # Their stopping writes (a random seed, last log lines), so they stop before the files go, and stay stopped.
    lines += [f"systemctl stop {shlex.quote(unit)}" for unit in rules["stop"]]
    lines += [f"rm -rf {glob}" for glob in rules["remove"]]
    lines += [f": >{shlex.quote(path)}" for path in rules["empty"]]
    lines += ['fail() { echo "lvsforge: $1" >&2; exit 1; }']
    for glob in rules["remove"]:
        lines.append(f'for found in {glob}; do [ ! -e "$found" ] || fail "$found is still there"; done')
    lines += [f"[ ! -s {shlex.quote(path)} ] || fail '{path} is not empty'" for path in rules["empty"]]
    # What was deleted becomes holes: it is neither stored nor readable afterwards.
    lines += ["sync", "fstrim --all", "sync"]
    return "\n".join(lines) + "\n"


# --- the result -------------------------------------------------------------------------------------------------


def compress(machine: Path, target: Path) -> None:
    """Flatten Packer's overlay into one zstd-compressed qcow2 that any QEMU from 5.1 on reads."""
    tool = run.require("qemu-img", "to compress images", "qemu-utils")
    run.run(
        [tool, "convert", "-O", "qcow2", "-c", "-o", "compression_type=zstd", machine, target],
        what="compressing the image",
    )
    run.run([tool, "check", "-q", target], what="checking the compressed image")


def write_papers(
    where: Store,
    image: Recipe,
    version: str,
    present: Mapping[str, Any],
    out: Path,
    target: Path,
    disk: Path,
    made: Stage,
    accelerator: vm.Accelerator,
) -> None:
    """Write manifest.json, build.log and SHA256SUMS beside the image."""
    report = manifest(image, version, present, target, made, accelerator)
    (out / "manifest.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    with (out / "build.log").open("w", encoding="utf-8") as sink:
        for log in (disk / "dnf.log", disk / "disk.log", out / "packer.log", out / "console.log"):
            if log.exists():
                sink.write(f"===== {log.name}\n{log.read_text(encoding='utf-8', errors='replace').rstrip()}\n")
    names = sorted([target.name, "manifest.json", "build.log"])
    sums = "".join(f"{store.digest(out / name)}  {name}\n" for name in names)
    (out / "SHA256SUMS").write_text(sums, encoding="ascii")


def manifest(
    image: Recipe, version: str, present: Mapping[str, Any], target: Path, made: Stage, accelerator: vm.Accelerator
) -> dict[str, Any]:
    """Everything that went into an image: packages with versions, and each stage with its key and all its inputs.

    Sources with their hashes and patches with theirs stand in the inputs of the kernel's and the tools' stages.
    """
    return {
        "format": 1,
        "image": {
            "name": image.name,
            "role": image.role,
            "version": version,
            "key": made.key,
            "file": target.name,
            "bytes": target.stat().st_size,
            "sha256": store.digest(target),
            "disk_mib": image.disk_mib,
            "kernel_args": list(image.kernel_args),
        },
        "packages": {"rpm": list(present["rpm"]), "deb": dict(present["deb"])},
        "stages": [{"name": each.name, "key": each.key, "inputs": each.full_inputs} for each in closure([made])],
        "baked_with": {
            "accelerator": accelerator.name,
            "packer": tool_version("packer", "version"),
            "qemu": tool_version(vm.QEMU, "--version"),
        },
    }


def tool_version(program: str, argument: str) -> str:
    """The first line that a program says about itself."""
    result = run.run([program, argument], env={"CHECKPOINT_DISABLE": "1"}, check=False)
    return (result.stdout or result.stderr).split("\n")[0].strip()


def publish(result: Path, image: Recipe, out: Path) -> Path:
    """Put a finished image at `out/<image>/<version>/`; the folder appears whole or not at all.

    Returns:
        The folder.
    """
    data = json.loads((result / "manifest.json").read_text(encoding="utf-8"))
    target = out / image.name / str(data["image"]["version"])
    sums = (result / "SHA256SUMS").read_text(encoding="ascii")
    names = [line.split("  ")[1] for line in sums.splitlines()]
    with contextlib.suppress(OSError):  # what is not there, or was cut short, is published anew
        sizes = all((target / name).stat().st_size == (result / name).stat().st_size for name in names)
        if sizes and (target / "SHA256SUMS").read_text(encoding="ascii") == sums:
            return target
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    store.remove_tree(beside)
    beside.mkdir(parents=True)
    try:
        for name in [*names, "SHA256SUMS"]:
            # copies, no hard links: what a user does to out/ must not reach the store
            shutil.copyfile(result / name, beside / name)
        os.sync()  # a power cut must leave no empty image under its name
        store.remove_tree(target)
        beside.rename(target)
    finally:
        store.remove_tree(beside)  # half an image, where the disk was full
    progress.note(f"{target / data['image']['file']}   ({data['image']['bytes'] / 1e6:.0f} MB)")
    return target
