"""QEMU's control socket: asking a machine that runs for something (QMP)."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path

from pipeline.errors import BuildError


def monitor(control: Path, command: str, **arguments: object) -> object:
    """Ask a running QEMU for something by its control socket (QMP), and return what it answers.

    Raises:
        BuildError: nobody listens there, or QEMU refuses.
    """
    what = f"QEMU's {command} at {control}"
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(30)
            link.connect(str(control))
            with link.makefile("rw", encoding="utf-8") as stream:
                stream.readline()  # the greeting
                for words in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                    stream.write(json.dumps(words) + "\n")
                    stream.flush()
                    answer = json.loads(stream.readline() or "{}")
                    while "event" in answer:
                        answer = json.loads(stream.readline() or "{}")
    except (OSError, ValueError) as error:
        raise BuildError(f"{what}: {error}", "does the machine run?") from None
    if "return" not in answer:
        raise BuildError(f"{what}: {answer.get('error', {}).get('desc', 'no answer')}", "does the machine run?")
    return answer["return"]


def listening(control: Path) -> bool:
    """Whether QEMU's main loop runs: only then does its control socket greet, everything on its command line taken."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as link:
        link.settimeout(5)
        link.connect(str(control))
        return b"QMP" in link.recv(256)
    return False
