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
from provision import host as model
from provision import render

pytestmark = pytest.mark.build

TOP = Path(__file__).parent.parent.parent
HOSTS = [
    *sorted((TOP / "tests/cases/render").glob("*/host.yaml")),
    *sorted((TOP / "provision/examples").glob("*.yaml")),
]
CloudInit = Callable[..., run.Result]


def name_of(path: Path) -> str:
    return path.parent.name if path.name == "host.yaml" else path.stem


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


def test_there_are_hosts() -> None:
    assert len(HOSTS) >= 7


@pytest.mark.parametrize("path", HOSTS, ids=name_of)
def test_user_data_is_valid(path: Path, tmp_path: Path, cloud_init: CloudInit) -> None:
    target = render.render_host(path, tmp_path)
    result = cloud_init("schema", "--config-file", f"/mnt/{target.name}/seed/user-data")
    assert "Valid cloud-config" in result.stdout + result.stderr


def test_the_check_can_fail(tmp_path: Path, cloud_init: CloudInit) -> None:
    (tmp_path / "user-data").write_text("#cloud-config\nwrite_files:\n  - content: x\n", encoding="utf-8")
    assert cloud_init("schema", "--config-file", "/mnt/user-data", check=False).returncode != 0


def sections(text: str) -> list[tuple[str, dict[str, str]]]:
    """The sections of a .network file, of which several may have one name."""
    found = []
    for part in re.split(r"(?m)^(?=\[)", text):
        if part.strip():
            parser = configparser.ConfigParser(interpolation=None)
            parser.optionxform = str  # type: ignore[assignment,method-assign]
            parser.read_string(part)
            name = parser.sections()[0]
            found.append((name, dict(parser[name])))
    return found


@pytest.mark.parametrize("path", [p for p in HOSTS if model.load(p).interfaces], ids=name_of)
def test_networkd_gets_what_was_asked_for(path: Path, tmp_path: Path, cloud_init: CloudInit) -> None:
    host = model.load(path)
    target = render.render_host(path, tmp_path)
    names = [word for i in host.interfaces for word in ("-m", f"{i.name},{i.mac}")]
    source = f"/mnt/{target.name}/seed/network-config"
    cloud_init(*"devel net-convert -k yaml -D debian -O networkd -d /mnt/net".split(), "-p", source, *names)
    folder = tmp_path / "net/etc/systemd/network"
    assert len(list(folder.iterdir())) == len(host.interfaces)
    for interface in host.interfaces:
        got = sections((folder / f"10-cloud-init-{interface.name}.network").read_text(encoding="utf-8"))
        assert ("Match", {"MACAddress": interface.mac, "Name": interface.name}) in got
        assert sorted(keys["Address"] for name, keys in got if name == "Address") == sorted(interface.addresses)
        routes = {(keys.get("Destination"), keys["Gateway"]) for name, keys in got if name == "Route"}
        wanted: set[tuple[str | None, str]] = {(route.to, route.via) for route in interface.routes}
        wanted |= {(None, router) for router in (interface.gateway4, interface.gateway6) if router}
        assert routes == wanted
        dhcp = {(False, False): "no", (True, False): "ipv4", (False, True): "ipv6", (True, True): "yes"}
        network = dict(got)["Network"]
        assert network["DHCP"] == dhcp[interface.dhcp4, interface.dhcp6]
        assert dict(got).get("Link", {}).get("MTUBytes") == (str(interface.mtu) if interface.mtu else None)
