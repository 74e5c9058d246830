"""Importance high: after every deployment and every operation (manual 1j, i)."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterable
from typing import Any

import pytest

from pipeline import run
from pipeline.errors import BuildError
from provision import ipvs
from provision.apply import MARK
from provision.checks.conftest import Ask, parsed
from provision.host import Host
from provision.model import BLACKHOLES, TOA_BPF_LOADED, TOA_BPF_RUNS, Cluster, Director, RealServer, Service

pytestmark = pytest.mark.importance("high")

# --- 命令 ip addr list: VIPs and local addresses


def vips_of(services: tuple[Service, ...]) -> set[str]:
    return {f"{vip}/{vip.max_prefixlen}" for service in services for vip in service.vips}


@pytest.mark.role("director", "ospf")
def test_vips_are_on_lo(addresses: dict[str, set[str]], services: tuple[Service, ...], table: ipvs.Table) -> None:
    """Every VIP whose service has its quorum, as this director's health checks see it; no other."""
    bound = addresses["lo"] - {"127.0.0.1/8", "::1/128"}
    wanted, able = set(), set()
    for service in services:
        mine = {ipvs.point(each.address, each.port) for each in service.real_servers}
        quorum, hysteresis = service.quorum or 1, service.hysteresis or 0
        for vip in service.vips:
            rows = table.rows.get(f"{service.protocol} {ipvs.point(vip, service.ports[0])}", {})
            weight = sum(row.weight for name, row in rows.items() if name in mine)
            wanted |= {f"{vip}/{vip.max_prefixlen}"} if weight >= quorum + hysteresis else set()
            # Between the two, it is as it was before.
            able |= {f"{vip}/{vip.max_prefixlen}"} if weight >= quorum - hysteresis else set()
    assert not wanted - bound, f"not on lo: {', '.join(sorted(wanted - bound))}"
    unknown = bound - vips_of(services)
    assert not unknown, f"on lo, in no service: {', '.join(sorted(unknown))}"
    assert not bound - able, f"on lo without a quorum: {', '.join(sorted(bound - able))}"


@pytest.mark.role("director", "vrrp")
def test_vips_are_where_the_master_is(
    addresses: dict[str, set[str]], services: tuple[Service, ...], director: Director, cluster: Cluster
) -> None:
    """All VIPs of an instance or none, on its interface and nowhere else."""
    for instance in cluster.instances:
        device = director.uplink if instance.interface == "uplink" else director.downlink
        wanted = vips_of(tuple(each for each in services if each.instance == instance.name))
        here = {name: bound & wanted for name, bound in addresses.items() if bound & wanted}
        assert here in ({}, {device: wanted}), (
            f"{instance.name}: {here}, and {device} is to have all of {wanted} or none"
        )


@pytest.mark.role("director", "vrrp")
def test_one_master_advertises(
    ask: Ask, addresses: dict[str, set[str]], services: tuple[Service, ...], director: Director, cluster: Cluster
) -> None:
    """Of each instance: this host, which then has the VIPs and hears no other one, or another, which it hears."""
    for instance in cluster.instances:
        vips = vips_of(tuple(each for each in services if each.instance == instance.name))
        if not vips:
            continue
        device = director.uplink if instance.interface == "uplink" else director.downlink
        seconds = 3 * instance.advert_int + 2
        dump = ask(f"timeout {seconds} tcpdump -i {device} -nn -l proto 112 2>/dev/null || [ $? = 124 ]")
        heard = re.findall(r"IP6? (\S+) > \S+: VRRPv[23], Advertisement, vrid (\d+),", dump)
        senders = {sender for sender, identity in heard if int(identity) == instance.id}
        others = senders - own_addresses(ask, director, device)
        if addresses.get(device, set()) & vips:
            assert not others, f"{instance.name}: VIPs are here, and {', '.join(sorted(others))} is master too"
            assert senders, f"{instance.name}: VIPs are here, and no advertisement on {device} in {seconds} s"
        else:
            assert others, f"{instance.name}: VIPs are not here, and no master is heard on {device} in {seconds} s"


def own_addresses(ask: Ask, director: Director, device: str) -> set[str | None]:
    """What the host sends from; routing and VRRP for IPv6 speak from the link's own address, which is in no file."""
    (link,) = parsed(ask(f"ip -j -6 address show dev {device} scope link")) or [{"addr_info": []}]
    return {str(address) for address in director.own_addresses} | {each.get("local") for each in link["addr_info"]}


@pytest.mark.role("director", "vrrp")
def test_packets_for_vips_elsewhere_are_dropped(ask: Ask, cluster: Cluster, director: Director) -> None:
    """Clients of a VIP that moves would be told that there is no way to it."""
    table = ask("nft list table inet lvs 2>/dev/null || :")
    rule = rf'iifname "{re.escape(director.uplink)}" ip6? daddr (\S+) .*\bdrop\b'
    found = {ipaddress.ip_network(prefix) for prefix in re.findall(rule, table)}
    wanted = set(cluster.passing(director))
    assert found == wanted, (
        f"dropped for {_sorted(found)}, not for {_sorted(wanted)} (nft -f /etc/lvs/vips.nft, rc.local)"
    )


@pytest.mark.role("director", "ospf")
def test_packets_for_withdrawn_vips_are_dropped(ask: Ask, cluster: Cluster, director: Director) -> None:
    """As the one before; a route to another director that has the VIP is better."""
    shown = [ask(f"ip -{family} -j route show type blackhole proto {BLACKHOLES}") for family in (4, 6)]
    found = {ipaddress.ip_address(route["dst"]) for text in shown for route in parsed(text)}
    wanted = set(cluster.withdrawable(director))
    assert found == wanted, (
        f"dropped for {_sorted(found)}, not for {_sorted(wanted)} (ip -force -batch /etc/lvs/vips.routes, rc.local)"
    )


def _sorted(networks: Iterable[object]) -> list[str]:
    return sorted(map(str, networks))


@pytest.mark.role("director")
def test_local_addresses_are_on_the_downlink(addresses: dict[str, set[str]], director: Director) -> None:
    wanted = {f"{address}/{address.max_prefixlen}" for address in director.all_local_addresses}
    bound = addresses.get(director.downlink, set())
    assert not wanted - bound, f"not on {director.downlink}: {', '.join(sorted(wanted - bound))}"
    elsewhere = {name: sorted(wanted & found) for name, found in addresses.items() if name != director.downlink}
    assert not any(elsewhere.values()), f"local addresses on other interfaces: {elsewhere}"
    own = {str(text) for nic in director.interfaces for text in nic.addresses}
    hosts = {text for text in bound if text.endswith(("/32", "/128"))}
    assert not hosts - wanted - own - vips_everywhere(director, hosts), (
        f"on {director.downlink}, in no pool: {', '.join(sorted(hosts - wanted - own))}"
    )


def vips_everywhere(director: Director, hosts: set[str]) -> set[str]:
    """On one arm, or with an instance on the downlink, the master's VIPs are there too; another check is about them."""
    return hosts if director.mode == "vrrp" else set()


@pytest.mark.role("director")
def test_health_checks_come_from_no_local_address(ask: Ask, services: tuple[Service, ...], director: Director) -> None:
    """Their ports are connections': an answer to the one would reach the client of the other."""
    targets = sorted({str(each.address) for service in services for each in service.real_servers})
    if not targets:
        pytest.skip("no service has a real server")
    lines = ask(f"printf 'route get %s\\n' {' '.join(targets)} | ip -j -batch -").splitlines()
    sources = {route["dst"]: route.get("prefsrc") for line in lines for route in parsed(line)}
    local = {str(address) for address in director.all_local_addresses}
    wrong = [f"{target} is asked from {source}" for target, source in sources.items() if source in local]
    assert not wrong, "; ".join(wrong)
    assert len(sources) == len(targets), f"no route to {', '.join(set(targets) - sources.keys())}"


# --- 命令 ipvsadm -ln: services, real servers, weights, traffic


def look(ask: Ask) -> ipvs.Table:
    return ipvs.read(ask("ipvsadm -Ln"), ask("ipvsadm -Ln --stats --exact"))


@pytest.fixture
def table(ask: Ask) -> ipvs.Table:
    return look(ask)


@pytest.mark.role("director")
def test_services_are_in_the_kernel(table: ipvs.Table, services: tuple[Service, ...]) -> None:
    wanted = ipvs.wanted(services)
    assert not wanted.keys() - table.rows.keys(), f"missing: {', '.join(sorted(wanted.keys() - table.rows.keys()))}"
    assert not table.rows.keys() - wanted.keys(), f"not wanted: {', '.join(sorted(table.rows.keys() - wanted.keys()))}"
    for key, service in wanted.items():
        assert table.schedulers[key] == service.scheduler, f"{key}: scheduler {table.schedulers[key]}"
        assert ("synproxy" in table.flags[key]) == service.syn_proxy, f"{key}: flags {table.flags[key]!r}"


@pytest.mark.role("director")
def test_real_servers_are_healthy_and_weighted(
    table: ipvs.Table, services: tuple[Service, ...], down: frozenset[str]
) -> None:
    """One of weight 0 may be down: whoever drains it wants it away. The sorry server may be there without a quorum."""
    wrong = []
    for key, service in ipvs.wanted(services).items():
        version = 6 if "[" in key else 4
        weights = {
            ipvs.point(each.address, each.port): each.weight
            for each in service.real_servers
            if each.address.version == version
        }
        rows = table.rows.get(key, {})
        away = {name for name, weight in weights.items() if not weight or name in down}
        alive = sum(row.weight for name, row in rows.items() if name in weights)
        no_quorum = alive < (service.quorum or 1) + (service.hysteresis or 0)
        sorry = {ipvs.point(address, port) for address, port in service.sorry if no_quorum}
        wrong += [f"{key}: {name} is missing (down?)" for name in weights.keys() - rows.keys() - away]
        wrong += [f"{key}: {name} is not wanted" for name in rows.keys() - weights.keys() - sorry]
        for name in weights.keys() & rows.keys():
            row = rows[name]
            if row.weight != weights[name] and not (name in down and not row.weight):
                wrong.append(
                    f"{key}: {name} has weight {row.weight} for {weights[name]}" + " (down?)" * (not row.weight)
                )
            if row.method != ipvs.METHODS[service.forwarding]:
                wrong.append(f"{key}: {name} is reached by {row.method}, not {service.forwarding}")
    assert not wrong, "; ".join(sorted(wrong))


@pytest.mark.role("director")
def test_services_have_their_local_addresses(ask: Ask, services: tuple[Service, ...], director: Director) -> None:
    """命令 ipvsadm -G (4.3)."""
    if not any(service.pool for service in services):
        pytest.skip("no service forwards by FNAT")
    got = ipvs.local_addresses(ask("ipvsadm -Gn"))
    for key, service in ipvs.wanted(services).items():
        if service.pool:
            name, version = key.split()[1], 6 if "[" in key else 4
            wanted = ipvs.shares(director, service, version)
            assert got.get(name, set()) == wanted, f"{key}: {sorted(got.get(name, set()))}, not {sorted(wanted)}"


# Sessions of a service from which its spread can be judged, and how far a real server may be from its share of them.
ENOUGH = 200
TOLERANCE = 0.25
# The others send by address, by load, or to the first: an even spread is not their aim.
EVEN = frozenset({"rr", "wrr"})


# Seconds in which new sessions are counted, where those of before tell nothing.
WINDOW = 30.0


def uneven(old: ipvs.Table, new: ipvs.Table, services: tuple[Service, ...]) -> tuple[set[str], list[str]]:
    """The services that had sessions enough between two looks, and what is wrong with their spread."""
    judged, wrong = set(), []
    for key, service in ipvs.wanted(services).items():
        rows = {name: row for name, row in new.rows.get(key, {}).items() if row.weight}
        before = old.rows.get(key, {})
        had = {name: row.total - (before[name].total if name in before else 0) for name, row in rows.items()}
        total = sum(had.values())
        if service.scheduler not in EVEN or service.persistence_timeout or len(rows) < 2 or total < ENOUGH:
            continue
        judged.add(key)
        # rr does not look at weights
        parts = {name: 1 if service.scheduler == "rr" else row.weight for name, row in rows.items()}
        for name in rows:
            share = total * parts[name] / sum(parts.values())
            if abs(had[name] - share) > TOLERANCE * share:
                wrong.append(f"{key}: {name} had {had[name]} of {total} sessions, its share is {share:.0f}")
    return judged, wrong


@pytest.mark.traffic
@pytest.mark.role("director")
def test_sessions_are_spread_evenly(ask: Ask, services: tuple[Service, ...]) -> None:
    first = look(ask)
    judged, wrong = uneven(ipvs.Table(), first, services)
    if not judged:
        pytest.skip(f"no service with scheduler rr or wrr, two real servers and {ENOUGH} sessions yet")
    if not wrong:
        return
    # A real server that was away counts from its return: what is new since now tells.
    suspects = {line.partition(": ")[0] for line in wrong}
    late: list[str] = []

    def seen() -> bool:
        judged.clear()
        more, late[:] = uneven(first, look(ask), services)
        judged.update(more)
        return suspects <= judged

    with contextlib.suppress(BuildError):  # some have too few: said below
        run.wait_until(seen, deadline=WINDOW, what="new sessions", hint="-")
    late = [line for line in late if line.partition(": ")[0] in suspects]
    assert not late, "; ".join(late)
    left = [line for line in wrong if line.partition(": ")[0] not in judged]
    assert not left, f"{'; '.join(left)} (was one away? ipvsadm -Z counts anew)"


# --- 命令 ps aux | grep keepalived


@pytest.mark.role("director")
def test_keepalived_has_its_processes(ask: Ask, cluster: Cluster, services: tuple[Service, ...]) -> None:
    """The parent, its health checker, and in mode vrrp the VRRP speaker; each once."""
    wanted = 1 + bool(services) + (cluster.mode == "vrrp")
    lines = ask("ps -o pid=,ppid=,args= -C keepalived || :").splitlines()
    assert len(lines) == wanted, f"{len(lines)} processes of keepalived, {wanted} are right: {lines}"
    parents = [line.split()[0] for line in lines if line.split()[1] == "1"]
    assert len(parents) == 1, f"{len(parents)} keepalived started by init: {lines}"


# --- 命令 tcpdump -i any -nnn | grep OSPF


# The lines of hellos, until all kinds that are wanted were heard: only what is amiss takes the whole time.
_HELLOS = """
left=' {wanted} '
{{ timeout {seconds} tcpdump -i {nic} -nn -l proto 89; echo "status $?"; }} | while read -r line; do
    case $line in
        *": OSPFv"?", Hello,"*) echo "$line" ;;
        "status 124") break ;;
        "status "*) exit 1 ;;
        *) continue ;;
    esac
    sender=${{line%% >*}}
    case ' {own} ' in *" ${{sender##* }} "*) who=own ;; *) who=other ;; esac
    kind=${{line#*: OSPFv}}
    kind=${{kind%%,*}}$who
    case $left in *" $kind "*) left="${{left%%" $kind "*}} ${{left#*" $kind "}}" ;; esac
    case $left in *[!\\ ]*) ;; *) break ;; esac
done
"""


@pytest.mark.role("director", "ospf")
def test_ospf_says_and_hears_hellos(ask: Ask, director: Director, cluster: Cluster) -> None:
    assert cluster.ospf is not None
    seconds, nic = cluster.ospf.hello_interval * 2 + 2, director.uplink
    own = own_addresses(ask, director, nic)
    versions = ("2", "3") if any(prefix.version == 6 for prefix in cluster.vip_prefixes) else ("2",)
    wanted = " ".join(f"{version}{who}" for version in versions for who in ("own", "other"))
    senders_own = " ".join(sorted(filter(None, own)))
    dump = ask(_HELLOS.format(wanted=wanted, seconds=seconds, nic=nic, own=senders_own))
    heard = re.findall(r"IP6? (\S+) > \S+: OSPFv([23]), Hello", dump)
    for version in versions:
        senders = {sender for sender, spoken in heard if spoken == version}
        assert senders & own, f"no hello of this host on {nic} in {seconds} s (OSPFv{version})"
        assert senders - own, f"no hello of a neighbour on {nic} in {seconds} s (OSPFv{version})"


# Two routers that are neither DR nor BDR stay at 2-Way, as they should; ospf6d calls it Twoway.
_DONE = "Full|2-Way/DROther|Twoway/DROther"


@pytest.mark.role("director", "ospf")
def test_ospf_neighbours_are_full(ask: Ask) -> None:
    """With a router, that is: two directors on one link that are neither DR nor BDR stay at 2-Way, as they should."""
    data = parsed(ask("vtysh -d ospfd -c 'show ip ospf neighbor json'"))
    are_full(
        {
            name: [str(each.get("nbrState") or each.get("state")) for each in rows]
            for name, rows in data["neighbors"].items()
        }
    )


@pytest.mark.role("director", "ospf", "IPv6")
def test_ospf_neighbours_of_ipv6_are_full(ask: Ask) -> None:
    data = parsed(ask("vtysh -d ospf6d -c 'show ipv6 ospf6 neighbor json'"))
    states: dict[str, list[str]] = {}
    for each in data["neighbors"]:
        states.setdefault(each["neighborId"], []).append(each["state"] + "/" + each["ifState"])
    are_full(states)


def are_full(states: dict[str, list[str]]) -> None:
    """At least one neighbour is, and none is on its way."""
    assert any(state.startswith("Full") for found in states.values() for state in found), (
        f"no neighbour is Full: {states}"
    )
    wrong = {name: found for name, found in states.items() if not all(re.match(_DONE, state) for state in found)}
    assert not wrong, f"neighbours on their way: {wrong}"


# --- 命令 route -n


@pytest.mark.role("director", "ospf")
def test_routes_of_ospf_are_there(ask: Ask, director: Director, cluster: Cluster) -> None:
    """A totally stubby area gets a default route and nothing else; every other at least one route."""
    learnt(parsed(ask("ip -j route show proto ospf")), director, cluster)


@pytest.mark.role("director", "ospf", "IPv6")
def test_routes_of_ospf_for_ipv6_are_there(ask: Ask, director: Director, cluster: Cluster) -> None:
    learnt(parsed(ask("ip -6 -j route show proto ospf")), director, cluster)


def learnt(routes: list[dict[str, Any]], director: Director, cluster: Cluster) -> None:
    """The routes that OSPF brought are those that its area gets, and leave by the uplink."""
    assert cluster.ospf is not None
    wanted = [r for r in routes if r["dst"] == "default"] if cluster.ospf.stub else routes
    assert wanted, f"no {'default route' if cluster.ospf.stub else 'route'} by OSPF: {[r['dst'] for r in routes]}"
    devices = {hop.get("dev") for r in wanted for hop in r.get("nexthops", [r])}
    assert devices == {director.uplink}, f"OSPF's routes leave by {devices}, not by {director.uplink}"


@pytest.mark.role("director")
def test_routes_of_the_cluster_file_are_there(ask: Ask, director: Director) -> None:
    got = {
        (route["dst"], hop.get("gateway"), hop.get("dev", route.get("dev")))
        for family in ("-4", "-6")
        for route in parsed(ask(f"ip {family} -j route show"))
        for hop in route.get("nexthops", [route])
    }
    for nic in director.interfaces:
        wanted = [(route.to.removesuffix("/32").removesuffix("/128"), route.via) for route in nic.routes]
        wanted += [("default", via) for via in (nic.gateway4, nic.gateway6) if via]
        for to, via in wanted:
            assert (to, via, nic.name) in got, f"no route to {to} by {via} on {nic.name}"


# --- 命令 tail -n 1000 /var/log/message: keepalived's log since it was last started

WRONG = re.compile(
    r"segfault|exited with permanent error|exited due to|died|Unknown keyword|\(Line \d+\)|"
    r"IPVS.*(?:error|[Ff]ail|not )|Unable to|[Cc]an't|cannot|No such|Permission denied|Netlink: error|"
    r"unexpected|bogus|wrong|mismatch|invalid"
)
STARTED = "Starting Keepalived"


@pytest.mark.role("director")
def test_keepalived_has_nothing_to_complain_about(ask: Ask, changing: bool) -> None:
    """Of a host that is just being changed, only since then: it need not have been well before."""
    log = ask("tail -n 1000 /var/log/messages").splitlines()
    marks = [number for number, line in enumerate(log) if changing and MARK in line]
    lines = [line for line in log[marks[-1] if marks else 0 :] if "keepalived" in line.lower()]
    starts = [number for number, line in enumerate(lines) if STARTED in line]
    wrong = [line for line in lines[starts[-1] if starts else 0 :] if WRONG.search(line)]
    assert not wrong, f"{len(wrong)} lines, the last: {wrong[-1]}"


# --- what the above stands on


@pytest.mark.role("director")
def test_services_of_the_host_run(ask: Ask, cluster: Cluster) -> None:
    units = ["keepalived", *(["zebra", "ospfd"] if cluster.mode == "ospf" else [])]
    if any(prefix.version == 6 for prefix in cluster.vip_prefixes) and cluster.mode == "ospf":
        units.append("ospf6d")
    answers = ask(f"systemctl is-active {' '.join(units)} || :").split()
    states = dict(zip(units, answers, strict=True))
    assert set(states.values()) == {"active"}, f"{states}"


# All at once, each in one line whatever stands between its words.
_SETTINGS = """
set -f
for key in {keys}; do
    value=$(sysctl -n "$key") || exit
    echo "$key="$value
done
"""


def test_kernel_settings_are_in_force(node: Host, ask: Ask) -> None:
    """1c, 2c."""
    wanted = {key: " ".join(value.split()) for key, value in node.kernel_settings.items() if key != TRUSTED}
    got = dict(line.split("=", 1) for line in ask(_SETTINGS.format(keys=" ".join(wanted))).splitlines())
    for key, value in wanted.items():
        assert got[key] == value, f"{key} is {got[key]}, not {value}"


@pytest.mark.role("realserver")
def test_toa_is_there(ask: Ask) -> None:
    """3b: the module, or on another kernel the programs, which can be loaded and do nothing."""
    here = ask(f"if [ -e /proc/net/toa_stats ] || {TOA_BPF_RUNS}; then echo yes; fi")
    assert here == "yes", "neither the module toa nor toa-bpf is loaded (toa-bpf stats): programs see local addresses"


TRUSTED = "net.toa.trusted"
# The module says whom it believes; for the programs their file does, which means nothing where they are not loaded.
_OF_THE_FILE = "s/#.*//; s/^[[:space:]]*trusted[[:space:]]*=//p"
_BELIEVED = f"""
if list=$(sysctl -n {TRUSTED} 2>/dev/null); then echo "toa: $list"; fi
if {TOA_BPF_LOADED}; then echo "toa-bpf: $(sed -n '{_OF_THE_FILE}' /etc/toa-bpf.conf)"; fi
"""


@pytest.mark.role("realserver")
def test_toa_believes_the_directors(ask: Ask, realserver: RealServer) -> None:
    """And nobody else: whoever is believed can say that he is anybody. Where both are there, both are asked."""
    said = ask(f"! {TOA_BPF_LOADED} || toa-bpf check 2>&1")
    assert not said, said  # what of their file is not loaded
    expected = _prefixes(realserver.trusted)
    for line in ask(_BELIEVED).splitlines() or ["toa:"]:
        name, _, words = line.partition(":")
        got = _prefixes(re.split(r"[,\s]+", words))
        assert got == expected, f"{name} believes {sorted(got)}, not {sorted(expected)}"


def _prefixes(words: Iterable[str]) -> set[str]:
    """In one form: the module shows an address with its length, which a file need not."""
    return {str(ipaddress.ip_network(word)) for word in words if word}
