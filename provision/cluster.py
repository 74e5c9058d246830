"""The cluster file: what `cluster.yaml` may say, and the rules that a schema cannot express.

A cluster file is refused whole: shapes (`cluster.schema.json`) and rules are checked together, and everything that is
wrong is listed at once with dotted paths. What `load` returns (`provision.model`) needs no further check.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network, ip_interface, ip_network
from pathlib import Path
from typing import Any

from pipeline import recipe
from pipeline.errors import BuildError, Problems
from provision import host as hosts
from provision import secret
from provision.host import Address, Network, mappings, number, text_of, texts
from provision.model import Cluster, Director, Instance, Ospf, RealServer, Service, Vty, trusted
from provision.pools import Pool, Range
from provision.secret import Secret
from provision.services import ServiceReader

SCHEMA: Mapping[str, Any] = json.loads(Path(__file__).with_name("cluster.schema.json").read_text(encoding="utf-8"))

_LONGEST_VRRP = 8  # RFC 2338's simple password; keepalived cuts a longer one
_LONGEST_OSPF = 16  # RFC 2328, appendix D.3: the key of cryptographic authentication by MD5
_LONGEST_VTY = 128
# What FRR itself makes of a password: crypt(3) by DES. Hashes of other methods have a $, which no secret may have.
_HASHED = re.compile(r"[./0-9A-Za-z]{13}")
_MAX_TRUSTED = 64  # net.toa.trusted (Documentation/networking/toa.rst)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_NO_SECRET = Secret("")


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage while data grows that all stays: of a large cluster it takes a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load(path: Path, *, secrets: bool = True) -> Cluster:
    """Read a cluster file.

    Args:
        path: the file.
        secrets: whether to look for the secrets that it refers to; without them nothing can be rendered.

    Raises:
        BuildError: missing, not YAML, or anything in it or in a file that it refers to is wrong; all problems at once.
    """
    return parse(read(path), path, secrets=secrets)


def read(path: Path) -> str:
    """A cluster file's text.

    Raises:
        BuildError: it is missing, or no text.
    """
    try:
        # As it is: an edit must not change line ends.
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise BuildError(f"{path} does not exist", f"ls {path.parent}") from None
    except UnicodeDecodeError as error:
        raise BuildError(f"{path}: not UTF-8 at byte {error.start}", f"correct {path}") from None


@uncollected()
def parse(text: str, path: Path, *, secrets: bool = True) -> Cluster:
    """Read a cluster file's text, which stands or will stand at `path`.

    Raises:
        BuildError: as `load`.
    """
    data = recipe.parse(text, str(path))
    problems = recipe.check(data, SCHEMA, str(path))
    cluster = _Reader(path, problems, secrets=secrets).cluster(data if isinstance(data, dict) else {})
    problems.raise_if_any(str(path), f"correct {path}")
    return cluster


class _Reader:
    """Applies the rules to data that may be of any shape: the schema's findings must not hide those of the rules."""

    def __init__(self, path: Path, problems: Problems, *, secrets: bool) -> None:
        self.path = path
        self.problems = problems
        self.secrets = secrets
        # Who has an address, with the place where it was first seen.
        self.own: dict[Address, str] = {}
        self.routers: dict[Address, str] = {}
        self.local: dict[Address, str] = {}
        self.vips: dict[Address, str] = {}

    def cluster(self, data: Mapping[Any, Any]) -> Cluster:
        mode = text_of(data.get("mode")) or ""
        self.mode(data, mode)
        keys = hosts.Reader(self.path.parent, self.problems, "").keys(data.get("ssh_authorized_keys"))
        pools = {pool.name: pool for pool in self.pools(data.get("local_addresses"))}
        prefixes = tuple(self.prefixes(data.get("vip_prefixes")))
        instances = tuple(self.instances(data.get("vrrp")))
        names = tuple(name for _, item in mappings(data.get("directors")) if (name := text_of(item.get("name"))))
        scripts = data.get("vip_binding") == "scripts"
        reader = ServiceReader(self.problems, mode, prefixes, pools, instances, names, scripts=scripts)
        services = tuple(reader.services(data.get("services")))
        self.vips = reader.vips
        directors, real_servers = self.all_hosts(data, mode, keys, services)
        directors = tuple(self.deal(directors, pools, services, data))
        self.strangers(pools, services)
        self.elections(mode, directors, instances, services)
        self.files(directors, services)
        cluster = Cluster(
            path=self.path,
            mode=mode,
            vip_prefixes=prefixes,
            directors=directors,
            real_servers=tuple(self.believers(real_servers, pools, directors)),
            services=services,
            pools=pools,
            ospf=self.ospf(data.get("ospf")),
            instances=instances,
            vty=self.vty(data.get("vty")),
        )
        if mode == "ospf":
            self.router_ids(directors)
            self.speakers(cluster)
        return cluster

    def mode(self, data: Mapping[Any, Any], mode: str) -> None:
        for name in ("ospf", "vrrp"):
            if mode == name and name not in data:
                self.problems.add(name, f"missing; mode {name} needs it")
            elif mode in ("ospf", "vrrp") and mode != name and name in data:
                self.problems.add(name, f"this cluster's mode is {mode}")
        if mode == "vrrp" and "vip_binding" in data:
            self.problems.add("vip_binding", "only mode ospf has it: VRRP binds its VIPs")

    def secret(self, data: Any, place: str, longest: int) -> Secret | None:
        if data is None or not self.secrets:
            return _NO_SECRET if isinstance(data, dict) else None
        return secret.read(data, self.path.parent, self.problems, place, longest)

    # --- networks and pools

    def prefixes(self, value: Any) -> Iterator[Network]:
        seen: list[tuple[Network, str]] = []
        for n, text in texts(value):
            place = f"vip_prefixes[{n}]"
            try:
                network = ip_network(text)
            except ValueError:
                self.problems.add(place, f"{text!r} is no network: address and prefix length, host bits zero")
                continue
            for other, where in seen:
                if network.version == other.version and network.overlaps(other):
                    self.problems.add(place, f"{network} overlaps {other} ({where})")
            seen.append((network, place))
            yield network

    def pools(self, value: Any) -> Iterator[Pool]:
        seen: list[tuple[Range, str]] = []
        for name, item in (value if isinstance(value, dict) else {}).items():
            place = f"local_addresses.{name}"
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                self.problems.add(place, "no name of a group: letters, digits, _ . -, at most 63")
            if not isinstance(item, dict):
                continue
            ranges = []
            for n, text in texts(item.get("addresses")):
                try:
                    found = Range.parse(text)
                except ValueError as error:
                    self.problems.add(f"{place}.addresses[{n}]", f"{text!r}: {error}")
                    continue
                for other, where in seen:
                    if found.overlaps(other):
                        self.problems.add(f"{place}.addresses[{n}]", f"{text} overlaps {other} ({where})")
                seen.append((found, f"{place}.addresses[{n}]"))
                ranges.append(found)
            without = set()
            for n, text in texts(item.get("without")):
                address = hosts.plain_address(self.problems, text, f"{place}.without[{n}]")
                if address is not None and not any(each.holds(address) for each in ranges):
                    self.problems.add(f"{place}.without[{n}]", f"{address} is not in the pool")
                elif address is not None:
                    without.add(address)
            count = item.get("per_director")
            share = count if isinstance(count, int) and count > 0 else 1
            yield Pool(str(name), tuple(ranges), share, frozenset(without), item.get("routed") is True)

    # --- routing and VRRP

    def ospf(self, value: Any) -> Ospf | None:
        if not isinstance(value, dict):
            return None
        area = text_of(value.get("area")) or ""
        if not _is_area(area) and isinstance(value.get("area"), str):
            self.problems.add("ospf.area", f"{area!r} is no area: a number, or four with dots as 0.0.0.11")
        elif value.get("stub") is True and area and not area.strip("0."):
            self.problems.add("ospf.stub", "area 0 is the backbone, which cannot be a stub")
        hello = number(value.get("hello_interval"), 3)
        dead = number(value.get("dead_interval"), 4 * hello)
        if dead <= hello:
            self.problems.add("ospf.dead_interval", f"{dead} is not above hello_interval ({hello})")
        priority = value.get("dr_priority")
        key = value.get("key")
        found = self.secret(key.get("secret"), "ospf.key.secret", _LONGEST_OSPF) if isinstance(key, dict) else None
        return Ospf(
            area=area,
            stub=value.get("stub") is True,
            hello_interval=hello,
            dead_interval=dead,
            reference_bandwidth=number(value.get("reference_bandwidth"), 1000),
            key_id=number(key.get("id"), 1) if isinstance(key, dict) else 0,
            key=found,
            dr_priority=priority if isinstance(priority, int) else None,
        )

    def vty(self, value: Any) -> Vty | None:
        if not isinstance(value, dict):
            return None
        found = self.secret(value.get("password"), "vty.password", _LONGEST_VTY)
        encrypted = value.get("encrypted") is True
        if found and found is not _NO_SECRET and encrypted and not _HASHED.fullmatch(found.value):
            # FRR takes it without a word, and then nobody can log in.
            self.problems.add(
                "vty.password",
                "with encrypted: true a hash is wanted, 13 characters as crypt(3) makes them by DES; "
                "without it the password itself",
            )
        return None if found is None else Vty(found, encrypted)

    def instances(self, value: Any) -> Iterator[Instance]:
        names: dict[str, str] = {}
        ids: dict[tuple[str, int], str] = {}
        for n, item in mappings(value.get("instances") if isinstance(value, dict) else None):
            place = f"vrrp.instances[{n}]"
            name = text_of(item.get("name")) or ""
            if name and not _NAME.fullmatch(name):
                self.problems.add(f"{place}.name", f"{name!r} is no name: letters, digits, _ . -, at most 63")
            elif name and name in names:
                self.problems.add(f"{place}.name", f"{name} stands already at {names[name]}")
            names.setdefault(name, f"{place}.name")
            interface = text_of(item.get("interface")) or "uplink"
            identity = number(item.get("id"), 0)
            if identity and (interface, identity) in ids:
                self.problems.add(
                    f"{place}.id", f"{identity} is taken on the {interface} by {ids[interface, identity]}"
                )
            ids.setdefault((interface, identity), f"{place}.id")
            password = self.secret(item.get("password"), f"{place}.password", _LONGEST_VRRP)
            track = item.get("track") is True
            yield Instance(name, identity, interface, number(item.get("advert_int"), 1), password, track)

    def elections(
        self,
        mode: str,
        directors: tuple[Director, ...],
        instances: tuple[Instance, ...],
        services: tuple[Service, ...],
    ) -> None:
        """Mode vrrp: who is master is never a matter of luck."""
        seen: dict[int, str] = {}
        for n, director in enumerate(directors):
            place = f"directors[{n}].priority"
            if mode == "vrrp" and not director.priority:
                self.problems.add(place, "missing; the highest is master")
            elif mode == "ospf" and director.priority:
                self.problems.add(place, "only mode vrrp has it")
            elif director.priority in seen:
                self.problems.add(place, f"{director.priority} stands already at {seen[director.priority]}")
            if director.priority:
                seen.setdefault(director.priority, place)
        arms = [f"directors[{n}]" for n, each in enumerate(directors) if each.uplink and each.uplink == each.downlink]
        for n, instance in enumerate(instances):
            rivals = [m for m, other in enumerate(instances[:n]) if other.id == instance.id and instance.id]
            if rivals and arms and instances[rivals[0]].interface != instance.interface:
                self.problems.add(
                    f"vrrp.instances[{n}].id",
                    f"{instance.id} is that of vrrp.instances[{rivals[0]}] too, and uplink and downlink of {arms[0]} "
                    "are one link",
                )
            mine = [(m, service) for m, service in enumerate(services) if service.instance == instance.name]
            for m, service in mine[1:]:
                if set(service.directors) != set(mine[0][1].directors):
                    self.problems.add(
                        f"services[{m}].directors",
                        f"not those of services[{mine[0][0]}], whose VIPs move together with its own ({instance.name})",
                    )
            if not mine:
                self.problems.add(f"vrrp.instances[{n}]", "no service has it")
            elif instance.password is not None and all(vip.version == 6 for _, each in mine for vip in each.vips):
                self.problems.add(f"vrrp.instances[{n}].password", "VRRP for IPv6 has no passwords (RFC 5798)")

    def router_ids(self, directors: tuple[Director, ...]) -> None:
        seen: dict[str, str] = {}
        for n, director in enumerate(directors):
            place = f"directors[{n}].router_id"
            if not director.router_id:
                self.problems.add(place, "missing; the uplink has no IPv4 address to take it from")
            elif director.router_id in seen:
                self.problems.add(place, f"{director.router_id} is that of {seen[director.router_id]} too")
            elif director.router_id == "0.0.0.0":  # noqa: S104  an identity, not an address
                self.problems.add(place, "0.0.0.0 is none: the routing daemons would take one of the VIPs")
            seen.setdefault(director.router_id, f"directors[{n}]")

    def speakers(self, cluster: Cluster) -> None:
        """OSPF is spoken, by ospfd, on each interface with an address in one of its networks: on no downlink."""
        prefixes = [(n, prefix) for n, prefix in enumerate(cluster.vip_prefixes) if prefix.version == 4]
        others = [
            (network, f"{network}, {director.name}'s {nic.name}")
            for director in cluster.directors
            for nic in director.interfaces
            if nic.name != director.uplink
            for network in nic.networks
        ]
        others += [
            (network, f"local addresses of {pool.name}")
            for pool in cluster.pools.values()
            for network in pool.networks()
        ]
        for n, prefix in prefixes:
            found = [what for network, what in others if network.version == 4 and network.overlaps(prefix)]
            for what in dict.fromkeys(found):
                self.problems.add(f"vip_prefixes[{n}]", f"{prefix} overlaps {what}, which OSPF would announce")
        for n, director in enumerate(cluster.directors):
            spoken = [net for nic in director.interfaces if nic.name == director.uplink for net in _of_ipv4(nic)]
            for m, nic in enumerate(director.interfaces):
                for net in _of_ipv4(nic) if nic.name != director.uplink else ():
                    if any(net.subnet_of(other) for other in spoken):
                        self.problems.add(
                            f"directors[{n}].interfaces[{m}]",
                            f"{net} is in the uplink's network, in which OSPF would be spoken here too",
                        )

    # --- hosts

    def all_hosts(
        self, data: Mapping[Any, Any], mode: str, keys: tuple[str, ...], services: tuple[Service, ...]
    ) -> tuple[tuple[Director, ...], tuple[RealServer, ...]]:
        names: dict[str, str] = {}
        macs: dict[str, str] = {}
        directors, real_servers = [], []
        for kind in ("directors", "real_servers"):
            for n, item in mappings(data.get(kind)):
                reader = hosts.Reader(self.path.parent, self.problems, f"{kind}[{n}]")
                parts = reader.parts(item, keys)
                for mac, where in reader.macs.items():
                    self.once(macs, mac, where)
                if parts["name"]:
                    self.once(names, parts["name"], reader.at("name"))
                for address, where in reader.own.items():
                    if address in self.vips:
                        self.problems.add(where, f"{address} is a VIP ({self.vips[address]})")
                    self.once(self.own, address, where)
                for address, where in reader.routers.items():
                    self.routers.setdefault(address, where)
                    # A real server's may be one: by NAT it answers through the director.
                    if kind == "directors" and address in self.vips:
                        self.problems.add(where, f"{address} is a VIP ({self.vips[address]})")
                if kind == "directors":
                    directors.append(self.director(item, reader, parts, mode))
                else:
                    real_servers.append(RealServer(**parts))
        return tuple(directors), tuple(real_servers)

    def once(self, seen: dict[Any, str], what: Any, place: str) -> None:
        if what in seen:
            self.problems.add(place, f"{what} stands already at {seen[what]}")
        seen.setdefault(what, place)

    def director(self, data: Mapping[Any, Any], reader: hosts.Reader, parts: dict[str, Any], mode: str) -> Director:
        uplink, downlink = reader.nic(data.get("uplink"), "uplink"), reader.nic(data.get("downlink"), "downlink")
        router_id = text_of(data.get("router_id"))
        if router_id is not None and not _is_quad(router_id):
            self.problems.add(reader.at("router_id"), f"{router_id!r} is no router-id: four numbers with dots")
        elif router_id is None:
            router_id = next((_router_id(nic.addresses) for nic in parts["interfaces"] if nic.name == uplink), "")
        if mode == "vrrp":
            for key in ("router_id", "hostnames"):
                if key in data:
                    self.problems.add(reader.at(key), "only mode ospf has it")
        given = data.get("hostnames")
        hostnames = {daemon: f"{parts['name']}-{daemon}" for daemon in ("zebra", "ospfd")}
        for daemon, name in (given if isinstance(given, dict) else {}).items():
            if daemon in hostnames and isinstance(name, str):
                if not _NAME.fullmatch(name):
                    self.problems.add(reader.at(f"hostnames.{daemon}"), f"{name!r} is no name of a daemon")
                hostnames[daemon] = name
        return Director(
            **parts,
            mode=mode if mode in ("ospf", "vrrp") else "ospf",
            slot=number(data.get("slot"), 0),
            uplink=uplink,
            downlink=downlink,
            router_id=router_id or "",
            priority=number(data.get("priority"), 0),
            irq_cpus=text_of(data.get("irq_cpus")) or "",
            hostnames=hostnames,
        )

    def deal(
        self,
        directors: tuple[Director, ...],
        pools: Mapping[str, Pool],
        services: tuple[Service, ...],
        data: Mapping[Any, Any],
    ) -> Iterator[Director]:
        """Give each director its share of the pools of what it serves, and what it has beyond."""
        entries = [item for _, item in mappings(data.get("directors"))]
        for name, pool in pools.items():
            for address, where in self.own.items():
                if any(item.holds(address) for item in pool.ranges) and address not in pool.without:
                    # The manual, 4.3: 注：local address 和内网接口 ip 绝对不能重合.
                    self.problems.add(
                        f"local_addresses.{name}",
                        f"{address} is an interface's own address ({where}); the two must not coincide",
                    )
            for address, where in self.routers.items():
                if address in self.own or address in pool.without:
                    continue
                if any(item.holds(address) for item in pool.ranges):
                    self.problems.add(
                        f"local_addresses.{name}", f"{address} is a router's ({where}); without takes it out"
                    )
        slots: dict[tuple[str, int], str] = {}
        wanted: dict[str, dict[str, dict[int, str]]] = {}  # who for: the first service of each family
        for service in services:
            for name in service.directors:
                if service.pool in pools:
                    of_pool = wanted.setdefault(name, {}).setdefault(service.pool or "", {})
                    for version in service.versions:
                        of_pool.setdefault(version, service.name)
        for n, (director, entry) in enumerate(zip(directors, entries, strict=True)):
            extra = {
                name: tuple(self.beyond(name, share, pools, n)) for name, share in _items(entry, "local_addresses")
            }
            dealt: dict[str, tuple[Address, ...]] = {}
            mine = wanted.get(director.name, {})
            for name, pool in pools.items():
                if name not in mine:
                    if extra.get(name):
                        self.problems.add(
                            f"directors[{n}].local_addresses.{name}", "none of its services has this pool"
                        )
                    continue
                if director.slot:
                    self.slot(slots, pool, director.slot, f"directors[{n}].slot")
                share = (*pool.share(director.slot), *extra.get(name, ())) if director.slot else ()
                self.local_share(pool, share, director, n)
                for version, user in mine[name].items():
                    # keepalived ignores a service that has none.
                    has = any(address.version == version for address in share)
                    if not has and 0 < director.slot <= pool.slots(version):
                        self.problems.add(
                            f"local_addresses.{name}.without",
                            f"leaves no IPv{version} address to {director.name}, for {user}",
                        )
                dealt[name] = share
            yield dataclasses.replace(director, extra=extra, local_addresses=dealt)

    def slot(self, slots: dict[tuple[str, int], str], pool: Pool, slot: int, place: str) -> None:
        if (pool.name, slot) in slots:
            self.problems.add(place, f"{slot} stands already at {slots[pool.name, slot]}")
        slots.setdefault((pool.name, slot), place)
        for version in pool.versions:
            if slot > (room := pool.slots(version)):
                self.problems.add(
                    place,
                    f"{slot} is beyond local_addresses.{pool.name}, which has IPv{version} addresses for {room} "
                    f"director{'' if room == 1 else 's'} of {pool.per_director} each",
                )

    def beyond(self, name: Any, share: Any, pools: Mapping[str, Pool], n: int) -> Iterator[Address]:
        place = f"directors[{n}].local_addresses.{name}"
        if name not in pools:
            self.problems.add(place, f"there is no such pool (local_addresses: {', '.join(pools) or 'none'})")
            return
        for m, text in texts(share):
            here = f"{place}[{m}]"
            address = hosts.plain_address(self.problems, text, here)
            if address is None:
                continue
            if address in self.own:
                self.problems.add(
                    here, f"{address} is an interface's own address ({self.own[address]}); the two must not coincide"
                )
            elif address in self.routers:
                self.problems.add(here, f"{address} is a router's ({self.routers[address]})")
            for pool in pools.values():
                if any(item.holds(address) for item in pool.ranges) and address not in pool.without:
                    self.problems.add(
                        here, f"{address} is in local_addresses.{pool.name}, whose addresses are dealt out"
                    )
            yield address

    def local_share(self, pool: Pool, share: tuple[Address, ...], director: Director, n: int) -> None:
        """What a director's local addresses must not be, and where they must be."""
        networks = [net for nic in director.interfaces if nic.name == director.downlink for net in nic.networks]
        outside = []
        for address in share:
            place = f"directors[{n}].local_addresses.{pool.name}"
            if address in self.local:
                self.problems.add(place, f"{address} is that of {self.local[address]} too")
            self.local.setdefault(address, f"directors[{n}]")
            if address in self.vips:
                self.problems.add(place, f"{address} is a VIP ({self.vips[address]})")
            if not pool.routed and not any(address in network for network in networks):
                outside.append(address)
        if outside:
            known = ", ".join(str(network) for network in networks) or "none"
            count = f"{outside[0]}" if len(outside) == 1 else f"{outside[0]} and {len(outside) - 1} more"
            self.problems.add(
                f"directors[{n}].local_addresses.{pool.name}",
                f"{count}: in no network of the downlink ({known}); if they are routed to it, say "
                f"local_addresses.{pool.name}.routed: true",
            )

    def believers(
        self, real_servers: tuple[RealServer, ...], pools: Mapping[str, Pool], directors: tuple[Director, ...]
    ) -> Iterator[RealServer]:
        prefixes = trusted(pools, directors)
        if real_servers and len(prefixes) > _MAX_TRUSTED:
            self.problems.add(
                "local_addresses",
                f"{len(prefixes)} prefixes; real servers can trust {_MAX_TRUSTED}: give pools as whole networks",
            )
        for real_server in real_servers:
            yield dataclasses.replace(real_server, trusted=prefixes)

    def files(self, directors: tuple[Director, ...], services: tuple[Service, ...]) -> None:
        """A file that is handed over must not be one that is rendered."""
        rendered = {f"/etc/keepalived/{service.name}.conf": n for n, service in enumerate(services)}
        for n, director in enumerate(directors):
            for file in director.files:
                if file.path in rendered:
                    self.problems.add(
                        f"directors[{n}].files.{file.path}",
                        f"not to be given as a file: rendered from services[{rendered[file.path]}]",
                    )

    def strangers(self, pools: Mapping[str, Pool], services: tuple[Service, ...]) -> None:
        """A real server is somebody else: what is sent to an address of the directors goes round in a loop."""
        own = {address: where for address, where in self.own.items() if where.split("[")[0] == "directors"}
        for n, service in enumerate(services):
            listed = [(f"real_servers[{m}]", each.address) for m, each in enumerate(service.real_servers)]
            listed += [(f"sorry_servers[{m}]", address) for m, (address, _) in enumerate(service.sorry)]
            for key, address in listed:
                for what, known in (("a VIP", self.vips), ("a director's own address", own)):
                    if address in known:
                        self.loop(f"services[{n}].{key}.address", address, what, known[address])
                if address in self.local:
                    self.loop(f"services[{n}].{key}.address", address, "a local address", self.local[address])
                    continue
                for name, pool in pools.items():
                    if any(item.holds(address) for item in pool.ranges) and address not in pool.without:
                        self.problems.add(
                            f"services[{n}].{key}.address",
                            f"{address} is in local_addresses.{name}, for a director to come; without takes it out",
                        )

    def loop(self, place: str, address: Address, what: str, where: str) -> None:
        self.problems.add(place, f"{address} is {what} ({where}): its connections would go round in a loop")


def _of_ipv4(nic: hosts.Interface) -> list[IPv4Network]:
    return [network for network in nic.networks if isinstance(network, IPv4Network)]


def _items(entry: Mapping[Any, Any], key: str) -> list[tuple[Any, Any]]:
    value = entry.get(key)
    return list(value.items()) if isinstance(value, dict) else []


def _is_quad(text: str) -> bool:
    return isinstance(hosts.address_or_none(text), IPv4Address)


def _is_area(text: str) -> bool:
    return _is_quad(text) or (text.isascii() and text.isdigit() and int(text) < 2**32)


def _router_id(addresses: tuple[str, ...]) -> str:
    """OSPF's router-id where none is given: the uplink's first IPv4 address (manual 1h), or ""."""
    return next((str(ip_interface(text).ip) for text in addresses if ":" not in text), "")
