"""The director's `/etc/rc.local` with tools that only write down how they were called: `tests/cases/rc-local/<case>/`.

host.conf       what the host was given; missing where it was given nothing
vips.nft, vips.routes   what nft, or ip, is told about packets for VIPs, where it is told anything
machine.yaml    the NICs: offloads as `ethtool -k` names them, and networkd's file for the link; how often rc.local has
                waited when the NIC appears (after), and when networkd has decided about it (networkd_after)
expected        what was said, what was called in which order, and how often rc.local has waited
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import run

SCRIPT = Path(__file__).parents[2] / "image/director/rootfs/etc/rc.local"
CASES = sorted(p.parent for p in (Path(__file__).parents[1] / "cases/rc-local").glob("*/expected"))

FAKE = """#!/bin/sh
[ "$1" = -k ] && { cat "$LVS_ROOT/features/$2" 2>/dev/null; exit; }
call=$(echo "${0##*/} $*" | sed "s,$LVS_ROOT,,")
echo "$call" >>"$LVS_ROOT/calls"
! grep -qxF -- "$call" "$LVS_ROOT/failing" 2>/dev/null
"""
# Time goes by: what is due at the n-th call happens.
SLEEP = """#!/bin/sh
echo "$*" >>"$LVS_ROOT/sleeps"
[ -d "$LVS_ROOT/later" ] || exit 0
due=$LVS_ROOT/later/$(($(wc -l <"$LVS_ROOT/sleeps")))
[ ! -d "$due" ] || cp -r "$due/." "$LVS_ROOT"
"""


def test_there_are_cases() -> None:
    assert len(CASES) >= 6


def put(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")
    path.chmod(mode)


def build(root: Path, case: Path) -> None:
    machine: dict[str, Any] = yaml.safe_load((case / "machine.yaml").read_text(encoding="ascii"))
    for index, (name, nic) in enumerate(machine["nics"].items(), start=2):
        here, decided = (root / f"later/{nic[key]}" if key in nic else root for key in ("after", "networkd_after"))
        put(here / f"sys/class/net/{name}/ifindex", f"{index}\n")
        put(root / "features" / name, "".join(f"{key}: {value}\n" for key, value in nic.get("features", {}).items()))
        link = f"run/systemd/netif/links/{index}"
        network = f"ADMIN_STATE=configuring\nNETWORK_FILE={nic['network']}\n" if "network" in nic else ""
        put(here / link, "ADMIN_STATE=pending\n")
        put(decided / link, network or "ADMIN_STATE=unmanaged\n")
    put(root / "failing", "".join(f"{line}\n" for line in machine.get("failing", [])))
    for tool in (
        "bin/ethtool",
        "bin/ip",
        "usr/sbin/nft",
        "usr/sbin/set_irq_affinity",
        "lib/systemd/systemd-networkd-wait-online",
    ):
        put(root / tool, FAKE, 0o755)
    put(root / "bin/sleep", SLEEP, 0o755)
    for name in ("host.conf", "vips.nft", "vips.routes"):
        if (case / name).exists():
            put(root / "etc/lvs" / name, (case / name).read_text(encoding="utf-8"))


def observe(root: Path, result: run.Result) -> str:
    calls = root / "calls"
    said = [f"exit {result.returncode}", "--- stdout", result.stdout, "--- stderr", result.stderr, "--- called"]
    said.append(calls.read_text(encoding="utf-8") if calls.exists() else "")
    if (root / "sleeps").exists():
        sleeps = (root / "sleeps").read_text(encoding="ascii").splitlines()
        said += ["--- waited", *(f"{sleeps.count(each)} times {each} s" for each in sorted(set(sleeps)))]
    said.append("--- written")
    said += [f"{file.relative_to(root)}" for file in sorted(root.glob("run/systemd/network/**/*.conf"))]
    lines = "\n".join(part.strip("\n") for part in said).replace(str(root), "").splitlines()
    return "\n".join(line for line in lines if line) + "\n"


def play(root: Path, case: Path) -> str:
    build(root, case)
    return observe(root, run.run(["bash", SCRIPT], env={"LVS_ROOT": str(root)}, check=False, what="rc.local"))


@pytest.mark.runs("bash")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Path, tmp_path: Path) -> None:
    assert play(tmp_path, case) == (case / "expected").read_text(encoding="utf-8")


@pytest.mark.runs("bash")
def test_a_second_run_says_the_same(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "two-nics")
    first = play(tmp_path, case)
    (tmp_path / "calls").unlink()
    assert play(tmp_path, case) == first


@pytest.mark.runs("bash")
def test_host_conf_is_never_executed(tmp_path: Path) -> None:
    marks = [tmp_path / f"mark{n}" for n in range(4)]
    shutil.copytree(next(c for c in CASES if c.name == "two-nics"), tmp_path / "case")
    (tmp_path / "case/host.conf").write_text(
        f'UPLINK=$(touch {marks[0]})\nDOWNLINK=`touch {marks[1]}`\ntouch {marks[2]}\nNICS="eth0; touch {marks[3]}"\n',
        encoding="ascii",
    )
    said = play(tmp_path / "root", tmp_path / "case")
    assert not any(mark.exists() for mark in marks)
    assert "set_irq_affinity " not in said.split("--- called")[1]
    assert said.startswith("exit 1")


@pytest.mark.runs("bash")
def test_local_addresses_that_are_not_wanted_any_more_go(tmp_path: Path) -> None:
    """Those that an earlier run added, and no others."""
    case = next(c for c in CASES if c.name == "two-nics")
    play(tmp_path, case)
    conf = tmp_path / "etc/lvs/host.conf"
    text = conf.read_text(encoding="ascii")

    def again(addresses: str) -> list[str]:
        conf.write_text(text + f'LOCAL_ADDRESSES="{addresses}"\n', encoding="ascii")
        (tmp_path / "calls").unlink()
        run.run(["bash", SCRIPT], env={"LVS_ROOT": str(tmp_path)})
        lines = (tmp_path / "calls").read_text(encoding="ascii").splitlines()
        return sorted(line for line in lines if line.startswith("ip address"))

    assert again("192.168.100.2 192.168.100.9") == [
        "ip address del 192.168.100.1/32 dev eth1",
        "ip address del 2001:db8::1/128 dev eth1",
        "ip address replace 192.168.100.2/32 dev eth1",
        "ip address replace 192.168.100.9/32 dev eth1",
    ]
    assert again("192.168.100.2 192.168.100.9") == [
        "ip address replace 192.168.100.2/32 dev eth1",
        "ip address replace 192.168.100.9/32 dev eth1",
    ]
    assert again("") == ["ip address del 192.168.100.2/32 dev eth1", "ip address del 192.168.100.9/32 dev eth1"]
    assert again("") == []


@pytest.mark.runs("bash")
@pytest.mark.parametrize(
    "line",
    [
        'LOCAL_ADDRESSES="192.168.100.2, 192.168.100.9"',
        'LOCAL_ADDRESSES="192.168.100.2',
        'LOCAL_ADRESSES="192.168.100.2"',
        'LOCAL_ADDRESSES="192.168.100.2 here"',
        'LOCAL_ADDRESSES="192.168.100.2"\nLOCAL_DEVICE=eth7',
        'LOCAL_ADDRESSES="192.168.100.2"\nDOWNLINK eth1',
    ],
)
def test_no_local_address_goes_for_a_slip_of_the_pen(tmp_path: Path, line: str) -> None:
    """Thousands of connections go with each; once the file is mended, what it does not name goes."""
    case = next(c for c in CASES if c.name == "two-nics")
    play(tmp_path, case)
    conf, listed = tmp_path / "etc/lvs/host.conf", tmp_path / "run/lvs/local-addresses"
    text, before = conf.read_text(encoding="ascii"), set(listed.read_text(encoding="ascii").splitlines())
    assert before

    def again(line: str) -> tuple[str, list[str]]:
        conf.write_text(f"{text}{line}\n", encoding="ascii")
        (tmp_path / "calls").unlink()
        result = run.run(["bash", SCRIPT], env={"LVS_ROOT": str(tmp_path)}, check=False)
        said = result.stderr
        assert result.returncode == ("is removed before" in said), "systemd runs it again"
        lines = (tmp_path / "calls").read_text(encoding="ascii").splitlines()
        return said, sorted(line for line in lines if line.startswith("ip address del"))

    said, gone = again(line)
    assert gone == []
    assert "no local address is removed before" in said
    assert set(listed.read_text(encoding="ascii").splitlines()) >= before
    said, gone = again('LOCAL_ADDRESSES="192.168.100.2"')
    assert "is removed before" not in said
    assert gone == ["ip address del 192.168.100.1/32 dev eth1", "ip address del 2001:db8::1/128 dev eth1"]
