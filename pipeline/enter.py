"""Mount overlays in this (private) mount namespace, then become the given command.

Run as a program by `pipeline.sandbox`; imports nothing of the project so that `python -I` suffices.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys


def main() -> None:
    """Mount each overlay on its own upper directory's sibling and exec."""
    spec = json.loads(sys.argv[1])
    argv = spec["argv"]
    libc = ctypes.CDLL(None, use_errno=True)
    for layer in spec["overlays"]:
        merged = layer["upper"].rstrip("/") + ".merged"
        for path in (layer["upper"], layer["work"], merged):
            os.makedirs(path, exist_ok=True)
        options = f"lowerdir={layer['lower']},upperdir={layer['upper']},workdir={layer['work']}"
        if libc.mount(b"overlay", merged.encode(), b"overlay", 0, options.encode()) != 0:
            error = ctypes.get_errno()
            sys.exit(f"cannot mount an overlay on {merged} ({options}): {os.strerror(error)}")
        argv = [merged if word == layer["token"] else word for word in argv]
    os.execv(argv[0], argv)  # noqa: S606  becoming the command is the purpose


main()
