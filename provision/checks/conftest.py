"""What the checks share. `provision.checking` runs them, once for each host of `--hosts`.

`LVSFORGE_CLUSTER` names the cluster file, from which every expected value comes; the secrets are not needed.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host as Connection

from provision import cluster as clusters
from provision.host import Host
from provision.model import Cluster, Director, RealServer, Service

Ask = Callable[[str], str]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what does not concern a host, and let one process at a time ask one host."""
    cluster = load()
    known = {host.name: host for host in cluster.hosts}
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        host = known[item.callspec.params["_testinfra_host"].backend.hostname]  # type: ignore[attr-defined]
        item.add_marker(pytest.mark.xdist_group(host.name))
        wanted = {word for mark in item.iter_markers("role") for word in mark.args}
        families = {f"IPv{prefix.version}" for prefix in cluster.vip_prefixes}
        (kept if wanted <= {host.role, cluster.mode, *families} else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def load() -> Cluster:
    """The cluster that is checked."""
    return clusters.load(Path(os.environ["LVSFORGE_CLUSTER"]), secrets=False)


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    return load()


@pytest.fixture
def ask(host: Connection) -> Ask:
    """Run a shell command on the host and return what it printed; a failing one fails the check with its words."""

    def run(command: str) -> str:
        try:
            result = host.run("sh -c " + shlex.quote(command))
        except RuntimeError as error:  # ssh's own failure, in testinfra's words
            said = str(error).rpartition("_stderr=b")[2].strip("')\\\"").replace("\\r\\n", " ")
            pytest.fail(f"no answer over ssh: {said or error}", pytrace=False)
        assert result.rc == 0, f"{command}: status {result.rc}: {result.stderr.strip() or result.stdout.strip()}"
        return str(result.stdout).strip()

    return run


@pytest.fixture
def node(host: Connection, cluster: Cluster) -> Host:
    """The host's entry in the cluster file."""
    return next(each for each in cluster.hosts if each.name == host.backend.hostname)


@pytest.fixture
def director(node: Host) -> Director:
    assert isinstance(node, Director)
    return node


@pytest.fixture
def realserver(node: Host) -> RealServer:
    assert isinstance(node, RealServer)
    return node


@pytest.fixture
def services(director: Director, cluster: Cluster) -> tuple[Service, ...]:
    """What the director serves."""
    return cluster.services_of(director)


@pytest.fixture
def down() -> frozenset[str]:
    """Real servers, as `10.0.0.1:80`, that may be down."""
    return frozenset(os.environ.get("LVSFORGE_DOWN", "").split())


@pytest.fixture
def changing() -> bool:
    """Whether `apply` asks, of a host that it is just changing."""
    return bool(os.environ.get("LVSFORGE_CHANGING"))


@pytest.fixture
def addresses(ask: Ask) -> dict[str, set[str]]:
    """The addresses on each interface, with prefix length."""
    return bound(ask("ip -j address show"))


def bound(listing: str) -> dict[str, set[str]]:
    """Read `ip -j address show`; link-local addresses are nobody's."""
    found: dict[str, set[str]] = {}
    for link in parsed(listing):
        found[link["ifname"]] = {
            f"{each['local']}/{each['prefixlen']}" for each in link["addr_info"] if each.get("scope") != "link"
        }
    return found


def parsed(text: str) -> Any:
    """JSON; iproute2 prints nothing for an empty list."""
    return json.loads(text or "[]")
