"""The tasks of a cluster: names, flags and wiring, as in the tasks.py above. The work is in the other modules."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pipeline import progress, settings
from pipeline.cli import command, goes_with
from provision import apply as applying
from provision import bench, checking, operations, rollout
from provision import cluster as clusters
from provision import inventory as inventories
from provision import render as rendering
from provision.checking import Where
from provision.lab import report
from provision.lab.lab import down
from provision.remote import opener

_CLUSTER = {"cluster": "the cluster file (provision/examples/)"}
_HOST = {"host": "only this host; may be given several times"}


@command("dry_run", iterable=["host"], help={**_CLUSTER, **_HOST, "out": "the folder to write"})
def render(_c: Any, cluster: str, out: str = "out/hosts", host: Any = None) -> None:
    """Render each host's files and its cloud-init seed from the cluster file."""
    targets = rendering.render_cluster(Path(cluster), settings.TOP / out, host or ())
    progress.note(f"{len(targets)} hosts in {settings.TOP / out}")


@command(
    name="bench-render",
    help={
        "directors": "how many",
        "services": "how many",
        "real_servers": "entries in all services together",
        "group": "how many directors serve one service, as behind one router; 0: all of them",
        "json": "a file that takes the figures as JSON",
    },
)
def bench_render(
    _c: Any, directors: int = 500, services: int = 2000, real_servers: int = 50000, group: int = 10, json: str = ""
) -> None:
    """Measure the rendering of a large fleet: at most 30 s and 1 GiB."""
    print("\n".join(bench.render(directors, services, real_servers, group, _file(json))))


# --- hosts that run

_REACH = {"ssh_config": "a file for `ssh -F`; without it the user's own"}
_DRAIN = {"drain": "seconds that connections may take to end"}
_ROLL = {
    **_CLUSTER,
    **_REACH,
    **_DRAIN,
    "apply": "roll it out: one host at a time, each checked, and rolled back where it fails",
}


def _file(name: str) -> Path | None:
    return Path(name) if name else None


def _where(ssh_config: str, client: str = "") -> Where:
    return Where(_file(ssh_config), client)


@command(iterable=["host"], help={**_CLUSTER, **_HOST, **_REACH})
def plan(_c: Any, cluster: str, host: Any = None, ssh_config: str = "") -> None:
    """Show per host what `apply` would change."""
    found = clusters.load(Path(cluster))
    print("\n".join(applying.plan(found, host or (), opener(_where(ssh_config).ssh_config))))


@command(
    "dry_run",
    iterable=["host"],
    help={
        **_CLUSTER,
        **_HOST,
        **_REACH,
        **_DRAIN,
        "take_over": "where another run is changing a host, go back from that now, and take its place",
        "real_servers_last": "after the directors: where the file has fewer local addresses than before",
    },
)
def apply(
    _c: Any,
    cluster: str,
    host: Any = None,
    ssh_config: str = "",
    drain: float = 60.0,
    take_over: bool = False,
    real_servers_last: bool = False,
) -> None:
    """Bring hosts to what the cluster file says, one at a time, each checked; the first failure is rolled back."""
    options = rollout.Options(True, _where(ssh_config), drain, take_over=take_over, real_servers_last=real_servers_last)
    print("\n".join(rollout.apply(Path(cluster), host or (), options)))


@command(
    iterable=["host"],
    help={
        **_CLUSTER,
        **_HOST,
        **_REACH,
        "k": "only checks whose name matches this pytest expression",
        "client": "a host for ssh that plays a client (curl VIP), or local for this machine",
        "junit": "a file that takes the report as JUnit XML",
        "json": "a file that takes it as JSON",
    },
)
def check(
    _c: Any,
    cluster: str,
    host: Any = None,
    k: str = "",
    ssh_config: str = "",
    client: str = "",
    junit: str = "",
    json: str = "",
) -> None:
    """Check running hosts as the operations manual asks (1j), against the cluster file."""
    found = clusters.load(Path(cluster), secrets=False)
    print("\n".join(checking.check(found, host or (), _where(ssh_config, client), _file(junit), _file(json), k=k)))


@command(help={**_CLUSTER, "out": "where `invoke render` writes"})
def inventory(_c: Any, cluster: str, out: str = "out/hosts") -> None:
    """Print the hosts as an inventory of Ansible."""
    print(inventories.inventory(clusters.load(Path(cluster), secrets=False), settings.TOP / out), end="")


# --- daily operations (manual, section 4)

_SERVICE = {"service": "its name in the cluster file"}
_REAL = {**_ROLL, **_SERVICE, "address": "of the real server", "port": "of the real server; 0: the service's only one"}
_VIP = {**_ROLL, **_SERVICE, "vip": "the address"}
_LOCAL = {
    **_ROLL,
    "director": "its name in the cluster file",
    "address": "the local address",
    "pool": "the pool, where there are several",
}


@command(
    "dry_run",
    name="add-real-server",
    help={**_REAL, "weight": "its share", "no_toa": "do not ask whether toa is loaded there"},
)
def add_real_server(
    _c: Any,
    cluster: str,
    service: str,
    address: str,
    port: int = 0,
    weight: int = 1,
    apply: bool = False,
    no_toa: bool = False,
    ssh_config: str = "",
    drain: float = 60.0,
) -> None:
    """Add a real server to a service (manual 4.1)."""
    options = rollout.Options(apply, _where(ssh_config), drain)
    rollout.add_real_server(Path(cluster), service, address, port, weight, options, toa=not no_toa)


@command("dry_run", name="remove-real-server", help=_REAL)
def remove_real_server(
    _c: Any,
    cluster: str,
    service: str,
    address: str,
    port: int = 0,
    apply: bool = False,
    ssh_config: str = "",
    drain: float = 300.0,
) -> None:
    """Drain a real server (weight 0, wait for its connections), then remove it (manual 4.1)."""
    options = rollout.Options(apply, _where(ssh_config), drain)
    rollout.remove_real_server(Path(cluster), service, address, port, options)


@command(
    "dry_run",
    name="add-vip",
    help={
        **_VIP,
        "like": "the service that a new one, with this VIP, has everything else from",
        "port": "of a new service, with --like; 0: those of the other",
    },
)
def add_vip(
    _c: Any,
    cluster: str,
    service: str,
    vip: str,
    like: str = "",
    port: int = 0,
    apply: bool = False,
    ssh_config: str = "",
    drain: float = 60.0,
) -> None:
    """Add a VIP to a service, or a new service with it (manual 4.2)."""
    goes_with("like", like, port=port)
    options = rollout.Options(apply, _where(ssh_config), drain)
    rollout.perform(Path(cluster), operations.add_vip(service, vip, like, port), options)


@command("dry_run", name="remove-vip", help=_VIP)
def remove_vip(
    _c: Any, cluster: str, service: str, vip: str, apply: bool = False, ssh_config: str = "", drain: float = 60.0
) -> None:
    """Remove a VIP from a service, and with its last one the service (manual 4.2)."""
    options = rollout.Options(apply, _where(ssh_config), drain)
    rollout.perform(Path(cluster), operations.remove_vip(service, vip), options)


@command("dry_run", name="add-local-address", help=_LOCAL)
def add_local_address(
    _c: Any,
    cluster: str,
    director: str,
    address: str,
    pool: str = "",
    apply: bool = False,
    ssh_config: str = "",
    drain: float = 60.0,
) -> None:
    """Add a local address to a director (manual 4.3)."""
    options = rollout.Options(apply, _where(ssh_config), drain)
    rollout.perform(Path(cluster), operations.add_local_address(Path(cluster), director, address, pool), options)


@command("dry_run", name="remove-local-address", help=_LOCAL)
def remove_local_address(
    _c: Any,
    cluster: str,
    director: str,
    address: str,
    pool: str = "",
    apply: bool = False,
    ssh_config: str = "",
    drain: float = 60.0,
) -> None:
    """Remove a local address from a director, once its connections have ended (manual 4.3)."""
    options = rollout.Options(apply, _where(ssh_config), drain)
    rollout.remove_local_address(Path(cluster), director, address, pool, options)


# --- a whole cluster on this machine; lab-up is in the tasks.py above, as it takes images

LAB_DIR = {"dir": "the lab's folder; each has a lab of its own"}
LAB = "out/lab"


@command(name="lab-status", help=LAB_DIR)
def lab_status(_c: Any, dir: str = LAB) -> None:
    """Ask the lab's nodes how they are, and draw the topology with that: here, and in topology.svg."""
    print("\n".join(report.status(settings.TOP / dir)))


@command(name="lab-ssh", help={**LAB_DIR, "host": "a node of lab-status"}, positional=["host"])
def lab_ssh(_c: Any, host: str, dir: str = LAB) -> None:
    """Log in to a node of the lab, or run a command there: lab-ssh lvs-1 -- ipvsadm -Ln."""
    words = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    sys.exit(report.login(settings.TOP / dir, host, words))


@command(name="lab-down", help=LAB_DIR)
def lab_down(_c: Any, dir: str = LAB) -> None:
    """End the lab: its machines, namespaces and files."""
    down(settings.TOP / dir)
