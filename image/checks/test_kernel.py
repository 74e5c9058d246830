"""The kernel: which one, how it was started, what it was told."""

from __future__ import annotations

import pytest

from image.checks.conftest import Ask

# Operations manual 1c, and what LVS needs besides.
DIRECTOR = {
    "net.ipv4.conf.all.arp_ignore": "1",
    "net.ipv4.conf.all.arp_announce": "2",
    "net.core.netdev_max_backlog": "500000",
    "net.ipv4.ip_forward": "1",
    "net.ipv4.conf.all.send_redirects": "0",
    "net.ipv4.conf.default.send_redirects": "0",
    "net.ipv4.conf.all.rp_filter": "2",
    "net.ipv4.vs.expire_nodest_conn": "1",
}
REALSERVER = {
    "net.ipv4.conf.all.arp_ignore": "1",
    "net.ipv4.conf.all.arp_announce": "2",
    "net.core.somaxconn": "16384",
}
BOTH = {"kernel.panic": "10", "kernel.panic_on_oops": "1"}


def test_it_is_the_kernel_of_the_package(ask: Ask, role: str) -> None:
    package = {"director": "kernel-lvs", "realserver": "kernel-rs"}[role]
    running = ask("uname -r")
    assert ask(f"rpm -qf --qf '%{{NAME}}\\n' /boot/vmlinuz-{running}") == package
    assert ask("readlink /boot/vmlinuz") == f"vmlinuz-{running}"


@pytest.mark.usefixtures("director")
def test_nohz_is_off(ask: Ask) -> None:
    assert "nohz=off" in ask("cat /proc/cmdline").split()


@pytest.mark.usefixtures("realserver")
def test_a_real_server_keeps_the_kernels_own_ticks(ask: Ask) -> None:
    assert "nohz=off" not in ask("cat /proc/cmdline").split()


def test_sysctls(ask: Ask, role: str) -> None:
    wanted = BOTH | {"director": DIRECTOR, "realserver": REALSERVER}[role]
    got = dict(line.split(" = ") for line in ask(f"sysctl {' '.join(wanted)}").splitlines())
    assert got == wanted


@pytest.mark.usefixtures("director")
def test_a_sysctl_of_the_seed_is_in_force_on_the_first_boot(ask: Ask) -> None:
    assert ask("sysctl -n net.core.somaxconn") == "5000"


@pytest.mark.usefixtures("realserver")
def test_toa_is_loaded(ask: Ask) -> None:
    """Before the first client can come: what is accepted before is never given a client's address."""
    assert ask("lsmod | grep -w ^toa")
    said = ask("journalctl -b -u rc-local -o cat")
    assert "toa loaded, it believes 10.0.0.0/8," in said and "not loaded before" not in said


def test_the_root_file_system_fills_its_disk(ask: Ask) -> None:
    """Grown by systemd-repart; the partitions before it and the file system's own tables take less than a tenth."""
    disk, size = ask("lsblk -bndo SIZE /dev/vda; df -B1 --output=size / | tail -1").split()
    assert int(size) > 0.9 * int(disk)
