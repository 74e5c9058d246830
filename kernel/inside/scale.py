"""Process 1 of the machine of `invoke bench-keepalived`: measures, and leaves a line of JSON for every figure.

Real servers are addresses of the machine itself, where one listener takes every connection of the checks. What a side
does is one keepalived's whole life; what it wrote is read from a pipe until it says that it is done, and then the
kernel's table is compared with what the configuration says.

`/out/plan.json` says how much to do (see `kernel/scale.py`), `/out/results.jsonl` takes the lines.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import os
import queue
import signal
import socket
import subprocess  # noqa: TID251  pipeline/run.py is not in the machine
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# In the machine this folder is no package; the tests import it as one.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
forwarding = importlib.import_module("forwarding")
Failed: type[Exception] = forwarding.Failed
run: Callable[..., str] = forwarding.run
say: Callable[..., None] = forwarding.say
write: Callable[[str, str], None] = forwarding.write

CONF = "/tmp/keepalived.conf"  # noqa: S108  the machine's own, gone with it
PROGRAMS = {
    side: f"/{folder}/usr/sbin/keepalived" for side, folder in (("fullnat", "ours"), ("nat", "ours"), ("stock", "old"))
}
CHECKS = 10  # seconds between two checks of a real server
HEAVY = 7  # the weight that a reload gives to one real server
_TICK = 1000 / os.sysconf("SC_CLK_TCK")  # ms


class Plan:
    """The configuration of a side, and what must come of it."""

    def __init__(self, services: int, reals: int, locals_: int, side: str) -> None:
        self.vips = [f"10.1.{n // 250}.{n % 250 + 1}" for n in range(services)]
        numbers = range(services * reals)
        self.reals = [f"10.{2 + n // 62500}.{n // 250 % 250}.{n % 250 + 1}" for n in numbers]
        self.each = reals
        self.locals = [f"10.200.0.{n + 1}" for n in range(locals_)] if side == "fullnat" else []

    def of(self, number: int) -> list[str]:
        """The real servers of a virtual one."""
        return self.reals[number * self.each : (number + 1) * self.each]

    def weight(self, real: str, heavy: bool) -> int:
        """One of them may be heavy."""
        return HEAVY if heavy and real == self.reals[len(self.reals) // 2] else 1

    def text(self, *, heavy: bool = False) -> str:
        """The file."""
        method = "FNAT" if self.locals else "NAT"
        lines = []
        if self.locals:
            lines.append(f"local_address_group all {{\n    {self.locals[0]}-{len(self.locals)}\n}}\n")
        for number, vip in enumerate(self.vips):
            lines.append(
                f"virtual_server {vip} 80 {{\n    delay_loop {CHECKS}\n    lvs_sched rr\n    lvs_method {method}"
            )
            lines.append("    protocol TCP")
            if self.locals:
                lines.append("    laddr_group_name all")
            for real in self.of(number):
                lines.append(f"    real_server {real} 80 {{\n        weight {self.weight(real, heavy)}")
                lines.append("        TCP_CHECK {\n            connect_timeout 3\n        }\n    }")
            lines.append("}")
        return "\n".join(lines) + "\n"

    def lines(self, *, heavy: bool = False) -> list[str]:
        """What `ipvsadm -S -n` then writes, sorted."""
        way = "-b" if self.locals else "-m"
        lines = []
        for number, vip in enumerate(self.vips):
            lines.append(f"-A -t {vip}:80 -s rr")
            lines += [f"-P -t {vip}:80 -z {local}" for local in self.locals]
            lines += [f"-a -t {vip}:80 -r {real}:80 {way} -w {self.weight(real, heavy)}" for real in self.of(number)]
        return sorted(lines)


def listen() -> None:
    """A process that takes every connection to port 80 of any address, and closes it."""
    run("ip", "link", "set", "lo", "up")
    for second in (2, 3):
        run("ip", "route", "add", "local", f"10.{second}.0.0/16", "dev", "lo")
    with socket.create_server(("", 80), backlog=4096) as server:
        if os.fork() == 0:
            while True:
                server.accept()[0].close()


class Daemon:
    """One keepalived. What it says is read all the time: it would wait for a pipe that is full."""

    def __init__(self, side: str) -> None:
        words = [PROGRAMS[side], "--dont-fork", "--log-console", "--no-syslog", "--use-file", CONF]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.last: collections.deque[str] = collections.deque(maxlen=20)
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.last.append(line)
            if " complete" in line:
                self.events.put(line)
        self.events.put("")

    def until(self, what: str) -> None:
        """Wait until it says this.

        Raises:
            Failed: it says something else, or ends before.
        """
        line = self.events.get()
        if what not in line:
            raise Failed(f"keepalived did not say {what!r}:\n{''.join(self.last)}")

    def spent(self) -> float:
        """The CPU's time that it and its children have used, ms."""
        ticks = 0
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(FileNotFoundError), open(f"/proc/{name}/stat", encoding="ascii") as stream:
                    words = stream.read().rpartition(")")[2].split()
                    if int(name) == self.process.pid or int(words[1]) == self.process.pid:
                        ticks += int(words[11]) + int(words[12])
        return ticks * _TICK

    def end(self) -> None:
        """End it in order."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        self.reader.join()
        if self.process.returncode:
            raise Failed(f"keepalived ended with {self.process.returncode}")


def compare(wanted: list[str]) -> None:
    """Look at what the kernel has.

    Raises:
        Failed: something else.
    """
    found = sorted(run("ipvsadm", "-S", "-n").splitlines())
    if found != wanted:
        other = sorted(set(found) ^ set(wanted))
        raise Failed(f"the kernel has {len(found)} lines, wanted {len(wanted)}; {len(other)} differ: {other[:5]}")


def life(side: str, plan: Plan, number: int) -> None:
    """One keepalived from its start to its end."""

    def note(trial: str, value: float) -> None:
        say(trial=trial, side=side, round=number, value=value)

    # The kernel keeps deleted real servers for two minutes and looks for each new one among them: the second would pay.
    run("modprobe", "-r", "ip_vs_rr")
    run("modprobe", "ip_vs_rr")
    write(CONF, plan.text())
    begun = time.monotonic()
    daemon = Daemon(side)
    daemon.until("Startup complete")
    note("start", 1000 * (time.monotonic() - begun))
    compare(plan.lines())
    write(CONF, plan.text(heavy=True))
    begun = time.monotonic()
    daemon.process.send_signal(signal.SIGHUP)
    daemon.until("Reload complete")
    note("reload", 1000 * (time.monotonic() - begun))
    compare(plan.lines(heavy=True))
    time.sleep(CHECKS + 2)  # noqa: TID251  until every check has run once, and begins to run at its interval
    spent, begun = daemon.spent(), time.monotonic()
    time.sleep(CHECKS)  # noqa: TID251  the checks of one interval
    note("rest", (daemon.spent() - spent) / (time.monotonic() - begun))
    compare(plan.lines(heavy=True))
    daemon.end()
    compare([])


class Bench:
    """All of it.

    Args:
        plan: `rounds`; how many `services`, `reals` (real servers of each) and `locals` (local addresses).
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan

    def run(self) -> None:
        """The rounds."""
        plan = self.plan
        for number in range(1, plan["rounds"] + 1):
            say(begins=number)
            sides = ["fullnat", "nat", "stock"]
            for side in sides if number % 2 else reversed(sides):
                life(side, Plan(plan["services"], plan["reals"], plan["locals"], side), number)
        say(ends=plan["rounds"])


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    forwarding.main(Bench, listen)
