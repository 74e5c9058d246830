"""Pools of local addresses, dealt out to directors.

A director's share follows from its slot alone: slot 1 takes the first `per_director` addresses of the pool, slot 2 the
next, and so on. So whoever comes, goes or is written down elsewhere in the file moves nobody else's addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network, summarize_address_range

from provision.host import Address, Network, is_host


@dataclass(frozen=True)
class Range:
    """Addresses of one family, both ends included."""

    first: Address
    last: Address

    @property
    def size(self) -> int:
        """How many they are; more than `len` may say for IPv6."""
        return int(self.last) - int(self.first) + 1

    def holds(self, address: Address) -> bool:
        """Whether an address is among them."""
        return address.version == self.first.version and int(self.first) <= int(address) <= int(self.last)

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    def overlaps(self, other: Range) -> bool:
        """Whether an address is in both."""
        return (
            self.first.version == other.first.version
            and int(self.first) <= int(other.last)
            and int(other.first) <= int(self.last)
        )

    @staticmethod
    def parse(text: str) -> Range:
        """Read `10.0.0.1`, `10.0.0.1-10.0.0.9` or `10.0.0.0/24` (all its hosts).

        Raises:
            ValueError: it is neither, or hosts cannot have such addresses; the text says why.
        """
        if "/" in text:
            network = ip_network(text)
            # The ends are the network's own address (in IPv6 that of any router) and IPv4's broadcast address.
            inner = network.prefixlen < network.max_prefixlen - 1
            first = network[1] if inner else network[0]
            last = network[-2] if inner and network.version == 4 else network[-1]
        elif "-" in text:
            first, last = (ip_address(part.strip()) for part in text.split("-", 1))
        else:
            first = last = ip_address(text)
        if first.version != last.version:
            raise ValueError("its ends are of two families")
        if int(first) > int(last):
            raise ValueError("its end comes before its beginning")
        if not (is_host(first) and is_host(last)) or "%" in text:
            raise ValueError("no host can have such addresses")
        return Range(first, last)


@dataclass(frozen=True)
class Pool:
    """Local addresses that directors share.

    Attributes:
        name: keepalived's name for the group.
        ranges: the addresses, in the order of the file.
        per_director: how many of each family a director gets.
        without: addresses that nobody gets; the others keep theirs.
        routed: whether the pool's networks are routed to the directors, instead of being on their downlinks.
    """

    name: str
    ranges: tuple[Range, ...]
    per_director: int
    without: frozenset[Address] = frozenset()
    routed: bool = False

    @property
    def versions(self) -> tuple[int, ...]:
        """The families in it: 4, 6."""
        return tuple(sorted({item.first.version for item in self.ranges}))

    def slots(self, version: int) -> int:
        """How many directors it has addresses of a family for."""
        return sum(item.size for item in self.ranges if item.first.version == version) // self.per_director

    def share(self, slot: int) -> tuple[Address, ...]:
        """The addresses of the director in a slot, counted from 1; IPv4 first."""
        begin = (slot - 1) * self.per_director
        return tuple(
            address
            for version in self.versions
            for address in self._between(version, begin, begin + self.per_director)
            if address not in self.without
        )

    def networks(self) -> Iterator[Network]:
        """All of its addresses as prefixes."""
        for item in self.ranges:
            yield from summarize_address_range(item.first, item.last)

    def _between(self, version: int, begin: int, end: int) -> Iterator[Address]:
        passed = 0
        for item in self.ranges:
            if item.first.version == version:
                low, high = max(begin, passed), min(end, passed + item.size)
                for position in range(low, high):
                    yield item.first + (position - passed)
                passed += item.size
