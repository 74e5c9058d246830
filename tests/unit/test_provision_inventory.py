"""How hosts are reached: the file that ssh reads, and Ansible's inventory."""

from __future__ import annotations

import json
from pathlib import Path

from provision import checking
from provision.inventory import inventory
from tests.unit.clusters import OSPF, load


def test_ssh_knows_the_hosts_by_their_names(tmp_path: Path) -> None:
    base = {**OSPF, "directors": [{**OSPF["directors"][0], "ssh": "[2001:db8::4]:2222"}, OSPF["directors"][1]]}
    text = checking.ssh_config(load(tmp_path, base).directors, None)
    assert text.startswith("Host lvs-1\n    User root\n    BatchMode yes\n    HostName 2001:db8::4\n    Port 2222\n")
    assert "Host lvs-2\n    User root\n    BatchMode yes\n    ConnectTimeout 20\nHost *\n" in text
    assert text.endswith("Host *\n    Include ~/.ssh/config\n    Include /etc/ssh/ssh_config\n")


def test_the_inventory(tmp_path: Path) -> None:
    """Ansible reads hosts of a file as mappings; the lists of its scripts' answers it refuses there."""
    cluster = load(tmp_path, OSPF)
    groups = json.loads(inventory(cluster, Path("/out/hosts")))["all"]["children"]
    assert {name: list(group["hosts"]) for name, group in groups.items()} == {
        "directors": ["lvs-1", "lvs-2"],
        "realservers": ["rs-1"],
    }
    assert groups["directors"]["vars"] == {"lvs_mode": "ospf"}
    assert groups["directors"]["hosts"]["lvs-2"] == {
        "ansible_host": "lvs-2",
        "ansible_user": "root",
        "lvs_role": "director",
        "lvs_rootfs": "/out/hosts/lvs-2/rootfs",
        "lvs_uplink": "eth0",
        "lvs_downlink": "eth1",
        "lvs_local_addresses": [str(address) for address in cluster.directors[1].all_local_addresses],
    }
