"""Running the environment checks: over any number of hosts at once, and what they said as a table, JUnit and JSON."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import progress, run, settings
from pipeline.errors import BuildError
from provision.apply import GATE_MOST, Gate
from provision.host import Host
from provision.model import Cluster
from provision.remote import command

CHECKS = Path(__file__).with_name("checks")
_SECONDS = 900  # for all checks of all hosts, unless they are very many
_SECONDS_PER_HOST = 30
_MOST_AT_ONCE = 32
_SIGN = {"passed": "✓", "failed": "✗", "skipped": "–"}


@dataclass(frozen=True)
class Outcome:
    """What a check said of a host.

    Attributes:
        host, check: their names.
        result: passed, failed or skipped.
        message: why not passed, in one line.
        seconds: how long it took.
    """

    host: str
    check: str
    result: str
    message: str
    seconds: float


@dataclass(frozen=True)
class Where:
    """How hosts are reached and who plays the client.

    Attributes:
        ssh_config: a file for `ssh -F`; None takes the user's own.
        client: a name for ssh, `local`, or "" for nobody.
    """

    ssh_config: Path | None = None
    client: str = ""


def check(
    cluster: Cluster,
    names: Sequence[str],
    where: Where,
    junit: Path | None = None,
    out: Path | None = None,
    *,
    k: str = "",
) -> list[str]:
    """Check hosts and say what came of it.

    Args:
        cluster: the cluster, from which the expected values come.
        names: only these hosts; all where empty.
        where: how hosts are reached.
        junit: takes pytest's report as XML.
        out: takes the outcomes as JSON.
        k: only checks whose name matches this expression of pytest's.

    Returns:
        The table's lines, when no check failed.

    Raises:
        BuildError: a check failed, or none ran; after the table was printed.
    """
    hosts = cluster.chosen(tuple(names))
    outcomes = examine(cluster, hosts, where, junit=junit, k=k)
    if out is not None:
        out.write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n", encoding="utf-8")
    lines = table(outcomes)
    failed = [each for each in outcomes if each.result == "failed"]
    if failed:
        print("\n".join(lines))
        hosts_of = ", ".join(dict.fromkeys(each.host for each in failed))
        raise BuildError(
            f"{len(failed)} of {len(outcomes)} checks failed, on {hosts_of}", "read the lines with ✗ above"
        )
    return lines


def gate(cluster: Cluster, where: Where, seconds: float) -> Gate:
    """What `apply` asks of a host that it has changed: all checks but those of traffic, within some time.

    Health checks and routing need a while after a change; whoever is not well when it is over has failed. A round that
    has begun by then may end, within `GATE_MOST` seconds of the first: the host would go back before it said so.
    """

    def judge(host: Host, down: frozenset[str]) -> None:
        failed: list[Outcome] = []
        end = time.monotonic() + GATE_MOST

        def well() -> bool:
            left = max(1.0, end - time.monotonic())
            outcomes = examine(cluster, [host], where, expression="not traffic", changing=True, down=down, seconds=left)
            failed[:] = [each for each in outcomes if each.result == "failed"]
            return not failed

        try:
            run.wait_until(
                well,
                deadline=seconds,
                what=f"the checks of {host.name} pass",
                hint=f"{command('check', cluster.path, where.ssh_config)} --host {host.name}",
            )
        except BuildError as error:
            raise BuildError(
                error.message, error.hint, [f"✗ {each.check}: {each.message}" for each in failed]
            ) from error

    return judge


def examine(
    cluster: Cluster,
    hosts: Sequence[Host],
    where: Where,
    *,
    expression: str = "",
    k: str = "",
    junit: Path | None = None,
    changing: bool = False,
    down: frozenset[str] = frozenset(),
    seconds: float = 0,
) -> list[Outcome]:
    """Run the checks in a process of their own.

    Args:
        cluster, hosts, where: what is checked.
        expression: pytest's `-m`, or "".
        k: pytest's `-k`, or "".
        junit: a file that takes the report, too.
        changing: whether they are just being changed; what they logged before does not count then.
        down: real servers, as `10.0.0.1:80`, that are known to be down and may be.
        seconds: that they may take; 0 goes by the number of hosts.

    Raises:
        BuildError: they did not run.
    """
    with run.temporary_directory("lvsforge-check-") as folder:
        config, report, log = folder / "ssh_config", folder / "report.xml", folder / "log"
        config.write_text(ssh_config(hosts, where.ssh_config), encoding="utf-8")
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
        # One host needs no other process than this one.
        workers = min(len(hosts), _MOST_AT_ONCE) if len(hosts) > 1 else 0
        argv += ["-n", str(workers), "--dist=loadgroup", f"--ssh-config={config}"]
        argv += [f"--hosts={','.join(f'ssh://{host.name}' for host in hosts)}", f"--junitxml={report}", str(CHECKS)]
        argv += ["-m", expression] if expression else []
        argv += ["-k", k] if k else []
        known = {name: os.environ[name] for name in ("SSH_AUTH_SOCK", "USER", "LOGNAME") if name in os.environ}
        own = {"LVSFORGE_CLUSTER": str(cluster.path.resolve()), "LVSFORGE_SSH": str(config)}
        own |= {"LVSFORGE_DOWN": " ".join(sorted(down)), "LVSFORGE_CHANGING": "yes" if changing else ""}
        with progress.step(f"checking {len(hosts)} hosts"):
            result = run.run(
                argv,
                cwd=settings.TOP,
                env={**known, **own, "LVSFORGE_CLIENT": where.client, "PYTHONDONTWRITEBYTECODE": "1"},
                check=False,
                log=log,
                timeout=seconds or _SECONDS + _SECONDS_PER_HOST * len(hosts),
                what="checking hosts",
            )
        if k and result.returncode == 5:
            raise BuildError(f"no check matches: -k {k!r}", "the same command without -k shows their names")
        if not report.exists() or result.returncode not in (0, 1):
            raise BuildError(
                f"the checks did not run (pytest ended with {result.returncode})",
                "the same command with --debug",
                run.tail(log.read_text(encoding="utf-8")),
            )
        text = report.read_text(encoding="utf-8")
        if junit is not None:
            junit.write_text(text, encoding="utf-8")
    outcomes = read(text)
    unheard = [host.name for host in hosts if not any(each.host == host.name for each in outcomes)]
    if unheard and not k:
        raise BuildError(f"no check ran on {', '.join(unheard)}", "the same command with --debug")
    return outcomes


def ssh_config(hosts: Sequence[Host], own: Path | None) -> str:
    """A file for ssh in which the hosts have their names; what it does not say, the user's file says."""
    text = ""
    for host in hosts:
        address, port = host.ssh
        text += f"Host {host.name}\n    User root\n    BatchMode yes\n"
        text += f"    HostName {address}\n" if address != host.name else ""
        text += f"    Port {port}\n" if port else ""
        text += "    ConnectTimeout 20\n"
    files = [own.resolve()] if own else [Path("~/.ssh/config"), Path("/etc/ssh/ssh_config")]
    return text + "Host *\n" + "".join(f"    Include {file}\n" for file in files)


def read(junit: str) -> list[Outcome]:
    """The outcomes in pytest's report, in its order by host."""
    root = xml.etree.ElementTree.fromstring(junit)  # noqa: S314  pytest wrote it a moment ago
    found = []
    for case in root.iter("testcase"):
        name, _, rest = (case.get("name") or "").partition("[")
        host = rest.partition("://")[2].partition("]")[0]  # xdist adds the group's name behind
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        result = "failed" if bad is not None else "skipped" if skipped is not None else "passed"
        said = bad if bad is not None else skipped
        message = "" if said is None else (said.get("message") or said.text or "").strip()
        title = name.removeprefix("test_").replace("_", " ")
        found.append(Outcome(host, title, result, _first(message), float(case.get("time") or 0)))
    return sorted(found, key=lambda each: each.host)


# What pytest and Python put around what a check says.
_AROUND = re.compile(r'^(failed on setup with "|Failed: |AssertionError: |E\s+)+')


def _first(message: str) -> str:
    """What a check says, in one line."""
    line = next(iter(message.strip().splitlines()), "")
    found = _AROUND.match(line)
    text = line[found.end() :] if found else line
    return text.removesuffix('"').strip() if found and "setup with" in found[0] else text.strip()


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """The outcomes for people: a block for each host."""
    lines = []
    for host in dict.fromkeys(each.host for each in outcomes):
        mine = [each for each in outcomes if each.host == host]
        counts = {word: sum(each.result == word for each in mine) for word in _SIGN}
        lines.append(f"{host}: " + ", ".join(f"{count} {word}" for word, count in counts.items() if count))
        if len({each.message for each in mine if each.result != "skipped"}) == 1 and counts["failed"] > 1:
            # It does not answer: once is enough.
            lines.append(f"  {_SIGN['failed']} {next(each.message for each in mine if each.result == 'failed')}")
            continue
        width = max(len(each.check) for each in mine)
        for each in mine:
            lines.append(f"  {_SIGN[each.result]} {each.check:{width}}  {each.message}".rstrip())
    return lines
