"""SYNs of many clients who never say anything else, at a steady rate; prints how many were sent.

    python -m tests.cluster.flood SECONDS RATE ADDRESS PORT SOURCE-PREFIX FIRST LAST

Run as a program on a client's network.
"""

from __future__ import annotations

import random
import socket
import sys
import threading
import time

from tests.kernel.packets import Ends, mss, tcp

_PER_TURN = 20


def main() -> None:
    """Send them."""
    seconds, rate, port = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4])
    target, prefix, first, last = sys.argv[3], sys.argv[5], int(sys.argv[6]), int(sys.argv[7])
    begun, sent, turn = time.monotonic(), 0, threading.Event()
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as link:
        while (now := time.monotonic() - begun) < seconds:
            while sent < now * rate:
                for _ in range(_PER_TURN):
                    source = f"{prefix}{random.randint(first, last)}"  # noqa: S311  no secret
                    ends = Ends(source, random.randint(1024, 65535), target, port)  # noqa: S311
                    packet = tcp(ends, "S", seq=random.getrandbits(32), option=mss(1460))
                    link.sendto(packet, (target, 0))
                    sent += 1
            turn.wait(_PER_TURN / rate)
    print(sent)


if __name__ == "__main__":
    main()
