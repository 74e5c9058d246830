"""A host over ssh: scripts and files, through one connection of fabric's, which starts no process here."""

from __future__ import annotations

import contextlib
import io
import shlex
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import paramiko
from fabric import Config, Connection
from invoke.exceptions import CommandTimedOut, ThreadException

from pipeline import progress, run
from pipeline.errors import BuildError
from provision import secret
from provision.host import Host

_CONNECT_SECONDS = 20
# A script that takes longer is given up. The slowest restart all services of a host; emulated ones need a minute.
SCRIPT_SECONDS = 300
# Of a path that is cut a host hears nothing, and neither do we: we speak when nothing is said, and want it received.
_KEEPALIVE_SECONDS = 15
_SILENT_SECONDS = 60
# Where ssh looks, unless its configuration says otherwise (ssh_config(5)).
_KNOWN_HOSTS = {
    "userknownhostsfile": "~/.ssh/known_hosts ~/.ssh/known_hosts2",
    "globalknownhostsfile": "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2",
}


@dataclass(frozen=True)
class Answer:
    """What a script left: its exit status and what it printed."""

    status: int
    stdout: str
    stderr: str


class Remote(Protocol):
    """A host that scripts can be run on.

    Attributes:
        name: its name.
        login: the command that logs people in there, for what an error says to type next.
    """

    name: str
    login: str

    def run(self, script: str, *, check: bool = True, what: str = "") -> Answer:
        """Run a script of /bin/sh, which stops at its first failing command.

        Args:
            script: its text; never on a command line, so that nobody sees it among the processes.
            check: raise when its exit status is not 0.
            what: what was being done, for the error.

        Raises:
            BuildError: it failed (with `check`), took longer than `SCRIPT_SECONDS`, or the connection failed.
        """

    def put(self, data: bytes, path: str) -> None:
        """Write a file that only root may read.

        Raises:
            BuildError: it could not be written.
        """


Opener = Callable[[Host], contextlib.AbstractContextManager[Remote]]


class _AtOnce(io.StringIO):
    """A text that is read whole: invoke asks for a character at a time, sends it, and rests for 10 ms."""

    def read(self, _size: int | None = -1, /) -> str:
        return super().read()


class Shell:
    """A `Remote` over ssh."""

    def __init__(self, name: str, login: str, connection: Any) -> None:
        self.name = name
        self.login = login
        self._connection = connection

    def run(self, script: str, *, check: bool = True, what: str = "") -> Answer:
        progress.debug(f"{self.name}: + {script}")
        try:
            result = self._connection.run(
                "LC_ALL=C exec /bin/sh -eu",
                in_stream=_AtOnce(braced(script)),
                hide=True,
                warn=True,
                pty=False,
                encoding="utf-8",
                timeout=SCRIPT_SECONDS,
            )
        except CommandTimedOut:
            raise BuildError(
                f"{self.name}: {what or 'a script'} took longer than {SCRIPT_SECONDS} s",
                f"{self.login}   (and look what hangs)",
            ) from None
        except ThreadException as error:
            raise _lost(self, error.exceptions[0].value) from None
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise _lost(self, error) from None
        if result.exited == -1:  # paramiko's, where the connection ended before the script
            raise _lost(self, EOFError("it broke"))
        answer = Answer(result.exited, result.stdout, result.stderr)
        return judged(self, answer, what) if check else answer

    def put(self, data: bytes, path: str) -> None:
        try:
            sftp = self._connection.sftp()
            sftp.get_channel().settimeout(SCRIPT_SECONDS)
            with sftp.open(path, "wb") as file:
                file.chmod(0o600)
                file.set_pipelined(True)
                file.write(data)
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise BuildError(
                f"{self.name}:{path} could not be written: {error}", f"{self.login} df -h {Path(path).parent}"
            ) from None


def judged(remote: Remote, answer: Answer, what: str) -> Answer:
    """A host's answer, where it is a success.

    Raises:
        BuildError: the exit status is not 0.
    """
    if answer.status != 0:
        raise BuildError(
            f"{remote.name}: {what or 'a script'} failed with exit status {answer.status}",
            f"{remote.login}   (and look)",
            run.tail(secret.hide(answer.stderr or answer.stdout)),
        )
    return answer


def braced(script: str) -> str:
    """A script for the shell's standard input: read whole before any of its commands can read from there."""
    return f"{{ :\n{script}\n}} </dev/null\n"


def command(task: str, cluster: Path, ssh_config: Path | None) -> str:
    """The line that runs a task on the same hosts, for people to type next.

    Args:
        task: its name.
        cluster: the cluster file.
        ssh_config: as for `opener`.
    """
    reach = ["--ssh-config", str(ssh_config)] if ssh_config else []
    return shlex.join(["invoke", task, "--cluster", str(cluster), *reach])


def login(host: Host, ssh_config: Path | None) -> str:
    """The line that logs people in on a host, as `opener` reaches it.

    Args:
        host: which one.
        ssh_config: as for `opener`.
    """
    address, port = host.ssh
    reach = ["-F", str(ssh_config)] if ssh_config else []
    return shlex.join(["ssh", *reach, *(["-p", str(port)] if port else []), f"root@{address}"])


def opener(ssh_config: Path | None) -> Opener:
    """What opens connections.

    Args:
        ssh_config: a file for `ssh -F`; None takes the user's and the system's own.
    """

    @contextlib.contextmanager
    def connect(host: Host) -> Iterator[Remote]:
        address, port = host.ssh
        config = Config(runtime_ssh_path=str(ssh_config)) if ssh_config else Config()
        connection = Connection(
            address, user="root", port=port or None, config=config, connect_timeout=_CONNECT_SECONDS
        )
        shell = Shell(host.name, login(host, ssh_config), connection)
        try:
            _judge_host_keys(connection, address)
            connection.open()
            _bound(connection.transport)
        except (OSError, EOFError, paramiko.SSHException, socket.gaierror) as error:
            _close(connection)
            raise _lost(shell, error) from None
        try:
            yield shell
        finally:
            _close(connection)

    return connect


def _close(connection: Any) -> None:
    """End it, also where nobody could log in, and those to its jump hosts: fabric leaves both open."""
    connection.close()
    connection.client.close()
    if isinstance(connection.gateway, Connection):
        _close(connection.gateway)


def _bound(transport: Any) -> None:
    """Make a path that is cut an error in `_KEEPALIVE_SECONDS` and `_SILENT_SECONDS`."""
    transport.set_keepalive(_KEEPALIVE_SECONDS)
    transport.channel_timeout = SCRIPT_SECONDS
    if isinstance(transport.sock, socket.socket):  # and no ProxyCommand
        transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_SECONDS * 1000)


class Remember:
    """Paramiko's policy for a host that is met for the first time: it is taken, and a file gets a line for it.

    Paramiko's own writes the whole file anew, without the lines that it does not know.

    Args:
        path: the file, made if need be; None remembers for this run.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
        """Take it."""
        client.get_host_keys().add(hostname, key.get_name(), key)
        if self.path is None:
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            end = file.seek(0, io.SEEK_END)
            file.seek(max(0, end - 1))
            between = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(between + f"{hostname} {key.get_name()} {key.get_base64()}\n".encode())


def _judge_host_keys(connection: Any, address: str) -> None:
    """Hold host keys against known_hosts as ssh does, a jump host's too; fabric by itself believes every host."""
    if isinstance(connection.gateway, Connection):
        _judge_host_keys(connection.gateway, connection.gateway.host)
    options = connection.ssh_config
    strict = str(options.get("stricthostkeychecking", "ask")).lower()
    own, common = (
        [Path(name).expanduser() for name in str(options.get(key, usual)).split() if name != "none"]
        for key, usual in _KNOWN_HOSTS.items()
    )
    for path in (*own, *common):
        if path.is_file():
            # Not as the client's own file, which it would write anew for each host that it meets.
            connection.client.get_host_keys().load(str(path))
    if strict in ("no", "off", "accept-new"):
        # The user's own ssh would take it, too.
        connection.client.set_missing_host_key_policy(Remember(own[0] if own else None))
    else:
        connection.client.set_missing_host_key_policy(paramiko.RejectPolicy())
    progress.debug(f"{address}: host keys: {strict}")


def _lost(remote: Remote, error: BaseException) -> BuildError:
    said = str(error) or type(error).__name__
    if "not found in known_hosts" in said:
        return BuildError(f"{remote.name}: its host key is not known", f"{remote.login}   (and compare the key)")
    return BuildError(f"{remote.name}: no connection: {said}", f"{remote.login}   (does it answer?)")
