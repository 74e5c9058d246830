"""Plan and apply, with every script that they send run for real by a shell in a root of its own."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import pytest

from pipeline import settings
from pipeline.errors import BuildError
from provision import apply as applying
from provision import checking, claim, render, rollout
from provision import operations as ops
from provision.host import Host
from provision.model import Cluster
from provision.remote import Remote, Shell, braced
from tests.conftest import Recorder
from tests.unit.clusters import OSPF, VRRP
from tests.unit.roots import FLUSH, IN_ROOTS, Lab, LabRemote, acts, cluster_of, folder_of, sick, well

pytestmark = IN_ROOTS


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "lab")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "in")


def expected(cluster: Cluster, name: str) -> dict[str, tuple[bytes, int, int]]:
    (host,) = cluster.chosen((name,))
    return {
        file.path: (file.content.encode(), file.mode, 920 if file.owner == "frr" else 0)
        for file in render.Renderer(cluster).root_files(host)
    }


def folders(lab: Lab, name: str) -> dict[str, int]:
    """The modes of a host's folders: of / itself, and all below /etc."""
    root = lab.root(name)
    return {str(p): p.stat().st_mode & 0o7777 for p in (root, *(root / "etc").rglob("*")) if p.is_dir()}


def test_a_new_host_then_nothing_to_do(lab: Lab, folder: Path) -> None:
    cluster = cluster_of(folder)
    asked: list[str] = []
    lines = applying.apply(cluster, ["lvs-1"], lab.connect, lambda host, _: asked.append(host.name))
    assert lines == ["lvs-1: 13 files changed, network sysctl keepalived vip-routes rc-local zebra ospfd ospf6d"]
    assert lab.files("lvs-1") == expected(cluster, "lvs-1")
    assert asked == ["lvs-1"]
    calls = lab.calls("lvs-1")
    local = [f"{a}/{a.max_prefixlen}" for a in cluster.directors[0].all_local_addresses]
    assert acts(calls) == [
        "ip -o address show",
        *(f"ip address replace {each} dev eth1{' preferred_lft 0' if ':' in each else ''}" for each in local),
        "systemd-sysctl ",
        "systemctl reload-or-restart keepalived",
        *FLUSH,
        "systemctl restart rc-local",
        "systemctl restart zebra",
        "systemctl restart ospfd",
        "systemctl restart ospf6d",
    ]
    assert any(call.startswith("systemd-run --quiet --unit=lvs-rollback --on-active=960 ") for call in calls)
    assert not (lab.root("lvs-1") / "var/lib/timer").exists(), "the timer was stopped"
    assert applying.apply(cluster, ["lvs-1"], lab.connect, sick) == ["lvs-1: nothing to do"]
    assert lab.calls("lvs-1") == []


def test_a_plan_shows_no_secret_and_changes_nothing(lab: Lab, folder: Path) -> None:
    cluster = cluster_of(folder, vty={"password": {"file": "vrrp"}})
    text = "\n".join(applying.plan(cluster, (), lab.connect))
    concerned = "network sysctl keepalived vip-routes rc-local zebra ospfd ospf6d"
    assert f"== lvs-1: 13 files differ; concerned: {concerned}" in text
    assert "+ ip ospf message-digest-key 8 md5 (secret)" in text and "+password (secret)" in text
    assert "k3y" not in text and "s3cret" not in text
    assert "+    192.168.100.4" in text
    assert lab.files("lvs-1") == {} and lab.calls("lvs-1") == [] and lab.puts == []


def test_a_plan_of_what_is_as_it_should_be(lab: Lab, folder: Path) -> None:
    cluster = cluster_of(folder)
    applying.apply(cluster, ["lvs-2"], lab.connect, well)
    assert applying.plan(cluster, ["lvs-2"], lab.connect) == ["== lvs-2: as it should be"]
    (lab.root("lvs-2") / "etc/lvs/host.conf").chmod(0o600)
    assert applying.plan(cluster, ["lvs-2"], lab.connect) == [
        "== lvs-2: 1 files differ; concerned: rc-local",
        "  /etc/lvs/host.conf: 0600 root becomes 0644 root",
    ]


def test_a_host_that_is_down_does_not_hide_the_others(
    lab: Lab, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.down.add("lvs-1")
    with pytest.raises(BuildError, match="1 of the hosts could not be asked"):
        applying.plan(cluster_of(folder), (), lab.connect)
    out = capsys.readouterr().out
    assert "== lvs-1: not known" in out and "== lvs-2: 13 files differ" in out


def test_only_what_changed_is_told(lab: Lab, folder: Path) -> None:
    """A real server more: keepalived reads its files again, and nothing else is touched."""
    applying.apply(cluster_of(folder), ["lvs-1"], lab.connect, well)
    lab.calls("lvs-1")
    services = copy.deepcopy(OSPF["services"])
    services[0]["real_servers"].append({"address": "198.51.100.3"})
    cluster = cluster_of(folder, services=services)
    before = lab.root("lvs-1").joinpath("etc/keepalived/tls.conf").stat().st_ino
    assert applying.apply(cluster, ["lvs-1"], lab.connect, well) == ["lvs-1: 1 files changed, keepalived"]
    assert acts(lab.calls("lvs-1")) == ["systemctl reload-or-restart keepalived"]
    assert lab.files("lvs-1") == expected(cluster, "lvs-1")
    assert lab.root("lvs-1").joinpath("etc/keepalived/tls.conf").stat().st_ino == before


# As cloud-init writes it, with routes that the cluster file does not have.
NETWORKD = """[Match]
Name=eth0

[Network]
DHCP=no

[Address]
Address=192.0.2.2/24

[Route]
Gateway=192.0.2.1

[Route]
Destination=10.65.0.0/16
Gateway=192.0.2.9

[Route]
Gateway=2001:db8:2::1

[Route]
Gateway=2001:db8:2::9
Destination=2001:db8:65::/48
"""


def test_default_routers_are_the_networks(lab: Lab, folder: Path) -> None:
    """Where OSPF brings better ones they stand in a file of their own, which cloud-init's do not take along."""
    applying.apply(cluster_of(folder), ["lvs-1"], lab.connect, well)
    lab.calls("lvs-1")
    made = [lab.root("lvs-1") / f"etc/systemd/network/10-cloud-init-eth0.{end}" for end in ("network", "link")]
    for file in made:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(NETWORKD)
    directors = copy.deepcopy(OSPF["directors"])
    directors[0]["interfaces"][0]["gateway4"] = "192.0.2.254"
    cluster = cluster_of(folder, directors=directors)
    lines = applying.apply(cluster, ["lvs-1"], lab.connect, well)
    assert lines == ["lvs-1: 1 files changed, network rc-local"]
    assert lab.files("lvs-1") == expected(cluster, "lvs-1") and not any(file.exists() for file in made)
    text = lab.files("lvs-1")["/etc/systemd/network/10-cloud-init-eth0.network.d/50-gateway.conf"][0].decode()
    assert "[Route]\nGateway=192.0.2.254\nMetric=4261412864\n" in text
    calls = lab.calls("lvs-1")
    assert "networkctl reload" in calls
    # The default route of IPv4 is in the new file, too; what only the old one has would stay in the kernel.
    assert [call for call in calls if "route flush" in call] == [
        "ip -4 route flush exact 10.65.0.0/16 dev eth0 proto static",
        "ip -6 route flush exact ::/0 dev eth0 proto static",
        "ip -6 route flush exact 2001:db8:65::/48 dev eth0 proto static",
    ]
    # Rolled back, the new file's are too many.
    directors[0]["interfaces"][0].pop("gateway4")
    with pytest.raises(BuildError):
        applying.apply(cluster_of(folder, directors=directors), ["lvs-1"], lab.connect, sick)
    flushed = [call for call in lab.calls("lvs-1") if "route flush" in call]
    assert flushed == ["ip -4 route flush exact 0.0.0.0/0 dev eth0 proto static"]


def toa_bpf_is_loaded(lab: Lab) -> None:
    link = lab.root("rs-1") / "sys/fs/bpf/toa/link_toa_sockops"
    link.parent.mkdir(parents=True)
    link.touch()


def test_whom_toa_believes(lab: Lab, folder: Path) -> None:
    applying.apply(cluster_of(folder), ["rs-1"], lab.connect, well)
    lab.calls("rs-1")
    pools = {"laddr_g1": {**OSPF["local_addresses"]["laddr_g1"], "addresses": ["192.168.100.1-192.168.100.16"]}}
    services = [OSPF["services"][0]]
    cluster = cluster_of(folder, local_addresses=pools, services=services)
    assert applying.apply(cluster, ["rs-1"], lab.connect, well) == ["rs-1: 2 files changed, sysctl toa-bpf"]
    assert acts(lab.calls("rs-1")) == ["systemd-sysctl "], "nobody has loaded toa-bpf"
    assert b"trusted = 192.168.100.1, 192.168.100.2/31," in lab.files("rs-1")["/etc/toa-bpf.conf"][0]
    # Its unit may well be stopped: its programs are there, and believe whom they were told.
    toa_bpf_is_loaded(lab)
    assert applying.apply(cluster_of(folder), ["rs-1"], lab.connect, well) == ["rs-1: 2 files changed, sysctl toa-bpf"]
    assert acts(lab.calls("rs-1")) == ["systemd-sysctl ", "toa-bpf load"]


def test_what_is_not_wanted_any_more_goes(lab: Lab, folder: Path) -> None:
    applying.apply(cluster_of(folder), ["lvs-1"], lab.connect, well)
    own = lab.root("lvs-1") / "etc/keepalived/own.conf"
    own.write_text("! an operator's\n")
    cluster = cluster_of(folder, services=OSPF["services"][:1], vip_prefixes=OSPF["vip_prefixes"][:1])
    lab.calls("lvs-1")
    (line,) = applying.apply(cluster, ["lvs-1"], lab.connect, well)
    assert own.exists()
    own.unlink()
    assert lab.files("lvs-1") == expected(cluster, "lvs-1")
    assert "ospf6d" in line
    assert "systemctl stop ospf6d" in lab.calls("lvs-1"), "no IPv6 is announced any more"


# As keepalived's reload begins: the kernel's set still has the address, and no connection of it is open.
SET = """\
VIP:VPORT               TOTAL    SNAT_IP              CONFLICTS  CONNS
203.0.113.1:80          1
                                 192.168.100.3        0          0
"""


def without(folder: Path, *addresses: str) -> Cluster:
    pools = copy.deepcopy(OSPF["local_addresses"])
    pools["laddr_g1"]["without"] = list(addresses)
    return cluster_of(folder, local_addresses=pools)


def test_a_local_address_goes_when_keepalived_has_given_it_up(lab: Lab, folder: Path) -> None:
    applying.apply(cluster_of(folder), ["lvs-1"], lab.connect, well)
    lab.calls("lvs-1")
    (lab.root("lvs-1") / "var/lib/ipvsadm").write_text(SET)
    applying.apply(without(folder, "192.168.100.3"), ["lvs-1"], lab.connect, well)
    assert acts(lab.calls("lvs-1")) == [
        "systemctl reload-or-restart keepalived",
        "ipvsadm -Gn",  # not yet
        "ipvsadm -Gn",
        "awk /proc/net/ip_vs_conn",  # its connections have ended
        "systemctl restart rc-local",
    ]


def test_local_addresses_that_were_added_are_rolled_back(lab: Lab, folder: Path) -> None:
    """After keepalived has its old files again, and not one that was there before: it is somebody else's."""
    applying.apply(without(folder, "192.168.100.3", "192.168.100.4"), ["lvs-1"], lab.connect, well)
    lab.calls("lvs-1")
    (lab.root("lvs-1") / "var/lib/addresses").write_text(
        "2: eth0    inet 192.168.100.3/32 scope global eth0\n3: eth1    inet 192.168.100.4/32 scope global eth1\n"
    )
    with pytest.raises(BuildError, match="lvs-1 is not well"):
        applying.apply(cluster_of(folder), ["lvs-1"], lab.connect, sick)
    calls = acts(lab.calls("lvs-1"))
    assert calls[-2:] == ["systemctl reload-or-restart keepalived", "ip address del 192.168.100.3/32 dev eth1"]
    assert "ip address replace 192.168.100.4/32 dev eth1" in calls


def test_a_file_that_its_daemon_refuses_is_not_installed(lab: Lab, folder: Path) -> None:
    cluster = cluster_of(folder)
    applying.apply(cluster, ["lvs-1"], lab.connect, well)
    before = lab.files("lvs-1")
    lab.calls("lvs-1")
    services = copy.deepcopy(OSPF["services"])
    services[0]["name"] = "broken"
    with pytest.raises(BuildError, match="the new files' own checkers") as caught:
        applying.apply(cluster_of(folder, services=services), (), lab.connect, well)
    assert caught.value.details[0].endswith("broken")
    assert lab.files("lvs-1") == before
    assert lab.calls("lvs-1") == ["ipvsadm -Ln"], "no timer, nothing told"
    assert lab.puts.count(f"{applying.STATE}/new.tar") == 3 and lab.files("lvs-2") == {}, "the next host has nothing"


def test_a_line_that_a_routing_daemon_does_not_know_is_not_installed(lab: Lab, folder: Path) -> None:
    directors = copy.deepcopy(OSPF["directors"])
    directors[0]["hostnames"] = {"zebra": "broken"}
    with pytest.raises(BuildError) as caught:
        applying.apply(cluster_of(folder, directors=directors), ["lvs-1"], lab.connect, well)
    assert caught.value.details == ("zebra.conf: No such command on config line 2: hostname broken",)
    assert lab.files("lvs-1") == {}


@pytest.mark.parametrize("failing", ["", "systemctl reload-or-restart keepalived", "systemctl restart rc-local"])
def test_a_host_that_fails_is_rolled_back_and_stops_the_rest(failing: str, lab: Lab, folder: Path) -> None:
    first = cluster_of(folder)
    for name in ("lvs-1", "lvs-2"):
        applying.apply(first, [name], lab.connect, well)
    before, modes = lab.files("lvs-1"), folders(lab, "lvs-1")
    lab.calls("lvs-1")
    lab.calls("lvs-2")
    pools = copy.deepcopy(OSPF["local_addresses"])
    pools["laddr_g1"]["without"] = ["192.168.100.3", "192.168.100.7"]
    services = copy.deepcopy(OSPF["services"])
    services[1]["name"] = "secure"
    cluster = cluster_of(folder, local_addresses=pools, services=services)
    (lab.root("lvs-1") / "var/lib/failing").write_text(f"{failing}\n" if failing else "")
    with pytest.raises(BuildError) as caught:
        applying.apply(cluster, ["lvs-1", "lvs-2"], lab.connect, well if failing else sick)
    assert caught.value.details[-1] == (
        "lvs-1 was rolled back; the hosts after it were not touched; the same command goes on"
    )
    assert lab.files("lvs-1") == before and folders(lab, "lvs-1") == modes
    assert acts(lab.calls("lvs-1"))[-2:] == ["systemctl restart rc-local", "systemctl reload-or-restart keepalived"]
    assert not (lab.root("lvs-1") / "var/lib/timer").exists()
    assert lab.calls("lvs-2") == []
    # and again, with what failed mended
    (lab.root("lvs-1") / "var/lib/failing").unlink()
    applying.apply(cluster, ["lvs-1", "lvs-2"], lab.connect, well)
    for name in ("lvs-1", "lvs-2"):
        assert lab.files(name) == expected(cluster, name)


def test_kernel_settings_are_rolled_back_to_what_they_were(lab: Lab, folder: Path) -> None:
    """A setting that no old file names has a value all the same."""
    applying.apply(cluster_of(folder), ["lvs-1"], lab.connect, well)
    lab.calls("lvs-1")
    directors = copy.deepcopy(OSPF["directors"])
    directors[0]["sysctl"] = {"net.core.somaxconn": 2048}
    cluster = cluster_of(folder, directors=directors)
    with pytest.raises(BuildError, match="lvs-1 is not well"):
        applying.apply(cluster, ["lvs-1"], lab.connect, sick)
    calls = lab.calls("lvs-1")
    assert "restored: net.core.somaxconn = 7" in calls[calls.index("systemd-sysctl ") + 1 :]
    assert f"sysctl -e -q -p {applying.STATE}/settings" in calls


def test_settings_that_nobody_says_any_more_are_named(lab: Lab, folder: Path) -> None:
    directors = copy.deepcopy(OSPF["directors"])
    directors[0]["sysctl"] = {"net.core.somaxconn": 2048}
    applying.apply(cluster_of(folder, directors=directors), ["lvs-1"], lab.connect, well)
    cluster = cluster_of(folder)
    (host, *_) = cluster.directors
    with lab.connect(host) as remote:
        plan = applying.compare(remote, host, render.Renderer(cluster).root_files(host))
    assert applying.unsaid(plan) == ["net.core.somaxconn"]
    applying.apply(cluster, ["lvs-1"], lab.connect, well)
    with lab.connect(host) as remote:
        assert applying.unsaid(applying.compare(remote, host, plan.files)) == []


def test_a_host_that_went_back_meanwhile_is_no_success(lab: Lab, folder: Path) -> None:
    """The checks pass, and the timer is not there any more."""
    cluster = cluster_of(folder)

    def late(host: Host, _down: frozenset[str]) -> None:
        (lab.root(host.name) / "var/lib/timer").unlink()

    where = checking.Where(Path("lab/ssh_config"))
    options = rollout.Options(True, where, 60, connect=lab.connect, gate=lambda cluster: late)
    gone = "lvs-1 has gone back to its old files by itself, as it does after 960 s"
    with pytest.raises(BuildError, match=gone) as caught:
        rollout.apply(cluster.path, ("lvs-1", "lvs-2"), options)
    shows = f"invoke plan --cluster {cluster.path} --ssh-config lab/ssh_config --host lvs-1 shows"
    assert shows in caught.value.details[0]
    assert lab.files("lvs-2") == {}
    assert not (lab.root("lvs-1") / "var/lib/lvs/apply.claim").exists()


def test_a_change_that_was_cut_off_is_undone_first(lab: Lab, folder: Path) -> None:
    """We were killed after the files were installed: the timer on the host still runs."""
    applying.apply(cluster_of(folder), ["lvs-1"], lab.connect, well)
    before = lab.files("lvs-1")
    services = copy.deepcopy(OSPF["services"])
    services[0]["name"] = "shop"
    cluster = cluster_of(folder, services=services)
    (host, *_) = cluster.directors
    with lab.connect(host) as remote:
        plan = applying.compare(remote, host, render.Renderer(cluster).root_files(host))
        remote.run(f"mkdir -p {applying.STATE}")
        remote.put(applying.pack(plan.files), f"{applying.STATE}/new.tar")
        remote.run(applying._UNPACK)
        remote.run(applying._keep([c.path for c in plan.changes], plan.areas, [], [], 660))
        remote.run(applying._install([f.path for f in plan.files], [c.path for c in plan.changes if c.new is None]))
        killed = claim.ourselves()
        killed = replace(killed, process=f"{killed.process.rpartition('/')[0]}/1")
        assert claim._take(remote, killed, 960) == {"timer": "yes", "back": "no", "now": ANY}
        (lab.root("lvs-1") / "var/lib/lvs/apply.claim").write_text(killed.lines)
        assert lab.files("lvs-1") != before
        with claim.held(remote, 960, f"{applying.STATE}/rollback", take_over=False, hint="-"):
            assert lab.files("lvs-1") == before
    assert applying.apply(cluster, ["lvs-1"], lab.connect, well) == ["lvs-1: 4 files changed, keepalived"]
    assert lab.files("lvs-1") == expected(cluster, "lvs-1")


def test_the_way_to_take_over_reaches_the_same_hosts(lab: Lab, folder: Path) -> None:
    path = cluster_of(folder).path
    place = lab.root("lvs-1") / "var/lib/lvs"
    place.mkdir()
    (place / "apply.claim").write_text(claim.Owner("1", "someone@elsewhere", "", "then").lines)
    os.utime(place / "apply.claim", (2**32, 2**32))
    where = checking.Where(Path("lab/ssh_config"))
    options = rollout.Options(True, where, connect=lab.connect, gate=lambda cluster: well)
    with pytest.raises(BuildError, match="is being changed by someone@elsewhere") as caught:
        rollout.apply(path, ("lvs-1",), options)
    assert caught.value.hint.endswith(f": invoke apply --cluster {path} --ssh-config lab/ssh_config --take-over")


def test_another_host_that_answers_is_not_touched(lab: Lab, folder: Path) -> None:
    cluster = cluster_of(folder)

    @contextlib.contextmanager
    def astray(host: Host) -> Iterator[Remote]:
        yield LabRemote("lvs-2", lab)

    with pytest.raises(BuildError, match="lvs-1: the host that answers calls itself lvs-2"):
        applying.apply(cluster, ["lvs-1"], astray, well)
    assert lab.files("lvs-2") == {}


def test_real_servers_believe_a_local_address_while_it_is_used(
    lab: Lab, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They hear first of one that comes, and last of one that goes."""
    path = cluster_of(folder).path
    options = rollout.Options(apply=True, connect=lab.connect, gate=lambda cluster: well)
    rollout.apply(path, (), options)

    def order(operation: Callable[[], None]) -> list[str]:
        capsys.readouterr()
        operation()
        return [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if " files changed" in line]

    add = ops.add_local_address(path, "lvs-1", "192.168.100.50", "")
    assert order(lambda: rollout.perform(path, add, options)) == ["rs-1", "lvs-1"]
    remove = functools.partial(rollout.remove_local_address, path, "lvs-1", "192.168.100.50", "", options)
    assert order(remove) == ["lvs-1", "rs-1"]
    rollout.perform(path, add, options)
    failing = replace(options, gate=lambda cluster: sick)
    with pytest.raises(BuildError) as caught:
        rollout.remove_local_address(path, "lvs-1", "192.168.100.50", "", failing)
    again = f"invoke apply --cluster {path} --real-servers-last --host lvs-1 --host rs-1 goes on"
    assert caught.value.details[-1] == f"{path} keeps the change; {again}"


def test_real_servers_come_first_and_the_master_last(lab: Lab, folder: Path) -> None:
    cluster = cluster_of(folder, VRRP)
    lines = applying.apply(cluster, (), lab.connect, sick, dry_run=True)
    assert [line.split(":")[0] for line in lines if line[0] == "="] == ["== rs-1", "== lvs-2", "== lvs-1"]
    lines = applying.apply(cluster, (), lab.connect, well)
    assert [line.split(":")[0] for line in lines] == ["rs-1", "lvs-2", "lvs-1"]
    assert "net.toa.trusted = 192.168.100.1," in lab.files("rs-1")["/etc/sysctl.d/70-host.conf"][0].decode()
    before = lab.files("lvs-2")
    other = {"instances": [{**VRRP["vrrp"]["instances"][0], "id": 77}, VRRP["vrrp"]["instances"][1]]}
    for dry_run in (True, False):
        with pytest.raises(BuildError, match=r"both be master of VI_1(.|\n)* -F c root@"):
            applying.apply(
                cluster_of(folder, VRRP, vrrp=other), (), lab.connect, well, dry_run=dry_run, ssh_config=Path("c")
            )
    assert lab.files("lvs-2") == before


def test_a_larger_share_is_taken_when_the_others_have_moved(lab: Lab, folder: Path) -> None:
    pools = copy.deepcopy(OSPF["local_addresses"])
    names = ["lvs-1", "lvs-2"]
    pools["laddr_g1"]["per_director"] = 2
    applying.apply(cluster_of(folder, local_addresses=pools), names, lab.connect, well)
    with pytest.raises(BuildError, match=r"lvs-1 is to have 192\.168\.100\.3 of pool laddr_g1, which is on lvs-2 now"):
        applying.apply(cluster_of(folder), names[:1], lab.connect, well)
    lines = applying.apply(cluster_of(folder), names, lab.connect, well)
    assert [line.split(":")[0] for line in lines] == ["lvs-2", "lvs-1"]


def test_a_dry_run_has_the_order_and_the_refusals_of_apply(
    lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks what a run asks before it touches a host, and leaves nothing there: no claim, no timer, no lock."""

    def left() -> dict[Path, int]:
        found = [p for root in lab.roots.values() for top in ("etc", "var") for p in (root / top).rglob("*")]
        return {p: p.stat().st_mtime_ns for p in found if p.is_file() and p.name != "calls"}

    pools = copy.deepcopy(OSPF["local_addresses"])
    pools["laddr_g1"]["per_director"] = 2
    where = checking.Where(Path("lab/ssh_config"))
    options = rollout.Options(apply=True, where=where, connect=lab.connect, gate=lambda cluster: well)
    rollout.apply(cluster_of(folder, local_addresses=pools).path, ("lvs-1", "lvs-2"), options)
    lab.root("rs-1")
    path, before = cluster_of(folder).path, left()
    with pytest.raises(BuildError, match=r"lvs-1 is to have .*, which is on lvs-2 now") as refused:
        rollout.apply(path, ("lvs-1",), options)
    monkeypatch.setattr(settings.current, "dry_run", True)
    with pytest.raises(BuildError) as caught:
        rollout.apply(path, ("lvs-1",), options)
    assert str(caught.value) == str(refused.value) and " --ssh-config lab/ssh_config " in caught.value.hint
    lines = rollout.apply(path, (), options)
    assert [line.split(":")[0] for line in lines if line.startswith("==")] == ["== rs-1", "== lvs-2", "== lvs-1"]
    assert "  +    192.168.100.3" in lines and left() == before


def test_an_operation_rolled_out_and_one_that_fails(lab: Lab, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the edit to the hosts; when a host fails, the file keeps the edit, and applying again goes on."""
    path = cluster_of(folder).path
    options = rollout.Options(apply=True, connect=lab.connect, gate=lambda cluster: well)
    rollout.perform(path, ops.add_vip("web", "203.0.113.9"), options)
    assert "- 203.0.113.9" in capsys.readouterr().out
    assert b"203.0.113.9 80" in lab.files("lvs-2")["/etc/keepalived/web.conf"][0]
    where = checking.Where(Path("lab/ssh_config"))
    failing = rollout.Options(apply=True, where=where, connect=lab.connect, gate=lambda cluster: sick)
    with pytest.raises(BuildError, match="lvs-1 is not well") as caught:
        rollout.perform(path, ops.add_vip("web", "203.0.113.10"), failing)
    assert caught.value.details[-1] == (
        f"{path} keeps the change; invoke apply --cluster {path} --ssh-config lab/ssh_config --host lvs-1 --host lvs-2"
        " goes on"
    )
    # The same command would add it once more.
    assert caught.value.details[-2] == "lvs-1 was rolled back; the hosts after it were not touched"
    assert b"203.0.113.10" not in lab.files("lvs-1")["/etc/keepalived/web.conf"][0]
    rollout.apply(path, (), options)
    assert b"203.0.113.10" in lab.files("lvs-1")["/etc/keepalived/web.conf"][0]


def test_an_operation_that_is_interrupted(lab: Lab, folder: Path, events: Recorder) -> None:
    path = cluster_of(folder).path

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    options = rollout.Options(apply=True, connect=lab.connect, gate=lambda cluster: interrupted)
    with pytest.raises(BuildError, match="interrupted") as caught:
        rollout.perform(path, ops.add_vip("web", "203.0.113.9"), options)
    assert caught.value.details == (f"{path} keeps the change",)
    assert caught.value.hint == f"invoke apply --cluster {path} --host lvs-1 --host lvs-2"
    assert any("lvs-1 was rolled back" in note for note in events.texts("note"))
    assert "203.0.113.9" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("drain", [-600.0, float("nan"), float("inf")])
def test_a_time_that_is_none(drain: float) -> None:
    with pytest.raises(BuildError, match="no time to wait"):
        rollout.Options(drain=drain)


def test_whom_nobody_can_ask_is_added(lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real server of UDP: neither is there a port that answers, nor has toa to do with it."""
    services = copy.deepcopy(OSPF["services"])
    services[0] |= {"protocol": "UDP", "check": {"none": True}}
    path = cluster_of(folder, services=services).path
    monkeypatch.setattr(ops, "answers", None)
    monkeypatch.setattr(ops, "has_toa", None)
    options = rollout.Options(apply=True, connect=lab.connect, gate=lambda cluster: well)
    rollout.add_real_server(path, "web", "198.51.100.9", 0, 1, options)
    assert "198.51.100.9" in lab.files("lvs-1")["/etc/keepalived/web.conf"][0].decode()


def test_a_file_that_is_a_link_is_read(lab: Lab, folder: Path) -> None:
    cluster = cluster_of(folder)
    applying.apply(cluster, ["lvs-1"], lab.connect, well)
    file = lab.root("lvs-1") / "etc/keepalived/web.conf"
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")
    assert applying.plan(cluster, ["lvs-1"], lab.connect) == ["== lvs-1: as it should be"]


def test_a_real_server_whose_port_is_closed_is_not_added(lab: Lab, folder: Path) -> None:
    path = cluster_of(folder).path
    before = path.read_text(encoding="utf-8")
    options = rollout.Options(apply=True, connect=lab.connect, gate=lambda cluster: well)
    with pytest.raises(BuildError, match=r"198\.51\.100\.9 port 80 does not answer lvs-1"):
        rollout.add_real_server(path, "web", "198.51.100.9", 0, 1, options)
    assert path.read_text(encoding="utf-8") == before
    assert lab.files("lvs-1") == {}


def test_a_real_server_without_toa_is_not_added(lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = rollout.Options(apply=True, connect=lab.connect, gate=lambda cluster: well)
    monkeypatch.setattr(ops, "answers", lambda *_: None)
    services = copy.deepcopy(OSPF["services"])
    services[0]["real_servers"] = services[0]["real_servers"][1:]
    path = cluster_of(folder, services=services).path
    before = path.read_text(encoding="utf-8")
    with pytest.raises(BuildError, match="rs-1 has no toa"):
        rollout.add_real_server(path, "web", "198.51.100.1", 0, 1, options)
    assert path.read_text(encoding="utf-8") == before
    assert lab.files("lvs-1") == {}
    toa_bpf_is_loaded(lab)
    rollout.add_real_server(path, "web", "198.51.100.1", 0, 1, options)
    assert "198.51.100.1" in lab.files("lvs-1")["/etc/keepalived/web.conf"][0].decode()


def test_draining_a_real_server_to_its_end(lab: Lab, folder: Path) -> None:
    path = cluster_of(folder).path
    options = rollout.Options(apply=True, connect=lab.connect, gate=lambda cluster: well, drain=30)
    rollout.remove_real_server(path, "web", "198.51.100.1", 0, options)
    calls = lab.calls("lvs-1")
    assert [call for call in calls if "keepalived" in call or "ipvsadm" in call] == [
        "systemctl reload-or-restart keepalived",
        "ipvsadm -Ln",
        "ipvsadm -Ln",
        "systemctl reload-or-restart keepalived",
    ]
    assert "198.51.100.1 80" not in lab.files("lvs-1")["/etc/keepalived/web.conf"][0].decode()


def test_the_log_says_when_a_change_begins(lab: Lab, folder: Path) -> None:
    """Before it: what keepalived says of the new files is of the change."""
    applying.apply(cluster_of(folder), ["lvs-1"], lab.connect, well)
    calls = lab.calls("lvs-1", marks=True)
    mark = calls.index(f"logger -p daemon.info {applying.MARK}")
    assert mark < calls.index("systemctl reload-or-restart keepalived")


TABLE = """\
TCP  203.0.113.1:80 rr
  -> 198.51.100.1:80              FullNat 1      3          9
TCP  203.0.113.3:443 rr
  -> 198.51.100.1:443             FullNat 0      0          0
"""


def test_what_was_down_before_is_not_the_changes_fault(lab: Lab, folder: Path) -> None:
    """Out of the table, or in it with weight 0; not what is new in the files, and nobody where there is no table."""
    services = copy.deepcopy(OSPF["services"])
    services[0]["real_servers"].append({"address": "198.51.100.4", "weight": 0})  # drained: it may come back
    applying.apply(cluster_of(folder, services=services), ["lvs-1"], lab.connect, well)
    services[0]["real_servers"].append({"address": "198.51.100.3"})
    cluster = cluster_of(folder, services=services)
    known: list[frozenset[str]] = []

    def gate(host: Host, down: frozenset[str]) -> None:
        known.append(down)
        sick(host, down)

    for table in ("", TABLE):
        (lab.root("lvs-1") / "var/lib/table").write_text(table)
        with pytest.raises(BuildError, match="lvs-1 is not well"):
            applying.apply(cluster, ["lvs-1"], lab.connect, gate)
    away = frozenset({"198.51.100.2:80", "198.51.100.1:443", "[2001:db8:5::1]:443"})
    assert known == [frozenset(), away]


def test_a_dead_real_server_can_be_removed(lab: Lab, folder: Path) -> None:
    """Only the directors hear of it: the dead one is a host of the file, too. The same where it was drained before."""
    lab.down.add("rs-1")
    path = cluster_of(folder).path
    options = rollout.Options(apply=True, connect=lab.connect, gate=lambda cluster: well, drain=30)
    with pytest.raises(BuildError, match="rs-1: no connection"):
        rollout.apply(path, (), options)
    rollout.perform(path, ops.drain_real_server("web", "198.51.100.1", 0), rollout.Options())
    rollout.remove_real_server(path, "web", "198.51.100.1", 0, options)
    for name in ("lvs-1", "lvs-2"):
        assert "198.51.100.1 80" not in lab.files(name)["/etc/keepalived/web.conf"][0].decode()


def test_only_the_hosts_of_an_operation_are_asked(folder: Path) -> None:
    services = copy.deepcopy(OSPF["services"])
    services[1]["directors"] = ["lvs-2"]
    path = cluster_of(folder, services=services).path
    edit = ops.edit(path, ops.add_vip("tls", "203.0.113.9"))
    assert rollout.concerned(edit) == ("lvs-2",)
    # Real servers believe local addresses.
    edit = ops.edit(path, ops.add_local_address(path, "lvs-1", "192.168.100.99", ""))
    assert rollout.concerned(edit) == ("lvs-1", "rs-1")
    again = ops.edit(path, ops.drain_real_server("web", "198.51.100.1", 0))
    again.write()
    assert rollout.concerned(ops.edit(path, ops.drain_real_server("web", "198.51.100.1", 0))) == ()


def test_a_script_is_sent_at_once() -> None:
    """However long it is: whoever asks for one character of it gets all of it, and then its end."""
    script = "echo 1234567890\n" * 1000
    parts: list[str] = []

    def take(_command: str, *, in_stream: io.StringIO, **_: object) -> SimpleNamespace:
        parts.extend(iter(lambda: in_stream.read(1), ""))
        return SimpleNamespace(exited=0, stdout="", stderr="")

    Shell("lvs-1", "ssh", SimpleNamespace(run=take)).run(script)
    assert parts == [braced(script)]
