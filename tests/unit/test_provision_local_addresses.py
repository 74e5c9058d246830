"""Local addresses on hosts that run: who has which, and when one has no connections any more."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import progress, run
from pipeline.errors import BuildError
from provision import cluster as clusters
from provision import ipvs, local_addresses
from provision.host import Host
from provision.model import Cluster
from provision.remote import Answer, Remote
from tests.unit.clusters import OSPF, director

SHELL = pytest.mark.runs("sh")
# Four connections of 192.168.100.3 and 2001:db8:64::3 that have something to say, and what is none of them.
TABLE = """\
Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData LocalIP LPrt
TCP C6336401 0FA0 CB007101 0050 C6336402 1F90 ESTABLISHED     899 - - C0A86403 0400
TCP C6336401 0FA1 CB007101 0050 C6336402 1F90 FIN_WAIT        119 - - C0A86403 0401
TCP C6336401 0FA2 CB007101 0050 C6336402 1F90 TIME_WAIT       119 - - C0A86403 0402
TCP C6336401 0FA3 CB007101 0050 C6336402 1F90 CLOSE             9 - - C0A86403 0403
TCP C6336401 0FA4 CB007101 0050 C6336402 1F90 ESTABLISHED     899 - - C0A86404 0404
TCP C0A86403 0FA5 CB007101 0050 C0A86403 1F90 ESTABLISHED     899
UDP C6336401 0FA6 CB007101 0035 C6336402 0035 UDP             299 - - C0A86403 0405
TCP 2001:0db8:0009:0000:0000:0000:0000:0001 0FA0 2001:0db8:ffff:0000:0000:0000:0000:0003 01BB \
2001:0db8:0005:0000:0000:0000:0000:0001 01BB ESTABLISHED     899 - - 2001:0db8:0064:0000:0000:0000:0000:0003 0400
"""
SET = "VIP:VPORT  TOTAL  SNAT_IP  CONFLICTS  CONNS\n203.0.113.1:80  1\n    {}  0  0\n"
BOTH = ("192.168.100.3", "2001:db8:64::3")


@dataclass
class Kernel:
    """A `Remote` with a connection table; `sets` and `tables` are what it has, one after the other."""

    file: Path
    sets: list[str]
    tables: list[str]
    name: str = "lvs-1"
    login: str = "ssh"
    asked: list[str] = field(default_factory=list)

    def run(self, script: str, *, check: bool = True, what: str = "") -> Answer:
        self.asked.append(what)
        if script == "ipvsadm -Gn":
            return Answer(0, self.sets.pop(0) if len(self.sets) > 1 else self.sets[0], "")
        self.file.write_text(self.tables.pop(0) if len(self.tables) > 1 else self.tables[0])
        done = run.run(["sh", "-eu"], stdin=script, check=check)
        return Answer(done.returncode, done.stdout, done.stderr)

    def put(self, data: bytes, path: str) -> None:
        raise NotImplementedError


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ipvs, "CONNECTIONS", str(tmp_path / "ip_vs_conn"))
    return tmp_path / "ip_vs_conn"


@SHELL
def test_connections_of_local_addresses(table: Path) -> None:
    assert local_addresses.connections(Kernel(table, [], [TABLE]), BOTH) == 4
    assert local_addresses.connections(Kernel(table, [], [TABLE]), ["192.168.100.4"]) == 1
    assert local_addresses.connections(Kernel(table, [], [TABLE]), ["192.168.100.5"]) == 0


@SHELL
def test_a_table_that_is_too_large(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(table.with_name("slow"))
    monkeypatch.setattr(ipvs, "CONNECTIONS", str(table.with_name("slow")))
    monkeypatch.setattr(ipvs, "_COUNT_SECONDS", 0.1)
    assert local_addresses.connections(Kernel(table, [], [""]), BOTH) is None


@SHELL
def test_draining_waits_for_keepalived_and_for_connections(table: Path) -> None:
    """The set loses the address while its connections go on."""
    kernel = Kernel(table, [SET.format(BOTH[1]), ""], [TABLE, TABLE, "\n"])
    local_addresses.drained(kernel, BOTH, 30)
    assert kernel.asked == ["asking for local addresses"] * 2 + ["counting connections"] * 3


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(progress, "note", said.append)
    return said


@SHELL
def test_what_is_left_is_said(table: Path, notes: list[str]) -> None:
    local_addresses.drained(Kernel(table, [""], [TABLE]), BOTH, 0)
    assert notes == ["lvs-1: 4 connections of 192.168.100.3, 2001:db8:64::3 are cut after 0 s"]


def test_an_address_that_keepalived_keeps(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_addresses, "_RELOAD_SECONDS", 0.1)
    with pytest.raises(BuildError, match=r"lvs-1: keepalived gives up 192\.168\.100\.3: not within"):
        local_addresses.drained(Kernel(table, [SET.format("192.168.100.3")], [TABLE]), ["192.168.100.3"], 30)


# --- who has which


@dataclass
class Hosts:
    """Directors, each with the local addresses that it has now; None does not answer."""

    has: dict[str, tuple[int, int] | None]
    before: dict[str, tuple[int, int]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def connect(self, host: Host) -> Iterator[Remote]:
        self.asked.append(host.name)
        if self.has[host.name] is None:
            raise BuildError(f"{host.name}: no connection", "-")
        yield Named(host.name, self)


@dataclass
class Named:
    name: str
    hosts: Hosts
    login: str = "ssh"

    def run(self, script: str, *, check: bool = True, what: str = "") -> Answer:
        assert "cat /etc/lvs/host.conf" in script and "cat /state/old/etc/lvs/host.conf" in script
        now, before = self.hosts.has[self.name], self.hosts.before.get(self.name)
        return Answer(0, f"{conf(now)}/state\n{conf(before)}", "")

    def put(self, data: bytes, path: str) -> None:
        raise NotImplementedError


def conf(ends: tuple[int, int] | None) -> str:
    first, last = ends or (1, 0)
    words = " ".join(f"192.168.100.{n}" for n in range(first, last + 1))
    return f'DOWNLINK=eth1\nLOCAL_ADDRESSES="{words}"\n'


def cluster_of(tmp_path: Path, share: int, **changes: Any) -> Cluster:
    pools = {"laddr_g1": {"addresses": ["192.168.100.1-192.168.100.64"], "per_director": share}}
    services = [copy.deepcopy(OSPF["services"][0])]
    data = {**copy.deepcopy(OSPF), "local_addresses": pools, "services": services, **changes}
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return clusters.load(path, secrets=False)


def turns(cluster: Cluster, hosts: Hosts, *names: str) -> list[str]:
    found = local_addresses.in_turn(cluster, cluster.chosen(names), hosts.connect, "/state", Path("lab/ssh_config"))
    return [host.name for host in found]


def again(cluster: Cluster) -> str:
    return f"invoke apply --cluster {cluster.path} --ssh-config lab/ssh_config"


def test_who_gives_an_address_up_comes_before_who_gets_it(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, 8)
    assert turns(cluster, Hosts({"lvs-1": (1, 4), "lvs-2": (5, 8)})) == ["lvs-2", "lvs-1", "rs-1"]
    smaller = cluster_of(tmp_path, 4)
    assert turns(smaller, Hosts({"lvs-1": (1, 8), "lvs-2": (9, 16)})) == ["lvs-1", "lvs-2", "rs-1"]


def test_a_change_that_was_cut_off_holds_both(tmp_path: Path) -> None:
    """It may go back to its old files."""
    hosts = Hosts({"lvs-1": (1, 4), "lvs-2": (9, 16)}, before={"lvs-2": (5, 8)})
    assert turns(cluster_of(tmp_path, 8), hosts) == ["lvs-2", "lvs-1", "rs-1"]


def test_only_those_are_asked_who_matter(tmp_path: Path, notes: list[str]) -> None:
    cluster = cluster_of(tmp_path, 8)
    hosts = Hosts({"lvs-1": (1, 8), "lvs-2": None})
    assert turns(cluster, hosts, "rs-1", "lvs-1") == ["lvs-1", "rs-1"] and hosts.asked == ["lvs-1"]
    hosts.has["lvs-1"] = (1, 4)
    assert turns(cluster, hosts, "lvs-1") == ["lvs-1"] and hosts.asked == ["lvs-1", "lvs-1", "lvs-2"]
    assert notes == ["which local addresses lvs-2 has is not known: no answer"]


def test_an_address_of_a_director_beside_the_operation(tmp_path: Path) -> None:
    """The next step is the one that the hint says."""
    cluster = cluster_of(tmp_path, 8)
    hosts = Hosts({"lvs-1": (1, 4), "lvs-2": (5, 8)})
    with pytest.raises(BuildError) as caught:
        turns(cluster, hosts, "lvs-1")
    assert caught.value.message == (
        "lvs-1 is to have 192.168.100.5 of pool laddr_g1, which is on lvs-2 now, and 3 more; no host was changed"
    )
    assert caught.value.hint == f"{again(cluster)} --host lvs-2 --host lvs-1"
    assert turns(cluster, hosts, "lvs-2", "lvs-1") == ["lvs-2", "lvs-1"]


def test_directors_that_change_places(tmp_path: Path) -> None:
    swapped = [{**director(1), "slot": 2}, {**director(2), "slot": 1}]
    hosts = Hosts({"lvs-1": (1, 4), "lvs-2": (5, 8)})
    with pytest.raises(BuildError, match=r"lvs-1 is to have 192\.168\.100\.5 of pool laddr_g1") as caught:
        turns(cluster_of(tmp_path, 4, directors=swapped), hosts)
    assert caught.value.hint.startswith("give lvs-1 a slot at first whose addresses")
    assert f", {again(cluster_of(tmp_path, 4))}, then the slot" in caught.value.hint
    swapped[0]["slot"] = 3
    assert turns(cluster_of(tmp_path, 4, directors=swapped), hosts) == ["lvs-1", "lvs-2", "rs-1"]
    swapped[0]["slot"] = 2
    hosts.has = {"lvs-1": (9, 12), "lvs-2": (1, 4)}
    assert turns(cluster_of(tmp_path, 4, directors=swapped), hosts) == ["lvs-1", "lvs-2", "rs-1"]


def test_the_one_that_all_wait_for_is_named(tmp_path: Path) -> None:
    """Lvs-1 waits for lvs-2, which is part of the operation, and that for lvs-3, which is not."""
    cluster = cluster_of(tmp_path, 8, directors=[director(n) for n in (1, 2, 3)])
    hosts = Hosts({"lvs-1": (1, 4), "lvs-2": (5, 8), "lvs-3": (9, 12)})
    with pytest.raises(BuildError, match=r"lvs-2 is to have 192\.168\.100\.9 of .* on lvs-3 now") as caught:
        turns(cluster, hosts, "lvs-1", "lvs-2")
    assert caught.value.hint == f"{again(cluster)} --host lvs-3 --host lvs-1 --host lvs-2"


def test_addresses_beyond_a_share_that_change_places(tmp_path: Path) -> None:
    directors = [{**director(n), "local_addresses": {"laddr_g1": [f"192.168.100.{64 + n}"]}} for n in (1, 2)]
    with pytest.raises(BuildError) as caught:
        turns(cluster_of(tmp_path, 4, directors=directors), Hosts({"lvs-1": (66, 66), "lvs-2": (65, 65)}))
    first = f"leave 192.168.100.65 out of local_addresses of lvs-1 at first, {again(cluster_of(tmp_path, 4))}, then"
    assert caught.value.hint.startswith(first)
    del directors[0]["local_addresses"]
    hosts = Hosts({"lvs-1": (66, 66), "lvs-2": (65, 65)})
    assert turns(cluster_of(tmp_path, 4, directors=directors), hosts)[:2] == ["lvs-1", "lvs-2"]
