"""A small fleet of golden images, each machine made what it is by its seed alone:

    router, client (eth1) ── uplink ─┬─ (eth1) lvs-1 (eth2) ─┬─ downlink ── (eth1) rs-1, two addresses, programs
                                     └─ (eth1) lvs-2 (eth2) ─┘                      in mode vrrp

The router is a director's image with routing daemons only, as the border of the area that directors are in. eth0 of
each machine is for ssh and leads nowhere else. The links are UDP between QEMU processes on this machine: no privilege
is needed, and frames for a machine that is not there are lost, as they are on a cable. The router and the real server
have a hub each inside their QEMU, with a cable to each director.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from image import bake, verify
from pipeline import run, seed, settings, vm
from pipeline.store import Store
from provision.lab import machines

DIRECTOR, BACKUP, REAL, ROUTER = "lvs-1", "lvs-2", "rs-1", "router"
DIRECTORS = (DIRECTOR, BACKUP)
_MACHINES = 4
CONTROL = "10.0.2.15/24"  # where QEMU forwards ssh to; its DHCP gives the same address
MACS = {
    DIRECTOR: "52:54:00:00:01:00",
    ROUTER: "52:54:00:00:02:00",
    REAL: "52:54:00:00:03:00",
    BACKUP: "52:54:00:00:04:00",
    f"up-{DIRECTOR}": "52:54:00:00:01:01",
    f"down-{DIRECTOR}": "52:54:00:00:01:02",
    f"up-{BACKUP}": "52:54:00:00:04:01",
    f"down-{BACKUP}": "52:54:00:00:04:02",
    "edge": "52:54:00:00:02:01",
    "real": "52:54:00:00:03:01",
}
OSPF_KEY, VRRP_PASSWORD, VTY_PASSWORD = "o5pfkey", "vrrppw", "vtypw"
VIPS = ("203.0.113.1", "203.0.113.2", "2001:db8:ffff::1")
SETTLED = 30.0  # seconds under KVM, multiplied for TCG: OSPF's own times

COMMON: dict[str, Any] = {
    "vip_prefixes": ["203.0.113.0/24", "2001:db8:ffff::/64"],
    "local_addresses": {
        "laddr_g1": {"addresses": ["10.64.0.1-10.64.0.8", "2001:db8:64::1-2001:db8:64::8"], "per_director": 4}
    },
    "directors": [
        {
            "name": DIRECTOR,
            "slot": 1,
            "uplink": "eth1",
            "downlink": "eth2",
            "interfaces": [
                {"name": "eth0", "mac": MACS[DIRECTOR], "dhcp4": True},
                {
                    "name": "eth1",
                    "mac": MACS[f"up-{DIRECTOR}"],
                    "addresses": ["192.0.2.2/24", "2001:db8:2::2/64"],
                    "gateway4": "192.0.2.1",
                    "gateway6": "2001:db8:2::1",
                },
                {
                    "name": "eth2",
                    "mac": MACS[f"down-{DIRECTOR}"],
                    "addresses": ["10.64.255.254/16", "2001:db8:64::ff/64"],
                    "routes": [{"to": "10.65.0.0/16", "via": "10.64.1.1"}],
                },
            ],
        }
    ],
    "real_servers": [
        {
            "name": REAL,
            "interfaces": [
                {"name": "eth0", "mac": MACS[REAL], "dhcp4": True},
                {
                    "name": "eth1",
                    "mac": MACS["real"],
                    "addresses": ["10.64.1.1/16", "10.64.1.2/16", "2001:db8:64::1:1/64", "2001:db8:64::1:2/64"],
                },
            ],
            "sysctl": {"net.core.somaxconn": 4096},
        }
    ],
    "services": [
        {
            "name": "web",
            "vips": [VIPS[0], VIPS[2]],
            "ports": [80],
            "delay_loop": 3,
            "inhibit_on_failure": True,
            "check": {"http": {"path": "/index.html"}},
            "real_servers": [
                {"address": address} for address in ("10.64.1.1", "10.64.1.2", "2001:db8:64::1:1", "2001:db8:64::1:2")
            ],
        },
        {
            "name": "shop",
            "vips": [VIPS[1]],
            "ports": [8080],
            "scheduler": "wrr",
            "delay_loop": 3,
            "real_servers": [
                {"address": "10.64.1.1", "port": 80, "weight": 100},
                {"address": "10.64.1.2", "port": 80, "weight": 300},
            ],
        },
    ],
}
OSPF: dict[str, Any] = {
    "mode": "ospf",
    **COMMON,
    "ospf": {
        "area": "0.0.0.11",
        "stub": True,
        "hello_interval": 3,
        "dead_interval": 12,
        "key": {"id": 8, "secret": {"file": "ospf"}},
    },
    "vty": {"password": {"file": "vty"}},
}
VRRP: dict[str, Any] = {
    "mode": "vrrp",
    **copy.deepcopy(COMMON),
    "vrrp": {"instances": [{"name": "VI_1", "id": 200, "password": {"file": "vrrp"}}]},
}
VRRP["directors"][0]["priority"] = 150
VRRP["directors"].append(
    {
        "name": BACKUP,
        "slot": 2,
        "priority": 90,
        "uplink": MACS[f"up-{BACKUP}"],
        "downlink": MACS[f"down-{BACKUP}"],
        "interfaces": [
            {"name": "eth0", "mac": MACS[BACKUP], "dhcp4": True},
            {
                "name": "eth1",
                "mac": MACS[f"up-{BACKUP}"],
                "addresses": ["192.0.2.3/24", "2001:db8:2::3/64"],
                "gateway4": "192.0.2.1",
                "gateway6": "2001:db8:2::1",
            },
            {
                "name": "eth2",
                "mac": MACS[f"down-{BACKUP}"],
                "addresses": ["10.64.255.253/16", "2001:db8:64::fe/64"],
            },
        ],
    }
)

_OSPFD = f"""hostname router
interface eth1
 ip ospf message-digest-key 8 md5 {OSPF_KEY}
 ip ospf hello-interval 3
 ip ospf dead-interval 12
router ospf
 ospf router-id 192.0.2.1
 network 192.0.2.0/24 area 0.0.0.11
 network 10.0.2.0/24 area 0.0.0.0
 area 0.0.0.11 authentication message-digest
 area 0.0.0.11 stub no-summary
"""
_OSPF6D = f"""hostname router
interface eth0
 ipv6 ospf6 area 0.0.0.0
interface eth1
 ipv6 ospf6 area 0.0.0.11
 ipv6 ospf6 hello-interval 3
 ipv6 ospf6 dead-interval 12
 ipv6 ospf6 authentication key-id 8 hash-algo md5 key {OSPF_KEY}
router ospf6
 ospf6 router-id 192.0.2.1
 area 0.0.0.11 stub no-summary
"""


def router_seed(public_key: str) -> dict[str, str]:
    """The router's seed; it is in no cluster file, as a real one is not."""
    files = {"zebra": "hostname router\n", "ospfd": _OSPFD, "ospf6d": _OSPF6D}
    user = {
        "hostname": ROUTER,
        "ssh_authorized_keys": [public_key],
        "write_files": [
            {"path": f"/etc/quagga/{name}.conf", "owner": "frr:frr", "permissions": "0640", "content": text}
            for name, text in files.items()
        ],
    }
    ethernets = {
        "eth0": {"match": {"macaddress": MACS[ROUTER]}, "set-name": "eth0", "addresses": [CONTROL]},
        "eth1": {
            "match": {"macaddress": MACS["edge"]},
            "set-name": "eth1",
            "addresses": ["192.0.2.1/24", "2001:db8:2::1/64"],
        },
    }
    parts = {
        "user-data": "#cloud-config\n" + yaml.safe_dump(user),
        "network-config": yaml.safe_dump({"version": 2, "ethernets": ethernets}),
    }
    identity = seed.instance_id(*parts.values())
    return {**parts, "meta-data": f"instance-id: {identity}\nlocal-hostname: {ROUTER}\n"}


class Fleet:
    """The machines, and what an operator types about them.

    Attributes:
        file: the cluster file.
        machines: by name.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.file = work / "cluster.yaml"
        self.machines: dict[str, vm.Machine] = {}
        ends = [f"{end}-{name}" for name in DIRECTORS for end in ("up", "edge", "down", "real")]
        self._ports = dict(zip(ends, udp_ports(len(ends)), strict=True))
        self._store = Store()
        self._accelerator = machines.accelerator(self._store, _MACHINES)
        self._line = bake.Line(self._store)
        self._stacks: dict[str, contextlib.ExitStack] = {}
        self._key = vm.make_key(work)
        self._public = Path(f"{self._key}.pub").read_text(encoding="ascii").strip()
        for name, text in (("ospf", OSPF_KEY), ("vrrp", VRRP_PASSWORD), ("vty", VTY_PASSWORD)):
            (work / name).write_text(f"{text}\n", encoding="ascii")
            (work / name).chmod(0o600)

    # --- machines

    def start(self, name: str) -> None:
        """Boot a machine on its disk, which it keeps from one boot to the next, with its seed of now."""
        role = "realserver" if name == REAL else "director"
        machine = vm.Machine(
            name,
            self.work / name,
            self._accelerator,
            disks=[vm.Disk(self._disk(name, role))],
            seed=self._seed(name),
            memory=512,
            cpus=machines.cpus(role if name in (*DIRECTORS, REAL) else ROUTER),
            ssh_key=self._key,
            login=False,
            extra=[
                # of the NIC that has none said
                *("-global", f"virtio-net-pci.mac={MACS[name]}"),
                *self._links(name),
            ],
        )
        stack = contextlib.ExitStack()
        self.machines[name] = stack.enter_context(machine)
        self._stacks[name] = stack
        self._write_ssh_config()

    def booted(self, name: str) -> None:
        """Wait until the seed is applied."""
        machines.settle(self.machines[name])

    def show_clients(self) -> None:
        """Let the real server's programs see clients."""
        machines.show_clients(self.machines[REAL], bake.toa_bpf)

    def stop(self, name: str) -> None:
        """Shut a machine down in order; its disk stays."""
        self.machines[name].power_off()
        self._stacks.pop(name).close()
        del self.machines[name]

    def cut(self, name: str, pattern: str) -> None:
        """Pull a machine's plug when its console shows something; its disk has what was brought there."""
        machine = self.machines[name]
        machine.wait_for(pattern, SETTLED)
        machine.kill()
        self._stacks.pop(name).close()
        del self.machines[name]

    def close(self) -> None:
        """End all machines."""
        for stack in self._stacks.values():
            stack.close()

    def ask(self, name: str, command: str, *, check: bool = True) -> str:
        """What a command on a machine prints."""
        return self.machines[name].run(command, check=check).stdout.strip()

    def until(self, name: str, command: str, what: str) -> None:
        """Wait until a command on a machine succeeds."""
        run.wait_until(
            lambda: self.machines[name].run(command, check=False).returncode == 0,
            deadline=SETTLED * self._accelerator.scale,
            what=f"{name}: {what}",
            hint=command,
            tail_of=lambda: self.machines[name].run(command, check=False).stdout.splitlines()[-20:],
        )

    def seconds(self, seconds: float) -> float:
        """A deadline as it is for KVM, turned into one for this machine's accelerator."""
        return seconds * self._accelerator.scale

    def _disk(self, name: str, role: str) -> Path:
        base = verify.qcow2(self._store.ensure(self._line.image(role).finished))
        return machines.overlay(base, self.work / f"{name}.qcow2")

    def _seed(self, name: str) -> Path:
        if name != ROUTER:
            return self.work / "hosts" / name / "seed.iso"
        path = self.work / "router.iso"
        seed.write(path, router_seed(self._public))
        return path

    def _links(self, name: str) -> list[str]:
        """A machine's NICs beside eth0, and their cables."""
        if name in DIRECTORS:
            pairs = [(f"{here}-{name}", f"{there}-{name}") for here, there in (("up", "edge"), ("down", "real"))]
            return [word for here, there in pairs for word in machines.cable(here, MACS[here], self._udp(here, there))]
        here, there = ("edge", "up") if name == ROUTER else ("real", "down")
        words = machines.cable(here, MACS[here], "hubport,hubid=1")
        for director in DIRECTORS:
            end = f"{here}-{director}"
            words += machines.backend(end, self._udp(end, f"{there}-{director}"))
            words += ["-netdev", f"hubport,id=port-{director},hubid=1,netdev={here}-{director}"]
        return words

    def _udp(self, here: str, there: str) -> str:
        ports = {"local": self._ports[here], "remote": self._ports[there]}
        ends = (f"{end}.type=inet,{end}.host=127.0.0.1,{end}.port={port}" for end, port in ports.items())
        return f"dgram,{','.join(ends)}"

    # --- what an operator types

    def write(self, data: dict[str, Any]) -> None:
        """Write the cluster file and render it."""
        text = yaml.safe_dump({**data, "ssh_authorized_keys": [self._public]}, sort_keys=False)
        self.file.write_text(text, encoding="utf-8")
        self.invoke("render", "--out", str(self.work / "hosts"))

    def invoke(self, task: str, *words: str, check: bool = True) -> run.Result:
        """A task on the cluster file, as it is typed."""
        reach = [] if task == "render" else ["--ssh-config", str(self.work / "ssh_config")]
        argv = [sys.executable, "-m", "invoke", task, "--cluster", str(self.file), *reach, *words]
        result = run.run(
            argv, cwd=settings.TOP, env={"HOME": os.environ["HOME"]}, check=False, timeout=self.seconds(100)
        )
        assert not check or result.returncode == 0, f"invoke {task}: {result.stdout}{result.stderr}"
        return result

    def check(self, *hosts: str, k: str = "", client: bool = False) -> dict[tuple[str, str], tuple[str, str]]:
        """`invoke check`: by host and check, its result and what it said; the exit status must be of these."""
        out = self.work / "check.json"
        words = [word for host in hosts for word in ("--host", host)]
        words += ["-k", k] if k else []
        words += ["--client", ROUTER] if client else []
        result = self.invoke("check", *words, "--json", str(out), check=False)
        assert out.exists(), result.stdout + result.stderr
        found = {
            (each["host"], each["check"]): (each["result"], each["message"]) for each in json.loads(out.read_text())
        }
        out.unlink()
        assert (result.returncode == 0) == all(word != "failed" for word, _ in found.values())
        return found

    def _write_ssh_config(self) -> None:
        texts = [machine.ssh_config.read_text(encoding="utf-8") for machine in self.machines.values()]
        (self.work / "ssh_config").write_text("".join(texts), encoding="utf-8")


@contextlib.contextmanager
def fleet(work: Path) -> Iterator[Fleet]:
    """Three machines, booted at once with the seeds of mode ospf, programs running on the real server."""
    found = Fleet(work)
    try:
        found.write(OSPF)
        for name in (DIRECTOR, ROUTER, REAL):
            found.start(name)
        for name in (REAL, ROUTER, DIRECTOR):
            found.booted(name)
        found.ask(REAL, SERVE)
        found.show_clients()
        yield found
    finally:
        found.close()


def udp_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


# Whatever a real server serves is its owner's; here it is a page.
SERVE = """
mkdir -p /srv/www && echo rs-1 >/srv/www/index.html
systemd-run --quiet --unit=web python3 -m http.server 80 --bind :: --directory /srv/www
"""
