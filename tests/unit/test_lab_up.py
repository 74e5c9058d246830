"""A lab's beginning and end, without a machine: what lab-up refuses, what it leaves, and what lab-down takes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import settings, vm
from pipeline.errors import BuildError
from provision import cluster as clusters
from provision.lab import lab as labs
from provision.lab.state import State
from tests.conftest import Recorder
from tests.unit.test_lab import ENDED, US
from tests.unit.test_lab_topology import EXAMPLES

PARTS = labs.Parts(image=lambda role: Path(role), toa_bpf=Path, routing=Path)


def test_only_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BuildError, match="root is needed") as caught:
        labs.up(EXAMPLES["ospf"], tmp_path / "lab", 512, PARTS)
    assert caught.value.hint.startswith("sudo ")
    assert not (tmp_path / "lab").exists()


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.usefixtures("root")
def test_a_lab_that_is_up_stays(tmp_path: Path) -> None:
    folder = tmp_path / "lab"
    folder.mkdir()
    State(folder, "mine.yaml", processes={"lvs-1": US, "lvs-2": ENDED}).write()
    with pytest.raises(BuildError, match=r"a lab is up already in .*lab: mine\.yaml, lvs-1\n") as caught:
        labs.up(EXAMPLES["ospf"], folder, 512, PARTS)
    assert caught.value.hint == f"invoke lab-status --dir {folder}   (or end it: invoke lab-down --dir {folder})"
    assert State.read(folder) is not None


@pytest.mark.usefixtures("root")
def test_a_folder_of_something_else_stays(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("years of work")
    with pytest.raises(BuildError, match="is there and is no lab"):
        labs.up(EXAMPLES["ospf"], tmp_path, 512, PARTS)
    assert (tmp_path / "thesis").exists()


@pytest.fixture
def ready(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that lab-up needs is there; nothing is rendered, and nothing boots."""
    monkeypatch.setattr(labs, "_available", lambda: 100_000)
    monkeypatch.setattr(labs, "tree", lambda *_: Path("/root"))
    monkeypatch.setattr(labs, "prepare", lambda _source, _folder, written: labs.Lab(written))
    monkeypatch.setattr(labs, "_boot", lambda *_: None)
    monkeypatch.setattr(vm.Accelerator, "probe", lambda *_: vm.Accelerator("tcg", "qemu64", 6.0))
    monkeypatch.setattr(vm, "slowdown", lambda _: 1.5)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


@pytest.fixture
def left(tmp_path: Path) -> State:
    """A lab of before the machine's last boot."""
    written = State(tmp_path / "lab", "mine.yaml", sockets=str(tmp_path / "sockets"), processes={"lvs-1": ENDED})
    for each in (written.folder, tmp_path / "sockets"):
        each.mkdir()
    for name in ("cluster.yaml", "started.yaml"):
        (written.folder / name).write_text("as it came up\n")
    written.write()
    return written


@pytest.mark.usefixtures("ready")
def test_what_is_left_of_before_a_reboot_goes(left: State, events: Recorder) -> None:
    labs.up(EXAMPLES["ospf"], left.folder, 512, PARTS)
    assert not left.folder.exists() and not Path(left.sockets).exists()
    assert not left.folder.with_name("lab.cluster.yaml.old").exists() and not events.texts("note")


@pytest.mark.usefixtures("ready")
def test_a_changed_cluster_file_of_before_a_reboot_is_kept(left: State, events: Recorder) -> None:
    (left.folder / "cluster.yaml").write_text("with another VIP\n")
    labs.up(EXAMPLES["ospf"], left.folder, 512, PARTS)
    kept = left.folder.with_name("lab.cluster.yaml.old")
    assert not left.folder.exists() and kept.read_text() == "with another VIP\n"
    assert events.texts("note")[0].endswith(f"had been changed: it is {kept} now")


@pytest.mark.usefixtures("ready")
def test_what_is_left_stays_where_nothing_can_come_up(left: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(role: str) -> Path:
        raise BuildError(f"no {role} image", "-")

    with pytest.raises(BuildError, match="typo does not exist"):
        labs.up(Path("typo"), left.folder, 512, PARTS)
    with pytest.raises(BuildError, match="no director image"):
        labs.up(EXAMPLES["ospf"], left.folder, 512, replace(PARTS, image=nowhere))
    monkeypatch.setattr(labs, "_available", lambda: 100)
    with pytest.raises(BuildError, match="not enough memory"):
        labs.up(EXAMPLES["ospf"], left.folder, 512, PARTS)
    assert (left.folder / "cluster.yaml").exists() and Path(left.sockets).exists()


@pytest.mark.usefixtures("ready")
def test_a_labs_own_cluster_file_makes_no_other_lab(left: State) -> None:
    with pytest.raises(BuildError, match=r"cluster\.yaml is of the lab in .*lab, which has ended") as caught:
        labs.up(left.folder / "cluster.yaml", left.folder, 512, PARTS)
    assert caught.value.hint.startswith(f"invoke lab-up --cluster mine.yaml --dir {left.folder} ")
    assert (left.folder / "cluster.yaml").exists()


@pytest.mark.usefixtures("ready")
def test_a_service_whose_real_servers_are_no_hosts_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Recorder
) -> None:
    """Clients would wait for its pages until the lab gives up. Where others are there, it is only said."""
    monkeypatch.setattr(labs, "_available", lambda: 100)  # what is judged next
    manual = settings.TOP / "provision/examples/manual-vrrp.yaml"
    with pytest.raises(BuildError, match="no lab can be made of it") as caught:
        labs.up(manual, tmp_path / "lab", 512, PARTS)
    assert caught.value.details == (
        "services[0].real_servers: no host has 192.168.1.1, 192.168.1.2; nobody would answer at the IPv4 VIPs",
    )
    assert "provision/examples/lab-vrrp.yaml" in caught.value.hint
    with pytest.raises(BuildError, match="not enough memory"):
        labs.up(settings.TOP / "provision/examples/manual-ospf.yaml", tmp_path / "lab", 512, PARTS)
    assert "services[0].real_servers: no host has 192.168.1.2; the lab is without" in events.texts("note")
    assert not (tmp_path / "lab").exists()


@pytest.mark.usefixtures("ready")
def test_its_own_load_is_no_reason_to_wait_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four machines on two CPUs, of a builder that was busy at lab-up; once they run, the probe takes longer still."""
    assert labs.up(EXAMPLES["ospf"], tmp_path / "lab", 512, PARTS).state.scale == 6.0 * 2 * 1.5
    monkeypatch.setattr(vm, "slowdown", lambda _: 9.0)
    for written, scale in ((State(tmp_path, scale=18.0), 18.0), (State(tmp_path), 6.0 * 2 * 9.0)):
        later = labs.Lab(written)
        later.__dict__["cluster"] = clusters.load(EXAMPLES["ospf"], secrets=False)
        assert later.seconds(10) == 10 * scale


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (BuildError("lvs-1: no ssh", "read its console", ["a line of it"]), "lvs-1: no ssh", "read its console; "),
        (OSError(28, "No space left on device", "state.new"), "[Errno 28] No space left on device: 'state.new'", ""),
        (KeyboardInterrupt(), "interrupted", ""),
    ],
)
def test_what_did_not_come_up_can_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str, hint: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(labs, "_boot", fail)
    with pytest.raises(BuildError) as caught:
        labs.up(EXAMPLES["ospf"], tmp_path / "lab", 512, PARTS)
    which = f"--dir {tmp_path / 'lab'}"
    assert caught.value.message == message and caught.value.details == getattr(error, "details", ())
    assert caught.value.hint == (
        f"{hint}what runs still runs: invoke lab-status {which}, and invoke lab-down {which} ends it"
    )


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under KVM no code is translated."""
    kvm, tcg = vm.Accelerator("kvm", "host", 1.0), vm.Accelerator("tcg", "qemu64", 6.0)
    for accelerator, wanted in ((kvm, 2504), (tcg, 4552)):
        labs._judge_memory(4, 512, accelerator, wanted)
        with pytest.raises(BuildError, match=f"512 MiB need {wanted} MiB, {wanted - 1} are available") as caught:
            labs._judge_memory(4, 512, accelerator, wanted - 1)
        assert caught.value.hint == "invoke lab-up … --memory 511"
    with pytest.raises(BuildError) as caught:
        labs._judge_memory(4, 512, tcg, 2000)
    assert "take a cluster of fewer hosts" in caught.value.hint
    with pytest.raises(BuildError, match="--memory 100: a machine needs 320 MiB"):
        labs._judge_memory(1, 100, kvm, 100000)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "MemTotal: 9 kB\nMemAvailable:    2097152 kB\n")
    assert labs._available() == 2048


def test_no_lab_is_up(tmp_path: Path) -> None:
    for written in (None, State(tmp_path, processes={"lvs-1": ENDED})):
        if written is not None:
            written.write()
        with pytest.raises(BuildError, match="no lab is up in") as caught:
            labs.Lab.open(tmp_path)
        assert caught.value.hint == f"invoke lab-up --cluster provision/examples/lab-ospf.yaml --dir {tmp_path}"
    said: list[str] = []
    labs.down(tmp_path / "nowhere", said.append)
    assert said == [f"no lab is up in {tmp_path / 'nowhere'}"]


def test_down_takes_its_folders(tmp_path: Path) -> None:
    folder, sockets = tmp_path / "lab", tmp_path / "sockets"
    for each in (folder, sockets):
        each.mkdir()
    for each in (folder / "disk", sockets / "q"):
        each.touch()
    State(folder, sockets=str(sockets), processes={"lvs-1": ENDED}).write()
    said: list[str] = []
    labs.down(folder, said.append)
    assert said == ["ended: nothing ran any more"]
    assert not folder.exists() and not sockets.exists()


@pytest.mark.parametrize("again", ["down", "another"])
def test_down_that_is_killed_leaves_no_half_of_a_lab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    folder = tmp_path / "lab"
    folder.mkdir()
    State(folder, processes={"lvs-1": ENDED}).write()

    def killed(path: Path) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(labs, "remove_tree", killed)
        labs.down(folder)
    assert not folder.exists()
    if again == "another":
        folder.mkdir()
        State(folder, processes={"lvs-1": ENDED}).write()
    labs.down(folder)
    assert {path.name for path in tmp_path.iterdir()} == {".lab.lock"}
