"""Network namespaces in which programs of the lab's root run, and the cables between them and machines.

A namespace is held by one process and has no name on this machine: it ends with that process, and all that was in it.
Nothing is made in the machine's own network, not for a moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import run
from pipeline.errors import BuildError
from pipeline.sandbox import Sandbox

_HOLDER = "sleep"
_SECONDS = 20.0


@dataclass(frozen=True)
class Space:
    """Namespaces of network, processes, mounts and host name.

    Attributes:
        name: the node, which is the host name inside.
        pid: of the process on this machine whose end ends all of it.
        inner: of the one inside, by which others come in.
    """

    name: str
    pid: int
    inner: int

    def argv(self, words: Sequence[str]) -> list[str]:
        """A command line that runs a command inside."""
        nsenter = run.require("nsenter", "to enter network namespaces", "util-linux")
        kinds = ("--net", "--pid", "--mount", "--uts", "--ipc", "--root", "--wd")
        return [nsenter, "--target", str(self.inner), *kinds, "--", *words]

    def network_argv(self, words: Sequence[str]) -> list[str]:
        """A command line that runs a program of this machine on the network inside."""
        nsenter = run.require("nsenter", "to enter network namespaces", "util-linux")
        return [nsenter, "--target", str(self.inner), "--net", "--", *words]

    def run(self, *words: str) -> run.Result:
        """Run a command inside.

        Raises:
            BuildError: it failed.
        """
        return run.run(self.argv(words), what=f"in {self.name}")

    def ip(self, *commands: str) -> None:
        """Run `ip` commands, all in one go."""
        if commands:
            run.run(
                self.network_argv([run.require("ip", "to make a lab's links", "iproute2"), "-batch", "-"]),
                stdin="\n".join(commands) + "\n",
                what=f"links of {self.name}",
            )

    def sysctl(self, *settings: str) -> None:
        """Change settings of its network; those of the machine stay."""
        program = run.require("sysctl", "to prepare a lab's networks", "procps")
        run.run(self.network_argv([program, "-q", "-w", *settings]), what=f"settings of {self.name}")


def start(root: Path, name: str, log: Path, binds: Mapping[Path, str] | None = None) -> Space:
    """Start a namespace that outlives us.

    Args:
        root: the file system of its programs; they cannot change it.
        name: its host name.
        log: takes what its first process says.
        binds: folders of this machine that are seen, and may not be changed, inside.

    Raises:
        BuildError: it did not come up.
    """
    unshare = run.require("unshare", "to end namespaces whole", "util-linux")
    box = Sandbox(root, hostname=name).argv([_HOLDER, "infinity"], ro_binds=binds)
    # bubblewrap ends with its parent. That is not to be us, but somebody who stays, and who can be ended by one id.
    came = False
    with run.start([unshare, "--fork", "--kill-child", "--", *box], log=log, keep=lambda: came) as process:
        inner = 0

        def up() -> bool:
            nonlocal inner
            if process.poll() is not None:
                raise BuildError(f"the namespace of {name} did not come up", "invoke doctor", process.tail())
            inner = innermost(process.pid)
            return _command(inner) == _HOLDER

        run.wait_until(up, deadline=_SECONDS, what=f"the namespace of {name}", hint=f"read {log}")
        came = True
    return Space(name, process.pid, inner)


def innermost(pid: int) -> int:
    """The last of a line of single children."""
    while children := _children(pid):
        pid = children[0]
    return pid


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(word) for word in text.split()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def switch_commands(link: str) -> list[str]:
    """What makes the switch of a link. It forwards groups as they come: it knows nothing of who has joined."""
    return [f"link add {link} type bridge mcast_snooping 0 forward_delay 0", f"link set {link} up"]


def port_commands(port: str, link: str, alias: str) -> list[str]:
    """What plugs a port in."""
    return [f"link set {port} alias {alias} master {link} up"]


def cable_commands(port: str, link: str, nic: str, mac: str, node: Space) -> list[str]:
    """What runs a cable from a switch to another namespace, whose interface is called `nic` and has this address."""
    pair = f"link add {port} type veth peer name {nic} address {mac} netns {node.inner}"
    return [pair, *port_commands(port, link, f"{node.name}.{nic}")]


def tap_commands(port: str, link: str, alias: str) -> list[str]:
    """What makes the end of a machine's cable; it stays when the machine goes, as a socket in a wall does."""
    return [f"tuntap add {port} mode tap", *port_commands(port, link, alias)]
