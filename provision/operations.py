"""Daily operations (operations manual, section 4): edits of the cluster file that keep its comments and its form.

Each edit is judged by all rules before the file is touched: an operation that would leave a wrong cluster file leaves
it as it was. Rolling out is `provision.apply`; the two together are `provision.rollout`.
"""

from __future__ import annotations

import copy
import difflib
import fcntl
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from pipeline import progress, run
from pipeline.errors import BuildError
from provision import cluster as clusters
from provision import ipvs
from provision.host import Address, Host
from provision.model import TOA_BPF_RUNS, Cluster, Director, Service
from provision.remote import Opener, Remote

# How people indent lists: mapping, sequence, offset of the dash. The first that gives a file back unchanged is taken.
_FORMS = ((2, 4, 2), (2, 2, 0), (4, 4, 2), (4, 4, 0), (4, 6, 4), (4, 2, 0))
_TOA_SECONDS = 20


@dataclass(frozen=True)
class Edit:
    """A cluster file before and after an operation; both are right by all rules."""

    path: Path
    before: str
    after: str
    cluster: Cluster

    @property
    def lines(self) -> list[str]:
        """The difference as people read it."""
        old, new = self.before.splitlines(), self.after.splitlines()
        return list(difflib.unified_diff(old, new, str(self.path), f"{self.path} (new)", lineterm="", n=3))

    def write(self) -> None:
        """Replace the file, whole or not at all; one that was changed meanwhile is left alone.

        Raises:
            BuildError: somebody else wrote it since it was read.
        """
        if clusters.read(self.path) != self.before:
            raise BuildError(f"{self.path} was changed meanwhile", "the same command again, which reads it anew")
        place = self.path.resolve()  # a link stays one
        beside = place.with_name(f".{place.name}.new")
        beside.write_bytes(self.after.encode())
        beside.chmod(place.stat().st_mode & 0o7777)
        os.replace(beside, place)


Change = Callable[[Any], None]


def edit(path: Path, change: Change) -> Edit:
    """What an operation makes of a cluster file.

    Args:
        path: the file.
        change: works on its data, in which comments hang.

    Raises:
        BuildError: the file is wrong before or after, or the operation is not possible.
    """
    before = clusters.read(path)
    clusters.parse(before, path, secrets=False)
    plain = before.replace("\r\n", "\n")
    yaml, data = _round_trip(plain, path)
    shared = [(each, copy.deepcopy(each)) for each in _shared(data)]
    change(data)
    for each, was in shared:
        if each != was:
            raise BuildError(
                f"{path}:{each.lc.line + 1}: what stands here stands elsewhere too, by a YAML alias: all would change",
                "write it out in each of these places, then the same command",
            )
    after = _dump(yaml, data, plain)
    if plain != before:
        after = after.replace("\n", "\r\n")
    try:
        cluster = clusters.parse(after, path, secrets=False)
    except BuildError as error:
        raise BuildError(
            f"{error.message.replace(str(path), str(path) + ' would be wrong', 1)}; it was not changed",
            "look at the lines above",
            error.details,
        ) from None
    return Edit(path, before, after, cluster)


def _round_trip(text: str, path: Path) -> tuple[YAML, Any]:
    """The reader that gives the file back as it is, or as nearly as one can; and the data."""
    best: tuple[int, YAML, Any] | None = None
    for mapping, sequence, offset in _FORMS:
        yaml = YAML()
        yaml.preserve_quotes = True
        yaml.width = 1 << 20
        yaml.indent(mapping=mapping, sequence=sequence, offset=offset)
        try:
            data = yaml.load(text)
        except YAMLError as error:
            raise BuildError(f"{path}: cannot be edited: {error}", f"correct {path}") from None
        # As many lines as are not in the file: one text that was folded moves all that stand behind it.
        differs = (Counter(_dump(yaml, data, text).splitlines()) - Counter(text.splitlines())).total()
        if best is None or differs < best[0]:
            best = (differs, yaml, yaml.load(text))
        if differs == 0:
            break
    assert best is not None  # noqa: S101  there is a form
    return best[1], best[2]


def _shared(data: Any) -> list[Any]:
    """The mappings and lists that stand at more than one place of a file, by an anchor and its aliases."""
    found: dict[int, Any] = {}
    shared: dict[int, Any] = {}
    left = [data]
    while left:
        each = left.pop()
        if not isinstance(each, CommentedMap | CommentedSeq):
            continue
        if id(each) in found:
            shared[id(each)] = each
            continue
        found[id(each)] = each
        left += each.values() if isinstance(each, CommentedMap) else each
    return list(shared.values())


def _dump(yaml: YAML, data: Any, like: str) -> str:
    out = io.StringIO()
    yaml.explicit_start = like.startswith("---")
    yaml.dump(data, out)
    return out.getvalue()


# --- finding places


def _service(data: Any, name: str, besides: str = "") -> Any:
    for service in data["services"]:
        if service["name"] == name:
            return service
    known = ", ".join(service["name"] for service in data["services"])
    raise BuildError(f"there is no service {name!r}", f"choose among {known or 'none'}{besides}")


def _director(data: Any, name: str) -> Any:
    for director in data["directors"]:
        if director["name"] == name:
            return director
    raise BuildError(
        f"there is no director {name!r}", f"choose among {', '.join(each['name'] for each in data['directors'])}"
    )


def _real_server(service: Any, address: Address, port: int) -> tuple[int, Any]:
    for number, each in enumerate(service["real_servers"]):
        if ip_address(each["address"]) == address and each.get("port", service["ports"][0]) == port:
            return number, each
    known = ", ".join(f"{each['address']} {each.get('port', service['ports'][0])}" for each in service["real_servers"])
    raise BuildError(f"{service['name']} has no real server {address} port {port}", f"choose among {known}")


def address_of(text: str) -> Address:
    """An address that was typed.

    Raises:
        BuildError: it is none.
    """
    try:
        return ip_address(text)
    except ValueError:
        raise BuildError(f"{text!r} is no address", "type an IPv4 or IPv6 address without prefix length") from None


def _position(items: Any, address: Address) -> int | None:
    return next((n for n, text in enumerate(items) if ip_address(text) == address), None)


def append(items: CommentedSeq, value: Any) -> None:
    """Append in the list's own form: the comment and the empty lines after its last member stay behind it."""
    last = len(items) - 1
    after = _taken_comments(items, last) if last >= 0 and not items.fa.flow_style() else None
    items.append(value)
    if after:
        _give_comments(items, len(items) - 1, after)


def _remove(items: CommentedSeq, number: int) -> None:
    """Remove a member; what stands after the list (ruamel hangs it on the last member) stays."""
    after = _taken_comments(items, number) if number == len(items) - 1 and number > 0 else None
    del items[number]
    if after:
        _give_comments(items, number - 1, after)


def _set(mapping: CommentedMap, key: str, value: Any) -> None:
    """Add a key behind the last one, before what stands after the mapping."""
    after = _taken_comments(mapping, next(reversed(mapping))) if mapping and not mapping.fa.flow_style() else None
    mapping[key] = value
    if after:
        _give_comments(mapping, key, after)


def _unset(mapping: CommentedMap, key: str) -> None:
    """Remove a key; what stands after the mapping stays."""
    keys = list(mapping)
    after = _taken_comments(mapping, key) if keys[-1] == key and len(keys) > 1 else None
    del mapping[key]
    if after:
        _give_comments(mapping, keys[-2], after)


def _last_leaf(items: Any, key: Any) -> tuple[Any, Any]:
    """Where the comment after a member hangs: at its last scalar."""
    value = items[key]
    if isinstance(value, CommentedMap) and value and not value.fa.flow_style():
        return _last_leaf(value, next(reversed(value)))
    if isinstance(value, CommentedSeq) and value and not value.fa.flow_style():
        return _last_leaf(value, len(value) - 1)
    return items, key


def _slot(where: Any) -> int:
    return 2 if isinstance(where, CommentedMap) else 0


def _taken_comments(items: Any, number: Any) -> Any:
    """Take away the lines after a member, but for a remark on its own line."""
    where, key = _last_leaf(items, number)
    tokens = where.ca.items.get(key)
    token = tokens[_slot(where)] if tokens else None
    if token is None:
        return None
    own, _, rest = token.value.partition("\n")
    if not rest:
        return None
    taken = type(token)("\n" + rest, token.start_mark, None)
    if own.strip():
        token.value = own + "\n"
    else:
        tokens[_slot(where)] = None
        if not any(tokens):
            del where.ca.items[key]
    return taken


def _give_comments(items: Any, number: Any, token: Any) -> None:
    where, key = _last_leaf(items, number)
    tokens = where.ca.items.setdefault(
        key, [None, None, None, None] if isinstance(where, CommentedMap) else [None, None]
    )
    old = tokens[_slot(where)]
    if old is not None:
        token.value = old.value.rstrip("\n") + token.value
    tokens[_slot(where)] = token


# --- the operations


def add_real_server(service: str, address: str, port: int, weight: int) -> Change:
    """4.1: a real server more in a service; `port` 0 is the service's first."""

    def change(data: Any) -> None:
        entry = _service(data, service)
        servers = entry["real_servers"]
        new = CommentedMap({"address": str(address_of(address))})
        if port and (port != entry["ports"][0] or len(entry["ports"]) > 1):
            new["port"] = port
        if weight != 1:
            new["weight"] = weight
        if servers and servers[-1].fa.flow_style():
            new.fa.set_flow_style()
        append(servers, new)

    return change


def drain_real_server(service: str, address: str, port: int) -> Change:
    """4.1: no new connections for a real server; its old ones end as they will."""

    def change(data: Any) -> None:
        entry = _service(data, service)
        _, found = _real_server(entry, address_of(address), port or entry["ports"][0])
        found["weight"] = 0

    return change


def remove_real_server(service: str, address: str, port: int) -> Change:
    """4.1: a real server less."""

    def change(data: Any) -> None:
        entry = _service(data, service)
        number, _ = _real_server(entry, address_of(address), port or entry["ports"][0])
        _remove(entry["real_servers"], number)

    return change


def add_vip(service: str, vip: str, like: str = "", port: int = 0) -> Change:
    """4.2: a VIP more for a service, or with its first VIP a new service.

    Args:
        service: its name.
        vip: the address.
        like: the service that a new one has everything else from.
        port: of a new service; those of the other where 0.
    """

    def change(data: Any) -> None:
        if not like:
            append(_service(data, service, "; --like makes a new one")["vips"], str(address_of(vip)))
            return
        if any(each["name"] == service for each in data["services"]):
            raise BuildError(f"there is a service {service!r}", "without --like it gets the VIP")
        new = _bare(_service(data, like))
        new["name"] = service
        new["vips"] = _bare(new["vips"], [str(address_of(vip))])
        if port:
            new["ports"] = _bare(new["ports"], [port])
        append(data["services"], new)

    return change


def _bare(value: Any, members: list[Any] | None = None) -> Any:
    """A copy in the same form, without the remarks about the original; of a list with other members, if given."""
    if isinstance(value, CommentedMap):
        new: Any = CommentedMap({key: _bare(each) for key, each in value.items()})
    elif isinstance(value, CommentedSeq):
        new = CommentedSeq(members if members is not None else [_bare(each) for each in value])
    else:
        return value
    if value.fa.flow_style():
        new.fa.set_flow_style()
    return new


def remove_vip(service: str, vip: str) -> Change:
    """4.2: a VIP less; with its last one a service is gone."""

    def change(data: Any) -> None:
        entry, address = _service(data, service), address_of(vip)
        number = _position(entry["vips"], address)
        if number is None:
            raise BuildError(f"{service} has no VIP {address}", f"choose among {', '.join(entry['vips'])}")
        if len(entry["vips"]) > 1:
            _remove(entry["vips"], number)
        else:
            _remove(data["services"], data["services"].index(entry))

    return change


def _pool(data: Any, name: str) -> str:
    pools = data.get("local_addresses") or {}
    if not name and len(pools) == 1:
        return str(next(iter(pools)))
    if name not in pools:
        raise BuildError(
            f"there is no pool {name!r}" if name else "there are several pools",
            f"--pool, one of: {', '.join(pools) or 'none'}",
        )
    return name


def add_local_address(path: Path, director: str, address: str, pool: str) -> Change:
    """4.3: a local address more for a director: one that was taken out of its share before, or another."""
    cluster = clusters.load(path, secrets=False)

    def change(data: Any) -> None:
        entry, name, wanted = _director(data, director), _pool(data, pool), address_of(address)
        without = data["local_addresses"][name].get("without", [])
        number = _position(without, wanted)
        if number is not None and wanted in _full_share(cluster, director, name):
            _remove(without, number)
            if not without:
                _unset(data["local_addresses"][name], "without")
            return
        new = CommentedSeq()
        new.fa.set_flow_style()
        if "local_addresses" not in entry:
            new.append(str(wanted))
            _set(entry, "local_addresses", CommentedMap({name: new}))
            return
        if name not in entry["local_addresses"]:
            _set(entry["local_addresses"], name, new)
        append(entry["local_addresses"][name], str(wanted))

    return change


def remove_local_address(path: Path, director: str, address: str, pool: str) -> Change:
    """4.3: a local address less: an own one of the director goes, one of its share is left out of the pool."""
    cluster = clusters.load(path, secrets=False)

    def change(data: Any) -> None:
        entry, name, wanted = _director(data, director), _pool(data, pool), address_of(address)
        extra = (entry.get("local_addresses") or {}).get(name, [])
        if (number := _position(extra, wanted)) is not None:
            _remove(extra, number)
            if not extra and len(entry["local_addresses"]) == 1:
                _unset(entry, "local_addresses")
            elif not extra:
                _unset(entry["local_addresses"], name)
            return
        mine = next(each for each in cluster.directors if each.name == director)
        if wanted not in mine.local_addresses.get(name, ()):
            known = ", ".join(map(str, mine.local_addresses.get(name, ()))) or "none"
            raise BuildError(f"{director} has no local address {wanted} in {name}", f"choose among {known}")
        entry = data["local_addresses"][name]
        if "without" not in entry:
            new = CommentedSeq([str(wanted)])
            new.fa.set_flow_style()
            _set(entry, "without", new)
        else:
            append(entry["without"], str(wanted))

    return change


def _full_share(cluster: Cluster, director: str, pool: str) -> tuple[Address, ...]:
    found = cluster.pools[pool]
    slot = next(each.slot for each in cluster.directors if each.name == director)
    return type(found)(found.name, found.ranges, found.per_director).share(slot)


# --- on the hosts, before and between


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One operation at a time on a cluster file.

    Raises:
        BuildError: another one is at work.
    """
    clusters.read(path)
    folder = path.resolve().parent  # by whatever name: the file that is written
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BuildError(f"another operation is at work in {folder}", "wait for its end") from None
    finally:
        os.close(handle)


def serving(cluster: Cluster, service: str) -> list[Director]:
    """The directors of a service."""
    found = next((each for each in cluster.services if each.name == service), None)
    return [each for each in cluster.directors if found is not None and each.name in found.directors]


def answers(cluster: Cluster, service: str, address: str, port: int, connect: Opener) -> None:
    """4.1: the new real server's port is open, as seen from each director of the service.

    Raises:
        BuildError: from one of them it is not.
    """
    for director in serving(cluster, service):
        with connect(director) as remote:
            tried = remote.run(f"timeout 5 bash -c '</dev/tcp/{address_of(address)}/{int(port)}'", check=False)
            if tried.status != 0:
                raise BuildError(
                    f"{address} port {port} does not answer {director.name}",
                    f"on {address}: ss -ltn 'sport = :{port}'",
                    run.tail(tried.stderr),
                )


def has_toa(cluster: Cluster, address: str, connect: Opener) -> None:
    """4.1: the new real server shows clients' addresses: the module toa is loaded there, or toa-bpf.

    Raises:
        BuildError: it is not so, or the host cannot be asked.
    """
    wanted = address_of(address)
    known = next((host for host in cluster.real_servers if wanted in host.own_addresses), None)
    host: Host = known or Director(name=str(wanted), ssh=(str(wanted), 0), mode="ospf", slot=0, uplink="", downlink="")
    with connect(host) as remote:
        asked = remote.run(f"[ -e /proc/net/toa_stats ] || {TOA_BPF_RUNS}", check=False)
    if asked.status != 0:
        raise BuildError(
            f"{host.name} has no toa: programs there would see local addresses",
            f"on {address}: modprobe toa, or toa-bpf load",
        )


def connections(remote: Remote, service: Service, address: Address, port: int) -> int | None:
    """The open connections of a real server over all VIPs of a service; None where a director could not count them.

    Raises:
        BuildError: the director cannot be asked.
    """
    rows = ipvs.read(remote.run("ipvsadm -Ln").stdout, "").rows
    name = ipvs.point(address, port)
    mine = [rows[key][name] for key in ipvs.wanted((service,)) if name in rows.get(key, {})]
    active = sum(row.active for row in mine)
    # Whoever has closed in one direction only is among the inactive, as is who has closed in both; the table of all
    # connections knows, but reading it is dear. UDP's are all inactive, and no one says whether a client has ended.
    if active or service.protocol != "TCP" or not any(row.inactive for row in mine):
        return active
    theirs = f"{ipvs.hexadecimal(address)} {port:04X}"
    keys = [
        f"{service.protocol} {ipvs.hexadecimal(vip)} {each:04X} {theirs}"
        for vip in service.vips
        if vip.version == address.version
        for each in service.ports
    ]
    return ipvs.open_connections(remote, '$1 " " $4 " " $5 " " $6 " " $7', keys)


def drained(cluster: Cluster, service: str, address: str, port: int, connect: Opener, seconds: float) -> None:
    """Wait until a real server with weight 0 has no connection left on any director.

    Raises:
        BuildError: it still has some after that time; it keeps its weight 0, and the same command goes on.
    """
    found = next(each for each in cluster.services if each.name == service)
    wanted, number = address_of(address), port or found.ports[0]
    left: dict[str, int] = {}
    uncounted: set[str] = set()

    def ended() -> bool:
        left.clear()
        for director in serving(cluster, service):
            if director.name in uncounted:
                continue
            with connect(director) as remote:
                count = connections(remote, found, wanted, number)
            if count is None:
                uncounted.add(director.name)
                progress.note(f"{director.name}: too many connections to find those of {address} that are half closed")
            elif count:
                left[director.name] = count
        return not left

    run.wait_until(
        ended,
        deadline=seconds,
        what=f"the connections of {address} end",
        hint="the same command waits again; --drain 0 does not wait",
        tail_of=lambda: [f"{name}: {count} connections" for name, count in left.items()],
    )
