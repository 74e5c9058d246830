"""Host keys, held against known_hosts as ssh does: by a server that has a key and lets nobody in."""

from __future__ import annotations

import contextlib
import copy
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest

from pipeline.errors import BuildError
from provision import remote
from tests.unit.clusters import VRRP, load

pytestmark = pytest.mark.network_local

NOBODY = "No authentication methods available"  # after the host's key was taken


class Server:
    """An sshd as far as its key: it takes connections one after the other."""

    def __init__(self) -> None:
        self.key = paramiko.ECDSAKey.generate()
        self.line = f"{self.key.get_name()} {self.key.get_base64()}"
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                found, _ = self._listening.accept()
            except OSError:
                return
            transport = paramiko.Transport(found)
            transport.add_server_key(self.key)
            with contextlib.suppress(paramiko.SSHException, EOFError):  # the client has gone: that is what is tested
                transport.start_server(server=paramiko.ServerInterface())
                transport.join(20)
            transport.close()

    def close(self) -> None:
        """End it."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


def refusal(folder: Path, server: Server, *options: str, known: str = "", ssh: str = "") -> str:
    """What is said of a connection that is not to be, with these lines of ssh's configuration."""
    lines = ["Host *", f"UserKnownHostsFile {known or folder / 'known'}", *options]
    (config := folder / "config").write_text("\n".join(lines))
    data = copy.deepcopy(VRRP)
    data["directors"][0] |= {"ssh": ssh or f"127.0.0.1:{server.port}"}
    opened = remote.opener(config)(load(folder, data).directors[0])
    with pytest.raises(BuildError) as caught, opened:
        pass
    return caught.value.message


def test_a_host_that_is_not_known(server: Server, tmp_path: Path) -> None:
    common = f"GlobalKnownHostsFile {tmp_path}/common"
    assert refusal(tmp_path, server, common) == "lvs-1: its host key is not known"
    assert not (tmp_path / "known").exists()
    (tmp_path / "common").write_text(f"[127.0.0.1]:{server.port} {server.line}\n")
    assert NOBODY in refusal(tmp_path, server, common)


@pytest.mark.parametrize("end", ["", "\n"])
def test_one_that_is_met_for_the_first_time_is_added(end: str, server: Server, tmp_path: Path) -> None:
    """And nothing else in the file changes: paramiko knows neither remarks nor @revoked."""
    known, before = tmp_path / "known", f"# mine\n@revoked * {paramiko.ECDSAKey.generate().get_base64()}"
    known.write_text(before + end)
    assert NOBODY in refusal(tmp_path, server, "StrictHostKeyChecking accept-new")
    after = f"{before}\n[127.0.0.1]:{server.port} {server.line}\n"
    assert known.read_text() == after
    assert NOBODY in refusal(tmp_path, server)
    other = paramiko.ECDSAKey.generate()
    known.write_text(after.replace(server.line, f"{other.get_name()} {other.get_base64()}"))
    assert "does not match" in refusal(tmp_path, server, "StrictHostKeyChecking accept-new")


def test_one_without_a_file_for_it(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    assert NOBODY in refusal(tmp_path, server, "StrictHostKeyChecking accept-new", known="none")
    assert list(here.iterdir()) == []


def test_a_jump_hosts_key_is_looked_at(server: Server, tmp_path: Path) -> None:
    jump = f"ProxyJump root@127.0.0.1:{server.port}"
    assert refusal(tmp_path, server, jump, ssh="192.0.2.9") == "lvs-1: its host key is not known"
    (tmp_path / "known").write_text(f"[127.0.0.1]:{server.port} {server.line}\n")
    assert NOBODY in refusal(tmp_path, server, jump, ssh="192.0.2.9")
