"""Units and sockets."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator

import pytest

from image.checks.conftest import Ask
from pipeline import settings

# keepalived reports that it is up only when it has something to do. The addresses are of the documentation's range.
VIRTUAL_SERVER = """virtual_server 192.0.2.1 80 {
 lb_algo rr
 lb_kind NAT
 real_server 192.0.2.2 80 {
  TCP_CHECK {
  }
 }
}
"""
# Installed, waiting for the host's files.
WAITING = {
    "keepalived": ("/etc/keepalived/keepalived.conf", VIRTUAL_SERVER),
    "zebra": ("/etc/quagga/zebra.conf", "hostname check\n"),
    "ospfd": ("/etc/quagga/ospfd.conf", "hostname check\nrouter ospf\n ospf router-id 192.168.100.250\n"),
}
RUNNING = ("ssh", "rsyslog", "systemd-networkd", "systemd-resolved", "systemd-timesyncd", "systemd-logind", "dbus")
MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service")


def test_no_unit_failed(ask: Ask) -> None:
    assert ask("systemctl is-system-running --wait || systemctl --failed --no-legend --plain") == "running"


def test_what_must_run_runs(ask: Ask) -> None:
    states = ask(f"systemctl is-active {' '.join(RUNNING)}").split()
    assert dict(zip(RUNNING, states, strict=True)) == dict.fromkeys(RUNNING, "active")


def test_what_must_not_run_is_masked(ask: Ask) -> None:
    states = ask(f"systemctl is-enabled {' '.join(MASKED)} || :").split()
    assert dict(zip(MASKED, states, strict=True)) == dict.fromkeys(MASKED, "masked")


def test_a_login_on_the_serial_console(ask: Ask) -> None:
    assert ask("systemctl is-active serial-getty@ttyS0") == "active"


def test_only_sshd_listens(ask: Ask) -> None:
    """By TCP anybody; by UDP nothing but the DHCP client on its own interface."""
    lines = [line.split() for line in ask("ss -Hlntup").splitlines()]
    tcp = {(words[4].rpartition(":")[2], words[6].split('"')[1]) for words in lines if words[0] == "tcp"}
    udp = {words[6].split('"')[1] for words in lines if words[0] == "udp"}
    assert tcp == {("22", "sshd")}
    assert udp <= {"systemd-network", "systemd-timesyn"}


def test_no_password_opens_the_door(ask: Ask) -> None:
    settings = dict(line.split(" ", 1) for line in ask("sshd -T").splitlines())
    assert settings["passwordauthentication"] == "no"
    assert settings["kbdinteractiveauthentication"] == "no"
    assert settings["permitrootlogin"] in ("without-password", "prohibit-password")
    assert settings["hostkey"] == "/etc/ssh/ssh_host_ed25519_key"


def test_messages_are_where_the_manual_reads_them(ask: Ask) -> None:
    ask("logger -p user.notice lvsforge-check")
    # rsyslog takes what the journal forwards; both have it in memory for a moment
    ask("for n in $(seq 50); do grep -q lvsforge-check /var/log/messages && exit 0; sleep 0.2; done; exit 1")


def test_logs_are_measured_every_quarter_of_an_hour(ask: Ask) -> None:
    """`maxsize` bounds nothing between two runs of logrotate; Debian's own timer is a daily one."""
    assert ask("systemctl is-active logrotate.timer") == "active"
    calendar = ask("systemctl show -P TimersCalendar logrotate.timer")
    assert calendar.count("OnCalendar=") == 1 and "OnCalendar=*-*-* *:00/15:00 " in calendar


@pytest.mark.usefixtures("director")
@pytest.mark.parametrize("unit", WAITING)
def test_a_service_waits_for_its_configuration(ask: Ask, unit: str) -> None:
    """Off without a file, and no failure; with one it starts. What is done here is undone."""
    path, text = WAITING[unit]
    state = ask(f"systemctl show -p LoadState -p ActiveState -p ConditionResult -p UnitFileState {unit}")
    assert set(state.splitlines()) == {
        "LoadState=loaded",
        "ActiveState=inactive",
        "ConditionResult=no",
        "UnitFileState=enabled",
    }
    try:
        ask(f"printf '%s' '{text}' >{path} && systemctl start {unit} && systemctl is-active {unit}")
    finally:
        ask(f"systemctl stop {unit}; rm -f {path}; systemctl reset-failed {unit} 2>/dev/null || :")


# As the operations manual types it, and as systemd does.
COMMANDS = ("service {unit} {verb}", "systemctl {verb} {unit}")
MANUAL = settings.TOP / "provision/examples/manual/ospf/etc/quagga"
# As the manual types them, with where its files send their logs.
ROUTING = {
    "zebra": ("/usr/sbin/zebra -d -f /etc/quagga/zebra.conf", "/var/log/zebra.log"),
    "ospfd": ("/usr/sbin/ospfd -d -f /etc/quagga/ospf.conf", "/var/log/ospf.log"),
}
Do = Callable[[str, str], str]


def settled(ask: Ask, command: str) -> None:
    """Wait until a command succeeds: what a signal starts takes a moment."""
    ask(f"for n in $(seq 100); do {command} && exit 0; sleep 0.2; done; exit 1")


@pytest.fixture(params=COMMANDS, ids=["service", "systemctl"])
def do(ask: Ask, request: pytest.FixtureRequest) -> Do:
    """Do something to a unit, in one of the two ways."""
    return lambda verb, unit: ask(request.param.format(verb=verb, unit=unit))


@pytest.mark.usefixtures("director")
def test_keepalived_is_started_reloaded_and_stopped(ask: Ask, do: Do) -> None:
    path, text = WAITING["keepalived"]
    pid = "systemctl show -P MainPID keepalived"
    try:
        ask(f"printf '%s' {shlex.quote(text)} >{path}")
        do("start", "keepalived")
        first = ask(pid)
        assert first != "0"
        settled(ask, "ipvsadm -Ln | grep -q 192.0.2.2:80")
        ask(f"sed -i s/192.0.2.2/192.0.2.3/ {path}")
        do("reload", "keepalived")
        settled(ask, "ipvsadm -Ln | grep -q 192.0.2.3:80")
        assert ask(pid) == first, "a reload is no restart"
        do("status", "keepalived")
        do("stop", "keepalived")
        assert "192.0.2.1:80" not in ask("ipvsadm -Ln")
        assert ask("pgrep -x keepalived || :") == ""
    finally:
        ask(f"systemctl stop keepalived; rm -f {path}; systemctl reset-failed keepalived 2>/dev/null || :")


@pytest.fixture
def manual(ask: Ask) -> Iterator[None]:
    """The manual's files for the routing daemons, as root's editor leaves them."""
    files = sorted(MANUAL.glob("*.conf"))
    assert [file.name for file in files] == ["ospf.conf", "zebra.conf"]
    for file in files:
        text = shlex.quote(file.read_text(encoding="utf-8"))
        ask(f"printf '%s' {text} >/etc/quagga/{file.name}")
    yield
    ask("systemctl stop ospfd zebra; rm -f /etc/quagga/*.conf.sav /etc/quagga/ospf.conf /etc/quagga/zebra.conf")
    ask("systemctl reset-failed ospfd zebra 2>/dev/null || :")


def check_routing(ask: Ask, word: str) -> None:
    """Both daemons run with the manual's configuration, and log a word where it says."""
    shown = ask("vtysh -d ospfd -c 'show running-config'")
    assert " ip ospf hello-interval 3\n" in shown
    assert " area 0.0.0.11 stub no-summary\n" in shown
    assert "password 8 123456\n" in ask("vtysh -d zebra -c 'show running-config'")
    # vtysh has no word for a line in the log; what it tells both daemons is logged
    ask(f"vtysh -c 'configure terminal' -c 'log commands' -c 'access-list {word} permit any'")
    for daemon, (_, log) in ROUTING.items():
        assert ask(f"stat -c %U $(readlink /proc/$(cat /run/frr/{daemon}.pid)/exe) {log}").split() == ["root", "frr"]
        settled(ask, f"grep -q {word} {log}")
    settled(ask, f"grep -q 'ospfd.*{word}' /var/log/messages")  # `log syslog` of its file


@pytest.mark.usefixtures("director", "manual")
def test_routing_daemons_are_started_restarted_and_stopped(ask: Ask, do: Do) -> None:
    for daemon in ROUTING:
        do("start", daemon)
    check_routing(ask, "lvsforge-started")
    for daemon in ROUTING:
        # The others' restart after zebra's goes on when systemctl has returned.
        settled(ask, f"[ -e /run/frr/{daemon}.pid ]")
        before = ask(f"cat /run/frr/{daemon}.pid")
        do("restart", daemon)
        do("status", daemon)
        assert ask(f"cat /run/frr/{daemon}.pid") != before
    check_routing(ask, "lvsforge-restarted")
    # what the operator changed in the daemon is written to the manual's own file
    ask("vtysh -d ospfd -c 'write file' && grep -q 'stub no-summary' /etc/quagga/ospf.conf.sav")
    for daemon in ROUTING:
        do("stop", daemon)
        assert ask(f"pgrep -x {daemon} || :") == ""


@pytest.mark.usefixtures("director", "manual")
def test_routing_daemons_are_started_by_hand(ask: Ask) -> None:
    """The manual's lines as they are printed, by root, with files that are root's."""
    try:
        for line, _ in ROUTING.values():
            ask(line)
        check_routing(ask, "lvsforge-typed")
        assert set(ask("ps -o user= -C zebra,ospfd").split()) == {"frr"}
    finally:
        ask("for d in ospfd zebra; do [ ! -e /run/frr/$d.pid ] || kill $(cat /run/frr/$d.pid); done")
        settled(ask, "! pgrep -x 'zebra|ospfd' >/dev/null")


@pytest.mark.usefixtures("realserver")
def test_a_real_server_has_nothing_of_a_director(ask: Ask) -> None:
    assert ask("cd /usr/sbin && ls keepalived zebra ipvsadm set_irq_affinity 2>/dev/null || :") == ""
