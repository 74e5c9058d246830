"""The cluster as an inventory of Ansible, for those who roll out with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provision.host import Host
from provision.model import Cluster, Director


def inventory(cluster: Cluster, rendered: Path) -> str:
    """The hosts by role and mode, with what a playbook needs to copy and to restart.

    Args:
        cluster: the cluster.
        rendered: where `invoke render` writes; `lvs_rootfs` of a host points there.

    Returns:
        JSON, which is YAML: Ansible takes a file of it (`ansible-playbook -i hosts.json`). A script's answer would be
        of another form.
    """
    groups = {
        "directors": _group(cluster.directors, rendered, lvs_mode=cluster.mode),
        "realservers": _group(cluster.real_servers, rendered),
    }
    return json.dumps({"all": {"children": groups}}, indent=1) + "\n"


def _group(hosts: Sequence[Host], rendered: Path, **common: str) -> dict[str, Any]:
    return {"hosts": {host.name: _variables(host, rendered) for host in hosts}, "vars": common}


def _variables(host: Host, rendered: Path) -> dict[str, Any]:
    address, port = host.ssh
    found: dict[str, Any] = {"ansible_host": address, "ansible_user": "root", "lvs_role": host.role}
    if port:
        found["ansible_port"] = port
    found["lvs_rootfs"] = str(rendered / host.name / "rootfs")
    if isinstance(host, Director):
        found["lvs_uplink"], found["lvs_downlink"] = host.uplink, host.downlink
        found["lvs_local_addresses"] = [str(address) for address in host.all_local_addresses]
    return found
