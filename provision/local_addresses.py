"""Local addresses of directors that run: in whose hands each is, and when nobody would miss one.

A local address may be on one director only: real servers answer to whoever says last that it is theirs, and what was
the other one's connections ends.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

from pipeline import progress, run
from pipeline.errors import BuildError
from provision import claim, ipvs
from provision.host import Host
from provision.model import Cluster, Director
from provision.remote import Opener, Remote, command

_RELOAD_SECONDS = 120.0  # keepalived judges its files in a process of its own before it takes them


def listed(text: str) -> dict[str, str]:
    """The local addresses that a /etc/lvs/host.conf names, each with the interface that it goes to."""
    data = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {word: data.get("DOWNLINK", "") for word in data.get("LOCAL_ADDRESSES", "").strip('"').split()}


# --- who has which


def in_turn(
    cluster: Cluster, hosts: Sequence[Host], connect: Opener, state: str, ssh_config: Path | None
) -> list[Host]:
    """The order in which hosts can be changed so that no local address is on two directors at any time.

    What the directors hold is asked of themselves, of those beside `hosts` only where one of `hosts` is to have an
    address that is new to it. It is not known of a director that does not answer, which is said where it matters, nor
    of one that is not in the cluster file any more.

    Args:
        cluster: the cluster as it is to be.
        hosts: the hosts to change, in the order that is wanted otherwise; it is kept as far as possible.
        connect: opens connections.
        state: the folder on a director where a change that was cut off keeps the old files.
        ssh_config: what `connect` reads, for the command to type next.

    Raises:
        BuildError: there is no such order; no host was changed.
    """
    mine = [host for host in hosts if isinstance(host, Director)]
    held = {each.name: _held(each, connect, state) for each in mine}
    wanted = {each.name: {str(address) for address in each.all_local_addresses} for each in mine}
    if any(wanted[name] - (now or set()) for name, now in held.items() if now is not None):
        held |= {each.name: _held(each, connect, state) for each in cluster.directors if each.name not in held}
        if silent := [name for name, now in held.items() if now is None]:
            progress.note(f"which local addresses {', '.join(silent)} has is not known: no answer")
    now = {name: found for name, found in held.items() if found is not None}
    left, order = list(hosts), []
    while left:
        free = next((host for host in left if not _taken(host.name, wanted, now)), None)
        if free is None:
            raise _refused(cluster, left[0].name, wanted, now, command("apply", cluster.path, ssh_config))
        left.remove(free)
        order.append(free)
        if free.name in wanted:
            now[free.name] = wanted[free.name]
    return order


def _held(director: Director, connect: Opener, state: str) -> set[str] | None:
    """The local addresses of its files, and of those that it would go back to; None where it does not answer."""
    try:
        with connect(director) as remote:
            answer = remote.run(
                "cat /etc/lvs/host.conf 2>/dev/null || :\n"
                f"echo {shlex.quote(state)}\n"
                f"if systemctl is-active --quiet {claim.UNIT}.timer; then\n"
                f"    cat {state}/old/etc/lvs/host.conf 2>/dev/null || :\nfi",
                what="asking for its local addresses",
            )
    except BuildError:
        return None
    now, _, before = answer.stdout.partition(f"{state}\n")
    return {*listed(now), *listed(before)}


def _taken(name: str, wanted: Mapping[str, set[str]], held: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """What a host is to have and others hold: address and holder."""
    new = wanted.get(name, set()) - held.get(name, set())
    found = [(address, other) for other, has in held.items() if other != name for address in new & has]
    return sorted(found, key=lambda each: (ip_address(each[0]).version, ip_address(each[0]).packed))


def _refused(
    cluster: Cluster, name: str, wanted: Mapping[str, set[str]], held: Mapping[str, set[str]], again: str
) -> BuildError:
    # From one that waits to the one that it waits for, until that is none of ours, or was met before.
    seen: list[str] = []
    while name in wanted and name not in seen:
        seen.append(name)
        name = _taken(name, wanted, held)[0][1]
    last = name if name in wanted else seen[-1]
    taken = _taken(last, wanted, held)
    address, other = taken[0]
    director = next(each for each in cluster.directors if each.name == last)
    pool = next(pool for pool, share in director.local_addresses.items() if address in map(str, share))
    if other not in wanted:
        # The one that gives an address up comes before the one that gets it.
        hint = again + "".join(f" --host {each}" for each in (other, *wanted))
    elif any(address in map(str, share) for share in director.extra.values()):
        hint = f"leave {address} out of local_addresses of {last} at first, {again}, then put it in, and the same again"
    else:
        hint = (
            f"give {last} a slot at first whose addresses no director has (a pool can grow at its end), {again}, then "
            "the slot that it is to have, and the same again"
        )
    more = "" if len(taken) == 1 else f", and {len(taken) - 1} more"
    return BuildError(
        f"{last} is to have {address} of pool {pool}, which is on {other} now{more}; no host was changed", hint
    )


# --- when one can go


def drained(remote: Remote, addresses: Iterable[str], seconds: float) -> None:
    """Wait until no connection uses local addresses that are in keepalived's files no more; what is left is cut.

    Args:
        remote: a director whose keepalived has been told to read its files.
        addresses: the addresses, without prefix length.
        seconds: how long connections may take to end.

    Raises:
        BuildError: keepalived does not give an address up, or the director does not answer.
    """
    going = sorted(addresses)
    if not going:
        return

    def given_up() -> bool:
        # A service's set loses an address at once, whatever its connections do; before that it can get new ones.
        listing = remote.run("ipvsadm -Gn", what="asking for local addresses").stdout
        return not any(found.intersection(going) for found in ipvs.local_addresses(listing).values())

    run.wait_until(
        given_up,
        deadline=_RELOAD_SECONDS,
        what=f"{remote.name}: keepalived gives up {', '.join(going)}",
        hint=f"{remote.login} journalctl -u keepalived   (and ipvsadm -Gn)",
    )
    left: int | None = None

    def ended() -> bool:
        nonlocal left
        left = connections(remote, going)
        return left == 0

    what = f"{remote.name}: connections of local addresses end"
    try:
        run.wait_until(ended, deadline=seconds, what=what, hint="-")
    except BuildError as error:
        if not error.message.startswith(what):
            raise
        count = "an unknown number of" if left is None else left
        progress.note(f"{remote.name}: {count} connections of {', '.join(going)} are cut after {seconds:.0f} s")


def connections(remote: Remote, addresses: Iterable[str]) -> int | None:
    """How many open connections use these local addresses; None where the host could not count them.

    Raises:
        BuildError: it cannot be asked.
    """
    return ipvs.open_connections(remote, "$12", [ipvs.hexadecimal(ip_address(each)) for each in addresses])
