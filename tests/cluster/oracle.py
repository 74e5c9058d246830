"""What a director is to hold, from the cluster file's plain data and nothing of the code that renders it.

Read back is what `ipvsadm -S -n` and `ip -o address` print, which no check of `provision/checks` reads.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class Service:
    """A virtual service: its scheduler, SYNPROXY, the weights of its real servers and its local addresses."""

    scheduler: str
    syn_proxy: bool = False
    weights: dict[str, int] = field(default_factory=dict)
    local: set[str] = field(default_factory=set)


@dataclass
class Holding:
    """What a director holds: services by `t 203.0.113.1:80`, VIPs, local addresses on the downlink."""

    services: dict[str, Service] = field(default_factory=dict)
    vips: set[str] = field(default_factory=set)
    local: set[str] = field(default_factory=set)

    def differences(self, found: Holding) -> list[str]:
        """What is not as it is to be, a line each."""
        lines = []
        for key in sorted(self.services.keys() | found.services.keys()):
            wanted, got = self.services.get(key), found.services.get(key)
            if wanted != got:
                lines.append(f"{key}: {got}, not {wanted}")
        for name, wanted_set, got_set in (
            ("VIPs", self.vips, found.vips),
            ("local addresses", self.local, found.local),
        ):
            if wanted_set != got_set:
                lines.append(f"{name}: {sorted(got_set)}, not {sorted(wanted_set)}")
        return lines


def addresses(ranges: list[str]) -> Iterator[str]:
    """The single addresses of `A-B` and `A`."""
    for text in ranges:
        first, _, last = text.partition("-")
        start, end = (ipaddress.ip_address(word) for word in (first, last or first))
        for number in range(int(start), int(end) + 1):
            yield str(type(start)(number))


def shares(data: Mapping[str, Any], name: str) -> dict[str, set[str]]:
    """The local addresses of a director, by pool: its slot's, of each family, and those that it alone has."""
    director = next(each for each in data["directors"] if each["name"] == name)
    found = {}
    for pool, entry in data["local_addresses"].items():
        count, slot = entry["per_director"], director["slot"]
        everything = list(addresses(entry["addresses"]))
        mine: set[str] = set()
        for version in (4, 6):
            family = [text for text in everything if ipaddress.ip_address(text).version == version]
            mine.update(family[(slot - 1) * count : slot * count])
        mine -= {str(ipaddress.ip_address(text)) for text in entry.get("without", ())}
        extra = (director.get("local_addresses") or {}).get(pool, ())
        found[pool] = mine | {str(ipaddress.ip_address(text)) for text in extra}
    return found


def wanted(data: Mapping[str, Any], name: str, *, down: frozenset[str] = frozenset(), master: bool = True) -> Holding:
    """What a director is to hold.

    Args:
        data: the cluster file as YAML has it.
        name: the director.
        down: real servers (addresses with port) that fail their health checks.
        master: whether it has the VIPs, in mode vrrp.
    """
    pools = shares(data, name)
    holding = Holding(local={address for share in pools.values() for address in share})
    default = next(iter(pools), "")
    for service in data["services"]:
        share = pools[service.get("local_addresses", default)]
        for vip in service["vips"]:
            version = ipaddress.ip_address(vip).version
            for port in service["ports"]:
                entry = Service(service.get("scheduler", "rr"), service.get("syn_proxy", False))
                entry.local = {text for text in share if ipaddress.ip_address(text).version == version}
                for real in service["real_servers"]:
                    if ipaddress.ip_address(real["address"]).version != version:
                        continue
                    where = point(real["address"], real.get("port", port))
                    if where not in down:
                        entry.weights[where] = real.get("weight", 1)
                    elif service.get("inhibit_on_failure", False):
                        entry.weights[where] = 0
                holding.services[f"t {point(vip, port)}"] = entry
                has_quorum = any(entry.weights.values())
                if (data["mode"] == "ospf" and has_quorum) or (data["mode"] == "vrrp" and master):
                    holding.vips.add(str(ipaddress.ip_address(vip)))
    return holding


def point(address: str, port: int) -> str:
    """An address and a port as ipvsadm writes them."""
    text = str(ipaddress.ip_address(address))
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def found(saved: str, shown: str, downlink: str, own: set[str]) -> Holding:
    """What a director holds.

    Args:
        saved: what `ipvsadm -S -n` prints.
        shown: what `ip -o address show` prints.
        downlink: the interface that has its local addresses.
        own: its own addresses.
    """
    holding = Holding()
    for line in saved.splitlines():
        words = line.split()
        options = dict(pairwise(words[1:]))
        if words[0] not in ("-A", "-a", "-P"):
            raise ValueError(f"a line that nobody knows: {line}")
        protocol = next(word for word in ("-t", "-u") if word in options)
        key = f"{protocol[1:]} {options[protocol]}"
        if words[0] == "-A":
            holding.services[key] = Service(options["-s"], options.get("-j") == "enable")
        elif words[0] == "-P":
            holding.services[key].local.add(options["-z"])
        else:
            if "-b" not in words:
                raise ValueError(f"not FULLNAT: {line}")
            holding.services[key].weights[options["-r"]] = int(options["-w"])
    for line in shown.splitlines():
        _, device, _, text, *_ = line.split()
        address, _, length = text.partition("/")
        if length not in ("32", "128") or address in own or ipaddress.ip_address(address).is_loopback:
            continue
        (holding.local if device == downlink else holding.vips).add(address)
    return holding
