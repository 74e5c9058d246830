"""keepalived on our kernel: FULLNAT, and reloads that change what differs and nothing else.

The real servers here have no checks, so they are up at once. Connections stay open and are used while the configuration
changes under them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.kernel.balancer import SYN_PROXY, Balancer
from tests.kernel.machine import Background
from tests.kernel.topology import Site, service

pytestmark = [pytest.mark.build, pytest.mark.guest]


@dataclass(frozen=True)
class Real:
    """A real server.

    Attributes:
        address, port: of it.
        weight: of it.
    """

    address: str
    port: int = 80
    weight: int = 1

    def text(self) -> str:
        """Its block."""
        return "\n".join([f"real_server {self.address} {self.port} {{", f"weight {self.weight}", "}"])


@dataclass(frozen=True)
class Virtual:
    """A virtual server and its group.

    Attributes:
        name: of the group.
        vips: of it.
        reals: the real servers.
        locals_: lines of its group of local addresses; none without FNAT.
        method: as `lvs_method` has it.
        more: more lines.
    """

    name: str
    vips: tuple[str, ...]
    reals: tuple[Real, ...]
    locals_: tuple[str, ...] = ()
    method: str = "FNAT"
    port: int = 80
    protocol: str = "TCP"
    more: tuple[str, ...] = ()

    def text(self) -> str:
        """All of its blocks."""
        group = f"locals_of_{self.name}"
        lines = [f"virtual_server_group {self.name} {{", *(f"{vip} {self.port}" for vip in self.vips), "}"]
        if self.locals_:
            lines += [f"local_address_group {group} {{", *self.locals_, "}"]
        lines += [f"virtual_server group {self.name} {{", "delay_loop 1", "lvs_sched rr", f"protocol {self.protocol}"]
        lines += [f"lvs_method {self.method}", *([f"laddr_group_name {group}"] if self.locals_ else []), *self.more]
        return "\n".join([*lines, *(real.text() for real in self.reals), "}", ""])

    def lines(self, *, locals_: Sequence[str] = (), timeout: int = 0) -> list[str]:
        """What ipvsadm shows of it when all is well."""
        letter, way = self.protocol[0].lower(), {"FNAT": "-b", "NAT": "-m"}[self.method]
        found = []
        for vip in self.vips:
            where = f"-{letter} {service(vip, self.port)}"
            found.append(f"-A {where} -s rr{f' -V {timeout}' if timeout else ''}")
            found += [f"-P {where} -z {f'[{local}]' if ':' in local else local}" for local in locals_]
            found += [f"-a {where} -r {service(real.address, real.port)} {way} -w {real.weight}" for real in self.reals]
        return found


class Balanced:
    """A site whose director runs keepalived."""

    def __init__(self, site: Callable[..., Site], **plan: Any) -> None:
        self.net = site(**plan)
        self.net.serve()
        self.keepalived = Balancer(self.net.director)
        self.guest = self.net.director.guest

    def vip(self, family: int, number: int = 0) -> str:
        """A virtual address that is not on the director yet."""
        return self.net.vip(family, 10 + number)

    def configure(self, *virtuals: Virtual, head: str = "") -> None:
        """Write the configuration."""
        self.keepalived.configure(head + "\n".join(virtual.text() for virtual in virtuals))

    def chat(self, address: str, count: int = 4) -> Background:
        """Connections that are used all the time; returns when each has had an answer."""
        client = self.net.clients[0]
        job = client.start_call("servers:chat", address=address, port=80, count=count, patience=5 * self.guest.scale)
        client.wait_until(lambda: job.so_far() != "", f"answers from {address}")
        return job

    def must_go_on(self, job: Background) -> None:
        """Fail unless the connections are still answered."""
        before = len(job.so_far().splitlines())
        self.net.clients[0].wait_until(lambda: len(job.so_far().splitlines()) >= before + 2, "two more rounds")

    def scheduled(self, address: str) -> int:
        """The connections that a service has had: one that is made anew begins at 0."""
        rows = self.net.director.ipvsadm("-L", "-n", "--stats", "--exact").out.splitlines()
        (row,) = [row.split() for row in rows if row.split()[1:2] == [service(address, 80)]]
        return int(row[2])


@pytest.fixture
def balanced(site: Callable[..., Site]) -> Iterator[Callable[..., Balanced]]:
    """Makes a site with keepalived."""
    made: list[Balanced] = []

    def make(**plan: Any) -> Balanced:
        made.append(Balanced(site, **plan))
        return made[-1]

    yield make
    for each in made:
        each.keepalived.end()


def _addresses(net: Site, family: int, count: int = 4) -> list[str]:
    return [net.local(family, number) for number in range(count)]


@pytest.mark.parametrize("family", [4])
def test_a_reload_changes_what_differs(balanced: Callable[..., Balanced], family: int) -> None:
    where = balanced(servers=3)
    net, keepalived = where.net, where.keepalived
    first, second, third = (Real(address) for address in net.addresses(family))
    one, two, three, four = _addresses(net, family)
    web = Virtual("web", (where.vip(family),), (first, second), (one, two), more=("vip_bind_dev lo",))
    other = Virtual("other", (where.vip(family, 5),), (third,), (three,), more=("vip_bind_dev lo",))
    where.configure(web, other)
    keepalived.start()
    present = keepalived.bound("lo")
    keepalived.must_program([*web.lines(locals_=(one, two)), *other.lines(locals_=(three,))])
    talk, talk_other = where.chat(web.vips[0]), where.chat(other.vips[0], 1)
    counts = [4, 1]

    def scheduled() -> list[int]:
        return [where.scheduled(vip) for vip in (web.vips[0], other.vips[0])]

    # the kernel adds them up every two seconds
    net.director.wait_until(lambda: scheduled() == counts, "the connections in the services' counters")

    def reloaded(now: Virtual, **shown: Any) -> list[str]:
        where.configure(now, other)
        said = keepalived.reload()
        assert not [line for line in said if re.search("error|cannot|old one", line)], said
        wanted = [*now.lines(**{"locals_": (one, two), **shown}), *other.lines(locals_=(three,))]
        assert keepalived.programmed() == sorted(wanted)
        where.must_go_on(talk)
        where.must_go_on(talk_other)
        # not taken away and made again
        assert scheduled() == counts
        return said

    change = dataclasses.replace
    # nothing, a real server, its weight
    reloaded(web)
    more = change(web, reals=(first, second, third))
    reloaded(more)
    reloaded(change(more, reals=(first, second, change(third, weight=7))))
    reloaded(web)
    # a virtual address; with another change to the whole service at the same time
    wide = change(web, vips=(where.vip(family), where.vip(family, 1)))
    reloaded(wide)
    keepalived.must_bind("lo", [*present, wide.vips[1]])
    assert net.clients[0].get(wide.vips[1])[0].split()[1] in (one, two)
    wider = change(web, vips=(*wide.vips, where.vip(family, 2)), more=(*web.more, "est_timeout 77"))
    reloaded(wider, timeout=77)
    reloaded(web)
    keepalived.must_bind("lo", present)
    # local addresses
    reloaded(change(web, locals_=(one, two, four)), locals_=(one, two, four))
    reloaded(change(web, locals_=(f"{one} back", three)), locals_=(one, three))
    reloaded(web)
    # what is said of the service
    reloaded(change(web, more=(*web.more, "est_timeout 90")), timeout=90)
    reloaded(change(web, more=(*web.more, "establish_timeout 91")), timeout=91)
    reloaded(web)
    assert not keepalived.flags(web.vips[0]) & SYN_PROXY
    reloaded(change(web, more=(*web.more, "syn_proxy")))
    assert keepalived.flags(web.vips[0]) & SYN_PROXY
    reloaded(web)
    assert not keepalived.flags(web.vips[0]) & SYN_PROXY
    # all of it goes
    where.configure(other)
    keepalived.reload()
    assert keepalived.programmed() == sorted(other.lines(locals_=(three,)))
    where.must_go_on(talk_other)
    keepalived.stop()
    assert keepalived.programmed() == []
    keepalived.must_bind("lo", present - {web.vips[0], other.vips[0]})
