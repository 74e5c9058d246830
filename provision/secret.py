"""Secrets: named in the cluster file by where they are, read when they are needed, never printed."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import Problems

HIDDEN = "(secret)"
_MAX_BYTES = 4096  # a longer file is a mistaken path
# What a daemon's configuration takes as one word, whatever stands in it.
_WORD = re.compile(r"[!-~]+")
_SPECIAL = re.compile(r"[\"'#!\\{}$]")  # quotes, comments, blocks and variables of keepalived's and FRR's files
# Where a rendered file holds one, and a daemon's complaint that repeats such a line: VRRP's and OSPF's keys, passwords
# of the routing daemons' terminals.
_LINES = (
    re.compile(r"(?m)(\bauth_pass\s+)\S.*$"),
    re.compile(r"(?m)(\bmessage-digest-key \d+ md5\s+)\S.*$"),
    re.compile(r"(?m)(\b(?:authentication-key|key-string)\s+)\S.*$"),
    re.compile(r"(?m)(\bipv6 ospf6 authentication .* key\s+)\S.*$"),
    re.compile(r"(?m)(\bpassword\s+(?:8\s+)?)\S.*$"),
)


class Secret:
    """A password or key; only `value` tells it."""

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return HIDDEN

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)


def read(data: Any, folder: Path, problems: Problems, place: str, longest: int) -> Secret | None:
    """Find out a secret.

    Args:
        data: `{file: PATH}` or `{env: NAME}`.
        folder: where a relative path starts.
        problems: takes what is wrong with it, without a word of it.
        place: its dotted path.
        longest: the characters that its protocol or daemon takes.

    Returns:
        The secret, or None and a problem.
    """
    if not isinstance(data, Mapping) or len(data) != 1:
        if isinstance(data, Mapping):
            problems.add(place, "exactly one of file and env is wanted")
        return None
    text: str | None = None
    if isinstance(name := data.get("env"), str):
        place = f"{place}.env"
        text = os.environ.get(name)
        if text is None:
            problems.add(place, f"the environment has no {name}; type: read -rs {name} && export {name}")
    elif isinstance(name := data.get("file"), str):
        place = f"{place}.file"
        text = _file(folder / name, problems, place)
    if text is None:
        return None
    if not text:
        problems.add(place, "it is empty")
    elif not _WORD.fullmatch(text) or _SPECIAL.search(text):
        problems.add(place, "one word of ASCII without quotes, blanks and the characters # ! \\ { } $ is wanted")
    elif len(text) > longest:
        problems.add(place, f"it has {len(text)} characters; {longest} are taken")
    else:
        return Secret(text)
    return None


def _file(path: Path, problems: Problems, place: str) -> str | None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            problems.add(place, f"{path} is no file")
        elif status.st_size > _MAX_BYTES:
            problems.add(place, f"{path} has {status.st_size} bytes; that is no password")
        elif status.st_mode & 0o007:
            problems.add(place, f"{path} may be read by everybody; type: chmod 600 {path}")
        else:
            return path.read_text(encoding="utf-8").rstrip("\n")
    except FileNotFoundError:
        problems.add(place, f"{path} does not exist")
    except UnicodeDecodeError:
        problems.add(place, f"{path} is not UTF-8")
    except (OSError, ValueError) as error:
        problems.add(place, f"{path} cannot be read: {error}")
    return None


def hide(text: str) -> str:
    """A rendered file's text without its secrets, old ones included: they are found by the words before them."""
    for pattern in _LINES:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text
