"""Golden images as running machines: what the lab and the tests of images both do with them."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

from pipeline import run, vm
from pipeline.errors import BuildError
from pipeline.store import Store

DISK = "8G"  # an image grows to the disk that it finds; only what a machine writes takes place here
BOOT = 90.0  # seconds under KVM until a seed is applied, multiplied for TCG


def accelerator(store: Store, machines: int, *, scale: float = 0.0) -> vm.Accelerator:
    """How several machines run here at once, their deadlines for what this builder is like just now.

    Args:
        store: remembers what can run here.
        machines: how many.
        scale: of their deadlines, found before they ran: now their own load would count a second time. 0: find it out.
    """
    found = vm.Turns(**vars(vm.Accelerator.probe(store.root)))
    # Deadlines are for a machine that has a CPU of an idle builder to itself.
    scale = scale or found.scale * max(1.0, machines / (os.cpu_count() or 1)) * vm.slowdown(found)
    return dataclasses.replace(found, scale=scale)


def cpus(role: str) -> int:
    """Virtual CPUs of a role: a director's interrupts are to be spread."""
    return 2 if role == "director" else 1


def overlay(base: Path, path: Path) -> Path:
    """A disk that starts as an image and takes what its machine writes; the image stays as it is."""
    if not path.exists():
        run.require("qemu-img", "to make disks", "qemu-utils")
        run.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base.resolve(), "-F", "qcow2", path, DISK])
    return path


def cable(nic: str, mac: str, connected: str) -> list[str]:
    """QEMU's words for a NIC and what it is connected to.

    Args:
        nic: its name in QEMU.
        mac: its hardware address.
        connected: the value of `-netdev`, without its id (`tap,fd=5`).
    """
    return [*backend(nic, connected), "-device", f"virtio-net-pci,netdev={nic},romfile=,mac={mac}"]


def backend(name: str, connected: str) -> list[str]:
    """QEMU's words for one end of a cable; `connected` as for `cable`."""
    kind, _, options = connected.partition(",")
    return ["-netdev", f"{kind},id={name},{options}"]


def settle(machine: vm.Machine) -> None:
    """Wait until a machine's seed is applied and its services have started.

    Raises:
        BuildError: the seed was not applied, or a unit failed.
    """
    machine.wait_for_ssh(BOOT)
    status = machine.run("cloud-init status --wait --long", check=False, seconds=BOOT)
    if status.returncode != 0:
        raise BuildError(
            f"{machine.name}: the seed was not applied without an error", machine.ssh_line, run.tail(status.stdout)
        )
    state = machine.run("systemctl is-system-running --wait || systemctl --failed --plain", check=False, seconds=BOOT)
    if state.stdout != "running\n":
        raise BuildError(f"{machine.name}: a unit failed", machine.ssh_line, run.tail(state.stdout))


def show_clients(machine: vm.Machine, programs: Callable[[], Path]) -> None:
    """Let a real server's programs see clients: by its kernel's module, or by toa-bpf, as the README says.

    Args:
        machine: the real server.
        programs: the package toa-bpf; asked for only where there is no module.
    """
    if machine.run("modinfo -n toa 2>/dev/null || :").stdout.strip():
        return
    package = programs()
    text = base64.b64encode(package.read_bytes()).decode("ascii")
    machine.run(f"base64 -d >/run/{package.name}", stdin=text, what="copying toa-bpf")
    machine.run(f"rpm -q toa-bpf >/dev/null || rpm -i /run/{package.name}", what="installing toa-bpf")
    _insist(machine, "systemctl enable --quiet --now toa-bpf")


def _insist(machine: vm.Machine, command: str) -> None:
    """Ask systemd until it does so: it gives up after 25 s, which on a busy builder is not long."""
    last: list[str] = []

    def done() -> bool:
        result = machine.run(command, check=False, seconds=BOOT)
        last[:] = run.tail(result.stderr)
        return result.returncode == 0

    run.wait_until(
        done,
        deadline=machine.deadline(BOOT),
        what=f"{machine.name}: {command}",
        hint=machine.ssh_line,
        tail_of=lambda: last,
    )


# --- what a real server serves

_NGINX = """\
user www-data;
worker_processes 1;
pid /run/web.pid;
error_log /var/log/web-error.log;
events {{ worker_connections 2048; }}
http {{
    log_format plain '$remote_addr $status $request_uri';
    access_log /var/log/web.log plain;
    server {{
        {listen}
        location / {{
            default_type text/plain;
            # touch /run/web-500-PORT: what a broken program does
            if (-f /run/web-500-$server_port) {{ return 500; }}
            return 200 "{name}\\n";
        }}
    }}
}}
"""
_UNIT = """\
[Unit]
Description=What this real server serves
After=network.target
[Service]
ExecStartPre=/bin/mkdir -p /var/lib/nginx
ExecStart=/usr/local/sbin/nginx -c /etc/web.conf -g "daemon off;"
[Install]
WantedBy=multi-user.target
"""
WEB = "web"  # its unit


def web_files(name: str, ports: list[int], nginx: bytes) -> dict[str, tuple[int, bytes]]:
    """The files of a real server's web server by path, each with its mode: on every port a page with its name."""
    listen = "\n        ".join(f"listen [::]:{port} ipv6only=off;" for port in ports)
    return {
        "usr/local/sbin/nginx": (0o755, nginx),
        "etc/web.conf": (0o644, _NGINX.format(listen=listen, name=name).encode()),
        f"etc/systemd/system/{WEB}.service": (0o644, _UNIT.encode()),
    }


def serve(machine: vm.Machine, ports: list[int], root: Path) -> None:
    """Let a real server serve: Debian's nginx, of the lab's root, whose libraries the images have.

    Raises:
        BuildError: it does not start.
    """
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for path, (mode, content) in web_files(machine.name, ports, (root / "usr/sbin/nginx").read_bytes()).items():
            member = tarfile.TarInfo(path)
            member.size, member.mode = len(content), mode
            archive.addfile(member, io.BytesIO(content))
    text = base64.b64encode(data.getvalue()).decode("ascii")
    machine.run("base64 -d | tar -C / -xzf -", stdin=text, what="copying nginx")
    _insist(machine, f"systemctl daemon-reload && systemctl enable --quiet --now {WEB}")
