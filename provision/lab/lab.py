"""A lab's life: up, down, and what may happen to its machines and links in between.

FOLDER/cluster.yaml   the lab's copy of the cluster file: what daily operations work on
FOLDER/ssh_config     how ssh, and they, reach its machines
FOLDER/topology.svg   the picture
FOLDER/NODE/          a machine's disk and console, what a namespace has said
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline import progress, qmp, run, settings, vm
from pipeline.debroot import Root, tree
from pipeline.errors import BuildError
from pipeline.store import Store, remove_tree
from provision import cluster as clusters
from provision import render
from provision.ipvs import point
from provision.lab import login, machines, router, space, state, variant
from provision.lab.space import Space
from provision.lab.state import Running, State
from provision.lab.topology import CLIENTS, ROUTER, Link, Node, Plug, Topology, absent, build, control_mac
from provision.model import Cluster, Service

SWITCH = "switch"
RECIPE = Path(__file__).with_name("root.yaml")
LEAST_MEMORY = 320  # MiB; with less a director's image starts to kill its own services
_QEMU = 64  # MiB of QEMU itself for each machine
_BESIDE = 200  # MiB for what runs in namespaces
_SETTLED = 40.0  # seconds under KVM until health checks and routing agree
_MAC = "52:54:00:1a:b1:"  # of NICs in namespaces
_FIRST_FD = 100  # of the taps that a machine inherits
TAP = Path(vm.__file__).with_name("tap.py")


def root(store: Store) -> Root:
    """The root file system of what runs in namespaces."""
    return Root("root-lab", RECIPE, store, offline=settings.current.offline)


def typed(path: Path) -> str:
    """A path as one types it in the checkout."""
    return str(path.relative_to(settings.TOP)) if path.is_relative_to(settings.TOP) else shlex.quote(str(path))


def own(folder: Path) -> str:
    """What a task's words need beside its name to mean the lab in this folder; nothing for the folder without --dir."""
    return "" if folder == settings.TOP / "out/lab" else f" --dir {typed(folder)}"


class Lab:
    """A lab that is up, or on its way there.

    Attributes:
        folder: all its files.
        state: what runs.
    """

    def __init__(self, written: State) -> None:
        self.folder = written.folder
        self.state = written
        self.store = Store()
        self._stack = contextlib.ExitStack()

    @classmethod
    def open(cls, folder: Path) -> Lab:
        """A lab that another command has started.

        Raises:
            BuildError: none is up there.
        """
        written = State.read(folder)
        if written is None or not written.alive:
            hint = f"invoke lab-up --cluster provision/examples/lab-ospf.yaml{own(folder)}"
            raise BuildError(f"no lab is up in {folder}", hint)
        return cls(written)

    def close(self) -> None:
        """Forget it; what runs goes on."""
        self._stack.close()

    # --- what it consists of

    @property
    def file(self) -> Path:
        """Its cluster file."""
        return self.folder / "cluster.yaml"

    @property
    def ssh_config(self) -> Path:
        """For `ssh -F`, and `--ssh-config` of other tasks."""
        return self.folder / "ssh_config"

    @cached_property
    def cluster(self) -> Cluster:
        """The cluster as it was when the lab came up: its cables are of then, whatever operators do to the file."""
        return clusters.load(self.folder / "started.yaml")

    @property
    def services(self) -> Sequence[Service]:
        """The services of its cluster file as it is now: operations add and remove them while the lab is up.

        Raises:
            BuildError: the file is wrong.
        """
        return clusters.load(self.file, secrets=False).services

    @cached_property
    def topology(self) -> Topology:
        """Its nodes and links."""
        return build(self.cluster)

    @cached_property
    def accelerator(self) -> vm.Accelerator:
        """How its machines run."""
        return machines.accelerator(self.store, len(self.topology.of("director", "realserver")), scale=self.state.scale)

    def node(self, name: str) -> Node:
        """A node by its name.

        Raises:
            BuildError: there is none.
        """
        for node in self.topology.nodes:
            if node.name == name:
                return node
        known = ", ".join(node.name for node in self.topology.nodes)
        raise BuildError(f"the lab has no {name}", f"choose among {known}")

    def seconds(self, seconds: float) -> float:
        """Seconds as they are for KVM, turned into some for this machine."""
        return seconds * self.accelerator.scale

    # --- namespaces

    def space(self, name: str) -> Space:
        """The namespaces of the router, a client or the switches.

        Raises:
            BuildError: they are gone.
        """
        running = self.state.processes.get(name)
        inner = self.state.inner.get(name)
        if running is None or not running.alive or inner is None:
            raise BuildError(f"{name} does not run", f"invoke lab-status{own(self.folder)}")
        return Space(name, running.pid, inner)

    def start_space(self, node: Node) -> None:
        """Start the router, a client or a router behind, with its cables and addresses."""
        folder = self.folder / node.name
        folder.mkdir(exist_ok=True)
        files = router.configuration(self.topology, self.cluster) if node.name == ROUTER else {}
        for name, text in files.items():
            # The daemons read them as frr; the folder above is closed to everybody.
            (folder / "etc").mkdir(exist_ok=True)
            (folder / "etc" / name).write_text(text, encoding="utf-8")
            (folder / "etc" / name).chmod(0o644)
        binds = {folder / "etc": "/etc/frr"} if files else {}
        if node.name == ROUTER and self.state.routing:
            binds[Path(self.state.routing)] = router.OURS
        made = self._hold(node.name, folder / "log", {**binds, self.folder / "sshd": "/etc/ssh"})
        self._write_ssh_config()
        switch = self.space(SWITCH)
        for link, plug in self.topology.plugs(node.name):
            switch.ip(*space.cable_commands(self.port(link, plug), link.name, plug.nic, self.mac(link, plug), made))
            wait = " nodad"  # nobody else has it: the whole network is known
            own = [f"address add {text} dev {plug.nic}{wait * (':' in text)}" for text in plug.addresses]
            made.ip(f"link set {plug.nic} up", *own)
        if node.kind == "client":
            link = self.topology.link(CLIENTS)
            gateways = (self.topology.address(ROUTER, CLIENTS, version) for version in (4, 6))
            made.ip(*(f"route add default via {gateway}" for gateway in gateways if gateway))
        else:
            made.sysctl(*router.SYSCTL)
        if node.name == ROUTER:
            made.ip(*router.static_routes(self.topology, self.cluster))
            if files:
                made.run("sh", "-ec", router.start_script())

    def _hold(self, name: str, log: Path, binds: dict[Path, str] | None = None) -> Space:
        with run.noting(lambda pid: self._record(name, pid)):
            made = space.start(Path(self.state.root), name, log, binds)
        self.state.inner[name] = made.inner
        self.state.write()
        return made

    def _record(self, name: str, pid: int) -> None:
        """Write a process down as soon as it is there: lab-down ends it, however the command that starts it ends."""
        with contextlib.suppress(BuildError):  # it has ended already: who started it says why
            self.state.processes[name] = Running.of(pid)
        self.state.inner.pop(name, None)  # of the node's last life
        self.state.write()

    def start_links(self) -> None:
        """Start the links, the router and the clients: all that is no machine."""
        self._start_switch()
        for node in self.topology.nodes:
            if not node.is_machine:
                self.start_space(node)

    def _start_switch(self) -> None:
        (self.folder / SWITCH).mkdir(exist_ok=True)
        made = self._hold(SWITCH, self.folder / SWITCH / "log")
        for link in self.topology.links:
            made.ip(*space.switch_commands(link.name))
            for plug in link.plugs:
                if self.node(plug.node).is_machine:
                    made.ip(*space.tap_commands(self.port(link, plug), link.name, f"{plug.node}.{plug.nic}"))

    def port(self, link: Link, plug: Plug) -> str:
        """The name of a port of a switch; its alias says whose it is."""
        return f"port{self._number(link, plug)}"

    def mac(self, link: Link, plug: Plug) -> str:
        """A NIC's hardware address; it stays when the node starts anew, as on hardware."""
        return plug.mac or f"{_MAC}{self._number(link, plug):02x}"

    def _number(self, link: Link, plug: Plug) -> int:
        return [(each.name, other) for each in self.topology.links for other in each.plugs].index((link.name, plug))

    # --- machines

    def start_machine(self, name: str) -> vm.Machine:
        """Boot a machine on its disk, which it keeps from one boot to the next, with its seed."""
        node = self.node(name)
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        sockets = Path(self.state.sockets) / name
        sockets.mkdir(exist_ok=True)
        for left in sockets.iterdir():
            left.unlink()
        taps: list[str] = []
        extra: list[str] = []
        for link, plug in self.topology.plugs(name):
            number = _FIRST_FD + len(taps)
            taps.append(f"{self.port(link, plug)}={number}")
            extra += machines.cable(plug.nic, plug.mac, f"tap,fd={number}")
        python = run.require("python3", "to open network taps", "python3")
        hosts = [host.name for host in self.cluster.hosts]
        machine = vm.Machine(
            name,
            folder,
            self.accelerator,
            disks=[vm.Disk(machines.overlay(Path(self.state.images[node.kind]), folder / "disk.qcow2"))],
            seed=self.folder / "hosts" / name / "seed.iso",
            memory=self.state.memory,
            cpus=machines.cpus(node.kind),
            mac=control_mac(hosts.index(name)),
            ssh_key=self.folder / "id",
            login=False,  # as on hardware, the seed's keys open the door
            control=sockets,
            may_keep=True,
            extra=extra,
            prefix=[python, "-I", str(TAP), str(self.space(SWITCH).inner), *taps, "--"],
        )
        with run.noting(lambda pid: self._record(name, pid)):
            self._stack.enter_context(machine)
        machine.kept = True
        self._write_ssh_config()
        return machine

    def new_disk(self, name: str, image: Path) -> None:
        """Give a machine that is off another image's disk: a seed of the cluster file as it is makes it that host."""
        render.render_cluster(self.file, self.folder / "hosts")
        self.state.images = {**self.state.images, self.node(name).kind: str(image)}
        (self.folder / name / "disk.qcow2").unlink(missing_ok=True)
        self.state.write()

    def _write_ssh_config(self) -> None:
        texts = []
        for node in self.topology.nodes:
            file = self.folder / node.name / "ssh_config"
            if node.is_machine and file.exists():
                texts.append(file.read_text(encoding="utf-8"))
            elif not node.is_machine and node.name in self.state.alive:
                texts.append(login.ssh_config(self.space(node.name), self.folder / "id"))
        self.ssh_config.write_text("".join(texts), encoding="utf-8")

    # --- what may happen

    def kill(self, name: str) -> None:
        """Pull a node's plug, as a power cut does: nothing is told to anybody.

        A network namespace answers for a moment after its last process has ended: until its cables are gone.
        """
        self.state.end(name)
        if self.node(name).is_machine:
            return
        for link, plug in self.topology.plugs(name):
            port = self.port(link, plug)
            run.wait_until(
                lambda port=port: self.try_to(SWITCH, f"ip link show {port}").returncode != 0,  # type: ignore[misc]
                deadline=self.seconds(5),
                what=f"{name}: {port} is gone",
                hint=f"invoke lab-ssh switch{own(self.folder)} -- ip link",
            )

    def shut_down(self, name: str) -> None:
        """Shut a machine down in order."""
        running = self.state.processes[name]
        self.ask(name, "systemctl --no-block poweroff", check=False)
        run.wait_until(
            lambda: not running.alive,
            deadline=self.seconds(60),
            what=f"{name}: power-off",
            hint=f"read {self.folder / name / 'console.log'}",
            tail_of=lambda: vm.console_tail(self.folder / name / "console.log"),
        )

    def plug(self, name: str, nic: str, *, into: bool) -> None:
        """Pull a machine's cable out of a NIC, or plug it in: both ends see it."""
        qmp.monitor(Path(self.state.sockets) / name / "q", "set_link", name=nic, up=into)
        link, found = next((link, plug) for link, plug in self.topology.plugs(name) if plug.nic == nic)
        self.space(SWITCH).ip(f"link set {self.port(link, found)} {'up' if into else 'down'}")

    # --- asking

    def command(self, name: str, words: Sequence[str] = (), *, terminal: bool = False) -> list[str]:
        """The command line that runs a command on a node, or a shell there.

        Args:
            name: the node.
            words: for a shell there, with a blank between them, as ssh does it; without them the shell itself.
            terminal: whether the shell has ours.

        Raises:
            BuildError: there is no such node, or it does not run.
        """
        node = SWITCH if name == SWITCH else self.node(name).name
        if node == SWITCH or not self.node(name).is_machine:
            return self.space(node).argv(["sh", "-c", " ".join(words)] if words else ["sh"])
        running = self.state.processes.get(name)
        if running is None or not running.alive:
            raise BuildError(f"{name} does not run", f"read {self.folder / name / 'console.log'}")
        return ["ssh", *(["-t"] if terminal else []), "-F", str(self.ssh_config), name, *words]

    def ask(self, name: str, command: str, *, check: bool = True, seconds: float = 60.0) -> str:
        """What a shell command on a node prints.

        Args:
            name: the node.
            command: for its shell.
            check: raise when it fails.
            seconds: the deadline under KVM.

        Raises:
            BuildError: it failed (with `check`), took too long, or the node does not run.
        """
        return self.try_to(name, command, check=check, seconds=seconds).stdout.strip()

    def try_to(self, name: str, command: str, *, check: bool = False, seconds: float = 60.0) -> run.Result:
        """Run a shell command on a node; as `ask`."""
        return run.run(
            self.command(name, [command]),
            check=check,
            timeout=self.seconds(seconds),
            what=f"on {name}",
            hint=f"invoke lab-ssh {name}{own(self.folder)}",
            shown=shlex.join(["lab-ssh", name, "--", command]),
        )

    def until(self, name: str, command: str, what: str, seconds: float = _SETTLED) -> float:
        """Wait until a command on a node succeeds; returns the seconds it took.

        Raises:
            BuildError: not within `seconds` (under KVM; scaled for TCG).
        """
        return run.wait_until(
            lambda: self.try_to(name, command).returncode == 0,
            deadline=self.seconds(seconds),
            what=f"{name}: {what}",
            hint=f"invoke lab-ssh {name}{own(self.folder)} -- {shlex.quote(command)}",
            tail_of=lambda: self.try_to(name, command).stdout.splitlines()[-20:],
        )

    # --- what clients want

    def urls(self) -> list[str]:
        """A page of each VIP and port of TCP, as `services`."""
        return [
            f"http://{point(vip, port)}/index.html"
            for service in self.services
            if service.protocol == "TCP"
            for vip in service.vips
            for port in service.ports
        ]

    def web_ports(self) -> list[int]:
        """What real servers must serve."""
        return sorted({each.port for service in self.cluster.services for each in service.real_servers})


# --- up and down


@dataclass(frozen=True)
class Parts:
    """What the lab needs of the rooms that build.

    Attributes:
        image: finds the golden image of a role.
        toa_bpf: finds the package toa-bpf.
        routing: finds a root file system with our routing daemons.
    """

    image: Callable[[str], Path]
    toa_bpf: Callable[[], Path]
    routing: Callable[[], Path]


def up(source: Path, folder: Path, memory: int, parts: Parts) -> Lab:
    """Boot a cluster.

    Args:
        source: its cluster file.
        folder: where the lab's files are to be.
        memory: of each machine, in MiB.
        parts: where images come from.

    Returns:
        The lab, in which clients get pages of every VIP.

    Raises:
        BuildError: it cannot be, and nothing was started; or something did not come up or somebody interrupted, and
            what runs goes on so that one can look.
    """
    require_root()
    with state.alone(folder):
        left = _judge_folder(folder, source)
        cluster = clusters.load(source, secrets=False)
        topology = build(cluster)
        for line in absent(cluster):
            progress.note(line)
        hosts = topology.of("director", "realserver")
        found = machines.accelerator(Store(), len(hosts))
        _judge_memory(len(hosts), memory, found, _available())
        images = {role: str(parts.image(role)) for role in _roles(topology)}
        where = tree(Store(), root(Store()))
        routing = str(parts.routing()) if router.needs_ours(cluster) else ""
        if left is not None:
            _keep_edits(folder)
            _forget(left)
        written = State(folder, str(source), memory, root=str(where), routing=routing, images=images, scale=found.scale)
        lab = prepare(source, folder, written)
        try:
            _boot(lab, parts)
        except (BuildError, OSError, KeyboardInterrupt) as error:
            which = own(folder)
            hint = f"what runs still runs: invoke lab-status{which}, and invoke lab-down{which} ends it"
            if isinstance(error, BuildError):
                raise BuildError(error.message, f"{error.hint}; {hint}", error.details) from error
            raise BuildError(str(error) or "interrupted", hint) from error
        finally:
            lab.close()
    return lab


def require_root() -> None:
    """Refuse somebody else.

    Raises:
        BuildError: we are not root.
    """
    if os.geteuid() != 0:
        raise BuildError(
            "root is needed to make network namespaces and the taps in them", "sudo .venv/bin/invoke lab-up …"
        )


def _roles(topology: Topology) -> list[str]:
    return list(dict.fromkeys(node.kind for node in topology.nodes if node.is_machine))


def _judge_folder(folder: Path, source: Path) -> State | None:
    """Judge where a lab is to be.

    Returns:
        The lab of before the machine's last boot that is to make way, or None.

    Raises:
        BuildError: a lab runs there, what is there is no lab, or the cluster file would go with the lab.
    """
    written = State.read(folder)
    if written is not None and (alive := written.alive):
        raise BuildError(
            f"a lab is up already in {folder}: {written.source}, {', '.join(alive)}",
            f"invoke lab-status{own(folder)}   (or end it: invoke lab-down{own(folder)})",
        )
    if written is None and folder.exists() and any(folder.iterdir()):
        raise BuildError(f"{folder} is there and is no lab", f"mv {folder} {folder}.old   (or choose another --dir)")
    if written is not None and source.resolve().is_relative_to(folder.resolve()):
        # A lab's copy has the lab's NICs already, and secrets in this folder: no other lab comes up with it.
        raise BuildError(
            f"{source} is of the lab in {folder}, which has ended and would be replaced",
            f"invoke lab-up --cluster {written.source}{own(folder)}   (or another file outside of that folder)",
        )
    return written


def _keep_edits(folder: Path) -> None:
    """Move a lab's cluster file out of its folder, which goes, where somebody has changed it since the lab came up."""
    file, started = folder / "cluster.yaml", folder / "started.yaml"
    if file.exists() and started.exists() and file.read_bytes() != started.read_bytes():
        kept = file.rename(folder.with_name(f"{folder.name}.cluster.yaml.old"))
        progress.note(f"the cluster file of the last lab in {folder} had been changed: it is {kept} now")


def _judge_memory(count: int, memory: int, accelerator: vm.Accelerator, available: int) -> None:
    """Refuse what would end in the kernel's killing something.

    Args:
        count: of machines.
        memory: of each, in MiB.
        accelerator: how they run.
        available: MiB that can be had on this machine.
    """
    if memory < LEAST_MEMORY:
        raise BuildError(
            f"--memory {memory}: a machine needs {LEAST_MEMORY} MiB", f"invoke lab-up … --memory {LEAST_MEMORY}"
        )
    beside = _QEMU + (accelerator.translated if accelerator.name == "tcg" else 0)
    wanted = count * (memory + beside) + _BESIDE
    if wanted <= available:
        return
    fits = (available - _BESIDE) // count - beside
    hint = "end what else runs here (ps -eo pid,rss,comm --sort -rss | head), or take a cluster of fewer hosts"
    raise BuildError(
        f"not enough memory: {count} machines of {memory} MiB need {wanted} MiB, {available} are available",
        f"invoke lab-up … --memory {fits}" if fits >= LEAST_MEMORY else hint,
    )


def _available() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    raise BuildError("/proc/meminfo does not say what is available", "invoke doctor")


def prepare(source: Path, folder: Path, written: State) -> Lab:
    """Write all files of a lab of which nothing runs yet."""
    with progress.step(f"rendering {source} for the lab"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        # The paths of sockets must be shorter than 108 bytes, which no checkout can promise.
        written.sockets = tempfile.mkdtemp(prefix="lvsforge-lab-")
        written.write()
        lab = Lab(written)
        key = vm.make_key(folder)
        variant.write(source, lab.file, Path(f"{key}.pub").read_text(encoding="ascii").strip())
        login.write(folder / "sshd", key)
        shutil.copyfile(lab.file, folder / "started.yaml")
        render.render_cluster(lab.file, folder / "hosts")
    return lab


def _boot(lab: Lab, parts: Parts) -> None:
    topology = lab.topology
    hosts = topology.of("director", "realserver")
    with progress.step(f"links, router and clients: {len(topology.links)} switches"):
        lab.start_links()
    progress.note(
        f"{len(hosts)} machines of {lab.state.memory} MiB, {lab.accelerator.name}: up to "
        f"{lab.seconds(machines.BOOT) / 60:.0f} min on this machine as it is just now"
    )
    started = {node.name: lab.start_machine(node.name) for node in hosts}
    # Real servers first: directors are healthy when these serve.
    for node in sorted(hosts, key=lambda each: each.kind != "realserver"):
        machine = started[node.name]
        with progress.step(f"{node.name}: from the image {Path(lab.state.images[node.kind]).name} and its seed"):
            machines.settle(machine)
        if node.kind == "realserver":
            with progress.step(f"{node.name}: a web server, and toa"):
                machines.serve(machine, lab.web_ports(), Path(lab.state.root))
                machines.show_clients(machine, parts.toa_bpf)
    with progress.step("clients get pages of every VIP"):
        for url in lab.urls():
            lab.until("client-1", f"curl -gsSf -m 5 --noproxy '*' {shlex.quote(url)}", f"a page of {url}")


def down(folder: Path, say: Callable[[str], None] = progress.note) -> None:
    """End a lab: exactly the processes that it has started; its folder goes.

    Raises:
        BuildError: one of them cannot be ended.
    """
    with state.alone(folder):
        written = State.read(folder)
        if written is None:
            _gone(folder)
            say(f"no lab is up in {folder}")
            return
        with progress.step(f"ending the lab in {folder}"):
            ended = written.end()
            _forget(written)
        say(f"ended: {', '.join(ended) or 'nothing ran any more'}")


def _forget(written: State) -> None:
    if written.sockets:
        remove_tree(Path(written.sockets))
    # In one step: what is left of a folder half removed would be no lab any more, which nobody ends.
    gone = _gone(written.folder)
    if written.folder.exists():
        written.folder.rename(gone)
    remove_tree(gone)


def _gone(folder: Path) -> Path:
    """Where the folder of a lab goes, cleared of what a killed run has left there."""
    path = folder.with_name(f".{folder.name}.gone")
    remove_tree(path)
    return path
