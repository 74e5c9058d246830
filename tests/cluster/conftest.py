"""The lab of each mode, and what the stories ask of it.

    pytest -m long tests/cluster                       # boots a lab of each mode, one after the other, and ends it
    LVSFORGE_LAB=out/lab pytest -m long tests/cluster  # on the lab that `invoke lab-up` has left there, of its mode

The second way is for repeating: a story leaves the cluster as it found it, but for $LVSFORGE_NEXT, an image on which
the upgrade leaves the directors.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import run, settings
from pipeline.errors import BuildError
from provision.lab.lab import Lab, down
from provision.lab.topology import link_local
from tests.cluster import notes, oracle
from tests.cluster.notes import Row
from tests.cluster.traffic import Request, Traffic, summary, traffic

NOTES = "cluster-stories.md"
Target = tuple[str, int]


class Cluster:
    """A lab, and what an operator and its clients do with it.

    Attributes:
        lab: the lab.
        mode: ospf or vrrp.
    """

    def __init__(self, lab: Lab, work: Path) -> None:
        self.lab = lab
        self.mode = lab.cluster.mode
        self.work = work
        self._count = 0

    # --- what it is to be

    @property
    def data(self) -> dict[str, Any]:
        """The cluster file as YAML has it."""
        found: dict[str, Any] = yaml.safe_load(self.lab.file.read_text(encoding="utf-8"))
        return found

    @property
    def directors(self) -> list[str]:
        """Their names."""
        return [each["name"] for each in self.data["directors"]]

    def targets(self, *names: str) -> list[Target]:
        """The VIPs and ports of services, all without names."""
        return [
            (vip, port)
            for service in self.data["services"]
            if not names or service["name"] in names
            for vip in service["vips"]
            for port in service["ports"]
        ]

    def own(self, name: str) -> tuple[str, set[str]]:
        """A director's downlink, and the addresses of its NICs."""
        director = next(each for each in self.data["directors"] if each["name"] == name)
        texts = (text for nic in director["interfaces"] for text in nic.get("addresses", ()))
        return director["downlink"], {text.split("/")[0] for text in texts}

    def differences(self, name: str, *, down: frozenset[str] = frozenset(), master: bool = True) -> list[str]:
        """What a director holds that is not as the oracle has it."""
        said = self.lab.ask(name, "ipvsadm -S -n; echo ===; ip -o address show").partition("===\n")
        found = oracle.found(said[0], said[2], *self.own(name))
        return oracle.wanted(self.data, name, down=down, master=master).differences(found)

    def holds(self, name: str, seconds: float, *, down: frozenset[str] = frozenset(), master: bool = True) -> float:
        """Wait until a director holds what the oracle says; returns the seconds it took.

        Args:
            name: the director.
            seconds: as they are, not scaled: the time that health checks and protocols have by their configuration,
                and what the test allows beyond.
            down: real servers that fail.
            master: whether it has the VIPs, in mode vrrp.
        """
        left: list[str] = []

        def well() -> bool:
            try:
                left[:] = self.differences(name, down=down, master=master)
            except BuildError as error:  # a busy machine may be slow to answer once
                left[:] = str(error).splitlines()
            return not left

        return run.wait_until(
            well,
            deadline=seconds,
            what=f"{name} holds what the cluster file says",
            hint=f"invoke lab-ssh {name} -- ipvsadm -Ln",
            tail_of=lambda: left,
        )

    def evidence(self, requests: Sequence[Request]) -> str:
        """For the message of a failure: the slow requests, and what the directors have counted and their daemons said.

        Read at once: a later story gives directors another disk.
        """
        parts = [f"{each.begun:.2f} +{each.took:.2f} {each.target} {each.error}" for each in requests if each.took > 1]
        for name in self.directors:
            wanted = "grep -E 'Keepalived|ospf|zebra' /var/log/messages | tail -n 60"
            counted = "grep ' [1-9]' /proc/net/ip_vs_ext_stats"
            parts.append(f"{name}, at {time.monotonic():.2f}:")
            try:
                parts.append(self.lab.ask(name, f"date; {counted}; {wanted}", check=False))
            except BuildError as error:  # one that does not answer must not hide what failed
                parts.append(str(error))
        return "\n".join(parts)

    # --- who is who

    def master(self) -> str:
        """The director that has the VIPs, in mode vrrp."""
        vip = self.targets()[0][0]
        owners = [name for name in self.directors if self.lab.ask(name, f"ip -o address show to {vip}", check=False)]
        assert len(owners) == 1, f"{vip} is on {owners or 'nobody'}"
        return owners[0]

    def ways(self, vip: str) -> set[str]:
        """The directors that the router sends a VIP's packets to."""
        family, prefix = ("-6", f"{vip}/128") if ":" in vip else ("-4", f"{vip}/32")
        routes = json.loads(self.lab.ask("router", f"ip -j {family} route show {prefix}") or "[]")
        hops = [str(way.get("gateway")) for route in routes for way in route.get("nexthops") or [route]]
        found = set()
        for hop in hops:
            found.add(next((name for name in self.directors if hop in self._all_addresses(name)), hop))
        return found

    def _all_addresses(self, name: str) -> set[str]:
        """With the link-local ones, which OSPF for IPv6 speaks from; made of the MAC where the host is down."""
        director = next(each for each in self.data["directors"] if each["name"] == name)
        nic = next(each for each in director["interfaces"] if each["name"] == director["uplink"])
        return {*self.own(name)[1], link_local(nic["mac"])}

    def routed(self, vip: str, names: set[str], seconds: float) -> float:
        """Wait until the router sends a VIP's packets to these directors and nobody else."""
        return run.wait_until(
            lambda: self.ways(vip) == names,
            deadline=seconds,
            what=f"the router sends {vip} to {', '.join(sorted(names)) or 'nobody'}",
            hint="invoke lab-ssh router -- ip route",
            tail_of=lambda: [str(self.ways(vip))],
        )

    # --- what is done

    def invoke(self, task: str, *words: str, check: bool = True) -> run.Result:
        """A task on the lab's cluster file, as it is typed."""
        reach = ["--cluster", str(self.lab.file), "--ssh-config", str(self.lab.ssh_config)]
        result = run.run(
            [sys.executable, "-m", "invoke", task, *reach, *words],
            cwd=settings.TOP,
            env={"HOME": os.environ["HOME"]},
            check=False,
            timeout=self.lab.seconds(300),
        )
        assert not check or result.returncode == 0, f"invoke {task}: {result.stdout}{result.stderr}"
        return result

    @contextlib.contextmanager
    def traffic(
        self, *services: str, pause: float = 0.05, targets: Sequence[Target] | None = None
    ) -> Iterator[Traffic]:
        """Clients ask for pages of services, or of these targets, during a block; they have had some when it begins."""
        self._count += 1
        work = self.work / f"traffic-{self._count}"
        work.mkdir()
        with traffic(self.lab, work, targets or self.targets(*services), pause) as found:
            found.goes_on(20)
            yield found

    def note(self, story: str, event: str, requests: list[Request], limit: str = "", also: str = "") -> Row:
        """Write the numbers down, and say them."""
        row = Row.of(f"{story} ({self.mode})", event, requests, limit, also)
        notes.note(settings.out() / NOTES, row)
        print(f"{row.line}  {summary(requests)}")
        return row

    def checks(self) -> dict[tuple[str, str], tuple[str, str]]:
        """`invoke check`: by host and check, its result and what it said."""
        out = self.work / "check.json"
        out.unlink(missing_ok=True)
        result = self.invoke("check", "--client", "client-1", "--json", str(out), check=False)
        assert out.exists(), result.stdout + result.stderr
        return {(e["host"], e["check"]): (e["result"], e["message"]) for e in json.loads(out.read_text("utf-8"))}

    def whole(self) -> float:
        """Wait until it is as it was when it came up: every host holds what it should, routes are there.

        Returns the seconds it took.
        """
        seconds, begun = self.lab.seconds(60), time.monotonic()
        if self.mode == "ospf":
            for name in self.directors:
                self.holds(name, seconds)
            for vip, _ in self.targets():
                self.routed(vip, set(self.directors), seconds)
        else:
            first = max(self.data["directors"], key=lambda each: each["priority"])["name"]
            for name in self.directors:
                self.holds(name, seconds, master=name == first)
        return time.monotonic() - begun

    def without(self, name: str) -> bool:
        """Whether a director has no traffic, and the others all of it."""
        others = set(self.directors) - {name}
        if self.mode == "ospf":
            return all(self.ways(vip) == others for vip, _ in self.targets())
        process = self.lab.state.processes.get(name)
        has = self.vips(name) if process is not None and process.alive else set()
        return not has and {vip for vip, _ in self.targets()} <= set().union(*map(self.vips, others))

    def vips(self, name: str) -> set[str]:
        """The VIPs that are a director's addresses."""
        rows = self.lab.ask(name, "ip -o address show").splitlines()
        return {row.split()[3].split("/")[0] for row in rows} & {vip for vip, _ in self.targets()}


# --- the labs


def _up(example: str, folder: Path) -> None:
    source = settings.TOP / f"provision/examples/lab-{example}.yaml"
    names = ("HOME", "LVSFORGE_STORE", "LVSFORGE_SIGNING_KEY", "XDG_CACHE_HOME", "XDG_DATA_HOME", "LVSFORGE_OUT")
    env = {name: os.environ[name] for name in names if name in os.environ}
    words = ["lab-up", "--cluster", str(source), "--dir", str(folder)]
    result = run.run([sys.executable, "-m", "invoke", *words], cwd=settings.TOP, env=env, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@contextlib.contextmanager
def _cluster(mode: str, work: Path) -> Iterator[Cluster]:
    given = os.environ.get("LVSFORGE_LAB")
    folder = settings.TOP / given if given else work / "lab"
    try:
        if not given:
            _up(mode, folder)
        lab = Lab.open(folder)
        if lab.cluster.mode != mode:
            pytest.skip(f"LVSFORGE_LAB is a lab of mode {lab.cluster.mode}")
        with contextlib.closing(lab):
            found = Cluster(lab, work)
            found.whole()
            yield found
    finally:
        if not given:
            down(folder)


@pytest.fixture(scope="session", params=["ospf", "vrrp"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster of each mode: pytest tells all stories of the first, then those of the second."""
    with _cluster(request.param, tmp_path_factory.mktemp(request.param)) as found:
        yield found


def logged(cluster: Cluster, name: str, mark: str) -> set[str]:
    """Whom a real server's program has seen, by its log, in requests for paths with `mark` in them."""
    lines = cluster.lab.ask(name, f"grep -F {mark} /var/log/web.log || :").splitlines()
    return {re.sub("^::ffff:", "", line.split()[0]) for line in lines}
