"""Virtual services of a cluster file: VIPs, ports, real servers and their health checks, and the rules for them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import Problems
from provision.host import (
    Address,
    Network,
    address_or_none,
    mappings,
    members,
    number,
    number_or_none,
    plain_address,
    text_of,
    texts,
)
from provision.model import Check, Destination, Instance, Service
from provision.pools import Pool

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
# What keepalived takes as one word: all of ASCII but what quotes, begins a remark or a block, or names a variable
# (! " # $ \ { }).
_PATH = re.compile(r"/[%-\[\]-z|~]*")


class ServiceReader:
    """Applies the rules for services to data that may be of any shape.

    Args:
        problems: takes what is wrong.
        mode: the cluster's.
        prefixes: where VIPs are.
        pools: by name.
        instances: of mode vrrp.
        directors: names of all directors.
        scripts: VIPs are bound by quorum_up and quorum_down, where no other service has them too.
    """

    def __init__(
        self,
        problems: Problems,
        mode: str,
        prefixes: tuple[Network, ...],
        pools: Mapping[str, Pool],
        instances: tuple[Instance, ...],
        directors: tuple[str, ...],
        *,
        scripts: bool = False,
    ) -> None:
        self.problems = problems
        self.mode = mode
        self.prefixes = prefixes
        self.pools = pools
        self.instances = instances
        self.directors = directors
        self.scripts = scripts
        self.vips: dict[Address, str] = {}  # where each was first seen

    def services(self, value: Any) -> Iterator[Service]:
        """The services of the file's list."""
        names: dict[str, str] = {}
        taken: dict[str, str] = {}
        users: dict[Address, int] = {}
        moved: dict[Address, tuple[Service, str]] = {}
        found = []
        for n, item in mappings(value):
            place = f"services[{n}]"
            name = text_of(item.get("name")) or ""
            if name and not _NAME.fullmatch(name):
                self.problems.add(f"{place}.name", f"{name!r} is no name: letters, digits, _ . -, at most 63")
            elif name == "keepalived":
                self.problems.add(f"{place}.name", "keepalived.conf is the main file's name")
            elif name:
                self.once(names, name, f"{place}.name")
            service = self.service(item, place, name)
            for m, vip in self.service_vips(item.get("vips"), place):
                users[vip] = users.get(vip, 0) + 1
                first, where = moved.setdefault(vip, (service, f"{place}.vips[{m}]"))
                if first.instance != service.instance:
                    self.problems.add(f"{place}.vips[{m}]", f"{vip} is moved by {first.instance} already ({where})")
                elif self.mode == "ospf" and set(first.directors) != set(service.directors):
                    self.problems.add(
                        f"{place}.vips[{m}]",
                        f"{vip} is announced by other directors ({where}): routers send them all of its ports",
                    )
                for port in service.ports:
                    self.once(taken, f"{vip} port {port}/{service.protocol}", f"{place}.vips[{m}]")
            found.append(service)
        for service in found:
            for version in service.versions:
                # keepalived takes the first of two groups with one name for both.
                if (group := service.group(version)) != service.name and group in names:
                    self.problems.add(names[group], f"{group} is what keepalived's files call {service.name} for IPv6")
            # Scripts cannot count: with the first of two services to lose its quorum the VIP of both would go.
            counted = not self.scripts or any(users.get(vip, 0) > 1 for vip in service.vips)
            yield dataclasses.replace(service, bind_device="lo" if self.mode == "ospf" and counted else None)

    def service_vips(self, value: Any, place: str) -> Iterator[tuple[int, Address]]:
        seen: set[Address] = set()
        for m, text in texts(value):
            here = f"{place}.vips[{m}]"
            vip = plain_address(self.problems, text, here)
            if vip is None:
                continue
            if vip in seen:
                self.problems.add(here, f"{vip} stands twice")
                continue
            seen.add(vip)
            if not any(vip in prefix for prefix in self.prefixes):
                known = ", ".join(str(prefix) for prefix in self.prefixes) or "none"
                self.problems.add(here, f"{vip} is in none of vip_prefixes ({known})")
            self.vips.setdefault(vip, here)
            yield m, vip

    def service(self, item: Mapping[Any, Any], place: str, name: str) -> Service:
        vips = dict.fromkeys(vip for _, text in texts(item.get("vips")) if (vip := address_or_none(text)))
        ports = dict.fromkeys(port for _, port in members(item.get("ports")) if number(port, 0))
        protocol, forwarding = text_of(item.get("protocol")) or "TCP", text_of(item.get("forwarding")) or "FNAT"
        service = Service(
            name=name,
            vips=tuple(vips),
            ports=tuple(ports),
            protocol=protocol,
            scheduler=text_of(item.get("scheduler")) or "rr",
            forwarding=forwarding,
            pool=self.pool(item, place, forwarding),
            syn_proxy=item.get("syn_proxy") is True,
            est_timeout=number_or_none(item.get("est_timeout")),
            persistence_timeout=number_or_none(item.get("persistence_timeout")),
            delay_loop=number(item.get("delay_loop"), 7),
            alpha=item.get("alpha", self.mode == "ospf") is True,
            omega=item.get("omega", self.mode == "ospf") is True,
            quorum=number_or_none(item.get("quorum", 1 if self.mode == "ospf" else None)),
            hysteresis=number_or_none(item.get("hysteresis", 0 if self.mode == "ospf" else None)),
            instance=self.instance(item, place),
            directors=self.servers(item, place),
            real_servers=tuple(self.destinations(item, place, tuple(ports), protocol)),
            sorry=tuple(self.sorry(item.get("sorry_servers"), f"{place}.sorry_servers", tuple(ports))),
        )
        self.forwarding(service, item, place)
        self.families(service, place)
        return service

    def pool(self, item: Mapping[Any, Any], place: str, forwarding: str) -> str | None:
        given = text_of(item.get("local_addresses"))
        known = ", ".join(self.pools) or "none"
        if forwarding != "FNAT":
            if given is not None:
                self.problems.add(f"{place}.local_addresses", f"only FNAT has local addresses; this is {forwarding}")
            return None
        if given is None and len(self.pools) == 1:
            return next(iter(self.pools))
        if given is None:
            self.problems.add(f"{place}.local_addresses", f"missing; FNAT needs a pool (local_addresses: {known})")
        elif given not in self.pools:
            self.problems.add(f"{place}.local_addresses", f"there is no pool {given!r} (local_addresses: {known})")
        return given

    def instance(self, item: Mapping[Any, Any], place: str) -> str | None:
        given, known = text_of(item.get("instance")), [instance.name for instance in self.instances]
        if self.mode != "vrrp":
            if given is not None:
                self.problems.add(f"{place}.instance", "only mode vrrp has it")
            return None
        if given is None and len(known) == 1:
            return known[0]
        if given not in known and known:
            what = "missing" if given is None else f"there is no instance {given!r}"
            self.problems.add(f"{place}.instance", f"{what} (vrrp.instances: {', '.join(known)})")
        return given

    def servers(self, item: Mapping[Any, Any], place: str) -> tuple[str, ...]:
        if "directors" not in item:
            return self.directors
        for n, name in texts(item["directors"]):
            if name not in self.directors:
                self.problems.add(f"{place}.directors[{n}]", f"there is no director {name!r}")
        return tuple(dict.fromkeys(name for _, name in texts(item["directors"]) if name in self.directors))

    def forwarding(self, service: Service, item: Mapping[Any, Any], place: str) -> None:
        """What goes only with some ways of forwarding, or with TCP."""
        if service.syn_proxy and (service.forwarding != "FNAT" or service.protocol != "TCP"):
            self.problems.add(
                f"{place}.syn_proxy", f"only TCP by FNAT has it; this is {service.protocol} by {service.forwarding}"
            )
        if service.est_timeout and service.protocol != "TCP":
            self.problems.add(f"{place}.est_timeout", f"only TCP has it; this is {service.protocol}")
        if service.forwarding in ("DR", "TUN"):
            for m, real_server in enumerate(service.real_servers):
                if service.ports and real_server.port not in service.ports:
                    self.problems.add(f"{place}.real_servers[{m}].port", f"{service.forwarding} cannot change the port")
        quorum = service.quorum
        if quorum is None:
            if service.hysteresis is not None:
                self.problems.add(f"{place}.hysteresis", "it goes with a quorum")
        elif (service.hysteresis or 0) >= quorum:
            self.problems.add(f"{place}.hysteresis", f"{service.hysteresis} is not below the quorum ({quorum})")

    def families(self, service: Service, place: str) -> None:
        """Per family of its VIPs: real servers, weights that reach the quorum, local addresses."""
        for m, real_server in enumerate(service.real_servers):
            if service.vips and real_server.address.version not in service.versions:
                self.problems.add(
                    f"{place}.real_servers[{m}].address",
                    f"{real_server.address}: the service has no IPv{real_server.address.version} VIP",
                )
        for m, (address, _) in enumerate(service.sorry):
            if service.vips and address.version not in service.versions:
                self.problems.add(
                    f"{place}.sorry_servers[{m}].address", f"{address}: the service has no IPv{address.version} VIP"
                )
        for version in service.versions:
            weights = [each.weight for each in service.real_servers if each.address.version == version]
            if not weights:
                if service.real_servers:
                    self.problems.add(f"{place}.real_servers", f"none is IPv{version}, as one of its VIPs is")
            elif service.quorum and sum(weights) < (wanted := service.quorum + (service.hysteresis or 0)):
                self.problems.add(
                    f"{place}.quorum",
                    f"quorum and hysteresis ask for {wanted}; all IPv{version} real servers weigh {sum(weights)}",
                )
            if service.pool in self.pools and version not in self.pools[service.pool or ""].versions:
                self.problems.add(
                    f"{place}.local_addresses",
                    f"{service.pool} has no IPv{version} addresses, as one of its VIPs needs",
                )

    # --- real servers

    def destinations(
        self, item: Mapping[Any, Any], place: str, ports: tuple[int, ...], protocol: str
    ) -> Iterator[Destination]:
        common = self.check(item.get("check"), f"{place}.check")
        stay = item.get("inhibit_on_failure") is True
        seen: dict[str, str] = {}
        for m, entry in mappings(item.get("real_servers")):
            here = f"{place}.real_servers[{m}]"
            address = self.address(entry.get("address"), f"{here}.address")
            port = self.port(entry.get("port"), ports, f"{here}.port")
            check = self.check(entry.get("check"), f"{here}.check") or common
            if check is None and protocol != "TCP" and "check" not in entry and "check" not in item:
                self.problems.add(f"{here}.check", f"missing; for {protocol} there is none by itself")
            if address is None:
                continue
            self.once(seen, f"{address} port {port}", here)
            weight = entry.get("weight", 1)
            yield Destination(
                address,
                port,
                weight if isinstance(weight, int) and not isinstance(weight, bool) else 0,
                entry.get("inhibit_on_failure", stay) is True,
                check or Check("tcp"),
            )

    def port(self, value: Any, ports: tuple[int, ...], place: str) -> int:
        if value is None and len(ports) > 1:
            self.problems.add(place, "missing; the service has several ports")
        return number(value, ports[0] if ports else 0)

    def check(self, value: Any, place: str) -> Check | None:
        if not isinstance(value, dict):
            return None
        kinds = [kind for kind in ("tcp", "http", "https", "none") if kind in value]
        if len(kinds) != 1:
            self.problems.add(place, "exactly one of tcp, http, https and none is wanted")
            return None
        if (kind := kinds[0]) == "none" or not isinstance(item := value[kind], dict):
            if value.get("none") is False:
                self.problems.add(f"{place}.none", "write true, or another check")
            return Check("none") if kind == "none" else None
        for key, pattern in (("path", _PATH), ("host", _NAME)):
            text = text_of(item.get(key))
            if text is not None and not pattern.fullmatch(text):
                self.problems.add(f"{place}.{kind}.{key}", f"{text!r} cannot stand in keepalived's file")
        return Check(
            kind=kind,
            connect_timeout=number(item.get("connect_timeout"), 5),
            retries=number_or_none(item.get("retries")),
            delay_before_retry=number_or_none(item.get("delay_before_retry")),
            port=number_or_none(item.get("port")),
            path=text_of(item.get("path")) or "",
            status=number(item.get("status"), 200),
            host=text_of(item.get("host")),
        )

    def sorry(self, value: Any, place: str, ports: tuple[int, ...]) -> Iterator[tuple[Address, int]]:
        seen: dict[str, str] = {}
        for m, entry in mappings(value):
            address = self.address(entry.get("address"), f"{place}[{m}].address")
            if address is not None:
                self.once(seen, f"a sorry server for IPv{address.version}", f"{place}[{m}]")
                yield address, self.port(entry.get("port"), ports, f"{place}[{m}].port")

    def address(self, value: Any, place: str) -> Address | None:
        text = text_of(value)
        return None if text is None else plain_address(self.problems, text, place)

    def once(self, seen: dict[Any, str], what: Any, place: str) -> None:
        if what in seen:
            self.problems.add(place, f"{what} stands already at {seen[what]}")
        seen.setdefault(what, place)
