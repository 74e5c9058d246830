"""The packages of this repository, and how an operator upgrades them."""

from __future__ import annotations

from image.checks.conftest import Ask

OURS = {"director": {"kernel-lvs", "ipvsadm", "keepalived", "frr"}, "realserver": {"kernel-rs"}}


def test_they_are_installed(ask: Ask, role: str) -> None:
    found = set(ask("rpm -qa --qf '%{NAME}\\n'").split())
    assert found >= OURS[role]
    assert not found & (set.union(*OURS.values()) - OURS[role])


def test_they_are_signed(ask: Ask, role: str) -> None:
    names = " ".join(sorted(OURS[role]))
    lines = ask(f"rpm -q --qf '%{{NAME}} %|RSAHEADER?{{signed}}:{{%|DSAHEADER?{{signed}}:{{unsigned}}|}}|\\n' {names}")
    assert {line.split()[1] for line in lines.splitlines()} == {"signed"}


def test_no_file_of_them_has_changed(ask: Ask) -> None:
    """`rpm -Va` prints a line for each file that is not as it was packaged; configuration files count as well here."""
    assert ask("rpm -Va || :") == ""


def test_rpm_and_dnf_insist_on_signatures(ask: Ask) -> None:
    assert ask("rpm --eval '%{_dbpath} %{_pkgverify_level}'") == "/var/lib/rpm all"
    settings = ask("dnf config-manager --dump 2>/dev/null || cat /etc/dnf/dnf.conf").lower().replace(" ", "")
    assert "gpgcheck=1" in settings or "gpgcheck=true" in settings
    assert "repo_gpgcheck=1" in settings or "repo_gpgcheck=true" in settings


def test_debians_packages_are_whole(ask: Ask) -> None:
    """No package half installed, none whose files are missing but for what image/base.yaml leaves out."""
    assert ask("dpkg --audit") == ""
