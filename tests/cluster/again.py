"""Pages by source ports that are known, all at once; prints a line of JSON for each: its port, and what went wrong.

    python -m tests.cluster.again '[["OWN-ADDRESS", "ADDRESS", PORT, SOURCE-PORT, SECONDS], ...]'

Run as a program on a client's network. Source port 0 is one that the kernel chooses. Who gives up leaves nothing
behind: the port can be taken again at once.
"""

from __future__ import annotations

import concurrent.futures
import json
import socket
import struct
import sys
import time

from tests.cluster.load import page


def ask(own: str, address: str, port: int, source: int, seconds: float) -> dict[str, object]:
    """One page by a source port of an own address."""
    end = time.monotonic() + seconds
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as link:
        # Closing resets what stands: no FIN to send again, no TIME_WAIT.
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.bind((own, source))
        named = link.getsockname()[1]
        link.settimeout(seconds)
        wrong = ""
        try:
            link.connect((address, port))
            page(link, address, end)
        except (OSError, ValueError) as error:
            wrong = f"{type(error).__name__}: {error}"
        return {"source": named, "error": wrong}


def main() -> None:
    """Ask for all of them."""
    pages = json.loads(sys.argv[1])
    with concurrent.futures.ThreadPoolExecutor(len(pages)) as pool:
        for said in pool.map(lambda each: ask(*each), pages):
            print(json.dumps(said))


if __name__ == "__main__":
    main()
