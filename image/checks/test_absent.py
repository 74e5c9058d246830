"""What must not be there: services that would undo ours, and every trace of the machine that was baked."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from image.checks.conftest import Ask

# Debian packages that must not come, not even as a dependency.
PACKAGES = {
    "irqbalance": "undoes set_irq_affinity within ten seconds (operations manual, 1e)",
    "ifupdown": "a second network manager beside networkd",
    "netplan.io": "the same",
    "network-manager": "the same",
    "libpam-systemd": "a session and a `systemd --user` for each ssh login, for nobody",
    "exim4-base": "a mail server that a careless Recommends brings",
    "unattended-upgrades": "a director is upgraded when its operator says so",
    "grub-pc": "the boot loader is written by the image build, not by a package's scriptlet",
    "grub-efi-amd64": "the same",
    "initramfs-tools": "our kernels carry storage and file systems built in",
}
# What a boot with a seed makes again, by every line of hygiene.yaml; checked in test_identity.py instead.
MADE_BY_THE_BOOT = (
    "/etc/ssh/ssh_host_*",
    "/root/.ssh",
    "/etc/lvs/host.conf",
    "/etc/systemd/network/*-cloud-init-*",
    "/var/lib/cloud/",
    "/var/lib/dbus/machine-id",  # a link to /etc/machine-id, which every boot makes where it is missing
    "/var/log/cloud-init*.log",
    "/var/log/messages*",
    "/var/log/secure*",
    "/var/log/wtmp*",
    "/var/log/btmp*",
    "/var/log/lastlog",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/timers/*",
    "/var/lib/systemd/timesync/*",
    "/var/spool/rsyslog/*",
    "/var/cache/dnf/*",
    "/var/lib/dnf/history.sqlite*",
    "/tmp/",  # noqa: S108  a glob of hygiene.yaml, nothing is made there
    "/var/tmp/",  # noqa: S108  the same
)
REMOVED = [
    glob
    for glob in yaml.safe_load((Path(__file__).parents[1] / "hygiene.yaml").read_text(encoding="utf-8"))["remove"]
    if not glob.startswith(MADE_BY_THE_BOOT)
]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_absent(ask: Ask, package: str) -> None:
    assert ask(f"dpkg-query -W -f '${{db:Status-Status}}' {package} 2>/dev/null || :") in ("", "not-installed")


def test_irqbalance_is_absent_in_every_form(ask: Ask) -> None:
    units = "systemctl list-unit-files --no-legend 'irqbalance*'"
    assert ask(f"command -v irqbalance; pgrep -x irqbalance; {units}; :") == ""


def test_nothing_of_the_baked_machine_is_left(ask: Ask) -> None:
    assert len(REMOVED) >= 20
    assert ask("ls -d -- " + " ".join(REMOVED) + " 2>/dev/null || :") == ""


def test_no_file_is_older_than_the_boot_that_should_have_made_it(ask: Ask) -> None:
    """Made by this boot, so: not a leftover of the bake, whose clock was behind this one's start."""
    globs = "/etc/ssh/ssh_host_* /var/log/messages* /var/log/cloud-init*.log /var/log/wtmp /var/lib/cloud/instances/*"
    assert ask(f"find {globs} -maxdepth 0 ! -newer /proc/1 2>/dev/null || :") == ""


def test_no_account_has_a_password(ask: Ask) -> None:
    assert ask("awk -F: '$2 !~ /^[!*]/ {print $1}' /etc/shadow") == ""


def test_no_address_of_a_package_registry(ask: Ask) -> None:
    """Where a host upgrades from is its operator's to say."""
    files = "/etc/apt/sources.list /etc/apt/sources.list.d/* /etc/yum.repos.d/*"
    assert ask(f"cat {files} 2>/dev/null | grep -v '^#' || :") == ""
