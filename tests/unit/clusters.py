"""Two good clusters, one of each mode, and ways to spoil them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from provision import cluster as clusters
from provision.model import Cluster

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDHFUBiRgJrP4XztCc+jX2nD2tZasydDolGOJRyqxxoj example"
Change = Callable[[dict[str, Any]], Any]


def load(tmp_path: Path, base: dict[str, Any]) -> Cluster:
    """A cluster as it is read from a file, without its secrets."""
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(base), encoding="utf-8")
    return clusters.load(path, secrets=False)


def director(number: int) -> dict[str, Any]:
    return {
        "name": f"lvs-{number}",
        "slot": number,
        "interfaces": [
            {"name": "eth0", "mac": f"52:54:00:00:0{number}:00", "addresses": [f"192.0.2.{number}/24"]},
            {
                "name": "eth1",
                "mac": f"52:54:00:00:0{number}:01",
                "addresses": [f"192.168.100.20{number}/24", f"2001:db8:64::20{number}/64"],
            },
        ],
        "uplink": "eth0",
        "downlink": "eth1",
    }


OSPF: dict[str, Any] = {
    "mode": "ospf",
    "ssh_authorized_keys": [KEY],
    "vip_prefixes": ["203.0.113.0/25", "2001:db8:ffff::/64"],
    "ospf": {"area": "0.0.0.11", "stub": True, "key": {"id": 8, "secret": {"file": "ospf"}}},
    "local_addresses": {
        "laddr_g1": {"addresses": ["192.168.100.1-192.168.100.8", "2001:db8:64::1-2001:db8:64::8"], "per_director": 4}
    },
    "directors": [director(1), director(2)],
    "real_servers": [
        {"name": "rs-1", "interfaces": [{"name": "eth0", "mac": "52:54:00:01:00:00", "addresses": ["198.51.100.1/24"]}]}
    ],
    "services": [
        {
            "name": "web",
            "vips": ["203.0.113.1", "203.0.113.2"],
            "ports": [80],
            "real_servers": [{"address": "198.51.100.1"}, {"address": "198.51.100.2", "weight": 2}],
        },
        {
            "name": "tls",
            "vips": ["203.0.113.3", "2001:db8:ffff::3"],
            "ports": [443],
            "real_servers": [{"address": "198.51.100.1"}, {"address": "2001:db8:5::1"}],
        },
    ],
}
VRRP: dict[str, Any] = {
    **{key: value for key, value in OSPF.items() if key != "ospf"},
    "mode": "vrrp",
    "vrrp": {
        "instances": [
            {"name": "VI_1", "id": 200, "password": {"file": "vrrp"}},
            {"name": "VI_2", "id": 201},
        ]
    },
    "directors": [{**director(1), "priority": 150}, {**director(2), "priority": 90}],
    "services": [
        {**OSPF["services"][0], "instance": "VI_1"},
        {**OSPF["services"][1], "instance": "VI_2"},
    ],
}


def at(path: str, value: Any = None, *, drop: bool = False) -> Change:
    """Set, or drop, what stands at a dotted path."""

    def change(data: Any) -> None:
        *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for key in way:
            data = data[key]
        if drop:
            del data[last]
        else:
            data[last] = value

    return change


def more(path: str, value: Any) -> Change:
    """Append to the list at a dotted path."""

    def change(data: Any) -> None:
        for part in path.split("."):
            data = data[int(part) if part.isdigit() else part]
        data.append(value)

    return change


def both(*changes: Change) -> Change:
    return lambda data: [change(data) for change in changes]
