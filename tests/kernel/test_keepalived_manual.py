"""The operations manual's configuration of keepalived for a cluster, as printed, on our kernel.

    client ── eth0 director eth1 ── servers 192.168.1.1, 192.168.1.2

Only the remarks after `//` and the alternatives MASTER/BACKUP are taken out (provision/examples/manual). The director's
local addresses are bound as the manual's rc.local binds them; checks run at the manual's intervals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from pipeline import settings
from tests.kernel.balancer import SYN_PROXY, Balancer
from tests.kernel.lab import Lab
from tests.kernel.machine import Background
from tests.kernel.topology import Director

pytestmark = [pytest.mark.build, pytest.mark.guest]

EXAMPLES = settings.TOP / "provision/examples/manual"
VIPS = ("1.1.1.1", "1.1.1.2")
REAL = ("192.168.1.1", "192.168.1.2")
LOCALS = tuple(f"192.168.100.{n}" for n in range(1, 6))
CLIENT, UPLINK = "192.168.0.13", "192.168.0.14"
SERVICES = tuple(
    line
    for vip in VIPS
    for line in (
        f"-A -t {vip}:80 -s rr",
        *(f"-P -t {vip}:80 -z {local}" for local in LOCALS),
        *(f"-a -t {vip}:80 -r {real}:80 -b -w 100" for real in REAL),
    )
)


class Manual:
    """The hosts of the manual, and keepalived with one of its configurations."""

    def __init__(self, lab: Lab, mode: str) -> None:
        self.guest = lab.guest
        self.director = Director(lab, "director")
        lab.members["director"] = self.director
        self.client, switch = lab.namespace("client"), lab.namespace("switch")
        self.servers = [lab.namespace(f"server{n}") for n in range(2)]
        self.nginx: dict[str, Background] = {}
        switch.ip(
            "link add bridge0 type bridge forward_delay 0 mcast_snooping 0",
            "link set bridge0 up",
            f"link add director type veth peer name eth1 netns {self.director.handle}",
            *(f"link add {server.name} type veth peer name eth0 netns {server.handle}" for server in self.servers),
            *(f"link set {name} master bridge0 up" for name in ("director", *(s.name for s in self.servers))),
        )
        self.director.ip(
            f"link add eth0 type veth peer name eth0 netns {self.client.handle}",
            f"addr add {UPLINK}/30 dev eth0",
            "link set eth0 up",
            "addr add 192.168.1.254/24 dev eth1",
            "link set eth1 up",
            *(f"addr add {local}/32 dev eth1" for local in LOCALS),
        )
        self.director.sysctl("net.ipv4.ip_forward", 1)
        gateway = UPLINK if mode == "ospf" else ""
        self.client.ip(
            f"addr add {CLIENT}/30 dev eth0",
            "link set eth0 up",
            f"route add 1.1.1.0/24 {f'via {gateway}' if gateway else 'dev eth0'}",
        )
        for server, address in zip(self.servers, REAL, strict=True):
            server.ip(
                f"addr add {address}/24 dev eth0",
                "link set eth0 up",
                "route add 192.168.100.0/24 via 192.168.1.254",
            )
        self.keepalived = Balancer(self.director)
        for file in sorted((EXAMPLES / mode / "etc/keepalived").iterdir()):
            self.keepalived.configure(file.read_text(encoding="utf-8"), file.name)

    def serve(self, number: int) -> None:
        """Start a real server's web server."""
        self.servers[number].serve()


@pytest.fixture
def manual(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Manual]:
    """One of the two modes."""
    found = Manual(lab, request.param)
    yield found
    found.keepalived.end()


def test_the_files_are_the_manuals() -> None:
    """The example is what the manual prints, without the remarks."""
    text = (EXAMPLES / "ospf/etc/keepalived/taobao.conf").read_text(encoding="utf-8")
    for line in (
        "!for taobao.com",
        "/* healthcheck for L4 */",
        "nb_get_retry 2",
        'quorum_up " ip addr add 1.1.1.1/32 dev lo; ip addr add 1.1.1.2/32 dev lo;"',
    ):
        assert line in text
    assert "//" not in text


@pytest.mark.parametrize("manual", ["ospf"], indirect=True)
def test_the_cluster(manual: Manual) -> None:
    keepalived = manual.keepalived
    checked = keepalived.check()
    assert (checked.status, checked.out, checked.err) == (0, "", "")
    keepalived.start()
    # alpha: everything is down until a check says otherwise; inhibit_on_failure: with weight 0, and not absent
    keepalived.must_program([re.sub(r" -w 100$", " -w 0", line) for line in SERVICES])
    assert keepalived.bound("lo") == set()
    manual.serve(0)
    manual.serve(1)
    keepalived.must_program(SERVICES, 40)
    keepalived.must_bind("lo", VIPS)
    for vip in VIPS:
        assert keepalived.flags(vip) & SYN_PROXY
        # Round robin, through local addresses, whatever the real servers' routes: they have none to the client.
        answers = [manual.client.get(vip)[0].split() for _ in range(4)]
        assert {name for name, _, _ in answers} == {"server0", "server1"}
        assert {address for _, address, _ in answers} <= set(LOCALS)
