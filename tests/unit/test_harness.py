"""The guard of conftest.py, and that it cannot be talked round."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from pipeline import run, store
from tests.conftest import Guard, TouchedTheWorld, is_loopback, program_name


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(lambda: run.run(["true"]), id="pipeline.run.run"),
        pytest.param(lambda: run.interactive(["true"]), id="pipeline.run.interactive"),
        pytest.param(lambda: os.posix_spawn("/bin/true", ["true"], {}), id="os.posix_spawn"),
        pytest.param(lambda: os.execv("/bin/true", ["true"]), id="os.execv"),  # noqa: S606  refused before it happens
        pytest.param(os.fork, id="os.fork"),
    ],
)
def test_an_unmarked_test_starts_no_process(guard: Guard, start: object) -> None:
    assert callable(start)
    with guard.expected() as refused, pytest.raises(TouchedTheWorld, match=r"@pytest.mark.runs"):
        start()
    assert len(refused) == 1


@pytest.mark.runs("true")
def test_the_marker_opens_the_door_for_its_program_only(guard: Guard) -> None:
    run.run(["true"])
    with guard.expected(), pytest.raises(TouchedTheWorld, match=r'runs\("false"\)'):
        run.run(["false"])


def test_an_unmarked_test_opens_no_socket(guard: Guard) -> None:
    with guard.expected(), pytest.raises(TouchedTheWorld, match="network_local"):
        socket.socket()
    with guard.expected(), pytest.raises(TouchedTheWorld, match="localhost"):
        socket.getaddrinfo("localhost", 80)


@pytest.mark.network_local
def test_network_local_is_the_loopback_interface(guard: Guard) -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
        for address in (("0.0.0.0", 0), ("", 0)):  # noqa: S104  refused before it happens
            with guard.expected(), pytest.raises(TouchedTheWorld, match="network address"), socket.socket() as other:
                other.bind(address)
        with guard.expected(), pytest.raises(TouchedTheWorld, match=r"192\.0\.2\.1"), socket.socket() as other:
            other.connect(("192.0.2.1", 80))


@pytest.mark.parametrize(
    ("address", "local"),
    [
        (("127.0.0.1", 1), True),
        (("127.9.9.9", 1), True),
        (("::1", 1, 0, 0), True),
        (("localhost", 1), True),
        ("/run/socket", True),
        (("0.0.0.0", 1), False),  # noqa: S104
        (("", 1), False),
        (("192.0.2.1", 1), False),
        (("example", 1), False),
        ((0, 0), False),
    ],
)
def test_what_counts_as_loopback(address: object, local: bool) -> None:
    assert is_loopback(address) is local


@pytest.mark.parametrize("word", [sys.executable, "/usr/bin/python3", "python", "python3.11"])
def test_every_python_is_python3(word: str) -> None:
    assert program_name(word) == "python3"
    assert program_name("/usr/bin/python3-config") == "python3-config"


def test_a_unit_test_has_its_own_home_and_store() -> None:
    for variable in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "LVSFORGE_STORE", "LVSFORGE_OUT"):
        assert "pytest" in os.environ[variable]
    assert str(store.location()) == os.environ["LVSFORGE_STORE"]


@pytest.mark.runs("python3")
def test_as_pytest_shows_it(tmp_path: Path) -> None:
    """A whole inner run: a swallowed refusal, a fixture's, a missing program with and without CI, the folders."""
    inner = tmp_path / "tests"
    unit, integration = inner / "unit", inner / "image"
    unit.mkdir(parents=True)
    integration.mkdir()
    top = Path(__file__).parents[2]
    (inner / "conftest.py").write_bytes((top / "tests/conftest.py").read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((top / "pyproject.toml").read_bytes())
    (unit / "test_inner.py").write_text(
        "import contextlib, os, pytest\n"
        "from pipeline import run\n"
        "def test_swallowed():\n"
        "    with contextlib.suppress(Exception):\n"
        "        run.run(['true'])\n"
        "@pytest.fixture\n"
        "def careless():\n"
        "    with contextlib.suppress(Exception):\n"
        "        run.run(['true'])\n"
        "def test_fixture(careless): pass\n"
        "@pytest.fixture\n"
        "def careless_at_its_end():\n"
        "    yield\n"
        "    with contextlib.suppress(Exception):\n"
        "        run.run(['true'])\n"
        "def test_end_of_fixture(careless_at_its_end): pass\n"
        "@pytest.mark.runs('no-such-program')\n"
        "def test_missing(): raise SystemError\n"
        "@pytest.mark.build\n"
        "def test_marked_build(): run.run(['true']); assert os.environ['HOME'] == '/nonexistent'\n"
        "def test_harmless(): assert os.environ['HOME'] != '/nonexistent'\n"
    )
    (integration / "test_folder.py").write_text("from pipeline import run\ndef test_folder(): run.run(['true'])\n")
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", str(inner)]
    env = {"PYTHONPATH": str(top), "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
    for ci, missing in (("", "SKIPPED"), ("true", "FAILED")):
        text = run.run([*argv, "-rA"], cwd=tmp_path, env={**env, "CI": ci}, check=False).stdout
        outcomes = {}
        for line in text.splitlines():
            word, _, rest = line.partition(" ")
            if word in ("PASSED", "FAILED", "ERROR"):
                outcomes[rest.split("::")[1].split(" ")[0]] = word
            elif word == "SKIPPED":
                outcomes["test_missing"] = word
                assert "not installed: no-such-program" in line
        if ci:
            outcomes["test_missing"] = outcomes["test_missing"].replace("ERROR", "FAILED")
        assert outcomes == {
            "test_swallowed": "FAILED",
            "test_fixture": "ERROR",
            "test_end_of_fixture": "ERROR",
            "test_missing": missing,
            "test_marked_build": "PASSED",
            "test_harmless": "PASSED",
            "test_folder": "PASSED",
        }, text
        assert 'mark the test: @pytest.mark.runs("true")' in text
