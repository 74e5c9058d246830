"""The process that runs cloud-init's stages, with a cloud-init that only notes what it is asked."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "image/common/rootfs/usr/lib/lvsforge/cloud-init-stages"

pytestmark = pytest.mark.network_local


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with a socket of its own."""
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    loader = importlib.machinery.SourceFileLoader("cloud_init_stages", str(SCRIPT))
    spec = importlib.util.spec_from_loader("cloud_init_stages", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    monkeypatch.setattr(module, "SOCKET", str(tmp_path / "socket"))
    monkeypatch.setattr(module, "INSTANCE", str(tmp_path / "instance"))
    monkeypatch.setattr(module, "LABELS", str(tmp_path / "by-label"))
    monkeypatch.setattr(module, "LAST_ID", str(tmp_path / "instance-id"))
    monkeypatch.setattr(os, "sync", lambda: None)
    os.symlink("instances/gone", module.INSTANCE)
    return module


@pytest.fixture
def serve(
    stages: ModuleType, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., float]
) -> Callable[[bool], tuple[list[str], threading.Thread]]:
    """Start the server; returns what cloud-init is asked, and the thread."""

    def start(local: bool) -> tuple[list[str], threading.Thread]:
        asked: list[str] = []
        ready = threading.Event()

        def main(argv: list[str]) -> int:
            asked.append(" ".join(argv[1:]))
            if argv[-1] == "--mode=config":
                raise SystemExit(3)
            return 1 if argv[-1] == "--mode=final" else 0

        monkeypatch.setattr(stages, "load", lambda: SimpleNamespace(main=main))
        monkeypatch.setattr(stages, "applied_locally", lambda: local)
        monkeypatch.setattr(stages, "notify", lambda text: ready.set())
        thread = threading.Thread(target=stages.serve, daemon=True)
        thread.start()
        wait_until(ready.is_set, "the local stage")
        return asked, thread

    return start


@pytest.mark.parametrize("local", [True, False])
def test_each_stage_runs_once_in_its_turn(
    stages: ModuleType,
    serve: Callable[[bool], tuple[list[str], threading.Thread]],
    local: bool,
    wait_until: Callable[..., float],
) -> None:
    asked, thread = serve(local)
    assert [stages.ask(name) for name in ("network", "config", "config", "final")] == [0, 3, 3, 1]
    wait_until(lambda: not thread.is_alive(), "the end after the final stage")
    network = [] if local else ["init"]
    assert asked == ["init --local", *network, "modules --mode=config", "modules --mode=final"]
    assert not os.path.exists(stages.SOCKET)


def test_nonsense_on_the_socket_is_ignored(
    stages: ModuleType,
    serve: Callable[[bool], tuple[list[str], threading.Thread]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The asker gets no answer and falls back; the server goes on."""
    asked, _ = serve(True)
    with pytest.raises(KeyError):
        stages.ask("nonsense")
    assert "running the stage by itself" in capsys.readouterr().err
    assert stages.ask("final") == 1
    assert asked == ["init --local", "modules --mode=final"]


def test_without_a_server_a_stage_runs_the_stock_way(stages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda path, argv: calls.append((path, argv)))
    stages.ask("config")
    assert calls == [("/usr/bin/cloud-init", ["cloud-init", "modules", "--mode=config"])]


@pytest.fixture
def instance(stages: ModuleType, tmp_path: Path) -> Path:
    """The folder of an instance in the middle of its first boot."""
    folder = tmp_path / "instances/gone"
    (folder / "sem").mkdir(parents=True)
    (folder / "sem/config_ssh").touch()
    Path(stages.LAST_ID).write_text("gone\n")
    return folder


def test_a_seed_whose_application_was_cut_off_is_applied_again(
    stages: ModuleType, instance: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only then: what is noted has reached the disk before."""
    stages.begin_again()
    assert not (instance / "sem").exists() and not Path(stages.LAST_ID).exists()
    (instance / "sem").mkdir()
    Path(stages.LAST_ID).touch()
    synced: list[bool] = []
    monkeypatch.setattr(os, "sync", lambda: synced.append((instance / "applied").exists()))
    stages.applied()
    assert synced == [False, True]
    stages.applied()
    stages.begin_again()
    assert len(synced) == 2 and (instance / "sem").exists() and Path(stages.LAST_ID).exists()


@pytest.mark.parametrize("local", [True, False])
def test_it_is_applied_after_the_local_stage_or_that_of_the_network(
    stages: ModuleType, instance: Path, serve: Callable[[bool], tuple[list[str], threading.Thread]], local: bool
) -> None:
    serve(local)
    assert not (instance / "sem").exists(), "it began again"
    assert (instance / "applied").exists() is local
    assert stages.ask("network") == 0
    assert (instance / "applied").exists()
    assert stages.ask("final") == 1


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited each time; only this clock goes on."""
    times: list[float] = []
    monkeypatch.setattr("time.sleep", times.append)
    monkeypatch.setattr("time.monotonic", lambda: sum(times))
    return times


def test_a_host_that_has_an_instance_does_not_wait_for_a_seed(stages: ModuleType, slept: list[float]) -> None:
    stages.wait_for_seed()
    assert slept == []


@pytest.mark.parametrize("label", ["cidata", "CIDATA"])
def test_a_new_host_waits_for_the_disk_of_its_seed(
    stages: ModuleType, slept: list[float], monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    os.unlink(stages.INSTANCE)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        # The folder comes with the first disk that has a label.
        os.makedirs(stages.LABELS, exist_ok=True)
        Path(stages.LABELS, label if len(slept) == 7 else "root").touch()

    monkeypatch.setattr("time.sleep", sleep)
    stages.wait_for_seed()
    assert len(slept) == 7


def test_without_a_seed_a_new_host_goes_on(
    stages: ModuleType, slept: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    os.unlink(stages.INSTANCE)
    stages.wait_for_seed()
    assert 15 <= sum(slept) < 16
    assert "no disk labelled cidata within 15 s" in capsys.readouterr().err


def test_the_local_stage_comes_after_the_wait(
    stages: ModuleType, serve: Callable[[bool], tuple[list[str], threading.Thread]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    asked: list[str] = []
    monkeypatch.setattr(stages, "wait_for_seed", lambda: seen.append(list(asked)))
    asked, _ = serve(True)
    assert seen == [[]] and asked == ["init --local"]
    assert stages.ask("final") == 1
