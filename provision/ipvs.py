"""The kernel's tables of virtual services, as ipvsadm prints it, and of connections."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field

from provision.host import Address
from provision.model import Director, Service
from provision.remote import Remote

CONNECTIONS = "/proc/net/ip_vs_conn"
_COUNT_SECONDS = 60
METHODS = {"FNAT": "FullNat", "NAT": "Masq", "DR": "Route", "TUN": "Tunnel"}


@dataclass
class Row:
    """A real server of a service: how it is forwarded to, its weight, its connections now and since it was added."""

    method: str
    weight: int
    active: int
    inactive: int
    total: int = 0


@dataclass
class Table:
    """Services by `TCP 10.0.0.1:80`, each with its scheduler, flags and rows by real server."""

    schedulers: dict[str, str] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    rows: dict[str, dict[str, Row]] = field(default_factory=dict)


_SERVICE = re.compile(r"^(TCP|UDP|SCTP)\s+(\S+)\s+(\S+)?(.*)$")
_ROW = re.compile(r"^\s+->\s+(\S+:\d+)\s+(\S+)\s+(\d+)\s+(\d+)\s+(\d+)")
_TOTAL = re.compile(r"^\s+->\s+(\S+:\d+)\s+(\d+)")


def read(listing: str, totals: str) -> Table:
    """Read `ipvsadm -Ln` and `ipvsadm -Ln --stats --exact`."""
    table, service = Table(), ""
    for line in listing.splitlines():
        if found := _SERVICE.match(line):
            service = f"{found[1]} {found[2]}"
            table.schedulers[service], table.flags[service] = found[3], found[4].strip()
            table.rows[service] = {}
        elif service and (found := _ROW.match(line)):
            table.rows[service][found[1]] = Row(found[2], int(found[3]), int(found[4]), int(found[5]))
    for line in totals.splitlines():
        if found := _SERVICE.match(line):
            service = f"{found[1]} {found[2]}"
        elif (found := _TOTAL.match(line)) and found[1] in table.rows.get(service, {}):
            table.rows[service][found[1]].total = int(found[2])
    return table


def local_addresses(listing: str) -> dict[str, set[str]]:
    """Read `ipvsadm -Gn`: the local addresses of each service, by `10.0.0.1:80`."""
    found: dict[str, set[str]] = {}
    service = ""
    for line in listing.splitlines():
        words = line.split()
        if not words or "VIP:VPORT" in line:
            continue
        if not line[0].isspace():
            service = words[0]
            found[service] = set()
        elif service:
            found[service].add(words[0])
    return found


def point(address: object, port: int) -> str:
    """An address and port as ipvsadm prints them."""
    return f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"


def wanted(services: tuple[Service, ...]) -> dict[str, Service]:
    """What the table is to hold, by its keys."""
    return {
        f"{service.protocol} {point(vip, port)}": service
        for service in services
        for vip in service.vips
        for port in service.ports
    }


def shares(director: Director, service: Service, version: int) -> set[str]:
    """The local addresses of a service on a director, of one family."""
    pool = director.local_addresses.get(service.pool or "", ())
    return {str(address) for address in pool if address.version == version}


def hexadecimal(address: Address) -> str:
    """An address as the kernel prints it in its table of connections."""
    return f"{int(address):08X}" if address.version == 4 else address.exploded


def open_connections(remote: Remote, fields: str, keys: Iterable[str]) -> int | None:
    """How many connections have one of these keys; None where the host could not count them in a minute.

    Those in TIME_WAIT and CLOSE do not count: both ends have said their last, and the entry only rests. The other
    states of closing do, as one end may still have much to send; ipvsadm counts them as inactive. What only remembers a
    client's real server, without a port of the client's, is no connection.

    Args:
        remote: the director.
        fields: what of a line is the key, in awk's words.
        keys: the keys.

    Raises:
        BuildError: it cannot be asked.
    """
    # Counted there: they may be millions. For each page that is read the kernel goes through its table from the
    # beginning, so the time grows with the square of their number.
    answer = remote.run(
        f"nice -n 19 timeout {_COUNT_SECONDS} awk -v words={shlex.quote(','.join(keys))} '"
        'BEGIN { split(words, list, ","); for (n in list) going[list[n]] }'
        f' NF >= 9 && $3 != "0000" && ({fields}) in going && $8 != "TIME_WAIT" && $8 != "CLOSE" {{ count++ }}'
        f" END {{ print count + 0 }}' {CONNECTIONS} || [ $? = 124 ]",
        what="counting connections",
    )
    return int(answer.stdout) if answer.stdout.strip() else None
