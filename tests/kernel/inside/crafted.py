"""What scapy makes of packets. Its import takes seconds under emulation, so nothing else imports this file."""

from __future__ import annotations

import importlib
from typing import Any

scapy: Any = importlib.import_module("scapy.all")  # by name: the host's type checker has no scapy


def recomputed(packet: bytes) -> bytes:
    """The packet taken apart and put together again, its lengths and checksums made by scapy."""
    made = (scapy.IPv6 if packet[0] >> 4 == 6 else scapy.IP)(packet)
    layer = made
    while layer:
        for name in ("chksum", "cksum", "len", "plen", "dataofs", "ihl"):
            # What an ICMP error quotes is somebody else's packet and stays as it is.
            if name in layer.fields and "error" not in type(layer).__name__.lower():
                delattr(layer, name)
        layer = layer.payload
    return bytes(made)


def described(packet: bytes) -> dict[str, Any]:
    """The fields of a TCP segment as scapy reads them."""
    segment = (scapy.IPv6 if packet[0] >> 4 == 6 else scapy.IP)(packet)[scapy.TCP]
    return {
        "ports": [segment.sport, segment.dport],
        "seq": segment.seq,
        "ack": segment.ack,
        "flags": str(segment.flags),
        "options": [[str(name), repr(value)] for name, value in segment.options],
        "payload": bytes(segment.payload),
    }
