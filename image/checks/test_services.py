"""Units and sockets."""

from __future__ import annotations

import pytest

from image.checks.conftest import Ask

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


@pytest.mark.usefixtures("realserver")
def test_a_real_server_has_nothing_of_a_director(ask: Ask) -> None:
    assert ask("cd /usr/sbin && ls keepalived zebra ipvsadm set_irq_affinity 2>/dev/null || :") == ""
