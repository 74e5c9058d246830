"""A host's model: what its file may say, and the rules that a schema cannot express.

A host file is refused whole: shapes (`host.schema.json`) and rules are checked together, and everything that is wrong
is listed at once with dotted paths. What `load` returns needs no further check.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from pathlib import Path
from typing import Any

from pipeline import recipe
from pipeline.errors import BuildError, Problems

Address = IPv4Address | IPv6Address
OwnAddress = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network

SCHEMA: Mapping[str, Any] = json.loads(Path(__file__).with_name("host.schema.json").read_text(encoding="utf-8"))

# The operations manual's /etc/sysctl.conf: section 1c for its cluster mode, 2c for master/backup.
MODE_SYSCTL: Mapping[str, Mapping[str, str]] = {
    "ospf": {
        "net.ipv4.conf.all.arp_ignore": "1",
        "net.ipv4.conf.all.arp_announce": "2",
        "net.core.netdev_max_backlog": "500000",
    },
    "vrrp": {"net.core.netdev_max_backlog": "500000"},
}

# Paths that `files` may not name, and why.
RESERVED: Mapping[str, str] = {
    "/etc/lvs/host.conf": "rendered from uplink, downlink and local_addresses",
    "/etc/sysctl.d/70-host.conf": "rendered from mode and sysctl",
    "/etc/hostname": "rendered from name",
    "/etc/machine-id": "each host makes its own at its first boot",
    "/etc/passwd": "a file would replace the accounts that the packages made",
    "/etc/group": "a file would replace the accounts that the packages made",
    "/etc/shadow": "a file would replace the accounts that the packages made",
    "/etc/gshadow": "a file would replace the accounts that the packages made",
}

DEFAULT_MODE = 0o640  # files handed over raw often hold passwords (keepalived's auth_pass, OSPF's keys)
_DIRECTOR_ONLY = ("mode", "uplink", "downlink", "local_addresses")
_KEY_TYPES = (
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
)
_MAX_HOST_NAME = 64  # HOST_NAME_MAX of Linux
_MIN_MTU_V6 = 1280  # RFC 8200, section 5
_MAX_FILE = 1 << 20  # bytes; a configuration is smaller, and a larger file is a mistaken path
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# IFNAMSIZ leaves 15 characters; the set is that of /etc/rc.local, less "@", which `ip` prints for a link's peer.
_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_SYSCTL = re.compile(r"[a-z][a-z0-9_-]*(\.[A-Za-z0-9_*/:@-]+)+")
_PATH = re.compile(r"/etc(/[A-Za-z0-9_@%+,:=.-]+)+")
_OCTAL = re.compile(r"0[0-7]{3}")


@dataclass(frozen=True)
class Route:
    """A route: a network, and the router on the interface's own networks."""

    to: str
    via: str


@dataclass(frozen=True)
class Interface:
    """A NIC.

    Attributes:
        name: the name it gets.
        mac: the hardware address by which it is found, lower case.
        addresses: its own addresses with prefix length.
        gateway4, gateway6: default routers.
        routes: further routes.
        mtu: bytes; None leaves the driver's.
        dhcp4, dhcp6: whether it asks for addresses.
    """

    name: str
    mac: str
    addresses: tuple[str, ...] = ()
    gateway4: str | None = None
    gateway6: str | None = None
    routes: tuple[Route, ...] = ()
    mtu: int | None = None
    dhcp4: bool = False
    dhcp6: bool = False


@dataclass(frozen=True)
class File:
    """A file of the host: its absolute path, its text, its permission bits."""

    path: str
    content: str
    mode: int


@dataclass(frozen=True)
class Host:
    """A host that has passed every rule.

    Attributes:
        name: short or full host name.
        role: director or realserver.
        ssh_authorized_keys: public keys, one line each, no key twice.
        mode: ospf or vrrp for a director, else None.
        interfaces: its NICs, in the order of its file.
        uplink, downlink: names of interfaces; None for a real server.
        local_addresses: without prefix length, in the order of its file.
        sysctl: settings beyond those of the mode.
        files: handed over as they are, in the order of its file.
    """

    name: str
    role: str
    ssh_authorized_keys: tuple[str, ...]
    mode: str | None
    interfaces: tuple[Interface, ...]
    uplink: str | None
    downlink: str | None
    local_addresses: tuple[str, ...]
    sysctl: Mapping[str, str]
    files: tuple[File, ...]

    @property
    def kernel_settings(self) -> Mapping[str, str]:
        """The mode's settings in the manual's order, then the host's own; the host's win."""
        return {**(MODE_SYSCTL[self.mode] if self.mode else {}), **self.sysctl}


def load(path: Path) -> Host:
    """Read a host file.

    Raises:
        BuildError: missing, not YAML, or anything in it or in a file that it refers to is wrong; all problems at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BuildError(f"{path} does not exist", f"ls {path.parent}") from None
    except UnicodeDecodeError as error:
        raise BuildError(f"{path}: not UTF-8 at byte {error.start}", f"correct {path}") from None
    data = recipe.parse(text, str(path))
    problems = recipe.check(data, SCHEMA, str(path))
    host = _Reader(path.parent, problems).host(data if isinstance(data, dict) else {})
    problems.raise_if_any(str(path), f"correct {path}")
    return host


class _Reader:
    """Applies the rules to data that may be of any shape: the schema's findings must not hide those of the rules."""

    def __init__(self, folder: Path, problems: Problems) -> None:
        self.folder = folder
        self.problems = problems
        # What must be unique or is compared across interfaces, with the place where it was first seen.
        self.names: dict[str, str] = {}
        self.macs: dict[str, str] = {}
        self.own: dict[Address, str] = {}
        self.default_routers: dict[int, str] = {}

    def host(self, data: Mapping[Any, Any]) -> Host:
        role = _text(data.get("role")) or ""
        interfaces = tuple(
            self.interface(item, f"interfaces[{n}]")
            for n, item in _members(data.get("interfaces"))
            if isinstance(item, dict)
        )
        self.role(data, role)
        return Host(
            name=self.name(data.get("name")),
            role=role,
            ssh_authorized_keys=self.keys(data.get("ssh_authorized_keys")),
            mode=_text(data.get("mode")),
            interfaces=interfaces,
            uplink=_text(data.get("uplink")),
            downlink=_text(data.get("downlink")),
            local_addresses=self.local_addresses(data.get("local_addresses")),
            sysctl=self.sysctl(data.get("sysctl")),
            files=self.files(data.get("files")),
        )

    def name(self, value: Any) -> str:
        name = _text(value)
        if name is None:
            return ""
        if not all(_LABEL.fullmatch(label) for label in name.split(".")):
            self.problems.add("name", f"{name!r} is no host name: labels of a-z, 0-9 and inner hyphens, joined by dots")
        elif len(name) > _MAX_HOST_NAME:
            self.problems.add("name", f"{len(name)} characters; Linux takes {_MAX_HOST_NAME}")
        return name

    def role(self, data: Mapping[Any, Any], role: str) -> None:
        """What a director needs, and what a real server has no use for."""
        if role == "realserver":
            for key in _DIRECTOR_ONLY:
                if key in data:
                    self.problems.add(key, "only a director has it; this is a real server")
        if role != "director":
            return
        if "mode" not in data:
            self.problems.add("mode", "missing; a director is one of a cluster (ospf) or of a pair (vrrp)")
        for key in ("uplink", "downlink"):
            if key not in data:
                self.problems.add(key, "missing; a director names the interface")
            elif (name := _text(data[key])) is not None and name not in self.names:
                known = ", ".join(self.names) or "none"
                self.problems.add(key, f"there is no interface {name!r} (interfaces: {known})")

    # --- the network

    def interface(self, data: Mapping[Any, Any], place: str) -> Interface:
        own = list(self.own_addresses(data.get("addresses"), f"{place}.addresses"))
        for version in (4, 6):
            self.default_router(data, version, own, place)
        mtu = data.get("mtu")
        if isinstance(mtu, int) and mtu < _MIN_MTU_V6 and any(a.version == 6 for a in own):
            self.problems.add(f"{place}.mtu", f"{mtu} is below {_MIN_MTU_V6}, with which IPv6 is turned off")
        return Interface(
            name=self.interface_name(data.get("name"), f"{place}.name"),
            mac=self.mac(data.get("mac"), f"{place}.mac"),
            addresses=tuple(str(a) for a in own),
            gateway4=_normal(data.get("gateway4")),
            gateway6=_normal(data.get("gateway6")),
            routes=tuple(self.routes(data.get("routes"), own, f"{place}.routes")),
            mtu=mtu if isinstance(mtu, int) else None,
            dhcp4=data.get("dhcp4") is True,
            dhcp6=data.get("dhcp6") is True,
        )

    def interface_name(self, value: Any, place: str) -> str:
        name = _text(value)
        if name is None:
            return ""
        if not _INTERFACE.fullmatch(name) or name == "lo":
            self.problems.add(place, f"{name!r} is no name for a NIC: up to 15 of A-Z a-z 0-9 _ . -, not lo")
        elif name in self.names:
            self.problems.add(place, f"{name} stands already at {self.names[name]}")
        self.names.setdefault(name, place)
        return name

    def mac(self, value: Any, place: str) -> str:
        if isinstance(value, int):
            self.problems.add(place, "write it in quotes: YAML reads digits and colons as a number")
        mac = (_text(value) or "").lower()
        if not mac:
            return ""
        if not _MAC.fullmatch(mac):
            self.problems.add(place, f"{mac!r} is no hardware address: six pairs of hex digits, joined by colons")
        elif int(mac[:2], 16) & 1:
            self.problems.add(place, f"{mac} is a multicast address, which no NIC has")
        elif mac in self.macs:
            self.problems.add(place, f"{mac} stands already at {self.macs[mac]}")
        self.macs.setdefault(mac, place)
        return mac

    def own_addresses(self, value: Any, place: str) -> Iterator[OwnAddress]:
        for n, item in _texts(value):
            here = f"{place}[{n}]"
            try:
                address = ip_interface(item)
            except ValueError:
                self.problems.add(here, f"{item!r} is no address with prefix length")
                continue
            network = address.network
            if "/" not in item:
                self.problems.add(here, f"{item} has no prefix length")
            elif "%" in item or not _is_host(address.ip):
                self.problems.add(here, f"{item} is no address that a host can have")
            elif network.prefixlen < network.max_prefixlen - 1 and address.ip == network.network_address:
                self.problems.add(here, f"{item} is the network's own address")
            elif address.version == 4 and network.prefixlen < 31 and address.ip == network.broadcast_address:
                self.problems.add(here, f"{item} is the network's broadcast address")
            elif address.ip in self.own:
                self.problems.add(here, f"{address.ip} stands already at {self.own[address.ip]}")
            self.own.setdefault(address.ip, here)
            yield address

    def default_router(self, data: Mapping[Any, Any], version: int, own: list[OwnAddress], place: str) -> None:
        key = f"gateway{version}"
        here = f"{place}.{key}"
        text = _text(data.get(key))
        if text is None:
            return
        self.router(text, version, own, here)
        if data.get(f"dhcp{version}") is True:
            self.problems.add(here, f"DHCP brings a default router; take away this one or dhcp{version}")
        if version in self.default_routers:
            self.problems.add(here, f"the host has a default router already at {self.default_routers[version]}")
        self.default_routers.setdefault(version, here)

    def router(self, text: str, version: int, own: list[OwnAddress], place: str) -> None:
        """A router is reached on a network of the interface itself."""
        router = self.plain_address(text, place)
        if router is None:
            return
        networks = [a.network for a in own if a.version == version]
        if router.version != version:
            self.problems.add(place, f"{text} is no IPv{version} address")
        elif any(a.ip == router for a in own):
            self.problems.add(place, f"{text} is this interface's own address")
        elif not networks:
            self.problems.add(place, f"the interface has no IPv{version} address of its own")
        elif not (version == 6 and router.is_link_local) and not any(router in network for network in networks):
            known = ", ".join(str(network) for network in networks)
            self.problems.add(place, f"{text} is on none of the interface's networks ({known})")

    def routes(self, value: Any, own: list[OwnAddress], place: str) -> Iterator[Route]:
        seen: dict[Network, str] = {}
        for n, item in _members(value):
            to, via = (_text(item.get(key)) for key in ("to", "via")) if isinstance(item, dict) else (None, None)
            if to is None or via is None:
                continue
            here = f"{place}[{n}]"
            try:
                network = ip_network(to)
            except ValueError:
                self.problems.add(f"{here}.to", f"{to!r} is no network: address and prefix length, host bits zero")
                continue
            if network.prefixlen == 0:
                # cloud-init 22.4 renders ::/0 as ::/64, and stops at "default".
                self.problems.add(f"{here}.to", f"a default route is said with gateway{network.version}")
            elif network in seen:
                self.problems.add(f"{here}.to", f"{network} stands already at {seen[network]}")
            seen.setdefault(network, f"{here}.to")
            self.router(via, network.version, own, f"{here}.via")
            yield Route(str(network), _normal(via) or "")

    def local_addresses(self, value: Any) -> tuple[str, ...]:
        seen: dict[Address, str] = {}
        for n, item in _texts(value):
            place = f"local_addresses[{n}]"
            address = self.plain_address(item, place)
            if address is None:
                continue
            if address in self.own:
                # The manual, 4.3: 注：local address 和内网接口 ip 绝对不能重合.
                self.problems.add(
                    place, f"{address} is an interface's own address ({self.own[address]}); the two must not coincide"
                )
            elif address in seen:
                self.problems.add(place, f"{address} stands already at {seen[address]}")
            seen.setdefault(address, place)
        return tuple(str(address) for address in seen)

    def plain_address(self, text: str, place: str) -> Address | None:
        """An address without prefix length, or None and a problem."""
        try:
            address = ip_address(text)
        except ValueError:
            self.problems.add(place, f"{text!r} is no address without prefix length")
            return None
        if "%" in text or not _is_host(address):
            self.problems.add(place, f"{text} is no address that a host can have")
        return address

    # --- who may log in

    def keys(self, value: Any) -> tuple[str, ...]:
        found: dict[str, None] = {}  # a set that keeps the order
        for n, item in _members(value):
            place = f"ssh_authorized_keys[{n}]"
            if isinstance(item, str):
                self.key(item, place, found)
            elif isinstance(item, dict) and (name := _text(item.get("file"))) is not None:
                text = self.read(name, f"{place}.file")
                if text is None:
                    continue
                lines = [(m, line) for m, line in enumerate(text.splitlines(), 1) if line.strip()]
                lines = [(m, line) for m, line in lines if not line.lstrip().startswith("#")]
                if "PRIVATE KEY" in text:
                    self.problems.add(f"{place}.file", f"{name} holds a private key; name the .pub file")
                elif not lines:
                    self.problems.add(f"{place}.file", f"there is no key in {name}")
                else:
                    for m, line in lines:
                        self.key(line, f"{place}.file: {name}:{m}", found)
        return tuple(found)

    def key(self, line: str, place: str, found: dict[str, None]) -> None:
        words = line.split(maxsplit=2)
        if "PRIVATE KEY" in line:
            self.problems.add(place, "a private key; the public one is wanted")
        elif len(words) < 2 or words[0] not in _KEY_TYPES:
            self.problems.add(place, f"no public key: it starts with one of {', '.join(_KEY_TYPES)}")
        elif "\n" in line.strip():
            self.problems.add(place, "more than one line")
        elif not _is_key_of(words[0], words[1]):
            self.problems.add(place, f"the {words[0]} key is damaged or cut short")
        else:
            found[" ".join(words)] = None

    # --- kernel settings and files

    def sysctl(self, value: Any) -> dict[str, str]:
        settings: dict[str, str] = {}
        for key, setting in (value if isinstance(value, dict) else {}).items():
            place = f"sysctl.{key}"
            if not isinstance(key, str) or not _SYSCTL.fullmatch(key):
                self.problems.add(place, "no kernel setting: names joined by dots")
            elif isinstance(setting, bool):
                self.problems.add(place, "write 0 or 1")
            elif isinstance(setting, str) and (not setting.strip() or not setting.isprintable()):
                self.problems.add(place, "its value is empty, or more than one line")
            elif isinstance(setting, int | str):
                settings[key] = str(setting).strip()
        return settings

    def files(self, value: Any) -> tuple[File, ...]:
        found: dict[str, File] = {}
        paths = [path for path in (value if isinstance(value, dict) else {}) if isinstance(path, str)]
        for path in paths:
            place, entry = f"files.{path}", value[path]
            self.path(path, paths, place)
            if isinstance(entry, str):
                entry = {"content": entry}
            if not isinstance(entry, dict):
                continue
            content, mode = self.content(entry, place), self.mode(entry.get("mode"), f"{place}.mode")
            if content is not None:
                found[path] = File(path, content, mode)
        return tuple(found.values())

    def path(self, path: str, others: list[str], place: str) -> None:
        if not _PATH.fullmatch(path) or {".", ".."} & set(path.split("/")):
            self.problems.add(place, "no plain path of a file under /etc")
        elif path in RESERVED:
            self.problems.add(place, f"not to be given as a file: {RESERVED[path]}")
        below = [other for other in others if other.startswith(f"{path}/")]
        if below:
            self.problems.add(place, f"a file cannot also be the folder of {', '.join(below)}")

    def content(self, entry: Mapping[Any, Any], place: str) -> str | None:
        if ("content" in entry) == ("file" in entry):
            self.problems.add(place, "exactly one of content and file is wanted")
            return None
        if (name := _text(entry.get("file"))) is not None:
            return self.read(name, f"{place}.file")
        text = _text(entry.get("content"))
        if text is not None and re.search("[\0\ud800-\udfff]", text):
            self.problems.add(f"{place}.content", "no text: a NUL or half a surrogate pair is in it")
        return text

    def mode(self, value: Any, place: str) -> int:
        if isinstance(value, int):
            self.problems.add(place, "write it in quotes: YAML reads a leading zero as octal")
        text = _text(value)
        if text is None:
            return DEFAULT_MODE
        if not _OCTAL.fullmatch(text):
            self.problems.add(place, f"{text!r} is no mode: four octal digits, the first a zero")
            return DEFAULT_MODE
        return int(text, 8)

    def read(self, name: str, place: str) -> str | None:
        """A file that the host file refers to, or None and a problem."""
        path = self.folder / name
        try:
            if not path.is_file():
                self.problems.add(place, f"{path} {'is no file' if path.exists() else 'does not exist'}")
                return None
            if (size := path.stat().st_size) > _MAX_FILE:
                self.problems.add(place, f"{path} has {size} bytes; {_MAX_FILE} are allowed")
                return None
            # Bytes first: reading as text would turn CR LF into LF, and "as they are" is promised.
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            self.problems.add(place, f"{path} is not UTF-8 at byte {error.start}")
            return None
        except (OSError, ValueError) as error:
            self.problems.add(place, f"{path} cannot be read: {error}")
            return None
        if "\0" in text:
            self.problems.add(place, f"{path} is no text: a NUL is in it")
            return None
        return text


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _members(value: Any) -> list[tuple[int, Any]]:
    return list(enumerate(value)) if isinstance(value, list) else []


def _texts(value: Any) -> list[tuple[int, str]]:
    return [(n, item) for n, item in _members(value) if isinstance(item, str)]


def _normal(value: Any) -> str | None:
    """An address in its one canonical spelling; as it is where it is none (a problem was noted)."""
    try:
        return str(ip_address(value)) if isinstance(value, str) else None
    except ValueError:
        return str(value)


def _is_host(address: Address) -> bool:
    return not (address.is_multicast or address.is_unspecified or address.is_loopback or address.is_reserved)


def _is_key_of(kind: str, encoded: str) -> bool:
    """Whether a key's blob (RFC 4253: strings with a length in front) is whole and of the kind that the line says."""
    try:
        blob = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return False
    fields: list[bytes] = []
    while blob:
        length = int.from_bytes(blob[:4], "big")
        if len(blob) < 4 + length:
            return False
        fields.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    return len(fields) >= 2 and fields[0] == kind.encode()
