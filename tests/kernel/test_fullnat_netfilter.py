"""FULLNAT beside connection tracking, packet filters and reverse path filters."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.kernel.machine import Failed
from tests.kernel.topology import FAMILIES, Site

pytestmark = [pytest.mark.build, pytest.mark.guest]
BULK = 200_000  # bytes
# No rule has a set: lockdep reports how nf_tables of this release looks one up, under a mutex that it does not know of
# (mended upstream), and a test fails on every report.
ICMP = "meta l4proto icmp accept; meta l4proto ipv6-icmp accept"
# With connection tracking: what is new must be for a service, the rest must belong to something, and what the
# tracker takes for nonsense is dropped, at each hook.
TRACKED = f"""
table inet filter {{
  counter invalid {{}}
  counter refused {{}}
  chain input {{
    type filter hook input priority filter; policy drop;
    ct state invalid counter name invalid drop
    ct state established,related accept
    {ICMP}
    ct state new tcp dport 80 accept
    ct state new udp dport 53 accept
    counter name refused
  }}
  chain forward {{ type filter hook forward priority filter; policy drop; }}
  chain output {{
    type filter hook output priority filter; policy drop;
    ct state invalid counter name invalid drop
    ct state established,related accept
    {ICMP}
    ct state new tcp dport 80 accept
    ct state new udp dport 53 accept
    counter name refused
  }}
}}
"""
# Without: by addresses and ports alone.
UNTRACKED = f"""
table inet filter {{
  counter refused {{}}
  chain raw {{ type filter hook prerouting priority raw; meta l4proto tcp notrack; meta l4proto udp notrack; }}
  chain input {{
    type filter hook input priority filter; policy drop;
    {ICMP}
    ip daddr 192.0.2.1 tcp dport 80 accept
    ip daddr 192.0.2.1 udp dport 53 accept
    ip6 daddr 2001:db8:8::1 tcp dport 80 accept
    ip6 daddr 2001:db8:8::1 udp dport 53 accept
    ip saddr 10.0.2.0/24 ip daddr 10.0.2.200/30 th dport 5000-65535 accept
    ip6 saddr fd00:2::/64 ip6 daddr fd00:2::200 th dport 5000-65535 accept
    counter name refused
  }}
  chain forward {{ type filter hook forward priority filter; policy drop; }}
}}
"""


def _dropped(net: Site) -> dict[str, int]:
    text = net.director.run("nft", "list", "counters").out
    return {name: int(n) for name, n in re.findall(r"counter (\w+) \{\s*packets (\d+)", text)}


def _traffic(net: Site, family: int) -> None:
    client = net.clients[0]
    assert client.get(net.vip(family))[0].split()[1] == net.local(family)
    assert len(client.get(net.vip(family), "/bulk")[0]) == BULK
    posted = client.call(
        "servers:http_post",
        address=net.vip(family),
        port=80,
        size=BULK,
        patience=20.0 * net.lab.guest.scale,
        seconds=25,
    )
    assert posted.split()[1] == net.local(family)
    assert client.ask(net.vip(family), text="x" * 1000).endswith("x" * 1000)


def _services(net: Site, family: int) -> None:
    net.serve(size=BULK)
    net.echo()
    net.balance(family, "-b", locals_=1)
    net.balance(family, "-b", port=53, protocol="udp", locals_=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_connection_tracking(site: Callable[..., Site], family: int) -> None:
    """The tracker checks windows strictly: translated numbers must make sense to it, too."""
    net = site(servers=1)
    _services(net, family)
    net.director.nft(TRACKED)
    net.director.ip_vs_sysctl("conntrack", 1)
    net.director.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", 0)
    net.director.sysctl("net.netfilter.nf_conntrack_log_invalid", 255)
    _traffic(net, family)
    client = net.clients[0]
    client.hold(net.vip(family), sport=4000)
    assert _dropped(net) == {"invalid": 0, "refused": 0}
    table = net.director.run("conntrack", "-L", "-f", f"ipv{family}", "-p", "tcp").out
    entry = next(line for line in table.splitlines() if "sport=4000 " in line)
    row = next(c for c in net.director.connections() if c.cport == 4000)
    words = entry.split()
    assert "ESTABLISHED" in words
    ends = [word.split("=", 1)[1] for word in words if word.startswith(("src=", "dst=", "sport=", "dport="))]
    wanted = [net.client(family), net.vip(family), "4000", "80", net.server(family), row.local, "80", str(row.lport)]
    assert [_plain(end) for end in ends] == [_plain(end) for end in wanted]
    assert "[ASSURED]" in words


def _plain(text: str) -> str:
    """conntrack writes IPv6 addresses as everybody does; a port stays what it is."""
    return text.lower()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_connection_tracking(site: Callable[..., Site], family: int) -> None:
    net = site(servers=1)
    _services(net, family)
    net.director.nft(UNTRACKED)
    net.director.ip_vs_sysctl("conntrack", 0)
    _traffic(net, family)
    assert _dropped(net) == {"refused": 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_with_connection_tracking(site: Callable[..., Site], family: int) -> None:
    """Refusals and path MTU messages belong to their connection: `related`, not `invalid`."""
    net = site(clients=1, servers=1)
    net.serve(size=BULK)
    net.balance(family, "-b", locals_=1)
    net.balance(family, "-b", port=53, protocol="udp", locals_=1)
    strict = TRACKED.replace(ICMP, _neighbours(family))
    net.director.nft(strict)
    net.director.ip_vs_sysctl("conntrack", 1)
    far = net.routed_client(1300)
    assert len(far.get(net.vip(family), "/bulk")[0]) == BULK
    assert "mtu 1300" in net.servers[0].run("ip", "route", "get", net.local(family)).out
    with pytest.raises(Failed, match="ConnectionRefusedError"):
        net.clients[0].ask(net.vip(family))
    assert _dropped(net)["invalid"] == 0


def _neighbours(family: int) -> str:
    kinds = ("nd-neighbor-solicit", "nd-neighbor-advert") if family == 6 else ()
    return "; ".join(f"icmpv6 type {kind} accept" for kind in kinds)


@pytest.mark.parametrize("tracking", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_strict_reverse_path_filters(site: Callable[..., Site], family: int, tracking: int) -> None:
    net = site(servers=1)
    _services(net, family)
    for device in ("all", "front", "back", "lo"):
        net.director.sysctl(f"net.ipv4.conf.{device}.rp_filter", 1)
    net.director.nft("""
        table inet rp {
        counter refused {}
        chain pre {
        type filter hook prerouting priority raw;
        meta nfproto ipv6 fib saddr . iif oif missing ip6 saddr != fe80::/10 counter name refused drop;
        }
        }""")
    net.director.ip_vs_sysctl("conntrack", tracking)
    _traffic(net, family)
    assert _dropped(net) == {"refused": 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_filter_that_drops_drops(site: Callable[..., Site], family: int) -> None:
    """The packets do pass INPUT, OUTPUT and POSTROUTING, with the addresses that the documentation promises."""
    net = site(servers=1)
    net.serve()
    net.balance(family, "-b", locals_=1)
    ip = "ip" if family == 4 else "ip6"
    rules = {
        "input": (f"{ip} daddr {net.vip(family)} tcp dport 80", f"{ip} saddr {net.server(family)} tcp sport 80"),
        "output": (f"{ip} daddr {net.server(family)} tcp dport 80", f"{ip} daddr {net.client(family)} tcp sport 80"),
        "postrouting": (
            f"{ip} saddr {net.local(family)} {ip} daddr {net.server(family)}",
            f"{ip} saddr {net.vip(family)} {ip} daddr {net.client(family)}",
        ),
        "forward": ("tcp dport 80", "tcp sport 80"),
    }
    lines = ["table inet t {"]
    for hook, (inward, outward) in rules.items():
        lines += [f"counter in_{hook} {{}}", f"counter out_{hook} {{}}", f"chain {hook} {{"]
        lines += [f"type filter hook {hook} priority filter;", f"{inward} counter name in_{hook}"]
        lines += [f"{outward} counter name out_{hook}", "}"]
    net.director.nft("\n".join([*lines, "}"]))
    net.clients[0].get(net.vip(family))
    seen = {name for name, count in _dropped(net).items() if count}
    assert seen == {f"{way}_{hook}" for way in ("in", "out") for hook in ("input", "output", "postrouting")}


@pytest.mark.parametrize("family", FAMILIES)
def test_masquerading_of_other_traffic_leaves_ours_alone(site: Callable[..., Site], family: int) -> None:
    """A source NAT rule that would fit the translated packets: they carry a local address for a reason."""
    net = site(servers=1)
    _services(net, family)
    net.director.nft("""
        table inet nat {
        chain post {
        type nat hook postrouting priority srcnat;
        oifname "back" masquerade;
        }
        }""")
    net.director.ip_vs_sysctl("conntrack", 0)
    _traffic(net, family)
