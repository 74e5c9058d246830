"""Logging in to a namespace by ssh, so that whoever reaches hosts by an ssh_config reaches clients, too.

No server waits for anybody: ssh's ProxyCommand starts one on the namespace's side, for that login.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from pipeline import run
from provision.lab.space import Space

_CONFIG = """\
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
# why: the folder is another's, on this machine
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
"""
_SERVER = "mkdir -p /run/sshd && exec /usr/sbin/sshd -i -f /etc/ssh/sshd_config"


def write(folder: Path, key: Path) -> None:
    """Write what the server reads, the same for all namespaces of a lab.

    Args:
        folder: is seen as /etc/ssh.
        key: the private key that is let in; its public half stands beside it.
    """
    folder.mkdir(exist_ok=True)
    shutil.copyfile(f"{key}.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(_CONFIG, encoding="ascii")
    host = folder / "host_key"
    if not host.exists():
        run.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", host])


def ssh_config(space: Space, key: Path) -> str:
    """What ssh's configuration says of a namespace."""
    command = shlex.join(space.argv(["sh", "-c", _SERVER])).replace("%", "%%")
    return (
        f"Host {space.name}\n  User root\n  ProxyCommand {command}\n"
        f'  IdentityFile "{key}"\n'
        "  IdentitiesOnly yes\n  BatchMode yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
