"""What apply does about VIPs besides keepalived: those that scripts bind, and packets for those that are not here."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path

import pytest

from pipeline.errors import BuildError
from provision import apply as applying
from provision.host import File
from provision.model import Cluster
from tests.unit.clusters import OSPF, VRRP
from tests.unit.roots import FLUSH, IN_ROOTS, LOAD, VIP_ROUTES, Lab, acts, cluster_of, folder_of, sick, well

pytestmark = IN_ROOTS


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "lab")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "in")


def test_vips_bound_by_scripts_follow_their_file(lab: Lab, folder: Path) -> None:
    """keepalived runs quorum_up when a quorum comes, not for a VIP more: it is bound as those beside it are."""
    first = cluster_of(folder, vip_binding="scripts")
    applying.apply(first, ["lvs-1"], lab.connect, well)
    lab.calls("lvs-1")
    services = copy.deepcopy(OSPF["services"])
    services[0]["vips"] = ["203.0.113.1", "203.0.113.9"]
    cluster = cluster_of(folder, vip_binding="scripts", services=services)
    with pytest.raises(BuildError):
        applying.apply(cluster, ["lvs-1"], lab.connect, sick)
    assert acts(lab.calls("lvs-1")) == [
        "systemctl reload-or-restart keepalived",
        "ip address del 203.0.113.2/32 dev lo",
        "ip -o address show dev lo to 203.0.113.1/32",  # the fake prints nothing: not bound here
        *FLUSH,
        "systemctl reload-or-restart keepalived",
        "ip address del 203.0.113.9/32 dev lo",
        "ip -o address show dev lo to 203.0.113.1/32",
        *FLUSH,
    ]
    services = services[1:]
    applying.apply(cluster_of(folder, vip_binding="scripts", services=services), ["lvs-1"], lab.connect, well)
    assert acts(lab.calls("lvs-1")) == [
        "systemctl reload-or-restart keepalived",
        "ip address del 203.0.113.1/32 dev lo",
        "ip address del 203.0.113.2/32 dev lo",
        *FLUSH,
    ]


def test_the_table_for_vips_elsewhere_comes_and_goes_with_its_file(lab: Lab, folder: Path) -> None:
    """Also on a host whose image knows nothing of it; who goes back has what it had, after the VIPs have left."""

    def told(cluster: Cluster, gate: applying.Gate) -> list[str]:
        with contextlib.suppress(BuildError):
            applying.apply(cluster, ["lvs-1"], lab.connect, gate)
        return [call for call in lab.calls("lvs-1") if call.startswith(("nft", "systemctl reload-or-restart"))]

    look, load, delete = "nft list table inet lvs", "nft -f /etc/lvs/vips.nft", "nft -f -"
    reload = "systemctl reload-or-restart keepalived"
    failing = lab.root("lvs-1") / "var/lib/failing"
    failing.write_text(f"{look}\n")  # there is no table
    assert told(cluster_of(folder, VRRP), sick) == [look, load, reload, load, reload, delete]
    assert told(cluster_of(folder, VRRP), well) == [look, load, reload, load]
    assert told(cluster_of(folder, VRRP), well) == []
    more = {**VRRP["directors"][0], "sysctl": {"net.core.somaxconn": 7}}
    assert told(cluster_of(folder, VRRP, directors=[more, *VRRP["directors"][1:]]), well) == [look, load], "lost since"
    failing.write_text("")
    assert told(cluster_of(folder, VRRP), well) == [look]
    assert told(cluster_of(folder), sick) == [reload, delete, reload, load]
    assert told(cluster_of(folder), well) == [reload, delete]


def test_a_table_that_is_refused_is_taken_back(lab: Lab, folder: Path) -> None:
    (lab.root("lvs-1") / "var/lib/failing").write_text("nft list table inet lvs\nnft -f /etc/lvs/vips.nft\n")
    with pytest.raises(BuildError):
        applying.apply(cluster_of(folder, VRRP), ["lvs-1"], lab.connect, well)
    assert lab.files("lvs-1") == {}


def test_routes_for_withdrawn_vips_come_and_go_with_their_file(lab: Lab, folder: Path) -> None:
    """They are there before keepalived has a VIP more, and for some seconds after it has one less."""

    def told(cluster: Cluster, gate: applying.Gate) -> list[str]:
        with contextlib.suppress(BuildError):
            applying.apply(cluster, ["lvs-1"], lab.connect, gate)
        calls = lab.calls("lvs-1")
        return [call for call in calls if re.match("ip .*(flush proto|batch)|sleep|systemctl reload-or-res", call)]

    reload = "systemctl reload-or-restart keepalived"
    services = copy.deepcopy(OSPF["services"])
    services[0]["vips"] = services[0]["vips"][1:]
    less = cluster_of(folder, services=services)
    (lab.root("lvs-1") / "var/lib/routes").write_text("blackhole 203.0.113.1 metric 4261412864\n" * 4)
    assert told(less, sick) == [LOAD, reload, *VIP_ROUTES, reload, *FLUSH]
    assert told(less, well) == [LOAD, reload, *VIP_ROUTES]
    assert told(less, well) == []
    assert told(cluster_of(folder), well) == [LOAD, reload, LOAD], "as many as are wanted"
    assert told(cluster_of(folder, services=services), well) == [LOAD, reload, *VIP_ROUTES]
    assert told(cluster_of(folder, services=services, ospf={**OSPF["ospf"], "reference_bandwidth": 7}), well) == [LOAD]
    assert told(cluster_of(folder, VRRP), well) == [reload, *FLUSH]


def test_a_vip_more_is_bound_where_the_others_are() -> None:
    old, new = (
        File("/etc/keepalived/x.conf", f'    quorum_up "{text}"\n    quorum_down "ip addr del x dev lo;"\n', 0o640)
        for text in ("ip addr add 1.1.1.1/32 dev lo;", "ip addr add 1.1.1.1/32 dev lo; ip addr add 1.1.1.3/32 dev lo;")
    )
    assert applying.rebinding([(old, new)]) == [
        '[ -z "$(ip -o address show dev lo to 1.1.1.1/32)" ] || ip address replace 1.1.1.3/32 dev lo'
    ]
    assert applying.rebinding([(new, old)]) == ["ip address del 1.1.1.3/32 dev lo 2>/dev/null || :"]
    assert applying.rebinding([(None, new)]) == []


def test_a_vip_that_keepalived_takes_over_stays(lab: Lab, folder: Path) -> None:
    """A second service on a script's VIP: were it removed, it would be announced nowhere until it is bound again."""
    applying.apply(cluster_of(folder, vip_binding="scripts"), ["lvs-1"], lab.connect, well)
    lab.calls("lvs-1")
    services = copy.deepcopy(OSPF["services"])
    services.append({**copy.deepcopy(services[0]), "name": "more", "ports": [8443], "vips": ["203.0.113.1"]})
    applying.apply(cluster_of(folder, vip_binding="scripts", services=services), ["lvs-1"], lab.connect, well)
    assert acts(lab.calls("lvs-1")) == ["systemctl reload-or-restart keepalived"]
