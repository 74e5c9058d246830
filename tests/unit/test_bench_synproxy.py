"""What `invoke bench-synproxy` adds to the other one: its rows, what goes into the machine, and the SYNs of a flood."""

from __future__ import annotations

import inspect
import itertools
import re
import struct
from pathlib import Path

import pytest

from kernel import bench, defence, develop
from kernel.inside import synproxy
from pipeline import vm
from pipeline.errors import BuildError
from pipeline.store import Stage
from tests.kernel import packets

TCG = vm.Accelerator("tcg", "qemu64", 6.0, "no kvm")
KVM = vm.Accelerator("kvm", "host", 1.0)


def plan(accelerator: vm.Accelerator, tmp_path: Path, rounds: int = 0) -> defence.Plan:
    kernel = develop.Built("kernel-lvs 6.12.107-1.abc", "6.12.107-1.abc.lvs", tmp_path / "kernel")
    return defence.Plan(kernel, tmp_path, tmp_path, accelerator, rounds, tmp_path / "work")


def test_the_rows_are_those_that_others_read() -> None:
    assert {row.name: row.limit for row in defence.ROWS} == {
        "syn-vs-nftables": 1.5,
        "syn-vs-cookies": 1.0,
        "bulk": 0.98,
        "legit-under-flood": 1.0,
    }


def test_what_is_compared_is_what_is_measured() -> None:
    """The names of trials and sides stand in two files."""
    text = inspect.getsource(synproxy)
    for row in defence.ROWS:
        for own in row.comparisons:
            for side in (own.over, own.under):
                assert f'"{side}"' in text
    kinds = {re.sub(r"-.*", "", own.trial) for row in defence.ROWS for own in row.comparisons}
    assert kinds == {"syn", "bulk", "legit"}
    for kind in kinds:
        assert f'f"{kind}-' in text


def test_a_report_of_these_rows() -> None:
    samples = [
        bench.Sample(own.trial, side, number, value)
        for row in defence.ROWS
        for own in row.comparisons
        for side, value in ((own.over, 160.0), (own.under, 100.0))
        for number in (1, 2)
    ]
    report = bench.Report.of("x", list(dict.fromkeys(samples)), 2, defence.ROWS)
    assert [row["name"] for row in report.data()] == [row.name for row in defence.ROWS]
    assert report.missed == []


def test_the_machine_finds_everything_that_it_is_told_of(tmp_path: Path) -> None:
    own = plan(bench.Counted(**TCG.__dict__), tmp_path)
    machine = own.machine(tmp_path / "out")
    assert machine.cpus == 1
    assert {share.tag for share in machine.shares} == {"/dev/root", "programs", "inside", "kernel", "out"}
    assert "python3 /inside/synproxy.py" in machine.append
    assert len(machine.append) < 2048  # what x86 takes
    read = set(re.findall(r'plan\["(\w+)"\]', inspect.getsource(synproxy)))
    assert read | {f"bytes_{size}" for size in ("large", "small")} == set(own.instructions())
    assert own.rounds == 5
    assert plan(KVM, tmp_path).rounds == 10


def test_bad_input_is_refused_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("work began before the input was checked")

    monkeypatch.setattr(develop, "chosen", refuse)
    with pytest.raises(BuildError, match=r"--rounds 1000.*--json") as caught:
        defence.synproxy(Stage("x", {}, lambda _: None), 1000, tmp_path)
    assert caught.value.hint == "invoke --help bench-synproxy"


@pytest.mark.parametrize("family", [4, 6])
def test_the_syns_of_a_flood_are_whole(family: int) -> None:
    """Whoever answers them looks at the checksum."""
    flood = object.__new__(synproxy.Flood)
    flood.ends = bytes(12)
    seen = set()
    for frame in itertools.islice(flood.syns(family, 80), 0, 70000, 97):
        packet = packets.Packet(bytes(frame[14:]))
        assert packet.problems() == []
        assert packet.flags == "S"
        assert packet.dport == 80
        assert set(packet.options) == {packets.MSS, packets.SACK_OK, packets.TIMESTAMP, packets.WSCALE}
        seen.add((packet.source, packet.sport))
    assert len({source for source, _ in seen}) == 100
    assert len(seen) > 600


def answer(family: int, *, flags: int = 0x12, number: int = 1, port: int = 80, options: bytes = b"") -> bytes:
    """The frame that answers the first SYN of a flood, right or wrong."""
    flood = object.__new__(synproxy.Flood)
    flood.ends = bytes(12)
    syn = bytes(next(flood.syns(family, 80)))
    size = 40 if family == 6 else 20
    source, client, sent = struct.unpack("!HHI", syn[14 + size : 22 + size])
    half = 16 if family == 6 else 4
    addresses = syn[14 + size - half : 14 + size] + syn[14 + size - 2 * half : 14 + size - half]
    options = options or struct.pack("!BBHBBBBIIBBBB", 2, 4, 1460, 4, 2, 8, 10, 77, 1000, 1, 3, 3, 7)
    tcp = struct.pack("!HHIIBBHHH", port, source, 5, sent + number, 0xA0, flags, 1024, 0, 0) + options
    check = 0xFFFF ^ synproxy.total(addresses + struct.pack("!II", 6, len(tcp)) + tcp)
    assert client == 80
    return syn[: 14 + size - 2 * half] + addresses + tcp[:16] + struct.pack("!H", check) + tcp[18:]


@pytest.mark.parametrize("family", [4, 6])
def test_a_right_answer_is_told_from_wrong_ones(family: int) -> None:
    assert synproxy.wrong(answer(family), family, 80) == ""
    assert synproxy.wrong(answer(family), 10 - family, 80) == "too short, or of another protocol"
    assert synproxy.wrong(answer(family), family, 81) == "of another address or port"
    assert synproxy.wrong(answer(family, flags=0x14), family, 80) == "no SYN-ACKs"
    assert synproxy.wrong(answer(family, number=2), family, 80) == "for another number"
    assert synproxy.wrong(answer(family, options=bytes(20)), family, 80) == "without the client's timestamp"
    damaged = bytearray(answer(family))
    damaged[-1] ^= 1
    assert synproxy.wrong(bytes(damaged), family, 80) == "of a wrong checksum"
