"""The stories of a cluster, in both modes: traffic, daily operations, what dies, floods, an upgrade, broken input.

    pytest -m long tests/cluster [-k ospf]

What each measured is in out/cluster-stories.md. A story that has failed may leave its lab broken for those after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import progress, run, settings
from provision.checks.test_high import ENOUGH
from provision.lab import machines
from provision.lab.lab import Lab
from tests.cluster import oracle
from tests.cluster.conftest import Cluster, Target, logged
from tests.cluster.limits import allowed, check_seconds, return_seconds, slack, starting, takeover_seconds
from tests.cluster.traffic import CLIENTS, TIMEOUT, Request, Traffic, failed, not_moved

pytestmark = [pytest.mark.build, pytest.mark.long]

OSPF_ONLY = pytest.mark.parametrize("cluster", ["ospf"], indirect=True, scope="session")
VRRP_ONLY = pytest.mark.parametrize("cluster", ["vrrp"], indirect=True, scope="session")


def serving(cluster: Cluster) -> set[str]:
    """The directors that have traffic."""
    return set(cluster.directors) if cluster.mode == "ospf" else {cluster.master()}


def carried(lab: Lab, name: str) -> int:
    """The connections that a director has forwarded since its services were made."""
    rows = lab.ask(name, "ipvsadm -Ln --stats --exact").splitlines()
    return sum(int(row.split()[2]) for row in rows if row.startswith("TCP"))


# --- 1 and 2: traffic


def test_clients_get_pages_and_servers_see_clients(cluster: Cluster) -> None:
    lab = cluster.lab
    before = {name: carried(lab, name) for name in cluster.directors}
    with cluster.traffic() as clients:
        clients.goes_on(200)
    requests = clients.so_far()
    row = cluster.note("1 traffic" if cluster.mode == "ospf" else "2 traffic", "nothing", requests)
    assert row.failed == 0, failed(requests)[:5]
    # Every service by every real server.
    servers = {
        target: {each.server for each in requests if each.target == target} for target in {r.target for r in requests}
    }
    assert servers == {f"{vip} {port}": {"rs-1", "rs-2"} for vip, port in cluster.targets()}
    # The counters of connections are added up every 2 s.
    busy = serving(cluster)
    run.wait_until(
        lambda: {name for name in cluster.directors if carried(lab, name) > before[name]} == busy,
        deadline=lab.seconds(10),
        what=f"{busy} have forwarded connections, and nobody else",
        hint="-",
    )


@pytest.mark.parametrize("client", ["client-1", "client-2"])
def test_logs_have_the_clients_address(cluster: Cluster, client: str) -> None:
    lab = cluster.lab
    own = {lab.topology.address(client, "clients", version) for version in (4, 6)}
    mark = f"mark-{client}-{os.getpid()}-{time.monotonic_ns()}"
    for vip, port in cluster.targets():
        url = f"http://{oracle.point(vip, port)}/{mark}?[1-8]"
        lab.ask(client, f"curl -sSf -m 20 --noproxy '*' -H 'Connection: close' '{url}'")
    seen = set().union(*(logged(cluster, name, mark) for name in ("rs-1", "rs-2")))
    assert seen == own


def test_every_check_is_green(cluster: Cluster) -> None:
    busy = serving(cluster)
    for name in cluster.directors:
        # A real server that was away has had fewer sessions than the others.
        cluster.lab.ask(name, "ipvsadm -Z")
    with cluster.traffic() as clients:
        # What the check of their spread wants of each service on each director, and a third more: ways are by chance.
        clients.goes_on(ENOUGH * len(cluster.targets()) * len(busy) * 4 // 3)
    found = cluster.checks()
    wrong = {" ".join(name): said for name, (result, said) in found.items() if result == "failed"}
    assert not wrong, json.dumps(wrong, indent=1)
    assert {host for host, _ in found} == {host.name for host in cluster.lab.cluster.hosts}
    # Skipped where too few have come.
    judged = {name for name in cluster.directors if found[name, "sessions are spread evenly"][0] == "passed"}
    assert judged == busy


def test_directors_hold_what_the_oracle_says(cluster: Cluster) -> None:
    if cluster.mode == "ospf":
        for name in cluster.directors:
            assert cluster.differences(name) == []
        for vip, _ in cluster.targets():
            assert cluster.ways(vip) == set(cluster.directors)
        # Exactly the VIPs: no other prefix of theirs is announced.
        families = [cluster.lab.ask("router", f"ip -j -{family} route show proto ospf") for family in (4, 6)]
        announced = {route["dst"] for routes in families for route in json.loads(routes or "[]")}
        assert announced == {vip for vip, _ in cluster.targets()}
        return
    master = cluster.master()
    for name in cluster.directors:
        assert cluster.differences(name, master=name == master) == []


# --- 3: daily operations


OPERATIONS: list[tuple[str, list[str]]] = [
    ("remove-real-server", ["--service", "web", "--address", "10.64.1.2", "--drain", "30"]),
    ("add-real-server", ["--service", "web", "--address", "10.64.1.2"]),
    ("add-vip", ["--service", "shop", "--vip", "203.0.113.9"]),
    ("remove-vip", ["--service", "shop", "--vip", "203.0.113.9"]),
    ("add-local-address", ["--director", "lvs-1", "--address", "10.64.0.99"]),
    ("remove-local-address", ["--director", "lvs-1", "--address", "10.64.0.99", "--drain", "30"]),
]


def test_daily_operations_fail_no_request(cluster: Cluster) -> None:
    before, targets = in_order(cluster.data), cluster.targets()
    for task, words in OPERATIONS:
        # Of what is there before and after; who still asks for a VIP that is removed gets none.
        with cluster.traffic(pause=0.2, targets=targets) as clients, progress.step(task):
            cluster.invoke(task, *words, "--apply")
            clients.goes_on()
        requests = clients.so_far()
        cluster.note("3 daily operations", task, requests, "0")
        assert not failed(requests), f"{task}: {failed(requests)[:5]}"
        if task == "add-vip":
            with cluster.traffic("shop") as clients:
                pass
            assert not failed(clients.so_far()) and len({each.target for each in clients.so_far()}) == 2
        master = "" if cluster.mode == "ospf" else cluster.master()
        for name in cluster.directors:
            assert cluster.differences(name, master=name == master) == [], task
    assert in_order(cluster.data) == before


def test_daily_operations_work_while_a_server_is_dead(cluster: Cluster) -> None:
    """One of its addresses is removed, the others stay, and it comes back: nobody waits for it or rolls a host back."""
    lab, limit = cluster.lab, max(check_seconds(cluster, name) for name in ("web", "shop"))
    real = ["--service", "web", "--address", "10.64.1.2", "--apply"]
    before = in_order(cluster.data)
    with cluster.traffic(pause=0.2) as clients:
        begun = time.monotonic()
        with hanging(lab, "rs-2"):
            out = taken_out(cluster, points(cluster, "rs-2", services=("web", "shop")), limit + slack(cluster))
            cluster.invoke("remove-real-server", *real)
            taken_out(cluster, points(cluster, "rs-2", services=("web", "shop")), slack(cluster))
            clients.goes_on()
        cluster.invoke("add-real-server", *real)
        clients.goes_on()
    _judge(cluster, clients, "3 daily operations", "a dead server is removed, and added again", begun, out, limit)
    assert in_order(cluster.data) == before
    cluster.whole()


def in_order(data: dict[str, Any]) -> dict[str, Any]:
    """Real servers sorted: one that has been away is the last now."""
    for service in data["services"]:
        service["real_servers"].sort(key=lambda each: (each["address"], each.get("port", 0)))
    return data


# --- 4: real servers


@contextlib.contextmanager
def broken(lab: Lab, name: str, how: str, mend: str) -> Iterator[None]:
    """Something that is broken on a host during a block; mended, too, where it was broken by half."""
    try:
        lab.ask(name, how)
        yield
    finally:
        lab.ask(name, mend)


def sick(lab: Lab, name: str, port: int) -> contextlib.AbstractContextManager[None]:
    """A real server that answers 500 on a port during a block."""
    return broken(lab, name, f"touch /run/web-500-{port}", f"rm -f /run/web-500-{port}")


def points(cluster: Cluster, *hosts: str, services: tuple[str, ...]) -> frozenset[str]:
    """The real servers of some services that are on some hosts."""
    own = {str(a) for host in cluster.lab.cluster.real_servers if host.name in hosts for a in host.own_addresses}
    return frozenset(
        oracle.point(real["address"], real.get("port", service["ports"][0]))
        for service in cluster.data["services"]
        if service["name"] in services
        for real in service["real_servers"]
        if real["address"] in own
    )


def taken_out(cluster: Cluster, down: frozenset[str], seconds: float) -> float:
    """Wait until all directors hold everything but these, within these seconds together; returns the moment."""
    end = time.monotonic() + seconds
    master = "" if cluster.mode == "ospf" else cluster.master()
    for name in cluster.directors:
        cluster.holds(name, max(0.0, end - time.monotonic()), down=down, master=name == master)
    return time.monotonic()


CLOSED = ("its port closes", f"systemctl stop {machines.WEB}", f"systemctl start {machines.WEB}")


def test_a_closed_port_is_taken_out_and_comes_back(cluster: Cluster) -> None:
    event, how, mend = CLOSED
    limit = max(check_seconds(cluster, name) for name in ("web", "shop"))
    with cluster.traffic() as clients:
        begun = time.monotonic()
        with broken(cluster.lab, "rs-1", how, mend):
            out = taken_out(cluster, points(cluster, "rs-1", services=("web", "shop")), limit + slack(cluster))
            clients.goes_on()
        mended = time.monotonic()
        back = taken_out(cluster, frozenset(), limit + slack(cluster)) - mended
        clients.goes_on()
    _judge(cluster, clients, "4 real server", event, begun, out, limit, back)
    assert "rs-1" in {each.server for each in clients.so_far()[-40:]}, "it is asked again"


def _judge(
    cluster: Cluster,
    clients: Traffic,
    story: str,
    event: str,
    begun: float,
    end: float,
    limit: float,
    back: float | None = None,
) -> list[Request]:
    """Write down what clients saw: nothing failed before the event, and nothing that began after its end.

    By its end all directors knew of it; after `back` seconds they knew that it was over.
    """
    requests = clients.so_far()
    also = f"out after {end - begun:.1f} s" + ("" if back is None else f", back after {back:.1f} s")
    cluster.note(story, event, requests, allowed(cluster, limit), also)
    bad = failed(requests)
    assert not [each for each in bad if each.ended < begun], "before it happened"
    late = [each for each in bad if each.begun > end]
    what = f"{event}: {len(late)} of {len(bad)} failures began later than {end - begun:.1f} s"
    assert not late, f"{what}: {late[:3]}\n{cluster.evidence(requests)}"
    return requests


def test_a_server_that_answers_500_is_taken_out(cluster: Cluster) -> None:
    """By the service whose check asks for a page; the other one, whose check is a connection, keeps it."""
    lab, limit = cluster.lab, check_seconds(cluster, "web")
    with cluster.traffic("web") as clients:
        begun = time.monotonic()
        with sick(lab, "rs-1", 80), sick(lab, "rs-1", 8080):
            out = taken_out(cluster, points(cluster, "rs-1", services=("web",)), limit + slack(cluster))
            clients.goes_on()
        mended = time.monotonic()
        back = taken_out(cluster, frozenset(), limit + slack(cluster)) - mended
    _judge(cluster, clients, "4 real server", "it answers 500", begun, out, limit, back)


def _routed(cluster: Cluster, vips: list[str], names: set[str], end: float) -> None:
    """Wait until the router sends all of these VIPs to these directors, until a moment."""
    for vip in vips:
        cluster.routed(vip, names, max(0.0, end - time.monotonic()))


@OSPF_ONLY
def test_a_lost_quorum_withdraws_the_vip(cluster: Cluster) -> None:
    """In mode vrrp a master keeps its VIPs whatever becomes of real servers."""
    lab, limit = cluster.lab, check_seconds(cluster, "web")
    vips = [vip for vip, _ in cluster.targets("web")]
    with cluster.traffic("shop") as clients:
        with sick(lab, "rs-1", 80):
            begun = time.monotonic()
            with sick(lab, "rs-2", 80):
                _routed(cluster, vips, set(), begun + limit + slack(cluster))
                gone = time.monotonic() - begun
                # The other service goes on.
                clients.goes_on()
                begun = time.monotonic()
        _routed(cluster, vips, set(cluster.directors), begun + limit + slack(cluster))
        back = time.monotonic() - begun
    requests = clients.so_far()
    also = f"withdrawn after {gone:.1f} s, back after {back:.1f} s"
    cluster.note("4 real server", "no quorum", requests, allowed(cluster, limit), also)
    assert not failed(requests)
    cluster.whole()


def test_a_server_that_dies_is_taken_out_and_comes_back(cluster: Cluster) -> None:
    limit = max(check_seconds(cluster, name) for name in ("web", "shop"))
    lab = cluster.lab
    with cluster.traffic(pause=0.2) as clients:
        begun = time.monotonic()
        lab.kill("rs-2")
        try:
            out = taken_out(cluster, points(cluster, "rs-2", services=("web", "shop")), limit + slack(cluster))
            clients.goes_on()
        finally:
            machines.settle(lab.start_machine("rs-2"))
        mended = time.monotonic()
        back = taken_out(cluster, frozenset(), limit + slack(cluster)) - mended
        clients.goes_on()
    _judge(cluster, clients, "4 real server", "its machine dies", begun, out, limit, back)


@contextlib.contextmanager
def hanging(lab: Lab, name: str) -> Iterator[None]:
    """A machine that stands still during a block: nothing answers, nothing is refused."""
    process = lab.state.processes[name].pid
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def _by_ports(lab: Lab, seconds: float, pages: list[tuple[Target, int]]) -> dict[tuple[Target, int], str]:
    """Pages for client-1, all at once, by source ports, 0 for any: by target and port, what went wrong."""
    own = {version: lab.topology.address("client-1", "clients", version) for version in (4, 6)}
    plan = [(own[6 if ":" in vip else 4], vip, port, source, seconds) for (vip, port), source in pages]
    argv = lab.space("client-1").network_argv([sys.executable, "-m", "tests.cluster.again", json.dumps(plan)])
    said = map(json.loads, run.run(argv, cwd=settings.TOP, timeout=lab.seconds(10)).stdout.splitlines())
    return {(target, each["source"]): each["error"] for (target, _), each in zip(pages, said, strict=True)}


def test_a_client_comes_again_with_its_port(cluster: Cluster) -> None:
    """Of a connection that the dead real server left without an answer: what directors know of it is past."""
    lab, limit = cluster.lab, max(check_seconds(cluster, name) for name in ("web", "shop"))
    with hanging(lab, "rs-2"):
        # All targets at once: health checks may find out after no more than 5 s.
        first = _by_ports(lab, 1, [(target, 0) for target in cluster.targets() for _ in range(8)])
        left = [page for page, error in first.items() if error]
        assert {target for target, _ in left} == set(cluster.targets()), "rs-2 was asked nothing"
        taken_out(cluster, points(cluster, "rs-2", services=("web", "shop")), limit + slack(cluster))
        assert _by_ports(lab, TIMEOUT, left) == dict.fromkeys(left, "")
    taken_out(cluster, frozenset(), limit + slack(cluster))


# --- 5: directors, links, the router


def _victim(cluster: Cluster) -> str:
    """Whom it happens to: who has traffic."""
    return cluster.directors[0] if cluster.mode == "ospf" else cluster.master()


def _recovers(
    cluster: Cluster,
    event: str,
    break_it: Callable[[str], None],
    mend: Callable[[str], None] | None = None,
    *,
    within: float = 0.0,
    boots: bool = False,
    tell: Callable[[str], str] = lambda _: "",
) -> None:
    """New connections work again within a time, and go on to do so until all is whole and after.

    But for what is under way when a connection's path moves back to a director that does not know it. Without `mend`
    what is broken comes back by itself, and `tell` says of the victim how. With it the victim has to be without traffic
    before; `boots`: and it takes as long as that to come back.
    """
    name = _victim(cluster)
    limit = within or takeover_seconds(cluster)
    # As seldom as during the upgrade, whose bound this is: for the moment in which VIPs change hands nobody has them,
    # and a client fails as often as it asks. And a director that boots beside them needs the CPU.
    with cluster.traffic(pause=0.2) as clients:
        begun = time.monotonic()
        back = end = begun + limit + slack(cluster)
        try:
            break_it(name)
            _quiet(clients, begun, limit + slack(cluster))
            without = not mend or cluster.without(name)
        finally:
            if mend:
                back = time.monotonic()
                mend(name)
        whole = cluster.whole()
        returned = (back, time.monotonic())
        clients.goes_on()
    requests = clients.so_far()
    bad = [each for each in failed(requests) if each.begun > end]
    since = [each for each in bad if each.begun >= back]
    may = return_seconds(cluster)
    if mend:
        also = f"whole again after {whole:.1f} s{'' if boots else f' ({allowed(cluster, may)} may)'}"
    else:  # it was, when anybody looked
        also = tell(name)
    also += f"{', ' * bool(also)}{len(since)} failed then"
    cluster.note("5 failures", event, requests, allowed(cluster, limit), also)
    assert without, f"{name} has traffic all the same"
    late = [each for each in bad if each.begun < back] + not_moved(since, [returned])
    what = f"{event}: {len(late)} began more than {limit:g} s after it, and no path moved"
    assert not late, f"{what}: {late[:3]}\n{cluster.evidence(requests)}"
    assert boots or whole <= may + slack(cluster)


def _quiet(clients: Traffic, begun: float, seconds: float) -> None:
    """Wait until this time is over, and then until as much again of good requests was seen."""
    run.wait_until(lambda: time.monotonic() > begun + seconds, deadline=seconds + 1, what="the limit is over", hint="-")
    clients.goes_on(60)


def _crashes(cluster: Cluster, daemon: str) -> None:
    """Its leader dies, so that systemd sees what it would see of a crash."""
    lab, name = cluster.lab, _victim(cluster)
    leader = f"systemctl show -P MainPID {daemon}"
    before = lab.ask(name, leader)
    may = takeover_seconds(cluster) + starting(cluster)

    def away() -> float:
        names = ("ActiveExitTimestampMonotonic", "ActiveEnterTimestampMonotonic")
        left, entered = (int(lab.ask(name, f"systemctl show -P {each} {daemon}")) for each in names)
        return (entered - left) / 1e6

    def tell(_: str) -> str:
        return f"it is back after {away():.1f} s ({may:.3g} may)"

    _recovers(cluster, f"kill -9 {daemon}", lambda _: void(lab.ask(name, f"kill -9 {before}")), tell=tell)
    assert lab.ask(name, f"{leader}; systemctl is-active {daemon}").split()[1] == "active"
    assert lab.ask(name, leader) not in (before, "0")
    assert 0 < away() <= may


def test_keepalived_crashes(cluster: Cluster) -> None:
    _crashes(cluster, "keepalived")


@OSPF_ONLY
@pytest.mark.parametrize("daemon", ["ospfd", "zebra"])
def test_a_routing_daemon_crashes(cluster: Cluster, daemon: str) -> None:
    _crashes(cluster, daemon)


def void(_: object) -> None:
    """For lambdas."""


def _nics(cluster: Cluster, side: str) -> dict[str, str]:
    return {each["name"]: each[side] for each in cluster.data["directors"]}


@pytest.mark.parametrize("side", ["uplink", "downlink"])
def test_a_link_is_cut(cluster: Cluster, side: str) -> None:
    nic, within = _nics(cluster, side), 0.0
    if side == "downlink" and cluster.mode == "ospf":
        # Its health checks find that no real server is left, of one service after the other, and ospfd says the next a
        # second later. In mode vrrp its instance tracks the downlink: the others hear of it at once.
        within = max(check_seconds(cluster, name) for name in ("web", "shop")) + 1
    _recovers(
        cluster,
        f"{side} cut",
        lambda name: cluster.lab.plug(name, nic[name], into=False),
        lambda name: cluster.lab.plug(name, nic[name], into=True),
        within=within,
    )


@VRRP_ONLY
def test_an_operation_reaches_a_master_whose_link_has_just_come_back(cluster: Cluster) -> None:
    """It is reloaded while it waits: neither does it forget its link, nor does it take the VIPs early."""
    nic = _nics(cluster, "downlink")

    def mend(name: str) -> None:
        cluster.lab.plug(name, nic[name], into=True)
        cluster.lab.ask(name, "systemctl reload keepalived")

    event = "downlink cut, a reload when it is back"
    _recovers(cluster, event, lambda name: cluster.lab.plug(name, nic[name], into=False), mend)


def test_a_director_loses_power(cluster: Cluster) -> None:
    lab = cluster.lab
    _recovers(cluster, "power cut", lab.kill, lambda name: machines.settle(lab.start_machine(name)), boots=True)


def test_the_router_restarts(cluster: Cluster) -> None:
    """Everybody is cut off while it is away; once it is there, within hellos and a dead interval, all is as before."""
    lab = cluster.lab

    def restart(_: str) -> None:
        lab.kill("router")
        lab.start_space(lab.node("router"))

    # A router that has just started waits a dead interval before it says who is designated (RFC 2328, 9.4).
    ospf = cluster.data.get("ospf", {})
    within = float(ospf["hello_interval"] + ospf["dead_interval"]) if ospf else 5.0
    _recovers(cluster, "router restart", restart, within=within)


# --- 6: a flood


FLOOD_RATE, FLOOD_SECONDS = 400, 20


def remembered(cluster: Cluster) -> set[str]:
    """The clients whose connections directors know."""
    listings = [cluster.lab.ask(name, "ipvsadm -Lnc").splitlines()[2:] for name in cluster.directors]
    return {row.split()[3].rpartition(":")[0].strip("[]") for rows in listings for row in rows}


def answered(cluster: Cluster) -> int:
    """The SYNs that directors have answered for protected services since they booted."""
    rows = [cluster.lab.ask(name, "grep ^synproxy_syn_cnt /proc/net/ip_vs_ext_stats") for name in cluster.directors]
    return sum(int(of_cpu) for row in rows for of_cpu in row.split()[1:])


def test_a_flood_leaves_real_traffic_alone(cluster: Cluster) -> None:
    lab = cluster.lab
    ((vip, port),) = cluster.targets("shop")
    network = lab.topology.address("router", "clients", 4).rpartition(".")[0]
    flood = [str(FLOOD_SECONDS), str(FLOOD_RATE), vip, str(port), f"{network}.", "100", "250"]
    words = [sys.executable, "-m", "tests.cluster.flood", *flood]
    real = {lab.topology.address(name, "clients", version) for name in CLIENTS for version in (4, 6)}
    known: set[str] = set()
    with cluster.traffic() as clients:
        before = answered(cluster)
        begun = time.monotonic()
        argv = lab.space("client-2").network_argv(words)
        with run.start(argv, log=cluster.work / "flood.log", cwd=settings.TOP) as flooding:
            while flooding.poll() is None:
                known |= remembered(cluster)
            assert flooding.wait(60) == 0, flooding.tail()
            ended = time.monotonic()
        arrived = answered(cluster) - before
        clients.goes_on()
    sent = int(flooding.log.read_text().split()[-1])
    assert sent > FLOOD_RATE * FLOOD_SECONDS * 0.8
    requests = clients.so_far()
    during = [each for each in requests if begun < each.begun < ended]
    shop = [each for each in during if each.target == f"{vip} {port}"]
    also = f"{sent} in {FLOOD_SECONDS} s, {arrived} answered, {len(known - real)} of their senders remembered"
    cluster.note("6 flood", "SYNs", during, "0", also)
    assert not failed(requests), failed(requests)[:5]
    assert len(shop) > 20, "real clients asked the flooded VIP meanwhile"
    # A full queue may drop some, which nobody sends again. Those of real clients are counted, too.
    assert arrived > (sent + len(shop)) * 0.9, f"{arrived} of {sent} SYNs were answered"
    # Nobody is remembered who has not completed a handshake.
    assert known == real


# --- 7: an upgrade


OLD_DISK = "/root/old-disk"


def _next_image(cluster: Cluster) -> Path:
    """Another image for directors: $LVSFORGE_NEXT, or a copy of theirs: later stories test the same software."""
    if given := os.environ.get("LVSFORGE_NEXT"):
        return settings.TOP / given
    now = Path(cluster.lab.state.images["director"])
    return Path(shutil.copyfile(now, cluster.lab.folder / f"{now.stem}-copy.qcow2"))


def drain(cluster: Cluster, name: str) -> None:
    """Take a director out of traffic, in mode ospf while it still forwards, and wait until nobody is left on it."""
    lab = cluster.lab
    if cluster.mode == "ospf":
        # Its VIPs cost more from there: nobody has to find a new neighbour, as when its daemons end.
        for daemon, word in (("ospfd", "ip ospf"), ("ospf6d", "ipv6 ospf6")):
            lab.ask(name, f"vtysh -d {daemon} -c 'configure terminal' -c 'interface lo' -c '{word} cost 65535'")
        end = time.monotonic() + takeover_seconds(cluster) + slack(cluster)
        _routed(cluster, [vip for vip, _ in cluster.targets()], set(cluster.directors) - {name}, end)
    else:
        lab.ask(name, "systemctl stop keepalived")
    listed = "listed=$(ipvsadm -Lnc) && case $listed in *ESTABLISHED*) false ;; esac"
    lab.until(name, listed, "its connections have ended")


def test_directors_are_upgraded_one_by_one(cluster: Cluster) -> None:
    """No request fails but what was under way when a connection's path moved to a director that does not know it.

    Paths move when a director goes and when it comes back, those of each VIP once.
    """
    lab, image = cluster.lab, _next_image(cluster)
    before = lab.state.images["director"]
    periods: list[tuple[float, float]] = []
    with cluster.traffic(pause=0.2) as clients:
        for name in cluster.directors:
            begun = time.monotonic()
            drain(cluster, name)
            periods.append((begun, time.monotonic()))
            lab.ask(name, f"touch {OLD_DISK}")
            lab.shut_down(name)
            lab.new_disk(name, image)
            begun = time.monotonic()
            machines.settle(lab.start_machine(name))
            cluster.whole()
            periods.append((begun, time.monotonic()))
        clients.goes_on()
    requests = clients.so_far()
    also = f"{Path(before).stem} to {image.stem}"
    cluster.note("7 upgrade", "two directors", requests, "re-hashed only", also)
    left = not_moved(failed(requests), periods)
    assert not left, f"{len(left)} more failed than paths moved: {left[:5]}\n{cluster.evidence(requests)}"
    for name in cluster.directors:
        lab.ask(name, f"test ! -e {OLD_DISK}")
        info = run.run(["qemu-img", "info", "-U", "--output=json", lab.folder / name / "disk.qcow2"]).stdout
        assert json.loads(info)["backing-filename"] == str(image)


# --- 8: broken input


def _as_it_was(cluster: Cluster) -> None:
    """No host differs from its file."""
    lines = cluster.invoke("plan").stdout.splitlines()
    assert [line for line in lines if line.startswith("==")] == [
        f"== {host.name}: as it should be" for host in cluster.lab.cluster.hosts
    ]


@contextlib.contextmanager
def edited(cluster: Cluster, change: Callable[[Any], None]) -> Iterator[None]:
    """Another cluster file during a block."""
    before = cluster.lab.file.read_text(encoding="utf-8")
    data = yaml.safe_load(before)
    change(data)
    cluster.lab.file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    try:
        yield
    finally:
        cluster.lab.file.write_text(before, encoding="utf-8")


def _stamps(cluster: Cluster) -> dict[str, str]:
    """When which file of each host was last changed."""
    return {
        host.name: cluster.lab.ask(host.name, "find /etc/lvs /etc/keepalived /etc/quagga /etc/sysctl.d -type f "
                                   "-printf '%p %T@ %C@\\n' 2>/dev/null | sort")
        for host in cluster.lab.cluster.hosts
    }  # fmt: skip


def _sysctl_everywhere(data: Any) -> None:
    for host in (*data["directors"], *data["real_servers"]):
        host["sysctl"] = {"net.core.somaxconn": 2345}


def test_a_broken_cluster_file_touches_nobody(cluster: Cluster) -> None:
    def twice(data: Any) -> None:
        data["services"][1]["vips"] = list(data["services"][0]["vips"])
        data["services"][1]["ports"] = list(data["services"][0]["ports"])
        data["directors"][0]["slot"] = 99

    before = _stamps(cluster)
    with cluster.traffic() as clients, edited(cluster, twice):
        result = cluster.invoke("apply", check=False)
        clients.goes_on()
    assert result.returncode == 1
    said = result.stdout + result.stderr
    assert "directors[0].slot" in said and "services[1]" in said, said
    assert _stamps(cluster) == before
    cluster.note("8 broken input", "a cluster file against its rules", clients.so_far(), "0")
    assert not failed(clients.so_far())


def test_a_host_that_is_down_stops_apply_before_it(cluster: Cluster) -> None:
    """Real servers are first: nobody is changed. One that is stopped answers nothing, as one that hangs."""
    before, lab = _stamps(cluster), cluster.lab
    with cluster.traffic("shop") as clients, edited(cluster, _sysctl_everywhere):
        with hanging(lab, "rs-1"):
            result = cluster.invoke("apply", check=False)
    said = result.stdout + result.stderr
    assert result.returncode == 1 and "rs-1" in said and "→" in said, said
    lab.until("rs-1", "true", "being there again")
    assert _stamps(cluster) == before
    cluster.note("8 broken input", "a host is down", clients.so_far())
    cluster.whole()


FILL = """
mkdir /full; n=0
for size in 1G 64M 4M 256k 4k; do
    while fallocate -l $size /full/$n 2>/dev/null; do n=$((n + 1)); done
done
! dd if=/dev/zero of=/full/more bs=64k count=4 2>/dev/null
"""


def test_a_full_disk_leaves_a_host_as_it_was(cluster: Cluster) -> None:
    """Of the two directors the second is full: the first is changed, the second whole, and apply goes on from there."""
    lab = cluster.lab
    order = sorted(cluster.data["directors"], key=lambda each: each.get("priority", 0))
    full = order[-1]["name"]
    before = _stamps(cluster)[full]
    with edited(cluster, _sysctl_everywhere):
        with broken(lab, full, FILL, "rm -rf /full"):
            result = cluster.invoke("apply", check=False)
            said = result.stdout + result.stderr
            assert result.returncode == 1 and full in said and re.search("No space left|could not be written", said), (
                said
            )
            assert _stamps(cluster)[full] == before
        lines = cluster.invoke("plan").stdout
        assert f"== {full}: as it should be" not in lines and f"== {order[0]['name']}: as it should be" in lines, lines
        cluster.invoke("apply")
        _as_it_was(cluster)
    cluster.invoke("apply")
    cluster.note("8 broken input", "a full disk", [])
    cluster.whole()
