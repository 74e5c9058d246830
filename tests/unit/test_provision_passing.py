"""Packets for VIPs that are on another director: which prefixes they are dropped for, and the check of that."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from provision import render
from provision.checks import test_high as high
from provision.model import Cluster
from tests.unit.clusters import OSPF, VRRP, Change, at, load

ROUTED = "local_addresses.laddr_g1.routed"
RULES = "/etc/lvs/vips.nft"
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
