"""What of a lab needs no golden image: namespaces, cables, the router, logging in, and that all of it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from image import bake
from pipeline import qmp, run, settings, vm
from pipeline.debroot import tree
from pipeline.store import Store
from provision.lab import lab as labs
from provision.lab import machines
from provision.lab.lab import Lab
from provision.lab.state import Running, State

pytestmark = pytest.mark.build


def networks() -> list[str]:
    """This machine's own interfaces, addresses and routes."""
    # Brief: without lifetimes, which count down where an address is of DHCP or of a router's prefix.
    commands = (["ip", "-o", "link"], ["ip", "-br", "address"], ["ip", "route"], ["ls", "/run/netns"])
    return [run.run(command, check=False).stdout for command in commands]


@pytest.fixture(scope="module", params=["ospf", "vrrp"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab of which no machine runs."""
    before = networks()
    folder = tmp_path_factory.mktemp("links") / "lab"
    source = settings.TOP / f"provision/examples/lab-{request.param}.yaml"
    root = str(tree(Store(), labs.root(Store())))
    written = State(folder, str(source), 512, root=root, routing=str(bake.routing()))
    found = labs.prepare(source, folder, written)
    try:
        found.start_links()
        yield found
    finally:
        processes = list(found.state.processes.values())
        labs.down(folder)
    assert not folder.exists()
    assert not [each for each in processes if each.alive]
    assert networks() == before


def test_clients_reach_the_router_and_each_other(lab: Lab) -> None:
    for version in (4, 6):
        for name in ("router", "client-2"):
            lab.until(
                "client-1", f"ping -c 1 -W 2 {lab.topology.address(name, 'clients', version)}", f"an answer of {name}"
            )


def test_the_router_runs_what_it_is_told(lab: Lab) -> None:
    assert lab.ask("router", "cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding") == "1\n1"
    ways = "cat /proc/sys/net/ipv[46]/fib_multipath_hash_policy /proc/sys/net/ipv[46]/fib_multipath_hash_fields"
    assert lab.ask("router", ways).split() == ["3", "3", "55", "55"]
    if lab.cluster.mode == "vrrp":
        assert lab.ask("router", "ip -o route get 203.0.113.1").startswith("203.0.113.1 dev uplink ")
        assert lab.ask("router", "pidof zebra ospfd || echo none") == "none"
        return
    for daemon, words in (("ospfd", "ip ospf"), ("ospf6d", "ipv6 ospf6")):
        lab.until("router", f"vtysh -d {daemon} -c 'show {words} interface uplink' | grep -q 0.0.0.11", "its area")
    interface = lab.ask("router", "vtysh -d ospfd -c 'show ip ospf interface uplink'")
    assert "Hello 3s, Dead 12s" in interface
    # On the cable, and by the key's number: the area's own authentication is not in the line of an interface.
    hello = lab.ask("switch", "timeout 20 tcpdump -i uplink -c 1 -nnvv ip proto 89 2>/dev/null")
    assert "Authentication Type: MD5 (2)" in hello and "Key-ID: 8" in hello, hello
    # What it does not know it says, and goes on: nothing is to be among that.
    assert "on config line" not in lab.ask("router", "cat /run/frr/log")


@pytest.mark.parametrize("name", ["router", "client-1"])
def test_ssh_reaches_namespaces(lab: Lab, name: str) -> None:
    said = run.run(["ssh", "-F", lab.ssh_config, name, "hostname; id -un; ls -A /etc/ssh"]).stdout.split()
    assert said == [name, "root", "authorized_keys", "host_key", "host_key.pub", "sshd_config"]


def test_a_machines_cable_is_plugged_in_and_pulled(lab: Lab) -> None:
    """QEMU without a guest: its NIC is on the link of the plug, with the carrier that `plug` says."""
    sockets = Path(lab.state.sockets) / "lvs-1"
    sockets.mkdir()
    plugs = list(lab.topology.plugs("lvs-1"))
    taps = [f"{lab.port(link, plug)}={100 + n}" for n, (link, plug) in enumerate(plugs)]
    argv = ["python3", "-I", str(labs.TAP), str(lab.space("switch").inner), *taps, "--", vm.QEMU, "-S", "-nodefaults"]
    argv += ["-display", "none", "-m", "32", "-qmp", f"unix:{sockets / 'q'},server=on,wait=off"]
    for n, (_, plug) in enumerate(plugs):
        argv += machines.cable(plug.nic, plug.mac, f"tap,fd={100 + n}")
    ports = {plug.nic: lab.port(link, plug) for link, plug in plugs}

    def carriers() -> dict[str, bool]:
        links = json.loads(lab.ask("switch", "ip -j link"))
        return {link["ifname"]: "LOWER_UP" in link["flags"] for link in links if link["ifname"] in ports.values()}

    assert not any(carriers().values())
    with run.start(argv, log=lab.folder / "qemu.log") as process:
        lab.state.processes["lvs-1"] = Running.of(process.pid)
        run.wait_until(lambda: qmp.listening(sockets / "q"), deadline=60, what="QEMU", hint="-", tail_of=process.tail)
        assert all(carriers().values())
        # In our own network, not in the switch's: there its ssh port is forwarded from.
        assert os.readlink(f"/proc/{process.pid}/ns/net") == os.readlink("/proc/self/ns/net")
        lab.plug("lvs-1", "eth1", into=False)
        assert carriers() == {ports["eth0"]: True, ports["eth1"]: False}
        lab.plug("lvs-1", "eth1", into=True)
        assert all(carriers().values())
        lab.kill("lvs-1")
        assert process.wait(20) == -9
    assert not any(carriers().values())
    del lab.state.processes["lvs-1"]
    lab.state.write()


def test_the_router_comes_back(lab: Lab) -> None:
    lab.kill("router")
    address = lab.topology.address("router", "clients", 4)
    assert lab.try_to("client-1", f"ping -c 1 -W 1 {address}").returncode != 0
    lab.start_space(lab.node("router"))
    lab.until("client-1", f"ping -c 1 -W 2 {address}", "an answer of the router")
    assert run.run(["ssh", "-F", lab.ssh_config, "router", "hostname"]).stdout == "router\n"
