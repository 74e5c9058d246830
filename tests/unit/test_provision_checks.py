"""The environment checks' judgement: what hosts' programs print when all is well, and with each subject broken.

The programs' output is as the real ones print it; that the checks reach real hosts, tests of images show.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import ipaddress
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import testinfra

from pipeline import run
from pipeline.errors import BuildError
from provision import apply as applying
from provision import checking, ipvs
from provision.checks import test_high as high
from provision.checks import test_low as low
from provision.checks.conftest import bound
from provision.checks.conftest import changing as changing  # the fixture
from provision.checks.conftest import down as down  # the fixture
from provision.model import TOA_BPF_LOADED, Cluster, Director
from tests.unit.clusters import OSPF, VRRP, load

# The subjects of these tests are tests themselves: imported by module, so that pytest does not take them for its own.

HEAD = """\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn
"""
SERVICES = f"""{HEAD}\
TCP  203.0.113.1:80 rr
  -> 198.51.100.1:80              FullNat 1      3          9
  -> 198.51.100.2:80              FullNat 2      2          0
TCP  203.0.113.2:80 rr
  -> 198.51.100.1:80              FullNat 1      0          0
  -> 198.51.100.2:80              FullNat 2      0          0
TCP  203.0.113.3:443 rr
  -> 198.51.100.1:443             FullNat 1      0          0
TCP  [2001:db8:ffff::3]:443 rr
  -> [2001:db8:5::1]:443          FullNat 1      0          0
"""
TOTALS = """\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port               Conns   InPkts  OutPkts  InBytes OutBytes
  -> RemoteAddress:Port
TCP  203.0.113.1:80                    600     6000     6000   600000   600000
  -> 198.51.100.1:80                   301     3000     3000   300000   300000
  -> 198.51.100.2:80                   299     3000     3000   300000   300000
"""
LOCAL4 = "".join(f"                             192.168.100.{n}        0          {n}\n" for n in range(1, 5))
LOCAL6 = "".join(f"                             2001:db8:64::{n}       0          0\n" for n in range(1, 5))
LOCAL = (
    "VIP:VPORT                  TOTAL  SNAT_IP              CONFLICTS  CONNS\n"
    f"203.0.113.1:80             4\n{LOCAL4}203.0.113.2:80             4\n{LOCAL4}"
    f"203.0.113.3:443            4\n{LOCAL4}[2001:db8:ffff::3]:443     4\n{LOCAL6}"
)
VIPS = ("203.0.113.1/32", "203.0.113.2/32", "203.0.113.3/32", "2001:db8:ffff::3/128")
OWN = ("192.168.100.201/24", "2001:db8:64::201/64")
LOCALS = tuple(f"192.168.100.{n}/32" for n in range(1, 5)) + tuple(f"2001:db8:64::{n}/128" for n in range(1, 5))
HELLOS = """\
05:00:01.1 IP 192.0.2.1 > 224.0.0.5: OSPFv2, Hello, length 44
05:00:01.9 IP 192.0.2.254 > 224.0.0.5: OSPFv2, Hello, length 48
05:00:02.1 IP6 fe80::1 > ff02::5: OSPFv3, Hello, length 40
05:00:02.9 IP6 fe80::254 > ff02::5: OSPFv3, Hello, length 40
"""
LINK = json.dumps([{"ifname": "eth0", "addr_info": [{"local": "fe80::1", "prefixlen": 64}]}])
NEIGHBOURS = json.dumps({"neighbors": {"192.0.2.254": [{"nbrState": "Full/DR"}]}})
DEFAULT = json.dumps([{"dst": "default", "gateway": "192.0.2.254", "dev": "eth0", "protocol": "ospf"}])
PROCESSES = "  901     1 /usr/sbin/keepalived --dont-fork -D\n  902   901 /usr/sbin/keepalived --dont-fork -D\n"
LOG = """\
Nov 28 05:00:00 lvs-1 Keepalived[800]: Unable to open /etc/old.conf, of an earlier start
Nov 28 05:00:01 lvs-1 Keepalived[901]: Starting Keepalived v2.3.3
Nov 28 05:00:02 lvs-1 Keepalived_healthcheckers[902]: TCP connection to [198.51.100.1]:tcp:80 success.
Nov 28 05:00:03 lvs-1 Keepalived_healthcheckers[902]: TCP connection to [198.51.100.2]:tcp:80 failed.
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return load(tmp_path, OSPF)


@pytest.fixture
def director(cluster: Cluster) -> Director:
    return cluster.directors[0]


def asker(**answers: str) -> Callable[[str], str]:
    """An `ask` that answers by a word in the command."""

    def ask(command: str) -> str:
        for word, answer in answers.items():
            if word.replace("_", " ") in command:
                return answer.strip()
        raise AssertionError(f"no answer to {command}")

    return ask


@contextlib.contextmanager
def complaint(text: str) -> Iterator[None]:
    """The check fails, and says this."""
    with pytest.raises(AssertionError) as caught:
        yield
    assert text in str(caught.value), caught.value


def places(**changes: set[str]) -> dict[str, set[str]]:
    lo = {"127.0.0.1/8", "::1/128", *VIPS}
    return {"lo": lo, "eth0": {"192.0.2.1/24"}, "eth1": {*OWN, *LOCALS}} | changes


def test_vips(cluster: Cluster, director: Director) -> None:
    def judge(lo: Collection[str] = VIPS, listing: str = SERVICES) -> None:
        services = cluster.services_of(director)
        high.test_vips_are_on_lo(places(lo={*lo}), services, ipvs.read(listing, ""))

    judge()
    with complaint("not on lo: 203.0.113.2/32"):
        judge({*VIPS} - {"203.0.113.2/32"})
    with complaint("on lo, in no service: 203.0.113.9/32"):
        judge((*VIPS, "203.0.113.9/32"))


def test_vips_without_a_quorum(tmp_path: Path) -> None:
    """Nobody to send to: the VIP is withdrawn, and only then."""
    services = copy.deepcopy(OSPF["services"])
    services[0].update(quorum=2, hysteresis=1)
    cluster = load(tmp_path, {**OSPF, "services": services})
    second = "  -> 198.51.100.2:80              FullNat 2      2          0\n"
    assert second in SERVICES

    def judge(weight: int, *lo: str, more: str = "") -> None:
        rows = (
            SERVICES.replace("TCP  203.0.113.2", f"{more}TCP  203.0.113.2")
            .replace(" 1      3          9", f" {weight}      3          9")
            .replace(second, "")
        )
        rows = rows.replace(second.replace("2          0", "0          0"), "")
        rows = rows.replace("80              FullNat 1      0", f"80              FullNat {weight}      0")
        table = ipvs.read(rows, "")
        high.test_vips_are_on_lo(places(lo={*VIPS[2:], *lo}), cluster.services, table)

    judge(0)
    with complaint("on lo without a quorum: 203.0.113.1/32"):
        judge(0, VIPS[0])
    with complaint("on lo without a quorum: 203.0.113.1/32"):  # a sorry server makes none
        judge(0, VIPS[0], more="  -> 192.0.2.99:81                FullNat 1      0          0\n")
    for lo in ((), VIPS[:1], VIPS[:2]):  # as it was before
        judge(1, *lo)
        judge(2, *lo)
    judge(3, *VIPS)
    with complaint("not on lo: 203.0.113.1/32"):
        judge(3, VIPS[1])


def test_vips_of_a_pair(tmp_path: Path) -> None:
    pair = load(tmp_path, VRRP)
    (master, _), services = pair.directors, pair.services
    mine = {*VIPS}
    high.test_vips_are_where_the_master_is(places(lo=set(), eth0=mine), services, master, pair)
    high.test_vips_are_where_the_master_is(places(lo=set()), services, master, pair)
    with complaint("VI_1"):
        high.test_vips_are_where_the_master_is(places(lo=set(), eth0={"203.0.113.1/32"}), services, master, pair)
    with complaint("VI_1"):
        high.test_vips_are_where_the_master_is(places(lo=mine), services, master, pair)


def test_one_master(tmp_path: Path) -> None:
    pair = load(tmp_path, VRRP)
    (master, backup), services = pair.directors, pair.services[:1]

    def judge(where: Director, vips: tuple[str, ...], *senders: str) -> None:
        lines = [
            f"05:00 IP {each} > 224.0.0.18: VRRPv2, Advertisement, vrid 200, prio 90, length 20" for each in senders
        ]
        lines += ["05:00 IP 192.0.2.77 > 224.0.0.18: VRRPv2, Advertisement, vrid 20, prio 90, length 20"]
        ask = asker(tcpdump="\n".join(lines), ip=LINK)
        high.test_one_master_advertises(ask, places(eth0={*vips}), services, where, pair)

    vips = ("203.0.113.1/32", "203.0.113.2/32")
    judge(master, vips, "192.0.2.1")
    judge(backup, (), "192.0.2.1")
    with complaint("VI_1: VIPs are here, and 192.0.2.2 is master too"):
        judge(master, vips, "192.0.2.1", "192.0.2.2")
    with complaint("VI_1: VIPs are here, and no advertisement on eth0 in 5 s"):
        judge(master, vips)
    with complaint("VI_1: VIPs are not here, and no master is heard on eth0 in 5 s"):
        judge(backup, (), "192.0.2.2")
    # VRRP for IPv6 speaks from the link's own address.
    six = pair.services[1:]
    line = "05:00 IP6 {} > ff02::12: VRRPv3, Advertisement, vrid 201, prio 150, length 40"
    for sender, there in (("fe80::1", {"203.0.113.3/32"}), ("fe80::2", set[str]())):
        ask = asker(tcpdump=line.format(sender), ip=LINK)
        high.test_one_master_advertises(ask, places(eth0=there), six, master, pair)


def test_local_addresses(director: Director) -> None:
    high.test_local_addresses_are_on_the_downlink(places(), director)
    with complaint("not on eth1: 192.168.100.3/32"):
        high.test_local_addresses_are_on_the_downlink(places(eth1={*OWN, *LOCALS} - {"192.168.100.3/32"}), director)
    with complaint("local addresses on other interfaces"):
        high.test_local_addresses_are_on_the_downlink(places(eth0={"192.168.100.3/32"}), director)
    with complaint("on eth1, in no pool: 192.168.100.9/32"):
        high.test_local_addresses_are_on_the_downlink(places(eth1={*OWN, *LOCALS, "192.168.100.9/32"}), director)


def test_sources_of_health_checks(cluster: Cluster, director: Director) -> None:
    services = cluster.services_of(director)
    sources = {str(each.address): "192.168.100.201" for service in services for each in service.real_servers}
    six = next(target for target in sources if ":" in target)
    sources[six] = "2001:db8:64::201"

    def judge(sources: dict[str, str]) -> None:
        lines = [json.dumps([{"dst": target, "prefsrc": source}]) for target, source in sources.items()]
        high.test_health_checks_come_from_no_local_address(asker(ip="\n".join(lines)), services, director)

    judge(sources)
    with complaint(f"{six} is asked from 2001:db8:64::2"):
        judge({**sources, six: "2001:db8:64::2"})
    with complaint(f"no route to {six}"):
        judge({target: source for target, source in sources.items() if target != six})


def test_services(cluster: Cluster) -> None:
    def judge(text: str) -> None:
        high.test_services_are_in_the_kernel(ipvs.read(text, ""), cluster.services)

    judge(SERVICES)
    with complaint("missing: TCP 203.0.113.3:443"):
        judge(
            SERVICES.replace(
                "TCP  203.0.113.3:443 rr\n  -> 198.51.100.1:443             FullNat 1      0          0\n", ""
            )
        )
    with complaint("not wanted: TCP 203.0.113.9:80"):
        judge(SERVICES + "TCP  203.0.113.9:80 rr\n")
    with complaint("203.0.113.3:443: scheduler wlc"):
        judge(SERVICES.replace("203.0.113.3:443 rr", "203.0.113.3:443 wlc"))
    with complaint("flags 'synproxy'"):
        judge(SERVICES.replace("203.0.113.3:443 rr", "203.0.113.3:443 rr synproxy"))


def test_real_servers(cluster: Cluster) -> None:
    def judge(text: str) -> None:
        high.test_real_servers_are_healthy_and_weighted(ipvs.read(text, ""), cluster.services, away)

    away: frozenset[str] = frozenset()
    judge(SERVICES)
    with complaint("TCP [2001:db8:ffff::3]:443: [2001:db8:5::1]:443 is missing (down?)"):
        judge(SERVICES.replace("  -> [2001:db8:5::1]:443          FullNat 1      0          0\n", ""))
    with complaint("198.51.100.2:80 has weight 0 for 2 (down?)"):
        judge(SERVICES.replace("FullNat 2      2", "FullNat 0      2"))
    with complaint("198.51.100.9:80 is not wanted"):
        judge(SERVICES.replace("198.51.100.2:80 ", "198.51.100.9:80 "))
    with complaint("is reached by Masq, not FNAT"):
        judge(SERVICES.replace("198.51.100.1:443             FullNat", "198.51.100.1:443             Masq   "))
    # Known to be down before: out of the table, or kept with weight 0; nobody else may be.
    away = frozenset({"198.51.100.2:80"})
    judge(SERVICES.replace("FullNat 2      2", "FullNat 0      2"))
    judge(re.sub(r"  -> 198\.51\.100\.2:80 .*\n", "", SERVICES))
    with complaint("198.51.100.2:80 has weight 3 for 2"):
        judge(SERVICES.replace("FullNat 2      2", "FullNat 3      2"))
    with complaint("TCP 203.0.113.1:80: 198.51.100.1:80 is missing (down?)"):
        judge(re.sub(r"  -> 198\.51\.100\.1:80 .*\n", "", SERVICES))


def test_a_sorry_server_stands_in_without_a_quorum(tmp_path: Path) -> None:
    services = copy.deepcopy(OSPF["services"])
    services[0].update(quorum=2, hysteresis=1, sorry_servers=[{"address": "192.0.2.99", "port": 81}])
    cluster = load(tmp_path, {**OSPF, "services": services})
    sorry = "  -> 192.0.2.99:81                FullNat 1      0          0\n"
    away = frozenset({"198.51.100.1:80", "198.51.100.2:80"})

    def judge(weight: int, row: str = sorry) -> None:
        first = "TCP  203.0.113.1:80 "
        text = re.sub(r"  -> 198\.51\.100\.[12]:80 .*\n", "", SERVICES)
        head, line, rest = text.partition(next(each for each in text.splitlines(True) if each.startswith(first)))
        alive = f"  -> 198.51.100.2:80 FullNat {weight} 0 0\n" if weight else ""
        high.test_real_servers_are_healthy_and_weighted(
            ipvs.read(head + line + alive + row + rest, ""), cluster.services, away
        )

    judge(0)
    with complaint("TCP 203.0.113.1:80: 192.0.2.98:81 is not wanted"):
        judge(0, sorry.replace("99", "98"))
    services[0]["real_servers"][1]["weight"] = 3
    cluster = load(tmp_path, {**OSPF, "services": services})
    with complaint("TCP 203.0.113.1:80: 192.0.2.99:81 is not wanted"):
        judge(3)
    services[0]["real_servers"][1]["weight"] = 2
    cluster = load(tmp_path, {**OSPF, "services": services})
    judge(2)  # hysteresis: not yet back


def test_a_drained_real_server_may_be_away(tmp_path: Path) -> None:
    services = copy.deepcopy(OSPF["services"])
    services[0]["real_servers"][1]["weight"] = 0
    cluster = load(tmp_path, {**OSPF, "services": services})
    none: frozenset[str] = frozenset()
    away = re.sub(r"  -> 198\.51\.100\.2:80 .*\n", "", SERVICES)
    high.test_real_servers_are_healthy_and_weighted(ipvs.read(away, ""), cluster.services, none)
    with complaint("198.51.100.2:80 has weight 2 for 0"):
        high.test_real_servers_are_healthy_and_weighted(ipvs.read(SERVICES, ""), cluster.services, none)


def test_local_addresses_of_services(cluster: Cluster, director: Director) -> None:
    def judge(text: str) -> None:
        high.test_services_have_their_local_addresses(asker(ipvsadm=text), cluster.services, director)

    judge(LOCAL)
    with complaint("TCP [2001:db8:ffff::3]:443"):
        judge(LOCAL.replace("2001:db8:64::4  ", "2001:db8:64::9  "))
    with complaint("TCP 203.0.113.1:80: ['192.168.100.1', '192.168.100.3', '192.168.100.4']"):
        judge(LOCAL.replace("                             192.168.100.2        0          2\n", ""))


def test_spread(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(high, "WINDOW", 0.2)

    def judge(*totals: str) -> None:
        looks = iter((*totals, *[totals[-1]] * 20))
        high.test_sessions_are_spread_evenly(
            lambda command: next(looks) if "--stats" in command else SERVICES, cluster.services
        )

    def had(first: int, second: int) -> str:
        return TOTALS.replace(" 301 ", f" {first} ").replace(" 299 ", f" {second} ")

    judge(TOTALS)
    with pytest.raises(pytest.skip.Exception, match="no service with scheduler rr"):
        judge(had(11, 90))
    # Uneven since some time: what comes now tells, and only that.
    judge(had(501, 99), had(601, 199))
    judge(had(501, 99), had(551, 149), had(601, 199))
    with complaint("198.51.100.1:80 had 150 of 200 sessions, its share is 100"):
        judge(had(501, 99), had(651, 149))
    with complaint("had 501 of 600 sessions, its share is 300"):
        judge(had(501, 99), had(521, 99))  # too few to tell


def test_processes(cluster: Cluster, tmp_path: Path) -> None:
    high.test_keepalived_has_its_processes(asker(ps=PROCESSES), cluster, cluster.services)
    with complaint("1 processes of keepalived, 2 are right"):
        high.test_keepalived_has_its_processes(asker(ps=PROCESSES.splitlines()[0]), cluster, cluster.services)
    with complaint("0 processes"):
        high.test_keepalived_has_its_processes(asker(ps=""), cluster, cluster.services)
    with complaint("2 keepalived started by init"):
        high.test_keepalived_has_its_processes(
            asker(ps=PROCESSES.replace("902   901", "902     1")), cluster, cluster.services
        )
    pair = load(tmp_path, VRRP)
    with complaint("2 processes of keepalived, 3 are right"):
        high.test_keepalived_has_its_processes(asker(ps=PROCESSES), pair, pair.services)


def test_hellos(cluster: Cluster, director: Director) -> None:
    def judge(*without: int) -> None:
        lines = [line for n, line in enumerate(HELLOS.splitlines()) if n not in without]
        high.test_ospf_says_and_hears_hellos(asker(tcpdump="\n".join(lines), ip=LINK), director, cluster)

    judge()
    for n, (version, who) in enumerate(itertools.product((2, 3), ("this host", "a neighbour"))):
        with complaint(f"no hello of {who} on eth0 in 8 s (OSPFv{version})"):
            judge(n)


def shell(folder: Path, **programs: str) -> Callable[[str], str]:
    """An `ask` of this machine's own shell, to which some programs are others."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    def ask(command: str) -> str:
        environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
        return run.run(["sh", "-c", command], env=environment).stdout.strip()

    return ask


@pytest.mark.runs("sh")
def test_hellos_are_awaited_no_longer_than_needed(cluster: Cluster, director: Director, tmp_path: Path) -> None:
    """Other lines, and hellos heard twice, end nothing; the last kind does, long before the time is over."""
    first, *others, last = HELLOS.splitlines()
    noise = "05:00 IP 192.0.2.1 > 224.0.0.5: OSPFv2, LS-Update, length 64"
    lines = [first, noise, first, *others, *others, last]
    said = "\n".join(f"echo '{line}'" for line in lines)
    (tmp_path / "late").touch()
    spoken = f"{said}\nfor n in $(seq 50); do echo '{noise}'; echo >>{tmp_path}/late; sleep 0.1; done"
    ask = shell(tmp_path, tcpdump=spoken, timeout='shift; exec "$@"', ip=f"echo '{LINK}'")
    high.test_ospf_says_and_hears_hellos(ask, director, cluster)
    assert len((tmp_path / "late").read_text()) < 10
    over = "exit 124"  # timeout's own status
    only = shell(tmp_path, tcpdump="\n".join([*(f"echo '{line}'" for line in [first, noise, *others]), over]))
    with complaint("no hello of a neighbour on eth0 in 8 s (OSPFv3)"):
        high.test_ospf_says_and_hears_hellos(only, director, cluster)
    with pytest.raises(BuildError) as caught:
        high.test_ospf_says_and_hears_hellos(
            shell(tmp_path, tcpdump="echo 'eth0: no such device' >&2; exit 1"), director, cluster
        )
    assert "eth0: no such device" in str(caught.value)


def test_neighbours() -> None:
    def judge(text: str) -> None:
        high.test_ospf_neighbours_are_full(asker(vtysh=text))

    judge(NEIGHBOURS)
    for nobody in (json.dumps({"neighbors": {}}), NEIGHBOURS.replace("Full/DR", "ExStart/DR")):
        with complaint("no neighbour is Full"):
            judge(nobody)
    both = json.loads(NEIGHBOURS)["neighbors"]
    judge(json.dumps({"neighbors": {**both, "192.0.2.2": [{"nbrState": "2-Way/DROther"}]}}))
    with complaint("neighbours on their way"):
        judge(json.dumps({"neighbors": {**both, "192.0.2.2": [{"nbrState": "Init/DROther"}]}}))


def test_neighbours_of_ipv6() -> None:
    def judge(*states: str) -> None:
        rows = [{"neighborId": f"192.0.2.{n}", "state": state, "ifState": "DROther"} for n, state in enumerate(states)]
        high.test_ospf_neighbours_of_ipv6_are_full(asker(vtysh=json.dumps({"neighbors": rows})))

    judge("Full")
    judge("Full", "Twoway")
    with complaint("no neighbour is Full"):
        judge()
    with complaint("neighbours on their way: {'192.0.2.1': ['Init/DROther']}"):
        judge("Full", "Init")


@pytest.mark.parametrize("judged", [high.test_routes_of_ospf_are_there, high.test_routes_of_ospf_for_ipv6_are_there])
def test_routes_of_ospf(judged: Callable[..., None], cluster: Cluster, director: Director) -> None:
    def judge(text: str, of: Cluster = cluster) -> None:
        judged(asker(ip=text), director, of)

    judge(DEFAULT)
    for none in ("", DEFAULT.replace("default", "10.0.0.0/8")):
        with complaint("no default route by OSPF"):
            judge(none)
    assert cluster.ospf is not None
    other = dataclasses.replace(cluster, ospf=dataclasses.replace(cluster.ospf, stub=False))
    judge(none, other)
    with complaint("no route by OSPF"):
        judge("", other)
    with complaint("leave by {'eth1'}, not by eth0"):
        judge(DEFAULT.replace("eth0", "eth1"))


def test_routes_of_the_file(tmp_path: Path) -> None:
    base = {**VRRP, "directors": [dict(VRRP["directors"][0]), VRRP["directors"][1]]}
    nics = [dict(nic) for nic in base["directors"][0]["interfaces"]]
    nics[0]["gateway4"] = "192.0.2.254"
    nics[1]["routes"] = [{"to": "198.51.100.0/24", "via": "192.168.100.254"}]
    base["directors"][0]["interfaces"] = nics
    master = load(tmp_path, base).directors[0]
    routes = [
        {"dst": "default", "gateway": "192.0.2.254", "dev": "eth0"},
        {"dst": "198.51.100.0/24", "gateway": "192.168.100.254", "dev": "eth1"},
    ]

    def judge(found: list[dict[str, str]]) -> None:
        answers = {"-4": json.dumps(found), "-6": "[]"}
        high.test_routes_of_the_cluster_file_are_there(asker(**answers), master)

    judge(routes)
    with complaint("no route to default by 192.0.2.254 on eth0"):
        judge(routes[1:])
    with complaint("no route to 198.51.100.0/24 by 192.168.100.254 on eth1"):
        judge(routes[:1])


@pytest.mark.parametrize(
    "line",
    [
        "Keepalived[901]: pid 902 exited due to segmentation fault (SIGSEGV).",
        "Keepalived_healthcheckers[902]: (/etc/keepalived/web.conf: Line 7) Unknown keyword 'x'",
        "Keepalived_healthcheckers[902]: IPVS (cmd 1159, errno 2): No such file or directory",
        "Keepalived[901]: Unable to find a configuration file",
    ],
)
def test_log(line: str) -> None:
    def judge(text: str, *, during: bool = False) -> None:
        high.test_keepalived_has_nothing_to_complain_about(asker(tail=text), during)

    judge(LOG)
    judge(LOG, during=True)
    bad, mark = f"Nov 28 05:00:09 lvs-1 {line}\n", f"Nov 28 05:00:10 lvs-1 root: {applying.MARK}\n"
    for text in (LOG + bad, LOG + mark + bad, LOG + mark + mark + bad):
        for during in (False, True):
            with complaint("1 lines, the last: Nov 28 05:00:09"):
                judge(text, during=during)
    judge(LOG + mark + bad + mark, during=True)  # it was so before this change
    with complaint("1 lines, the last: Nov 28 05:00:09"):
        judge(LOG + mark + bad + mark)


def test_units(cluster: Cluster) -> None:
    units = ("keepalived", "zebra", "ospfd", "ospf6d")
    high.test_services_of_the_host_run(asker(systemctl="active\n" * len(units)), cluster)
    for unit in units:
        states = ["failed" if each == unit else "active" for each in units]
        with complaint(f"'{unit}': 'failed'"):
            high.test_services_of_the_host_run(asker(systemctl="\n".join(states)), cluster)


def test_kernel_settings(cluster: Cluster) -> None:
    conf, backlog = "net.ipv4.conf.all", "net.core.netdev_max_backlog"
    answers = {f"{conf}.arp_ignore": "1", f"{conf}.arp_announce": "2", backlog: "500000"}

    def settings(**changes: str) -> Callable[[str], str]:
        return lambda _: "\n".join(f"{key}={value}" for key, value in {**answers, **changes}.items())

    high.test_kernel_settings_are_in_force(cluster.directors[0], settings())
    with complaint("net.core.netdev_max_backlog is 1000, not 500000"):
        high.test_kernel_settings_are_in_force(cluster.directors[0], settings(**{backlog: "1000"}))


@pytest.mark.runs("sh")
def test_kernel_settings_are_read(cluster: Cluster, tmp_path: Path) -> None:
    """A value with tabs and stars in it, and a key that the kernel does not have."""
    host = dataclasses.replace(cluster.directors[0], sysctl={"kernel.odd": "1 * 3"})
    usual = "*ignore) echo 1 ;; *announce) echo 2 ;; *backlog) echo 500000 ;;"
    known = f"case $2 in *odd) printf '1\\t*\\n3\\n' ;; {usual} *) exit 1 ;; esac"
    high.test_kernel_settings_are_in_force(host, shell(tmp_path, sysctl=known))
    strange = dataclasses.replace(host, sysctl={"kernel.none": "1"})
    with pytest.raises(BuildError, match="exit"):
        high.test_kernel_settings_are_in_force(strange, shell(tmp_path))


def test_interrupts(director: Director) -> None:
    def asked(rows: str, balance: str = "") -> None:
        low.test_interrupts_are_spread(lambda command: balance if "pgrep" in command else rows, director)

    asked("27 0 0\n28 1 1")
    with complaint("eth0: irq 28 may run on CPU 0-3, not on 1 alone"):
        asked("27 0 0\n28 1 0-3")
    with complaint("no interrupt of a queue was found"):
        asked("")
    with complaint("irqbalance runs"):
        asked("27 0 0", "812")


def test_real_servers_answer(tmp_path: Path) -> None:
    base = {**OSPF, "services": [dict(each) for each in OSPF["services"]]}
    base["services"][0]["check"] = {"http": {"path": "/o'k", "host": "www.example.org"}}
    found = load(tmp_path, base)
    asked: list[str] = []

    def ask(curl: str, tcp: str) -> Callable[[str], str]:
        def answer(command: str) -> str:
            asked.append(command)
            return curl if command.startswith("curl") else tcp

        return answer

    none: frozenset[str] = frozenset()
    low.test_real_servers_answer(ask("200", "yes"), found.services, none)
    curl = "curl -gkso /dev/null -m 10 --noproxy '*' -w '%{http_code}' -H 'Host: www.example.org'"
    assert f"{curl} 'http://198.51.100.1:80/o'\"'\"'k' || :" in asked
    assert any("/dev/tcp/2001:db8:5::1/443" in command for command in asked)
    with complaint("http://198.51.100.1:80/o'k: 503, not 200"):
        low.test_real_servers_answer(ask("503", "yes"), found.services, none)
    with complaint("[2001:db8:5::1]:443: no connection"):
        low.test_real_servers_answer(ask("200", ""), found.services, none)
    # The others are asked still.
    away = frozenset({"[2001:db8:5::1]:443", "198.51.100.1:443"})
    low.test_real_servers_answer(ask("200", ""), found.services, away)
    with complaint("http://198.51.100.1:80/o'k: 503, not 200"):
        low.test_real_servers_answer(ask("503", ""), found.services, away)


def test_toa(cluster: Cluster) -> None:
    high.test_toa_is_there(asker(toa="yes"))
    with complaint("neither the module toa nor toa-bpf is loaded"):
        high.test_toa_is_there(asker(toa=""))
    (realserver,) = cluster.real_servers
    shown = [str(ipaddress.ip_network(word)) for word in realserver.trusted]
    module, programs = f"toa: {','.join(shown)}", f"toa-bpf: {', '.join(realserver.trusted)}"
    for told, who in {module: "", f"{module}\n{programs}": "", f"{module}\ntoa-bpf: ::/0": "toa-bpf"}.items():
        with complaint(f"{who} believes [") if who else contextlib.nullcontext():
            high.test_toa_believes_the_directors(asker(check="", sysctl=told), realserver)


@pytest.mark.runs("sh")
def test_the_unit_and_the_file_of_toa_bpf_say_nothing_of_its_programs(cluster: Cluster, tmp_path: Path) -> None:
    real = shell(tmp_path, sysctl=f"cat {tmp_path}/module", **{"toa-bpf": f"cat {tmp_path}/sys/$1"})

    def ask(command: str) -> str:
        for path in ("/proc/net", "/sys/fs/bpf", "/etc"):
            command = command.replace(f"{path}/toa", f"{tmp_path}{path}/toa")
        return real(command)

    (realserver,) = cluster.real_servers
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/toa-bpf.conf").write_text(f"# whom\n trusted\t= {', '.join(realserver.trusted)} # us\n")
    with complaint("neither the module toa nor toa-bpf is loaded"):
        high.test_toa_is_there(ask)
    with complaint("toa believes [], not ['192.168.100.1/32'"):
        high.test_toa_believes_the_directors(ask, realserver)
    (tmp_path / "sys/fs/bpf/toa").mkdir(parents=True)
    for name in ("fs/bpf/toa/link_toa_sockops", "stats", "check"):
        (tmp_path / "sys" / name).touch()
    high.test_toa_is_there(ask)
    high.test_toa_believes_the_directors(ask, realserver)
    (tmp_path / "module").write_text("\n")
    with complaint("toa believes [], not ['192.168.100.1/32'"):
        high.test_toa_believes_the_directors(ask, realserver)
    (tmp_path / "sys/check").write_text("toa-bpf: it is not loaded\n")
    with complaint("toa-bpf: it is not loaded"):
        high.test_toa_believes_the_directors(ask, realserver)
    (tmp_path / "sys/stats").unlink()
    with complaint("neither the module toa nor toa-bpf is loaded"):
        high.test_toa_is_there(ask)


def test_the_link_that_says_so_is_made_last() -> None:
    """By the program, of those that are there whatever its configuration says."""
    text = (Path(__file__).parents[2] / "tools/toa-bpf/toa-bpf.c").read_text(encoding="utf-8")
    names = dict(re.findall(r'^#define (BPFFS|PINS) .*?"(.*)"$', text, re.M))
    (link,) = re.findall(r'PINS "(/.+)%s"', text)
    *_, last = re.findall(r"err = attach\(programs->progs\.(\w+)", text)
    assert f"[ -e {names['BPFFS']}{names['PINS']}{link}{last} ]" == TOA_BPF_LOADED


def test_addresses_are_read() -> None:
    text = json.dumps(
        [
            {"ifname": "lo", "addr_info": [{"local": "127.0.0.1", "prefixlen": 8, "scope": "host"}]},
            {
                "ifname": "eth0",
                "addr_info": [
                    {"local": "192.0.2.1", "prefixlen": 24, "scope": "global"},
                    {"local": "fe80::1", "prefixlen": 64, "scope": "link"},
                ],
            },
        ]
    )
    assert bound(text) == {"lo": {"127.0.0.1/8"}, "eth0": {"192.0.2.1/24"}}


# --- the report

JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest">
<testcase classname="high" name="test_vips_are_on_lo[ssh://lvs-2]@lvs-2" time="0.5">
<failure message="AssertionError: not on lo: 203.0.113.1/32&#10;assert not {1}">trace</failure></testcase>
<testcase classname="high" name="test_vips_are_on_lo[ssh://lvs-1]" time="0.4" />
<testcase classname="low" name="test_interrupts_are_spread[ssh://lvs-1]@lvs-1" time="0.1">
<error message="failed on setup with &quot;Failed: no answer over ssh: refused&quot;">trace</error></testcase>
<testcase classname="low" name="test_vips_answer_a_client[ssh://lvs-1]" time="0.1">
<skipped type="pytest.skip" message="no client was named">x</skipped></testcase>
</testsuite></testsuites>"""


@dataclasses.dataclass
class Client:
    """Answers a client's commands by a word in them, and keeps them."""

    answers: dict[str, tuple[int, str]]
    asked: list[str] = dataclasses.field(default_factory=list)

    def run(self, command: str) -> SimpleNamespace:
        self.asked.append(command)
        status, text = next((answer for word, answer in self.answers.items() if word in command), (0, "200"))
        return SimpleNamespace(rc=status, stdout=text)


def test_a_client_asks_every_vip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each port of each VIP: for a page where health checks ask real servers for one there, else for a connection."""
    services = copy.deepcopy(OSPF["services"])
    services[0].update(ports=[80, 81], check={"http": {"path": "/ok", "status": 204, "host": "www.example.org"}})
    services[0]["real_servers"] = [{"address": "198.51.100.1", "port": 80}]
    cluster = load(tmp_path, {**OSPF, "services": services})
    client = Client({"203.0.113.": (0, "204"), "</dev/tcp/": (0, "")})
    monkeypatch.setattr(testinfra, "get_host", lambda *_, **__: client)
    with pytest.raises(pytest.skip.Exception, match="no client was named"):
        low.test_vips_answer_a_client(cluster.services)
    monkeypatch.setenv("LVSFORGE_CLIENT", "local")
    low.test_vips_answer_a_client(cluster.services)
    assert client.asked[0].endswith(" -w '%{http_code}' -H 'Host: www.example.org' http://203.0.113.1:80/ok")
    asked = {re.findall(r"//?(\[.*\]|[0-9.]+)[:/](\d+)", text)[0] for text in client.asked[:4]}
    assert asked == {(vip, port) for vip in ("203.0.113.1", "203.0.113.2") for port in ("80", "81")}
    assert client.asked[4:] == [
        f"timeout 10 bash -c '</dev/tcp/{vip}/443'" for vip in ("203.0.113.3", "2001:db8:ffff::3")
    ]
    client.answers = {"203.0.113.2:81": (7, ""), "2001:db8": (1, ""), **client.answers}
    with complaint("http://203.0.113.2:81/ok: no answer, not 204; [2001:db8:ffff::3]:443: no connection"):
        low.test_vips_answer_a_client(cluster.services)
    with pytest.raises(pytest.skip.Exception, match="no service speaks TCP"):
        low.test_vips_answer_a_client(())


def test_the_gate_says_what_was_down_before(
    cluster: Cluster, director: Director, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """To the checks of this host, but for those of traffic; what fails there is what it raises."""
    told: list[dict[str, str]] = []
    report = JUNIT.replace("lvs-2", "lvs-1")

    def checks(argv: list[str], *, env: dict[str, str], **_: object) -> SimpleNamespace:
        words = dict(word.split("=", 1) for word in map(str, argv) if word.startswith("--") and "=" in word)
        assert words["--hosts"] == "ssh://lvs-1" and argv[argv.index("-m", 3) + 1] == "not traffic"
        Path(words["--junitxml"]).write_text(report, encoding="utf-8")
        told.append(env)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(run, "run", checks)
    gate = checking.gate(cluster, checking.Where(Path("lab/ssh_config")), 0.1)
    with pytest.raises(BuildError, match="the checks of lvs-1 pass: not within") as caught:
        gate(director, frozenset({"198.51.100.2:80", "[2001:db8:5::1]:443"}))
    assert "✗ vips are on lo: not on lo: 203.0.113.1/32" in caught.value.details
    assert caught.value.hint == f"invoke check --cluster {cluster.path} --ssh-config lab/ssh_config --host lvs-1"
    monkeypatch.setenv("LVSFORGE_CHANGING", told[-1]["LVSFORGE_CHANGING"])
    assert request.getfixturevalue("changing") is True
    monkeypatch.setenv("LVSFORGE_DOWN", told[-1]["LVSFORGE_DOWN"])
    assert request.getfixturevalue("down") == {"198.51.100.2:80", "[2001:db8:5::1]:443"}
    report = report.replace("<failure", "<system-out").replace("</failure", "</system-out")
    report = report.replace("<error", "<system-out").replace("</error", "</system-out")
    gate(director, frozenset())
    assert told[-1]["LVSFORGE_DOWN"] == ""


def test_the_report_by_host() -> None:
    outcomes = checking.read(JUNIT)
    assert [(each.host, each.check, each.result, each.message) for each in outcomes] == [
        ("lvs-1", "vips are on lo", "passed", ""),
        ("lvs-1", "interrupts are spread", "failed", "no answer over ssh: refused"),
        ("lvs-1", "vips answer a client", "skipped", "no client was named"),
        ("lvs-2", "vips are on lo", "failed", "not on lo: 203.0.113.1/32"),
    ]
    assert checking.table(outcomes) == [
        "lvs-1: 1 passed, 1 failed, 1 skipped",
        "  ✓ vips are on lo",
        "  ✗ interrupts are spread  no answer over ssh: refused",
        "  – vips answer a client   no client was named",
        "lvs-2: 1 failed",
        "  ✗ vips are on lo  not on lo: 203.0.113.1/32",
    ]
