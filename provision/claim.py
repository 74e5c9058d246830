"""Whose host it is while it is changed: a claim on the host itself, which keeps two runs of `apply` apart.

The claim is a file with its owner's lines; its time of modification is until when it holds. Whoever reads or replaces
it, and every script of the run that has it, holds a lock on the host: a claim changes hands between scripts only.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import secrets
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline import progress
from pipeline.errors import BuildError
from provision.remote import Answer, Remote, judged

UNIT = "lvs-rollback"  # the timer by which a host goes back by itself, and its service
_PLACE = "/var/lib/lvs"
_FILE = f"{_PLACE}/apply.claim"
_LOST = 75  # sysexits.h: try again later
_UNWRITTEN = 74  # sysexits.h: an error of the disk
_LOCK_SECONDS = 60
_LOCK = f"""
(umask 022; mkdir -p {_PLACE})
exec 9>{_PLACE}/apply.lock
flock -w {_LOCK_SECONDS} 9 || {{
    echo "another script has worked here for {_LOCK_SECONDS} s" >&2
    exit {_LOST}
}}
"""
# What is there: the timer, its service, until when the claim holds on the host's clock; then the owner's lines.
_LOOK = f"""
timer=no back=no
systemctl is-active --quiet {UNIT}.timer && timer=yes
systemctl is-active --quiet {UNIT}.service && back=yes
echo "timer=$timer"
echo "back=$back"
echo "now=$(date +%s)"
[ ! -e {_FILE} ] || {{ echo "until=$(stat -c %Y {_FILE})"; cat {_FILE}; }}
"""
# Stops a timer that may be there or not.
STOP = f"systemctl stop {UNIT}.timer 2>/dev/null || :; systemctl reset-failed {UNIT} 2>/dev/null || :"


@dataclass(frozen=True)
class Owner:
    """A run of `apply`.

    Attributes:
        run: a random word, for each host another one.
        who: user@host.
        process: machine, boot, PID namespace, PID and start time, by which its own machine knows whether it runs.
        since: when it began, UTC.
    """

    run: str
    who: str
    process: str
    since: str

    @property
    def lines(self) -> str:
        """As the claim has it."""
        return f"run={self.run}\nwho={self.who}\nprocess={self.process}\nsince={self.since}\n"


def ourselves() -> Owner:
    """This process, with a new `run`."""
    since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return Owner(secrets.token_hex(8), f"{getpass.getuser()}@{platform.node()}", _process(os.getpid()), since)


def _process(pid: int) -> str:
    """A process of this machine; ends with an empty start time where there is none."""

    def text(path: str) -> str:
        with contextlib.suppress(OSError):
            return Path(path).read_text(encoding="utf-8").strip()
        return ""

    # The name in parentheses may have blanks; the start time is field 22 of proc(5), the 20th after it.
    started = text(f"/proc/{pid}/stat").rpartition(")")[2].split()[19:20] or [""]
    words = (text("/etc/machine-id"), text("/proc/sys/kernel/random/boot_id"), os.readlink("/proc/self/ns/pid"))
    return "/".join((*words, str(pid), *started))


def is_gone(who: str, process: str) -> bool:
    """Whether a run is known to have ended: it was this user's, on this machine, and its process is not there."""
    machine, *rest = process.split("/")
    here, *ours = ourselves().process.split("/")
    if who != ourselves().who or not machine or machine != here or len(rest) != len(ours) or not rest[2].isdigit():
        return False
    # Of another PID namespace nothing is known, but that no process outlives a boot.
    return rest[0] != ours[0] or (rest[1] == ours[1] and _process(int(rest[2])) != process)


class Claimed:
    """A `Remote` whose scripts run only while the host is still ours."""

    def __init__(self, remote: Remote, owner: Owner) -> None:
        self.name = remote.name
        self.login = remote.login
        self._remote = remote
        self._guard = f"""{_LOCK}
grep -qxF run={owner.run} {_FILE} 2>/dev/null || {{
    echo "this host is another run's now: $(sed -n 's/^who=//p' {_FILE} 2>/dev/null || :)" >&2
    exit {_LOST}
}}
"""

    def run(self, script: str, *, check: bool = True, what: str = "") -> Answer:
        answer = self._remote.run(f"{self._guard}{script}", check=False, what=what)
        if answer.status == _LOST:
            said = answer.stderr.strip()
            raise BuildError(f"{self.name}: {what or 'a script'}: not done: {said}", "wait for its end") from None
        return judged(self, answer, what) if check else answer

    def put(self, data: bytes, path: str) -> None:
        self._remote.put(data, path)


@contextlib.contextmanager
def held(remote: Remote, seconds: int, rollback: str, *, take_over: bool, hint: str) -> Iterator[Remote]:
    """Have a host for ourselves; a change that was left on it is undone first.

    Args:
        remote: the host.
        seconds: how long the claim holds, unless `extended` says another time.
        rollback: the script on the host that undoes a change.
        take_over: go back now from another run's change.
        hint: the command that does so.

    Yields:
        The host, whose scripts run only while it is ours.

    Raises:
        BuildError: another run has it, or it is going back this moment.
    """
    owner = ourselves()
    found = _take(remote, owner, seconds)
    if found is not None:
        _may_replace(remote.name, found, take_over, hint)
        again = _take(remote, owner, seconds, found.get("run", ""), rollback)
        if again is not None:
            _may_replace(remote.name, again, False, hint)
            raise BuildError(f"{remote.name}: another run has taken it this moment", "the same command again")
    ours = Claimed(remote, owner)
    try:
        yield ours
    finally:
        # With its timer the host is still in a change that was not undone: the claim says whose.
        with contextlib.suppress(BuildError):
            ours.run(f"systemctl is-active --quiet {UNIT}.timer || rm -f {_FILE}", what="giving it back")


def extended(seconds: int) -> str:
    """The line of a script after which the claim holds for so many seconds."""
    return f"touch -d '{seconds} seconds' {_FILE}"


def _take(
    remote: Remote, owner: Owner, seconds: int, old: str | None = None, rollback: str = ""
) -> dict[str, str] | None:
    """Take a host that is free, or the one of the run `old`; else say what is there.

    Raises:
        BuildError: the host cannot be asked, or its disk is full.
    """
    what = "looking whose it is"
    free = f"[ ! -e {_FILE} ] && [ $timer$back = nono ]"
    if old is not None:
        was = f'[ "$(sed -n s/^run=//p {_FILE} 2>/dev/null || :)" = {shlex.quote(old)} ] && [ $back = no ]'
        free = f"{{ {was}; }}"
    undo = f"if [ $timer = yes ]; then /bin/sh {rollback}; {STOP}; fi" if rollback else ":"
    answer = remote.run(
        f"""{_LOCK}
{_LOOK}
if {free}; then
    {undo}
    # cat names the reason, which no shell's own printf does.
    printf %s {shlex.quote(owner.lines)} | cat >{_FILE}.new || {{ rm -f {_FILE}.new; exit {_UNWRITTEN}; }}
    touch -d '{seconds} seconds' {_FILE}.new
    mv {_FILE}.new {_FILE}
    echo taken=yes
fi""",
        check=False,
        what=what,
    )
    if answer.status == _UNWRITTEN:
        raise BuildError(
            f"{remote.name}:{_FILE} could not be written: {answer.stderr.strip()}",
            f"{remote.login} df -h {_PLACE}",
        )
    judged(remote, answer, what)
    found = dict(line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line)
    return None if "taken" in found else found


def _may_replace(name: str, found: dict[str, str], take_over: bool, hint: str) -> None:
    """Whether a claim that is there is a leftover.

    Raises:
        BuildError: it is not.
    """
    if found.get("back") == "yes":
        raise BuildError(f"{name} is going back to its old files this moment", "the same command in a minute")
    who, since = found.get("who", "somebody"), found.get("since", "a time that is not known")
    until = int(found.get("until") or 0)
    over = found.get("timer") == "no" and until <= int(found["now"])
    gone = is_gone(who, found.get("process", ""))
    if over or gone or take_over:
        if found.get("timer") == "yes":
            progress.note(f"{name}: the change of {who} since {since} is undone first")
        return
    end = f"{datetime.fromtimestamp(until, UTC):%Y-%m-%d %H:%M:%S} UTC" if until else "its timer's end"
    raise BuildError(
        f"{name} is being changed by {who} since {since}",
        f"wait for its end, by {end} at the latest; or, when nobody is at work there any more: {hint}",
        [] if found.get("timer") == "no" else [f"unless that run ends before, {name} goes back by itself at {end}"],
    )
