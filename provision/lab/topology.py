"""Who is connected with whom: what a cluster file says of it, and the router and clients around it, which it does not.

Interfaces whose addresses share a network are on one link. A router that hosts name and none of them is: on a link of
directors' uplinks, the uplink router; anywhere else one behind the directors, which is called `core`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_interface, ip_network
from itertools import count

from pipeline.errors import Problems
from provision.host import Host, Interface, Network
from provision.model import Cluster, Director

ROUTER, CORE = "router", "core"
CONTROL = "lab0"  # the NIC of each machine that only the lab's ssh uses
_CONTROL_MAC = "52:54:00:1a:b0:"
CLIENTS = "clients"
# Documentation's networks (RFC 5737, RFC 3849): the first of each family that the cluster does not use is the clients'.
_FOR_CLIENTS = ("198.51.100.0/24", "203.0.113.0/24", "192.0.2.0/24"), ("2001:db8:c11e::/64", "2001:db8:c11f::/64")
_FIRST_CLIENT = 11  # its number on that network; the router is 1


@dataclass(frozen=True)
class Plug:
    """An interface on a link.

    Attributes:
        node: whose it is.
        nic: its name there.
        mac: its hardware address; "" where nobody has said one.
        addresses: with prefix length.
    """

    node: str
    nic: str
    mac: str = ""
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Link:
    """What behaves like one switch.

    Attributes:
        name: `uplink`, `downlink`, `clients`, or `link-N`.
        networks: those of its addresses.
        plugs: who is on it.
    """

    name: str
    networks: tuple[Network, ...]
    plugs: tuple[Plug, ...]


@dataclass(frozen=True)
class Node:
    """Somebody on the links.

    Attributes:
        name: its host name.
        kind: director, realserver, router, core or client.
    """

    name: str
    kind: str

    @property
    def is_machine(self) -> bool:
        """Whether it runs an image; the others live in network namespaces."""
        return self.kind in ("director", "realserver")


@dataclass(frozen=True)
class Topology:
    """A lab's nodes, clients first, and links."""

    nodes: tuple[Node, ...]
    links: tuple[Link, ...]

    def plugs(self, name: str) -> Iterator[tuple[Link, Plug]]:
        """A node's interfaces, with their links."""
        for link in self.links:
            for plug in link.plugs:
                if plug.node == name:
                    yield link, plug

    def of(self, *kinds: str) -> tuple[Node, ...]:
        """The nodes of some kinds."""
        return tuple(node for node in self.nodes if node.kind in kinds)

    def link(self, name: str) -> Link:
        """A link by its name."""
        return next(link for link in self.links if link.name == name)

    def address(self, name: str, link: str, version: int) -> str:
        """A node's address on a link, without prefix length; "" where it has none."""
        own = (ip_interface(text) for here, plug in self.plugs(name) if here.name == link for text in plug.addresses)
        return next((str(address.ip) for address in own if address.version == version), "")


def build(cluster: Cluster, clients: int = 2) -> Topology:
    """What a cluster's lab consists of.

    Args:
        cluster: the cluster.
        clients: how many.

    Raises:
        BuildError: the cluster cannot be put in a lab; all reasons at once.
    """
    problems = Problems()
    _judge(cluster, problems)
    problems.raise_if_any(f"{cluster.path}: no lab can be made of it", f"correct {cluster.path}")
    links = [_routed(link, members) for link, members in _named(cluster)]
    links.insert(0, _clients(links, cluster, clients))
    names = {plug.node for link in links for plug in link.plugs}
    nodes = [
        *(Node(f"client-{number}", "client") for number in range(1, clients + 1)),
        *(Node(name, name) for name in (ROUTER, CORE) if name in names),
        *(Node(host.name, host.role) for host in cluster.hosts),
    ]
    return Topology(tuple(nodes), tuple(links))


def _judge(cluster: Cluster, problems: Problems) -> None:
    reserved = {ROUTER, CORE, "switch"}
    for kind, hosts in (("directors", cluster.directors), ("real_servers", cluster.real_servers)):
        for number, host in enumerate(hosts):
            place = f"{kind}[{number}]"
            if host.name in reserved or host.name.startswith("client-"):
                problems.add(f"{place}.name", f"{host.name} is the lab's own name for somebody else")
            for n, nic in enumerate(host.interfaces):
                if nic.mac is None:
                    problems.add(f"{place}.interfaces[{n}].mac", "the lab plugs a NIC in by it")
                if nic.name == CONTROL and not (nic.mac or "").startswith(_CONTROL_MAC):
                    problems.add(f"{place}.interfaces[{n}].name", f"{CONTROL} is the NIC that the lab adds")
            if isinstance(host, Director):
                _judge_uplink(cluster, host, place, problems)
    if not cluster.directors:
        problems.add("directors", "there is none")


def _judge_uplink(cluster: Cluster, host: Director, place: str, problems: Problems) -> None:
    uplink = host.interface(host.uplink)
    number = host.interfaces.index(uplink)
    router = uplink.gateway4
    if router is None:
        problems.add(f"{place}.interfaces[{number}].gateway4", "the lab's router would have no address")
    elif any(ip_address(router) in each.own_addresses for each in cluster.hosts):
        problems.add(f"{place}.interfaces[{number}].gateway4", f"{router} is a host; the lab's router cannot be it")


def absent(cluster: Cluster) -> list[str]:
    """The real servers that are no hosts of the cluster file, a line for each service and family that has others.

    Raises:
        BuildError: a service of TCP has none at all in a family of its VIPs, so that clients would get no page.
    """
    own = {address for host in cluster.real_servers for address in host.own_addresses}
    problems = Problems()
    lines = []
    for number, service in enumerate(cluster.services):
        place = f"services[{number}].real_servers"
        for version in service.versions:
            wanted = [each.address for each in service.real_servers if each.address.version == version]
            names = ", ".join(str(address) for address in dict.fromkeys(wanted) if address not in own)
            if not names:
                continue
            if service.protocol == "TCP" and own.isdisjoint(wanted):
                problems.add(place, f"no host has {names}; nobody would answer at the IPv{version} VIPs")
            else:
                lines.append(f"{place}: no host has {names}; the lab is without")
    problems.raise_if_any(
        f"{cluster.path}: no lab can be made of it",
        f"add these hosts to real_servers in {cluster.path}, or take provision/examples/lab-{cluster.mode}.yaml",
    )
    return lines


def _named(cluster: Cluster) -> list[tuple[Link, list[tuple[Host, Interface]]]]:
    """The links of the cluster file, with their interfaces: those of uplinks first, then those of downlinks."""
    uplinks = {(each.name, each.uplink) for each in cluster.directors}
    downlinks = {(each.name, each.downlink) for each in cluster.directors}
    groups = _groups(cluster)
    found = []
    numbers = {"uplink": count(1), "downlink": count(1), "link": count(1)}
    for kind, chosen in (("uplink", uplinks), ("downlink", downlinks), ("link", set())):
        for members in list(groups):
            if kind != "link" and not any((host.name, nic.name) in chosen for host, nic in members):
                continue
            groups.remove(members)
            number = next(numbers[kind])
            name = kind if number == 1 and kind != "link" else f"{kind}-{number}"
            networks = tuple(dict.fromkeys(network for _, nic in members for network in nic.networks))
            plugs = tuple(Plug(host.name, nic.name, nic.mac or "", nic.addresses) for host, nic in members)
            found.append((Link(name, networks, plugs), members))
    return found


def _groups(cluster: Cluster) -> list[list[tuple[Host, Interface]]]:
    """Interfaces that share a network, also by way of a third one. One without an address of its own is nowhere."""
    groups: list[list[tuple[Host, Interface]]] = []
    for host in cluster.hosts:
        for nic in host.interfaces:
            if not nic.addresses:
                continue
            same = [group for group in groups if any(set(nic.networks) & set(other.networks) for _, other in group)]
            for group in same:
                groups.remove(group)
            groups.append([member for group in same for member in group] + [(host, nic)])
    return groups


def _routed(link: Link, members: Sequence[tuple[Host, Interface]]) -> Link:
    """A link with the routers that its hosts name and are not."""
    own = {ip_interface(address).ip for _, nic in members for address in nic.addresses}
    named = []
    for _, nic in members:
        for router in (nic.gateway4, nic.gateway6, *(route.via for route in nic.routes)):
            if router is None or (address := ip_address(router)) in own:
                continue
            inside = (network.prefixlen for network in nic.networks if address in network)
            named.append(f"{address}/{next(inside, 64)}")  # none: an IPv6 router by its link-local address
    if not named:
        return link
    name = ROUTER if link.name.startswith("uplink") else CORE
    plug = Plug(name, link.name, addresses=tuple(dict.fromkeys(named)))
    return Link(link.name, link.networks, (*link.plugs, plug))


def _clients(links: Sequence[Link], cluster: Cluster, clients: int) -> Link:
    """The link between clients and the uplink router."""
    used = [*(network for link in links for network in link.networks), *cluster.vip_prefixes]
    networks: list[Network] = []
    for choice in _FOR_CLIENTS:
        free = (ip_network(text) for text in choice)
        networks += [n for n in free if not any(u.version == n.version and u.overlaps(n) for u in used)][:1]

    def addresses(number: int) -> tuple[str, ...]:
        return tuple(f"{network[number]}/{network.prefixlen}" for network in networks)

    plugs = [Plug(f"client-{n + 1}", "eth0", addresses=addresses(_FIRST_CLIENT + n)) for n in range(clients)]
    return Link(CLIENTS, tuple(networks), (*plugs, Plug(ROUTER, CLIENTS, addresses=addresses(1))))


def link_local(mac: str) -> str:
    """The link-local address that Linux makes of a hardware address (RFC 4291, appendix A)."""
    first, *rest = bytes.fromhex(mac.replace(":", ""))
    return str(IPv6Address(b"\xfe\x80" + bytes(6) + bytes([first ^ 2, *rest[:2], 0xFF, 0xFE, *rest[2:]])))


def control_mac(number: int) -> str:
    """The hardware address of the control NIC of a lab's machine, counted from 0."""
    return f"{_CONTROL_MAC}{number:02x}"
