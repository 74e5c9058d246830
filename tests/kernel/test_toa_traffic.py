"""Clients through FULLNAT to programs that know nothing of it, on a real server that shows them who the client is."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator

import pytest

from tests.kernel.lab import Namespace
from tests.kernel.machine import Guest
from tests.kernel.receivers import mount_for_bpf
from tests.kernel.topology import FAMILIES, Site

pytestmark = [pytest.mark.build, pytest.mark.guest]
FLAVOURS = ("joint",)
ANY = {4: "0.0.0.0", 6: "::"}  # noqa: S104  the guest's
NGINX, HAPROXY, PYTHON, C, JAVA = 80, 81, 82, 83, 84


@pytest.fixture
def machine(guest: Guest) -> Guest:
    """A machine whose programs are shown their peers."""
    mount_for_bpf(guest)
    assert "toa" not in guest.modules()
    return guest


@pytest.fixture(params=["module", "bpf"])
def receiver(machine: Guest, request: pytest.FixtureRequest) -> Iterator[str]:
    """What shows them their clients."""
    load, unload = {
        "module": (("modprobe", "toa"), ("rmmod", "toa")),
        "bpf": (("toa-bpf", "load"), ("toa-bpf", "unload")),
    }[request.param]
    machine.run(*load, seconds=20)
    yield request.param
    if machine.alive:
        machine.run(*unload, seconds=20)


def programs(server: Namespace, family: int) -> None:
    """Start one of each kind."""
    server.serve(port=NGINX)
    bind = f"bind :{HAPROXY}" if family == 4 else f"bind :::{HAPROXY} v6only"
    server.guest.write(
        "/tmp/haproxy.cfg",  # noqa: S108  the guest's
        f"""defaults
  mode http
  timeout connect 60s
  timeout client 60s
  timeout server 60s
frontend test
  {bind}
  http-request return status 200 content-type text/plain lf-string "%ci %cp"
""",
    )
    server.start("haproxy", "-db", "-f", "/tmp/haproxy.cfg")  # noqa: S108
    server.start_call("toa:web", address=ANY[family], port=PYTHON)
    server.start("peer", ANY[family], str(C))
    # Not /usr/bin/bsh, which is for a terminal: it keeps a history in the home folder.
    server.start("java", "-cp", "/usr/share/java/bsh.jar", "bsh.Interpreter", "/inside/Peer.bsh", str(JAVA))
    for port in (HAPROXY, PYTHON, C):
        server.wait_for_port(port)
    server.wait_until(lambda: f":{JAVA:04X} " in server.read("/proc/net/tcp6"), "the listener of Java", seconds=60)


def answers(net: Site, family: int) -> dict[int, tuple[str, int]]:
    """The client that each program names to a client from port 30000 plus its own."""
    found = {}
    for port in (NGINX, HAPROXY, PYTHON, C, JAVA):
        (body,) = net.clients[0].get(net.vip(family), port=port, sport=30000 + port)
        address, number = body.split()[-2:]
        found[port] = (str(ipaddress.ip_address(address)), int(number))
    return found


def behind(net: Site, family: int) -> None:
    """All programs of the one real server behind FULLNAT."""
    programs(net.servers[0], family)
    for port in (NGINX, HAPROXY, PYTHON, C, JAVA):
        net.balance(family, "-b", port=port, locals_=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_programs_see_the_client(site: Callable[..., Site], receiver: str, family: int) -> None:
    net = site(servers=1)
    behind(net, family)
    expected = {port: (net.client(family), 30000 + port) for port in (NGINX, HAPROXY, PYTHON, C, JAVA)}
    assert answers(net, family) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_receiver_they_see_the_local_address(site: Callable[..., Site], machine: Guest, family: int) -> None:
    net = site(servers=1)
    behind(net, family)
    assert {address for address, _ in answers(net, family).values()} == {net.local(family)}


def crowd(net: Site, count: int, at_once: int) -> str:
    """So many connections of each family; how many were told whom they are, of how many, and what others were told."""
    client, server, guest = net.clients[0], net.servers[0], net.lab.guest
    for family in FAMILIES:
        server.start_call("toa:introduce", address=net.server(family), port=90)
        server.wait_until(lambda own=family: listens(server, own, 90), f"port 90 of IPv{family}")  # type: ignore[misc]
        net.balance(family, "-b", port=90, locals_=1)
    words = {"port": 90, "count": count, "at_once": at_once, "patience": 100 * guest.scale}
    jobs = [client.start_call("toa:crowd", address=net.vip(family), **words) for family in FAMILIES]
    told = [job.wait(seconds=110).result for job in jobs]
    right, others = (sum(each[key] for each in told) for key in ("right", "others"))
    assert right + others == count * len(FAMILIES)
    return "\n".join(
        [f"{right} of {right + others} were told right", *(line for each in told for line in each["wrong"])]
    )


def listens(server: Namespace, family: int, port: int) -> bool:
    """Whether there is a listener of a family."""
    table = server.read("/proc/net/tcp6" if family == 6 else "/proc/net/tcp")
    return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A" for row in table.splitlines()[1:])


def bad_links(net: Site) -> None:
    """Lose, delay and reorder, with timestamps and SACK in use on both sides of the director."""
    client, server = net.clients[0], net.servers[0]
    for member, device in ((client, "eth0"), (net.director, "front"), (net.director, "back"), (server, "eth0")):
        member.run("tc", "qdisc", "add", "dev", device, "root", "netem",
                   "limit", "20000", "delay", "5ms", "4ms", "loss", "1%", "reorder", "10%")  # fmt: skip
    for member in (client, server):
        assert (member.sysctl("net.ipv4.tcp_sack"), member.sysctl("net.ipv4.tcp_timestamps")) == ("1", "1")
    assert net.director.ip_vs_sysctl("fullnat_timestamp_remove_entry") == "0"


@pytest.mark.parametrize("count", [250, pytest.param(5000, marks=pytest.mark.long)])
def test_a_crowd_over_bad_links(
    site: Callable[..., Site], receiver: str, count: int, record_property: Callable[[str, object], None]
) -> None:
    """Whatever is lost, late or overtaken on the way: nobody is taken for the director."""
    net = site(servers=1)
    bad_links(net)
    told = crowd(net, count, 200)
    print(f"{receiver}: {told}")
    record_property("told", told)
    assert told == f"{2 * count} of {2 * count} were told right"
    stats = net.director.ext_stats()
    assert stats["fullnat_add_toa_ok"] > 2 * 2 * count
    assert (stats["fullnat_add_toa_fail_mem"], stats["fullnat_add_toa_fail_len"]) == (0, 0)


@pytest.mark.usefixtures("machine")
def test_a_crowd_without_a_receiver(site: Callable[..., Site]) -> None:
    """What the crowd counts: here everybody is taken for the director."""
    net = site(servers=1)
    told, *wrong = crowd(net, 20, 20).splitlines()
    assert told == "0 of 40 were told right"
    assert len(wrong) == 40
    for family in FAMILIES:
        assert sum(f"told '{net.local(family)} " in line for line in wrong) == 20, wrong
