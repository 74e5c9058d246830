"""A client's requests, one after the other and several at once, until a file is there; a line of JSON for each.

    load.py '{"targets": [["203.0.113.1", 80]], "workers": 2, "pause": 0.05, "timeout": 4, "out": "FILE",
             "until": "FILE"}'

Run as a program on a client's network; imports nothing of the project. Every request has a connection of its own, and
its line says when it began (CLOCK_MONOTONIC), how long it took, which target it was for, and who answered or what
went wrong.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

Plan = dict[str, Any]


def ask(address: str, port: int, timeout: float) -> str:
    """One page by HTTP/1.0; returns its body. A time-out says what did not come: with SYNPROXY, always the answer."""
    end, missing = time.monotonic() + timeout, "connection"
    try:
        with socket.create_connection((address, port), timeout=timeout) as link:
            missing = "answer"
            return page(link, address, end)
    except TimeoutError:
        raise TimeoutError(f"no {missing}") from None


def page(link: socket.socket, host: str, end: float) -> str:
    """One page by a connection that stands, until a moment; returns its body."""
    link.sendall(f"GET /index.html HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
    data = b""
    while part := _received(link, end):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        raise ValueError(f"status {status[0].decode() if status else 'none'}")
    return body.decode().strip()


def _received(link: socket.socket, end: float) -> bytes:
    link.settimeout(max(0.01, end - time.monotonic()))
    return link.recv(65536)


def work(plan: Plan, number: int, stop: threading.Event, write: Callable[[dict[str, object]], None]) -> None:
    """One request after the other, of all targets in turn."""
    turn = number
    while not stop.is_set():
        address, port = plan["targets"][turn % len(plan["targets"])]
        begun = time.monotonic()
        try:
            said, wrong = ask(address, port, plan["timeout"]), ""
        except (OSError, ValueError) as error:
            said, wrong = "", f"{type(error).__name__}: {error}"
        took = time.monotonic() - begun
        write({"begun": begun, "took": took, "target": f"{address} {port}", "server": said, "error": wrong})
        turn += 1
        stop.wait(plan["pause"])


def main() -> None:
    """Read the plan and work."""
    plan = json.loads(sys.argv[1])
    stop, lock = threading.Event(), threading.Lock()
    with open(plan["out"], "a", encoding="utf-8", buffering=1) as out:

        def write(record: dict[str, object]) -> None:
            with lock:
                out.write(json.dumps(record) + "\n")

        threads = [threading.Thread(target=work, args=(plan, n, stop, write)) for n in range(plan["workers"])]
        for thread in threads:
            thread.start()
        while not stop.wait(0.2):
            if os.path.exists(plan["until"]):
                stop.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
