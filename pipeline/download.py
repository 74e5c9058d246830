"""Downloads: a partial file that resumes, a hash that decides, a rename that publishes.

Four ways to fail, told apart because the next step differs: unreachable (the network), gone (the server no
longer has it), truncated (it stopped early), wrong hash (it is not the file that was pinned).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline import run, store
from pipeline.errors import BuildError

# A transfer that stops early is resumed at once, while each attempt brings bytes; this bounds a server that
# hands out a trickle before it hangs up.
_ATTEMPTS = 5

# curl's exit statuses (its manual page, "EXIT CODES").
_HTTP_ERROR = 22
_WRITE_ERROR = 23
_NO_RANGES = 33
_BROKEN_OFF = {18, 28, 52, 55, 56, 92}  # partial file, time-out, empty reply, send, receive, HTTP/2 stream


class Unreachable(BuildError):
    """No answer, or none that means anything: try later, or mend the network."""


class Gone(BuildError):
    """The server answers and does not have the file (any more)."""


class Truncated(BuildError):
    """Fewer bytes than the file has."""


class WrongHash(BuildError):
    """All bytes came, and they are not the pinned ones."""


@dataclass(frozen=True)
class Wanted:
    """The file that must arrive.

    Attributes:
        filename: its name in the store.
        size: bytes.
        sha256: 64 hex digits.
    """

    filename: str
    size: int
    sha256: str


def fetch(url: str, wanted: Wanted, target: Path, *, proxy: str | None = None) -> None:
    """Bring one file to `target`; what an earlier, interrupted run left in `<target>.part` is continued.

    Args:
        url: http or https.
        wanted: size and hash it must have.
        target: appears only when size and hash are right.
        proxy: the proxy to go through; None leaves it to the environment, "" goes direct.

    Raises:
        Unreachable, Gone, Truncated, WrongHash: see there. After `Truncated` the bytes that came are kept for
            the next attempt; after `WrongHash` they are set aside for inspection and never used.
        BuildError: curl is missing, or the disk is full.
    """
    part = part_of(target)
    part.parent.mkdir(parents=True, exist_ok=True)
    if _size(part) > wanted.size:
        part.unlink()  # more than the whole file: nothing to continue
    continued = _size(part) > 0
    try:
        _collect(url, wanted, part, proxy)
        publish(part, wanted, target, url)
    except (Gone, Unreachable):
        with contextlib.suppress(OSError):  # not empty: an older beginning is worth keeping
            part.parent.rmdir()
        raise
    except WrongHash:
        if not continued:
            raise
        # The old beginning may be another mirror's, or what a power cut left of it: only a whole transfer
        # from this address proves that this address is wrong.
        _collect(url, wanted, part, proxy)
        publish(part, wanted, target, url)


def probe(url: str, *, proxy: str | None = None) -> bool:
    """Whether the server has the file now.

    Raises:
        Unreachable: it did not answer, or neither with yes nor with no.
    """
    argv = [*_curl(proxy), "--head", "--output", "/dev/null", "--write-out", "%{http_code}", url]
    result = run.run(argv, check=False)
    code = result.stdout.strip()
    if result.returncode == 0:
        return True
    if code in ("404", "410"):
        return False
    raise _unreachable(url, code, result.stderr)


def copy(source: Path, wanted: Wanted, target: Path) -> None:
    """Take a file from a local folder.

    Raises:
        Truncated, WrongHash: it is not the pinned file. The original is left as it is.
        BuildError: the disk is full.
    """
    size = source.stat().st_size
    if size < wanted.size:
        raise Truncated(
            f"{source}: truncated, {size} of {wanted.size} bytes", f"copy {wanted.filename} there again, or remove it"
        )
    part = part_of(target)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, part)  # a copy, not a link: a later write to the original must not reach the store
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise store.disk_full(part.parent, error) from None
        raise
    found = store.digest(part)
    if found != wanted.sha256:
        part.unlink()
        raise WrongHash(
            _mismatch(str(source), wanted, found), f"compare {source} with its origin, copy it again or remove it"
        )
    _rename(part, target)


def publish(part: Path, wanted: Wanted, target: Path, origin: str) -> None:
    """Rename a complete partial file into place if its hash is right.

    Raises:
        WrongHash: it is not; the file is set aside.
    """
    found = store.digest(part)
    if found != wanted.sha256:
        # Kept, because "what did the mirror send us?" is the next question; one per file, under a name that
        # nothing looks for.
        aside = target.with_name(f"{target.name}.rejected")
        part.replace(aside)
        raise WrongHash(_mismatch(origin, wanted, found), f"file {aside}   (what came is kept there and never used)")
    _rename(part, target)


def part_of(target: Path) -> Path:
    """Where the bytes collect until they are complete and checked."""
    return target.with_name(f"{target.name}.part")


def _rename(part: Path, target: Path) -> None:
    with part.open("rb") as stream:
        os.fsync(stream.fileno())  # a power cut must not leave the name over missing bytes
    part.replace(target)


def _mismatch(origin: str, wanted: Wanted, found: str) -> str:
    return f"{origin}: wrong hash: sha256 is {found}, pinned is {wanted.sha256}"


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _curl(proxy: str | None) -> list[str]:
    curl = run.require("curl", "to download sources", "curl")
    return [
        curl,
        "--disable",  # must be first: the user's .curlrc could change what arrives
        "--fail", "--location", "--silent", "--show-error",
        "--proto", "=http,https",
        "--connect-timeout", "20",
        "--speed-limit", "1024", "--speed-time", "60",  # a stalled transfer ends; there is no total limit
        *(["--proxy", proxy] if proxy is not None else []),
    ]  # fmt: skip


def _collect(url: str, wanted: Wanted, part: Path, proxy: str | None) -> None:
    """Transfer until the partial file has its size, or no attempt brings more."""
    for _ in range(_ATTEMPTS):
        before = _size(part)
        if before == wanted.size:
            return  # complete since an earlier run; asking for the rest would be answered with 416
        again = _transfer(url, part, proxy)
        if not again or 0 < before == _size(part):
            break
    if _size(part) < wanted.size:
        raise Truncated(
            f"{url}: truncated, {_size(part)} of {wanted.size} bytes came",
            "the same command goes on where it stopped",
        )


def _transfer(url: str, part: Path, proxy: str | None) -> bool:
    """One attempt. Returns whether another one may bring more."""
    argv = [
        *_curl(proxy),
        "--retry", "2",
        "--continue-at", "-",
        "--output", str(part),
        "--write-out", "%{http_code}",
        url,
    ]  # fmt: skip
    result = run.run(argv, check=False)
    code = result.stdout.strip()[-3:]
    status = result.returncode
    # Asked to continue, curl takes 416 for "complete already" and succeeds; `_collect` has excluded that case.
    nothing_more = code == "416" and status in (0, _HTTP_ERROR)
    if status == 0 and not nothing_more:
        return False
    if status == _WRITE_ERROR:
        raise store.disk_full(part.parent, OSError(errno.ENOSPC, "no space left", str(part)))
    if status == _NO_RANGES or nothing_more:
        # The server cannot continue, or its file is shorter than what we hold: begin again.
        part.unlink(missing_ok=True)
        return True
    if status == _HTTP_ERROR and code in ("404", "410"):
        raise Gone(f"{url}: not there (HTTP {code})", "invoke sources-update   (the archive moved on)")
    if status in _BROKEN_OFF and _size(part) > 0:
        return True
    raise _unreachable(url, code, result.stderr)


def _unreachable(url: str, code: str, stderr: str) -> Unreachable:
    said = f"HTTP {code}" if code not in ("", "000") else (run.tail(stderr, 1) or ["no answer"])[0]
    return Unreachable(
        f"{url}: unreachable: {said}",
        "curl -I URL shows more; without a network: invoke bundle on a connected machine",
    )
