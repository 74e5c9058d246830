"""Each of a cluster's rules broken once: how, and every line that must come of it."""

from __future__ import annotations

from provision import cluster as clusters
from tests.unit.clusters import OSPF, Change, at, both, more

NOT_ANNOUNCED = [
    f"{what}, which OSPF would announce"
    for what in (*(f"192.168.100.0/24, lvs-{n}'s eth1" for n in (1, 2)), "local addresses of laddr_g1")
]
NAME = "is no name: letters, digits, _ . -, at most 63"
PREFIXES = "203.0.113.0/25, 2001:db8:ffff::/64"
ROUND = "its connections would go round in a loop"
NETWORKS = "192.168.100.0/24, 2001:db8:64::/64"
COINCIDE = "the two must not coincide"

# what is wrong: how to break it, and every line that must come of it (FOLDER is the file's folder)
BAD_OSPF: dict[str, tuple[Change, list[str]]] = {
    # --- shapes
    "unknown key": (
        at("vips", []),
        ["FOLDER/cluster.yaml: unknown key vips (known: " + ", ".join(sorted(clusters.SCHEMA["properties"])) + ")"],
    ),
    "unknown key of a director": (
        at("directors.1.weight", 1),
        [
            "directors[1]: unknown key weight (known: downlink, files, hostnames, interfaces, irq_cpus, "
            "local_addresses, name, priority, router_id, slot, ssh, ssh_authorized_keys, sysctl, uplink)"
        ],
    ),
    "unknown key of a real server": (
        at("services.0.real_servers.1.wieght", 1),
        ["services[0].real_servers[1]: unknown key wieght (known: address, check, inhibit_on_failure, port, weight)"],
    ),
    "unknown key of ospf": (
        at("ospf.hello", 3),
        [
            "ospf: unknown key hello "
            "(known: area, dead_interval, dr_priority, hello_interval, key, reference_bandwidth, stub)"
        ],
    ),
    "a priority that OSPF does not have": (
        at("ospf.dr_priority", 256),
        ["ospf.dr_priority: 256 is greater than the maximum of 255"],
    ),
    "no services": (at("services", drop=True), ["FOLDER/cluster.yaml: missing key services"]),
    "no directors": (
        both(at("directors", []), at("services.0.directors", ["lvs-1"])),
        ["directors: [] should be non-empty", "services[0].directors[0]: there is no director 'lvs-1'"],
    ),
    "another mode": (at("mode", "bgp"), ["mode: 'bgp' is not one of ['ospf', 'vrrp']"]),
    "nobody may log in": (
        at("ssh_authorized_keys", []),
        ["ssh_authorized_keys: [] should be non-empty"],
    ),
    "port out of range": (
        at("services.0.ports", [0]),
        ["services[0].ports[0]: 0 is less than the minimum of 1"],
    ),
    "port as text": (
        at("services.0.ports", ["80"]),
        ["services[0].ports[0]: '80' is not of type 'integer'"],
    ),
    "another scheduler": (
        at("services.0.scheduler", "rrr"),
        [
            "services[0].scheduler: 'rrr' is not one of ['rr', 'wrr', 'lc', 'wlc', 'lblc', 'lblcr', 'sh', 'dh', "
            "'sed', 'nq', 'fo', 'ovf', 'mh']"
        ],
    ),
    "negative weight": (
        at("services.0.real_servers.1.weight", -1),
        [
            "services[0].quorum: quorum and hysteresis ask for 1; all IPv4 real servers weigh 0",
            "services[0].real_servers[1].weight: -1 is less than the minimum of 0",
        ],
    ),
    # --- mode and routing
    "no ospf": (at("ospf", drop=True), ["ospf: missing; mode ospf needs it"]),
    "vrrp beside ospf": (
        at("vrrp", {"instances": [{"name": "VI_1", "id": 1}]}),
        ["vrrp: this cluster's mode is ospf", "vrrp.instances[0]: no service has it"],
    ),
    "priority in mode ospf": (at("directors.0.priority", 5), ["directors[0].priority: only mode vrrp has it"]),
    "instance in mode ospf": (at("services.0.instance", "VI_1"), ["services[0].instance: only mode vrrp has it"]),
    "no area": (
        at("ospf.area", "0.0.11"),
        ["ospf.area: '0.0.11' is no area: a number, or four with dots as 0.0.0.11"],
    ),
    **{
        f"stub backbone {area}": (
            at("ospf.area", area),
            ["ospf.stub: area 0 is the backbone, which cannot be a stub"],
        )
        for area in ("0", "00", "0.0.0.0")  # noqa: S104  no address
    },
    "stub without an area": (at("ospf.area", drop=True), ["ospf: missing key area"]),
    "router-id that is nobody's": (
        at("directors.1.router_id", "0.0.0.0"),  # noqa: S104  no address
        ["directors[1].router_id: 0.0.0.0 is none: the routing daemons would take one of the VIPs"],
    ),
    "VIPs where OSPF must not be spoken": (
        more("vip_prefixes", "192.168.100.0/28"),
        [f"vip_prefixes[2]: 192.168.100.0/28 overlaps {each}" for each in NOT_ANNOUNCED],
    ),
    "dead before hello": (
        both(at("ospf.hello_interval", 12), at("ospf.dead_interval", 12)),
        ["ospf.dead_interval: 12 is not above hello_interval (12)"],
    ),
    "router-id twice": (
        at("directors.1.router_id", "192.0.2.1"),
        ["directors[1].router_id: 192.0.2.1 is that of directors[0] too"],
    ),
    "router-id that is none": (
        at("directors.1.router_id", "192.0.2"),
        ["directors[1].router_id: '192.0.2' is no router-id: four numbers with dots"],
    ),
    "router-id from nowhere": (
        at("directors.1.interfaces.0.addresses", []),
        ["directors[1].router_id: missing; the uplink has no IPv4 address to take it from"],
    ),
    "name of a daemon": (
        at("directors.0.hostnames", {"zebra": "my zebra"}),
        ["directors[0].hostnames.zebra: 'my zebra' is no name of a daemon"],
    ),
    # --- secrets
    "secret in the file": (
        at("ospf.key.secret", "123456"),
        ["ospf.key.secret: '123456' is not of type 'object'"],
    ),
    "secret from nowhere": (
        at("ospf.key.secret", {}),
        ["ospf.key.secret: exactly one of file and env is wanted"],
    ),
    "secret of a variable that is not set": (
        at("ospf.key.secret", {"env": "NO_SUCH_KEY"}),
        ["ospf.key.secret.env: the environment has no NO_SUCH_KEY; type: read -rs NO_SUCH_KEY && export NO_SUCH_KEY"],
    ),
    "secret of a file that is not there": (
        at("ospf.key.secret", {"file": "gone"}),
        ["ospf.key.secret.file: FOLDER/gone does not exist"],
    ),
    "secret that everybody may read": (
        at("ospf.key.secret", {"file": "open"}),
        ["ospf.key.secret.file: FOLDER/open may be read by everybody; type: chmod 600 FOLDER/open"],
    ),
    "long secret": (
        at("ospf.key.secret", {"file": "long"}),
        ["ospf.key.secret.file: it has 17 characters; 16 are taken"],
    ),
    "secret of two words": (
        at("ospf.key.secret", {"file": "words"}),
        ["ospf.key.secret.file: one word of ASCII without quotes, blanks and the characters # ! \\ { } $ is wanted"],
    ),
    "empty secret": (at("ospf.key.secret", {"file": "empty"}), ["ospf.key.secret.file: it is empty"]),
    "folder as a secret": (at("ospf.key.secret", {"file": "."}), ["ospf.key.secret.file: FOLDER is no file"]),
    # --- prefixes and VIPs
    "prefix with host bits": (
        at("vip_prefixes.0", "203.0.113.1/25"),
        [
            "services[0].vips[0]: 203.0.113.1 is in none of vip_prefixes (2001:db8:ffff::/64)",
            "services[0].vips[1]: 203.0.113.2 is in none of vip_prefixes (2001:db8:ffff::/64)",
            "services[1].vips[0]: 203.0.113.3 is in none of vip_prefixes (2001:db8:ffff::/64)",
            "vip_prefixes[0]: '203.0.113.1/25' is no network: address and prefix length, host bits zero",
        ],
    ),
    "prefixes that overlap": (
        more("vip_prefixes", "203.0.113.64/26"),
        ["vip_prefixes[2]: 203.0.113.64/26 overlaps 203.0.113.0/25 (vip_prefixes[0])"],
    ),
    "VIP outside": (
        at("services.0.vips.1", "203.0.113.200"),
        [f"services[0].vips[1]: 203.0.113.200 is in none of vip_prefixes ({PREFIXES})"],
    ),
    "VIP that is none": (
        at("services.0.vips.1", "203.0.113.2/32"),
        ["services[0].vips[1]: '203.0.113.2/32' is no address without prefix length"],
    ),
    "VIP twice in a service": (
        at("services.0.vips.1", "203.0.113.1"),
        ["services[0].vips[1]: 203.0.113.1 stands twice"],
    ),
    "VIP and port in two services": (
        both(at("services.1.vips.0", "203.0.113.2"), at("services.1.ports", [443, 80])),
        [],
    ),
    "VIP that is an interface's": (
        at("directors.1.interfaces.0.addresses", ["203.0.113.2/24"]),
        ["directors[1].interfaces[0].addresses[0]: 203.0.113.2 is a VIP (services[0].vips[1])"],
    ),
    # --- local addresses
    "pool that is none": (
        at("local_addresses.laddr_g1.addresses.0", "192.168.100.1-8"),
        [
            "local_addresses.laddr_g1.addresses[0]: '192.168.100.1-8': "
            "'8' does not appear to be an IPv4 or IPv6 address",
            "services[0].local_addresses: laddr_g1 has no IPv4 addresses, as one of its VIPs needs",
            "services[1].local_addresses: laddr_g1 has no IPv4 addresses, as one of its VIPs needs",
        ],
    ),
    "pool that runs backwards": (
        more("local_addresses.laddr_g1.addresses", "192.168.100.19-192.168.100.11"),
        ["local_addresses.laddr_g1.addresses[2]: '192.168.100.19-192.168.100.11': its end comes before its beginning"],
    ),
    "pool of two families": (
        more("local_addresses.laddr_g1.addresses", "192.168.100.19-2001:db8::1"),
        ["local_addresses.laddr_g1.addresses[2]: '192.168.100.19-2001:db8::1': its ends are of two families"],
    ),
    "pool of multicast": (
        more("local_addresses.laddr_g1.addresses", "224.0.0.0/28"),
        ["local_addresses.laddr_g1.addresses[2]: '224.0.0.0/28': no host can have such addresses"],
    ),
    "pools that overlap": (
        at("local_addresses.g2", {"addresses": ["192.168.100.8/31"], "per_director": 1}),
        [
            "local_addresses.g2.addresses[0]: 192.168.100.8/31 overlaps 192.168.100.1-192.168.100.8 "
            "(local_addresses.laddr_g1.addresses[0])",
            "services[0].local_addresses: missing; FNAT needs a pool (local_addresses: laddr_g1, g2)",
            "services[1].local_addresses: missing; FNAT needs a pool (local_addresses: laddr_g1, g2)",
        ],
    ),
    "name of a pool": (
        at("local_addresses.g 2", {"addresses": ["192.168.100.99"], "per_director": 1}),
        [
            "local_addresses.g 2: no name of a group: letters, digits, _ . -, at most 63",
            "services[0].local_addresses: missing; FNAT needs a pool (local_addresses: laddr_g1, g 2)",
            "services[1].local_addresses: missing; FNAT needs a pool (local_addresses: laddr_g1, g 2)",
        ],
    ),
    "local address that is the downlink's own": (
        at("local_addresses.laddr_g1.addresses.0", "192.168.100.195-192.168.100.202"),
        [
            "local_addresses.laddr_g1: 192.168.100.201 is an interface's own address "
            f"(directors[0].interfaces[1].addresses[0]); {COINCIDE}",
            "local_addresses.laddr_g1: 192.168.100.202 is an interface's own address "
            f"(directors[1].interfaces[1].addresses[0]); {COINCIDE}",
        ],
    ),
    "further local address that is a downlink's own": (
        at("directors.0.local_addresses", {"laddr_g1": ["192.168.100.202"]}),
        [
            "directors[0].local_addresses.laddr_g1[0]: 192.168.100.202 is an interface's own address "
            f"(directors[1].interfaces[1].addresses[0]); {COINCIDE}"
        ],
    ),
    "local address on two directors": (
        both(
            at("directors.0.local_addresses", {"laddr_g1": ["192.168.100.50"]}),
            at("directors.1.local_addresses", {"laddr_g1": ["192.168.100.50"]}),
        ),
        ["directors[1].local_addresses.laddr_g1: 192.168.100.50 is that of directors[0] too"],
    ),
    "local address twice on one director": (
        at("directors.0.local_addresses", {"laddr_g1": ["192.168.100.50", "192.168.100.50"]}),
        ["directors[0].local_addresses.laddr_g1: 192.168.100.50 is that of directors[0] too"],
    ),
    "further local address out of the pool": (
        at("directors.0.local_addresses", {"laddr_g1": ["192.168.100.7"]}),
        [
            "directors[1].local_addresses.laddr_g1: 192.168.100.7 is that of directors[0] too",
            "directors[0].local_addresses.laddr_g1[0]: 192.168.100.7 is in local_addresses.laddr_g1, whose addresses "
            "are dealt out",
        ],
    ),
    "further local addresses of no pool": (
        at("directors.0.local_addresses", {"g2": ["192.168.100.50"]}),
        ["directors[0].local_addresses.g2: there is no such pool (local_addresses: laddr_g1)"],
    ),
    "local address outside the downlink's network": (
        at("local_addresses.laddr_g1.addresses.0", "10.0.0.1-10.0.0.8"),
        [
            f"directors[{n}].local_addresses.laddr_g1: 10.0.0.{first} and 3 more: in no network of the downlink "
            f"({NETWORKS}); if they are routed to it, say local_addresses.laddr_g1.routed: true"
            for n, first in ((0, 1), (1, 5))
        ],
    ),
    "local address that is a VIP": (
        both(
            at("vip_prefixes.0", "192.168.100.0/28"),
            at("services.0.vips", ["192.168.100.5"]),
            at("services.1.vips.0", "192.168.100.9"),
        ),
        [
            "directors[1].local_addresses.laddr_g1: 192.168.100.5 is a VIP (services[0].vips[0])",
            *(f"vip_prefixes[0]: 192.168.100.0/28 overlaps {each}" for each in NOT_ANNOUNCED),
        ],
    ),
    "slot beyond the pool": (
        at("directors.1.slot", 3),
        [
            f"directors[1].slot: 3 is beyond local_addresses.laddr_g1, which has IPv{version} addresses for "
            "2 directors of 4 each"
            for version in (4, 6)
        ],
    ),
    "slot twice": (
        at("directors.1.slot", 1),
        [
            "directors[1].local_addresses.laddr_g1: 192.168.100.1 is that of directors[0] too",
            "directors[1].local_addresses.laddr_g1: 192.168.100.2 is that of directors[0] too",
            "directors[1].local_addresses.laddr_g1: 192.168.100.3 is that of directors[0] too",
            "directors[1].local_addresses.laddr_g1: 192.168.100.4 is that of directors[0] too",
            "directors[1].local_addresses.laddr_g1: 2001:db8:64::1 is that of directors[0] too",
            "directors[1].local_addresses.laddr_g1: 2001:db8:64::2 is that of directors[0] too",
            "directors[1].local_addresses.laddr_g1: 2001:db8:64::3 is that of directors[0] too",
            "directors[1].local_addresses.laddr_g1: 2001:db8:64::4 is that of directors[0] too",
            "directors[1].slot: 1 stands already at directors[0].slot",
        ],
    ),
    "address left out that is not in the pool": (
        at("local_addresses.laddr_g1.without", ["192.168.100.9"]),
        ["local_addresses.laddr_g1.without[0]: 192.168.100.9 is not in the pool"],
    ),
    "more prefixes than TOA trusts": (
        at(
            "local_addresses.laddr_g1.addresses",
            [*OSPF["local_addresses"]["laddr_g1"]["addresses"], *(f"10.{n}.0.1" for n in range(64))],
        ),
        ["local_addresses: 72 prefixes; real servers can trust 64: give pools as whole networks"],
    ),
    # --- hosts
    "name twice": (
        at("real_servers.0.name", "lvs-2"),
        ["real_servers[0].name: lvs-2 stands already at directors[1].name"],
    ),
    "MAC on two hosts": (
        at("real_servers.0.interfaces.0.mac", "52:54:00:00:02:01"),
        ["real_servers[0].interfaces[0].mac: 52:54:00:00:02:01 stands already at directors[1].interfaces[1].mac"],
    ),
    "address on two hosts": (
        at("directors.1.interfaces.0.addresses.0", "192.0.2.1/24"),
        [
            "directors[1].interfaces[0].addresses[0]: 192.0.2.1 stands already at "
            "directors[0].interfaces[0].addresses[0]",
            "directors[1].router_id: 192.0.2.1 is that of directors[0] too",
        ],
    ),
    "uplink by a MAC that is not there": (
        at("directors.0.uplink", "52:54:00:00:09:00"),
        [
            "directors[0].router_id: missing; the uplink has no IPv4 address to take it from",
            "directors[0].uplink: there is no interface '52:54:00:00:09:00' (interfaces: eth0, eth1)",
        ],
    ),
    "ssh": (
        at("directors.0.ssh", "root@192.0.2.1"),
        ["directors[0].ssh: 'root@192.0.2.1' is no address or name with an optional :port"],
    ),
    "ssh port": (
        at("directors.0.ssh", "192.0.2.1:70000"),
        ["directors[0].ssh: '192.0.2.1:70000' is no address or name with an optional :port"],
    ),
    "file of a service": (
        at("directors.0.files", {"/etc/keepalived/tls.conf": ""}),
        ["directors[0].files./etc/keepalived/tls.conf: not to be given as a file: rendered from services[1]"],
    ),
    "file of an interface": (
        at("directors.0.files", {"/etc/systemd/network/10-cloud-init-eth0.network": ""}),
        [
            "directors[0].files./etc/systemd/network/10-cloud-init-eth0.network: not to be given as a file: "
            "made from interfaces"
        ],
    ),
    # --- services
    "name of a service": (at("services.0.name", "my/web"), [f"services[0].name: 'my/web' {NAME}"]),
    "service called keepalived": (
        at("services.0.name", "keepalived"),
        ["services[0].name: keepalived.conf is the main file's name"],
    ),
    "service twice": (at("services.1.name", "web"), ["services[1].name: web stands already at services[0].name"]),
    "director that is not there": (
        at("services.0.directors", ["lvs-2", "lvs-9"]),
        ["services[0].directors[1]: there is no director 'lvs-9'"],
    ),
    "pool that is not there": (
        at("services.0.local_addresses", "g2"),
        ["services[0].local_addresses: there is no pool 'g2' (local_addresses: laddr_g1)"],
    ),
    "no pool at all": (
        at("local_addresses", drop=True),
        [f"services[{n}].local_addresses: missing; FNAT needs a pool (local_addresses: none)" for n in (0, 1)],
    ),
    "pool for NAT": (
        both(at("services.0.forwarding", "NAT"), at("services.0.local_addresses", "laddr_g1")),
        ["services[0].local_addresses: only FNAT has local addresses; this is NAT"],
    ),
    "syn_proxy for DR": (
        both(at("services.0.forwarding", "DR"), at("services.0.syn_proxy", True)),
        ["services[0].syn_proxy: only TCP by FNAT has it; this is TCP by DR"],
    ),
    "established timeout of UDP": (
        both(at("services.0.protocol", "UDP"), at("services.0.est_timeout", 5), at("services.0.check", {"none": True})),
        ["services[0].est_timeout: only TCP has it; this is UDP"],
    ),
    "port changed by DR": (
        both(at("services.0.forwarding", "DR"), at("services.0.real_servers.1.port", 8080)),
        ["services[0].real_servers[1].port: DR cannot change the port"],
    ),
    "several ports": (
        at("services.0.ports", [80, 8080]),
        [f"services[0].real_servers[{n}].port: missing; the service has several ports" for n in (0, 1)],
    ),
    "no check for UDP": (
        at("services.0.protocol", "UDP"),
        [f"services[0].real_servers[{n}].check: missing; for UDP there is none by itself" for n in (0, 1)],
    ),
    "two checks": (
        at("services.0.check", {"tcp": {}, "none": True}),
        ["services[0].check: exactly one of tcp, http, https and none is wanted"],
    ),
    "service with the name of another one's group": (
        at("services.0.name", "tls-v6"),
        ["services[0].name: tls-v6 is what keepalived's files call tls for IPv6"],
    ),
    "check that is not none": (
        at("services.0.check", {"none": False}),
        ["services[0].check.none: write true, or another check"],
    ),
    **{
        f"{sign} in the path of a check": (
            at("services.0.check", {"http": {"path": f"/live{sign}x"}}),
            [f"services[0].check.http.path: {f'/live{sign}x'!r} cannot stand in keepalived's file"],
        )
        for sign in '!"#$\\{} '
    },
    "path of a check": (
        at("services.0.check", {"http": {"path": "index.html"}}),
        ["services[0].check.http.path: 'index.html' cannot stand in keepalived's file"],
    ),
    # --- real servers
    "real server twice": (
        at("services.0.real_servers.1.address", "198.51.100.1"),
        ["services[0].real_servers[1]: 198.51.100.1 port 80 stands already at services[0].real_servers[0]"],
    ),
    "real server that is a VIP": (
        at("services.0.real_servers.1.address", "203.0.113.3"),
        [f"services[0].real_servers[1].address: 203.0.113.3 is a VIP (services[1].vips[0]): {ROUND}"],
    ),
    "real server that is a local address": (
        at("services.0.real_servers.1.address", "192.168.100.6"),
        [f"services[0].real_servers[1].address: 192.168.100.6 is a local address (directors[1]): {ROUND}"],
    ),
    "real server that is a director": (
        at("services.0.real_servers.1.address", "192.168.100.202"),
        [
            "services[0].real_servers[1].address: 192.168.100.202 is a director's own address "
            f"(directors[1].interfaces[1].addresses[0]): {ROUND}"
        ],
    ),
    "real server in a pool": (
        both(
            at("local_addresses.laddr_g1.addresses.0", "192.168.100.1-192.168.100.16"),
            at("services.0.real_servers.1.address", "192.168.100.12"),
        ),
        [
            "services[0].real_servers[1].address: 192.168.100.12 is in local_addresses.laddr_g1, for a director to "
            "come; without takes it out"
        ],
    ),
    "sorry server that is a VIP": (
        at("services.0.sorry_servers", [{"address": "203.0.113.3"}]),
        [f"services[0].sorry_servers[0].address: 203.0.113.3 is a VIP (services[1].vips[0]): {ROUND}"],
    ),
    "two sorry servers": (
        at("services.0.sorry_servers", [{"address": "198.51.100.8"}, {"address": "198.51.100.9"}]),
        ["services[0].sorry_servers[1]: a sorry server for IPv4 stands already at services[0].sorry_servers[0]"],
    ),
    "real server of a family without VIP": (
        at("services.0.real_servers.1.address", "2001:db8:5::2"),
        ["services[0].real_servers[1].address: 2001:db8:5::2: the service has no IPv6 VIP"],
    ),
    "VIP of a family without real server": (
        at("services.1.real_servers.1.address", "198.51.100.2"),
        ["services[1].real_servers: none is IPv6, as one of its VIPs is"],
    ),
    "all local addresses of a family taken out": (
        at("local_addresses.laddr_g1.without", [f"2001:db8:64::{n}" for n in range(1, 5)]),
        ["local_addresses.laddr_g1.without: leaves no IPv6 address to lvs-1, for tls"],
    ),
    "VIP of a family without local addresses": (
        at("local_addresses.laddr_g1.addresses.1", drop=True),
        ["services[1].local_addresses: laddr_g1 has no IPv6 addresses, as one of its VIPs needs"],
    ),
    "real server that is none": (
        at("services.0.real_servers.1.address", "rs-2"),
        ["services[0].real_servers[1].address: 'rs-2' is no address without prefix length"],
    ),
    "quorum out of reach": (
        at("services.0.quorum", 4),
        ["services[0].quorum: quorum and hysteresis ask for 4; all IPv4 real servers weigh 3"],
    ),
    "quorum with hysteresis out of reach": (
        both(at("services.0.quorum", 3), at("services.0.hysteresis", 1)),
        ["services[0].quorum: quorum and hysteresis ask for 4; all IPv4 real servers weigh 3"],
    ),
    "everybody drained": (
        at("services.1.real_servers.0.weight", 0),
        ["services[1].quorum: quorum and hysteresis ask for 1; all IPv4 real servers weigh 0"],
    ),
    "hysteresis as large as the quorum": (
        at("services.0.hysteresis", 1),
        ["services[0].hysteresis: 1 is not below the quorum (1)"],
    ),
}
BAD_OSPF["VIP of other directors"] = (
    both(
        at("services.0.directors", ["lvs-1"]),
        at("services.1.directors", ["lvs-2"]),
        at("services.1.vips.0", "203.0.113.2"),
    ),
    [
        "services[1].vips[0]: 203.0.113.2 is announced by other directors (services[0].vips[1]): "
        "routers send them all of its ports"
    ],
)
BAD_OSPF["a default router's address"] = (
    both(
        at("directors.0.interfaces.1.routes", [{"to": "198.51.100.0/24", "via": "192.168.100.3"}]),
        at("real_servers.0.interfaces.0.gateway4", "198.51.100.254"),
        at("directors.1.local_addresses", {"laddr_g1": ["198.51.100.254"]}),
        at("local_addresses.laddr_g1.routed", True),
    ),
    [
        "directors[1].local_addresses.laddr_g1[0]: 198.51.100.254 is a router's "
        "(real_servers[0].interfaces[0].gateway4)",
        "local_addresses.laddr_g1: 192.168.100.3 is a router's (directors[0].interfaces[1].routes[0].via); "
        "without takes it out",
    ],
)
BAD_OSPF["downlink in the uplink's network"] = (
    both(
        at("directors.1.interfaces.0.addresses", ["10.0.0.2/8"]),
        at("directors.1.interfaces.1.addresses.0", "10.1.0.2/16"),
        at("local_addresses.laddr_g1.routed", True),
    ),
    ["directors[1].interfaces[1]: 10.1.0.0/16 is in the uplink's network, in which OSPF would be spoken here too"],
)
BAD_OSPF["sorry server of another family"] = (
    at("services.0.sorry_servers", [{"address": "2001:db8:5::9"}]),
    ["services[0].sorry_servers[0].address: 2001:db8:5::9: the service has no IPv6 VIP"],
)
BAD_OSPF["weight that is no integer"] = (
    at("services.1.real_servers.0.weight", 100.0),
    [
        "services[1].quorum: quorum and hysteresis ask for 1; all IPv4 real servers weigh 0",
        "services[1].real_servers[0].weight: 100.0 is not of type 'integer'",
    ],
)
BAD_OSPF["VIP and port in two services"] = (
    both(
        at("services.1.vips", ["203.0.113.2"]),
        at("services.1.ports", [443, 80]),
        at("services.1.real_servers", [{"address": "198.51.100.1", "port": 80}]),
    ),
    ["services[1].vips[0]: 203.0.113.2 port 80/TCP stands already at services[0].vips[1]"],
)

BAD_VRRP: dict[str, tuple[Change, list[str]]] = {
    "no vrrp": (
        at("vrrp", drop=True),
        ["vrrp: missing; mode vrrp needs it"],
    ),
    "ospf beside vrrp": (at("ospf", {"area": "1"}), ["ospf: this cluster's mode is vrrp"]),
    "VIPs bound by scripts": (
        at("vip_binding", "scripts"),
        ["vip_binding: only mode ospf has it: VRRP binds its VIPs"],
    ),
    "id twice on a link": (
        at("vrrp.instances.1.id", 200),
        ["vrrp.instances[1].id: 200 is taken on the uplink by vrrp.instances[0].id"],
    ),
    "id twice on one arm": (
        both(
            at("vrrp.instances.1", {"name": "VI_2", "id": 200, "interface": "downlink"}),
            at("directors.0.uplink", "eth1"),
        ),
        [
            "vrrp.instances[1].id: 200 is that of vrrp.instances[0] too, and uplink and downlink of directors[0] "
            "are one link"
        ],
    ),
    "id out of range": (
        at("vrrp.instances.1.id", 256),
        ["vrrp.instances[1].id: 256 is greater than the maximum of 255"],
    ),
    "instance twice": (
        at("vrrp.instances.1.name", "VI_1"),
        [
            "services[1].instance: there is no instance 'VI_2' (vrrp.instances: VI_1, VI_1)",
            "vrrp.instances[1].name: VI_1 stands already at vrrp.instances[0].name",
        ],
    ),
    "name of an instance": (
        both(at("vrrp.instances.1.name", "VI 2"), at("services.1.instance", "VI 2")),
        [f"vrrp.instances[1].name: 'VI 2' {NAME}"],
    ),
    "instance without a service": (
        more("vrrp.instances", {"name": "VI_3", "id": 3}),
        ["vrrp.instances[2]: no service has it"],
    ),
    "VIP of two instances": (
        at("services.1.vips", ["203.0.113.2", "2001:db8:ffff::3"]),
        ["services[1].vips[0]: 203.0.113.2 is moved by VI_1 already (services[0].vips[1])"],
    ),
    "an instance's services on several sets of directors": (
        both(
            at("services.1.instance", "VI_1"),
            at("services.1.directors", ["lvs-1"]),
            at("vrrp.instances.1", drop=True),
        ),
        [
            "services[1].directors: not those of services[0], whose VIPs move together with its own (VI_1)",
        ],
    ),
    "service without an instance": (
        at("services.0.instance", drop=True),
        ["services[0].instance: missing (vrrp.instances: VI_1, VI_2)", "vrrp.instances[0]: no service has it"],
    ),
    "no priority": (at("directors.1.priority", drop=True), ["directors[1].priority: missing; the highest is master"]),
    "priority twice": (
        at("directors.1.priority", 150),
        ["directors[1].priority: 150 stands already at directors[0].priority"],
    ),
    "priority of the owner": (
        at("directors.1.priority", 255),
        ["directors[1].priority: 255 is greater than the maximum of 254"],
    ),
    "long password": (
        at("vrrp.instances.0.password", {"file": "long"}),
        ["vrrp.instances[0].password.file: it has 17 characters; 8 are taken"],
    ),
    "password for IPv6": (
        both(
            at("vrrp.instances.1.password", {"file": "vrrp"}),
            at("services.1.vips", ["2001:db8:ffff::3"]),
            at("services.1.real_servers", [{"address": "2001:db8:5::1"}]),
        ),
        ["vrrp.instances[1].password: VRRP for IPv6 has no passwords (RFC 5798)"],
    ),
    "router-id in mode vrrp": (
        at("directors.0.router_id", "192.0.2.1"),
        ["directors[0].router_id: only mode ospf has it"],
    ),
    "hysteresis without a quorum": (
        at("services.0.hysteresis", 1),
        ["services[0].hysteresis: it goes with a quorum"],
    ),
    "quorum out of reach": (
        at("services.0.quorum", 9),
        ["services[0].quorum: quorum and hysteresis ask for 9; all IPv4 real servers weigh 3"],
    ),
}
BAD_VRRP["VIP that is a director's router"] = (
    both(
        at("vip_prefixes.0", "192.0.2.0/24"),
        at("services.0.vips", ["192.0.2.254"]),
        at("services.1.vips", ["2001:db8:ffff::3"]),
        at("services.1.real_servers", [{"address": "2001:db8:5::1"}]),
        at("directors.0.interfaces.0.gateway4", "192.0.2.254"),
    ),
    ["directors[0].interfaces[0].gateway4: 192.0.2.254 is a VIP (services[0].vips[0])"],
)
