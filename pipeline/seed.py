"""NoCloud seeds: a host's identity on a small read-only disk, written without any tool and the same bytes each time.

The disk is an ISO 9660 file system labelled `cidata` with Rock Ridge names; cloud-init finds it by its label, whether
it comes as a CD or as a virtio disk.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import BuildError, Problems

LABEL = "cidata"
FILES = ("meta-data", "network-config", "user-data", "vendor-data")
_BLOCK = 2048
_ROOT = 20  # blocks: 0-15 system area, 16 primary descriptor, 17 terminator, 18 and 19 path tables, 20 the root
_DATE = bytes([125, 1, 1, 0, 0, 0, 0])  # 2025-01-01T00:00:00Z: the year since 1900, month, day, h, m, s, zone


def write(target: Path, files: Mapping[str, str]) -> None:
    """Write a seed disk.

    Args:
        target: the file; replaced whole.
        files: the contents of `user-data` and `meta-data`, and of `network-config` and `vendor-data` if wanted.
            An empty network-config is refused: cloud-init's versions differ in what they make of it, so leave it out.

    Raises:
        BuildError: a needed file is missing, a name is unknown, or a content is empty; all problems at once.
    """
    problems = Problems()
    for name in ("user-data", "meta-data"):
        if name not in files:
            problems.add(name, "missing; cloud-init ignores a seed without it")
    for name, text in files.items():
        if name not in FILES:
            problems.add(name, f"not a NoCloud file (known: {', '.join(FILES)})")
        elif not text.strip() and name != "vendor-data":
            problems.add(name, "empty")
    problems.raise_if_any(f"the seed {target.name}", "correct what renders it")
    image = iso({name: text.encode() for name, text in files.items()}, LABEL)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".new")
    beside.write_bytes(image)
    beside.rename(target)


def minimal(hostname: str, public_key: str) -> dict[str, str]:
    """The smallest useful seed: a name and root's ssh key, the network by DHCP.

    Args:
        hostname: the host's name.
        public_key: one line as in authorized_keys.
    """
    user = f"#cloud-config\nhostname: {hostname}\ndisable_root: false\nssh_authorized_keys:\n  - {public_key}\n"
    return {"user-data": user, "meta-data": f"instance-id: {instance_id(user)}\nlocal-hostname: {hostname}\n"}


def instance_id(*texts: str) -> str:
    """An id that changes with the seed: cloud-init skips most of its work for an id that it has seen."""
    return "i-" + hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def iso(files: Mapping[str, bytes], label: str) -> bytes:
    """An ISO 9660 image with Rock Ridge of one flat directory.

    Args:
        files: contents by name; names of up to 64 characters.
        label: the volume's name.

    Raises:
        BuildError: the directory does not fit one block (about 12 files), which is all that this writer does.
    """
    names = sorted(files)
    places: dict[str, int] = {}
    block = _ROOT + 1
    for name in names:
        places[name] = block
        block += -(-len(files[name]) // _BLOCK)
    total = block
    # The first "." carries SP, which is what makes Linux read Rock Ridge at all, and ER, which libisofs also asks for.
    start = b"SP\x07\x01\xbe\xef\0" + b"ER\x12\x01\x0a\0\0\x01RRIP_1991A" + _posix(0o40555)
    entries = _record(b"\0", _ROOT, _BLOCK, directory=True, extra=start)
    entries += _record(b"\1", _ROOT, _BLOCK, directory=True, extra=_posix(0o40555))
    for number, name in enumerate(names):
        plain = f"FILE{number:04d}.;1".encode("ascii")  # for readers without Rock Ridge; sorted as ISO 9660 demands
        encoded = name.encode("ascii")
        extra = b"NM" + bytes([5 + len(encoded), 1, 0]) + encoded + _posix(0o100444)
        entries += _record(plain, places[name], len(files[name]), extra=extra)
    if len(entries) > _BLOCK:
        raise BuildError(f"{len(files)} files do not fit a seed", "put fewer files at the seed's top level")
    paths_little = struct.pack("<BBIHB", 1, 0, _ROOT, 1, 0) + b"\0"
    paths_big = struct.pack(">BBIHB", 1, 0, _ROOT, 1, 0) + b"\0"
    blocks = [b""] * 16 + [_descriptor(label, total), b"\xffCD001\x01", paths_little, paths_big, entries]
    body = b"".join(part.ljust(_BLOCK, b"\0") for part in blocks)
    for name in names:
        body += files[name] + b"\0" * (-len(files[name]) % _BLOCK)
    return body


def _both(value: int, size: int) -> bytes:
    """A number in both byte orders, as ISO 9660 wants it."""
    return value.to_bytes(size, "little") + value.to_bytes(size, "big")


def _posix(mode: int) -> bytes:
    """Rock Ridge PX: mode, links, owner, group (all root's)."""
    return b"PX\x24\x01" + _both(mode, 4) + _both(1, 4) + _both(0, 4) + _both(0, 4)


def _record(name: bytes, block: int, size: int, *, directory: bool = False, extra: bytes = b"") -> bytes:
    padded = name + (b"\0" if len(name) % 2 == 0 else b"")
    tail = padded + extra
    length = 33 + len(tail)
    length += length % 2
    head = bytes([length, 0]) + _both(block, 4) + _both(size, 4) + _DATE + bytes([2 if directory else 0, 0, 0])
    return (head + _both(1, 2) + bytes([len(name)]) + tail).ljust(length, b"\0")


def _descriptor(label: str, total: int) -> bytes:
    date = b"2025010100000000\0"
    never = b"0000000000000000\0"
    root = _record(b"\0", _ROOT, _BLOCK, directory=True)
    return b"".join(
        [
            b"\x01CD001\x01\0",
            b"LINUX".ljust(32),
            label.encode("ascii").ljust(32),
            b"\0" * 8,
            _both(total, 4),
            b"\0" * 32,
            _both(1, 2),
            _both(1, 2),
            _both(_BLOCK, 2),
            _both(10, 4),
            struct.pack("<II", 18, 0),
            struct.pack(">II", 19, 0),
            root,
            b" " * (128 * 4),
            b" " * (37 * 3),
            date + date + never + never,
            b"\x01\0",
        ]
    )
