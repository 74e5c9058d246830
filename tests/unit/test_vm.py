"""Machines and seeds, as far as they can be judged without starting one."""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import qmp, run, seed, vm
from pipeline.errors import BuildError

TCG = vm.Accelerator("tcg", "qemu64", 6.0, "no kvm")
KVM = vm.Accelerator("kvm", "host", 1.0)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., vm.Machine]:
    monkeypatch.setattr(run, "require", lambda name, why, package: f"/usr/bin/{name}")
    (tmp_path / "id").write_text("")
    (tmp_path / "id.pub").write_text("ssh-ed25519 KEY lvsforge\n")

    def make(**options: object) -> vm.Machine:
        settings = {"ssh_key": tmp_path / "id", **options}
        made = vm.Machine("toy", tmp_path / "work", TCG, **settings)  # type: ignore[arg-type]
        made.port = 4711
        return made

    return make


# --- the accelerator


def test_cpus_that_take_turns() -> None:
    assert vm.Turns(**vars(TCG)).options == ["-accel", "tcg,thread=single,tb-size=512"]
    assert vm.Turns(**vars(KVM)).options == ["-accel", "kvm"]


def test_how_slow_it_is_just_now(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 102.0, 200.0, 200.1))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr(vm, "_try", lambda *_: "")
    assert vm.slowdown(KVM) == 1.0
    assert vm.slowdown(TCG) == 2.0 / vm._PROBE_SECONDS
    assert vm.slowdown(TCG) == 1.0
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    monkeypatch.setattr(vm, "_try", lambda *_: "aborted")
    with pytest.raises(BuildError, match="no virtual machine runs here: aborted"):
        vm.slowdown(TCG)


def test_probe_sector_is_a_boot_sector() -> None:
    assert len(vm._PROBE_SECTOR) == 512
    assert vm._PROBE_SECTOR.endswith(b"\x55\xaa")
    assert b"\xb9\x00\x00\x00\x08\xff\xc9\x75\xfc" in vm._PROBE_SECTOR  # counts down from 2^27
    assert b"\xb0\x2a\xe6\xf4" in vm._PROBE_SECTOR  # and only then answers


@pytest.mark.parametrize(
    ("answers", "device", "expected"),
    [
        ({"kvm": ""}, True, "kvm"),
        ({"kvm": "every instruction is emulated", "tcg": ""}, True, "tcg"),
        ({"tcg": ""}, False, "tcg"),
    ],
)
def test_kvm_only_when_its_guest_ran(
    answers: dict[str, str], device: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "require", lambda *_: "")
    monkeypatch.setattr(vm, "_try", lambda accelerator, cpu: answers[accelerator])
    monkeypatch.setattr(os, "access", lambda *_: True)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: device if str(self) == "/dev/kvm" else exists(self))
    found = vm.Accelerator.probe(tmp_path)
    assert found.name == expected
    with monkeypatch.context() as patched:
        patched.setattr(vm, "_try", lambda *_: pytest.fail("probed again within one boot"))
        assert vm.Accelerator.probe(tmp_path) == found
    # Its module was loaded, or somebody else asks, as a container with the same store.
    device = not device
    monkeypatch.setattr(vm, "_try", lambda accelerator, cpu: "")
    assert vm.Accelerator.probe(tmp_path).name == ("kvm" if device else "tcg")


def test_it_is_looked_at_anew_if_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "require", lambda *_: "")
    monkeypatch.setattr(vm, "_lacking_device", lambda: "")
    answers = {"kvm": "did not finish within 10 s", "tcg": ""}
    monkeypatch.setattr(vm, "_try", lambda accelerator, cpu: answers[accelerator])
    assert vm.Accelerator.probe(tmp_path).name == "tcg"
    answers["kvm"] = ""
    assert vm.Accelerator.probe(tmp_path).name == "tcg"
    assert vm.Accelerator.probe(tmp_path, anew=True).name == "kvm"
    assert vm.Accelerator.probe(tmp_path).name == "kvm"


def test_no_accelerator_says_what_each_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "require", lambda *_: "")
    monkeypatch.setattr(vm, "_try", lambda accelerator, cpu: f"no {accelerator} today")
    with pytest.raises(BuildError, match="no virtual machine runs here") as caught:
        vm.Accelerator.probe(tmp_path)
    assert "tcg: no tcg today" in caught.value.details
    assert any(line.startswith("kvm: ") for line in caught.value.details)
    assert list(tmp_path.iterdir()) == []  # a failure is not remembered


@pytest.mark.build
def test_probe_on_this_machine(tmp_path: Path) -> None:
    found = vm.Accelerator.probe(tmp_path)
    assert found.name in ("kvm", "tcg")
    assert found.name == "kvm" or found.why
    (note,) = tmp_path.iterdir()
    lacking = "" if os.path.exists("/dev/kvm") else "kvm: there is no /dev/kvm"
    assert json.loads(note.read_text()) == {"name": found.name, "why": found.why, "lacking": lacking}


@pytest.mark.build
def test_a_guest_that_never_answers_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    halted = bytes.fromhex("f4ebfd").ljust(510, b"\0") + b"\x55\xaa"  # hlt; jmp
    monkeypatch.setattr(vm, "_PROBE_SECTOR", halted)
    monkeypatch.setattr(vm, "PROBE_DEADLINE", 0.5)
    assert "did not finish within 3 s" in vm._try("tcg", "qemu64")


# A boot sector as vm._PROBE_SECTOR, up to its 64-bit code:
#
#   long: mov $0x7000,%esp; mov $1,%eax; cpuid; bt $13,%ecx; jnc 1f  # no cmpxchg16b: nothing to fear
#         push $2; popfq                                       # flags as they are, at the end of a translated block
#         mov $0x4ca4e606,%ecx; mov $0,%eax; jmp 2f
#   2:    add %ecx,%eax; lock cmpxchg16b 0x4000                # flags of an addition, none of them changed but Z
#         pushfq; pop %rax; shr $16,%eax; jnz 3f               # no processor has a flag up there that is set now
#   1:    mov $0x2a,%al; jmp 4f
#   3:    mov $0x2b,%al
#   4:    out %al,$0xf4; 5: hlt; jmp 5b
_FLAGS_SECTOR = (
    bytes.fromhex(
        "fa31c08ed88ec0bf0010b90018f3ab66c70600100320000066c70600200330000066c70600308300000066b800100000"
        "0f22d80f20e00c200f22e066b9800000c00f3280cc010f300f20c0660d010000800f22c0660f0116b07cea5f7c0800bc"
        "00700000b8010000000fa20fbae10d73226a029db906e6a44cb800000000eb0001c8f0480fc70c25004000009c58c1e8"
        "107504b02aeb02b02be6f4f4ebfd6690000000000000000000000000009a20000f00a07c0000"
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)


@pytest.mark.build
def test_no_guest_meets_the_flags_that_qemu_gets_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "_PROBE_SECTOR", _FLAGS_SECTOR)
    assert vm._try("tcg", vm._TCG_CPU) == ""
    # The guest does find out: without the option, QEMU 7.2 fails it and whichever is newer than 8.0 does not.
    text = run.run([vm.QEMU, "--version"]).stdout
    major = int(text.split("version ")[1].split(".")[0])
    assert ("status 87" in vm._try("tcg", "qemu64")) == (major < 8)


# --- the command line


def test_ports_are_open_on_the_loopback_only(machine: Callable[..., vm.Machine]) -> None:
    line = machine().argv()
    forwards = [word for word in line if "hostfwd" in word]
    assert forwards == ["user,id=user0,hostfwd=tcp:127.0.0.1:4711-:22"]
    assert "-vnc" not in line


def test_the_machine_dies_with_its_owner_unless_it_may_be_kept(machine: Callable[..., vm.Machine]) -> None:
    assert machine().argv()[:4] == ["/usr/bin/setpriv", "--pdeathsig", "KILL", "--"]
    kept = machine(may_keep=True)
    assert kept.argv()[0] == "/usr/bin/qemu-system-x86_64"
    with pytest.raises(RuntimeError, match="may_keep"):
        machine().keep()


def test_disks_and_seed(machine: Callable[..., vm.Machine]) -> None:
    line = machine(disks=[vm.Disk(Path("/a,b.qcow2"), snapshot=True)], seed=Path("/seed.iso")).argv()
    drives = [line[n + 1] for n, word in enumerate(line) if word == "-drive"]
    assert drives == [
        "file=/a,,b.qcow2,format=qcow2,if=none,id=disk0,cache=unsafe,discard=unmap,snapshot=on",
        "file=/seed.iso,format=raw,if=none,id=seed,cache=unsafe,discard=unmap,readonly=on",
    ]


def test_direct_kernel_boot_with_a_share(machine: Callable[..., vm.Machine]) -> None:
    line = machine(kernel=Path("/k"), append="a b", shares=[vm.Share(Path("/r"), "root")], network=False).argv()
    assert line[line.index("-kernel") + 1 : line.index("-kernel") + 4] == ["/k", "-append", "a b"]
    assert "local,id=share0,path=/r,security_model=none,readonly=on" in line
    assert "-netdev" not in line
    assert "-smbios" not in line


def test_key_comes_as_a_credential_unless_the_seed_is_to_prove_itself(machine: Callable[..., vm.Machine]) -> None:
    line = machine(credentials={"x": "1"}).argv()
    value = line[line.index("-smbios") + 1]
    encoded = base64.b64encode(b"ssh-ed25519 KEY lvsforge").decode()
    assert f"value=io.systemd.credential.binary:ssh.authorized_keys.root={encoded}" in value.split(",")
    assert "-smbios" not in machine(login=False).argv()


def test_deadlines_grow_under_emulation(machine: Callable[..., vm.Machine]) -> None:
    assert machine().deadline(10) == 60
    assert vm.Machine("k", Path("w"), KVM).deadline(10) == 10


# --- console and ssh


def test_console_tail_is_printable(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(b"first\r\n\x1b[0;32m  OK  \x1b[0m] Started\r\n\r\nsame\r\nsame\r\nsame\r\n\xff\xfe last\r\n")
    assert vm.console_tail(log, 3) == ["console |   OK  ] Started", "console | same", "console | \ufffd\ufffd last"]
    log.write_bytes(b"")
    assert "wrote nothing" in vm.console_tail(log)[0]
    assert vm.console_tail(tmp_path / "none") == ["(there is no console log)"]


@pytest.mark.network_local
@pytest.mark.parametrize(
    ("greeting", "there"), [(b"SSH-2.0-OpenSSH\r\n", True), (b"220 mail\r\n", False), (b"", False)]
)
def test_only_a_banner_counts(greeting: bytes, there: bool) -> None:
    """QEMU's forwarder accepts a connection long before the guest listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def serve() -> None:
            link, _ = listener.accept()
            with link:
                link.sendall(greeting)

        thread = threading.Thread(target=serve)
        thread.start()
        assert vm.banner(listener.getsockname()[1]) is there
        thread.join()


@pytest.mark.network_local
def test_nobody_there_is_no_banner() -> None:
    assert not vm.banner(vm.free_port())


# --- seeds


def read_iso(image: bytes) -> dict[str, bytes]:
    """Names and contents by Rock Ridge, as Linux reads them."""
    assert image[16 * 2048 + 1 : 16 * 2048 + 6] == b"CD001"
    found = {}
    block = int.from_bytes(image[16 * 2048 + 158 : 16 * 2048 + 162], "little")
    at = block * 2048
    assert image[at + 34 : at + 41] == b"SP\x07\x01\xbe\xef\0"  # without it Linux does not look for Rock Ridge
    while length := image[at]:
        entry = image[at : at + length]
        start, size = int.from_bytes(entry[2:6], "little"), int.from_bytes(entry[10:14], "little")
        if (name := entry.find(b"NM")) >= 0:
            text = entry[name + 5 : name + entry[name + 2]].decode()
            found[text] = image[start * 2048 : start * 2048 + size]
        at += length
    return found


def test_iso_holds_what_it_was_given() -> None:
    files = {"user-data": b"#cloud-config\n", "meta-data": b"x" * 5000, "network-config": b"v"}
    image = seed.iso(files, "cidata")
    assert read_iso(image) == files
    assert image[16 * 2048 + 40 : 16 * 2048 + 72].rstrip() == b"cidata"
    assert len(image) == 2048 * int.from_bytes(image[16 * 2048 + 80 : 16 * 2048 + 84], "little")
    assert seed.iso(files, "cidata") == image


def test_seed_is_refused_whole(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        seed.write(tmp_path / "seed.iso", {"user-data": "#cloud-config\n", "network-config": " \n", "users": "x"})
    assert len(caught.value.details) == 3
    assert list(tmp_path.iterdir()) == []


def test_another_seed_is_another_instance() -> None:
    assert seed.minimal("a", "k")["meta-data"] != seed.minimal("b", "k")["meta-data"]
    assert seed.instance_id("ab", "c") != seed.instance_id("a", "bc")


# --- the control socket


@pytest.mark.network_local
def test_qemu_is_asked_by_its_control_socket(tmp_path: Path) -> None:
    """Events may come in between; what is refused is said in QEMU's words."""
    heard: list[object] = []
    answers: dict[str, list[Any]] = {
        "set_link": [{"event": "NIC_RX_FILTER_CHANGED"}, {"return": {}}],
        "query-status": [{"return": {"status": "running"}}],
        "frobnicate": [{"error": {"class": "CommandNotFound", "desc": "The command frobnicate has not been found"}}],
    }

    def serve(listener: socket.socket) -> None:
        for _ in answers:
            link, _ = listener.accept()
            with link, link.makefile("rw", encoding="utf-8") as stream:
                stream.write('{"QMP": {}}\n')
                stream.flush()
                for said in (json.loads(line) for line in stream):
                    heard.append(said)
                    for answer in answers.get(said["execute"], [{"return": {}}]):
                        stream.write(json.dumps(answer) + "\n")
                    stream.flush()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "q"))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        assert qmp.monitor(tmp_path / "q", "set_link", name="eth0", up=False) == {}
        assert qmp.monitor(tmp_path / "q", "query-status") == {"status": "running"}
        with pytest.raises(BuildError, match="The command frobnicate has not been found"):
            qmp.monitor(tmp_path / "q", "frobnicate")
        thread.join(10)
    assert heard[1] == {"execute": "set_link", "arguments": {"name": "eth0", "up": False}}
    with pytest.raises(BuildError, match=r"QEMU's stop at .*/none: \[Errno 2\]"):
        qmp.monitor(tmp_path / "none", "stop")


# --- a machine that others look after


def test_a_machine_whose_first_nics_are_its_own(machine: Callable[..., vm.Machine]) -> None:
    """ssh's NIC comes last then, and its network leads nowhere."""
    line = machine(mac="52:54:00:1a:b0:00", login=False, extra=["-device", "virtio-net-pci,netdev=eth0"]).argv()
    own = ["-netdev", "user,id=user0,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:4711-:22"]
    own += ["-device", "virtio-net-pci,netdev=user0,romfile=,mac=52:54:00:1a:b0:00"]
    assert line[-6:] == ["-device", "virtio-net-pci,netdev=eth0", *own]
    line = machine(login=False, extra=["-device", "second"]).argv()
    assert line[-6:-2] == [
        "-netdev",
        "user,id=user0,hostfwd=tcp:127.0.0.1:4711-:22",
        "-device",
        "virtio-net-pci,netdev=user0,romfile=",
    ]


@pytest.mark.network_local
def test_sockets_that_outlive_us(
    machine: Callable[..., vm.Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a given folder; in one of our own they go with the block."""
    monkeypatch.setattr(vm.Machine, "_launch", lambda _: None)
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    with machine(control=sockets) as kept:
        assert kept._control == sockets
    assert sockets.exists()
    with machine() as other:
        gone = other._control
        assert gone.exists()
    assert not gone.exists()
