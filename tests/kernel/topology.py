"""The usual topology of a test: clients, a director with IPVS, real servers, all with both families."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tests.kernel.lab import Lab, Namespace
from tests.kernel.machine import Done

FAMILIES = (4, 6)
PREFIX = {4: 24, 6: 64}
HOST = {4: 32, 6: 128}
# Of each network the addresses up to the host's number.
FRONT = {4: "198.51.100.", 6: "2001:db8:1::"}  # clients
BACK = {4: "10.0.2.", 6: "fd00:2::"}  # real servers and local addresses
VIP = {4: "192.0.2.", 6: "2001:db8:8::"}  # routed by the director's front address
FAR_FRONT = {4: "203.0.113.", 6: "2001:db8:3::"}  # clients behind a router
FAR_BACK = {4: "10.0.3.", 6: "fd00:3::"}  # real servers behind a router
DIRECTOR, ROUTER, FIRST_HOST, FIRST_LOCAL = 1, 2, 11, 200
KINDS = ("plain", "vlan", "bond", "bridge", "vrf")  # how the director hangs on its links


def service(address: str, port: int) -> str:
    """`192.0.2.1:80` or `[2001:db8:8::1]:80`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def url(address: str, path: str = "/", port: int = 80) -> str:
    """For curl."""
    return f"http://{service(address, port)}{path}"


@dataclass(frozen=True)
class Connection:
    """A row of /proc/net/ip_vs_conn.

    Attributes:
        protocol: `TCP`, `UDP`, …, or `IP` for a template of a firewall mark.
        client, cport, vip, vport, server, sport: as the columns say.
        state: `ESTABLISHED`, …
        expires: seconds.
        local, lport: the local address of a FULLNAT connection, else "" and 0.
        line: the row.
    """

    protocol: str
    client: str
    cport: int
    vip: str
    vport: int
    server: str
    sport: int
    state: str
    expires: int
    local: str
    lport: int
    line: str

    @classmethod
    def parse(cls, line: str) -> Connection:
        """Read one row."""
        words = line.split()
        client, vip, server = (_address(words[n]) for n in (1, 3, 5))
        ports = [int(words[n], 16) for n in (2, 4, 6)]
        local, lport = ("", 0)
        if len(words) >= 13:
            local, lport = _address(words[11]), int(words[12], 16)
        return cls(
            words[0], client, ports[0], vip, ports[1], server, ports[2], words[7], int(words[8]), local, lport, line
        )


def _address(text: str) -> str:
    """`C0000201` or `2001:0db8:…` as addresses are written."""
    if ":" in text:
        return str(ipaddress.IPv6Address(text.strip("[]")))
    return str(ipaddress.IPv4Address(int(text, 16)))


class Director(Namespace):
    """The host that balances."""

    def ipvsadm(self, *words: str, check: bool = True) -> Done:
        """Our ipvsadm."""
        return self.run("ipvsadm", *words, check=check)

    def connections(self) -> list[Connection]:
        """What IPVS knows of connections, templates included."""
        return [Connection.parse(line) for line in self.read("/proc/net/ip_vs_conn").splitlines()[1:]]

    def ext_stats(self) -> dict[str, int]:
        """The counters of FULLNAT, each over all CPUs."""
        rows = (line.split() for line in self.read("/proc/net/ip_vs_ext_stats").splitlines())
        return {row[0].rstrip(":"): sum(int(n) for n in row[1:]) for row in rows if len(row) > 1 and row[1].isdigit()}

    def destinations(self) -> dict[str, tuple[str, int, int, int]]:
        """Of every real server in /proc/net/ip_vs: method, weight, active and inactive connections.

        A server that serves several services stands here once, with its last service's values.
        """
        pattern = re.compile(r"^\s+->\s+(\S+)\s+(\S+)\s+(\d+)\s+(\d+)\s+(\d+)\s*$", re.M)
        found = {}
        for where, method, *numbers in pattern.findall(self.read("/proc/net/ip_vs")):
            host, _, port = where.rpartition(":")
            weight, active, inactive = (int(n) for n in numbers)
            found[service(_address(host), int(port, 16))] = (method, weight, active, inactive)
        return found

    def ip_vs_sysctl(self, name: str, value: int | None = None) -> str:
        """A sysctl of IPVS, by its last word."""
        return self.sysctl(f"net.ipv4.vs.{name}", value)


class Site:
    """The topology; see the picture in lab.py.

    Args:
        lab: takes the namespaces.
        arms: 2: clients and real servers on two links; 1: all on one.
        clients, servers: how many.
        kind: how the director hangs on its links (`KINDS`).
        mtu: of the director's links and everything on them.
        name: before the names of its namespaces, where one test has two.
        gateway: real servers send what they do not know to the director, as NAT needs; FULLNAT needs no route.
    """

    def __init__(
        self,
        lab: Lab,
        *,
        arms: int = 2,
        clients: int = 1,
        servers: int = 2,
        kind: str = "plain",
        mtu: int = 1500,
        name: str = "",
        gateway: bool = False,
    ) -> None:
        self.lab = lab
        self.mtu = mtu
        self.switch = lab.namespace(f"{name}switch")
        self.director = Director(lab, f"{name}director")
        lab.members[self.director.name] = self.director
        self.clients = [lab.namespace(f"{name}client{n}") for n in range(clients)]
        self.servers = [lab.namespace(f"{name}server{n}") for n in range(servers)]
        self.links = ("front", "back")[:arms]
        self.front, self.back = "front", self.links[-1]
        self._wire_up(kind)
        self._address(kind, gateway=gateway)

    # -- addresses

    def vip(self, family: int, number: int = 0) -> str:
        """A virtual address; it is on the director's loopback."""
        return f"{VIP[family]}{1 + number}"

    def client(self, family: int, number: int = 0) -> str:
        """A client's address."""
        return f"{FRONT[family]}{FIRST_HOST + number}"

    def server(self, family: int, number: int = 0) -> str:
        """A real server's address."""
        return f"{BACK[family]}{FIRST_HOST + number}"

    def local(self, family: int, number: int = 0) -> str:
        """A local address for FULLNAT; the director has four of each family."""
        return f"{BACK[family]}{FIRST_LOCAL + number}"

    def director_address(self, family: int, *, back: bool = False) -> str:
        """The director's own address on the clients' link, or on the real servers'."""
        return f"{(BACK if back else FRONT)[family]}{DIRECTOR}"

    def addresses(self, family: int) -> list[str]:
        """Of all real servers."""
        return [self.server(family, number) for number in range(len(self.servers))]

    # -- building

    def _wire_up(self, kind: str) -> None:
        switch = []
        for link in self.links:
            switch.append(f"link add br-{link} type bridge forward_delay 0 mcast_snooping 0")
            switch.append(f"link set br-{link} mtu {self.mtu} up")
        ends = [(c, "front") for c in self.clients] + [(s, self.back) for s in self.servers]
        for member, link in ends:
            switch += self.cable(member, "eth0", link, member.name)
        for link in self.links:
            for port in ("a", "b") if kind == "bond" else ("a",):
                bare = f"{link}-{port}" if kind in ("vlan", "bond", "bridge") else link
                name = f"d-{link}-{port}"
                switch += self.cable(self.director, bare, "" if kind == "vlan" else link, name)
                if kind == "vlan":
                    switch.append(f"link add link {name} name {name}.7 type vlan id 7")
                    switch.append(f"link set {name}.7 mtu {self.mtu} master br-{link} up")
        self.switch.ip(*switch)

    def cable(self, member: Namespace, device: str, link: str, port: str) -> list[str]:
        """Lines for the switch: a cable between a new port of it, on a link, and a new device of a namespace."""
        lines = [
            f"link add {port} mtu {self.mtu} type veth peer name {device} netns {member.handle} mtu {self.mtu}",
            f"link set {port} {f'master br-{link}' if link else ''} up",
        ]
        return lines

    def _director_links(self, kind: str) -> list[str]:
        lines = []
        for link in self.links:
            if kind == "vlan":
                lines += [f"link set {link}-a up", f"link add link {link}-a name {link} type vlan id 7"]
            elif kind == "bond":
                lines.append(f"link add {link} type bond mode active-backup miimon 100")
                lines += [f"link set {link}-{port} master {link}" for port in "ab"]
            elif kind == "bridge":
                lines.append(f"link add {link} type bridge forward_delay 0 mcast_snooping 0")
                lines.append(f"link set {link}-a master {link} up")
            lines.append(f"link set {link} mtu {self.mtu} up")
        if kind == "vrf":
            lines += ["link add vrf0 type vrf table 10", "link set vrf0 up", "link set front master vrf0"]
        return lines

    def _address(self, kind: str, *, gateway: bool) -> None:
        lines = []
        for f in FAMILIES:
            lines.append(f"addr add {FRONT[f]}{DIRECTOR}/{PREFIX[f]} dev {self.front}")
            lines.append(f"addr add {BACK[f]}{DIRECTOR}/{PREFIX[f]} dev {self.back}")
            lines += [f"addr add {self.vip(f, n)}/{HOST[f]} dev {'vrf0' if kind == 'vrf' else 'lo'}" for n in range(2)]
            lines += [f"addr add {self.local(f, n)}/{HOST[f]} dev {self.back}" for n in range(4)]
        self._director_lines = lines
        jobs = [self.director.start_ip(*self._director_links(kind), *lines)]
        jobs += [client.start_ip(*self._front_lines(number)) for number, client in enumerate(self.clients)]
        for number, server in enumerate(self.servers):
            ours = [f"addr add {self.server(f, number)}/{PREFIX[f]} dev eth0" for f in FAMILIES]
            ours += ["link set eth0 up", *(f"route add default via {BACK[f]}{DIRECTOR}" for f in FAMILIES if gateway)]
            jobs.append(server.start_ip(*ours))
        for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            self.director.sysctl(key, 1)
        for job in jobs:
            job.wait()

    def restore_addresses(self) -> None:
        """Give the director its IPv6 addresses again, which a device loses when it goes down."""
        self.director.ip(*(line.replace(" add ", " replace ") for line in self._director_lines if ":" in line))

    def join_front(self, client: Namespace, number: int) -> None:
        """Addresses of a client, and its way to the virtual addresses."""
        client.ip(*self._front_lines(number))

    def _front_lines(self, number: int) -> list[str]:
        lines = ["link set eth0 up"]
        for f in FAMILIES:
            lines.append(f"addr add {self.client(f, number)}/{PREFIX[f]} dev eth0")
            lines.append(f"route add {network(VIP[f])} via {FRONT[f]}{DIRECTOR}")
        return lines

    def bare(self, name: str, *, back: bool = False) -> Namespace:
        """A host whose device eth0 has no address: its packets are made by the test, with `Namespace.wire`."""
        member = self.lab.namespace(name)
        self.switch.ip(*self.cable(member, "eth0", self.back if back else self.front, name))
        member.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
        member.ip("link set eth0 arp off up")
        return member

    def neighbour(self, addresses: Sequence[str], mac: str, *, back: bool) -> None:
        """Tell the director where the addresses of a bare host are."""
        device = self.back if back else self.front
        self.director.ip(*(f"neigh replace {each} lladdr {mac} dev {device} nud permanent" for each in addresses))

    def routed_client(self, mtu: int) -> Namespace:
        """A client behind a router that sends it only packets up to `mtu`, and takes larger ones from nobody."""
        return self._routed("far", "front", FRONT, FAR_FRONT, mtu)

    def routed_server(self, mtu: int) -> Namespace:
        """A real server behind such a router."""
        return self._routed("farserver", self.back, BACK, FAR_BACK, mtu)

    def _routed(self, name: str, link: str, near: dict[int, str], far: dict[int, str], mtu: int) -> Namespace:
        router, member = self.lab.namespace(f"{name}-router"), self.lab.namespace(name)
        self.switch.ip(*self.cable(router, "near", link, f"{name}-near"))
        # Only the router's end is narrow: the host beyond must not say so itself, in the MSS that it announces.
        lines = [f"link add away mtu {mtu} type veth peer name eth0 netns {member.handle} mtu {self.mtu}"]
        lines += ["link set near up", "link set away up"]
        theirs = ["link set eth0 up"]
        for f in FAMILIES:
            lines.append(f"addr add {near[f]}{ROUTER}/{PREFIX[f]} dev near")
            lines.append(f"addr add {far[f]}{DIRECTOR}/{PREFIX[f]} dev away")
            lines.append(f"route add {network(VIP[f])} via {near[f]}{DIRECTOR}")
            theirs.append(f"addr add {far[f]}{FIRST_HOST}/{PREFIX[f]} dev eth0")
            theirs.append(f"route add default via {far[f]}{DIRECTOR}")
        router.ip(*lines)
        member.ip(*theirs)
        for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            router.sysctl(key, 1)
        self.director.ip(*(f"route add {network(far[f])} via {near[f]}{ROUTER}" for f in FAMILIES))
        return member

    # -- services

    def serve(self, *, port: int = 80, size: int = 0) -> None:
        """nginx on every real server."""
        for server in self.servers:
            server.serve(port=port, size=size)

    def echo(self, *, port: int = 53) -> None:
        """A UDP server on every real server."""
        for server in self.servers:
            server.echo(port=port)

    def balance(
        self,
        family: int,
        method: str,
        *,
        port: int = 80,
        to: int | None = None,
        protocol: str = "tcp",
        scheduler: str = "rr",
        options: tuple[str, ...] = (),
        locals_: int = 0,
        servers: Sequence[str] | None = None,
    ) -> str:
        """A service on the virtual address with all real servers behind it.

        Args:
            family: 4 or 6.
            method: of forwarding, as ipvsadm says it: `-m`, `-g`, `-i`, `-b`.
            port: of the service.
            to: of the real servers; the same one if not given.
            protocol: `tcp` or `udp`.
            scheduler: its name.
            options: more words for the service.
            locals_: how many local addresses it gets.
            servers: addresses of the real servers, if they are others than those of the topology.

        Returns:
            The service as ipvsadm names it.
        """
        where, kind = service(self.vip(family), port), f"-{protocol[0]}"
        lines = [" ".join(["-A", kind, where, "-s", scheduler, *options])]
        lines += [f"-P {kind} {where} -z {self.local(family, n)}" for n in range(locals_)]
        lines += [
            f"-a {kind} {where} -r {service(address, to or port)} {method}"
            for address in (self.addresses(family) if servers is None else servers)
        ]
        self.director.run("ipvsadm", "-R", stdin="".join(f"{line}\n" for line in lines))
        return where


def network(start: str) -> str:
    """`192.0.2.0/24` of `192.0.2.`."""
    return f"{start}0/24" if start.endswith(".") else f"{start}/64"
