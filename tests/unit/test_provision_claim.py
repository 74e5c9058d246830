"""Two runs on one host, time limits, and two directors that would both be master; a shell runs every script."""

from __future__ import annotations

import contextlib
import copy
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from invoke.exceptions import CommandTimedOut
from invoke.runners import Result

from pipeline import run
from pipeline.errors import BuildError
from provision import checking, claim, remote, render, vrrp
from provision import cluster as clusters
from provision.apply import GATE_MOST
from provision.checking import Where
from provision.host import Host
from provision.model import Cluster
from provision.remote import SCRIPT_SECONDS, Answer, Remote, Shell, braced
from tests.unit.clusters import VRRP, load

pytestmark = pytest.mark.runs("sh")
# The units that are active are files beside it.
SYSTEMCTL = """#!/bin/sh
for unit; do :; done
case $1 in
    is-active) [ -e "${0%/*}/$unit" ] ;;
    stop) rm "${0%/*}/$unit" ;;
esac
"""


@dataclass
class Folder:
    """A host that is a folder: a `Remote` whose /var/lib/lvs and /etc/keepalived are in it."""

    place: Path
    name: str = "lvs-1"
    login: str = "ssh -F lab/ssh_config root@lvs-1"

    def __post_init__(self) -> None:
        for part in ("bin", "keepalived"):
            (self.place / part).mkdir(parents=True)
        (self.place / "bin/systemctl").write_text(SYSTEMCTL)
        (self.place / "bin/systemctl").chmod(0o755)
        (self.place / "rollback").write_text(f"echo back >>{self.place}/calls\n")

    def run(self, script: str, *, check: bool = True, what: str = "") -> Answer:
        for path in ("/var/lib/lvs", "/etc/keepalived"):
            script = script.replace(path, str(self.place / path.rpartition("/")[2]))
        path = f"{self.place}/bin:{run.environment()['PATH']}"
        done = run.run(["/bin/sh", "-eu"], stdin=braced(script), env={"PATH": path}, check=False)
        if check and done.returncode:
            raise BuildError(f"{self.name}: {what} failed", "look", done.stderr.splitlines())
        return Answer(done.returncode, done.stdout, done.stderr)

    def put(self, data: bytes, path: str) -> None:
        raise NotImplementedError

    def unit(self, name: str) -> Path:
        return self.place / "bin" / name

    @property
    def timer(self) -> Path:
        return self.unit("lvs-rollback.timer")

    @property
    def undone(self) -> int:
        calls = self.place / "calls"
        return len(calls.read_text().split()) if calls.exists() else 0


@pytest.fixture
def host(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "host")


def have(host: Folder, *, take_over: bool = False, seconds: int = 900) -> contextlib.AbstractContextManager[Remote]:
    return claim.held(host, seconds, f"{host.place}/rollback", take_over=take_over, hint="invoke apply --take-over")


def test_a_second_run_leaves_a_host_alone(host: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says who is at work since when, until when at the most, and how to go back now."""
    with have(host) as ours:
        host.timer.touch()
        monkeypatch.setattr("provision.claim.platform.node", lambda: "another")
        with (
            pytest.raises(BuildError, match=r"lvs-1 is being changed by \S+@\S+ since \d{4}-.* UTC") as caught,
            have(host),
        ):
            pass
        assert "at the latest" in caught.value.hint and "invoke apply --take-over" in caught.value.hint
        assert "goes back by itself at" in caught.value.details[0]
        assert host.undone == 0 and host.timer.exists()
        assert ours.run("echo well").stdout == "well\n"
        host.timer.unlink()
    with have(host):
        pass


def test_a_full_disk_is_said_and_leaves_nothing(host: Folder) -> None:
    written = host.place / "lvs/apply.claim.new"
    written.parent.mkdir()
    written.symlink_to("/dev/full")
    unwritten = r"^lvs-1:/var/lib/lvs/apply.claim could not be written: .*No space left"
    with pytest.raises(BuildError, match=unwritten) as caught, have(host):
        pytest.fail("nobody has it")
    assert caught.value.hint == "ssh -F lab/ssh_config root@lvs-1 df -h /var/lib/lvs"
    assert [path.name for path in written.parent.iterdir()] == ["apply.lock"]


def test_who_was_taken_over_neither_finishes_nor_goes_back(host: Folder) -> None:
    with have(host) as first:
        host.timer.touch()
        with have(host, take_over=True) as second:
            assert host.undone == 1 and not host.timer.exists()
            with pytest.raises(BuildError, match="this host is another run's now"):
                first.run(f"touch {host.place}/wrong", what="rolling back")
            assert not (host.place / "wrong").exists()
            assert second.run("echo well").stdout == "well\n"


def test_of_many_that_begin_at_once_one_gets_the_host(host: Folder) -> None:
    # So that all of them look before one writes, if they may.
    host.unit("touch").write_text('#!/bin/sh\nsleep 0.2\nPATH=${PATH#*:} exec touch "$@"\n')
    host.unit("touch").chmod(0o755)
    got: list[bool] = []

    def take() -> None:
        got.append(claim._take(host, claim.ourselves(), 900) is None)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(got) == [False] * 7 + [True]


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({}, False),  # it is this process
        ({"process": "0/"}, True),  # another start time
        ({"process": "0/", "who": "someone@elsewhere"}, False),
        ({"process": ""}, False),
    ],
)
def test_a_run_that_was_cut_off_is_undone_where_that_is_known(change: dict[str, str], gone: bool, host: Folder) -> None:
    ours = claim.ourselves()
    if change.get("process"):
        change = {**change, "process": ours.process.rpartition("/")[0] + "/1"}
    assert claim._take(host, replace(ours, **change), 900) is None
    host.timer.touch()
    if gone:
        with have(host):
            assert host.undone == 1 and not host.timer.exists()
    else:
        with pytest.raises(BuildError, match="is being changed"), have(host):
            pass
        assert host.undone == 0


def test_of_another_pid_namespace_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = claim.ourselves()
    machine, boot, *rest = ours.process.split("/")
    machine, pid = machine or "a machine", rest[1]
    here = replace(ours, process="/".join((machine, boot, *rest)))
    monkeypatch.setattr(claim, "ourselves", lambda: here)
    assert not claim.is_gone(ours.who, f"{machine}/{boot}/pid:[1]/{pid}/1")
    assert claim.is_gone(ours.who, f"{machine}/another/pid:[1]/{pid}/1"), "booted since then"
    assert not claim.is_gone(ours.who, f"another/another/pid:[1]/{pid}/1"), "of the same name"
    monkeypatch.setattr(claim, "ourselves", lambda: replace(ours, process=f"/{boot}/pid:[1]/{pid}/1"))
    assert not claim.is_gone(ours.who, f"/another/pid:[1]/{pid}/1"), "machines without a name"


def test_a_claim_ends_with_its_time_and_not_before_its_timer(host: Folder) -> None:
    assert claim._take(host, replace(claim.ourselves(), who="someone@elsewhere"), -1) is None
    host.timer.touch()
    with pytest.raises(BuildError, match="someone@elsewhere"), have(host):
        pass
    host.timer.unlink()
    with have(host):
        pass
    assert host.undone == 0


def test_a_timer_of_nobody_known_and_a_host_that_goes_back_now(host: Folder) -> None:
    host.timer.touch()
    with pytest.raises(BuildError, match="by somebody since a time that is not known"), have(host):
        pass
    host.unit("lvs-rollback.service").touch()
    with pytest.raises(BuildError, match="is going back to its old files this moment"), have(host, take_over=True):
        pass
    assert host.undone == 0


# --- time limits


def answering(**result: Any) -> Shell:
    asked: dict[str, Any] = {}

    def answer(_command: str, **options: Any) -> SimpleNamespace:
        asked.update(options)
        if "error" in result:
            raise result["error"]
        assert options["timeout"] == SCRIPT_SECONDS < GATE_MOST + SCRIPT_SECONDS
        return SimpleNamespace(stdout="", stderr="", **result)

    return Shell("lvs-1", "ssh root@lvs-1", SimpleNamespace(run=answer))


def test_a_script_has_a_time_limit() -> None:
    assert answering(exited=0).run("true").status == 0
    hangs = answering(error=CommandTimedOut(Result(), timeout=SCRIPT_SECONDS))
    with pytest.raises(BuildError, match=f"lvs-1: changing it took longer than {SCRIPT_SECONDS} s"):
        hangs.run("sleep 1d", what="changing it")


def test_a_connection_that_broke_is_no_answer() -> None:
    """Also where a failure would be none."""
    with pytest.raises(BuildError, match="lvs-1: no connection: it broke"):
        answering(exited=-1).run("true", check=False)


@pytest.mark.network_local
def test_a_path_that_is_cut_is_noticed() -> None:
    asked: list[int] = []
    with socket.socket() as link:
        transport = SimpleNamespace(set_keepalive=asked.append, channel_timeout=3600, sock=link)
        remote._bound(transport)
        assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
    assert asked == [15] and transport.channel_timeout == SCRIPT_SECONDS


def test_a_gate_ends_before_the_host_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    given: list[float] = []

    def examine(*_: object, seconds: float, **__: object) -> list[checking.Outcome]:
        given.append(seconds)
        now[0] += 250
        return [checking.Outcome("lvs-1", "x", "failed" if len(given) == 1 else "passed", "", 0)]

    monkeypatch.setattr(checking, "examine", examine)
    monkeypatch.setattr("provision.checking.time.monotonic", lambda: now[0])
    cluster = directors(tmp_path)
    checking.gate(cluster, Where(), 300)(cluster.directors[0], frozenset())
    assert given == [GATE_MOST, GATE_MOST - 250]


def test_a_command_to_type_next_reaches_the_same_hosts() -> None:
    file = Path("a b.yaml")
    assert remote.command("plan", file, None) == "invoke plan --cluster 'a b.yaml'"
    assert remote.command("plan", file, Path("c d")) == "invoke plan --cluster 'a b.yaml' --ssh-config 'c d'"


@pytest.mark.parametrize(
    ("reached", "config", "line"),
    [
        ({}, None, "ssh root@lvs-1"),
        ({"ssh": "2001:db8::1"}, None, "ssh root@2001:db8::1"),
        ({"ssh": "gate:2201"}, "my config", "ssh -F 'my config' -p 2201 root@gate"),
    ],
)
def test_an_error_says_how_to_log_in_as_it_did(
    tmp_path: Path, reached: dict[str, str], config: str | None, line: str
) -> None:
    data = copy.deepcopy(VRRP)
    data["directors"][0] |= reached
    host = load(tmp_path, data).directors[0]
    assert remote.login(host, Path(config) if config else None) == line


@pytest.mark.network_local
def test_an_error_of_the_connection_says_so_too(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    data = copy.deepcopy(VRRP)
    data["directors"][0] |= {"ssh": f"127.0.0.1:{port}"}
    (config := tmp_path / "config").touch()
    opened = remote.opener(config)(load(tmp_path, data).directors[0])
    with pytest.raises(BuildError, match="lvs-1: no connection") as caught, opened:
        pass
    assert caught.value.hint.startswith(f"ssh -F {config} -p {port} root@127.0.0.1 ")


# --- two masters


def directors(folder: Path, **changes: Any) -> Cluster:
    (folder / "vrrp").write_text("s3cret")
    (folder / "vrrp").chmod(0o600)
    (folder / "other").write_text("0ther")
    (folder / "other").chmod(0o600)
    data = copy.deepcopy(VRRP)
    data["vrrp"]["instances"][0].update(changes)
    data["directors"][1]["ssh"] = "192.0.2.77:2222"
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return clusters.load(path)


@dataclass
class Pair:
    """Both directors, with what a cluster file makes of them."""

    folder: Path
    old: Cluster

    def __post_init__(self) -> None:
        self.hosts = {each.name: Folder(self.folder / each.name, each.name) for each in self.old.directors}
        for each in self.old.directors:
            self.have(each.name, self.old)
            self.hosts[each.name].unit("keepalived").touch()

    def have(self, name: str, cluster: Cluster) -> None:
        (director,) = cluster.chosen((name,))
        for file in render.Renderer(cluster).root_files(director):
            if file.path.startswith("/etc/keepalived/"):
                (self.hosts[name].place / file.path.removeprefix("/etc/")).write_text(file.content)

    @contextlib.contextmanager
    def connect(self, host: Host) -> Iterator[Remote]:
        yield self.hosts[host.name]

    def judge(self, cluster: Cluster, *names: str) -> None:
        hosts = sorted(cluster.chosen(names), key=lambda host: getattr(host, "priority", 0))
        vrrp.refuse_two_masters(cluster, hosts, render.Renderer(cluster), self.connect, Path("lab/ssh_config"))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"id": 77}, "virtual_router_id"),
        ({"advert_int": 3}, "advert_int"),
        ({"password": {"file": "other"}}, "auth_pass"),
        ({"password": None}, "auth_type, auth_pass"),
        ({"interface": "downlink"}, "interface"),
    ],
)
def test_what_makes_two_masters_is_refused_and_the_way_that_is_said_works(
    change: dict[str, Any], key: str, tmp_path: Path
) -> None:
    pair = Pair(tmp_path, directors(tmp_path))
    if change.get("password", "") is None:
        new = replace(pair.old, instances=tuple(replace(each, password=None) for each in pair.old.instances))
    else:
        new = directors(tmp_path, **change)
    with pytest.raises(BuildError, match=f"lvs-2 and lvs-1 would both be master of VI_1: .* {key}\\n") as caught:
        pair.judge(new)
    assert "s3cret" not in str(caught.value) and "0ther" not in str(caught.value)
    assert caught.value.hint == (
        "ssh -F lab/ssh_config -p 2222 root@192.0.2.77 systemctl stop keepalived"
        f" && invoke apply --cluster {new.path} --ssh-config lab/ssh_config --host lvs-1"
        f" && invoke apply --cluster {new.path} --ssh-config lab/ssh_config --host lvs-2"
    )
    pair.hosts["lvs-2"].unit("keepalived").unlink()
    with pytest.raises(BuildError, match="both be master"):
        pair.judge(new)  # which would start the backup first
    pair.judge(new, "lvs-1")
    pair.have("lvs-1", new)
    pair.judge(new, "lvs-2")


def test_the_family_of_the_first_vip_is_that_of_the_protocol(tmp_path: Path) -> None:
    """One speaks VRRP over IPv6 then, the other over IPv4; a further VIP is no matter."""
    pair = Pair(tmp_path, directors(tmp_path))

    def put_first(vip: str) -> None:
        for host in pair.hosts.values():
            pair.have(host.name, pair.old)
            for file in (host.place / "keepalived").iterdir():
                file.write_text(file.read_text().replace("virtual_ipaddress {", f"virtual_ipaddress {{\n        {vip}"))

    put_first("203.0.113.99/32 dev eth0")
    pair.judge(pair.old)
    put_first("# www\n! 2001:db8:: is another's\n203.0.113.99")
    pair.judge(pair.old)
    put_first("2001:db8:ffff::99/128 dev eth0")
    with pytest.raises(BuildError, match=r"both be master of VI_\d: they would differ in virtual_ipaddress\n"):
        pair.judge(pair.old)


def test_other_changes_and_new_directors_are_not_refused(tmp_path: Path) -> None:
    pair = Pair(tmp_path, directors(tmp_path))
    pair.judge(directors(tmp_path))
    pair.judge(directors(tmp_path, track=True))
    lost = pair.hosts.pop("lvs-1")
    pair.judge(directors(tmp_path), "lvs-2")  # does not ask the other one, which may be down
    pair.hosts["lvs-1"] = lost
    new = directors(tmp_path, id=77)
    for host in pair.hosts.values():
        for file in (host.place / "keepalived").iterdir():
            file.unlink()
    pair.judge(new)
    # One that is new beside one that runs must speak as that does.
    pair.have("lvs-1", new)
    pair.judge(new, "lvs-2")
    with pytest.raises(BuildError, match="both be master"):
        pair.judge(directors(tmp_path), "lvs-2")
    # Already two masters: what ends that is not refused.
    pair.have("lvs-2", directors(tmp_path))
    pair.judge(new, "lvs-2")
