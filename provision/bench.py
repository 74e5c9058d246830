"""What rendering a large fleet costs: `invoke render` on a cluster file that is made up, in a process of its own."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

from pipeline import progress, run, settings
from pipeline.errors import BuildError

# What must not be exceeded, for the sizes that are the task's defaults.
SECONDS = 30.0
MIB = 1024.0
_LOCAL = 16  # local addresses of a director
# Nobody has the private half of it.
_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDHFUBiRgJrP4XztCc+jX2nD2tZasydDolGOJRyqxxoj example"


def fleet(directors: int, services: int, real_servers: int, group: int) -> Iterator[str]:
    """A cluster file's lines.

    Args:
        directors: how many.
        services: how many, of one VIP each.
        real_servers: entries in all services together.
        group: how many directors serve one service, as behind one router's ECMP; each group has a pool of its own and
            an equal part of the services.
    """
    groups = -(-directors // group)
    yield f"mode: ospf\nssh_authorized_keys: [{_KEY}]\nvip_prefixes: [203.0.0.0/16]"
    yield "ospf: {area: 0.0.0.11, stub: true}"
    yield "local_addresses:"
    for number in range(groups):
        first = IPv4Address("10.0.0.0") + (number << 16) + 1
        yield f"  g{number}: {{addresses: [{first}-{first + group * _LOCAL - 1}], per_director: {_LOCAL}}}"
    yield "directors:"
    for number in range(directors):
        team, slot = divmod(number, group)
        up, down = IPv4Address("172.16.0.0") + 4 * number + 2, IPv4Address("10.0.255.1") + (team << 16) + slot
        yield f"  - name: lvs-{number}\n    slot: {slot + 1}\n    uplink: eth0\n    downlink: eth1\n    interfaces:"
        yield f"      - {{name: eth0, addresses: [{up}/30], gateway4: {up - 1}}}"
        yield f"      - {{name: eth1, addresses: [{down}/16]}}"
    yield "services:"
    for number in range(services):
        team = number * groups // services
        names = ", ".join(f"lvs-{n}" for n in range(team * group, min((team + 1) * group, directors)))
        yield f"  - name: service-{number}\n    vips: [{IPv4Address('203.0.0.1') + number}]\n    ports: [80]"
        yield f"    syn_proxy: true\n    local_addresses: g{team}\n    directors: [{names}]\n    real_servers:"
        mine = range(number * real_servers // services, (number + 1) * real_servers // services)
        for n in mine:
            yield f"      - {{address: {IPv4Address('100.64.0.1') + n}, weight: 100}}"


def render(directors: int, services: int, real_servers: int, group: int, out: Path | None) -> list[str]:
    """Measure `invoke render`.

    Args:
        directors, services, real_servers, group: as for `fleet`; `group` 0 means that every director serves everything.
        out: takes the figures as JSON.

    Returns:
        The lines to show.

    Raises:
        BuildError: rendering failed, or took more than it may.
    """
    with run.temporary_directory("lvsforge-bench-") as folder:
        file = folder / "cluster.yaml"
        text = "\n".join(fleet(directors, services, real_servers, group or directors)) + "\n"
        file.write_text(text, encoding="utf-8")
        argv = [sys.executable, "-m", "invoke", "render", "--cluster", str(file), "--out", str(folder / "out")]
        with progress.step(f"rendering {directors} directors, {services} services, {real_servers} real servers"):
            begun = time.monotonic()
            run.run(argv, cwd=settings.TOP, what="rendering the fleet")
            seconds = time.monotonic() - begun
        mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        files = [path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file()]
    figures = {
        "directors": directors,
        "services": services,
        "real_servers": real_servers,
        "directors_of_a_service": group or directors,
        "seconds": round(seconds, 1),
        "peak_mib": round(mib),
        "files": len(files),
        "written_mib": round(sum(files) / 2**20),
    }
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    lines = [f"{key.replace('_', ' '):24}{value}" for key, value in figures.items()]
    if seconds > SECONDS or mib > MIB:
        raise BuildError(
            f"rendering took {seconds:.1f} s and {mib:.0f} MiB; {SECONDS:.0f} s and {MIB:.0f} MiB are allowed",
            "invoke bench-render --progress-form plain --debug   (shows where the time goes)",
            lines,
        )
    return lines
