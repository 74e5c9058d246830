"""Importance low (manual 1j, ii)."""

from __future__ import annotations

import itertools
import os
import shlex

import pytest
import testinfra

from provision.checks.conftest import Ask
from provision.ipvs import point
from provision.model import Destination, Director, Service

pytestmark = pytest.mark.importance("low")

# --- cat /proc/interrupts | grep ethx: each queue on a CPU of its own, as far as there are CPUs

# A line for each interrupt of a queue: its number, the CPU that it is to have, those that it has. Which interrupts are
# queues, and which CPUs are near, set_irq_affinity knows; where they may run, the kernel says.
_BOUND = """
set_irq_affinity --dry-run {option} {nic} | sed -n 's/.*: irq \\([0-9]*\\) .*-> cpu \\([0-9]*\\)$/\\1 \\2/p' |
while read -r irq cpu; do
    echo "$irq $cpu $(cat /proc/irq/$irq/smp_affinity_list)"
done
"""


@pytest.mark.role("director")
def test_interrupts_are_spread(ask: Ask, director: Director) -> None:
    option = f"--{director.irq_cpus or 'local-node'}"
    for nic in dict.fromkeys((director.uplink, director.downlink)):
        rows = [line.split() for line in ask(_BOUND.format(option=option, nic=nic)).splitlines()]
        assert rows, f"{nic}: no interrupt of a queue was found"
        wrong = [f"irq {irq} may run on CPU {got}, not on {wanted} alone" for irq, wanted, got in rows if got != wanted]
        assert not wrong, f"{nic}: {'; '.join(wrong)}"
    assert ask("pgrep -x irqbalance || :") == "", "irqbalance runs, and binds interrupts elsewhere"


# --- 在 client 上 curl vip，在 lvs 上 curl rs_ip


def url(address: object, port: int, service: Service, check: Destination) -> str:
    kind = check.check.kind if check.check.kind in ("http", "https") else "http"
    return f"{kind}://{point(address, port)}{check.check.path or '/'}"


@pytest.mark.role("director")
def test_real_servers_answer(ask: Ask, services: tuple[Service, ...], down: frozenset[str]) -> None:
    wrong = []
    seen = set(down)
    for service in services:
        for each in service.real_servers:
            name = point(each.address, each.port)
            if service.protocol != "TCP" or not each.weight or name in seen:
                continue
            seen.add(name)
            if each.check.kind in ("http", "https"):
                host = f"-H 'Host: {each.check.host}' " if each.check.host else ""
                target = url(each.address, each.check.port or each.port, service, each)
                words = f"{host}{shlex.quote(target)}"
                code = ask(f"curl -gkso /dev/null -m 10 --noproxy '*' -w '%{{http_code}}' {words} || :")
                if code != str(each.check.status):
                    wrong.append(f"{target}: {code or 'no answer'}, not {each.check.status}")
            else:
                tried = f"timeout 10 bash -c '</dev/tcp/{each.address}/{each.port}' 2>/dev/null && echo yes || :"
                if ask(tried) != "yes":
                    wrong.append(f"{name}: no connection")
    assert not wrong, "; ".join(wrong)


_CURL = ("curl", "-gkso", "/dev/null", "-m", "10", "--noproxy", "*", "-w", "%{http_code}")


@pytest.mark.traffic
@pytest.mark.role("director")
def test_vips_answer_a_client(services: tuple[Service, ...]) -> None:
    """From `LVSFORGE_CLIENT`, a host name for ssh; this machine is a client where it says `local`."""
    client = os.environ.get("LVSFORGE_CLIENT", "")
    if not client:
        pytest.skip("no client was named (--client HOST, or --client local)")
    place = "local://" if client == "local" else f"ssh://{client}"
    asker = testinfra.get_host(place, ssh_config=os.environ.get("LVSFORGE_SSH"))
    wrong, asked = [], 0
    for service in services:
        if service.protocol != "TCP" or not service.real_servers:
            continue
        for vip, port in itertools.product(service.vips, service.ports):
            asked += 1
            # What a health check asks of a real server's own port, a client may ask of the VIP's.
            best = next((each for each in service.real_servers if speaks_http(each)), None)
            if best is None:
                result = asker.run(f"timeout 10 bash -c '</dev/tcp/{vip}/{port}'")
                wrong += [f"{point(vip, port)}: no connection"] if result.rc else []
                continue
            target = url(vip, port, service, best)
            host = ["-H", f"Host: {best.check.host}"] if best.check.host else []
            result = asker.run(shlex.join([*_CURL, *host, target]))
            if result.stdout.strip() != str(best.check.status):
                wrong.append(f"{target}: {result.stdout.strip() or 'no answer'}, not {best.check.status}")
    assert not wrong, "; ".join(wrong)
    if not asked:
        pytest.skip("no service speaks TCP and has a real server")


def speaks_http(each: Destination) -> bool:
    return each.check.kind in ("http", "https") and each.check.port in (None, each.port)
