"""What the nodes of a lab say of themselves, just now."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import BuildError
from provision import ipvs
from provision.lab.lab import Lab
from provision.lab.machines import WEB
from provision.lab.topology import Node, link_local

UP, STARTING, TROUBLED, DOWN = "up", "starting", "troubled", "down"
_SECONDS = 15.0  # under KVM, for an answer over ssh


@dataclass(frozen=True)
class Seen:
    """A node as it is.

    Attributes:
        state: up, starting (no answer yet), troubled (something of it is not as it should be), or down.
        facts: what it says, a line each.
        cut: its interfaces without a carrier.
    """

    state: str
    facts: tuple[str, ...] = ()
    cut: tuple[str, ...] = field(default=())


_SECTION = "=== "
_ADDRESSES, _TABLE, _UNITS, _LOG = "addresses", "table", "units", "log"
_ROUTES4, _ROUTES6, _NEIGHBOURS = "routes4", "routes6", "neighbours"


def _script(commands: Mapping[str, str]) -> str:
    return "\n".join(f"echo '{_SECTION}{name}'; {command} 2>/dev/null || :" for name, command in commands.items())


_DIRECTOR = _script(
    {
        _ADDRESSES: "ip -j address show",
        _TABLE: "ipvsadm -Ln",
        _UNITS: "for u in keepalived zebra ospfd ospf6d; do systemctl -q is-enabled $u && "
        'echo "$u $(systemctl show -P ConditionResult $u) $(systemctl is-active $u)"; done',
    }
)
_REAL_SERVER = _script(
    {
        _ADDRESSES: "ip -j address show",
        _UNITS: f'echo "{WEB} yes $(systemctl is-active {WEB})"',
        _LOG: "wc -l </var/log/web.log",
    }
)
_ROUTER = _script(
    {
        _ADDRESSES: "ip -j address show",
        _ROUTES4: "ip -j -4 route show",
        _ROUTES6: "ip -j -6 route show",
        _NEIGHBOURS: "vtysh -d ospfd -c 'show ip ospf neighbor json'",
    }
)


def sections(text: str) -> dict[str, str]:
    """What a script printed, by its sections."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith(_SECTION):
            name = line.removeprefix(_SECTION)
            found[name] = ""
        elif name:
            found[name] += line + "\n"
    return found


def parsed(text: str) -> Any:
    """JSON that a program printed; an empty list where it printed none."""
    try:
        return json.loads(text)
    except ValueError:
        return []


def look(lab: Lab) -> dict[str, Seen]:
    """Ask all nodes at once, and judge them by the services that the lab's cluster file has now.

    Raises:
        BuildError: that file is wrong.
    """
    nodes, urls = lab.topology.nodes, lab.urls()
    vips = list(dict.fromkeys(str(vip) for service in lab.services for vip in service.vips))
    with ThreadPoolExecutor(max_workers=len(nodes)) as pool:
        found = pool.map(lambda node: _see(lab, node, vips, urls), nodes)
        return dict(zip((node.name for node in nodes), found, strict=True))


def _see(lab: Lab, node: Node, vips: Sequence[str], urls: Sequence[str]) -> Seen:
    if node.name not in lab.state.alive:
        return Seen(DOWN, ("does not run",))
    kinds: Mapping[str, tuple[str, Callable[[dict[str, str]], Seen]]] = {
        "director": (_DIRECTOR, lambda said: director(said, vips)),
        "realserver": (_REAL_SERVER, real_server),
        "router": (_ROUTER, lambda said: router(said, _owners(lab), vips, ospf=lab.cluster.mode == "ospf")),
        "core": (_script({_ADDRESSES: "ip -j address show"}), lambda said: Seen(UP, cut=_cut(said))),
        "client": (_pages(urls), client),
    }
    script, judge = kinds[node.kind]
    try:
        answer = lab.try_to(node.name, script, seconds=_SECONDS)
    except BuildError as error:
        return Seen(STARTING, (error.message,))
    if _SECTION not in answer.stdout:
        return Seen(STARTING, ("does not answer yet",))
    return judge(sections(answer.stdout))


def _pages(urls: Sequence[str]) -> str:
    # All at once: one after another, those without an answer take longer than a node has. What curl says is one write.
    ask = "curl -gs -m 3 --noproxy '*' -o /dev/null -w '{1}{0}\\n%{{http_code}}\\n' '{0}' &"
    return "\n".join([*(ask.format(url, _SECTION) for url in urls), "wait"])


def client(said: Mapping[str, str]) -> Seen:
    """A client, by the status of each page."""
    bad = [
        f"{url}: {code.strip() if code.strip() != '000' else 'no answer'}"
        for url, code in sorted(said.items())
        if code.strip() != "200"
    ]
    return Seen(TROUBLED, tuple(bad)) if bad else Seen(UP, (f"{len(said)} of {len(said)} pages",))


def _cut(said: Mapping[str, str]) -> tuple[str, ...]:
    links = parsed(said.get(_ADDRESSES, ""))
    return tuple(
        link["ifname"] for link in links if "NO-CARRIER" in link.get("flags", ()) or link.get("operstate") == "DOWN"
    )


def _bound(said: Mapping[str, str]) -> list[str]:
    """The addresses of hosts, without a network: VIPs and local addresses, by how they are bound."""
    links = parsed(said.get(_ADDRESSES, ""))
    return [each["local"] for link in links for each in link["addr_info"] if each["prefixlen"] in (32, 128)]


def _troubled_units(said: Mapping[str, str]) -> list[str]:
    rows = (line.split() for line in said.get(_UNITS, "").splitlines())
    # A unit whose configuration is not there is off, and that is right.
    return [f"{name} is {state}" for name, wanted, state in rows if wanted == "yes" and state != "active"]


def director(said: Mapping[str, str], vips: Sequence[str]) -> Seen:
    """A director, by its addresses, table and units.

    Args:
        said: the sections of its answer.
        vips: of the cluster.
    """
    troubles = _troubled_units(said)
    bound = set(_bound(said))
    mine = [vip for vip in vips if vip in bound]
    facts = ["VIPs: " + (", ".join(mine) if mine else "none")]
    table = ipvs.read(said.get(_TABLE, ""), "")
    for service, rows in table.rows.items():
        well = sum(row.weight > 0 for row in rows.values())
        active = sum(row.active for row in rows.values())
        facts.append(f"{service}: {well} of {len(rows)} real servers, {active} connections")
        troubles += [f"{service}: {name} has weight 0" for name, row in rows.items() if row.weight == 0]
    if not table.rows:
        troubles.append("no service in the kernel")
    cut = _cut(said)
    troubles += [f"{nic} has no carrier" for nic in cut]
    return Seen(TROUBLED if troubles else UP, (*facts, *troubles), cut)


def real_server(said: Mapping[str, str]) -> Seen:
    """A real server, by its addresses, unit and log."""
    troubles, cut = _troubled_units(said), _cut(said)
    troubles += [f"{nic} has no carrier" for nic in cut]
    answered = said.get(_LOG, "").strip() or "0"
    return Seen(TROUBLED if troubles else UP, (f"answered {answered} requests", *troubles), cut)


def _owners(lab: Lab) -> dict[str, str]:
    """The directors by the addresses that routes name."""
    owners: dict[str, str] = {}
    for host in lab.cluster.directors:
        # OSPF for IPv6 names a next hop by its link-local address.
        local = [link_local(nic.mac) for nic in host.interfaces if nic.mac]
        owners.update(dict.fromkeys([*map(str, host.own_addresses), *local], host.name))
    return owners


def router(said: Mapping[str, str], owners: Mapping[str, str], vips: Sequence[str], *, ospf: bool) -> Seen:
    """The uplink router, by its routes and neighbours.

    Args:
        said: the sections of its answer.
        owners: directors by their addresses.
        vips: of the cluster.
        ospf: whether it is to have learnt routes.
    """
    facts, troubles = [], []
    cut = _cut(said)
    if ospf:
        neighbours = parsed(said.get(_NEIGHBOURS, "")) or {}
        states = _neighbour_states(neighbours)
        facts.append(
            "OSPF: " + (", ".join(f"{owners.get(who, who)} {word}" for who, word in states.items()) or "nobody")
        )
        routes = next_hops(said)
        for vip in vips:
            ways = routes.get(vip, [])
            facts.append(f"{vip} → {', '.join(owners.get(way, way) for way in ways) or 'nowhere'}")
            troubles += [] if ways else [f"no route to {vip}"]
    troubles += [f"{nic} has no carrier" for nic in cut]
    return Seen(TROUBLED if troubles else UP, (*facts, *troubles), cut)


def _neighbour_states(data: Any) -> dict[str, str]:
    """Neighbours by address, each with its state; FRR nests them in `neighbors` or not, a list each."""
    found: dict[str, str] = {}
    for entries in (data.get("neighbors", data) if isinstance(data, dict) else {}).values():
        for each in entries if isinstance(entries, list) else []:
            state = str(each.get("nbrState") or each.get("state") or "?").split("/")[0]
            found[str(each.get("ifaceAddress") or each.get("address"))] = state
    return found


def next_hops(said: Mapping[str, str]) -> dict[str, list[str]]:
    """Where the router sends packets for each destination: addresses, or interfaces for what is a neighbour."""
    found: dict[str, list[str]] = {}
    for name in (_ROUTES4, _ROUTES6):
        for route in parsed(said.get(name, "")):
            ways = route.get("nexthops") or [route]
            hops = [str(way.get("gateway") or way.get("via", {}).get("host") or way.get("dev")) for way in ways]
            found.setdefault(str(route["dst"]), []).extend(hops)
    return found
