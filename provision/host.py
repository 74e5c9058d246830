"""What every host of a cluster has, director or real server: its name, NICs, keys, kernel settings and files.

`Reader` reads these parts of a host's entry in the cluster file (`provision.cluster`) and notes what is wrong with
dotted paths. What concerns more than one host, or directors alone, stands there.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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

from pipeline.errors import Problems

Address = IPv4Address | IPv6Address
OwnAddress = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network

# Paths that `files` may not name, and why.
RESERVED: Mapping[str, str] = {
    "/etc/lvs/host.conf": "rendered from uplink, downlink and local addresses",
    "/etc/lvs/network-config": "rendered from interfaces",
    "/etc/lvs/vips.nft": "rendered from vip_prefixes",
    "/etc/lvs/vips.routes": "rendered from services",
    "/etc/lvs/files": "the list of rendered files",
    "/etc/sysctl.d/70-host.conf": "rendered from mode and sysctl",
    "/etc/keepalived/keepalived.conf": "rendered from services and local addresses",
    "/etc/quagga/zebra.conf": "rendered from ospf and vty",
    "/etc/quagga/ospfd.conf": "rendered from ospf and vty",
    "/etc/quagga/ospf6d.conf": "rendered from ospf and vty",
    "/etc/toa-bpf.conf": "rendered from local addresses",
    "/etc/hostname": "rendered from name",
    "/etc/machine-id": "each host makes its own at its first boot",
    "/etc/passwd": "a file would replace the accounts that the packages made",
    "/etc/group": "a file would replace the accounts that the packages made",
    "/etc/shadow": "a file would replace the accounts that the packages made",
    "/etc/gshadow": "a file would replace the accounts that the packages made",
}

DEFAULT_MODE = 0o640  # files handed over raw often hold passwords (keepalived's auth_pass, OSPF's keys)
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
_SYSCTL = re.compile(r"[a-z][a-z0-9_-]*(\.[A-Za-z0-9_/:@-]+)+")
_PATH = re.compile(r"/etc(/[A-Za-z0-9_@%+,:=.-]+)+")
_OCTAL = re.compile(r"0[0-7]{3}")
_SSH = re.compile(r"(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?")


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
        mac: the hardware address by which it is found, lower case; None where the kernel's own name is taken.
        addresses: its own addresses with prefix length.
        gateway4, gateway6: default routers.
        routes: further routes.
        mtu: bytes; None leaves the driver's.
        dhcp4, dhcp6: whether it asks for addresses.
    """

    name: str
    mac: str | None = None
    addresses: tuple[str, ...] = ()
    gateway4: str | None = None
    gateway6: str | None = None
    routes: tuple[Route, ...] = ()
    mtu: int | None = None
    dhcp4: bool = False
    dhcp6: bool = False

    @property
    def networks(self) -> tuple[Network, ...]:
        """The networks of its own addresses."""
        return tuple(ip_interface(address).network for address in self.addresses)


@dataclass(frozen=True)
class File:
    """A file of a host.

    Attributes:
        path: absolute.
        content: its text.
        mode: permission bits.
        owner: user and group of the same name.
    """

    path: str
    content: str
    mode: int
    owner: str = "root"


@dataclass(frozen=True, kw_only=True)
class Host:
    """What every host has.

    Attributes:
        name: short or full host name.
        ssh: where its sshd is: a name or address, and a port (22 where 0).
        ssh_authorized_keys: public keys, one line each, no key twice.
        interfaces: its NICs, in the order of its file.
        sysctl: settings of its own.
        files: handed over as they are, in the order of its file.
    """

    name: str
    ssh: tuple[str, int]
    ssh_authorized_keys: tuple[str, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    sysctl: Mapping[str, str] = field(default_factory=dict)
    files: tuple[File, ...] = ()

    @property
    def role(self) -> str:
        """Which image it runs."""
        raise NotImplementedError

    @property
    def kernel_settings(self) -> Mapping[str, str]:
        """All that is rendered for it, its own last: they win."""
        return self.sysctl

    @property
    def own_addresses(self) -> tuple[Address, ...]:
        """The addresses of its NICs."""
        return tuple(ip_interface(address).ip for nic in self.interfaces for address in nic.addresses)


class Reader:
    """Applies the rules to data that may be of any shape: the schema's findings must not hide those of the rules.

    Args:
        folder: where relative paths of files start.
        problems: takes what is wrong.
        place: the host's dotted path (`directors[0]`).
    """

    def __init__(self, folder: Path, problems: Problems, place: str) -> None:
        self.folder = folder
        self.problems = problems
        self.place = place
        # What must be unique or is compared across interfaces, with the place where it was first seen.
        self.names: dict[str, str] = {}
        self.macs: dict[str, str] = {}
        self.by_mac: dict[str, str] = {}  # to the interface's name
        self.own: dict[Address, str] = {}
        self.default_routers: dict[int, str] = {}
        self.routers: dict[Address, str] = {}

    def at(self, key: str) -> str:
        """The dotted path of one of the host's keys."""
        return f"{self.place}.{key}" if self.place else key

    def parts(self, data: Mapping[Any, Any], keys: tuple[str, ...] = ()) -> dict[str, Any]:
        """The arguments of `Host`, with the cluster's login keys before its own."""
        name = self.name(data.get("name"))
        return {
            "name": name,
            "ssh": self.ssh(data.get("ssh"), name),
            "interfaces": tuple(
                self.interface(item, self.at(f"interfaces[{n}]"))
                for n, item in members(data.get("interfaces"))
                if isinstance(item, dict)
            ),
            "ssh_authorized_keys": tuple(dict.fromkeys([*keys, *self.keys(data.get("ssh_authorized_keys"))])),
            "sysctl": self.sysctl(data.get("sysctl")),
            "files": self.files(data.get("files")),
        }

    def name(self, value: Any) -> str:
        name = text_of(value)
        place = self.at("name")
        if name is None:
            return ""
        if not all(_LABEL.fullmatch(label) for label in name.split(".")):
            self.problems.add(place, f"{name!r} is no host name: labels of a-z, 0-9 and inner hyphens, joined by dots")
        elif len(name) > _MAX_HOST_NAME:
            self.problems.add(place, f"{len(name)} characters; Linux takes {_MAX_HOST_NAME}")
        return name

    def ssh(self, value: Any, name: str) -> tuple[str, int]:
        text = text_of(value)
        if text is None:
            return name, 0
        try:
            return str(ip_address(text)), 0
        except ValueError:
            found = _SSH.fullmatch(text)
        if found is None or int(found["port"] or 0) > 65535:
            self.problems.add(self.at("ssh"), f"{text!r} is no address or name with an optional :port")
            return name, 0
        return found["host"].strip("[]"), int(found["port"] or 0)

    def nic(self, value: Any, key: str) -> str:
        """The name of the interface that `uplink` or `downlink` means by name or hardware address."""
        text = text_of(value)
        if text is None:
            return ""
        if text in self.names:
            return text
        if text.lower() in self.by_mac:
            return self.by_mac[text.lower()]
        known = ", ".join(self.names) or "none"
        self.problems.add(self.at(key), f"there is no interface {text!r} (interfaces: {known})")
        return text

    # --- the network

    def interface(self, data: Mapping[Any, Any], place: str) -> Interface:
        own = list(self.own_addresses(data.get("addresses"), f"{place}.addresses"))
        for version in (4, 6):
            self.default_router(data, version, own, place)
        mtu = data.get("mtu")
        if isinstance(mtu, int) and mtu < _MIN_MTU_V6 and any(a.version == 6 for a in own):
            self.problems.add(f"{place}.mtu", f"{mtu} is below {_MIN_MTU_V6}, with which IPv6 is turned off")
        name = self.interface_name(data.get("name"), f"{place}.name")
        mac = self.mac(data.get("mac"), f"{place}.mac")
        if mac is not None:
            self.by_mac.setdefault(mac, name)
        return Interface(
            name=name,
            mac=mac,
            addresses=tuple(str(a) for a in own),
            gateway4=_normal(data.get("gateway4")),
            gateway6=_normal(data.get("gateway6")),
            routes=tuple(self.routes(data.get("routes"), own, f"{place}.routes")),
            mtu=mtu if isinstance(mtu, int) else None,
            dhcp4=data.get("dhcp4") is True,
            dhcp6=data.get("dhcp6") is True,
        )

    def interface_name(self, value: Any, place: str) -> str:
        name = text_of(value)
        if name is None:
            return ""
        if not _INTERFACE.fullmatch(name) or name == "lo":
            self.problems.add(place, f"{name!r} is no name for a NIC: up to 15 of A-Z a-z 0-9 _ . -, not lo")
        elif name in self.names:
            self.problems.add(place, f"{name} stands already at {self.names[name]}")
        self.names.setdefault(name, place)
        return name

    def mac(self, value: Any, place: str) -> str | None:
        if isinstance(value, int):
            self.problems.add(place, "write it in quotes: YAML reads digits and colons as a number")
        mac = (text_of(value) or "").lower()
        if not mac:
            return None
        if not _MAC.fullmatch(mac):
            self.problems.add(place, f"{mac!r} is no hardware address: six pairs of hex digits, joined by colons")
        elif int(mac[:2], 16) & 1:
            self.problems.add(place, f"{mac} is a multicast address, which no NIC has")
        elif mac in self.macs:
            self.problems.add(place, f"{mac} stands already at {self.macs[mac]}")
        self.macs.setdefault(mac, place)
        return mac

    def own_addresses(self, value: Any, place: str) -> Iterator[OwnAddress]:
        for n, item in texts(value):
            here = f"{place}[{n}]"
            try:
                address = ip_interface(item)
            except ValueError:
                self.problems.add(here, f"{item!r} is no address with prefix length")
                continue
            network = address.network
            if "/" not in item:
                self.problems.add(here, f"{item} has no prefix length")
            elif "%" in item or not is_host(address.ip):
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
        text = text_of(data.get(key))
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
        self.routers.setdefault(router, place)
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
        for n, item in members(value):
            to, via = (text_of(item.get(key)) for key in ("to", "via")) if isinstance(item, dict) else (None, None)
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

    def plain_address(self, text: str, place: str) -> Address | None:
        return plain_address(self.problems, text, place)

    # --- who may log in

    def keys(self, value: Any) -> tuple[str, ...]:
        found: dict[str, None] = {}  # a set that keeps the order
        for n, item in members(value):
            place = self.at(f"ssh_authorized_keys[{n}]")
            if isinstance(item, str):
                self.key(item, place, found)
            elif isinstance(item, dict) and (name := text_of(item.get("file"))) is not None:
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
            place = self.at(f"sysctl.{key}")
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
            place, entry = self.at(f"files.{path}"), value[path]
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
        elif path.startswith("/etc/systemd/network/10-cloud-init-"):
            self.problems.add(place, "not to be given as a file: made from interfaces")
        below = [other for other in others if other.startswith(f"{path}/")]
        if below:
            self.problems.add(place, f"a file cannot also be the folder of {', '.join(below)}")

    def content(self, entry: Mapping[Any, Any], place: str) -> str | None:
        if ("content" in entry) == ("file" in entry):
            self.problems.add(place, "exactly one of content and file is wanted")
            return None
        if (name := text_of(entry.get("file"))) is not None:
            return self.read(name, f"{place}.file")
        text = text_of(entry.get("content"))
        if text is not None and re.search("[\0\ud800-\udfff]", text):
            self.problems.add(f"{place}.content", "no text: a NUL or half a surrogate pair is in it")
        return text

    def mode(self, value: Any, place: str) -> int:
        if isinstance(value, int):
            self.problems.add(place, "write it in quotes: YAML reads a leading zero as octal")
        text = text_of(value)
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


def plain_address(problems: Problems, text: str, place: str) -> Address | None:
    """An address without prefix length that a host can have, or None and a problem."""
    try:
        address = ip_address(text)
    except ValueError:
        problems.add(place, f"{text!r} is no address without prefix length")
        return None
    if "%" in text or not is_host(address):
        problems.add(place, f"{text} is no address that a host can have")
    return address


def text_of(value: Any) -> str | None:
    """A text, or None where it is anything else."""
    return value if isinstance(value, str) else None


def members(value: Any) -> list[tuple[int, Any]]:
    """The members of a list with their numbers; none where it is no list."""
    return list(enumerate(value)) if isinstance(value, list) else []


def texts(value: Any) -> list[tuple[int, str]]:
    """The texts among the members of a list."""
    return [(n, item) for n, item in members(value) if isinstance(item, str)]


def mappings(value: Any) -> list[tuple[int, Mapping[Any, Any]]]:
    """The mappings among the members of a list."""
    return [(n, item) for n, item in members(value) if isinstance(item, dict)]


def number(value: Any, default: int) -> int:
    """A number from 0, or the default where it is anything else."""
    return found if (found := number_or_none(value)) is not None else default


def number_or_none(value: Any) -> int | None:
    """A number from 0, or None where it is anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def address_or_none(text: str) -> Address | None:
    """An address, or None where it is none."""
    try:
        return ip_address(text)
    except ValueError:
        return None


def _normal(value: Any) -> str | None:
    """An address in its one canonical spelling; as it is where it is none (a problem was noted)."""
    try:
        return str(ip_address(value)) if isinstance(value, str) else None
    except ValueError:
        return str(value)


def is_host(address: Address) -> bool:
    """Whether a host can have it: no group, nobody, not this machine itself."""
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
