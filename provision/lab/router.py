"""The uplink router: Debian's own FRR, the border between the area that directors are in and the clients' network.

But for ospf6d, which is ours: Debian 12's, of FRR 8.4.4, goes on sending to the director that was the first to announce
an IPv6 VIP after that one has withdrawn it (FRRouting's issue 13579; tools/quagga has a patch).
"""

from __future__ import annotations

from ipaddress import ip_interface

from provision.lab.topology import CLIENTS, ROUTER, Link, Topology
from provision.model import Cluster, Ospf

_BACKBONE = "0.0.0.0"  # noqa: S104  OSPF's area, no address
DAEMONS = ("zebra", "ospfd", "ospf6d")
OURS = "/mnt"  # where the router finds a root file system with our routing daemons
# Each connection takes its own way, by addresses, protocol and ports (the kernel's fields 1, 2, 4, 16 and 32), as the
# router of a balancers' cluster is told to. Policy 1 is the same on the wire only: from a client on this machine it
# takes the socket's hash instead, which is another one for each SYN that is sent again, so that lost ones would find a
# way that no client on a cable has.
SYSCTL = (
    "net.ipv4.ip_forward=1",
    "net.ipv6.conf.all.forwarding=1",
    *(f"net.ipv{version}.fib_multipath_hash_policy=3" for version in (4, 6)),
    *(f"net.ipv{version}.fib_multipath_hash_fields=55" for version in (4, 6)),
)


def needs_ours(cluster: Cluster) -> bool:
    """Whether the router has an ospf6d."""
    return cluster.mode == "ospf" and any(prefix.version == 6 for prefix in cluster.vip_prefixes)


def configuration(topology: Topology, cluster: Cluster) -> dict[str, str]:
    """The daemons' files below /etc/frr, by name; none in mode vrrp, where the router learns nothing.

    The cluster's secrets must have been read: OSPF's key is in there.
    """
    ospf = cluster.ospf
    if cluster.mode != "ospf" or ospf is None:
        return {}
    uplinks = [link for link, _ in topology.plugs(ROUTER) if link.name != CLIENTS]
    # With one side only it would be no border, and send no default route into a stub area.
    outside = _BACKBONE if _number(ospf.area) != 0 else ospf.area
    identity = topology.address(ROUTER, uplinks[0].name, 4)
    head = f"hostname {ROUTER}\nlog file /run/frr/log\n"
    files = {"vtysh.conf": "", "zebra.conf": head}
    files["ospfd.conf"] = head + _ospfd(topology, uplinks, ospf, identity, outside)
    if needs_ours(cluster):
        files["ospf6d.conf"] = head + _ospf6d(uplinks, ospf, identity, outside)
    return files


def _ospfd(topology: Topology, uplinks: list[Link], ospf: Ospf, identity: str, outside: str) -> str:
    lines = []
    for link in uplinks:
        lines.append(f"interface {link.name}")
        if ospf.key is not None:
            lines.append(f" ip ospf message-digest-key {ospf.key_id} md5 {ospf.key.value}")
        lines += [f" ip ospf hello-interval {ospf.hello_interval}", f" ip ospf dead-interval {ospf.dead_interval}"]
    lines += ["router ospf", f" ospf router-id {identity}"]
    lines.append(f" auto-cost reference-bandwidth {ospf.reference_bandwidth}")
    for link, plug in topology.plugs(ROUTER):
        area = outside if link.name == CLIENTS else ospf.area
        networks = dict.fromkeys(a.network for a in map(ip_interface, plug.addresses) if a.version == 4)
        lines += [f" network {network} area {area}" for network in networks]
    lines.append(f" passive-interface {CLIENTS}")
    if ospf.key is not None:
        lines.append(f" area {ospf.area} authentication message-digest")
    lines.append(f" area {ospf.area} stub no-summary" if ospf.stub else " default-information originate always")
    return "\n".join(lines) + "\n"


def _ospf6d(uplinks: list[Link], ospf: Ospf, identity: str, outside: str) -> str:
    lines = []
    for link in uplinks:
        lines += [f"interface {link.name}", f" ipv6 ospf6 area {ospf.area}"]
        lines.append(f" ipv6 ospf6 hello-interval {ospf.hello_interval}")
        lines.append(f" ipv6 ospf6 dead-interval {ospf.dead_interval}")
        if ospf.key is not None:
            lines.append(f" ipv6 ospf6 authentication key-id {ospf.key_id} hash-algo md5 key {ospf.key.value}")
    lines += [f"interface {CLIENTS}", f" ipv6 ospf6 area {outside}"]
    lines += ["router ospf6", f" ospf6 router-id {identity}"]
    lines.append(f" auto-cost reference-bandwidth {ospf.reference_bandwidth}")
    lines.append(f" area {ospf.area} stub no-summary" if ospf.stub else " default-information originate always")
    return "\n".join(lines) + "\n"


def _number(area: str) -> int:
    """An area, written as a number or like an address."""
    if area.isdigit():
        return int(area)
    total = 0
    for part in area.split("."):
        total = total * 256 + int(part)
    return total


def start_script() -> str:
    """What starts the daemons that have a configuration, in the router's namespaces."""
    lines = ["install -d -o frr -g frr /run/frr"]
    for daemon in DAEMONS:
        program = f"/usr/lib/frr/{daemon}"
        if daemon == "ospf6d":
            program = f"LD_LIBRARY_PATH={OURS}/usr/lib/frr {OURS}/usr/sbin/{daemon}"
        lines.append(f"[ ! -e /etc/frr/{daemon}.conf ] || {program} -d -f /etc/frr/{daemon}.conf")
    return "\n".join(lines) + "\n"


def static_routes(topology: Topology, cluster: Cluster) -> list[str]:
    """What `ip` is told in mode vrrp: VIPs are neighbours on the uplink, whoever has them."""
    if cluster.mode == "ospf":
        return []
    uplinks = [link for link, _ in topology.plugs(ROUTER) if link.name != CLIENTS]
    connected = {network for link in uplinks for network in link.networks}
    return [
        f"route replace {prefix} dev {uplinks[0].name}" for prefix in cluster.vip_prefixes if prefix not in connected
    ]
