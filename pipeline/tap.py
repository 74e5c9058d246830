"""Open network taps of another network namespace, then become the given command, in our own.

    tap.py PID PORT=NUMBER … -- COMMAND …

The command has each tap of the namespace that process PID is in as descriptor NUMBER. A machine's frames go into the
lab, while its ssh port is still forwarded from here. Run as a program; imports nothing of the project, so that
`python -I` suffices.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys

_CLONE_NEWNET = 0x40000000  # sched.h
_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000


def main() -> None:
    """Do it; the arguments are those of the program."""
    words = sys.argv[1:]
    split = words.index("--")
    pid, *taps = words[:split]
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net", "rb") as ours, open(f"/proc/{pid}/ns/net", "rb") as theirs:
        _enter(libc, theirs.fileno())
        for tap in taps:
            name, _, number = tap.partition("=")
            opened = os.open("/dev/net/tun", os.O_RDWR)
            try:
                fcntl.ioctl(opened, _TUNSETIFF, struct.pack("16sH14x", name.encode(), _IFF_TAP | _IFF_NO_PI))
            except OSError as error:
                sys.exit(f"the port {name} cannot be opened: {error.strerror}")
            os.dup2(opened, int(number), inheritable=True)
            os.close(opened)
        _enter(libc, ours.fileno())
    command = words[split + 1 :]
    os.execvp(command[0], command)  # noqa: S606  becoming the command is the purpose


def _enter(libc: ctypes.CDLL, namespace: int) -> None:
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        sys.exit(f"a network namespace cannot be entered: {os.strerror(error)}")


if __name__ == "__main__":
    main()
