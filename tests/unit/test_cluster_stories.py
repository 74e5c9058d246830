"""What judges the stories of tests/cluster: the oracle, what is said of requests, the table of numbers."""

from __future__ import annotations

import json
import socket
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from provision import cluster as clusters
from tests.cluster import again, load, notes, oracle
from tests.cluster.notes import Row
from tests.cluster.oracle import Holding, Service
from tests.cluster.traffic import Request, failed, not_moved, outage, read, summary, under_way
from tests.unit.test_lab_topology import EXAMPLES


def data(mode: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(EXAMPLES[mode].read_text(encoding="utf-8"))
    return found


# --- the oracle

SAVED = """\
-A -t 203.0.113.1:80 -s rr
-a -t 203.0.113.1:80 -r 10.64.1.1:80 -b -w 1
-a -t 203.0.113.1:80 -r 10.64.1.2:80 -b -w 1
-P -t 203.0.113.1:80 -z 10.64.0.1
-P -t 203.0.113.1:80 -z 10.64.0.2
-P -t 203.0.113.1:80 -z 10.64.0.3
-P -t 203.0.113.1:80 -z 10.64.0.4
-A -t 203.0.113.2:8080 -s wrr -j enable
-a -t 203.0.113.2:8080 -r 10.64.1.1:8080 -b -w 100
-a -t 203.0.113.2:8080 -r 10.64.1.2:8080 -b -w 300
-P -t 203.0.113.2:8080 -z 10.64.0.1
-P -t 203.0.113.2:8080 -z 10.64.0.2
-P -t 203.0.113.2:8080 -z 10.64.0.3
-P -t 203.0.113.2:8080 -z 10.64.0.4
-A -t [2001:db8:ffff::1]:80 -s rr
-a -t [2001:db8:ffff::1]:80 -r [2001:db8:64::1:1]:80 -b -w 1
-a -t [2001:db8:ffff::1]:80 -r [2001:db8:64::1:2]:80 -b -w 1
-P -t [2001:db8:ffff::1]:80 -z 2001:db8:64::1
-P -t [2001:db8:ffff::1]:80 -z 2001:db8:64::2
-P -t [2001:db8:ffff::1]:80 -z 2001:db8:64::3
-P -t [2001:db8:ffff::1]:80 -z 2001:db8:64::4
"""
SHOWN = "\n".join(
    [
        "1: lo    inet 127.0.0.1/8 scope host lo\\       valid_lft forever preferred_lft forever",
        "1: lo    inet 203.0.113.1/32 scope global lo\\       valid_lft forever preferred_lft forever",
        "1: lo    inet 203.0.113.2/32 scope global lo\\       valid_lft forever preferred_lft forever",
        "1: lo    inet6 2001:db8:ffff::1/128 scope global \\       valid_lft forever preferred_lft forever",
        "1: lo    inet6 ::1/128 scope host \\       valid_lft forever preferred_lft forever",
        "2: eth0    inet 192.0.2.2/24 brd 192.0.2.255 scope global eth0\\       valid_lft forever",
        "3: eth1    inet 10.64.255.1/16 brd 10.64.255.255 scope global eth1\\       valid_lft forever",
        *(f"3: eth1    inet 10.64.0.{n}/32 scope global eth1\\       valid_lft forever" for n in range(1, 5)),
        *(f"3: eth1    inet6 2001:db8:64::{n}/128 scope global \\       valid_lft forever" for n in range(1, 5)),
        "3: eth1    inet6 fe80::5054:ff:fe00:101/64 scope link \\       valid_lft forever preferred_lft forever",
    ]
)
OWN = {"192.0.2.2", "10.64.255.1"}


def test_what_a_director_is_to_hold_is_found_there() -> None:
    found = oracle.found(SAVED, SHOWN, "eth1", OWN)
    assert oracle.wanted(data("ospf"), "lvs-1").differences(found) == []
    assert found.services["t 203.0.113.2:8080"] == Service(
        "wrr", True, {"10.64.1.1:8080": 100, "10.64.1.2:8080": 300}, {f"10.64.0.{n}" for n in range(1, 5)}
    )


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("-s wrr -j enable", "-s wrr", "t 203.0.113.2:8080"),
        ("-s rr\n-a -t 203.0.113.1:80", "-s wlc\n-a -t 203.0.113.1:80", "t 203.0.113.1:80"),
        ("-r 10.64.1.2:8080 -b -w 300", "-r 10.64.1.2:8080 -b -w 0", "t 203.0.113.2:8080"),
        ("-a -t 203.0.113.1:80 -r 10.64.1.2:80 -b -w 1\n", "", "t 203.0.113.1:80"),
        ("-P -t 203.0.113.1:80 -z 10.64.0.4\n", "", "t 203.0.113.1:80"),
        (
            "-A -t 203.0.113.1:80 -s rr\n",
            "-A -t 203.0.113.77:80 -s rr\n-A -t 203.0.113.1:80 -s rr\n",
            "t 203.0.113.77:80",
        ),
    ],
)
def test_what_differs_is_said(before: str, after: str, said: str) -> None:
    assert before in SAVED
    found = oracle.found(SAVED.replace(before, after), SHOWN, "eth1", OWN)
    lines = oracle.wanted(data("ospf"), "lvs-1").differences(found)
    assert len(lines) == 1 and lines[0].startswith(f"{said}: "), lines


def test_addresses_that_differ_are_said() -> None:
    wanted = oracle.wanted(data("ospf"), "lvs-1")
    lines = wanted.differences(oracle.found(SAVED, SHOWN.replace("203.0.113.2/32", "203.0.113.9/32"), "eth1", OWN))
    bound, wanted_vips = (["2001:db8:ffff::1", "203.0.113.1", f"203.0.113.{n}"] for n in (9, 2))
    assert lines == [f"VIPs: {bound}, not {wanted_vips}"]
    (line,) = wanted.differences(oracle.found(SAVED, SHOWN.replace("10.64.0.4/32", "10.64.0.5/32"), "eth1", OWN))
    assert line.startswith("local addresses: ['10.64.0.1', '10.64.0.2', '10.64.0.3', '10.64.0.5',")


@pytest.mark.parametrize("line", ["-E -t 203.0.113.1:80 -s rr", "-a -t 203.0.113.1:80 -r 10.64.1.1:80 -m -w 1"])
def test_what_nobody_expects_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"nobody knows|not FULLNAT"):
        oracle.found(f"-A -t 203.0.113.1:80 -s rr\n{line}\n", "", "eth1", set())


def test_real_servers_that_fail() -> None:
    """Gone from the table, or there with weight 0; a service without any has no VIP, in mode ospf."""
    both = frozenset({"10.64.1.1:80", "10.64.1.2:80"})
    wanted = oracle.wanted(data("ospf"), "lvs-2", down=frozenset({"10.64.1.1:80"}))
    assert wanted.services["t 203.0.113.1:80"].weights == {"10.64.1.2:80": 1}
    assert wanted.vips == {"203.0.113.1", "203.0.113.2", "2001:db8:ffff::1"}
    assert oracle.wanted(data("ospf"), "lvs-2", down=both).vips == {"203.0.113.2", "2001:db8:ffff::1"}
    spec = data("ospf")
    spec["services"][0]["inhibit_on_failure"] = True
    assert oracle.wanted(spec, "lvs-2", down=both).services["t 203.0.113.1:80"].weights == dict.fromkeys(
        sorted(both), 0
    )
    assert oracle.wanted(spec, "lvs-2", down=both).vips == {"203.0.113.2", "2001:db8:ffff::1"}


def test_a_backup_has_services_and_no_vips() -> None:
    master, backup = (oracle.wanted(data("vrrp"), "lvs-1", master=word) for word in (True, False))
    assert backup.services == master.services and backup.local == master.local
    assert (master.vips, backup.vips) == ({"203.0.113.1", "203.0.113.2", "2001:db8:ffff::1"}, set())


def test_shares_follow_slots_and_exceptions() -> None:
    spec = data("ospf")
    spec["local_addresses"]["laddr_g1"]["without"] = ["10.64.0.6"]
    spec["directors"][1]["local_addresses"] = {"laddr_g1": ["10.64.0.99"]}
    share = oracle.shares(spec, "lvs-2")["laddr_g1"]
    assert share == {"10.64.0.5", "10.64.0.7", "10.64.0.8", "10.64.0.99", *(f"2001:db8:64::{n}" for n in range(5, 9))}


@pytest.mark.parametrize("mode", ["ospf", "vrrp"])
def test_the_oracle_and_the_renderer_agree_on_local_addresses(mode: str) -> None:
    """Two ways to one result; the addresses of one director stand above in so many words."""
    cluster = clusters.load(EXAMPLES[mode], secrets=False)
    for director in cluster.directors:
        assert oracle.wanted(data(mode), director.name).local == {str(each) for each in director.all_local_addresses}


def test_nothing_is_not_what_is_wanted() -> None:
    assert len(oracle.wanted(data("ospf"), "lvs-1").differences(Holding())) == 5


# --- requests


def request(begun: float, error: str = "", took: float = 0.1) -> Request:
    return Request(begun, took, "203.0.113.1 80", "" if error else "rs-1", error)


def test_outage() -> None:
    good = [request(n) for n in range(10)]
    assert outage(good) == 0.0
    # From the first that failed to the first good one after the last: answers in between end nothing.
    mixed = [request(0), request(1, "x"), request(2), request(3, "x"), request(3.5), request(4)]
    assert outage(mixed) == 2.5
    # The way back costs something much later: another one.
    assert outage([*mixed, request(30, "x"), request(31)]) == 2.5
    assert outage([*mixed, request(30, "x"), request(34)]) == 4.0
    # Who gave up last need not be who asked last.
    assert outage([request(0, "x", took=4), request(1, "x"), request(2), request(5.5, "x"), request(6)]) == 6.0
    with pytest.raises(ValueError, match="no good request after the last that failed"):
        outage([request(0), request(1, "x")])


def test_requests_are_read_in_their_order() -> None:
    lines = [json.dumps(vars(request(n))) for n in (2.0, 1.0)]
    assert [each.begun for each in read("\n".join([*lines, '{"begun": 3.0, "took']))] == [1.0, 2.0]
    assert [each.begun for each in read("\n".join(lines) + "\n")] == [1.0, 2.0]


def test_what_is_said_of_requests() -> None:
    some = [request(1), request(2, "TimeoutError: timed out"), request(3, "TimeoutError: timed out")]
    assert [each.begun for each in failed(some)] == [2, 3]
    assert summary(some) == "2 of 3 failed (203.0.113.1 80: TimeoutError: timed out)"
    assert summary(some[:1]) == "0 of 1 failed"


def test_what_was_under_way() -> None:
    some = [request(1, took=1), request(5, took=4), request(20)]
    assert under_way(some, (8.0, 8.5)) == [some[1]]
    assert under_way(some, (0.0, 5.0)) == some[:2]
    assert under_way(some, (2.5, 4.5)) == []
    assert under_way(some, (9.0, 19.0)) == [some[1]]


def test_what_no_move_of_paths_explains() -> None:
    moved = [request(n, "TimeoutError: no answer", took=4) for n in (1, 2, 3, 20, 30)]
    assert not_moved(moved, [(5.0, 6.0), (22.0, 25.0), (30.0, 40.0)]) == []
    # One that began when all was over, and one after the moment at which most were under way.
    assert not_moved(moved, [(5.0, 6.0), (22.0, 29.0)]) == [moved[4]]
    assert not_moved([*moved[:3], moved[3]], [(0.0, 40.0)]) == [moved[3]]
    assert not_moved(moved[:1], [(5.1, 6.0)]) == moved[:1]
    assert not_moved(moved, []) == moved


def test_each_target_has_its_own_moment() -> None:
    early, late = (Request(n, 1, f"203.0.113.{n} 80", "", "ConnectionResetError: x") for n in (1, 9))
    assert not_moved([early, late], [(0.0, 20.0)]) == []


@pytest.mark.parametrize(
    "error", ["ConnectionRefusedError: x", "TimeoutError: no connection", "ValueError: status 500"]
)
def test_no_move_of_paths_refuses_a_connection(error: str) -> None:
    some = [request(1, error), request(1, "ConnectionResetError: x")]
    assert not_moved(some, [(0.0, 2.0)]) == some[:1]


# --- a client


@pytest.mark.network_local
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.0 200 OK\r\nX: y\r\n\r\nrs-1\n", "rs-1"),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\nrs-1\n", "status 500"),
        (b"", "status none"),
    ],
)
def test_a_request(answer: bytes, said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            link, _ = listener.accept()
            with link:
                assert link.recv(4096).startswith(b"GET /index.html HTTP/1.0\r\n")
                link.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            found = load.ask("127.0.0.1", listener.getsockname()[1], 5.0)
        except ValueError as error:
            found = str(error)
        thread.join()
    assert found == said


@pytest.mark.network_local
def test_a_server_that_says_nothing_takes_no_longer_than_a_client_waits() -> None:
    """And it is said what did not come: nobody takes the first one out of a queue of one."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(TimeoutError, match="no answer"):
            load.ask("127.0.0.1", port, 0.2)
        with pytest.raises(TimeoutError, match="no connection"):
            load.ask("127.0.0.1", port, 0.2)


@pytest.mark.network_local
def test_a_port_can_be_taken_again_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        first = again.ask("127.0.0.1", "127.0.0.1", port, 0, 0.1)
        assert first["error"] == "TimeoutError: timed out"
        then = again.ask("127.0.0.1", "127.0.0.1", port, int(str(first["source"])), 0.1)
        assert then == first
        seen = []
        for _ in range(2):
            link, peer = listener.accept()
            link.close()
            seen.append(peer[1])
    assert seen == [first["source"], first["source"]]


@pytest.mark.network_local
def test_several_targets_are_asked_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as free:
        ports = [each.getsockname()[1] for each in (silent, free)]
        free.close()
        pages = [("127.0.0.1", "127.0.0.1", port, 0, 0.1) for port in ports]
        monkeypatch.setattr("sys.argv", ["again", json.dumps(pages)])
        again.main()
    errors = [json.loads(line)["error"] for line in capsys.readouterr().out.splitlines()]
    assert errors == ["TimeoutError: timed out", "ConnectionRefusedError: [Errno 111] Connection refused"]


@pytest.mark.network_local
def test_a_client_writes_what_became_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    plan = {"targets": [["127.0.0.1", port]], "workers": 2, "pause": 0.01, "timeout": 1}
    plan |= {"out": str(tmp_path / "out"), "until": str(tmp_path / "stop")}
    monkeypatch.setattr("sys.argv", ["load.py", json.dumps(plan)])
    threading.Timer(0.3, (tmp_path / "stop").touch).start()
    load.main()
    found = read((tmp_path / "out").read_text(encoding="utf-8"))
    assert len(found) > 4
    assert {each.error for each in found} == {"ConnectionRefusedError: [Errno 111] Connection refused"}
    assert all(a.begun <= b.begun for a, b in pairwise(found))


# --- the table


HEAD = [
    "| story | what happened | outage, s | slowest, s | failed / requests | limit, s | also |",
    "|---|---|---|---|---|---|---|",
]


def test_rows_of_numbers(tmp_path: Path) -> None:
    file, story = tmp_path / "out" / "cluster-stories.md", ("5 failures (ospf)", "power cut")
    some = [request(0), request(1, "x", took=4), request(3, took=3.04)]
    notes.note(file, Row.of(*story, some, "12"))
    notes.note(file, Row.of("6 flood (ospf)", "SYNs", [], also="8000 in 20 s"))
    assert file.read_text(encoding="utf-8").splitlines() == [
        *HEAD,
        "| 5 failures (ospf) | power cut | 2.0 | 3.0 | 1 / 3 | 12 |  |",
        "| 6 flood (ospf) | SYNs |  |  | 0 / 0 |  | 8000 in 20 s |",
    ]
    notes.note(file, Row.of(*story, some[:1], "15"))
    assert file.read_text(encoding="utf-8").splitlines()[2:] == [
        "| 5 failures (ospf) | power cut | 0.0 | 0.1 | 0 / 1 | 15 |  |",
        "| 6 flood (ospf) | SYNs |  |  | 0 / 0 |  | 8000 in 20 s |",
    ]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_an_older_table_keeps_its_rows_and_gets_the_new_head() -> None:
    older = "| story | what happened |\n|---|---|\n| 1 traffic (ospf) | nothing |\n"
    assert notes.merged(older, Row.of("2 traffic (vrrp)", "nothing", [])).splitlines() == [
        *HEAD,
        "| 1 traffic (ospf) | nothing |",
        "| 2 traffic (vrrp) | nothing |  |  | 0 / 0 |  |  |",
    ]
