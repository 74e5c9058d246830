"""Local addresses of directors that run: when nobody would miss one."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from ipaddress import ip_address

from pipeline import progress, run
from pipeline.errors import BuildError
from provision import ipvs
from provision.remote import Remote

CONNECTIONS = "/proc/net/ip_vs_conn"
_RELOAD_SECONDS = 120.0  # keepalived judges its files in a process of its own before it takes them
_COUNT_SECONDS = 60


def listed(text: str) -> dict[str, str]:
    """The local addresses that a /etc/lvs/host.conf names, each with the interface that it goes to."""
    data = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {word: data.get("DOWNLINK", "") for word in data.get("LOCAL_ADDRESSES", "").strip('"').split()}


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
        hint=f"ssh root@{remote.name} journalctl -u keepalived   (and ipvsadm -Gn)",
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
    """How many connections use these local addresses; None where the host could not count them in a minute.

    Those in TIME_WAIT and CLOSE do not count: both ends have said their last, and the entry only rests. The other
    states of closing do, as one end may still have much to send.

    Raises:
        BuildError: it cannot be asked.
    """
    found = map(ip_address, addresses)
    words = " ".join(f"{int(each):08X}" if each.version == 4 else each.exploded for each in found)
    # Counted there: they may be millions. For each page that is read the kernel goes through its table from the
    # beginning, so the time grows with the square of their number.
    answer = remote.run(
        f"nice -n 19 timeout {_COUNT_SECONDS} awk -v words={shlex.quote(words)} '"
        'BEGIN { split(words, list, " "); for (n in list) going[list[n]] }'
        ' NF == 13 && $12 in going && $8 != "TIME_WAIT" && $8 != "CLOSE" { count++ }'
        f" END {{ print count + 0 }}' {CONNECTIONS} || [ $? = 124 ]",
        what="counting connections",
    )
    return int(answer.stdout) if answer.stdout.strip() else None
