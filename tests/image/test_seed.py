"""What cloud-init of the images' base makes of rendered seeds; no machine is booted."""

from __future__ import annotations

import configparser
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from image import base
from pipeline import debroot, run
from pipeline.sandbox import Sandbox
from pipeline.store import Store
from provision import cluster as model
from provision import render
from provision.host import Host
from tests.unit.test_provision_cases import ALL, SECRETS, name_of

pytestmark = pytest.mark.build

CloudInit = Callable[..., run.Result]


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def cloud_init(store: Store, toy_root: Path, tmp_path: Path) -> CloudInit:
    """Run cloud-init of the base tree, which stays as it is; the test's folder is at /mnt there."""
    tree = debroot.tree(store, base.base_root(store))

    def start(*words: str, check: bool = True) -> run.Result:
        return Sandbox(toy_root).run(
            ["/usr/sbin/chroot", "/build/base", "cloud-init", *words],
            ro_binds={Path("/usr"): "/usr", tree: "/build/base", Path("/proc"): "/build/base/proc"},
            binds={tmp_path: "/build/base/mnt"},
            env={"PYTHONDONTWRITEBYTECODE": "1"},
            check=check,
        )

    return start


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_user_data_is_valid(path: Path, tmp_path: Path, cloud_init: CloudInit) -> None:
    for target in render.render_cluster(path, tmp_path):
        result = cloud_init("schema", "--config-file", f"/mnt/{target.name}/seed/user-data")
        assert "Valid cloud-config" in result.stdout + result.stderr


def test_the_check_can_fail(tmp_path: Path, cloud_init: CloudInit) -> None:
    (tmp_path / "user-data").write_text("#cloud-config\nwrite_files:\n  - content: x\n", encoding="utf-8")
    assert cloud_init("schema", "--config-file", "/mnt/user-data", check=False).returncode != 0


def sections(text: str) -> list[tuple[str, dict[str, str]]]:
    """The sections of a .network file, of which several may have one name."""
    found = []
    for part in re.split(r"(?m)^(?=\[)", text):
        if part.startswith("["):
            parser = configparser.ConfigParser(interpolation=None)
            parser.optionxform = str  # type: ignore[assignment,method-assign]
            parser.read_string(part)
            name = parser.sections()[0]
            found.append((name, dict(parser[name])))
    return found


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_networkd_gets_what_was_asked_for(path: Path, tmp_path: Path, cloud_init: CloudInit) -> None:
    render.render_cluster(path, tmp_path)
    hosts = [host for host in model.load(path).hosts if host.interfaces]
    assert hosts
    for number, host in enumerate(hosts):
        names = [word for nic in host.interfaces if nic.mac for word in ("-m", f"{nic.name},{nic.mac}")]
        source, out = f"/mnt/{host.name}/seed/network-config", f"/mnt/net{number}"
        cloud_init(*f"devel net-convert -k yaml -D debian -O networkd -d {out}".split(), "-p", source, *names)
        judge(host, tmp_path / f"net{number}/etc/systemd/network", tmp_path / host.name / "rootfs/etc/systemd/network")


def judge(host: Host, folder: Path, more: Path) -> None:
    """Networkd's files say what the host's entry says, and nothing else; those in `more` are laid beside them."""
    assert len(list(folder.iterdir())) == len(host.interfaces)
    for nic in host.interfaces:
        got = sections((folder / f"10-cloud-init-{nic.name}.network").read_text(encoding="utf-8"))
        beside = more / f"10-cloud-init-{nic.name}.network.d/50-gateway.conf"
        got += sections(beside.read_text(encoding="utf-8")) if beside.exists() else []
        match = {"MACAddress": nic.mac, "Name": nic.name} if nic.mac else {"Name": nic.name}
        assert ("Match", match) in got
        assert sorted(keys["Address"] for name, keys in got if name == "Address") == sorted(nic.addresses)
        routes = {(keys.get("Destination"), keys["Gateway"]) for name, keys in got if name == "Route"}
        wanted: set[tuple[str | None, str]] = {(route.to, route.via) for route in nic.routes}
        wanted |= {(None, router) for router in (nic.gateway4, nic.gateway6) if router}
        assert routes == wanted
        dhcp = {(False, False): "no", (True, False): "ipv4", (False, True): "ipv6", (True, True): "yes"}
        network = dict(got)["Network"]
        assert network["DHCP"] == dhcp[nic.dhcp4, nic.dhcp6]
        assert dict(got).get("Link", {}).get("MTUBytes") == (str(nic.mtu) if nic.mtu else None)
