"""Daily operations from beginning to end: what must hold before, the edit, its difference, and rolling it out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import progress, settings
from pipeline.errors import BuildError
from provision import apply as applying
from provision import checking
from provision import cluster as clusters
from provision import operations as ops
from provision.checking import Where
from provision.model import Cluster
from provision.remote import Opener, command, opener
from provision.render import Renderer

GATE_SECONDS = 300.0  # a health check's round, OSPF's dead interval and a slow host, several times over


@dataclass(frozen=True)
class Options:
    """How to roll out.

    Attributes:
        apply: whether to.
        where: how hosts are reached.
        drain: seconds that connections may take to end.
        connect: what opens connections; ssh where it is None.
        gate: the checks of a changed host; all but those of traffic where it is None.
        take_over: go back now from what another run is changing.
        real_servers_last: whether real servers come after the directors.

    Raises:
        BuildError: `drain` is no time.
    """

    apply: bool = False
    where: Where = field(default_factory=Where)
    drain: float = 300.0
    connect: Opener | None = None
    gate: Callable[[Cluster], applying.Gate] | None = None
    take_over: bool = False
    real_servers_last: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.drain < math.inf:
            raise BuildError(f"--drain {self.drain:g}: no time to wait", "give seconds, from 0; 0 does not wait")

    @property
    def open(self) -> Opener:
        """What opens connections."""
        return self.connect or opener(self.where.ssh_config)


def apply(path: Path, names: Sequence[str], options: Options) -> list[str]:
    """Bring hosts to what a cluster file says.

    Raises:
        BuildError: as `provision.apply.apply`.
    """
    with ops.alone(path):
        return _apply(clusters.load(path), names, options)


def _apply(cluster: Cluster, names: Sequence[str], options: Options) -> list[str]:
    gate = options.gate(cluster) if options.gate else checking.gate(cluster, options.where, GATE_SECONDS)
    dry = settings.current.dry_run
    return applying.apply(
        cluster,
        names,
        options.open,
        gate,
        drain=options.drain,
        dry_run=dry,
        take_over=options.take_over,
        real_servers_last=options.real_servers_last,
        ssh_config=options.where.ssh_config,
    )


def perform(path: Path, change: ops.Change, options: Options, before: Callable[[ops.Edit], None] | None = None) -> None:
    """Edit a cluster file, show the difference, and roll it out if that is asked for.

    Args:
        path: the file.
        change: the edit.
        options: how to roll out.
        before: what must hold on the hosts first; asked only when the edit is rolled out.

    Raises:
        BuildError: the edit is wrong (nothing was touched), or rolling out failed: the file keeps the edit, and
            `invoke apply` goes on.
    """
    with ops.alone(path):
        _perform(path, change, options, before)


def concerned(edit: ops.Edit) -> tuple[str, ...]:
    """The hosts of which an edit changes a file; all where it changes nothing, as one that was not rolled out."""
    if edit.after == edit.before:
        return ()
    old, new = (clusters.parse(text, edit.path) for text in (edit.before, edit.after))
    files, wanted = Renderer(old).root_files, Renderer(new).root_files
    return tuple(host.name for host, now in zip(old.hosts, new.hosts, strict=True) if files(host) != wanted(now))


def _perform(
    path: Path,
    change: ops.Change,
    options: Options,
    before: Callable[[ops.Edit], None] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    edit = ops.edit(path, change)
    print("\n".join(edit.lines) or f"{path}: as it should be")
    if settings.current.dry_run:
        return
    if options.apply:
        # Secrets too, before anything is written: the roll-out needs them.
        clusters.parse(edit.after, path)
        # A host that the operation is not about may be down: it may be the reason for it.
        names = concerned(edit) if names is None else names
        if before is not None:
            with progress.step("looking before the change"):
                before(edit)
    if edit.after != edit.before:
        edit.write()
    again = command("apply", path, options.where.ssh_config)
    again += " --real-servers-last" if options.real_servers_last else ""
    if not options.apply:
        shows = command("plan", path, options.where.ssh_config)
        progress.note(f"{path} is changed, no host is: {shows}, then {again}")
        return
    again += "".join(f" --host {name}" for name in names or ())
    try:
        lines = _apply(clusters.load(path), names or (), options)
    except BuildError as error:
        # The same command would make the edit once more.
        details = [line.removesuffix(f"; {applying.SAME_COMMAND}") for line in error.details]
        raise BuildError(error.message, error.hint, [*details, f"{path} keeps the change; {again} goes on"]) from error
    except KeyboardInterrupt:
        raise BuildError("interrupted", again, [f"{path} keeps the change"]) from None
    print("\n".join(lines))


def add_real_server(
    path: Path, service: str, address: str, port: int, weight: int, options: Options, *, toa: bool = True
) -> None:
    """4.1: the port answers and toa is there, then all directors get it."""

    def before(edit: ops.Edit) -> None:
        found = next(each for each in edit.cluster.services if each.name == service)
        if found.protocol != "TCP":
            progress.note(f"whether {address} serves {found.protocol} nobody can be asked; toa goes with TCP only")
            return
        ops.answers(edit.cluster, service, address, port or found.ports[0], options.open)
        if toa and found.forwarding == "FNAT":
            ops.has_toa(edit.cluster, address, options.open)

    perform(path, ops.add_real_server(service, address, port, weight), options, before)


def remove_real_server(path: Path, service: str, address: str, port: int, options: Options) -> None:
    """4.1: weight 0 first, then wait for its connections, then it goes. Without rolling out: one step at a time."""
    with ops.alone(path):
        drain = ops.edit(path, ops.drain_real_server(service, address, port))
        first = drain.after != drain.before
        removal = ops.remove_real_server(service, address, port)
        # Both steps are about the same hosts, also where the first was done before.
        names = concerned(ops.edit(path, removal)) if options.apply and not settings.current.dry_run else None
        if first or options.apply:
            _perform(path, ops.drain_real_server(service, address, port), options, names=names)
        if settings.current.dry_run:
            return
        if not options.apply and first:
            progress.note("when it has no connections any more (ipvsadm -Lnc): the same command again removes it")
            return
        if options.apply:
            with progress.step(f"waiting for the connections of {address}"):
                cluster = clusters.load(path)
                if options.drain > 0:
                    ops.drained(cluster, service, address, port, options.open, options.drain)
        _perform(path, removal, options, names=names)


def remove_local_address(path: Path, director: str, address: str, pool: str, options: Options) -> None:
    """4.3: until the director has given it up, real servers go on to believe who comes from there."""
    last = dataclasses.replace(options, real_servers_last=True)
    perform(path, ops.remove_local_address(path, director, address, pool), last)
