"""What every host of a cluster file has: each rule broken once; and what rendering promises about its output."""

from __future__ import annotations

import base64
import copy
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline import recipe, seed
from pipeline.errors import BuildError
from provision import cluster as model
from provision import host as hosts
from provision import render
from provision.model import RealServer


def public_key(kind: str = "ssh-ed25519", claim: str = "", cut: int = 0) -> str:
    """A key whose shape is right; nobody has its private half, because there is none."""
    blob = b"".join(len(part).to_bytes(4, "big") + part for part in (kind.encode(), bytes(32)))
    return f"{claim or kind} {base64.b64encode(blob[: len(blob) - cut]).decode()} somebody"


KEY = public_key()
HOST: dict[str, Any] = {
    "name": "lvs-1",
    "slot": 1,
    "interfaces": [
        {"name": "eth0", "mac": "52:54:00:aa:00:00", "addresses": ["192.0.2.14/24"]},
        {"name": "eth1", "mac": "52:54:00:aa:00:01", "addresses": ["192.168.100.254/24", "2001:db8::1/64"]},
    ],
    "uplink": "eth0",
    "downlink": "eth1",
    "router_id": "192.0.2.14",
    "ssh_authorized_keys": [],
    "sysctl": {"net.core.somaxconn": 1024},
    "files": {"/etc/motd": "hello\n"},
}
# The least that goes around a host.
CLUSTER: dict[str, Any] = {
    "mode": "ospf",
    "ssh_authorized_keys": [KEY],
    "vip_prefixes": ["203.0.113.0/24"],
    "ospf": {"area": "0.0.0.11"},
    "directors": [HOST],
    "services": [
        {
            "name": "web",
            "vips": ["203.0.113.1"],
            "ports": [80],
            "forwarding": "NAT",
            "real_servers": [{"address": "198.51.100.9"}],
        }
    ],
}
DIRECTOR = model.SCHEMA["properties"]["directors"]["items"]
HOST_KEYS = ", ".join(sorted(DIRECTOR["properties"]))


def around(host: Any) -> dict[str, Any]:
    return {**CLUSTER, "directors": [host]}


def write(folder: Path, data: Any) -> Path:
    path = folder / "cluster.yaml"
    text = data if isinstance(data, str) else yaml.safe_dump(around(data), sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def set_at(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return change


def delete(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


def nic(number: int = 0, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["interfaces"][number].update(values)


def handed(value: Any, path: str = "/etc/x") -> Callable[[dict[str, Any]], None]:
    return set_at("files", to={path: value})


def keys_are(*values: Any) -> Callable[[dict[str, Any]], None]:
    return set_at("ssh_authorized_keys", to=list(values))


KINDS = ", ".join(hosts._KEY_TYPES)
NOT_A_HOST = "is no address that a host can have"

# what is wrong: how to break it, and every line that must come of it (FOLDER is the host file's folder)
BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    # --- shapes
    "unknown key": (set_at("passwd", to="x"), [f"HOST: unknown key passwd (known: {HOST_KEYS})"]),
    "unknown key of an interface": (
        nic(adresses=[]),
        [
            "interfaces[0]: unknown key adresses "
            "(known: addresses, dhcp4, dhcp6, gateway4, gateway6, mac, mtu, name, routes)"
        ],
    ),
    "unknown key of a route": (
        nic(routes=[{"to": "198.51.100.0/24", "via": "192.0.2.1", "metric": 5}]),
        ["interfaces[0].routes[0]: unknown key metric (known: to, via)"],
    ),
    "unknown key of a file": (
        handed({"content": "", "owner": "frr"}),
        ["files./etc/x: unknown key owner (known: content, file, mode)"],
    ),
    "unknown key of a login key": (
        keys_are(KEY, {"file": "k", "user": "x"}),
        [
            "ssh_authorized_keys[1].file: FOLDER/k does not exist",
            "ssh_authorized_keys[1]: unknown key user (known: file)",
        ],
    ),
    "no name": (delete("name"), ["HOST: missing key name"]),
    "MTU out of range": (nic(mtu=65536), ["interfaces[0].mtu: 65536 is greater than the maximum of 65535"]),
    "type of an address": (nic(addresses=[7]), ["interfaces[0].addresses[0]: 7 is not of type 'string'"]),
    "type of a switch": (nic(dhcp4="yes"), ["interfaces[0].dhcp4: 'yes' is not of type 'boolean'"]),
    # --- name
    "capital letter": (
        set_at("name", to="LVS"),
        ["name: 'LVS' is no host name: labels of a-z, 0-9 and inner hyphens, joined by dots"],
    ),
    "name that climbs": (
        set_at("name", to="../x"),
        ["name: '../x' is no host name: labels of a-z, 0-9 and inner hyphens, joined by dots"],
    ),
    "long name": (set_at("name", to=".".join(["abcdefgh"] * 8)), ["name: 71 characters; Linux takes 64"]),
    # --- role
    "director without uplink": (delete("uplink"), ["HOST: missing key uplink"]),
    "director without downlink": (delete("downlink"), ["HOST: missing key downlink"]),
    "uplink that is not there": (
        set_at("uplink", to="eth7"),
        ["uplink: there is no interface 'eth7' (interfaces: eth0, eth1)"],
    ),
    "downlink of a host without interfaces": (
        delete("interfaces"),
        [
            "HOST: missing key interfaces",
            "downlink: there is no interface 'eth1' (interfaces: none)",
            "uplink: there is no interface 'eth0' (interfaces: none)",
        ],
    ),
    # --- interfaces
    "name of an interface": (
        lambda data: [nic(name="eth0/1")(data), set_at("uplink", to="eth0/1")(data)],
        ["interfaces[0].name: 'eth0/1' is no name for a NIC: up to 15 of A-Z a-z 0-9 _ . -, not lo"],
    ),
    "loopback": (
        lambda data: [nic(name="lo")(data), set_at("uplink", to="lo")(data)],
        ["interfaces[0].name: 'lo' is no name for a NIC: up to 15 of A-Z a-z 0-9 _ . -, not lo"],
    ),
    "name twice": (
        lambda data: [nic(1, name="eth0")(data), set_at("downlink", to="eth0")(data)],
        ["interfaces[1].name: eth0 stands already at interfaces[0].name"],
    ),
    "MAC": (
        nic(mac="52-54-00-aa-00-00"),
        ["interfaces[0].mac: '52-54-00-aa-00-00' is no hardware address: six pairs of hex digits, joined by colons"],
    ),
    "multicast MAC": (
        nic(mac="01:00:5e:00:00:05"),
        ["interfaces[0].mac: 01:00:5e:00:00:05 is a multicast address, which no NIC has"],
    ),
    "MAC twice": (
        nic(1, mac="52:54:00:AA:00:00"),
        ["interfaces[1].mac: 52:54:00:aa:00:00 stands already at interfaces[0].mac"],
    ),
    "MAC without quotes": (
        nic(mac=41134780800),
        [
            "interfaces[0].mac: 41134780800 is not of type 'string'",
            "interfaces[0].mac: write it in quotes: YAML reads digits and colons as a number",
        ],
    ),
    "no address": (
        nic(addresses=["192.0.2.300/24"]),
        ["interfaces[0].addresses[0]: '192.0.2.300/24' is no address with prefix length"],
    ),
    "no prefix length": (
        nic(addresses=["192.0.2.14"]),
        ["interfaces[0].addresses[0]: 192.0.2.14 has no prefix length"],
    ),
    "network address": (
        nic(addresses=["192.0.2.0/24"]),
        ["interfaces[0].addresses[0]: 192.0.2.0/24 is the network's own address"],
    ),
    "network address, IPv6": (
        nic(addresses=["2001:db8:7::/64"]),
        ["interfaces[0].addresses[0]: 2001:db8:7::/64 is the network's own address"],
    ),
    "broadcast address": (
        nic(addresses=["192.0.2.255/24"]),
        ["interfaces[0].addresses[0]: 192.0.2.255/24 is the network's broadcast address"],
    ),
    "multicast address": (nic(addresses=["224.0.0.5/4"]), [f"interfaces[0].addresses[0]: 224.0.0.5/4 {NOT_A_HOST}"]),
    "loopback address": (nic(addresses=["127.0.0.1/8"]), [f"interfaces[0].addresses[0]: 127.0.0.1/8 {NOT_A_HOST}"]),
    "address twice": (
        nic(addresses=["2001:db8:0::1/64"]),
        ["interfaces[1].addresses[1]: 2001:db8::1 stands already at interfaces[0].addresses[0]"],
    ),
    "small MTU with IPv6": (nic(1, mtu=1279), ["interfaces[1].mtu: 1279 is below 1280, with which IPv6 is turned off"]),
    # --- routers and routes
    "router elsewhere": (
        nic(gateway4="198.51.100.1"),
        ["interfaces[0].gateway4: 198.51.100.1 is on none of the interface's networks (192.0.2.0/24)"],
    ),
    "router of the other family": (
        nic(1, gateway4="2001:db8::2"),
        ["interfaces[1].gateway4: 2001:db8::2 is no IPv4 address"],
    ),
    "router that is the host": (
        nic(gateway4="192.0.2.14"),
        ["interfaces[0].gateway4: 192.0.2.14 is this interface's own address"],
    ),
    "router without an address": (
        nic(gateway6="fe80::1"),
        ["interfaces[0].gateway6: the interface has no IPv6 address of its own"],
    ),
    "IPv4 link-local router": (
        nic(gateway4="169.254.0.1"),
        ["interfaces[0].gateway4: 169.254.0.1 is on none of the interface's networks (192.0.2.0/24)"],
    ),
    "no router": (
        nic(gateway4="192.0.2.1/24"),
        ["interfaces[0].gateway4: '192.0.2.1/24' is no address without prefix length"],
    ),
    "two default routers": (
        lambda data: [nic(gateway4="192.0.2.1")(data), nic(1, gateway4="192.168.100.253")(data)],
        ["interfaces[1].gateway4: the host has a default router already at interfaces[0].gateway4"],
    ),
    "default router and DHCP": (
        nic(gateway4="192.0.2.1", dhcp4=True),
        ["interfaces[0].gateway4: DHCP brings a default router; take away this one or dhcp4"],
    ),
    "host bits": (
        nic(routes=[{"to": "198.51.100.1/24", "via": "192.0.2.1"}]),
        ["interfaces[0].routes[0].to: '198.51.100.1/24' is no network: address and prefix length, host bits zero"],
    ),
    "default route": (
        nic(1, routes=[{"to": "::/0", "via": "2001:db8::2"}]),
        ["interfaces[1].routes[0].to: a default route is said with gateway6"],
    ),
    "word default": (
        nic(routes=[{"to": "default", "via": "192.0.2.1"}]),
        ["interfaces[0].routes[0].to: 'default' is no network: address and prefix length, host bits zero"],
    ),
    "route twice": (
        nic(routes=[{"to": "198.51.100.0/24", "via": f"192.0.2.{n}"} for n in (1, 2)]),
        ["interfaces[0].routes[1].to: 198.51.100.0/24 stands already at interfaces[0].routes[0].to"],
    ),
    "route by a router elsewhere": (
        nic(routes=[{"to": "198.51.100.0/24", "via": "10.0.0.1"}]),
        ["interfaces[0].routes[0].via: 10.0.0.1 is on none of the interface's networks (192.0.2.0/24)"],
    ),
    "route by the other family": (
        nic(1, routes=[{"to": "198.51.100.0/24", "via": "2001:db8::2"}]),
        ["interfaces[1].routes[0].via: 2001:db8::2 is no IPv4 address"],
    ),
    # --- keys
    "no key": (keys_are("open sesame"), [f"ssh_authorized_keys[0]: no public key: it starts with one of {KINDS}"]),
    "weak key": (
        keys_are(public_key("ssh-dss")),
        [f"ssh_authorized_keys[0]: no public key: it starts with one of {KINDS}"],
    ),
    "key cut short": (
        keys_are(KEY, public_key(cut=3)),
        ["ssh_authorized_keys[1]: the ssh-ed25519 key is damaged or cut short"],
    ),
    "key of another kind": (
        keys_are(public_key("ssh-rsa", claim="ssh-ed25519")),
        ["ssh_authorized_keys[0]: the ssh-ed25519 key is damaged or cut short"],
    ),
    "two keys in one": (keys_are(f"{KEY}\n{KEY}"), ["ssh_authorized_keys[0]: more than one line"]),
    "private key": (
        keys_are("-----BEGIN OPENSSH PRIVATE KEY-----\n"),
        ["ssh_authorized_keys[0]: a private key; the public one is wanted"],
    ),
    "file of a private key": (
        keys_are({"file": "private"}),
        ["ssh_authorized_keys[0].file: private holds a private key; name the .pub file"],
    ),
    "file without keys": (keys_are({"file": "empty"}), ["ssh_authorized_keys[0].file: there is no key in empty"]),
    "file with a bad line": (
        keys_are({"file": "mixed"}),
        [f"ssh_authorized_keys[0].file: mixed:3: no public key: it starts with one of {KINDS}"],
    ),
    # --- kernel settings
    "no setting": (
        set_at("sysctl", to={"somaxconn": 1}),
        ["sysctl.somaxconn: no kernel setting: names joined by dots"],
    ),
    "settings by a pattern": (
        set_at("sysctl", to={"net.ipv4.conf.*.rp_filter": 0}),
        ["sysctl.net.ipv4.conf.*.rp_filter: no kernel setting: names joined by dots"],
    ),
    "switch as a word": (
        set_at("sysctl", to={"net.ipv4.ip_forward": True}),
        [
            "sysctl.net.ipv4.ip_forward: True is not of type 'integer', 'string'",
            "sysctl.net.ipv4.ip_forward: write 0 or 1",
        ],
    ),
    "setting of two lines": (
        set_at("sysctl", to={"kernel.panic": "1\nkernel.sysrq = 1"}),
        ["sysctl.kernel.panic: its value is empty, or more than one line"],
    ),
    "empty setting": (
        set_at("sysctl", to={"kernel.panic": " "}),
        ["sysctl.kernel.panic: its value is empty, or more than one line"],
    ),
    # --- files
    "outside /etc": (handed("", "/usr/bin/x"), ["files./usr/bin/x: no plain path of a file under /etc"]),
    "relative path": (handed("", "etc/x"), ["files.etc/x: no plain path of a file under /etc"]),
    "climbing path": (handed("", "/etc/../root/x"), ["files./etc/../root/x: no plain path of a file under /etc"]),
    "folder": (handed("", "/etc/x/"), ["files./etc/x/: no plain path of a file under /etc"]),
    "rendered file": (
        handed("", "/etc/lvs/host.conf"),
        ["files./etc/lvs/host.conf: not to be given as a file: rendered from uplink, downlink and local addresses"],
    ),
    "accounts": (
        handed("root::0:0::/root:/bin/sh\n", "/etc/passwd"),
        ["files./etc/passwd: not to be given as a file: a file would replace the accounts that the packages made"],
    ),
    "file that is a folder too": (
        set_at("files", to={"/etc/x": "", "/etc/x/y": ""}),
        ["files./etc/x: a file cannot also be the folder of /etc/x/y"],
    ),
    "neither content nor file": (
        handed({"mode": "0600"}),
        ["files./etc/x: exactly one of content and file is wanted"],
    ),
    "content and file": (
        handed({"content": "", "file": "empty"}),
        ["files./etc/x: exactly one of content and file is wanted"],
    ),
    "file that is not there": (handed({"file": "nothing"}), ["files./etc/x.file: FOLDER/nothing does not exist"]),
    "file that is a directory": (handed({"file": "."}), ["files./etc/x.file: FOLDER is no file"]),
    "file that is no text": (handed({"file": "latin1"}), ["files./etc/x.file: FOLDER/latin1 is not UTF-8 at byte 1"]),
    "file with a NUL": (handed({"file": "nul"}), ["files./etc/x.file: FOLDER/nul is no text: a NUL is in it"]),
    "large file": (
        handed({"file": "large"}),
        ["files./etc/x.file: FOLDER/large has 1048577 bytes; 1048576 are allowed"],
    ),
    "name with a NUL": (
        handed({"file": "a\0b"}),
        ["files./etc/x.file: FOLDER/a\0b does not exist"],
    ),
    "content with a NUL": (
        handed("a\0b"),
        ["files./etc/x.content: no text: a NUL or half a surrogate pair is in it"],
    ),
    "mode": (
        handed({"content": "", "mode": "4755"}),
        ["files./etc/x.mode: '4755' is no mode: four octal digits, the first a zero"],
    ),
    "mode without quotes": (
        handed({"content": "", "mode": 0o640}),
        [
            "files./etc/x.mode: 416 is not of type 'string'",
            "files./etc/x.mode: write it in quotes: YAML reads a leading zero as octal",
        ],
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files to refer to."""
    place = tmp_path / "in"
    place.mkdir()
    (place / "private").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blb\n", encoding="utf-8")
    (place / "empty").write_text("# nobody yet\n\n", encoding="utf-8")
    (place / "mixed").write_text(f"# team\n{KEY}\nnot a key\n", encoding="utf-8")
    (place / "latin1").write_bytes(b"h\xe9llo")
    (place / "nul").write_bytes(b"h\0llo")
    (place / "large").write_bytes(b"x" * ((1 << 20) + 1))
    return place


def refusal(folder: Path, out: Path, data: Any) -> BuildError:
    """The error of rendering; nothing may have been written."""
    path = write(folder, data)
    with pytest.raises(BuildError) as caught:
        render.render_cluster(path, out)
    assert not out.exists()
    return caught.value


def at_host(line: str) -> str:
    """A line of a case as the whole file's error has it: paths start at the cluster."""
    if line.startswith("HOST"):
        return line.replace("HOST", "directors[0]", 1)
    return "directors[0]." + line.replace("at interfaces", "at directors[0].interfaces")


def test_the_good_host_is_good(folder: Path, tmp_path: Path) -> None:
    assert model.load(write(folder, HOST)).directors[0].name == "lvs-1"
    assert len(BAD) >= 65


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input(case: str, folder: Path, tmp_path: Path) -> None:
    change, expected = BAD[case]
    data = copy.deepcopy(HOST)
    change(data)
    error = refusal(folder, tmp_path / "out", data)
    assert [line.replace(str(folder), "FOLDER") for line in error.details] == sorted(map(at_host, expected))
    count = f"{len(expected)} problem{'s' if len(expected) > 1 else ''}"
    assert error.message == f"{folder}/cluster.yaml: {count}"
    assert error.hint == f"correct {folder}/cluster.yaml"


def test_all_problems_at_once(folder: Path, tmp_path: Path) -> None:
    """Those of the schema do not hide those of the rules."""
    data = copy.deepcopy(HOST)
    broken = [
        "unknown key",
        "mode without quotes",
        "MAC",
        "key cut short",
        "setting of two lines",
    ]
    expected: list[str] = []
    for name in broken:
        BAD[name][0](data)
        expected += BAD[name][1]
    error = refusal(folder, tmp_path / "out", data)
    assert [line.replace(str(folder), "FOLDER") for line in error.details] == sorted(map(at_host, expected))


@pytest.mark.parametrize("data", ["", "just words\n", "- a\n- list\n", "3\n", "null\n"])
def test_no_mapping(data: str, folder: Path, tmp_path: Path) -> None:
    assert "is not of type 'object'" in "\n".join(refusal(folder, tmp_path / "out", data).details)


def test_no_yaml_says_where(folder: Path, tmp_path: Path) -> None:
    error = refusal(folder, tmp_path / "out", "mode: [ospf\n- x\n")
    assert error.message.startswith(f"{folder}/cluster.yaml:3:1: ")


def test_a_key_twice(folder: Path, tmp_path: Path) -> None:
    error = refusal(folder, tmp_path / "out", "mode: ospf\nmode: vrrp\n")
    assert error.message == f"{folder}/cluster.yaml:2:1: duplicate key 'mode'"


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        model.load(tmp_path / "cluster.yaml")
    assert caught.value.message == f"{tmp_path}/cluster.yaml does not exist"


def test_cluster_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_bytes(b"mode: \xff\n")
    with pytest.raises(BuildError) as caught:
        model.load(tmp_path / "cluster.yaml")
    assert caught.value.message == f"{tmp_path}/cluster.yaml: not UTF-8 at byte 6"


SHAPES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70000) | st.text(max_size=8) | st.sampled_from(["::1", "eth0", "0640"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            [
                *DIRECTOR["properties"],
                *(key for part in model.SCHEMA["$defs"].values() for key in part.get("properties", ())),
                *("id", "instances", "laddr_g1", "addresses", "per_director", "without", "/etc/x"),
            ]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*model.SCHEMA["properties"]]), SHAPES, max_size=7))
def test_any_shape_is_refused_or_read(data: dict[str, Any]) -> None:
    """The rules run over what the schema has already found wrong: they must not stumble."""
    problems = recipe.check(data, model.SCHEMA, "cluster.yaml")
    model._Reader(Path("/nonexistent/cluster.yaml"), problems, secrets=True).cluster(data)
    if {*model.SCHEMA["required"]} - data.keys():
        assert problems


@given(st.dictionaries(st.sampled_from([*model.SCHEMA["$defs"]["service"]["properties"]]), SHAPES, max_size=7))
def test_any_shape_of_a_service_is_refused_or_read(service: dict[str, Any]) -> None:
    data = {**CLUSTER, "services": [{**CLUSTER["services"][0], **service}]}
    problems = recipe.check(data, model.SCHEMA, "cluster.yaml")
    model._Reader(Path("/nonexistent/cluster.yaml"), problems, secrets=True).cluster(data)


# --- what is accepted


def test_point_to_point_and_single_addresses(folder: Path) -> None:
    data = copy.deepcopy(HOST)
    nic(addresses=["192.0.2.0/31", "198.51.100.7/32", "2001:db8:5::/127"], gateway4="192.0.2.1")(data)
    host = model.load(write(folder, data)).directors[0]
    assert host.interfaces[0].addresses == ("192.0.2.0/31", "198.51.100.7/32", "2001:db8:5::/127")


def test_settings_of_the_host_win(folder: Path) -> None:
    data = copy.deepcopy(HOST)
    data["sysctl"] = {"net.ipv4.conf.all.arp_ignore": 2}
    settings = model.load(write(folder, data)).directors[0].kernel_settings
    assert list(settings.items()) == [
        ("net.ipv4.conf.all.arp_ignore", "2"),
        ("net.ipv4.conf.all.arp_announce", "2"),
        ("net.core.netdev_max_backlog", "500000"),
    ]


def test_every_rendered_path_is_reserved() -> None:
    paths = {path for path in render.template_paths() if "@SERVICE@" not in path}
    assert paths
    assert {*paths, render.FILES, render.NETWORK} <= hosts.RESERVED.keys()


# --- what rendering promises


def test_any_change_makes_a_new_instance(folder: Path) -> None:
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda data: None,
        set_at("name", to="lvs-2"),
        set_at("name", to="lvs-1.example.org"),
        set_at("irq_cpus", to="all-cpus"),
        nic(mtu=9000),
        nic(gateway4="192.0.2.1"),
        set_at("router_id", to="192.0.2.15"),
        keys_are(public_key("ssh-rsa")),
        set_at("sysctl", to={"net.core.somaxconn": 1025}),
        handed("hello\n"),
        handed({"content": "hello\n", "mode": "0600"}),
    ]
    seen = set()
    for change in changes:
        data = copy.deepcopy(HOST)
        change(data)
        cluster = model.load(write(folder, data))
        files = render.Renderer(cluster).root_files(cluster.directors[0])
        seen.add(yaml.safe_load(render.seed_files(cluster.directors[0], files)["meta-data"])["instance-id"])
    assert len(seen) == len(changes)


@example("  leading blanks\n and a line\n")
@example("\n\nempty lines\n\n")
@example("\x85")
@example("a\u2028b\n")
@example("\ufeffbyte order mark\n")
@example("carriage\r\nreturn")
@example("--- \n...\n%YAML\n")
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_arrives_as_it_is(text: str) -> None:
    host = RealServer(name="h", ssh=("h", 0), ssh_authorized_keys=(KEY,), files=(hosts.File("/etc/x", text, 0o640),))
    user = render.seed_files(host, host.files)["user-data"]
    assert yaml.safe_load(user.encode())["write_files"] == [{"path": "/etc/x", "permissions": "0640", "content": text}]


def test_an_undefined_variable_is_an_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "templates/etc").mkdir(parents=True)
    (tmp_path / "templates/etc/x.j2").write_text("{{ host.nmae }}\n", encoding="utf-8")
    monkeypatch.setattr(render, "TEMPLATES", tmp_path / "templates")
    with pytest.raises(jinja2.UndefinedError, match="nmae"):
        render.render_cluster(write(folder, HOST), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_templates_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "TEMPLATES", tmp_path)
    with pytest.raises(BuildError, match="no template in"):
        render.template_paths()


def test_a_new_result_replaces_the_old_one_whole(folder: Path, tmp_path: Path) -> None:
    (target,) = render.render_cluster(write(folder, HOST), tmp_path / "out")
    assert (target / "rootfs/etc/motd").is_file()
    data = copy.deepcopy(HOST)
    del data["files"]
    del data["interfaces"][1]["addresses"][1]
    assert render.render_cluster(write(folder, data), tmp_path / "out") == [target]
    assert not (target / "rootfs/etc/motd").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["lvs-1"]


def test_a_result_is_its_owners_alone(folder: Path, tmp_path: Path) -> None:
    (target,) = render.render_cluster(write(folder, HOST), tmp_path / "out")
    assert target.stat().st_mode & 0o7777 == 0o700


def test_something_else_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out/lvs-1/photo"
    mine.parent.mkdir(parents=True)
    mine.write_text("x", encoding="utf-8")
    with pytest.raises(BuildError, match=r"lvs-1 is there and is no rendered host"):
        render.render_cluster(write(folder, HOST), tmp_path / "out")
    assert mine.read_text(encoding="utf-8") == "x"
    assert os.listdir(mine.parent) == ["photo"]


def test_a_failed_write_leaves_the_old_result(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, HOST)
    (target,) = render.render_cluster(path, tmp_path / "out")
    before = (target / "seed/meta-data").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    data = copy.deepcopy(HOST)
    data["slot"] = 2
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(seed, "write", full)
        render.render_cluster(write(folder, data), tmp_path / "out")
    assert (target / "seed/meta-data").read_bytes() == before
    assert (target / "seed.iso").is_file()
    # and what is left beside does not stand in the way of the next run
    render.render_cluster(path, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["lvs-1"]


def test_killed_before_the_old_result_was_removed(folder: Path, tmp_path: Path) -> None:
    path = write(folder, HOST)
    (target,) = render.render_cluster(path, tmp_path / "out")
    target.rename(tmp_path / "out/.lvs-1.old")
    render.render_cluster(path, tmp_path / "elsewhere")[0].rename(target)
    assert render.render_cluster(path, tmp_path / "out") == [target]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["lvs-1"]


def test_two_at_once_take_turns(folder: Path, tmp_path: Path) -> None:
    path, out = write(folder, HOST), tmp_path / "out"
    out.mkdir()
    other = threading.Thread(target=render.render_cluster, args=(path, out))
    with render._alone(out):
        other.start()
        other.join(timeout=0.3)  # rendering takes a tenth of this; too short a wait could only hide a fault
        assert other.is_alive()
        assert not list(out.iterdir())
    other.join(timeout=60)
    assert [p.name for p in out.iterdir()] == ["lvs-1"]


def test_killed_between_the_renames(folder: Path, tmp_path: Path) -> None:
    path = write(folder, HOST)
    (target,) = render.render_cluster(path, tmp_path / "out")
    target.rename(tmp_path / "out/.lvs-1.old")
    (tmp_path / "out/.lvs-1.new/rootfs").mkdir(parents=True)
    assert render.render_cluster(path, tmp_path / "out") == [target]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["lvs-1"]
