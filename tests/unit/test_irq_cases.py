"""`set_irq_affinity` on machines that stand in folders: `tests/cases/irq/<driver>-<cpus>[-what]/`.

interrupts      /proc/interrupts, as that driver prints it on such a machine
machine.yaml    what sysfs says: CPUs, NUMA nodes, NICs with their PCI function and its vectors
command         the arguments
expected        exit status, both outputs, and what was written where
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import run

SCRIPT = Path(__file__).parents[2] / "image/director/rootfs/usr/sbin/set_irq_affinity"
CASES = sorted(p.parent for p in (Path(__file__).parents[1] / "cases/irq").glob("*/expected"))
# What the issue names; a driver without a case is a driver whose names nobody has tried.
DRIVERS = {"virtio", "igb", "ixgbe", "i40e", "ice", "mlx5", "bnxt", "vmxnet3", "ena"}


def test_every_driver_has_a_case() -> None:
    assert {case.name.split("-")[0] for case in CASES} >= DRIVERS


def numbers(text: str) -> Iterator[int]:
    """The numbers of "0-3,8"."""
    for part in str(text).split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def put(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def build(root: Path, case: Path) -> None:
    """Make the case's /proc and /sys below `root`."""
    machine: dict[str, Any] = yaml.safe_load((case / "machine.yaml").read_text(encoding="ascii"))
    put(root / "proc/interrupts", (case / "interrupts").read_text(encoding="ascii"))
    for number, name in enumerate(["systemd", *machine.get("processes", [])], start=1):
        put(root / f"proc/{number}/comm", f"{name}\n")
    put(root / "sys/devices/system/cpu/online", f"{machine['online']}\n")
    put(root / "sys/devices/system/cpu/isolated", f"{machine.get('isolated', '')}\n")
    for node, cpus in machine.get("nodes", {}).items():
        put(root / f"sys/devices/system/node/node{node}/cpulist", f"{cpus}\n")
    for name, nic in machine["nics"].items():
        folder = root / "sys/class/net" / name
        put(folder / "operstate", f"{nic.get('state', 'up')}\n")
        for queue in range(nic.get("tx_queues", 0)):
            put(folder / f"queues/tx-{queue}/xps_cpus", "0\n")
        if "function" not in nic:
            continue  # a bridge, a bond
        function = root / "sys/devices/pci0000:00" / nic["function"]
        put(function / "numa_node", f"{nic.get('node', -1)}\n")
        for irq in numbers(nic["vectors"]) if "vectors" in nic else ():
            put(function / "msi_irqs" / str(irq), "msix\n")
        device = function / nic["virtio"] if "virtio" in nic else function
        device.mkdir(parents=True, exist_ok=True)
        (folder / "device").symlink_to(device)
    for line in (case / "interrupts").read_text(encoding="ascii").splitlines()[1:]:
        if (irq_name := line.split(":")[0].strip()).isdigit():
            file = root / f"proc/irq/{irq_name}/smp_affinity_list"
            if int(irq_name) in machine.get("refused", []):
                file.mkdir(parents=True)  # no write to it succeeds, not even root's
            else:
                put(file, "untouched\n")


def observe(root: Path, result: run.Result) -> str:
    """All that can be seen of a run, in the form of `expected`."""
    lines = [f"exit {result.returncode}"]
    for name, text in (("stdout", result.stdout), ("stderr", result.stderr)):
        lines += [f"--- {name}", *text.replace(str(root), "").splitlines()]
    lines.append("--- written")
    files = [p for p in root.glob("proc/irq/*/smp_affinity_list") if p.is_file()]
    for file in sorted(files, key=lambda p: int(p.parent.name)):
        if (value := file.read_text(encoding="ascii").strip()) != "untouched":
            lines.append(f"irq {file.parent.name}: {value}")
    for file in sorted(root.glob("sys/class/net/*/queues/tx-*/xps_cpus"), key=lambda p: (len(str(p)), str(p))):
        if (value := file.read_text(encoding="ascii").strip()) != "0":
            lines.append(f"{file.parts[-4]} {file.parts[-2]}: {value}")
    return "\n".join(lines) + "\n"


@pytest.mark.runs("bash")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Path, tmp_path: Path) -> None:
    build(tmp_path, case)
    arguments = (case / "command").read_text(encoding="ascii").split()
    env = {"SET_IRQ_AFFINITY_ROOT": str(tmp_path)}
    result = run.run(["bash", SCRIPT, *arguments], env=env, check=False, what="set_irq_affinity")
    assert observe(tmp_path, result) == (case / "expected").read_text(encoding="ascii")


@pytest.mark.runs("bash")
def test_receive_and_transmit_of_a_queue_share_a_cpu(tmp_path: Path) -> None:
    """The point of it all, stated apart from the golden files."""
    case = next(c for c in CASES if c.name == "virtio-4")
    build(tmp_path, case)
    run.run(["bash", SCRIPT, "eth0"], env={"SET_IRQ_AFFINITY_ROOT": str(tmp_path)}, what="set_irq_affinity")
    cpus: dict[str, set[str]] = {}
    for line in (case / "interrupts").read_text(encoding="ascii").splitlines():
        name = line.split()[-1]
        if name.startswith("virtio1-") and name.rpartition(".")[2].isdigit():
            irq = line.split(":")[0].strip()
            cpu = (tmp_path / f"proc/irq/{irq}/smp_affinity_list").read_text(encoding="ascii").strip()
            cpus.setdefault(name.rpartition(".")[2], set()).add(cpu)
    assert [len(found) for found in cpus.values()] == [1, 1, 1, 1]
    assert len(set.union(*cpus.values())) == 4
