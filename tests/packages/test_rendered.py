"""What is rendered from cluster files, judged by the checkers of the daemons of our packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyroute2
import pytest

from pipeline import run
from pipeline.sandbox import Sandbox
from pipeline.store import Store
from provision import cluster as clusters
from provision import render
from tests.unit.test_provision_cases import ALL, SECRETS, name_of
from tools import build

pytestmark = pytest.mark.build

Judge = Callable[..., run.Result]
ROUTING = ("zebra", "ospfd", "ospf6d")
# Interfaces of the examples and cases, so that VRRP has where to be. The build root has no `ip`.
LINKS = """
import os, sys
from pyroute2 import IPRoute
with IPRoute() as ip:
    ip.link("add", ifname="eth0", kind="veth", peer={"ifname": "eth1"})
    for name in ("eth0", "eth1"):
        ip.link("set", index=ip.link_lookup(ifname=name)[0], state="up")
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of keepalived's and the routing daemons' packages."""
    store = Store()
    found = {}
    for name in ("keepalived", "quagga"):
        (package,) = build.packages(store.ensure(build.stage(name, store)))
        found[name] = tmp_path_factory.mktemp(name)
        build.room(store).sandbox().run(
            ["sh", "-ec", "rpm2archive - <$0 | tar -xz -C /build/tree", f"/build/{package.name}"],
            binds={found[name]: "/build/tree"},
            ro_binds={package: f"/build/{package.name}"},
        )
    return found


@pytest.fixture
def judge(trees: dict[str, Path], tmp_path: Path) -> Judge:
    """Run a daemon on a file of a rendered host, in the build root, which has the libraries."""
    (tmp_path / "passwd").write_text("root:x:0:0::/root:/bin/sh\nfrr:x:990:990::/run/frr:/usr/sbin/nologin\n")
    (tmp_path / "group").write_text("root:x:0:\nfrr:x:990:\nfrrvty:x:991:frr,root\n")
    logs = tmp_path / "log"
    logs.mkdir(mode=0o777)
    logs.chmod(0o777)  # the daemons open their logs as frr
    sandbox: Sandbox = build.room(Store()).sandbox()

    def start(daemon: str, etc: Path, *words: str) -> run.Result:
        tool = "keepalived" if daemon == "keepalived" else "quagga"
        binds = {trees[tool]: "/build/tree", etc: "/build/etc"}
        binds |= {tmp_path / name: f"/etc/{name}" for name in ("passwd", "group")}
        binds |= {Path(pyroute2.__file__).parent: "/build/python/pyroute2"}
        return sandbox.run(
            ["python3", "-c", LINKS, f"/build/tree/usr/sbin/{daemon}", *words],
            ro_binds=binds,
            binds={logs: "/var/log"},
            env={"LD_LIBRARY_PATH": "/build/tree/usr/lib/frr", "PYTHONPATH": "/build/python"},
            check=False,
        )

    return start


def directors(path: Path, out: Path) -> list[Path]:
    """The rendered /etc of each director, readable for daemons that run as somebody else."""
    render.render_cluster(path, out)
    found = [out / host.name / "rootfs/etc" for host in clusters.load(path).directors]
    for file in (file for etc in found for file in etc.rglob("*.conf")):
        file.chmod(0o644)
    assert found
    return found


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_keepalived_takes_its_files(path: Path, tmp_path: Path, judge: Judge) -> None:
    """And has nothing to remark: not even a warning."""
    for etc in directors(path, tmp_path / "out"):
        result = judge("keepalived", etc, "--config-test", "--use-file", "/build/etc/keepalived/keepalived.conf")
        assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_routing_daemons_take_their_files(path: Path, tmp_path: Path, judge: Judge) -> None:
    count = 0
    for etc in directors(path, tmp_path / "out"):
        for daemon in ROUTING:
            if (etc / f"quagga/{daemon}.conf").exists():
                count += 1
                result = judge(daemon, etc, "-C", "-f", f"/build/etc/quagga/{daemon}.conf")
                said = result.stdout + result.stderr
                # A line that it does not know is no failure for it.
                assert result.returncode == 0 and "on config line" not in said, said
    assert count or clusters.load(path).mode == "vrrp"


def test_the_checkers_can_refuse(tmp_path: Path, judge: Judge) -> None:
    (etc, *_) = directors(ALL[0], tmp_path / "out")
    for daemon, word in (("zebra", "hostname"), ("ospfd", " ospf router-id")):
        conf = etc / f"quagga/{daemon}.conf"
        conf.write_text(conf.read_text().replace(word, f"x{word.strip()}"))
        result = judge(daemon, etc, "-C", "-f", f"/build/etc/quagga/{daemon}.conf")
        assert "on config line" in result.stdout + result.stderr


def test_keepalived_can_refuse(tmp_path: Path, judge: Judge) -> None:
    (etc, *_) = directors(ALL[0], tmp_path / "out")
    conf = etc / "keepalived/web.conf"
    conf.write_text(conf.read_text().replace("delay_loop", "delay_lop"))
    result = judge("keepalived", etc, "--config-test", "--use-file", "/build/etc/keepalived/keepalived.conf")
    assert result.returncode != 0 and "delay_lop" in result.stdout + result.stderr
