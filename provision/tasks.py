"""The tasks of a cluster: names, flags and wiring, as in the tasks.py above. The work is in the other modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import progress, settings
from pipeline.cli import command
from provision import bench
from provision import render as rendering

_CLUSTER = {"cluster": "the cluster file (provision/examples/)"}
_HOST = {"host": "only this host; may be given several times"}


@command("dry_run", iterable=["host"], help={**_CLUSTER, **_HOST, "out": "the folder to write"})
def render(_c: Any, cluster: str, out: str = "out/hosts", host: Any = ()) -> None:
    """Render each host's files and its cloud-init seed from the cluster file."""
    targets = rendering.render_cluster(Path(cluster), settings.TOP / out, host)
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
    print("\n".join(bench.render(directors, services, real_servers, group, Path(json) if json else None)))
