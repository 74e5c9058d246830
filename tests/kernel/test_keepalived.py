"""keepalived on our kernel: FULLNAT, and reloads that change what differs and nothing else.

The real servers here have no checks where none is needed, so they are up at once; `MISC_CHECK` of a file is one that a
test decides. Connections stay open and are used while the configuration changes under them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.kernel.balancer import ETC, PROGRAM, SYN_PROXY, Balancer
from tests.kernel.lab import Namespace
from tests.kernel.machine import Background
from tests.kernel.topology import FAMILIES, HOST, Site, service

pytestmark = [pytest.mark.build, pytest.mark.guest]
UP = "/tmp/up"  # noqa: S108  the guest's; files that checks look for
NOTE = "/tmp/quorum"  # noqa: S108  the guest's


@dataclass(frozen=True)
class Real:
    """A real server.

    Attributes:
        address, port: of it.
        weight: of it.
        check: the name of a file that must exist; "": it is not checked.
        more: more lines.
    """

    address: str
    port: int = 80
    weight: int = 1
    check: str = ""
    more: tuple[str, ...] = ()

    def text(self) -> str:
        """Its block."""
        lines = [f"weight {self.weight}", *self.more]
        if self.check:
            path = f'"/usr/bin/test -e {UP}-{self.check}"'
            # by default a check that takes a second has failed, and on a busy host one can
            lines += ["MISC_CHECK {", f"misc_path {path}", "misc_timeout 20"]
            lines += ["delay_loop 1", "retry 1", "delay_before_retry 1", "}"]
        return "\n".join([f"real_server {self.address} {self.port} {{", *lines, "}"])


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

    def lines(self, *, locals_: Sequence[str] = (), timeout: int = 0, down: Sequence[str] = ()) -> list[str]:
        """What ipvsadm shows of it when all is well."""
        letter, way = self.protocol[0].lower(), {"FNAT": "-b", "NAT": "-m"}[self.method]
        found = []
        for vip in self.vips:
            where = f"-{letter} {service(vip, self.port)}"
            said = (f" -V {timeout}" if timeout else "") + (" -j enable" if "syn_proxy" in self.more else "")
            found.append(f"-A {where} -s rr{said}")
            found += [f"-P {where} -z {local}" for local in locals_]
            found += [
                f"-a {where} -r {service(real.address, real.port)} {way} -w {real.weight}"
                for real in self.reals
                if real.address not in down
            ]
        return found


class Balanced:
    """A site whose director runs keepalived."""

    def __init__(self, site: Callable[..., Site], **plan: Any) -> None:
        self.net = site(**plan)
        self.net.serve()
        self.keepalived = Balancer(self.net.director)
        self.guest = self.net.director.guest
        self.guest.run("sh", "-c", f"rm -f {UP}-*")

    def vip(self, family: int, number: int = 0) -> str:
        """A virtual address that is not on the director yet."""
        return self.net.vip(family, 10 + number)

    def configure(self, *virtuals: Virtual, head: str = "") -> None:
        """Write the configuration."""
        self.keepalived.configure(head + "\n".join(virtual.text() for virtual in virtuals))

    def up(self, name: str, *, on: bool = True) -> None:
        """Decide a check."""
        self.guest.run(*(["touch"] if on else ["rm", "-f"]), f"{UP}-{name}")

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

    def noting(self) -> tuple[str, str]:
        """Scripts for changes of the quorum, whose runs `noted` tells."""
        self.guest.run("rm", "-f", NOTE)
        return f'quorum_up "echo up >>{NOTE}; true"', f'quorum_down "echo down >>{NOTE}; true"'

    def noted(self) -> list[str]:
        """What they were executed for until now."""
        return self.guest.run("sh", "-c", f"cat {NOTE} 2>/dev/null || :").out.split()


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


@pytest.mark.parametrize("family", FAMILIES)
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


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "no group": (lambda text: text.replace("laddr_group_name locals_of_web", "laddr_group_name nobody"),
                 r"\(.*keepalived.conf: Line \d+\) Virtual server \[web\]:\d+: there is no local_address_group nobody"),
    "overlap": (lambda text: text.replace("10.0.2.201\n", "10.0.2.199-203\n"),
                r"\(.*keepalived.conf: Line 6\) local_address_group locals_of_web: 10.0.2.199-203: it overlaps"),
    "own address": (lambda text: text.replace("10.0.2.201\n", "10.0.2.1\n"),
                    r"\(.*keepalived.conf: Line 6\) local_address_group locals_of_web: 10.0.2.1: .* interface back"),
    "empty": (lambda text: text.replace("10.0.2.200\n10.0.2.201\n", ""),
              r"\(.*keepalived.conf: Line \d+\) .*local_address_group locals_of_web, which FNAT needs, has no IPv4"),
    "typing error": (lambda text: text.replace("lvs_sched", "lvs_shed"),
                     r"\(.*keepalived.conf: Line \d+\) Unknown keyword 'lvs_shed'"),
    "no end": (lambda text: text.rstrip().removesuffix("}"),
               r"\(.*keepalived.conf: Line 8\) The block that starts here has no end: there are 1 missing '}'s"),
    "no file": (lambda text: "\nincludea missing.conf\n" + text,
                r"\(.*keepalived.conf: Line 2\) Config files missing 'missing.conf'"),
}  # fmt: skip


def test_what_is_broken_is_not_loaded(balanced: Callable[..., Balanced]) -> None:
    where = balanced()
    net, keepalived = where.net, where.keepalived
    web = Virtual("web", (net.vip(4),), tuple(Real(a) for a in net.addresses(4)), tuple(_addresses(net, 4, 2)))
    shown = sorted(web.lines(locals_=_addresses(net, 4, 2)))
    where.configure(web)
    keepalived.start()
    keepalived.must_program(shown)
    talk = where.chat(web.vips[0])
    for name, (damage, wanted) in BROKEN.items():
        broken = damage(web.text())
        assert broken != web.text(), name
        keepalived.configure(broken)
        checked = keepalived.check()
        assert checked.status != 0, name
        assert re.search(wanted, checked.err), checked
        said = keepalived.reload()
        assert len([line for line in said if re.search(wanted, line)]) == 1, said
        assert "The new configuration has errors, keeping the old one" in said
        assert keepalived.programmed() == shown, name
        where.must_go_on(talk)
    # Not even a checker that dies reads it.
    since = len(keepalived.log())
    where.guest.run("kill", "-KILL", where.guest.read(_checker(where)).strip())
    keepalived.wait_for("Starting Healthcheck child process", since)
    keepalived.wait_for("Gained quorum|Activating healthchecker|Initializing ipvs", since)
    keepalived.must_program(shown)
    where.must_go_on(talk)
    # and a good one is
    where.configure(dataclasses.replace(web, more=("est_timeout 60",)))
    assert "Reload complete" in keepalived.reload()
    keepalived.must_program(dataclasses.replace(web).lines(locals_=_addresses(net, 4, 2), timeout=60))
    keepalived.stop()


def _checker(where: Balanced) -> str:
    return next(f"/run/{name}" for name in where.guest.ask("listing", path="/run") if name.startswith("checkers"))


def test_failed_and_replaced_real_servers(balanced: Callable[..., Balanced]) -> None:
    where = balanced(servers=4)
    net, keepalived = where.net, where.keepalived
    a, b, c, d = (Real(address, check=name) for address, name in zip(net.addresses(4), "abcd", strict=True))
    local = _addresses(net, 4, 1)
    more = ("inhibit_on_failure", *where.noting())
    web = Virtual("web", (where.vip(4), where.vip(4, 1)), (a, b), tuple(local), more=more)
    noted = where.noted

    for name in "abcd":
        where.up(name)
    where.configure(web)
    keepalived.start()
    keepalived.must_program(web.lines(locals_=local))
    keepalived.wait_until(lambda: noted() == ["up"], lambda: str(noted()), 20)
    # b fails, and is taken out of the configuration while it does
    where.up("b", on=False)
    failed = dataclasses.replace(b, weight=0)
    keepalived.must_program(dataclasses.replace(web, reals=(a, failed)).lines(locals_=local), 30)
    where.configure(dataclasses.replace(web, reals=(a,)))
    keepalived.reload()
    assert keepalived.programmed() == sorted(dataclasses.replace(web, reals=(a,)).lines(locals_=local))
    # a is replaced by c and d: there is quorum all the time
    now = dataclasses.replace(web, reals=(c, d))
    where.configure(now)
    keepalived.reload()
    keepalived.must_program(now.lines(locals_=local))
    assert noted() == ["up"]
    # another script for a service that is up
    more = (web.more[0], f'quorum_up "echo again >>{NOTE}; true"', web.more[2])
    where.configure(dataclasses.replace(now, more=more))
    keepalived.reload()
    keepalived.wait_until(lambda: noted() == ["up", "again"], lambda: str(noted()), 20)
    # both fail: weight 0 and down
    where.up("c", on=False)
    where.up("d", on=False)
    dead = tuple(dataclasses.replace(real, weight=0) for real in (c, d))
    keepalived.must_program(dataclasses.replace(now, reals=dead).lines(locals_=local), 30)
    keepalived.wait_until(lambda: noted() == ["up", "again", "down"], lambda: str(noted()), 20)
    # FNAT to NAT while they are down: they stay at weight 0, the local addresses are not needed any more
    natted = dataclasses.replace(now, method="NAT", reals=dead)
    where.configure(dataclasses.replace(now, method="NAT", more=more))
    keepalived.reload()
    assert keepalived.programmed() == sorted(natted.lines())
    keepalived.stop()
    assert keepalived.programmed() == []


def _sorry(where: Balanced, web: Virtual, address: str) -> list[str]:
    """What ipvsadm shows of the sorry server in place of the real servers, by the failed ones with weight 0."""
    real = Real(address)
    failed = web.reals if "inhibit_on_failure" in web.more else ()
    shown = (real, *(dataclasses.replace(each, weight=0) for each in failed))
    return dataclasses.replace(web, reals=shown).lines(locals_=_addresses(where.net, 4, 1))


@pytest.mark.parametrize("inhibit", [(), ("inhibit_on_failure",)], ids=["removed", "inhibited"])
def test_a_corrected_check_ends_the_sorry_server(balanced: Callable[..., Balanced], inhibit: tuple[str, ...]) -> None:
    where = balanced(servers=3)
    keepalived = where.keepalived
    first, second, sorry = where.net.addresses(4)
    local = _addresses(where.net, 4, 1)
    more = (f"sorry_server {sorry} 80", *where.noting(), *inhibit)
    reals = (Real(first, check="wrong"), Real(second, check="wrong"))
    web = Virtual("web", (where.vip(4), where.vip(4, 1)), reals, tuple(local), more=more)
    where.configure(web)
    keepalived.start()
    keepalived.must_program(_sorry(where, web, sorry), 30)
    keepalived.wait_until(lambda: where.noted() == ["up", "down"], lambda: str(where.noted()), 20)
    where.up("right")
    now = dataclasses.replace(web, reals=tuple(dataclasses.replace(real, check="right") for real in reals))
    where.configure(now)
    said = keepalived.reload()
    assert keepalived.programmed() == sorted(now.lines(locals_=local))
    assert not [line for line in said if " error" in line], said
    keepalived.wait_until(lambda: where.noted() == ["up", "down", "up"], lambda: str(where.noted()), 20)
    # it knows how many real servers the services have: one is still taken away with its address
    now = dataclasses.replace(now, vips=now.vips[1:])
    where.configure(now)
    keepalived.reload()
    assert keepalived.programmed() == sorted(now.lines(locals_=local))
    keepalived.stop()
    assert keepalived.programmed() == []


def test_a_reload_judges_the_quorum_by_all_real_servers(balanced: Callable[..., Balanced]) -> None:
    """The check of the first one is changed, when the state of the others has yet to be taken over."""
    where = balanced(servers=4)
    keepalived = where.keepalived
    first, second, third, sorry = where.net.addresses(4)
    local = _addresses(where.net, 4, 1)
    more = (f"sorry_server {sorry} 80", *where.noting())
    reals = (Real(first, check="wrong"), Real(second, check="second"), Real(third, check="third"))
    web = Virtual("web", (where.vip(4),), reals, tuple(local), more=("quorum 2", *more))

    def corrected(check: str, quorum: int = 2) -> list[str]:
        now = (dataclasses.replace(reals[0], check=check), *reals[1:])
        where.configure(dataclasses.replace(web, reals=now, more=(f"quorum {quorum}", *more)))
        return keepalived.reload()

    for name in ("second", "third", "right", "again"):
        where.up(name)
    where.configure(web)
    keepalived.start()
    keepalived.must_program(web.lines(locals_=local, down=[first]), 30)
    # two of three are up, and then three: nothing is lost in between
    said = corrected("right")
    assert keepalived.programmed() == sorted(web.lines(locals_=local))
    assert not [line for line in said if re.search("quorum|sorry| error", line)], said
    # one is up
    where.up("second", on=False)
    where.up("right", on=False)
    keepalived.must_program(_sorry(where, web, sorry), 30)
    keepalived.wait_until(lambda: where.noted() == ["up", "down"], lambda: str(where.noted()), 20)
    # two are, but three are asked for: they do not get in beside the sorry server
    corrected("again", quorum=3)
    assert keepalived.programmed() == sorted(_sorry(where, web, sorry))
    # and now they are enough, with the one that never failed
    said = corrected("again")
    assert keepalived.programmed() == sorted(web.lines(locals_=local, down=[second]))
    assert not [line for line in said if " error" in line], said
    keepalived.wait_until(lambda: where.noted() == ["up", "down", "up"], lambda: str(where.noted()), 20)
    keepalived.stop()
    assert keepalived.programmed() == []


@pytest.mark.parametrize("inhibit", [(), ("inhibit_on_failure",)], ids=["removed", "inhibited"])
@pytest.mark.parametrize("quorum", [1, 2])
def test_real_servers_are_added_while_the_sorry_server_stands_in(
    balanced: Callable[..., Balanced], quorum: int, inhibit: tuple[str, ...]
) -> None:
    """They take no traffic beside it: they replace it once they are enough."""
    where = balanced(servers=4)
    keepalived = where.keepalived
    first, second, third, sorry = where.net.addresses(4)
    local = _addresses(where.net, 4, 1)
    more = (f"quorum {quorum}", f"sorry_server {sorry} 80", *where.noting(), *inhibit)
    web = Virtual("web", (where.vip(4), where.vip(4, 1)), (Real(first, check="never"),), tuple(local), more=more)
    where.configure(web)
    keepalived.start()
    keepalived.must_program(_sorry(where, web, sorry), 30)
    keepalived.wait_until(lambda: "down" in where.noted(), lambda: str(where.noted()), 20)
    failed = tuple(dataclasses.replace(real, weight=0) for real in web.reals) if inhibit else ()
    for count in range(1, 3):
        added = tuple(Real(address) for address in (second, third)[:count])
        where.configure(dataclasses.replace(web, reals=web.reals + added))
        said = keepalived.reload()
        wanted = dataclasses.replace(web, reals=failed + added).lines(locals_=local)
        assert keepalived.programmed() == sorted(wanted if count >= quorum else _sorry(where, web, sorry))
        assert not [line for line in said if " error" in line], said
    keepalived.wait_until(lambda: where.noted()[-1] == "up", lambda: str(where.noted()), 20)
    keepalived.stop()
    assert keepalived.programmed() == []


@pytest.mark.parametrize("inhibit", [(), ("inhibit_on_failure",)], ids=["removed", "inhibited"])
def test_another_sorry_server_takes_the_place_of_the_first(
    balanced: Callable[..., Balanced], inhibit: tuple[str, ...]
) -> None:
    """One real server is up, which is not enough."""
    where = balanced(servers=4)
    keepalived = where.keepalived
    first, second, sorry, another = where.net.addresses(4)
    local = _addresses(where.net, 4, 1)
    reals = (Real(first), Real(second, check="second"))
    more = ("quorum 2", *where.noting(), *inhibit)
    web = Virtual("web", (where.vip(4), where.vip(4, 1)), reals, tuple(local), more=(f"sorry_server {sorry} 80", *more))
    now = dataclasses.replace(web, more=(f"sorry_server {another} 80", *more))
    where.configure(web)
    keepalived.start()
    keepalived.must_program(_sorry(where, web, sorry), 30)
    where.configure(now)
    said = keepalived.reload()
    assert keepalived.programmed() == sorted(_sorry(where, now, another))
    assert not [line for line in said if " error" in line], said
    where.up("second")
    keepalived.must_program(now.lines(locals_=local), 30)
    keepalived.stop()
    assert keepalived.programmed() == []


def test_a_mark_leaves_a_group_while_the_sorry_server_stands_in(balanced: Callable[..., Balanced]) -> None:
    where = balanced(servers=2)
    keepalived = where.keepalived
    first, sorry = where.net.addresses(4)
    (local,) = _addresses(where.net, 4, 1)
    web = Virtual("web", (), (Real(first, check="never"),), (local,), more=(f"sorry_server {sorry} 80",))

    def configured(*marks: int) -> list[str]:
        group = "\n".join(f"fwmark {mark}" for mark in marks)
        keepalived.configure(web.text().replace("virtual_server_group web {", f"virtual_server_group web {{\n{group}"))
        return [
            line
            for mark in marks
            for line in (f"-A -f {mark} -s rr", f"-P -f {mark} -z {local}", f"-a -f {mark} -r {sorry}:80 -b -w 1")
        ]

    wanted = configured(7, 8)
    keepalived.start()
    keepalived.must_program(wanted, 30)
    wanted = configured(8)
    said = keepalived.reload()
    assert keepalived.programmed() == sorted(wanted)
    assert not [line for line in said if " error" in line], said
    keepalived.stop()
    assert keepalived.programmed() == []


def test_an_address_and_a_real_server_go_together(balanced: Callable[..., Balanced]) -> None:
    """The real server is not looked for in the service that is gone, but taken out of all others."""
    where = balanced(servers=2)
    keepalived = where.keepalived
    reals = tuple(Real(address) for address in where.net.addresses(4))
    local = _addresses(where.net, 4, 1)
    web = Virtual("web", tuple(where.vip(4, number) for number in range(3)), reals, tuple(local))
    udp = dataclasses.replace(web, protocol="UDP")

    def less(virtual: Virtual) -> Virtual:
        return dataclasses.replace(virtual, vips=virtual.vips[1:], reals=virtual.reals[:1])

    def configure(*virtuals: Virtual) -> list[str]:
        texts = [virtual.text() for virtual in virtuals]
        # they share the group that the first one describes
        keepalived.configure(texts[0] + "".join(text[text.index("virtual_server group") :] for text in texts[1:]))
        return [line for virtual in virtuals for line in virtual.lines(locals_=local)]

    def reloaded(*virtuals: Virtual) -> None:
        wanted = configure(*virtuals)
        said = keepalived.reload()
        assert keepalived.programmed() == sorted(wanted)
        assert not [line for line in said if " error" in line], said

    wanted = configure(web, udp)
    keepalived.start()
    keepalived.must_program(wanted)
    reloaded(less(web), less(udp))
    reloaded(web, udp)
    # and the other protocol leaves the group
    reloaded(less(web))
    keepalived.stop()
    assert keepalived.programmed() == []


def test_an_address_is_bound_while_any_service_is_up(balanced: Callable[..., Balanced]) -> None:
    where = balanced()
    net, keepalived = where.net, where.keepalived
    address = net.addresses(4)[0]
    present = keepalived.bound("lo")
    bind = ("vip_bind_dev lo", "alpha")
    web = Virtual("web", (where.vip(4),), (Real(address, check="web"),), tuple(_addresses(net, 4, 1)), more=bind)
    dns = Virtual(
        "dns", (where.vip(4), where.vip(4, 1)), (Real(address, 53, check="dns"),), tuple(_addresses(net, 4, 1)),
        port=53, protocol="UDP", more=bind,
    )  # fmt: skip
    real6, local6 = Real(net.addresses(6)[0], check="six"), tuple(_addresses(net, 6, 1))
    six = Virtual("six", (where.vip(6),), (real6,), local6, more=bind)
    # left by an instance that was killed
    net.director.ip(f"addr add {where.vip(4)}/{HOST[4]} dev lo")
    where.configure(web, dns, six)
    keepalived.start()
    keepalived.must_bind("lo", present)
    where.up("web")
    keepalived.must_bind("lo", [*present, where.vip(4)])
    where.up("dns")
    keepalived.must_bind("lo", [*present, where.vip(4), where.vip(4, 1)])
    where.up("six")
    keepalived.must_bind("lo", [*present, where.vip(4), where.vip(4, 1), where.vip(6)])
    assert net.clients[0].get(where.vip(6))[0].split()[0] == "server0"
    # one of the two goes
    where.up("web", on=False)
    keepalived.wait_for(r"Lost quorum .*\[web\]")
    keepalived.must_bind("lo", [*present, where.vip(4), where.vip(4, 1), where.vip(6)])
    where.up("dns", on=False)
    keepalived.must_bind("lo", [*present, where.vip(6)])
    # by a reload
    where.up("dns")
    keepalived.must_bind("lo", [*present, where.vip(4), where.vip(4, 1), where.vip(6)])
    where.configure(dataclasses.replace(dns, vips=(where.vip(4, 1),)), six)
    said = keepalived.reload()
    keepalived.must_bind("lo", [*present, where.vip(4, 1), where.vip(6)])
    assert [line for line in said if "Virtual address" in line] == [f"Virtual address {where.vip(4)} removed from lo"]
    where.configure(six)
    keepalived.reload()
    keepalived.must_bind("lo", [*present, where.vip(6)])
    keepalived.stop()
    keepalived.must_bind("lo", present)


def test_an_address_that_a_script_has_bound_is_taken_over(balanced: Callable[..., Balanced]) -> None:
    """And given back: what keepalived removes the script binds again."""
    where = balanced()
    net, keepalived = where.net, where.keepalived
    present = keepalived.bound("lo")
    vip = f"{where.vip(4)}/{HOST[4]} dev lo"
    web = Virtual("web", (where.vip(4),), (Real(net.addresses(4)[0]),), tuple(_addresses(net, 4, 1)))
    script = dataclasses.replace(web, more=(f'quorum_up "ip addr add {vip};"', f'quorum_down "ip addr del {vip};"'))
    where.configure(script)
    keepalived.start()
    keepalived.must_bind("lo", [*present, where.vip(4)])
    where.configure(dataclasses.replace(web, more=("vip_bind_dev lo",)))
    said = keepalived.reload()
    assert not [line for line in said if "Virtual address" in line]
    assert where.vip(4) in keepalived.bound("lo")
    where.configure(script)
    said = keepalived.reload()
    assert [line for line in said if "Virtual address" in line] == [f"Virtual address {where.vip(4)} removed from lo"]
    keepalived.must_bind("lo", [*present, where.vip(4)])
    keepalived.stop()


def test_udp_ports_and_firewall_marks(balanced: Callable[..., Balanced]) -> None:
    where = balanced()
    net, keepalived = where.net, where.keepalived
    net.echo(port=5353)
    for server in net.servers:
        server.serve(port=8080)
    text = "local_address_group all {\n10.0.2.200-201 back\n10.0.2.202-10.0.2.203\nfd00:2::200-203\n}\n"
    for family in FAMILIES:
        for protocol, port, real in (("UDP", 53, 5353), ("TCP", 80, 8080)):
            text += f"virtual_server {net.vip(family)} {port} {{\nlvs_sched rr\nlb_kind FNAT\nprotocol {protocol}\n"
            text += "laddr_group_name all\n"
            text += "".join(f"real_server {a} {real} {{\n}}\n" for a in net.addresses(family)) + "}\n"
    text += "virtual_server fwmark 7 {\nlvs_sched rr\nlvs_method FNAT\nladdr_group_name all\nest_timeout 30\n"
    text += f"real_server {net.addresses(4)[0]} 8080 {{\n}}\n}}\n"
    keepalived.configure(text)
    keepalived.start()
    mark = "type filter hook prerouting priority -150; tcp dport 81 meta mark set 7;"
    net.director.nft(f"table ip m {{ chain p {{ {mark} }}; }}")
    client = net.clients[0]
    for family in FAMILIES:
        assert set(client.ask(net.vip(family), text="x").split()) & set(_addresses(net, family))
        assert client.get(net.vip(family))[0].split()[1] in _addresses(net, family)
    name, address, _ = client.get(net.vip(4), port=81)[0].split()
    assert name == "server0"
    assert address in _addresses(net, 4)
    lines = keepalived.programmed()
    assert [line for line in lines if "-f 7" in line] == sorted(
        ["-A -f 7 -s rr -V 30", f"-a -f 7 -r {net.addresses(4)[0]}:8080 -b -w 1"]
        + [f"-P -f 7 -z {local}" for local in _addresses(net, 4)]
    )
    keepalived.stop()


def test_what_it_shows(balanced: Callable[..., Balanced]) -> None:
    where = balanced()
    net, keepalived = where.net, where.keepalived
    snmp = keepalived.program != PROGRAM  # the one that ships has none
    more = ("syn_proxy", "est_timeout 90", "vip_bind_dev lo")
    local = (net.local(4), "10.0.2.202-203 back")
    web = Virtual("web", (where.vip(4),), (Real(net.addresses(4)[0]),), local, more=more)
    where.configure(web)
    if snmp:
        _start_snmpd(net.director)
        keepalived.options = ("--snmp",)
    keepalived.start()
    dump = keepalived.dump()
    for line in (
        " Local Address Group = locals_of_web, IPv4 = 3, IPv6 = 0",
        "   LIP = 10.0.2.200",
        "   LIP Range = 10.0.2.202-10.0.2.203, interface = back",
        "   local address group = locals_of_web",
        "   SYN proxy is ON",
        "   established timeout = 90",
        "   VIPs are bound to lo, bound = 1",
        "   default forwarding method = FNAT",
        "   forwarding method = FNAT",
    ):
        assert line in dump, "\n".join(dump)
    if snmp:
        rows = _walk(net.director, "1.3.6.1.4.1.9586.100.5.3.3.1")
        wanted = {"10": "5", "200": "locals_of_web", "201": "3", "202": "1", "203": "90", "204": "lo"}
        assert {oid.split(".")[0]: value for oid, value in rows.items() if oid.split(".")[0] in wanted} == wanted
    keepalived.stop()


def _start_snmpd(host: Namespace) -> None:
    """The agent that shares its socket with keepalived."""
    host.guest.run("mkdir", "-p", "/var/agentx")
    host.guest.write("/tmp/snmpd.conf", "master agentx\nrocommunity public\nagentaddress udp:127.0.0.1:161\n")  # noqa: S108
    host.start("snmpd", "-f", "-Lo", "-C", "-c", "/tmp/snmpd.conf", "-I", "-smux")  # noqa: S108
    host.wait_for_port(161, "udp")


def _walk(host: Namespace, oid: str) -> dict[str, str]:
    out = host.run("snmpwalk", "-v2c", "-c", "public", "-OnqtU", "127.0.0.1", oid, seconds=20).out
    rows = (line.partition(" ") for line in out.splitlines() if " " in line)
    return {name.removeprefix(f".{oid}."): value.strip('"') for name, _, value in rows}


def test_it_starts_and_ends_without_services(balanced: Callable[..., Balanced]) -> None:
    """A configuration that loses its last virtual server, and gets it back."""
    where = balanced()
    net, keepalived = where.net, where.keepalived
    web = Virtual("web", (net.vip(4),), (Real(net.addresses(4)[0]),), (net.local(4),))
    where.configure(web)
    keepalived.start()
    keepalived.must_program(web.lines(locals_=[net.local(4)]))
    keepalived.configure(f"include {ETC}/nothing.conf\n")
    keepalived.reload()
    keepalived.must_program([])
    where.configure(web)
    keepalived.reload()
    keepalived.must_program(web.lines(locals_=[net.local(4)]))
    keepalived.stop()


def test_protocols_that_share_a_group(balanced: Callable[..., Balanced]) -> None:
    """A virtual server of another protocol joins a group, and the one that was there first leaves it."""
    where = balanced()
    net, keepalived = where.net, where.keepalived
    local = _addresses(net, 4, 1)
    web = Virtual("web", (where.vip(4), where.vip(4, 1)), tuple(Real(a) for a in net.addresses(4)), tuple(local))
    udp = dataclasses.replace(web, protocol="UDP")
    second = udp.text()[udp.text().index("virtual_server group") :]
    where.configure(web)
    keepalived.start()
    keepalived.must_program(web.lines(locals_=local))
    keepalived.configure(web.text() + second)
    keepalived.reload()
    assert keepalived.programmed() == sorted([*web.lines(locals_=local), *udp.lines(locals_=local)])
    where.configure(udp)
    keepalived.reload()
    assert keepalived.programmed() == sorted(udp.lines(locals_=local))
    where.configure(web)
    keepalived.reload()
    assert keepalived.programmed() == sorted(web.lines(locals_=local))
    keepalived.stop()
    assert keepalived.programmed() == []
