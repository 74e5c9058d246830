"""A director's NICs: eth1 is named by the seed's host.conf, eth0 is not."""

from __future__ import annotations

import pytest

from image.checks.conftest import Ask

pytestmark = pytest.mark.usefixtures("director")


def offloads(ask: Ask, nic: str) -> dict[str, str]:
    lines = ask(f"ethtool -k {nic}").splitlines()[1:]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def affinities(ask: Ask, nic: str) -> dict[str, str]:
    """CPU lists of a NIC's interrupts by their names: {"virtio1-input.0": "0"}."""
    script = (
        f"d=$(readlink -f /sys/class/net/{nic}/device); [ -d $d/msi_irqs ] || d=$d/..; "
        "for i in $(ls $d/msi_irqs); do n=$(awk -v i=$i: '$1 == i {print $NF}' /proc/interrupts); "
        '[ -z "$n" ] || echo $n $(cat /proc/irq/$i/smp_affinity_list); done'
    )
    return dict(line.split() for line in ask(script).splitlines())


def test_gro_and_lro_are_off_on_a_named_nic(ask: Ask) -> None:
    found = offloads(ask, "eth1")
    assert found["generic-receive-offload"] == "off"
    assert found["large-receive-offload"].startswith("off")
    assert found["rx-gro-hw"].startswith("off")


def test_an_unnamed_nic_is_left_alone(ask: Ask) -> None:
    assert offloads(ask, "eth0")["generic-receive-offload"] == "on"
    assert "eth0" not in ask("journalctl -b -u rc-local -o cat")


def test_each_queue_has_one_cpu(ask: Ask) -> None:
    found = affinities(ask, "eth1")
    queues: dict[str, set[str]] = {}
    for name, cpus in found.items():
        stem, _, index = name.rpartition(".")
        if stem.endswith(("-input", "-output")):
            assert cpus.isdigit(), f"{name} may run on {cpus}"
            queues.setdefault(index, set()).add(cpus)
    assert queues, f"no queue among {found}"
    assert all(len(cpus) == 1 for cpus in queues.values()), "receive and transmit of a queue are apart"
    cpus_online = int(ask("nproc"))
    assert len(set.union(*queues.values())) == min(len(queues), cpus_online)


def test_set_irq_affinity_can_be_run_by_hand(ask: Ask) -> None:
    assert "-> cpu" in ask("set_irq_affinity eth0")
    assert "there is no interface eth9" in ask("set_irq_affinity eth9 2>&1 || test $? = 2")


def test_local_addresses_are_there(ask: Ask) -> None:
    assert {"192.168.100.1/32", "192.168.100.2/32"} <= set(ask("ip -br -4 address show dev eth1").split())


def test_local_addresses_stay_when_networkd_starts_again(ask: Ask) -> None:
    """An upgrade of systemd does this to a serving director."""
    ask("systemctl restart systemd-networkd && /lib/systemd/systemd-networkd-wait-online --timeout=60 -i eth0 -i eth1")
    assert {"192.168.100.1/32", "192.168.100.2/32"} <= set(ask("ip -br -4 address show dev eth1").split())


def test_rc_local_may_run_again(ask: Ask) -> None:
    ask("systemctl restart rc-local")
    assert offloads(ask, "eth1")["generic-receive-offload"] == "off"
