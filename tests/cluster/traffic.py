"""Requests of clients while something happens, and what can be said of them afterwards."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import run
from provision.lab.lab import Lab

LOAD = Path(__file__).with_name("load.py")
CLIENTS = ("client-1", "client-2")
WORKERS = 2  # of each of them: what it asks for at once
# A client gives up after this long: longer than SYNs that are sent again after 1 and 3 s, shorter than a dead interval.
TIMEOUT = 4.0
_SECONDS_EACH = 0.1  # under KVM: far more than a page takes
# What becomes of a connection that stands when its path moves to a director that does not know it.
_BROKEN = ("TimeoutError: no answer", "ConnectionResetError")


@dataclass(frozen=True)
class Request:
    """A request: when it began (CLOCK_MONOTONIC), the seconds it took, for whom, who answered, or what went wrong."""

    begun: float
    took: float
    target: str
    server: str
    error: str

    @property
    def ended(self) -> float:
        """When it was over."""
        return self.begun + self.took


def read(text: str) -> list[Request]:
    """What load.py has written, in the order in which the requests began; a line that is not yet whole is left out."""
    lines = text.splitlines(keepends=True)
    return sorted((Request(**json.loads(line)) for line in lines if line.endswith("\n")), key=lambda each: each.begun)


def failed(requests: Sequence[Request]) -> list[Request]:
    """Those that went wrong."""
    return [each for each in requests if each.error]


def outage(requests: Sequence[Request]) -> float:
    """The longest outage: seconds from the first request of it that failed to the first good one after its last.

    Answers in between end nothing, as half of the ways may be good, until none has failed for `TIMEOUT`: what fails
    later, when a path moves back, is another one. 0 where none failed.

    Raises:
        ValueError: nothing was good again after the last failure, so that nobody knows how long it was.
    """
    stretches: list[list[Request]] = []
    for each in failed(requests):
        if not stretches or each.begun - max(one.ended for one in stretches[-1]) > TIMEOUT:
            stretches.append([])
        stretches[-1].append(each)
    longest = 0.0
    for bad in stretches:
        again = [each.begun for each in requests if not each.error and each.begun > bad[-1].begun]
        if not again:
            raise ValueError(f"no good request after the last that failed: {bad[-1]}")
        longest = max(longest, min(again) - bad[0].begun)
    return longest


def under_way(requests: Sequence[Request], period: tuple[float, float]) -> list[Request]:
    """Those that were under way at some moment of a period."""
    return [each for each in requests if each.begun <= period[1] and each.ended >= period[0]]


def not_moved(bad: Sequence[Request], periods: Sequence[tuple[float, float]]) -> list[Request]:
    """The failures that no move of connections' paths explains.

    A target's paths move once in each period, and break the connections that stand at that moment: what a new one of
    them asks is answered. So those of a target that were under way at one moment are left out, but none that was
    refused, or that had no connection.

    Args:
        bad: requests that failed.
        periods: in which paths moved.
    """
    left = list(bad)
    for period in periods:
        here = [each for each in under_way(left, period) if each.error.startswith(_BROKEN)]
        for target in {each.target for each in here}:
            asked = [each for each in here if each.target == target]
            moments = [[one for one in asked if one.begun <= each.begun <= one.ended] for each in asked]
            moved = max(moments, key=len)
            left = [each for each in left if each not in moved]
    return left


def summary(requests: Sequence[Request]) -> str:
    """How many failed, of how many, and in which ways."""
    bad = failed(requests)
    kinds = sorted({f"{each.target}: {each.error}" for each in bad})
    return f"{len(bad)} of {len(requests)} failed" + (f" ({'; '.join(kinds)})" if kinds else "")


class Traffic:
    """Clients at work.

    Attributes:
        files: what each of them writes.
    """

    def __init__(self, lab: Lab, files: Sequence[Path]) -> None:
        self.lab = lab
        self.files = files

    def so_far(self) -> list[Request]:
        """The requests that have ended."""
        return read("".join(file.read_text(encoding="utf-8") for file in self.files if file.exists()))

    def goes_on(self, count: int = 40) -> None:
        """Wait until so many more requests have been answered."""
        before = time.monotonic()

        def enough() -> bool:
            return sum(not each.error and each.begun > before for each in self.so_far()) >= count

        run.wait_until(
            enough,
            deadline=self.lab.seconds(5 + count * _SECONDS_EACH),
            what=f"{count} good requests",
            hint="read the clients' files",
            tail_of=lambda: [str(each) for each in self.so_far()[-6:]],
        )


@contextlib.contextmanager
def traffic(lab: Lab, work: Path, targets: Sequence[tuple[str, int]], pause: float = 0.05) -> Iterator[Traffic]:
    """Let both clients ask for pages during a block; when it ends, all requests have ended.

    Args:
        lab: where.
        work: an empty folder.
        targets: addresses and ports.
        pause: seconds between the requests of each worker of a client.
    """
    files, stop = [], work / "stop"
    with contextlib.ExitStack() as stack:
        processes = []
        for client in CLIENTS:
            file = work / f"{client}.jsonl"
            plan = {"targets": targets, "workers": WORKERS, "pause": pause, "timeout": TIMEOUT}
            plan |= {"out": str(file), "until": str(stop)}
            argv = lab.space(client).network_argv([sys.executable, "-I", str(LOAD), json.dumps(plan)])
            processes.append(stack.enter_context(run.start(argv, log=work / f"{client}.log")))
            files.append(file)
        found = Traffic(lab, files)
        yield found
        stop.touch()
        for process in processes:
            assert process.wait(TIMEOUT * 3) == 0, process.tail()
