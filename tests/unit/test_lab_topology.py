"""From a cluster file to the lab around it: links, the router and its words, the lab's copy of the file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import BuildError
from provision import cluster as clusters
from provision.lab import router, topology, variant
from provision.lab.topology import Topology
from provision.model import Cluster
from tests.unit.clusters import OSPF, VRRP

TOP = Path(__file__).resolve().parents[2]
EXAMPLES = {mode: TOP / f"provision/examples/lab-{mode}.yaml" for mode in ("ospf", "vrrp")}
SECRETS = {"OSPF_KEY": "ospf-key", "VTY_PASSWORD": "vty", "VTY_HASH": "ab1234567890.", "VRRP_PASSWORD": "vrrp"}
Change = Callable[[Any], None]


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def load(tmp_path: Path, data: dict[str, Any], change: Change = lambda _: None) -> Cluster:
    own = copy.deepcopy(data)
    change(own)
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(own, sort_keys=False), encoding="utf-8")
    return clusters.load(path, secrets=False)


def example(mode: str) -> Cluster:
    return clusters.load(EXAMPLES[mode])


def shape(found: Topology) -> dict[str, dict[str, tuple[str, ...]]]:
    """By link, who is on it with which addresses."""
    return {link.name: {f"{p.node}.{p.nic}": p.addresses for p in link.plugs} for link in found.links}


# --- links


@pytest.mark.parametrize("mode", ["ospf", "vrrp"])
def test_the_examples(mode: str) -> None:
    found = topology.build(example(mode))
    assert shape(found) == {
        "clients": {
            "client-1.eth0": ("198.51.100.11/24", "2001:db8:c11e::b/64"),
            "client-2.eth0": ("198.51.100.12/24", "2001:db8:c11e::c/64"),
            "router.clients": ("198.51.100.1/24", "2001:db8:c11e::1/64"),
        },
        "uplink": {
            "lvs-1.eth0": ("192.0.2.2/24", "2001:db8:2::2/64"),
            "lvs-2.eth0": ("192.0.2.3/24", "2001:db8:2::3/64"),
            "router.uplink": ("192.0.2.1/24", "2001:db8:2::1/64"),
        },
        "downlink": {
            "lvs-1.eth1": ("10.64.255.1/16", "2001:db8:64::ff:1/64"),
            "lvs-2.eth1": ("10.64.255.2/16", "2001:db8:64::ff:2/64"),
            "rs-1.eth0": ("10.64.1.1/16", "2001:db8:64::1:1/64"),
            "rs-2.eth0": ("10.64.1.2/16", "2001:db8:64::1:2/64"),
        },
    }
    kinds = [(node.name, node.kind) for node in found.nodes]
    assert kinds[:3] == [("client-1", "client"), ("client-2", "client"), ("router", "router")]
    assert [name for name, kind in kinds if kind == "director"] == ["lvs-1", "lvs-2"]
    assert [node.name for node in found.nodes if node.is_machine] == ["lvs-1", "lvs-2", "rs-1", "rs-2"]


def test_the_manuals_cluster_has_a_router_behind(tmp_path: Path) -> None:
    """Its real servers are on another network than its directors' downlink."""
    found = topology.build(clusters.load(TOP / "provision/examples/manual-ospf.yaml"))
    assert shape(found)["uplink"] == {"lvs-4.eth0": ("192.168.0.14/30",), "router.uplink": ("192.168.0.13/30",)}
    assert shape(found)["downlink"] == {
        "lvs-4.eth1": ("192.168.100.254/24",),
        "core.downlink": ("192.168.100.253/24",),
    }
    assert shape(found)["link-1"] == {"rs-1.eth0": ("192.168.1.1/24",), "core.link-1": ("192.168.1.254/24",)}
    assert [node.kind for node in found.nodes] == ["client", "client", "router", "core", "director", "realserver"]


def test_link_local_addresses() -> None:
    assert topology.link_local("52:54:00:00:01:00") == "fe80::5054:ff:fe00:100"


def test_each_director_may_have_an_uplink_of_its_own(tmp_path: Path) -> None:
    def apart(data: Any) -> None:
        for number, director in enumerate(data["directors"]):
            nic = director["interfaces"][0]
            nic.update(addresses=[f"192.0.2.{4 * number + 2}/30"], gateway4=f"192.0.2.{4 * number + 1}")

    found = shape(topology.build(load(tmp_path, OSPF, apart)))
    assert found["uplink"] == {"lvs-1.eth0": ("192.0.2.2/30",), "router.uplink": ("192.0.2.1/30",)}
    assert found["uplink-2"] == {"lvs-2.eth0": ("192.0.2.6/30",), "router.uplink-2": ("192.0.2.5/30",)}


def test_clients_take_a_network_that_nobody_has(tmp_path: Path) -> None:
    """The real servers of this cluster have the first of them, its VIPs a part of the second, its uplink the third."""
    with pytest.raises(BuildError, match=r"directors\[0\]\.interfaces\[0\]\.gateway4: the lab's router would have no"):
        topology.build(load(tmp_path, OSPF))

    def gateways(data: Any) -> None:
        for director in data["directors"]:
            director["interfaces"][0]["gateway4"] = "192.0.2.254"

    found = topology.build(load(tmp_path, OSPF, gateways), clients=1)
    # No IPv4 network is left: what remains is IPv6.
    assert shape(found)["clients"] == {
        "client-1.eth0": ("2001:db8:c11e::b/64",),
        "router.clients": ("2001:db8:c11e::1/64",),
    }


def test_what_no_lab_can_be_made_of_is_said_at_once(tmp_path: Path) -> None:
    def wrong(data: Any) -> None:
        data["directors"][0]["name"] = "router"
        data["directors"][0]["interfaces"][0]["gateway4"] = "192.0.2.2"  # the other director
        del data["directors"][1]["interfaces"][1]["mac"]
        data["real_servers"][0]["interfaces"][0]["name"] = "lab0"

    with pytest.raises(BuildError) as caught:
        topology.build(load(tmp_path, OSPF, wrong))
    assert caught.value.details == (
        "directors[0].interfaces[0].gateway4: 192.0.2.2 is a host; the lab's router cannot be it",
        "directors[0].name: router is the lab's own name for somebody else",
        "directors[1].interfaces[0].gateway4: the lab's router would have no address",
        "directors[1].interfaces[1].mac: the lab plugs a NIC in by it",
        "real_servers[0].interfaces[0].name: lab0 is the NIC that the lab adds",
    )


@pytest.mark.parametrize("mode", ["ospf", "vrrp"])
def test_the_examples_miss_no_real_server(mode: str) -> None:
    assert topology.absent(example(mode)) == []


def test_real_servers_that_are_no_hosts(tmp_path: Path) -> None:
    """By family, as clients ask for pages of both; pages of UDP they do not ask for."""
    with pytest.raises(BuildError) as caught:
        topology.absent(load(tmp_path, OSPF))
    assert caught.value.details == (
        "services[1].real_servers: no host has 2001:db8:5::1; nobody would answer at the IPv6 VIPs",
    )

    def udp(data: Any) -> None:
        data["services"][1].update(protocol="UDP", check={"none": True})

    assert topology.absent(load(tmp_path, OSPF, udp)) == [
        "services[0].real_servers: no host has 198.51.100.2; the lab is without",
        "services[1].real_servers: no host has 2001:db8:5::1; the lab is without",
    ]


# --- the router


def test_the_routers_words_are_those_of_the_directors() -> None:
    cluster = example("ospf")
    files = router.configuration(topology.build(cluster), cluster)
    assert list(files) == ["vtysh.conf", "zebra.conf", "ospfd.conf", "ospf6d.conf"]
    assert files["ospfd.conf"].splitlines()[2:] == [
        "interface uplink",
        " ip ospf message-digest-key 8 md5 ospf-key",
        " ip ospf hello-interval 3",
        " ip ospf dead-interval 12",
        "router ospf",
        " ospf router-id 192.0.2.1",
        " auto-cost reference-bandwidth 1000",
        " network 198.51.100.0/24 area 0.0.0.0",
        " network 192.0.2.0/24 area 0.0.0.11",
        " passive-interface clients",
        " area 0.0.0.11 authentication message-digest",
        " area 0.0.0.11 stub no-summary",
    ]
    assert " ipv6 ospf6 authentication key-id 8 hash-algo md5 key ospf-key" in files["ospf6d.conf"]
    assert "interface clients\n ipv6 ospf6 area 0.0.0.0\n" in files["ospf6d.conf"]
    assert router.needs_ours(cluster) and not router.needs_ours(example("vrrp"))
    assert " /mnt/usr/sbin/ospf6d -d -f /etc/frr/ospf6d.conf" in router.start_script()


def test_without_a_stub_the_router_offers_a_default_route(tmp_path: Path) -> None:
    def plain(data: Any) -> None:
        data["ospf"] = {"area": "0"}
        data["vip_prefixes"] = ["203.0.113.0/25"]
        data["services"].pop()
        for director in data["directors"]:
            director["interfaces"][0]["gateway4"] = "192.0.2.254"

    cluster = load(tmp_path, OSPF, plain)
    files = router.configuration(topology.build(cluster), cluster)
    assert "ospf6d.conf" not in files
    assert " default-information originate always" in files["ospfd.conf"].splitlines()
    assert "authentication" not in files["ospfd.conf"]


def test_in_the_backbone_both_sides_are_of_one_area(tmp_path: Path) -> None:
    data = yaml.safe_load(EXAMPLES["ospf"].read_text(encoding="utf-8"))
    data["ospf"].update(area="0", stub=False)
    cluster = load(tmp_path, data)
    files = router.configuration(topology.build(cluster), cluster)
    for network in ("198.51.100.0/24", "192.0.2.0/24"):
        assert f" network {network} area 0" in files["ospfd.conf"].splitlines()
    assert "interface clients\n ipv6 ospf6 area 0\n" in files["ospf6d.conf"]


def test_in_mode_vrrp_vips_are_neighbours() -> None:
    cluster = example("vrrp")
    built = topology.build(cluster)
    assert router.configuration(built, cluster) == {}
    assert router.static_routes(built, cluster) == [
        "route replace 203.0.113.0/24 dev uplink",
        "route replace 2001:db8:ffff::/64 dev uplink",
    ]
    # The manual's VIPs are of the uplink's own network.
    manual = clusters.load(TOP / "provision/examples/manual-vrrp.yaml")
    assert router.static_routes(topology.build(manual), manual) == []
    assert router.static_routes(built, example("ospf")) == []


@pytest.mark.parametrize(("area", "number"), [("0.0.0.11", 11), ("11", 11), ("0.0.1.0", 256), ("0", 0), ("0.0.0.0", 0)])  # noqa: S104
def test_areas(area: str, number: int) -> None:
    assert router._number(area) == number


# --- the lab's copy

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIHFUBiRgJrP4XztCc+jX2nD2tZasydDolGOJRyqxxoj lvsforge"


def test_the_copy_says_the_same_and_what_the_lab_adds(tmp_path: Path) -> None:
    target = tmp_path / "lab" / "cluster.yaml"
    target.parent.mkdir()
    variant.write(EXAMPLES["ospf"], target, KEY)
    text = target.read_text(encoding="utf-8")
    assert "# how long the router sends packets to a director that has died" in text
    before, after = yaml.safe_load(EXAMPLES["ospf"].read_text("utf-8")), yaml.safe_load(text)
    assert after["ssh_authorized_keys"] == [*before["ssh_authorized_keys"], KEY]
    added = [host["interfaces"].pop() for host in (*after["directors"], *after["real_servers"])]
    assert added == [{"name": "lab0", "mac": f"52:54:00:1a:b0:0{number}", "dhcp4": True} for number in range(4)]
    secret = after["ospf"]["key"].pop("secret")
    assert secret == {"file": str(tmp_path / "lab/secrets/OSPF_KEY")}
    for key in ("ssh_authorized_keys", "ospf", "vty"):
        before.pop(key), after.pop(key)
    assert after == before
    # It is a cluster, and one that a lab can be made of again.
    assert topology.build(clusters.load(target)).links == topology.build(example("ospf")).links


def test_secrets_of_the_environment_are_kept_and_others_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VTY_PASSWORD")
    target = tmp_path / "cluster.yaml"
    variant.write(EXAMPLES["ospf"], target, KEY)
    cluster = clusters.load(target)
    assert cluster.ospf is not None and cluster.ospf.key is not None and cluster.vty is not None
    assert cluster.ospf.key.value == "ospf-key"
    assert len(cluster.vty.password.value) == 8
    for name in ("OSPF_KEY", "VTY_PASSWORD"):
        assert (tmp_path / "secrets" / name).stat().st_mode & 0o777 == 0o600


def test_a_made_up_hash_has_the_form_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VTY_HASH")
    target = tmp_path / "cluster.yaml"
    variant.write(TOP / "provision/examples/manual-ospf.yaml", target, KEY)
    cluster = clusters.load(target)
    assert cluster.vty is not None and cluster.vty.encrypted


def test_files_are_named_by_their_whole_path(tmp_path: Path) -> None:
    (tmp_path / "vrrp").write_text("password\n")
    (tmp_path / "vrrp").chmod(0o600)
    (tmp_path / "motd").write_text("hello\n")

    def files(data: Any) -> None:
        data["real_servers"][0]["files"] = {"/etc/motd": {"file": "motd"}, "/etc/issue": "content"}

    load(tmp_path, VRRP, files)
    target = tmp_path / "elsewhere" / "cluster.yaml"
    target.parent.mkdir()
    variant.write(tmp_path / "cluster.yaml", target, KEY)
    assert [file.content for file in clusters.load(target).real_servers[0].files] == ["hello\n", "content"]
    assert yaml.safe_load(target.read_text("utf-8"))["vrrp"]["instances"][0]["password"] == {
        "file": str(tmp_path / "vrrp")
    }
