"""Where the tests of ipvsadm run it: in the build root, without a kernel or before the stand-in."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import patches, run, worktree
from pipeline.sandbox import Sandbox
from pipeline.store import Store
from tools import build

HERE = Path(__file__).resolve().parent
SERVICE = "-A -t 192.0.2.1:80 -s rr"
REAL = "-a -t 192.0.2.1:80 -r 10.1.0.2:8080"
# What ipvsadm looks names up in, and nothing of this machine's.
ETC = {
    "nsswitch.conf": "hosts: files\nservices: files\n",
    "services": "http 80/tcp\nhttp-alt 8080/tcp\ndomain 53/udp\n",
    "hosts": "192.0.2.1 vip.example\n"
    "10.1.0.2 a-real-server.with-a-name-of.more-than-sixty.characters.in-total.example\n"
    "2001:db8::1 six.example\n",
}


@dataclass(frozen=True)
class Step:
    """What one command did.

    Attributes:
        status: exit status.
        out, err: its output.
        sent: the commands that it sent to the kernel, in their order.
    """

    status: int
    out: str
    err: str
    sent: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A command line, with what it reads.

    Attributes:
        line: its words.
        stdin: standard input.
        stdout: a file that takes its output instead.
    """

    line: str
    stdin: str = ""
    stdout: str = ""


@dataclass(frozen=True)
class Lab:
    """Where ipvsadm runs.

    Attributes:
        sandbox: the build root.
        program: ipvsadm.
        source: the tree that it was built from, built once more.
        folder: holds the compiled helpers and `etc`.
    """

    sandbox: Sandbox
    program: Path
    source: Path
    folder: Path

    def alone(self, *words: str, stdin: str = "") -> run.Result:
        """Without any kernel."""
        inside = {self.program: "/build/ipvsadm", self.folder / "etc": "/etc"}
        return self.sandbox.run(["/build/ipvsadm", *words], ro_binds=inside, stdin=stdin, check=False)

    def play(self, *commands: str | Command, **scenario: Any) -> list[Step]:
        """Before the stand-in; see its scenario."""
        has = "STAND_IN_SYNPROXY=1 " if scenario.get("synproxy", True) else ""
        script = [
            "mkfifo /tmp/ready",
            "python3 /build/ipvs/stand_in.py /build/out/scenario /build/out/sent /tmp/ready &",
            "read ready </tmp/ready",
        ]
        with run.temporary_directory("lvsforge-ipvsadm-") as out:
            (out / "scenario").write_text(json.dumps(scenario), encoding="utf-8")
            for number, command in enumerate(commands):
                command = Command(command) if isinstance(command, str) else command
                (out / f"{number}.in").write_bytes(command.stdin.encode())
                (out / f"{number}.out").touch()
                words = shlex.join(["/build/ipvsadm", *shlex.split(command.line)])
                place = f"/build/out/{number}"
                script += [
                    f"LD_PRELOAD=/build/lab/shim.so STAND_IN=/tmp/stand-in {has}{words} "
                    f"<{place}.in >{command.stdout or f'{place}.out'} 2>{place}.err",
                    f"echo $? >{place}.status; echo -- >>/build/out/sent",
                ]
            self.sandbox.run(
                ["sh", "-c", "\n".join(script)],
                binds={out: "/build/out"},
                ro_binds={
                    self.program: "/build/ipvsadm",
                    self.folder: "/build/lab",
                    self.folder / "etc": "/etc",
                    HERE: "/build/ipvs",
                },
                timeout=120,
                what="ipvsadm before the stand-in",
            )
            sent = (out / "sent").read_text(encoding="ascii").split("--\n")

            def text(number: int, name: str) -> str:
                return (out / f"{number}.{name}").read_bytes().decode()

            return [
                Step(
                    int(text(n, "status")),
                    text(n, "out"),
                    text(n, "err"),
                    tuple(name for name in sent[n].split() if name != "GET_INFO"),  # every program begins with it
                )
                for n in range(len(commands))
            ]

    def last(self, *commands: str | Command, **scenario: Any) -> Step:
        """The last of several commands, where those before it must succeed."""
        *before, last = self.play(*commands, **scenario)
        for command, step in zip(commands, before, strict=False):
            assert step.status == 0, f"{command}: {step}"
        return last

    def saved(self, *commands: str | Command, **scenario: Any) -> list[str]:
        """What `-S -n` writes after commands that must succeed."""
        step = self.last(*commands, "-S -n", **scenario)
        assert step.status == 0, step.err
        return step.out.splitlines()

    def connections(self, table: str, *options: str) -> run.Result:
        """A connection table as `-L -c` prints it."""
        inside = {self.folder: "/build/lab", self.folder / "etc": "/etc"}
        return self.sandbox.run(["/build/lab/conns", *options], ro_binds=inside, stdin=table, check=False)


def built(store: Store, room: build.Tools, folder: Path) -> tuple[Path, Path]:
    """The packaged program, and the patched source that it was built from."""
    sandbox = room.sandbox()
    (package,) = build.packages(store.ensure(room.stage("ipvsadm")))
    tree = folder / "package"
    tree.mkdir()
    sandbox.run(
        ["sh", "-ec", f"rpm2archive - </build/{package.name} | tar -xz -C /build/tree"],
        binds={tree: "/build/tree"},
        ro_binds={package: f"/build/{package.name}"},
    )
    source = folder / "source"
    worktree.extract(room.pins.resolve("ipvsadm"), source)
    patches.apply(source, patches.read(build.ROOM / "ipvsadm"), label="ipvsadm")
    return tree / "usr/sbin/ipvsadm", source


def make(folder: Path) -> Lab:
    """Unpack the package, build its source once more, and compile the helpers."""
    store = Store()
    room = build.room(store)
    program, source = built(store, room, folder)
    sandbox = room.sandbox()
    helpers = folder / "helpers"
    (helpers / "etc").mkdir(parents=True)
    for name, text in ETC.items():
        (helpers / "etc" / name).write_text(text, encoding="utf-8")
    shutil.copyfile(HERE / "conns.c", source / "conns.c")
    warn = "gcc -O1 -Wall -Wextra -Werror"
    script = (
        f"{warn} -shared -fPIC -o /build/lab/shim.so /build/ipvs/shim.c\n"
        "make -s libs config_stream.o dynamic_array.o >/dev/null 2>&1\n"
        """gcc -DVERSION='""' -DSCHEDULERS='""' -DPE_LIST='""' -o /build/lab/conns conns.c config_stream.o """
        "dynamic_array.o libipvs/libipvs.a -lpopt $(pkg-config --cflags --libs libnl-genl-3.0)"
    )
    binds = {source: "/build/source", helpers: "/build/lab"}
    inside = {HERE: "/build/ipvs"}
    sandbox.run(["sh", "-ec", script], binds=binds, ro_binds=inside, cwd="/build/source", what="compiling the helpers")
    return Lab(sandbox, program, source, helpers)
