"""A program of BPF beside those of toa-bpf, made by hand: it asks for the segments of sockets, as they do.

And what the kernel says of theirs.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from typing import Any

# include/uapi/linux/bpf.h
BPF, PROG_LOAD, PROG_ATTACH, PROG_DETACH = 321, 5, 8, 9  # bpf(2) on x86-64, and commands of it
OBJ_GET, PROG_GET_FD_BY_ID, OBJ_GET_INFO_BY_FD = 7, 13, 15
PROG_ID, VERIFIED_INSNS = 8, 216  # in struct bpf_link_info and bpf_prog_info
SOCK_OPS, CGROUP_SOCK_OPS, ALLOW_MULTI = 13, 3, 2
CONNECT, ESTABLISHED = 3, 5  # TCP_CONNECT_CB, PASSIVE_ESTABLISHED_CB
PARSE_ALL = 16  # BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG
OP, FLAGS = 0, 84  # in struct bpf_sock_ops
SETSOCKOPT, FLAGS_SET = 49, 59  # helpers
# Instructions
LOAD, STORE, SET, COPY, ADD, OR, IS, IS_NOT, CALL, EXIT = 0x61, 0x63, 0xB7, 0xBF, 0x07, 0x47, 0x15, 0x55, 0x85, 0x95


def _instruction(code: int, to: int = 0, of: int = 0, at: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, to | of << 4, at, value)


_REPORT = [  # the flags that there are become the socket's priority, which it can be asked for
    _instruction(LOAD, 2, 6, FLAGS),
    _instruction(STORE, 10, 2, -4),
    _instruction(COPY, 1, 6),
    _instruction(SET, 2, value=socket.SOL_SOCKET),
    _instruction(SET, 3, value=socket.SO_PRIORITY),
    _instruction(COPY, 4, 10),
    _instruction(ADD, 4, value=-4),
    _instruction(SET, 5, value=4),
    _instruction(CALL, value=SETSOCKOPT),
]
_ASK = [
    _instruction(LOAD, 2, 6, FLAGS),
    _instruction(OR, 2, value=PARSE_ALL),
    _instruction(COPY, 1, 6),
    _instruction(CALL, value=FLAGS_SET),
]
_PROGRAM = [
    _instruction(COPY, 6, 1),
    _instruction(LOAD, 2, 6, OP),
    _instruction(IS, 2, at=len(_REPORT) + 1, value=ESTABLISHED),
    _instruction(IS_NOT, 2, at=len(_REPORT) + len(_ASK), value=CONNECT),
    *_REPORT,
    *_ASK,
    _instruction(SET, 0, value=1),
    _instruction(EXIT),
]


_LIBC = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return result


def _bpf(command: int, attributes: bytes) -> int:
    room = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    return _checked(_LIBC.syscall(BPF, command, room, len(room)), f"bpf({command})")


def _disconnect(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    _checked(_LIBC.connect(link.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16), "connect")


def _info(descriptor: int) -> bytes:
    room = ctypes.create_string_buffer(256)
    _bpf(OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", descriptor, len(room), ctypes.addressof(room)))
    return room.raw


def verified(link: str) -> int:
    """How many instructions the verifier looked at in the program of a pinned link; kernels from 5.16 tell."""
    path = ctypes.create_string_buffer(link.encode())
    info = _info(_bpf(OBJ_GET, struct.pack("=Q", ctypes.addressof(path))))
    program = _bpf(PROG_GET_FD_BY_ID, info[PROG_ID : PROG_ID + 4])
    return int(struct.unpack_from("=I", _info(program), VERIFIED_INSNS)[0])


def _attach(cgroup: str, how: int) -> None:
    """It stays there until the cgroup is removed."""
    code, license_ = ctypes.create_string_buffer(b"".join(_PROGRAM)), ctypes.create_string_buffer(b"GPL")
    loaded = struct.pack("=IIQQ", SOCK_OPS, len(_PROGRAM), ctypes.addressof(code), ctypes.addressof(license_))
    program, place = _bpf(PROG_LOAD, loaded), os.open(cgroup, os.O_RDONLY)
    _bpf(PROG_ATTACH, struct.pack("=IIII", place, program, CGROUP_SOCK_OPS, how))


def alone(cgroup: str, there: bool) -> None:
    """Attach the program in the way that lets no other be beside it, or take that away."""
    if there:
        _attach(cgroup, 0)
    else:
        _bpf(PROG_DETACH, struct.pack("=III", os.open(cgroup, os.O_RDONLY), 0, CGROUP_SOCK_OPS))


def flags(address: str, cgroup: str) -> dict[str, list[int]]:
    """Of a new socket and of one that was accepted at this address: the flags at each of two connect() calls.

    This process and the program are in a cgroup of their own, which has to be new: what is there runs before what the
    root has.
    """
    os.mkdir(cgroup)
    with open(f"{cgroup}/cgroup.procs", "w", encoding="utf-8") as stream:
        stream.write("0")
    _attach(cgroup, ALLOW_MULTI)
    found: dict[str, list[int]] = {}

    def twice(link: socket.socket, target: Any) -> list[int]:
        seen = []
        for _ in range(2):
            _disconnect(link)
            link.connect(target)
            seen.append(link.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY))
        return seen

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener, socket.socket(family) as link:
        found["new"] = twice(link, listener.getsockname())
        with socket.create_server((address, 0), family=family) as other:
            with socket.create_connection(other.getsockname()[:2]):
                child, _ = other.accept()
            with child:
                found["accepted"] = twice(child, listener.getsockname())
    return found
