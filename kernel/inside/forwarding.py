"""Process 1 of the machine of `invoke bench-forwarding`: measures, and leaves a line of JSON for every figure.

    client ── director ── real server        namespaces, joined by two veth pairs

A *side* is a set of modules and a forwarding method: `fullnat` and `nat` with the modules under test, `stock` is NAT
with the unpatched ones. Each side of each round begins with modules loaded anew, so no side sees what another left in
the connection table, and NAT runs in a module that knows of no local address.

The programs are ab, iperf3 and nginx, because they spend few instructions themselves. Measured with ticks of
/proc/stat: of what a connection costs, 13 to 16 % is user space (ab and nginx); of bulk data 3 % (iperf3). The rest is
the kernel, three hosts' worth of it: what a ratio shows of IPVS is diluted by the two stacks at the ends, as it is on
hosts.

`/out/plan.json` says how much to do (see `kernel/bench.py`), `/out/results.jsonl` takes the lines.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import re
import socket
import struct
import subprocess  # noqa: TID251  pipeline/run.py is not in the machine
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

CLIENT, DIRECTOR, SERVER = "client", "director", "server"
VIP = {4: "192.0.2.1", 6: "2001:db8:8::1"}
REAL = {4: "10.0.2.11", 6: "fd00:2::11"}
LOCAL = {4: ("10.0.2.200", "10.0.2.201", "10.0.2.202"), 6: ("fd00:2::200",)}
HTTP, BULK = 80, 443
# Services of the pool trial: the same real server, each with a local address, hence with a pool of ports, of its own.
POOLS = {"empty": HTTP, "scattered": 81, "block": 82}
PORTS = 65535 - 5000 + 1  # fullnat_lport_min and _max as they are from the start
TAKEN = 0.9
# Fixed, so that neither memory nor the length of chains depends on the configuration's default.
TABLE_BITS = 18
# Windows and blocks of iperf3. Without them its figures jump by 5 to 10 %: windows grow by chance, and what is left of
# a block after the last full segment is sent on its own or not, depending on the segment size.
BULK_WORDS = ("-w", "256K", "-l", "1M")
CLOSED = 11  # seconds after which a connection that saw a RST is gone; IPVS waits ten
OUT = "/out"
SERVERS = "/sys/fs/cgroup/servers"  # the programs of the real server
NGINX = """daemon off; master_process off; pid /tmp/nginx.pid; error_log stderr;
events { worker_connections 1024; }
http { access_log off;
server { listen 80; listen [::]:80 ipv6only=on; default_type text/plain; return 200 "ok\\n"; } }
"""


class Failed(Exception):
    """Something could not be measured."""


def say(**fields: Any) -> None:
    """One line for the host."""
    with open(f"{OUT}/results.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps(fields) + "\n")


def run(*argv: str, where: str = "", stdin: str = "") -> str:
    """Run a command in a namespace ("": the machine's own) and return what it printed.

    Raises:
        Failed: it ended with another status than 0; with all of its output.
    """
    line = ["ip", "netns", "exec", where, *argv] if where else list(argv)
    done = subprocess.run(line, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(f"$ {' '.join(line)}   [status {done.returncode}]\n{stdin}{done.stdout}{done.stderr}")
    return done.stdout


def start(*argv: str, where: str) -> None:
    """Start a server."""
    sink = open(f"/tmp/{argv[0]}.log", "w", encoding="utf-8")  # noqa: S108  the machine's own, gone with it
    subprocess.Popen(["ip", "netns", "exec", where, *argv], stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)


def write(path: str, text: str) -> None:
    """Write a file."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)


def sysctl(where: str, **values: int) -> None:
    """Set sysctls of a namespace; `__` stands for a dot."""
    run("sysctl", "-qw", *(f"{name.replace('__', '.')}={value}" for name, value in values.items()), where=where)


def bracketed(address: str) -> str:
    """An address as it stands before a port."""
    return f"[{address}]" if ":" in address else address


# --- the hosts


def build() -> None:
    """Make the namespaces, their addresses and the servers; mount what programs of BPF are attached to and kept in."""
    run("mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup")
    run("mount", "-t", "bpf", "bpf", "/sys/fs/bpf")
    run("ip", "link", "set", "lo", "up")
    for name in (CLIENT, DIRECTOR, SERVER):
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "set", "lo", "up")
        sysctl(name, net__ipv6__conf__default__accept_dad=0, net__ipv6__conf__default__router_solicitations=0)
    for here, there, far in (("front", "eth0", CLIENT), ("back", "eth0", SERVER)):
        run("ip", "link", "add", here, "netns", DIRECTOR, "type", "veth", "peer", "name", there, "netns", far)
    mine = ["link set front up", "link set back up"]
    mine += ["addr add 198.51.100.1/24 dev front", "addr add 2001:db8:1::1/64 dev front"]
    mine += ["addr add 10.0.2.1/24 dev back", "addr add fd00:2::1/64 dev back"]
    mine += [f"addr add {VIP[family]} dev lo" for family in VIP]
    mine += [f"addr add {address} dev back" for family in LOCAL for address in LOCAL[family]]
    batch(DIRECTOR, mine)
    routes = ["route add default via 198.51.100.1", "route add default via 2001:db8:1::1"]
    addresses = ["addr add 198.51.100.11/24 dev eth0", "addr add 2001:db8:1::11/64 dev eth0"]
    batch(CLIENT, ["link set eth0 up", *addresses, *routes])
    # NAT needs the way back; FULLNAT has it as well, to differ in nothing.
    routes = ["route add default via 10.0.2.1", "route add default via fd00:2::1"]
    batch(SERVER, ["link set eth0 up", f"addr add {REAL[4]}/24 dev eth0", f"addr add {REAL[6]}/64 dev eth0", *routes])
    sysctl(DIRECTOR, net__ipv4__ip_forward=1, net__ipv6__conf__all__forwarding=1)
    for name in (CLIENT, SERVER):
        # Nothing that one measurement leaves may reach the next: no remembered windows, no sockets in TIME_WAIT.
        sysctl(name, net__ipv4__tcp_no_metrics_save=1, net__ipv4__tcp_max_tw_buckets=0)
    write("/tmp/nginx.conf", NGINX)  # noqa: S108  the machine's own, gone with it
    os.mkdir(SERVERS)
    write(f"{SERVERS}/cgroup.procs", "0")  # this process; what it starts is there as well
    start("nginx", "-e", "stderr", "-c", "/tmp/nginx.conf", where=SERVER)  # noqa: S108
    start("iperf3", "-s", "-p", str(BULK), where=SERVER)
    write("/sys/fs/cgroup/cgroup.procs", "0")
    for port in (HTTP, BULK):
        until(partial(listens, port), f"port {port} of the real server")


def listens(port: int) -> bool:
    """Whether the real server has a server on a port."""
    return f":{port} " in run("ss", "-ltn", where=SERVER)


def batch(where: str, lines: list[str]) -> None:
    """Lines for ip(8); IPv6 addresses need no detection of duplicates."""
    text = "".join(f"{line}{' nodad' if line.startswith('addr') and ':' in line else ''}\n" for line in lines)
    run("ip", "-n", where, "-batch", "-", stdin=text)


def until(probe: Callable[[], bool], what: str) -> None:
    """Poll for a state.

    Raises:
        Failed: it does not come.
    """
    for _ in range(100):
        if probe():
            return
        time.sleep(0.1)  # noqa: TID251
    raise Failed(f"{what}: not within 10 s")


# --- the director


def loaded(module: str) -> bool:
    """Whether a module is in the kernel."""
    with open("/proc/modules", encoding="ascii") as stream:
        return any(line.startswith(f"{module} ") for line in stream)


class Sides:
    """Loads what is compared."""

    def __init__(self, ours: str, stock: str) -> None:
        self.modules = {"fullnat": ours, "nat": ours, "stock": stock}
        run("modprobe", "ip_vs")  # what it needs stays loaded from now on
        run("rmmod", "ip_vs")

    def load(self, side: str, pools: bool = False) -> None:
        """Modules as after boot, and the services of a side; for the pool trial those of the pools."""
        if loaded("ip_vs"):
            run("ipvsadm", "-C", where=DIRECTOR)
            run("rmmod", "ip_vs_rr", "ip_vs")
        folder = self.modules[side]
        run("insmod", f"{folder}/ip_vs.ko", f"conn_tab_bits={TABLE_BITS}")
        run("insmod", f"{folder}/ip_vs_rr.ko")
        patched = os.path.exists("/proc/net/ip_vs_ext_stats")
        if patched != (side != "stock"):
            raise Failed(f"side {side}: the modules in {folder} are {'patched' if patched else 'not patched'}")
        sysctl(DIRECTOR, net__ipv4__vs__run_estimation=0)
        lines: list[str] = []
        if pools:
            for number, port in enumerate(POOLS.values()):
                lines += service(4, port, HTTP, "-b", LOCAL[4][number])
        else:
            for family in VIP:
                for port in (HTTP, BULK):
                    local = LOCAL[family][0] if side == "fullnat" else ""
                    lines += service(family, port, port, "-b" if local else "-m", local)
        run("ipvsadm", "-R", where=DIRECTOR, stdin="".join(f"{line}\n" for line in lines))


def service(family: int, port: int, to: int, method: str, local: str) -> list[str]:
    """Lines for ipvsadm."""
    name = f"{bracketed(VIP[family])}:{port}"
    return [
        f"-A -t {name} -s rr",
        *([f"-P -t {name} -z {local}"] if local else []),
        f"-a -t {name} -r {bracketed(REAL[family])}:{to} {method}",
    ]


def connections(port: int) -> int:
    """How many connections a service has, of whatever state."""
    rows = run("ipvsadm", "-Ln", "-t", f"{VIP[4]}:{port}", where=DIRECTOR).splitlines()
    words = next(row.split() for row in rows if row.lstrip().startswith("->") and row.split()[-1].isdigit())
    return int(words[-1]) + int(words[-2])


# --- what is measured


class Ticks:
    """Where the time of a block went."""

    def __enter__(self) -> Ticks:
        self.before = self.now()
        self.user = self.kernel = 0
        return self

    def __exit__(self, *_: object) -> None:
        spent = [after - before for before, after in zip(self.before, self.now(), strict=True)]
        self.user, self.kernel = sum(spent[:2]), spent[2] + sum(spent[5:7])

    @staticmethod
    def now() -> list[int]:
        """user, nice, system, idle, iowait, irq, softirq."""
        with open("/proc/stat", encoding="ascii") as stream:
            return [int(word) for word in stream.readline().split()[1:8]]


def connrate(family: int, count: int, port: int = HTTP) -> float:
    """Requests per second, each on a connection of its own.

    Raises:
        Failed: a request failed.
    """
    url = f"http://{bracketed(VIP[family])}:{port}/"
    text = run("ab", "-q", "-n", str(count), "-c", "8", url, where=CLIENT)
    failed = re.search(r"^Failed requests:\s+(\d+)", text, re.M)
    rate = re.search(r"^Requests per second:\s+([\d.]+)", text, re.M)
    complete = re.search(r"^Complete requests:\s+(\d+)", text, re.M)
    if not (failed and rate and complete) or int(failed[1]) or int(complete[1]) != count or "Non-2xx" in text:
        raise Failed(f"ab {url}:\n{text}")
    return float(rate[1])


def bulk(family: int, direction: str, size: int) -> float:
    """Mbit/s of so many bytes from (`up`) or to the client (`down`)."""
    words = ["-R"] if direction == "down" else []
    text = run(
        *("iperf3", "-J", "-c", VIP[family], "-p", str(BULK), "-n", str(size)), *BULK_WORDS, *words, where=CLIENT
    )
    return float(json.loads(text)["end"]["sum_received"]["bits_per_second"]) / 1e6


def segments(large: bool) -> None:
    """Let both ends hand the director segments of 64 KiB, as cards that coalesce do, or none above the MTU."""
    word = "on" if large else "off"
    for name in (CLIENT, SERVER):
        run("ethtool", "-K", "eth0", "tso", word, "gso", word, where=name)


def memory() -> int:
    """Bytes that the kernel's allocators hold: slabs, vmalloc, per-CPU data."""
    write("/proc/sys/vm/drop_caches", "3")
    time.sleep(1)  # noqa: TID251  what waits for RCU is freed, a hash table has grown
    with open("/proc/meminfo", encoding="ascii") as stream:
        rows = {line.split(":")[0]: int(line.split()[1]) for line in stream}
    return 1024 * (rows["SUnreclaim"] + rows["VmallocUsed"] + rows["Percpu"])


class Flood:
    """Sends segments of clients that have no stack.

    Their TCP checksums are wrong. IPVS does not look, and corrects them by what it changes; so they arrive wrong at the
    real server, which drops them in silence. The connections stay half-open for a minute.
    """

    def __init__(self) -> None:
        info = json.loads(run("ip", "-j", "link", "show", "dev", "front", where=DIRECTOR))[0]
        mine = json.loads(run("ip", "-j", "link", "show", "dev", "eth0", where=CLIENT))[0]
        self.ethernet = bytes.fromhex((info["address"] + mine["address"]).replace(":", "")) + b"\x08\x00"

    def send(self, port: int, flag: int, clients: list[int]) -> None:
        """One segment from each of these clients: numbers of which two sources make 60000 each."""
        pid = os.fork()
        if pid == 0:
            try:
                self._send(port, flag, clients)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            raise Failed("the sender of segments failed; see the console")

    def _send(self, port: int, flag: int, clients: list[int]) -> None:
        with open(f"/run/netns/{CLIENT}", "rb") as there:
            if ctypes.CDLL(None).setns(there.fileno(), 0):
                raise OSError("setns")
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as link:
            link.bind(("eth0", 0))  # protocol 0: it receives nothing
            frames = {}
            for source in {client // 60000 for client in clients}:
                head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0x4000, 64, socket.IPPROTO_TCP, 0)
                ends = socket.inet_aton(f"198.51.100.{100 + source}") + socket.inet_aton(VIP[4])
                total = sum(struct.unpack("!10H", head + ends))
                total = (total & 0xFFFF) + (total >> 16)
                check = 0xFFFF ^ ((total & 0xFFFF) + (total >> 16))
                tcp = struct.pack("!HHIIBBHHH", 0, port, 1, 0, 0x50, flag, 1024, 0, 0)
                frames[source] = bytearray(self.ethernet + head[:10] + struct.pack("!H", check) + ends + tcp)
            for client in clients:
                source, number = divmod(client, 60000)
                struct.pack_into("!H", frames[source], 34, 2000 + number)
                link.send(frames[source])


SYN, RST, ACK = 0x02, 0x04, 0x10


@contextlib.contextmanager
def module() -> Iterator[None]:
    """The module `toa`."""
    run("modprobe", "toa")
    yield
    run("rmmod", "toa")


@contextlib.contextmanager
def bpf() -> Iterator[None]:
    """The programs of toa-bpf, for the real server alone: clients and directors are other machines, which have none."""
    write("/tmp/toa-bpf.conf", f"cgroup = {SERVERS}\n")  # noqa: S108
    run("toa-bpf", "-c", "/tmp/toa-bpf.conf", "load")  # noqa: S108
    yield
    run("toa-bpf", "unload")


RECEIVERS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "none": contextlib.nullcontext,
    "module": module,
    "bpf": bpf,
}


def named() -> int:
    """How many connections the receiver that is there, if one is, was named a client of."""
    if os.path.exists("/sys/fs/bpf/toa"):
        text = run("toa-bpf", "stats")
    elif loaded("toa"):
        text = run("cat", "/proc/net/toa_stats", where=SERVER)
    else:
        return 0
    (row,) = (line.split() for line in text.splitlines() if line.startswith("syn_recv_sock_toa "))
    return sum(map(int, row[1:]))


class Bench:
    """All of it.

    Args:
        plan: `rounds`, the `trials` of each (methods), `connections` of a connection rate, `bytes_large` and
            `bytes_small` of bulk data, `half_open` connections for memory; `ours` and `stock`, the folders of the
            modules.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.sides = Sides(plan["ours"].replace("@", os.uname().release), plan["stock"])
        self.flood = Flood()
        self.round = 0

    def note(self, trial: str, side: str, measure: Callable[[], float]) -> None:
        """Measure, and tell the host; round 0 is for warming up."""
        with Ticks() as ticks:
            value = measure()
        if self.round:
            spent = {"user": ticks.user, "kernel": ticks.kernel}
            say(trial=trial, side=side, round=self.round, value=value, **spent)

    def ordered(self, *sides: str) -> tuple[str, ...]:
        """What follows on each other is swapped from round to round."""
        return sides if self.round % 2 else sides[::-1]

    def forwarding(self) -> None:
        """Connections and bulk data, both families, on every side."""
        for side in self.ordered("fullnat", "nat", "stock"):
            self.forward(side)

    def forward(self, side: str) -> None:
        """The same on one side."""
        plan = self.plan
        self.sides.load(side)
        for family in VIP:
            self.note(f"connrate-v{family}", side, partial(connrate, family, plan["connections"]))
        for size in ("large", "small"):
            segments(size == "large")
            for family in VIP:
                for direction in ("up", "down"):
                    measure = partial(bulk, family, direction, plan[f"bytes_{size}"])
                    self.note(f"bulk-v{family}-{direction}-{size}", side, measure)
        segments(True)

    def memory(self) -> None:
        """Bytes of a half-open connection."""
        for side in self.ordered("fullnat", "stock"):
            self.half_open(side)

    def half_open(self, side: str) -> None:
        """The same on one side."""
        count = self.plan["half_open"]
        self.sides.load(side)
        connrate(4, 8)  # what the first connection of all needs is not what each needs
        before, others = memory(), connections(HTTP)
        self.flood.send(HTTP, SYN, list(range(count)))
        made = connections(HTTP) - others
        if abs(made - count) > count / 1000:
            raise Failed(f"{count} SYNs made {made} connections ({side})")
        value = (memory() - before) / made
        if self.round:
            say(trial="memory", side=side, round=self.round, value=value)

    def showing(self) -> None:
        """Connections per second where accept() shows the client that the director names, and where it does not."""
        self.sides.load("fullnat")
        for side in self.ordered("none", "module", "bpf"):
            with RECEIVERS[side]():
                for family in VIP:
                    connrate(family, 200)
                    shown = named()
                    count = self.plan["connections"]
                    self.note(f"shown-v{family}", side, partial(connrate, family, count))
                    if side != "none" and named() - shown < count:
                        raise Failed(f"{side}: {named() - shown} of {count} connections were named")

    def naming(self) -> None:
        """Connections per second with the client's address told to the real server, and without."""
        self.sides.load("fullnat")
        for family in VIP:
            connrate(family, 200)
            for side in self.ordered("on", "off"):
                sysctl(DIRECTOR, net__ipv4__vs__fullnat_toa_entry=int(side == "on"))
                self.note(f"toa-v{family}", side, partial(connrate, family, self.plan["connections"]))

    def fill(self, pool: str) -> None:
        """Take all ports of a pool, then give a tenth back: any, or those that were taken last.

        Ports are taken in turn, so the next one that is tried is then the first one of the block.
        """
        port, first = POOLS[pool], 0 if pool == "scattered" else PORTS
        clients = list(range(first, first + PORTS))
        self.flood.send(port, SYN, clients)
        back = PORTS - int(PORTS * TAKEN)
        chosen = clients[-back:] if pool == "block" else random.Random(self.round).sample(clients, back)  # noqa: S311
        self.flood.send(port, ACK, chosen)  # IPVS closes no half-open connection for a RST
        self.flood.send(port, RST, chosen)

    def pools(self) -> None:
        """Connections per second with an empty pool, and with two that are nearly full."""
        if self.round % 2:
            self.empty_pool()
            self.full_pools(["scattered", "block"])
        else:
            self.full_pools(["block", "scattered"])
            self.empty_pool()

    def empty_pool(self) -> None:
        """All ports are free."""
        self.sides.load("fullnat", pools=True)
        self.note_pool("empty")

    def full_pools(self, order: list[str]) -> None:
        """One in ten ports is free."""
        self.sides.load("fullnat", pools=True)
        for pool in order:
            self.fill(pool)
        time.sleep(CLOSED)  # noqa: TID251  until what is given back is free
        for pool in order:
            taken = connections(POOLS[pool])
            if abs(taken / PORTS - TAKEN) > 0.005:
                raise Failed(f"{taken} of {PORTS} local ports are taken ({pool}), wanted {TAKEN:.0%}")
        for pool in order:
            self.note_pool(pool)

    def note_pool(self, pool: str) -> None:
        """The rate of a pool; no more connections than a few of the free ports."""
        connrate(4, 200, POOLS[pool])  # a table that grows for the first time is no cost of ports
        self.note("connrate-ports", pool, partial(connrate, 4, self.plan["connections"] // 2, POOLS[pool]))

    def run(self) -> None:
        """Warm up, then the rounds."""
        self.forward("nat")
        for number in range(1, self.plan["rounds"] + 1):
            self.round = number
            say(begins=number)
            for trial in self.plan["trials"]:
                getattr(self, trial)()
        say(ends=self.plan["rounds"])


def main(bench: Callable[[dict[str, Any]], Any], prepare: Callable[[], None] = build) -> None:
    """Everything; whatever goes wrong is told to the host.

    Args:
        bench: given the plan, has the method `run`.
        prepare: makes what it runs in.
    """
    os.environ.update(PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", HOME="/root", LANG="C.UTF-8")
    try:
        with open(f"{OUT}/plan.json", encoding="utf-8") as stream:
            plan = json.load(stream)
        prepare()
        bench(plan).run()
    except Failed as error:
        say(error=str(error))
    except BaseException:
        say(error=traceback.format_exc())
    finally:
        os.sync()
        with contextlib.suppress(OSError):
            write("/proc/sysrq-trigger", "o")
        time.sleep(60)  # noqa: TID251  process 1 may not end before the power is off


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    main(Bench)
