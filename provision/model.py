"""What a cluster file becomes: values that every module takes once `provision.cluster` has read and judged it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import collapse_addresses, ip_network
from pathlib import Path
from typing import Any

from pipeline.errors import BuildError
from provision.host import Address, Host, Interface, Network
from provision.pools import Pool
from provision.secret import Secret

# The operations manual's /etc/sysctl.conf: section 1c for its cluster mode, 2c for master/backup.
MODE_SYSCTL: Mapping[str, Mapping[str, str]] = {
    "ospf": {
        "net.ipv4.conf.all.arp_ignore": "1",
        "net.ipv4.conf.all.arp_announce": "2",
        "net.core.netdev_max_backlog": "500000",
    },
    "vrrp": {"net.core.netdev_max_backlog": "500000"},
}

# The protocol of the routes of /etc/lvs/vips.routes, by which they are told from others: a number that nobody in
# iproute2's rt_protos has.
BLACKHOLES = 254

# Whether the programs of toa-bpf are loaded, for root's shell: of the links that there always are, the last to be made.
# The unit does not know: stopping it leaves them in place, and `toa-bpf unload` leaves it active.
TOA_BPF_LOADED = "[ -e /sys/fs/bpf/toa/link_toa_sockops ]"
# Whether they run, too: a pinned link outlives the cgroup that it is attached to.
TOA_BPF_RUNS = f"{{ {TOA_BPF_LOADED} && toa-bpf stats >/dev/null 2>&1; }}"


# --- hosts


@dataclass(frozen=True, kw_only=True)
class Director(Host):
    """A host that balances.

    Attributes:
        mode: ospf or vrrp.
        slot: its place in every pool.
        uplink, downlink: names of interfaces.
        extra: addresses beyond its share, by pool.
        local_addresses: all it has, by pool, in the order in which they are rendered.
        router_id: OSPF's.
        priority: VRRP's; 0 in mode ospf.
        irq_cpus: whose CPUs take interrupts, or "" for the image's own choice.
        hostnames: of zebra and ospfd.
    """

    mode: str
    slot: int
    uplink: str
    downlink: str
    extra: Mapping[str, tuple[Address, ...]] = field(default_factory=dict)
    local_addresses: Mapping[str, tuple[Address, ...]] = field(default_factory=dict)
    router_id: str = ""
    priority: int = 0
    irq_cpus: str = ""
    hostnames: Mapping[str, str] = field(default_factory=dict)

    @property
    def role(self) -> str:
        return "director"

    @property
    def kernel_settings(self) -> Mapping[str, str]:
        return {**MODE_SYSCTL[self.mode], **self.sysctl}

    @property
    def all_local_addresses(self) -> tuple[Address, ...]:
        """Those of all pools."""
        return tuple(address for share in self.local_addresses.values() for address in share)

    def interface(self, name: str) -> Interface:
        """One of its NICs."""
        return next(nic for nic in self.interfaces if nic.name == name)


@dataclass(frozen=True, kw_only=True)
class RealServer(Host):
    """A host that runs the real server's image.

    Attributes:
        trusted: whom TOA believes: all local addresses, as prefixes.
    """

    trusted: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        return "realserver"

    @property
    def kernel_settings(self) -> Mapping[str, str]:
        return {**({"net.toa.trusted": ",".join(self.trusted)} if self.trusted else {}), **self.sysctl}


# --- what they serve


@dataclass(frozen=True)
class Check:
    """How a real server's health is checked; None is "not said".

    Attributes:
        kind: tcp, http, https or none.
        connect_timeout, delay_before_retry: seconds.
        retries: further tries before it counts as down.
        port: where; the real server's own where None.
        path, status, host: of http and https.
    """

    kind: str
    connect_timeout: int = 5
    retries: int | None = None
    delay_before_retry: int | None = None
    port: int | None = None
    path: str = ""
    status: int = 200
    host: str | None = None

    def revival(self, delay_loop: int) -> int:
        """Seconds in which keepalived has found a real server again at the latest, once it can be reached.

        A try under way has its time-out, and the next comes after a round. By HTTP the page that failed is asked for
        first, and all pages a round later (check_http.c, epilog); its delay_before_retry is 3 s where none is said.
        """
        if self.kind == "none":
            return 0
        if self.kind == "tcp":
            return self.connect_timeout + delay_loop
        retry = 3 if self.delay_before_retry is None else self.delay_before_retry
        return self.connect_timeout + max(delay_loop, retry) + delay_loop


@dataclass(frozen=True)
class Destination:
    """A real server of a service."""

    address: Address
    port: int
    weight: int
    inhibit_on_failure: bool
    check: Check


@dataclass(frozen=True)
class Service:
    """A virtual service; the attributes are the keys of the schema, with their defaults filled in.

    Attributes:
        pool: the local addresses' group; None where it does not forward by FNAT.
        bind_device: where keepalived itself binds and counts VIPs; None where scripts do so, or VRRP.
        directors: names of those that serve it.
        sorry: at most one of each family.
    """

    name: str
    vips: tuple[Address, ...]
    ports: tuple[int, ...]
    protocol: str
    scheduler: str
    forwarding: str
    pool: str | None
    syn_proxy: bool
    est_timeout: int | None
    persistence_timeout: int | None
    delay_loop: int
    alpha: bool
    omega: bool
    quorum: int | None
    hysteresis: int | None
    instance: str | None
    directors: tuple[str, ...]
    real_servers: tuple[Destination, ...]
    sorry: tuple[tuple[Address, int], ...]
    bind_device: str | None = None

    @property
    def versions(self) -> tuple[int, ...]:
        """The families of its VIPs."""
        return tuple(sorted({vip.version for vip in self.vips}))

    def group(self, version: int) -> str:
        """The name of the virtual server group of a family: keepalived does not mix them in one."""
        return self.name if self.versions[0] == version else f"{self.name}-v6"


@dataclass(frozen=True)
class Instance:
    """What moves VIPs between directors in mode vrrp; also, with `track`, when the other interface has no carrier."""

    name: str
    id: int
    interface: str
    advert_int: int
    password: Secret | None
    track: bool = False


@dataclass(frozen=True)
class Ospf:
    """How directors speak with the router in mode ospf; seconds and Mbit/s. No dr_priority leaves it to the daemons."""

    area: str
    stub: bool
    hello_interval: int
    dead_interval: int
    reference_bandwidth: int
    key_id: int = 0
    key: Secret | None = None
    dr_priority: int | None = None


@dataclass(frozen=True)
class Vty:
    """The password of the routing daemons' terminals."""

    password: Secret
    encrypted: bool


@dataclass(frozen=True)
class Cluster:
    """A cluster that has passed every rule."""

    path: Path
    mode: str
    vip_prefixes: tuple[Network, ...]
    directors: tuple[Director, ...]
    real_servers: tuple[RealServer, ...]
    services: tuple[Service, ...]
    pools: Mapping[str, Pool] = field(default_factory=dict)
    ospf: Ospf | None = None
    instances: tuple[Instance, ...] = ()
    vty: Vty | None = None

    @property
    def hosts(self) -> tuple[Host, ...]:
        """All hosts, directors first."""
        return (*self.directors, *self.real_servers)

    def chosen(self, names: tuple[str, ...]) -> tuple[Host, ...]:
        """The hosts of these names, in the order of the file; all without any.

        Raises:
            BuildError: one is not there.
        """
        known = {host.name for host in self.hosts}
        if unknown := [name for name in names if name not in known]:
            raise BuildError(
                f"{self.path} has no host {', '.join(unknown)}", f"choose among {', '.join(sorted(known)) or 'none'}"
            )
        return tuple(host for host in self.hosts if not names or host.name in names)

    def services_of(self, director: Director) -> tuple[Service, ...]:
        """What a director serves, in the order of the file."""
        return self._by_director.get(director.name, ())

    def passing(self, host: Host) -> tuple[Network, ...]:
        """The prefixes of VIPs that a director in mode vrrp drops packets for, while the VIP is on another one.

        Forwarded, they would come back from the router. On one arm they cannot be told from what real servers send, and
        where a prefix has other hosts in it from what is for those: on networks of the director's or that it knows the
        way to, real servers, sorry servers. Others in such a prefix, behind the director, get no packets by it.
        """
        if not isinstance(host, Director) or host.mode != "vrrp" or host.uplink == host.downlink:
            return ()
        others = [network for nic in host.interfaces for network in nic.networks]
        others += [ip_network(route.to) for nic in host.interfaces for route in nic.routes]
        others += [ip_network(address) for service in self.services for address, _ in service.sorry]
        others += [ip_network(each.address) for service in self.services for each in service.real_servers]
        others += [ip_network(address) for server in self.real_servers for address in server.own_addresses]
        return tuple(
            prefix
            for prefix in self.vip_prefixes
            if not any(prefix.version == other.version and prefix.overlaps(other) for other in others)
        )

    def withdrawable(self, host: Host) -> tuple[Address, ...]:
        """The VIPs that a director in mode ospf announces for as long as it has them, each once.

        When it withdraws one, routers go on sending until they have heard of it. What it does not know a way for then,
        by OSPF to another director, it drops: by its default route the packets would come back from the router.
        """
        if not isinstance(host, Director) or host.mode != "ospf":
            return ()
        return tuple(dict.fromkeys(vip for service in self.services_of(host) for vip in service.vips))

    @cached_property
    def _by_director(self) -> Mapping[str, tuple[Service, ...]]:
        found: dict[str, list[Service]] = {}
        for service in self.services:
            for name in service.directors:
                found.setdefault(name, []).append(service)
        return {name: tuple(served) for name, served in found.items()}


def trusted(pools: Mapping[str, Pool], directors: tuple[Director, ...]) -> tuple[str, ...]:
    """Whom a real server's TOA is to believe: whole pools, so that a new director changes nothing there."""
    networks = [network for pool in pools.values() for network in pool.networks()]
    extra = [address for director in directors for share in director.extra.values() for address in share]
    found = [str(item) for version in (4, 6) for item in _collapsed([*networks, *extra], version)]
    return tuple(text.removesuffix("/32" if ":" not in text else "/128") for text in found)


def _collapsed(items: list[Network | Address], version: int) -> Iterator[Network]:
    mine: Any = [item for item in items if item.version == version]
    yield from collapse_addresses(mine)
