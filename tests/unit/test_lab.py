"""The lab as far as it can be judged without a machine: its state, its errors, its command lines and its picture."""

from __future__ import annotations

import json
import os
import re
import shutil
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from image import bake
from pipeline import qmp, run, settings, vm
from pipeline.errors import BuildError
from pipeline.store import Store
from provision import cluster as clusters
from provision import render
from provision.lab import lab as labs
from provision.lab import live, login, machines, picture, report, space, state, topology, variant
from provision.lab.live import DOWN, STARTING, TROUBLED, UP, Seen
from provision.lab.space import Space
from provision.lab.state import Running, State
from tests.unit.test_lab_topology import EXAMPLES, KEY

ENDED = Running(pid=1, started=1)  # process 1 is there, and has started at another time
US = Running.of(os.getpid())


# --- what runs


def test_a_process_is_known_by_its_start_too() -> None:
    assert US.alive
    assert not replace(US, started=US.started + 1).alive
    assert not ENDED.alive
    with pytest.raises(BuildError, match="process 4194305 has ended already"):
        Running.of(4194305)  # above the kernel's largest


@pytest.mark.parametrize("word", ["Z", "X"])
def test_one_that_only_its_parent_knows_does_not_run(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a name that has blanks and brackets, as any program may give itself."""
    rest = " ".join(str(n) for n in range(4, 30))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"7 (a) b) {word} {rest}")
    assert state._started(7) is None
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"7 (a) b) S {rest}")
    assert state._started(7) == 22


def test_state_is_written_and_read(tmp_path: Path) -> None:
    written = State(tmp_path, "cluster.yaml", 512, "/run/s", "/root", {"director": "a"}, {"lvs-1": US}, {"r": 3})
    written.scale = 6.5
    written.write()
    assert State.read(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    assert State.read(tmp_path / "elsewhere") is None


def test_a_state_of_an_older_lab_is_read(tmp_path: Path) -> None:
    State(tmp_path, "cluster.yaml", processes={"lvs-1": US}).write()
    data = json.loads((tmp_path / "state.json").read_text())
    del data["scale"]
    data |= {"begun": 1.5, "ports": {"lvs-1": 4711}}
    (tmp_path / "state.json").write_text(json.dumps(data))
    found = State.read(tmp_path)
    assert found is not None and found.alive == {"lvs-1": US} and found.scale == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"processes": {"a": {"id": 3}}}', '{"processes": {}, "unknown": 1}'])
def test_a_damaged_state_is_said_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(BuildError, match="is no state of a lab") as caught:
        State.read(tmp_path)
    assert "ps -C qemu-system-x86" in caught.value.hint


def test_exactly_its_processes_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose number another process has now is left alone, and so is one that was not named."""
    alive = {11: 100, 12: 200, 13: 300}
    killed: list[tuple[int, int]] = []

    def kill(pid: int, number: int) -> None:
        killed.append((pid, number))
        del alive[pid]

    monkeypatch.setattr(state, "_started", alive.get)
    monkeypatch.setattr(os, "kill", kill)
    processes = {"lvs-1": Running(11, 100), "rs-1": Running(12, 200), "router": Running(13, 299)}
    written = State(tmp_path, processes=processes)
    assert written.end("rs-1", "router") == ["rs-1"]
    assert killed == [(12, 9)]
    assert written.end() == ["lvs-1"]
    assert killed == [(12, 9), (11, 9)] and alive == {13: 300}


def test_one_that_cannot_be_ended_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_started", lambda _: 5)
    monkeypatch.setattr(state, "_END_SECONDS", 0.0)
    monkeypatch.setattr(os, "kill", lambda *_: None)
    with pytest.raises(BuildError, match=r"the end of lvs-1 \(pid 77\)") as caught:
        State(tmp_path, processes={"lvs-1": Running(77, 5)}).end()
    assert caught.value.hint == "ps 77"


def test_one_command_at_a_time(tmp_path: Path) -> None:
    with state.alone(tmp_path / "lab"), pytest.raises(BuildError, match="another command is at work on the lab"):
        state.alone(tmp_path / "lab").__enter__()
    with state.alone(tmp_path / "lab"):
        pass


# --- images


def baked(folder: Path) -> Path:
    folder.mkdir(parents=True)
    file = folder / "lvs-director-1.qcow2"
    file.write_bytes(b"QFI\xfb....")
    (folder / "manifest.json").write_text(json.dumps({"image": {"file": file.name}}))
    (folder / "inputs.json").write_text("{}")
    return file


def test_the_image_that_is_taken(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = bake.Line(store)
    monkeypatch.setattr(bake, "Line", lambda: line)
    with pytest.raises(BuildError, match="no director image is baked") as caught:
        bake.ready({"director": ""}, "director")
    assert caught.value.hint == "invoke bake-image --role director" and not caught.value.details
    older = baked(store.root / "image-director" / "0123")
    monkeypatch.setattr(store, "has", lambda _: False)

    class Finished:
        finished = "stage"

    monkeypatch.setattr(line, "image", lambda _: Finished)
    with pytest.raises(BuildError) as caught:
        bake.ready({"director": ""}, "director")
    assert caught.value.details == (f"an image of another state of the checkout is there: --image-director {older}",)
    published = baked(settings.out() / "lvs-director" / "1")
    os.utime(published, (0, 0))
    baked(settings.out() / "lvs-director" / ".2.4711")  # the newest, and killed while it was copied
    assert bake.ready({"director": ""}, "director") == published
    own = baked(tmp_path / "own")
    monkeypatch.setattr(store, "has", lambda stage: stage == "stage")
    monkeypatch.setattr(store, "path", lambda _: own.parent)
    assert bake.ready({"director": ""}, "director") == own
    assert bake.ready({"director": str(published)}, "director") == published


def test_a_given_image_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"--image-director: /none\.qcow2 does not exist"):
        bake.ready({"director": "/none.qcow2"}, "director")
    (tmp_path / "raw").write_bytes(b"\0" * 512)
    with pytest.raises(BuildError, match="is no qcow2 image"):
        bake.ready({"realserver": str(tmp_path / "raw")}, "realserver")


# --- command lines


def test_a_machines_cable() -> None:
    assert machines.cable("eth1", "52:54:00:00:00:01", "tap,fd=100") == [
        "-netdev", "tap,id=eth1,fd=100",
        "-device", "virtio-net-pci,netdev=eth1,romfile=,mac=52:54:00:00:00:01",
    ]  # fmt: skip
    assert machines.backend("end", "dgram,local.type=inet") == ["-netdev", "dgram,id=end,local.type=inet"]


def test_many_machines_share_the_builder(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    found = vm.Accelerator("tcg", "qemu64", 6.0)
    monkeypatch.setattr(vm.Accelerator, "probe", lambda *_: found)
    monkeypatch.setattr(vm, "slowdown", lambda _: 1.5)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    made = machines.accelerator(store, 4)
    assert made.scale == 6.0 * 2 * 1.5
    assert made.options == ["-accel", "tcg,thread=single,tb-size=512"]
    assert machines.accelerator(store, 1).scale == 6.0 * 1.5


def test_a_namespace_is_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "require", lambda name, *_: name)
    made = Space("client-1", 10, 12)
    kinds = "--net --pid --mount --uts --ipc --root --wd".split()
    assert made.argv(["ip", "a"]) == ["nsenter", "--target", "12", *kinds, "--", "ip", "a"]
    assert made.network_argv(["curl"]) == ["nsenter", "--target", "12", "--net", "--", "curl"]
    text = login.ssh_config(made, Path("/lab/id"))
    assert text.startswith("Host client-1\n  User root\n  ProxyCommand nsenter --target 12 --net")
    assert "exec /usr/sbin/sshd -i" in text and 'IdentityFile "/lab/id"\n' in text


def test_cables() -> None:
    node = Space("router", 10, 12)
    assert space.cable_commands("port1", "uplink", "eth0", "52:54:00:1a:b1:07", node) == [
        "link add port1 type veth peer name eth0 address 52:54:00:1a:b1:07 netns 12",
        "link set port1 alias router.eth0 master uplink up",
    ]
    assert space.tap_commands("port2", "uplink", "lvs-1.eth0")[0] == "tuntap add port2 mode tap"


def test_hardware_addresses(lab: labs.Lab) -> None:
    """Those of the cluster file, and others that are nobody else's and the same for ever."""
    plugs = [(link, plug) for link in lab.topology.links for plug in link.plugs]
    found = [lab.mac(link, plug) for link, plug in plugs]
    assert len(set(found)) == len(found) and [lab.mac(link, plug) for link, plug in plugs] == found
    assert all(lab.mac(link, plug) == plug.mac for link, plug in plugs if plug.mac)


def test_the_innermost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "_children", {1: [2], 2: [3], 3: []}.__getitem__)
    assert space.innermost(1) == 3


def test_what_a_real_server_serves() -> None:
    files = machines.web_files("rs-1", [80, 8443], b"program")
    assert files["usr/local/sbin/nginx"] == (0o755, b"program")
    text = files["etc/web.conf"][1].decode()
    assert "listen [::]:80 ipv6only=off;" in text and "listen [::]:8443 ipv6only=off;" in text
    assert 'return 200 "rs-1\\n";' in text


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> labs.Lab:
    """A lab of the example, of which a machine, its switch and a client run."""
    monkeypatch.setattr(run, "require", lambda name, *_: f"/usr/bin/{name}")
    written = State(tmp_path, "lab-ospf.yaml", processes={"lvs-1": US, "client-1": US, "switch": US, "rs-1": ENDED})
    written.inner = {"client-1": 12, "switch": 13}
    made = labs.Lab(written)
    shutil.copyfile(EXAMPLES["ospf"], made.file)
    made.__dict__["cluster"] = clusters.load(EXAMPLES["ospf"], secrets=False)
    made.__dict__["accelerator"] = vm.Accelerator("tcg", "qemu64", 6.0)
    return made


def runs(folder: Path) -> set[str]:
    """What lab-down would find."""
    found = State.read(folder)
    assert found is not None
    return set(found.alive)


@pytest.mark.runs("sleep")
def test_a_machine_is_known_before_it_is_up(lab: labs.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the command ends; one that is told to end ends what is not up yet."""
    lab.state.sockets = str(lab.folder)
    monkeypatch.setattr(machines, "overlay", lambda _base, path: path)
    monkeypatch.setattr(vm, "free_port", lambda: 2222)
    monkeypatch.setattr(vm.Machine, "argv", lambda _: ["sleep", "1000"])
    lab.state.images["realserver"] = "image"
    while_starting: list[set[str]] = []

    def interrupt(_: Path) -> bool:
        while_starting.append(runs(lab.folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(qmp, "listening", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lab.start_machine("rs-2")
    assert "rs-2" in while_starting[0] and "rs-2" not in runs(lab.folder)
    monkeypatch.setattr(qmp, "listening", lambda _: True)
    lab.start_machine("rs-2")
    lab.close()
    assert "rs-2" in runs(lab.folder)
    assert lab.state.end("rs-2") == ["rs-2"]


@pytest.mark.runs("sleep")
def test_a_namespace_is_known_before_it_is_up(lab: labs.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    start = run.start
    monkeypatch.setattr(run, "start", lambda _, **options: start(["sleep", "1000"], **options))
    lab.state.inner["router"] = 7  # of its last life
    while_starting: list[set[str]] = []

    def interrupt(_: int) -> str:
        while_starting.append(runs(lab.folder))
        with pytest.raises(BuildError, match="router does not run"):
            lab.space("router")
        raise KeyboardInterrupt

    monkeypatch.setattr(space, "_command", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lab._hold("router", lab.folder / "log")
    assert "router" in while_starting[0] and "router" not in runs(lab.folder)
    monkeypatch.setattr(space, "_command", lambda _: "sleep")
    made = lab._hold("router", lab.folder / "log")
    assert "router" in runs(lab.folder) and lab.space("router") == made
    assert lab.state.end("router") == ["router"]


def test_a_new_disk_starts_as_the_cluster_file_is_now(lab: labs.Lab) -> None:
    variant.write(EXAMPLES["ospf"], lab.file, KEY)
    render.render_cluster(lab.file, lab.folder / "hosts")
    (lab.folder / "lvs-1").mkdir()
    disk, seed = lab.folder / "lvs-1/disk.qcow2", lab.folder / "hosts/lvs-1/seed.iso"
    disk.write_bytes(b"what it wrote")
    before = seed.read_bytes()
    text = lab.file.read_text(encoding="utf-8")
    lab.file.write_text(text.replace("per_director: 4", "per_director: 5"), encoding="utf-8")
    lab.new_disk("lvs-1", Path("/images/next.qcow2"))
    assert not disk.exists() and seed.read_bytes() != before
    assert lab.state.images["director"] == "/images/next.qcow2"


def test_logging_in(lab: labs.Lab) -> None:
    config = str(lab.folder / "ssh_config")
    assert lab.command("lvs-1", ["uptime"]) == ["ssh", "-F", config, "lvs-1", "uptime"]
    assert lab.command("lvs-1", terminal=True) == ["ssh", "-t", "-F", config, "lvs-1"]
    assert lab.command("client-1")[-2:] == ["--", "sh"]
    # As ssh does it: one word or many, a shell reads them.
    for words in (["ip r | head"], ["ip", "r", "|", "head"]):
        assert lab.command("client-1", words)[-4:] == ["--", "sh", "-c", "ip r | head"]
    assert lab.command("switch", ["bridge", "link"])[1:3] == ["--target", "13"]
    with pytest.raises(BuildError, match="the lab has no lvs-9") as caught:
        lab.command("lvs-9")
    assert caught.value.hint == "choose among client-1, client-2, router, lvs-1, lvs-2, rs-1, rs-2"
    for name in ("rs-1", "rs-2", "router"):
        with pytest.raises(BuildError, match=f"{name} does not run"):
            lab.command(name)


def test_hints_name_the_lab(lab: labs.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --dir a task is about the lab in out/lab."""
    hints: list[str] = []

    def note(*_: object, hint: str, **__: object) -> Any:
        hints.append(hint)

    monkeypatch.setattr(run, "run", note)
    monkeypatch.setattr(run, "wait_until", note)
    lab.try_to("lvs-1", "uptime")
    lab.until("lvs-1", "ip r | grep via", "a route")
    monkeypatch.setattr(lab.state, "end", lambda _: [])
    lab.kill("client-1")
    with pytest.raises(BuildError) as caught:
        lab.space("router")
    which = f"--dir {lab.folder}"
    assert [*hints, caught.value.hint] == [
        f"invoke lab-ssh lvs-1 {which}",
        f"invoke lab-ssh lvs-1 {which} -- 'ip r | grep via'",
        f"invoke lab-ssh switch {which} -- ip link",
        f"invoke lab-status {which}",
    ]
    assert labs.own(settings.TOP / "out/lab") == "" and labs.own(settings.TOP / "out/other") == " --dir out/other"


def test_ports_are_each_ones_own(lab: labs.Lab) -> None:
    names = [lab.port(link, plug) for link in lab.topology.links for plug in link.plugs]
    assert len(names) == len(set(names)) == 10


def test_its_machines_take_the_memory_that_is_counted(lab: labs.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    del lab.__dict__["accelerator"]
    asked: list[int] = []

    def found(_: Store, count: int, **__: float) -> vm.Accelerator:
        asked.append(count)
        return vm.Accelerator("tcg", "qemu64", 6.0)

    monkeypatch.setattr(machines, "accelerator", found)
    assert "tb-size=512" in lab.accelerator.options[1]
    assert asked == [4]


def test_pages_and_ports(lab: labs.Lab) -> None:
    assert lab.urls() == [
        "http://203.0.113.1:80/index.html",
        "http://[2001:db8:ffff::1]:80/index.html",
        "http://203.0.113.2:8080/index.html",
    ]
    assert lab.web_ports() == [80, 8080]


# --- what nodes say

ADDRESSES = json.dumps(
    [
        {
            "ifname": "lo",
            "operstate": "UNKNOWN",
            "flags": ["UP"],
            "addr_info": [{"local": "203.0.113.1", "prefixlen": 32}, {"local": "127.0.0.1", "prefixlen": 8}],
        },
        {"ifname": "eth0", "operstate": "UP", "flags": ["UP"], "addr_info": []},
        {"ifname": "eth1", "operstate": "DOWN", "flags": ["NO-CARRIER", "UP"], "addr_info": []},
    ]
)
TABLE = """\
TCP  203.0.113.1:80 rr
  -> 10.64.1.1:80                 FullNat 1      3          0
  -> 10.64.1.2:80                 FullNat 0      0          0
"""


def test_a_scripts_sections() -> None:
    script = live._script({"one": "cmd", "two": "other"})
    assert script == "echo '=== one'; cmd 2>/dev/null || :\necho '=== two'; other 2>/dev/null || :"
    assert live.sections("noise\n=== one\na\nb\n=== two\n") == {"one": "a\nb\n", "two": ""}


def test_a_director() -> None:
    well = {"addresses": ADDRESSES.replace("NO-CARRIER", "X").replace("DOWN", "UP"), "units": "ospfd yes active\n"}
    found = live.director({**well, "table": TABLE.replace("FullNat 0", "FullNat 1")}, ["203.0.113.1", "203.0.113.2"])
    assert found == Seen(UP, ("VIPs: 203.0.113.1", "TCP 203.0.113.1:80: 2 of 2 real servers, 3 connections"))
    units = "keepalived yes failed\nzebra no inactive\n"
    found = live.director({"addresses": ADDRESSES, "units": units, "table": TABLE}, [])
    assert found.state == TROUBLED and found.cut == ("eth1",)
    assert found.facts == (
        "VIPs: none",
        "TCP 203.0.113.1:80: 1 of 2 real servers, 3 connections",
        "keepalived is failed",
        "TCP 203.0.113.1:80: 10.64.1.2:80 has weight 0",
        "eth1 has no carrier",
    )
    assert live.director(well, []).facts[-1] == "no service in the kernel"


def test_a_real_server() -> None:
    assert live.real_server({"addresses": "[]", "units": "web yes active\n", "log": "12\n"}) == Seen(
        UP, ("answered 12 requests",)
    )
    found = live.real_server({"units": "web yes inactive\n"})
    assert found == Seen(TROUBLED, ("answered 0 requests", "web is inactive"))


@pytest.mark.runs("sh")
def test_a_client_asks_for_all_pages_at_once(tmp_path: Path) -> None:
    """No page comes before all are asked for; each is a section of its own."""
    urls = [f"http://[2001:db8::{n}]:80/index.html" for n in range(5)]
    curl = f"""
curl() {{
    echo >>{tmp_path}/asked
    for turn in $(seq 100); do
        if [ $(wc -l <{tmp_path}/asked) = 5 ]; then
            while [ "$1" != -w ]; do shift; done
            printf "$(printf %s "$2" | sed 's/%{{http_code}}/200/')"
            return
        fi
        sleep 0.1
    done
}}
"""
    said = live.sections(run.run(["sh", "-c", curl + live._pages(urls)]).stdout)
    assert live.client(said) == Seen(UP, ("5 of 5 pages",)) and sorted(said) == urls


def test_a_client() -> None:
    assert live.client({"http://a/": "200\n", "http://b/": "200\n"}) == Seen(UP, ("2 of 2 pages",))
    assert live.client({"http://b/": "503\n", "http://a/": "000\n"}) == Seen(
        TROUBLED, ("http://a/: no answer", "http://b/: 503")
    )


def test_the_router() -> None:
    routes = [{"dst": "203.0.113.1", "nexthops": [{"gateway": "192.0.2.2"}, {"gateway": "192.0.2.3"}]}]
    routes6 = [{"dst": "2001:db8:ffff::1", "gateway": "fe80::1", "dev": "uplink"}]
    neighbours = {"neighbors": {"192.0.2.2": [{"nbrState": "Full/DR", "ifaceAddress": "192.0.2.2"}]}}
    said = {"routes4": json.dumps(routes), "routes6": json.dumps(routes6), "neighbours": json.dumps(neighbours)}
    owners = {"192.0.2.2": "lvs-1", "192.0.2.3": "lvs-2"}
    found = live.router(said, owners, ["203.0.113.1", "203.0.113.2", "2001:db8:ffff::1"], ospf=True)
    assert found == Seen(
        TROUBLED,
        (
            "OSPF: lvs-1 Full",
            "203.0.113.1 → lvs-1, lvs-2",
            "203.0.113.2 → nowhere",
            "2001:db8:ffff::1 → fe80::1",
            "no route to 203.0.113.2",
        ),
    )
    assert live.router({}, owners, ["203.0.113.1"], ospf=False) == Seen(UP)


def test_the_routers_ways_have_names(lab: labs.Lab) -> None:
    """OSPF for IPv6 names directors by their link-local addresses."""
    routes = [{"dst": "2001:db8:ffff::1", "gateway": "fe80::5054:ff:fe00:200", "dev": "uplink"}]
    found = live.router({"routes6": json.dumps(routes)}, live._owners(lab), ["2001:db8:ffff::1"], ospf=True)
    assert "2001:db8:ffff::1 → lvs-2" in found.facts


def test_nodes_are_judged_by_the_services_of_now(lab: labs.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that an operation has added; its hosts and cables are those of lab-up."""
    text = lab.file.read_text(encoding="utf-8")
    lab.file.write_text(text.replace("203.0.113.2", "203.0.113.9").replace("lvs-2", "lvs-9"), encoding="utf-8")
    lab.state.processes["router"] = US
    asked: dict[str, str] = {}

    def answer(name: str, command: str, **_: Any) -> run.Result:
        asked[name] = command
        return run.Result((), 0, "=== addresses\n" + ADDRESSES.replace("203.0.113.1", "203.0.113.9"), "")

    monkeypatch.setattr(lab, "try_to", answer)
    seen = live.look(lab)
    assert "http://203.0.113.9:8080/" in asked["client-1"] and "203.0.113.2" not in asked["client-1"]
    assert "VIPs: 203.0.113.9" in seen["lvs-1"].facts
    assert "no route to 203.0.113.9" in seen["router"].facts and "no route to 203.0.113.2" not in seen["router"].facts
    assert "lvs-2" in seen and "lvs-9" not in seen


def test_who_does_not_run_is_not_asked(lab: labs.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(name: str, command: str, **_: Any) -> run.Result:
        asked.append(name)
        if name == "client-1":
            raise BuildError("on client-1: no end within 9 s", "-")
        return run.Result((), 255, "", "ssh: no")

    monkeypatch.setattr(lab, "try_to", answer)
    seen = live.look(lab)
    assert sorted(asked) == ["client-1", "lvs-1"]
    assert seen["client-1"] == Seen(STARTING, ("on client-1: no end within 9 s",))
    assert seen["lvs-1"] == Seen(STARTING, ("does not answer yet",))
    assert {seen[name].state for name in ("router", "rs-1", "lvs-2")} == {DOWN}


# --- the picture

SEEN = {
    "lvs-1": Seen(UP, ("VIPs: 203.0.113.1", "TCP [2001:db8:ffff::1]:80: 2 of 2 real servers, 12 connections")),
    "lvs-2": Seen(TROUBLED, ("eth1 has no carrier",), ("eth1",)),
    "rs-1": Seen(DOWN, ("does not run",)),
}


def test_the_picture_as_text() -> None:
    built = topology.build(clusters.load(EXAMPLES["ospf"], secrets=False))
    lines = picture.text(built, SEEN)
    order = [re.split(r"  +", line.lstrip("●◌▲✗║ "))[0] for line in lines if not line.startswith("      ")]
    assert order == [
        "client-1",
        "client-2",
        "clients",
        "router",
        "uplink",
        "lvs-1",
        "lvs-2",
        "downlink",
        "rs-1",
        "rs-2",
    ]
    assert "● lvs-1  up   eth0 192.0.2.2 2001:db8:2::2; eth1 10.64.255.1 2001:db8:64::ff:1" in lines
    assert "▲ lvs-2  troubled   eth0 192.0.2.3 2001:db8:2::3; eth1 10.64.255.2 2001:db8:64::ff:2 CUT" in lines
    assert "✗ rs-1  down   eth0 10.64.1.1 2001:db8:64::1:1" in lines
    assert lines[lines.index("      VIPs: 203.0.113.1") - 1].startswith("● lvs-1")


@pytest.mark.parametrize("example", [*EXAMPLES.values(), EXAMPLES["ospf"].with_name("manual-ospf.yaml")])
def test_the_picture_as_svg(example: Path) -> None:
    built = topology.build(clusters.load(example, secrets=False))
    text = picture.svg(built, SEEN, "a <b> & c")
    root = xml.etree.ElementTree.fromstring(text)  # noqa: S314  ours
    names = {group.get("id") for group in root.iter("{http://www.w3.org/2000/svg}g")}
    assert names == {node.name for node in built.nodes}
    words = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words[0] == "a <b> & c"
    # What is longer than a box is wide goes on below, and none of it is lost.
    said = " ".join(words).split()
    assert "connections" in said or "lvs-1" not in names
    assert all(len(word) <= 42 for word in words if not word.startswith(tuple(link.name for link in built.links)))
    for link in built.links:
        assert any(word.startswith(f"{link.name}  ") for word in words), link.name
    # Every interface has its cable, and those that are cut, or of a machine that is down, are dashed.
    paths = [path for path in root.iter("{http://www.w3.org/2000/svg}path")]
    dashed = [path for path in paths if path.get("stroke-dasharray")]
    assert len(paths) == len(built.links) + sum(len(link.plugs) for link in built.links)
    cut = sum(len(list(built.plugs(name))) for name in ("rs-1",)) + ("lvs-2" in names)
    assert len(dashed) == cut
    # No box lies on another, and all of them are inside.
    width, height = (float(root.get(side) or 0) for side in ("width", "height"))
    boxes = [
        tuple(float(r.get(k) or 0) for k in ("x", "y", "width", "height"))
        for r in root.iter("{http://www.w3.org/2000/svg}rect")
    ]
    for n, (x, y, w, h) in enumerate(boxes[1:], 1):
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
        assert not any(x < a + c and a < x + w and y < b + d and b < y + h for a, b, c, d in boxes[n + 1 :])


def test_what_is_to_be_typed_next(lab: labs.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "look", lambda _: SEEN)
    lines = report.welcome(lab)
    own = f"--dir {lab.folder}"
    assert f"  invoke lab-ssh lvs-1 {own} -- ipvsadm -Ln" in lines
    assert f"  invoke lab-ssh client-1 {own} -- curl -s http://203.0.113.1:80/index.html" in lines
    assert f"1 up, 1 troubled, 1 down; drawn in {lab.folder}/topology.svg" in lines
    assert (lab.folder / "topology.svg").read_text(encoding="utf-8").startswith("<svg ")
    monkeypatch.setattr(settings, "TOP", lab.folder)
    lab.folder = lab.folder / "out" / "lab"
    lab.folder.mkdir(parents=True)
    shutil.copyfile(EXAMPLES["ospf"], lab.file)
    lines = report.welcome(lab)
    assert "  invoke lab-down" in lines
    assert "  invoke check --cluster out/lab/cluster.yaml --ssh-config out/lab/ssh_config" in lines
