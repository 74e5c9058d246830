"""The host's own: what the seed gave, and what was made on this first boot."""

from __future__ import annotations

import json
import re

from image.checks.conftest import Ask


def test_its_name_is_the_seeds(ask: Ask, role: str) -> None:
    assert ask("hostname; cat /etc/hostname").split() == [f"{role}-check"] * 2


def test_the_seed_was_applied_without_an_error(ask: Ask) -> None:
    result = json.loads(ask("cat /run/cloud-init/result.json"))["v1"]
    assert result["errors"] == []
    assert result["datasource"].startswith("DataSourceNoCloud [seed=/dev/")
    assert ask("ls /run/seed-applied") == "/run/seed-applied"
    assert ask("grep -F '[WARNING]' /var/log/cloud-init.log || :") == ""


def test_the_stages_ran_in_one_process(ask: Ask) -> None:
    """The stock way is the fallback; it works, and takes half a minute longer under emulation."""
    said = ask("journalctl -b -o cat -u cloud-init-local -u cloud-init -u cloud-config -u cloud-final")
    assert "no answer from" not in said


def test_the_seeds_user_data_is_valid(ask: Ask) -> None:
    ask("systemctl start cloud-init-schema")
    assert ask("systemctl is-failed cloud-init-schema || :") != "failed"


def test_machine_id_is_its_own(ask: Ask) -> None:
    assert re.fullmatch("[0-9a-f]{32}", ask("cat /etc/machine-id"))
    assert ask("find /etc/machine-id -newer /proc/1") == "/etc/machine-id"


def test_host_keys_are_its_own(ask: Ask) -> None:
    assert ask("ls /etc/ssh/ssh_host_*").split() == [
        "/etc/ssh/ssh_host_ed25519_key",
        "/etc/ssh/ssh_host_ed25519_key.pub",
    ]
    assert ask("find /etc/ssh/ssh_host_ed25519_key -newer /proc/1")


def test_root_has_the_seeds_key_and_no_other(ask: Ask) -> None:
    assert len(ask("grep -v '^#' /root/.ssh/authorized_keys").splitlines()) == 1
    assert ask("getent passwd | awk -F: '$3 >= 1000 && $3 < 65000 {print $1}'") == ""
