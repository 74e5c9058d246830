"""Packets for VIPs that are not here: what a director drops them for, and the checks of that."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from provision import render
from provision.checks import test_high as high
from provision.model import Cluster
from tests.unit.clusters import OSPF, VRRP, Change, at, load

ROUTED = "local_addresses.laddr_g1.routed"
RULES, ROUTES = "/etc/lvs/vips.nft", "/etc/lvs/vips.routes"
# As nft 1.0.6 prints what was loaded.
LISTED = """\
table inet lvs {
	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname "eth0" ip daddr 203.0.113.0/25 counter packets 3 bytes 180 drop
		iifname "eth0" ip6 daddr 2001:db8:ffff::/64 counter packets 0 bytes 0 drop
	}
}
"""


OTHER = LISTED.replace("eth0", "eth1")


def spoilt(tmp_path: Path, *changes: Change, base: dict[str, Any] = VRRP) -> Cluster:
    data = copy.deepcopy(base)
    for change in changes:
        change(data)
    return load(tmp_path, data)


def dropped(cluster: Cluster) -> list[str]:
    """The prefixes in the first director's file, in the order of the file."""
    texts = [file.content for file in render.Renderer(cluster).root_files(cluster.directors[0]) if file.path == RULES]
    lines = [line for text in texts for line in text.splitlines() if line.endswith("counter drop")]
    assert all(line.startswith('        iifname "eth0" ip') for line in lines)
    return [line.split()[4] for line in lines]


def test_whose_packets_are_dropped(tmp_path: Path) -> None:
    assert dropped(spoilt(tmp_path)) == ["203.0.113.0/25", "2001:db8:ffff::/64"]
    assert dropped(spoilt(tmp_path, base=OSPF)) == []
    assert dropped(spoilt(tmp_path, at("directors.0.downlink", "eth0"), at(ROUTED, True))) == [], "one arm"


@pytest.mark.parametrize(
    "prefix",
    ["192.0.0.0/8", "198.51.100.0/24", "198.51.100.2/32", "198.18.0.0/15", "10.9.0.0/16"],
    ids=[
        "a network of the director's",
        "a real server's network",
        "a real server that is no host of the file",
        "a sorry server",
        "a network that the director knows the way to",
    ],
)
def test_prefixes_with_other_hosts_are_left_out(prefix: str, tmp_path: Path) -> None:
    prefixes = [prefix, "203.0.113.0/25", "2001:db8:ffff::/64"]
    sorry = at("services.0.sorry_servers", [{"address": "198.18.0.9"}])
    way = at("directors.0.interfaces.1.routes", [{"to": "10.9.8.0/24", "via": "192.168.100.9"}])
    assert dropped(spoilt(tmp_path, at("vip_prefixes", prefixes), sorry, way)) == prefixes[1:]


def test_the_check(tmp_path: Path) -> None:
    def judge(listed: str, cluster: Cluster) -> None:
        high.test_packets_for_vips_elsewhere_are_dropped(lambda _: listed, cluster, cluster.directors[0])

    cluster = spoilt(tmp_path)
    judge(LISTED, cluster)
    for listed in ("", LISTED.replace("2001:db8:ffff::/64", "2001:db8:fffe::/64"), LISTED.replace(" drop", ""), OTHER):
        with pytest.raises(AssertionError, match=r", not for \['2001:db8:ffff::/64', '203.0.113.0/25'\]"):
            judge(listed, cluster)
    with pytest.raises(AssertionError, match=r", not for \[\]"):
        judge(LISTED, spoilt(tmp_path, at("directors.0.downlink", "eth0"), at(ROUTED, True)))


# --- mode ospf

WITHDRAWABLE = ["2001:db8:ffff::3", "203.0.113.1", "203.0.113.2", "203.0.113.3"]


def routes(cluster: Cluster) -> list[list[str]]:
    """The words of the lines of the first director's file."""
    found = [file.content for file in render.Renderer(cluster).root_files(cluster.directors[0]) if file.path == ROUTES]
    return [line.split() for text in found for line in text.splitlines() if not line.startswith("#")]


def test_which_vips_have_a_route_for_when_they_are_withdrawn(tmp_path: Path) -> None:
    """Each once, though it has two services; in the file's protocol and behind OSPF's own routes."""
    words = routes(spoilt(tmp_path, base=OSPF))
    assert sorted(line[3] for line in words) == WITHDRAWABLE
    assert {(*line[:3], *line[4:]) for line in words} == {
        ("route", "replace", "blackhole", "metric", str(254 * 2**24), "proto", "254")
    }
    assert routes(spoilt(tmp_path)) == [], "the other mode"
    elsewhere = copy.deepcopy(OSPF["services"])
    for service in elsewhere:
        service["directors"] = ["lvs-2"]
    assert routes(spoilt(tmp_path, at("services", elsewhere), base=OSPF)) == [], "another director's"


def test_the_check_of_withdrawn_vips(tmp_path: Path) -> None:
    cluster = spoilt(tmp_path, base=OSPF)
    four, six = (
        json.dumps([{"type": "blackhole", "dst": vip} for vip in WITHDRAWABLE if (":" in vip) is wide])
        for wide in (False, True)
    )

    def judge(four: str, six: str) -> None:
        answers = {
            "ip -4 -j route show type blackhole proto 254": four,
            "ip -6 -j route show type blackhole proto 254": six,
        }
        high.test_packets_for_withdrawn_vips_are_dropped(answers.__getitem__, cluster, cluster.directors[0])

    judge(four, six)
    for less in ((four, ""), ("", six), (four, four), (four.replace("113.1", "113.9"), six)):
        with pytest.raises(AssertionError, match=re.escape(f"not for {WITHDRAWABLE}")):
            judge(*less)
