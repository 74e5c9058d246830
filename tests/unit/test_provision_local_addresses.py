"""Local addresses on hosts that run: when one has no connections any more."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline import progress, run
from pipeline.errors import BuildError
from provision import local_addresses
from provision.remote import Answer

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
    monkeypatch.setattr(local_addresses, "CONNECTIONS", str(tmp_path / "ip_vs_conn"))
    return tmp_path / "ip_vs_conn"


@SHELL
def test_connections_of_local_addresses(table: Path) -> None:
    assert local_addresses.connections(Kernel(table, [], [TABLE]), BOTH) == 4
    assert local_addresses.connections(Kernel(table, [], [TABLE]), ["192.168.100.4"]) == 1
    assert local_addresses.connections(Kernel(table, [], [TABLE]), ["192.168.100.5"]) == 0


@SHELL
def test_a_table_that_is_too_large(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(table.with_name("slow"))
    monkeypatch.setattr(local_addresses, "CONNECTIONS", str(table.with_name("slow")))
    monkeypatch.setattr(local_addresses, "_COUNT_SECONDS", 0.1)
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
