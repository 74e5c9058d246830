"""Dealing local addresses: properties of shares, and of directors that come and go."""

from __future__ import annotations

import copy
from ipaddress import ip_address
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from provision import cluster as clusters
from provision.pools import Pool, Range
from tests.unit.clusters import OSPF, director


def pool(*texts: str, per_director: int, without: tuple[str, ...] = ()) -> Pool:
    return Pool("p", tuple(map(Range.parse, texts)), per_director, frozenset(map(ip_address, without)))


def test_shares_run_across_ranges() -> None:
    dealt = pool("10.0.0.1-10.0.0.3", "2001:db8::1", "10.0.1.0/30", "2001:db8::9", per_director=2)
    assert [list(map(str, dealt.share(slot))) for slot in (1, 2, 3)] == [
        ["10.0.0.1", "10.0.0.2", "2001:db8::1", "2001:db8::9"],
        ["10.0.0.3", "10.0.1.1"],
        ["10.0.1.2"],
    ]
    assert (dealt.slots(4), dealt.slots(6)) == (2, 1)


@pytest.mark.parametrize(
    ("text", "first", "last", "size"),
    [
        ("10.0.0.7", "10.0.0.7", "10.0.0.7", 1),
        ("10.0.0.0/24", "10.0.0.1", "10.0.0.254", 254),
        ("10.0.0.4/31", "10.0.0.4", "10.0.0.5", 2),
        ("10.0.0.4/32", "10.0.0.4", "10.0.0.4", 1),
        ("2001:db8::/64", "2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", 2**64 - 1),
        ("2001:db8::2 - 2001:db8::3", "2001:db8::2", "2001:db8::3", 2),
    ],
)
def test_ranges(text: str, first: str, last: str, size: int) -> None:
    found = Range.parse(text)
    assert (str(found.first), str(found.last), found.size) == (first, last, size)


RANGES = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 12), st.booleans()), min_size=1, max_size=5, unique_by=lambda r: r[0]
)
POOLS = st.builds(
    lambda ranges, per_director, holes: Pool(
        "p",
        found := tuple(
            Range(base + 100 * n, base + 100 * n + size - 1)
            for n, size, six in ranges
            for base in [ip_address("2001:db8::1" if six else "10.0.0.1")]
        ),
        per_director,
        frozenset(item.first + hole % item.size for item in found for hole in holes),
    ),
    RANGES,
    st.integers(1, 5),
    st.lists(st.integers(0, 20), max_size=3),
)
SLOTS = st.lists(st.integers(1, 12), unique=True, max_size=8)


@given(POOLS, SLOTS)
def test_shares_are_disjoint_and_out_of_the_pool(dealt: Pool, slots: list[int]) -> None:
    shares = [address for slot in slots for address in dealt.share(slot)]
    assert len(shares) == len(set(shares))
    assert all(any(item.holds(address) for item in dealt.ranges) for address in shares)
    assert not set(shares) & dealt.without


@given(POOLS)
def test_every_address_is_dealt_to_somebody(dealt: Pool) -> None:
    slots = range(1, sum(item.size for item in dealt.ranges) // dealt.per_director + 2)
    got = {address for slot in slots for address in dealt.share(slot)}
    assert got == {item.first + n for item in dealt.ranges for n in range(item.size)} - dealt.without


@given(POOLS, st.integers(1, 6))
def test_a_full_slot_has_its_number(dealt: Pool, slot: int) -> None:
    for version in dealt.versions:
        if slot <= dealt.slots(version):
            mine = [address for address in dealt.share(slot) if address.version == version]
            holes = [address for address in dealt.without if address.version == version]
            assert dealt.per_director - len(holes) <= len(mine) <= dealt.per_director


@given(POOLS, SLOTS, st.integers(0, 4), st.integers(1, 40), st.booleans())
def test_nobody_moves(dealt: Pool, slots: list[int], hole: int, longer: int, six: bool) -> None:
    """Others come and go, the pool grows at its end, an address is taken out: who stays keeps what he had."""
    before = {slot: dealt.share(slot) for slot in slots}
    last = dealt.ranges[-1].last
    grown = Pool("p", (*dealt.ranges, Range(last + 1000, last + 1000 + longer)), dealt.per_director, dealt.without)
    for slot, share in before.items():
        full = all(slot <= dealt.slots(version) for version in dealt.versions)
        if full:
            mine = tuple(a for a in grown.share(slot) if any(item.holds(a) for item in dealt.ranges))
            assert mine == share
    gone = dealt.ranges[0].first + hole % dealt.ranges[0].size
    holed = Pool("p", dealt.ranges, dealt.per_director, dealt.without | {gone})
    for slot, share in before.items():
        assert holed.share(slot) == tuple(address for address in share if address != gone)


@given(st.permutations(range(4)), st.integers(0, 3))
def test_a_director_more_moves_nobodys_addresses(order: list[int], new: int) -> None:
    """In the file's own terms: directors in any order, one of them added."""
    data = copy.deepcopy(OSPF)
    del data["ospf"]["key"], data["real_servers"]
    data["local_addresses"]["laddr_g1"]["addresses"] = ["192.168.100.1-192.168.100.16", "2001:db8:64::/120"]
    data["directors"] = [director(n + 1) for n in order]
    path = Path("/nonexistent/cluster.yaml")
    after = clusters.parse(yaml.safe_dump(data), path)
    data["directors"] = [director(n + 1) for n in order if n != new]
    before = clusters.parse(yaml.safe_dump(data), path)
    shares = {each.name: each.local_addresses for each in after.directors}
    assert all(shares[each.name] == each.local_addresses for each in before.directors)
    assert len(before.directors) == 3


def test_a_pool_is_dealt_to_those_who_need_it() -> None:
    data = copy.deepcopy(OSPF)
    del data["ospf"]["key"]
    data["local_addresses"]["g2"] = {"addresses": ["192.168.100.101"], "per_director": 1}
    data["services"][0] |= {"directors": ["lvs-1"], "local_addresses": "g2"}
    data["services"][1]["local_addresses"] = "laddr_g1"
    one, two = clusters.parse(yaml.safe_dump(data, sort_keys=False), Path("/nonexistent/cluster.yaml")).directors
    assert list(one.local_addresses) == ["laddr_g1", "g2"]
    assert list(two.local_addresses) == ["laddr_g1"], "slot 2 is beyond g2, which it does not need"
