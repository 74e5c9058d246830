"""What one may ask of FULLNAT and what the kernel answers; sysctls; that namespaces know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.kernel.lab import Lab
from tests.kernel.machine import Failed
from tests.kernel.topology import FAMILIES, Site, service

pytestmark = [pytest.mark.build, pytest.mark.guest]

VIP = {4: "192.0.2.1", 6: "2001:db8:8::1"}
RS = {4: "10.0.2.11", 6: "fd00:2::11"}
LOCAL = {4: "10.0.2.200", 6: "fd00:2::200"}
OTHER = {4: 6, 6: 4}
# No host can have them.
NO_HOST = {
    4: ("0.0.0.0", "127.0.0.1", "127.255.255.254", "224.0.0.1", "239.1.2.3", "255.255.255.255"),  # noqa: S104  refused
    6: ("::", "::1", "ff02::1", "ff0e::1", "fe80::1"),
}
FULLNAT, OPS = 5, 4  # IP_VS_CONN_F_FULLNAT, IP_VS_SVC_F_ONEPACKET


def _service(family: int, **more: Any) -> dict[str, Any]:
    return {"address": VIP[family], "port": 80, **more}


def _new(family: int, **more: Any) -> dict[str, Any]:
    return {"command": "NEW_SERVICE", "service": _service(family, whole=True, **more)}


def _dest(family: int, method: int = FULLNAT, command: str = "NEW_DEST", **more: Any) -> dict[str, Any]:
    dest = {"address": RS[family], "port": 80, "method": method}
    return {"command": command, "service": _service(family, **more), "dest": dest}


def _laddr(family: int, address: str, command: str = "NEW_LADDR", **more: Any) -> dict[str, Any]:
    return {"command": command, "service": _service(family, **more), "laddr": address}


@pytest.mark.parametrize("family", FAMILIES)
def test_local_addresses_come_and_go(lab: Lab, family: int) -> None:
    host = lab.namespace("host")
    second = LOCAL[family] + "1"
    answers = host.call(
        "genl:do",
        requests=[
            _laddr(family, LOCAL[family]),
            _new(family),
            _laddr(family, LOCAL[family]),
            _laddr(family, LOCAL[family]),
            _laddr(family, second) if family == 6 else _laddr(family, "10.0.2.201"),
            _laddr(family, LOCAL[family], "DEL_LADDR"),
            _laddr(family, LOCAL[family], "DEL_LADDR"),
        ],
    )
    assert answers == ["ESRCH", "ok", "ok", "EEXIST", "ok", "ok", "ENOENT"]
    seen = host.call("genl:listed", of=_service(family))
    assert seen["locals"] == {second if family == 6 else "10.0.2.201": [0, 0]}


@pytest.mark.parametrize("family", FAMILIES)
def test_addresses_that_no_host_has_are_refused(lab: Lab, family: int) -> None:
    host = lab.namespace("host")
    answers = host.call("genl:do", requests=[_new(family), *(_laddr(family, a) for a in NO_HOST[family])])
    assert dict(zip(NO_HOST[family], answers[1:], strict=True)) == dict.fromkeys(NO_HOST[family], "EINVAL")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_work_is_refused(lab: Lab, family: int) -> None:
    """One packet scheduling, protocols without ports of their own, another family, methods that nobody has."""
    host = lab.namespace("host")
    sctp: dict[str, Any] = {"port": 81, "protocol": "sctp"}
    other = {"command": "NEW_DEST", "service": _service(family),
             "dest": {"address": RS[OTHER[family]], "port": 80, "method": FULLNAT}}  # fmt: skip
    requests: list[tuple[dict[str, Any], str]] = [
        (_new(family, protocol="udp", flags=OPS), "ok"),
        (_dest(family, protocol="udp"), "EOPNOTSUPP"),
        (_dest(family, 0, protocol="udp"), "ok"),
        (_dest(family, FULLNAT, "SET_DEST", protocol="udp"), "EOPNOTSUPP"),
        (_new(family, **sctp), "ok"),
        (_dest(family, **sctp), "EOPNOTSUPP"),
        (_laddr(family, LOCAL[family], **sctp), "ok"),
        (_new(family), "ok"),
        (other, "EINVAL"),
        (_dest(family, 6), "EINVAL"),
        (_dest(family, 7), "EINVAL"),
        (_dest(family), "ok"),
        (_dest(family, 6, "SET_DEST"), "EINVAL"),
        (_dest(family, FULLNAT, "SET_DEST"), "ok"),
        (_dest(family, 0, "SET_DEST"), "ok"),
        (_dest(family, FULLNAT, "SET_DEST"), "ok"),
        (_new(family, protocol="udp", port=82), "ok"),
        (_dest(family, protocol="udp", port=82), "ok"),
        (
            {"command": "SET_SERVICE", "service": _service(family, whole=True, protocol="udp", port=82, flags=OPS)},
            "EOPNOTSUPP",
        ),
    ]
    answers = host.call("genl:do", requests=[request for request, _ in requests])
    for number, ((request, wanted), got) in enumerate(zip(requests, answers, strict=True)):
        assert got == wanted, f"request {number}: {request}"
    assert host.call("genl:listed", of=_service(family))["methods"] == [FULLNAT]


@pytest.mark.parametrize("family", FAMILIES)
def test_firewall_marks_may_have_them(lab: Lab, family: int) -> None:
    host = lab.namespace("host")
    mark = {"fwmark": 7, "six": family == 6}
    answers = host.call(
        "genl:do",
        requests=[
            {"command": "NEW_SERVICE", "service": {**mark, "whole": True}},
            {"command": "NEW_LADDR", "service": mark, "laddr": LOCAL[family]},
            {
                "command": "NEW_DEST",
                "service": mark,
                "dest": {"address": RS[family], "port": 0, "method": FULLNAT},
            },
            {"command": "NEW_SERVICE", "service": {**mark, "fwmark": 8, "whole": True, "est_timeout": 60}},
        ],
    )
    assert answers == ["ok", "ok", "ok", "ok"]
    assert host.call("genl:listed", of=mark)["locals"] == {LOCAL[family]: [0, 0]}


def test_strict_requests(lab: Lab) -> None:
    """New commands take no flag and no form that they have no meaning for."""
    host = lab.namespace("host")
    answers = host.call(
        "genl:do",
        requests=[
            _new(4),
            {**_laddr(4, LOCAL[4]), "flags": 0x400},
            {"command": "NEW_LADDR", "service": _service(4)},
            {"command": "NEW_LADDR", "laddr": LOCAL[4]},
            {"command": "GET_LADDR", "service": _service(4)},
            {"command": "GET_LADDR", "dump": True},
            {"command": "GET_LADDR", "service": _service(4, port=99), "dump": True},
        ],
    )
    assert answers[0] == "ok"
    for number, answer in enumerate(answers[1:], 1):
        assert answer != "ok", f"request {number} was taken"
    assert host.call("genl:listed", of=_service(4))["locals"] == {}


def test_the_established_timeout(lab: Lab) -> None:
    """Reported always (that is how one knows the kernel has it), kept where a change does not speak of it."""
    host = lab.namespace("host")
    steps: list[tuple[dict[str, Any], str, int | None]] = [
        (_new(4), "ok", 0),
        ({"command": "SET_SERVICE", "service": _service(4, whole=True, est_timeout=60)}, "ok", 60),
        ({"command": "SET_SERVICE", "service": _service(4, whole=True)}, "ok", 60),
        ({"command": "SET_SERVICE", "service": _service(4, whole=True, est_timeout=2147483)}, "ok", 2147483),
        ({"command": "SET_SERVICE", "service": _service(4, whole=True, est_timeout=2147484)}, "EINVAL", 2147483),
        ({"command": "SET_SERVICE", "service": _service(4, whole=True, est_timeout=0)}, "ok", 0),
    ]
    for request, wanted, timeout in steps:
        assert host.call("genl:do", requests=[request]) == [wanted], request
        assert host.call("genl:listed", of=_service(4))["est_timeout"] == timeout
    refused = host.call("genl:do", requests=[_new(4, protocol="udp", est_timeout=60)])
    assert refused == ["EINVAL"]


def test_refusals_by_ipvsadm(lab: Lab) -> None:
    """The same words as a person types them; nothing half-made is left."""
    host = lab.namespace("host")
    host.run("ipvsadm", "-A", "-u", "192.0.2.1:53", "-s", "rr", "--ops")
    with pytest.raises(Failed):
        host.run("ipvsadm", "-a", "-u", "192.0.2.1:53", "-r", "10.0.2.11:53", "-b")
    host.run("ipvsadm", "-A", "-t", "192.0.2.1:80", "-s", "rr")
    host.run("ipvsadm", "-P", "-t", "192.0.2.1:80", "-z", "10.0.2.200")
    for words in (
        ("-P", "-t", "192.0.2.1:80", "-z", "10.0.2.200"),
        ("-P", "-t", "192.0.2.1:80", "-z", "224.0.0.1"),
        ("-Q", "-t", "192.0.2.1:80", "-z", "10.0.2.201"),
        ("-P", "-t", "192.0.2.1:81", "-z", "10.0.2.200"),
        ("-P", "-t", "192.0.2.1:80", "-z", "fd00::1"),
    ):
        with pytest.raises(Failed):
            host.run("ipvsadm", *words)
    assert "->" not in host.run("ipvsadm", "-L", "-n").out.split("RemoteAddress", 1)[1].replace("-> Remote", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_restore(lab: Lab, family: int) -> None:
    one, two = lab.namespace("one"), lab.namespace("two")
    where, real = service(VIP[family], 80), service(RS[family], 8080)
    for words in (
        ("-A", "-t", where, "-s", "wlc", "-p", "60", "-V", "123"),
        ("-P", "-t", where, "-z", LOCAL[family]),
        ("-P", "-t", where, "-z", LOCAL[family] + "0" if family == 6 else "10.0.2.201"),
        ("-a", "-t", where, "-r", real, "-b", "-w", "7", "-x", "9", "-y", "3"),
    ):
        one.run("ipvsadm", *words)
    saved = one.run("ipvsadm", "-S", "-n").out
    two.run("ipvsadm", "-R", stdin=saved)
    assert two.run("ipvsadm", "-S", "-n").out == saved
    assert two.call("genl:listed", of=_service(family)) == one.call("genl:listed", of=_service(family))
    assert two.call("genl:listed", of=_service(family))["est_timeout"] == 123


def test_sysctls(lab: Lab) -> None:
    host = lab.namespace("host")
    defaults = {
        "fullnat_timestamp_remove_entry": "0", "fullnat_mss_adjust_entry": "1", "fullnat_conn_reused_entry": "1",
        "fullnat_lport_min": "5000", "fullnat_lport_max": "65535", "conn_expire_tcp_rst": "1",
    }  # fmt: skip
    for name, value in defaults.items():
        assert host.sysctl(f"net.ipv4.vs.{name}") == value, name
    for name, bad in (
        ("fullnat_lport_min", 1024),
        ("fullnat_lport_min", 65536),
        ("fullnat_lport_min", 0),
        ("fullnat_lport_max", 4999),  # below min
        ("fullnat_lport_max", 65536),
        ("fullnat_timestamp_remove_entry", 2),
        ("fullnat_mss_adjust_entry", -1),
        ("conn_expire_tcp_rst", 2),
    ):
        with pytest.raises(Failed, match="Invalid argument"):
            host.sysctl(f"net.ipv4.vs.{name}", bad)
        assert host.sysctl(f"net.ipv4.vs.{name}") == defaults[name]
    host.sysctl("net.ipv4.vs.fullnat_lport_max", 5000)
    with pytest.raises(Failed, match="Invalid argument"):
        host.sysctl("net.ipv4.vs.fullnat_lport_min", 5001)
    host.sysctl("net.ipv4.vs.fullnat_lport_min", 1025)


def test_every_sysctl_is_wired_to_its_own_variable(lab: Lab) -> None:
    """The table is filled by position: a slip there sets another variable than the one that is named."""
    host = lab.namespace("host")
    names = host.guest.ask("listing", path="/proc/sys/net/ipv4/vs", namespace=host.handle)
    assert len(names) > 25
    for name in names:
        before = {each: host.sysctl(f"net.ipv4.vs.{each}") for each in names}
        value = before[name].split()
        if not value or not value[0].isdigit():
            continue
        for candidate in ("1", "0", "2", str(int(value[0]) + 1), str(int(value[0]) - 1)):
            if candidate == value[0]:
                continue
            try:
                host.sysctl(f"net.ipv4.vs.{name}", candidate)
            except Failed:
                continue
            after = {each: host.sysctl(f"net.ipv4.vs.{each}") for each in names}
            changed = {each for each in names if before[each] != after[each]}
            assert changed <= {name}, f"{name} = {candidate} changed {changed}"
            break
        host.sysctl(f"net.ipv4.vs.{name}", " ".join(value)) if name != "debug_level" else None


def test_counters_have_the_names_that_are_known(lab: Lab) -> None:
    host = lab.namespace("host")
    rows = [line.split() for line in host.read("/proc/net/ip_vs_ext_stats").splitlines()]
    counters = {row[0].rstrip(":"): row[1:] for row in rows}
    wanted = {
        "fullnat_conn_reused", "fullnat_conn_reused_close", "fullnat_conn_reused_timewait",
        "fullnat_conn_reused_finwait", "fullnat_conn_reused_closewait", "fullnat_conn_reused_lastack",
        "fullnat_conn_reused_estab", "rst_in_established", "rst_out_established", "conn_sched_unreach",
        "fullnat_no_laddr", "fullnat_no_lport",
    }  # fmt: skip
    assert wanted <= set(counters)
    cpus = len(host.guest.read("/sys/devices/system/cpu/possible").strip().replace("-", " ").split())
    assert {len(counters[name]) for name in wanted} == {cpus}
    assert {value for name in wanted for value in counters[name]} == {"0"}


# --- namespaces


@pytest.mark.parametrize("family", FAMILIES)
def test_two_directors_are_independent(site: Callable[..., Site], family: int) -> None:
    """The same addresses in two namespaces: services, local addresses, ports, connections, sysctls, counters."""
    one, two = site(servers=1), site(servers=1, name="other-")
    for net in (one, two):
        net.serve()
        net.balance(family, "-b", locals_=1)
        net.director.ip_vs_sysctl("fullnat_lport_max", 5000)
    for net in (one, two):  # the one port of the one must not be taken for the other
        net.clients[0].hold(net.vip(family))
        assert len(net.director.connections()) == 1
    with pytest.raises(Failed, match="ConnectionRefusedError"):
        one.clients[0].get(one.vip(family))
    assert one.director.ext_stats()["fullnat_no_lport"] >= 1
    assert two.director.ext_stats()["fullnat_no_lport"] == 0
    two.director.ip_vs_sysctl("fullnat_lport_max", 6000)
    assert one.director.ip_vs_sysctl("fullnat_lport_max") == "5000"
    two.director.ipvsadm("-C")
    assert one.director.run("ipvsadm", "-G", "-n").out.count(one.local(family)) == 1
    two.lab.remove(two.director)
    assert len(one.director.connections()) == 1
    one.director.ip_vs_sysctl("fullnat_lport_max", 5001)
    assert one.clients[0].get(one.vip(family))
