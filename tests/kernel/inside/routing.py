"""What the tests of the routing daemons need beside real programs: an ear for OSPF, a hand at a daemon's terminal."""

from __future__ import annotations

import re
import socket
import time

ETH_P_ALL, ETH_P_IP = 3, 0x0800
OSPF = 89  # IP protocol
_PROMPT = re.compile(rb"(Password: |[>#] )$")


def listen(device: str) -> None:
    """Print a line for each OSPF packet of a device, both ways, for ever: the moment (monotonic), the packet in hex."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as link:
        link.bind((device, ETH_P_ALL))
        print("listening", flush=True)
        while True:
            data, address = link.recvfrom(65536)
            if address[1] == ETH_P_IP and data[9] == OSPF:
                print(time.monotonic(), data.hex(), flush=True)


def terminal(port: int, lines: list[str], patience: float) -> str:
    """Type lines at a daemon's terminal, each when it prompts; returns all that it wrote."""
    seen = b""
    with socket.create_connection(("127.0.0.1", port), patience) as link:
        for line in [*lines, ""]:
            part = b""
            while not _PROMPT.search(part):
                if not (more := link.recv(65536)):  # it hung up
                    return (seen + part).decode(errors="replace")
                part += more
            seen += part
            link.sendall(line.encode() + b"\n")
    return seen.decode(errors="replace")
