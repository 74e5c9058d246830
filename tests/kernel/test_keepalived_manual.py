"""The operations manual's two configurations of keepalived, as printed, on our kernel.

    client ── eth0 director eth1 ── servers 192.168.1.1, 192.168.1.2

Only the remarks after `//` and the alternatives MASTER/BACKUP are taken out (provision/examples/manual). The director's
local addresses are bound as the manual's rc.local binds them; checks run at the manual's intervals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from pipeline import settings
from tests.kernel.balancer import ETC, PROGRAM, SYN_PROXY, Balancer
from tests.kernel.lab import Lab
from tests.kernel.machine import SANITIZED, Background
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
        f"-A -t {vip}:80 -s rr -j enable",
        *(f"-P -t {vip}:80 -z {local}" for local in LOCALS),
        *(f"-a -t {vip}:80 -r {real}:80 -b -w 100" for real in REAL),
    )
)


class Manual:
    """The hosts of the manual, and keepalived with one of its configurations."""

    def __init__(self, lab: Lab, mode: str, program: str) -> None:
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
        self.keepalived = Balancer(self.director, program=program)
        for file in sorted((EXAMPLES / mode / "etc/keepalived").iterdir()):
            self.keepalived.configure(file.read_text(encoding="utf-8"), file.name)

    def serve(self, number: int) -> None:
        """Start a real server's web server."""
        self.servers[number].serve()

    def refuse(self, number: int, *, on: bool = True) -> None:
        """Let a real server's host refuse connections, or take them again."""
        rule = "table inet no { chain in { type filter hook input priority 0; tcp dport 80 reject with tcp reset; }; }"
        self.servers[number].nft(rule if on else "delete table inet no")

    def weights(self) -> list[int]:
        """The weights of the real servers, of one virtual address after the other."""
        lines = [line for line in self.keepalived.programmed() if line.startswith("-a ")]
        return [int(found[1]) if (found := re.search(r" -w (\d+)$", line)) else 1 for line in lines]


@pytest.fixture(params=[f"{SANITIZED}{PROGRAM}", PROGRAM], ids=["sanitized", "as it ships"])
def program(request: pytest.FixtureRequest) -> str:
    """Which build of keepalived."""
    return str(request.param)


@pytest.fixture
def manual(lab: Lab, request: pytest.FixtureRequest, program: str) -> Iterator[Manual]:
    """One of the two modes."""
    found = Manual(lab, request.param, program)
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
    # one real server fails: quorum is left
    manual.refuse(0)
    keepalived.wait_until(lambda: sorted(manual.weights()) == [0, 0, 100, 100], lambda: str(manual.weights()), 60)
    assert keepalived.bound("lo") == set(VIPS)
    assert {manual.client.get(VIPS[0])[0].split()[0] for _ in range(3)} == {"server1"}
    # both: nb_get_retry 2, delay_before_retry 5
    manual.refuse(1)
    keepalived.must_bind("lo", (), 60)
    assert manual.weights() == [0, 0, 0, 0]
    manual.refuse(0, on=False)
    keepalived.must_bind("lo", VIPS, 60)
    # omega: quorum_down at the end
    keepalived.stop()
    assert keepalived.programmed() == []
    keepalived.must_bind("lo", ())


@pytest.mark.parametrize("manual", ["vrrp"], indirect=True)
def test_master_and_backup(manual: Manual) -> None:
    keepalived = manual.keepalived
    checked = keepalived.check()
    assert (checked.status, checked.out, checked.err) == (0, "", "")
    manual.serve(0)
    manual.serve(1)
    keepalived.start()
    keepalived.must_program(SERVICES)
    keepalived.must_bind("eth0", VIPS)  # by VRRP
    for vip in VIPS:
        assert keepalived.flags(vip) & SYN_PROXY
        assert manual.client.get(vip)[0].split()[1] in LOCALS
    manual.refuse(0)
    keepalived.wait_until(lambda: sorted(manual.weights()) == [0, 0, 100, 100], lambda: str(manual.weights()), 60)
    keepalived.stop()
    assert keepalived.programmed() == []
    keepalived.must_bind("eth0", ())


@pytest.mark.parametrize("program", [f"{SANITIZED}{PROGRAM}"], ids=["sanitized"], indirect=True)
@pytest.mark.parametrize("manual", ["ospf"], indirect=True)
def test_what_an_operator_does_every_day(manual: Manual) -> None:
    """Section 4 of the manual: a real server, a virtual address, a local address are added and removed by a reload."""
    keepalived = manual.keepalived
    manual.serve(0)
    manual.serve(1)
    main, service = (manual.guest.read(f"{ETC}/{name}") for name in ("keepalived.conf", "taobao.conf"))
    keepalived.start()
    keepalived.must_program(SERVICES, 40)
    talk = manual.client.start_call("servers:chat", address=VIPS[0], port=80, count=4, patience=5 * manual.guest.scale)
    manual.client.wait_until(lambda: talk.so_far() != "", "answers")
    before = {c.local for c in manual.director.connections()}

    def unharmed() -> None:
        assert not [line for line in keepalived.said("IPVS.*error|cannot")]
        assert len([c for c in manual.director.connections() if c.state == "ESTABLISHED"]) == 4
        rounds = len(talk.so_far().splitlines())
        manual.client.wait_until(lambda: len(talk.so_far().splitlines()) >= rounds + 2, "more answers")

    # 4.1: a real server, with the manual's weight and check
    server = "real_server 192.168.1.3 80 {\nweight 1\nTCP_CHECK {\nconnect_timeout 4\n}\n}\n"
    cut = service.rindex("}")
    keepalived.configure(service[:cut] + server + service[cut:], "taobao.conf")
    keepalived.reload()
    # alpha, and nobody at that address: it is not there
    assert keepalived.programmed() == sorted(SERVICES)
    manual.servers[0].ip("addr add 192.168.1.3/24 dev eth0")
    more = [f"-a -t {vip}:80 -r 192.168.1.3:80 -b -w 1" for vip in VIPS]
    keepalived.must_program([*SERVICES, *more], 60)
    unharmed()
    keepalived.configure(service, "taobao.conf")
    keepalived.reload()
    assert keepalived.programmed() == sorted(SERVICES)
    unharmed()
    # 4.2: a virtual address in a file of its own
    www = service.replace("taobao", "www").replace("    1.1.1.2 80\n", "").replace("1.1.1.1", "1.1.1.3")
    www = re.sub(r" ip addr (add|del) 1\.1\.1\.2/32 dev lo;", "", www)
    keepalived.configure(www, "www.conf")
    keepalived.configure(main.rstrip("\n") + "\ninclude www.conf\n")
    keepalived.reload()
    third = [line.replace(VIPS[0], "1.1.1.3") for line in SERVICES if VIPS[0] in line]
    keepalived.must_program([*SERVICES, *third], 40)
    keepalived.must_bind("lo", (*VIPS, "1.1.1.3"))
    unharmed()
    keepalived.configure(main)
    keepalived.reload()
    assert keepalived.programmed() == sorted(SERVICES)
    keepalived.must_bind("lo", VIPS)
    unharmed()
    # 4.3: local addresses
    keepalived.configure(main.replace("    192.168.100.5\n", "    192.168.100.6\n"))
    manual.director.ip("addr add 192.168.100.6/32 dev eth1")
    keepalived.reload()
    assert keepalived.programmed() == sorted(line.replace("100.5", "100.6") for line in SERVICES)
    unharmed()
    assert {c.local for c in manual.director.connections()} == before
    keepalived.stop()
