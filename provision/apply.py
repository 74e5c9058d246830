"""Bringing a cluster file to hosts that run: what would change, and changing it, one host at a time.

A host is changed in steps that can be undone until its checks have passed: the new files are judged by their daemons'
own checkers beside the old ones, the old ones are kept, and a timer on the host itself puts them back if we are not
heard of any more. The first failure stops everything; the host where it happened is rolled back.
"""

from __future__ import annotations

import base64
import difflib
import io
import re
import shlex
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_interface
from pathlib import Path

from pipeline import progress, run
from pipeline.errors import BuildError
from provision import claim, ipvs, local_addresses, secret, vrrp
from provision.host import File, Host
from provision.model import BLACKHOLES, TOA_BPF_LOADED, Cluster, Director
from provision.remote import SCRIPT_SECONDS, Opener, Remote, command
from provision.render import NETWORK, Renderer

STATE = "/var/lib/lvs/apply"  # on the host: the new files, the old ones, and how to go back
_UNIT = claim.UNIT
GATE_MOST = 600  # seconds that a gate may take: rollout.GATE_SECONDS, and as long again for a round that has begun
# Seconds beyond the drain after which a host goes back by itself: a slow script, and the longest gate.
_GRACE = SCRIPT_SECONDS + GATE_MOST
SAME_COMMAND = "the same command goes on"  # true of apply itself
ROUTING = ("zebra", "ospfd", "ospf6d")
VIPS, VIP_ROUTES = "/etc/lvs/vips.nft", "/etc/lvs/vips.routes"
# In the host's log before each change: what keepalived had complained of earlier is no fault of the change.
MARK = "lvsforge: its files are changed from here on"
# Takes a host that was changed, and the real servers that were down before that; raises where the host is not well,
# within GATE_MOST seconds.
Gate = Callable[[Host, frozenset[str]], None]


@dataclass(frozen=True)
class Change:
    """A file that differs: `old` is what the host has, `new` what it is to have; None is no file."""

    path: str
    old: File | None
    new: File | None

    def lines(self) -> list[str]:
        """It as a diff, without secrets."""
        if self.old is not None and self.new is not None and self.old.content == self.new.content:
            before, after = (f"{file.mode:04o} {file.owner}" for file in (self.old, self.new))
            return [f"{self.path}: {before} becomes {after}"]
        old, new = ([] if file is None else _shown(file) for file in (self.old, self.new))
        found = list(difflib.unified_diff(old, new, f"{self.path} (there)", f"{self.path} (new)", lineterm="", n=2))
        # A secret that is another one leaves no difference to be seen.
        return found or [f"{self.path}: changed, in what is not shown"]


def _shown(file: File) -> list[str]:
    ours = file.path.startswith(("/etc/keepalived/", "/etc/quagga/"))
    if not ours and not file.mode & 0o004:
        return [f"(not for everybody, not shown: mode {file.mode:04o})"]
    return secret.hide(file.content).splitlines()


@dataclass(frozen=True)
class Plan:
    """What differs on a host."""

    host: Host
    files: tuple[File, ...]
    changes: tuple[Change, ...]

    @property
    def areas(self) -> tuple[str, ...]:
        """What on the host must hear of it, in the order of `_ACT`."""
        paths = [change.path for change in self.changes]
        found = []
        if any(path == NETWORK or path.startswith("/etc/systemd/network/") for path in paths):
            found.append("network")
        if any(path.startswith("/etc/sysctl.d/") for path in paths):
            found.append("sysctl")
        if self.keepalived:
            found.append("keepalived")
        if VIPS in paths:
            found.append("vips")
        if VIP_ROUTES in paths:
            found.append("vip-routes")
        if "/etc/lvs/host.conf" in paths or "network" in found:
            found.append("rc-local")
        if "/etc/toa-bpf.conf" in paths:
            found.append("toa-bpf")
        found += [daemon for daemon in ROUTING if f"/etc/quagga/{daemon}.conf" in paths]
        return tuple(found)

    @property
    def keepalived(self) -> list[Change]:
        """The changes of keepalived's files."""
        return [change for change in self.changes if change.path.startswith("/etc/keepalived/")]

    def lines(self) -> list[str]:
        """The diffs of all files."""
        return [line for change in self.changes for line in change.lines()]


# --- plan


def plan(cluster: Cluster, names: Sequence[str], connect: Opener) -> list[str]:
    """Say per host, in the order of the cluster file, what differs on it.

    Returns:
        The lines to show.

    Raises:
        BuildError: a host cannot be asked, after all others were; their lines are shown before.
    """
    return _differing(cluster.chosen(tuple(names)), Renderer(cluster), connect)


def _differing(hosts: Sequence[Host], render: Renderer, connect: Opener) -> list[str]:
    failures = []
    lines = []
    for host in hosts:
        try:
            with connect(host) as remote:
                found = compare(remote, host, render.root_files(host))
        except BuildError as error:
            failures.append(error)
            lines += [f"== {host.name}: not known", f"  {error.message}"]
            continue
        if found.changes:
            lines.append(
                f"== {host.name}: {len(found.changes)} files differ; concerned: {' '.join(found.areas) or '-'}"
            )
            lines += [f"  {line}" for line in found.lines()]
        else:
            lines.append(f"== {host.name}: as it should be")
    if failures:
        print("\n".join(lines))
        raise BuildError(f"{len(failures)} of the hosts could not be asked", failures[0].hint)
    return lines


def compare(remote: Remote, host: Host, files: Sequence[File]) -> Plan:
    """Find out what differs on a host.

    Raises:
        BuildError: it does not answer, or is another host than the one that is meant.
    """
    answer = remote.run("hostname; cat /etc/lvs/files 2>/dev/null || :", what="asking who it is")
    name, *listed = answer.stdout.split() or [""]
    if name.split(".")[0] != host.name.split(".")[0]:
        raise BuildError(
            f"{host.name}: the host that answers calls itself {name}", "correct `ssh` of this host in the cluster file"
        )
    stale = [path for path in listed if path.startswith("/etc/") and "/../" not in path]
    wanted = {file.path: file for file in files}
    there = fetch(remote, sorted({*wanted, *stale}))
    changes = [
        Change(path, there.get(path), wanted.get(path))
        for path in sorted({*wanted, *there})
        if there.get(path) != wanted.get(path)
    ]
    return Plan(host, tuple(files), tuple(changes))


def fetch(remote: Remote, paths: Iterable[str]) -> dict[str, File]:
    """Those of a host's files that exist."""
    words = " ".join(shlex.quote(path) for path in paths)
    answer = remote.run(
        f'for file in {words}; do [ ! -f "$file" ] || printf "%s\\n" "${{file#/}}"; done'
        " | tar -C / -chf - --verbatim-files-from -T - | base64 -w 0",
        what="reading its files",
    )
    found = {}
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(answer.stdout))) as archive:
        for member in archive:
            body = archive.extractfile(member)
            if body is not None:
                content = body.read().decode("utf-8", "surrogateescape")
                found[f"/{member.name}"] = File(f"/{member.name}", content, member.mode & 0o7777, member.uname)
    return found


# --- apply


def apply(
    cluster: Cluster,
    names: Sequence[str],
    connect: Opener,
    gate: Gate,
    *,
    drain: float = 60,
    dry_run: bool = False,
    take_over: bool = False,
    real_servers_last: bool = False,
    ssh_config: Path | None = None,
) -> list[str]:
    """Bring hosts to what the cluster file says: real servers first, then directors, a master last.

    Real servers so learn of local addresses before these are used; of those that go they are to hear when nobody uses
    them any more, which needs `real_servers_last`. A director that gives one up comes before the one that gets it.

    Args:
        cluster: the cluster.
        names: only these hosts; all where empty.
        connect: opens connections.
        gate: the checks that a changed host must pass.
        drain: seconds that connections of a local address that goes may take to end.
        dry_run: only ask: what a run refuses at first is refused, else what differs on each host comes in its order.
        take_over: go back now from what another run is changing.
        real_servers_last: they come after the directors.
        ssh_config: what `connect` reads, for the commands to type next.

    Returns:
        What was done, a line for each host; in a dry run, what differs.

    Raises:
        BuildError: a local address would be on two directors, or two directors would be master: no host was changed. Or
            a host failed: it was rolled back, those before it are changed, those after it are not. Or it is another
            run's: then it is as it was. Or, in a dry run, a host cannot be asked.
    """
    render = Renderer(cluster)
    hosts = sorted(cluster.chosen(tuple(names)), key=lambda host: _order(host, real_servers_last=real_servers_last))
    vrrp.refuse_two_masters(cluster, hosts, render, connect, ssh_config)
    hosts = local_addresses.in_turn(cluster, hosts, connect, STATE, ssh_config)
    if dry_run:
        return _differing(hosts, render, connect)
    hint = f"{command('apply', cluster.path, ssh_config)} --take-over"
    shows = command("plan", cluster.path, ssh_config)
    lines = []
    for host in hosts:
        with (
            progress.step(f"applying to {host.name}"),
            connect(host) as free,
            claim.held(free, int(drain) + _GRACE, f"{STATE}/rollback", take_over=take_over, hint=hint) as remote,
        ):
            found = compare(remote, host, render.root_files(host))
            if not found.changes:
                lines.append(f"{host.name}: nothing to do")
                continue
            change(remote, found, gate, drain, f"{shows} --host {host.name}")
            lines.append(f"{host.name}: {len(found.changes)} files changed, {' '.join(found.areas) or 'no service'}")
    return lines


def _order(host: Host, *, real_servers_last: bool) -> tuple[bool, int]:
    # A master serves until its backups are ready.
    last = isinstance(host, Director) != real_servers_last
    return last, host.priority if isinstance(host, Director) else 0


def change(remote: Remote, plan: Plan, gate: Gate, drain: float, shows: str) -> None:
    """Change a host, or leave it as it was.

    Args:
        remote: the host.
        plan: what differs on it.
        gate: the checks that it must pass then.
        drain: seconds that connections of a local address that goes may take to end.
        shows: the command that shows what differs, for errors.

    Raises:
        BuildError: what failed; the host has its old files again and was told so.
    """
    paths = [change.path for change in plan.changes]
    gone, added = moved(plan)
    away = down(remote, plan)
    seen = f"; ip -o address show >{STATE}/addresses" if added else ""
    remote.run(
        f"umask 077; mkdir -p {STATE}; chmod 711 {STATE}{seen}; logger -p daemon.info '{MARK}'", what="making room"
    )
    remote.put(pack(plan.files), f"{STATE}/new.tar")
    remote.run(_UNPACK, what="the new files' own checkers")
    # Of these rc.local does not know: it has not run yet, or failed.
    back = [_removal(address, device) for address, device in added]
    unbound = rebinding([(c.new, c.old) for c in plan.keepalived])
    seconds = int(drain) + _GRACE
    keep = _keep(paths, plan.areas, unbound, back, seconds)
    remote.run(f"{keep}\n{claim.extended(seconds)}", what="keeping the old files")
    try:
        remote.run(_install([file.path for file in plan.files], [c.path for c in plan.changes if c.new is None]))
        before = [_addition(address, device) for address, device in added]
        first = [area for area in plan.areas if area in ("network", "sysctl", "keepalived")]
        vips = rebinding([(c.old, c.new) for c in plan.keepalived])
        remote.run("\n".join([*before, *(_ACT[area] for area in first), *vips]), what=f"changing {' '.join(first)}")
        if gone and "keepalived" in plan.areas:
            # One that only moves to another interface stays in use.
            going = {address for address, _ in gone} - {address for address, _ in added}
            local_addresses.drained(remote, [address.split("/")[0] for address in going], drain)
        rest = [area for area in plan.areas if area not in first]
        remote.run("\n".join(_ACT[area] for area in rest), what=f"changing {' '.join(rest)}")
        gate(plan.host, away)
    except BuildError as error:
        raise BuildError(error.message, error.hint, [*error.details, *_back(remote)]) from error
    except BaseException:
        for line in _back(remote):
            progress.note(line)
        raise
    _end(remote, seconds, shows)
    if left := unsaid(plan):
        progress.note(f"{remote.name}: no file says {', '.join(left)} any more: as they are until it boots again")


# A real server in keepalived's files, with its weight.
_REAL_SERVER = re.compile(r"^ *real_server (\S+) (\d+) \{\n *weight (\d+)", re.M)


def down(remote: Remote, plan: Plan) -> frozenset[str]:
    """The real servers that keepalived has taken out, as `10.0.0.1:80`: no change is to blame for them.

    They are in the old files with a weight, and in no service of the kernel with one. Where they were dead before an
    operation, they must not stop it: it may be the one that replaces them.
    """
    changed = {change.path: change.old for change in plan.changes}
    old = [changed.get(file.path, file) for file in plan.files if file.path.startswith("/etc/keepalived/")]
    old += [change.old for change in plan.keepalived if change.new is None]
    found = [row for file in old if file is not None for row in _REAL_SERVER.findall(file.content)]
    named = {ipvs.point(address, int(port)) for address, port, weight in found if int(weight)}
    if not named:
        return frozenset()
    rows = ipvs.read(remote.run("ipvsadm -Ln", what="asking for real servers").stdout, "").rows
    away = named - {name for service in rows.values() for name, row in service.items() if row.weight}
    if away and not rows:
        return frozenset()  # keepalived does not run: nothing is known of them
    if away:
        progress.note(f"{remote.name}: down already, not waited for: {', '.join(sorted(away))}")
    return frozenset(away)


def unsaid(plan: Plan) -> list[str]:
    """The kernel settings that its old files name and its new ones do not: what they were before, nobody knows."""
    old = [change.old for change in plan.changes if change.old is not None]
    before, after = (
        {
            line.partition("=")[0].strip()
            for file in files
            if file.path.startswith("/etc/sysctl.d/")
            for line in file.content.splitlines()
            if "=" in line and not line.lstrip().startswith(("#", ";"))
        }
        for files in (old, plan.files)
    )
    return sorted(before - after)


def _end(remote: Remote, seconds: int, shows: str) -> None:
    """Stop the timer, while it still runs.

    Raises:
        BuildError: it did not: the host has gone back.
    """
    try:
        answer = remote.run(_ENDING, what="ending the change")
    except BuildError as error:
        unknown = f"{remote.name} goes back by itself, unless this was its last step: {shows} shows it"
        raise BuildError(error.message, error.hint, [*error.details, unknown]) from error
    if "back" in answer.stdout.split():
        raise BuildError(
            f"{remote.name} has gone back to its old files by itself, as it does after {seconds} s",
            f"{remote.login} journalctl -u {_UNIT}   (then the same command again)",
            [f"or it has booted meanwhile: {shows} shows which files it has; the hosts after it were not touched"],
        )


def _back(remote: Remote) -> list[str]:
    """Roll a host back; returns how that went, for the error."""
    try:
        answer = remote.run(f"/bin/sh {STATE}/rollback\n{_DONE}", what="rolling back")
    except BuildError as error:
        return [f"{remote.name} was not rolled back ({error.message}); its timer does so, or who has it now"]
    back = f"{remote.name} was rolled back; the hosts after it were not touched; {SAME_COMMAND}"
    return [*(f"rolling back: {line}" for line in run.tail(answer.stderr)), back]


def moved(plan: Plan) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The local addresses that go and that come, each with prefix length and the interface."""
    found: list[dict[str, str]] = []
    change = next((each for each in plan.changes if each.path == "/etc/lvs/host.conf"), None)
    for file in (change.old, change.new) if change else (None, None):
        there = local_addresses.listed(file.content if file else "")
        found.append({f"{address}/{128 if ':' in address else 32}": device for address, device in there.items()})
    old, new = found
    return [(a, d) for a, d in old.items() if new.get(a) != d], [(a, d) for a, d in new.items() if old.get(a) != d]


def _addition(address: str, device: str) -> str:
    """As rc.local does it: the host itself never speaks from an IPv6 one."""
    return f"ip address replace {address} dev {device}{' preferred_lft 0' if ':' in address else ''}"


def _removal(address: str, device: str) -> str:
    """Undoes `_addition`, but for an address that was there before: somebody else's."""
    there = shlex.quote(f"^[0-9]*: {device} .* {address} ")
    return f"grep -q {there} {STATE}/addresses || ip address del {address} dev {device} 2>/dev/null || :"


# What a service's quorum_up does, which keepalived runs at a reload only where the script has changed.
_BOUND = re.compile(r"ip addr add (\S+) dev (\S+?);")
_GROUP = re.compile(r"^virtual_server_group \S+ \{\n(.*?)^\}", re.M | re.S)
_MEMBER = re.compile(r"^ *(\S+) \d+$", re.M)


def _bound(file: File | None) -> dict[str, str]:
    return {} if file is None else dict(_BOUND.findall(file.content))


def _taken_over(file: File | None) -> Iterator[str]:
    """The VIPs that keepalived binds by itself: of one that is there already it makes no fuss."""
    if file is not None and re.search(r"^ *vip_bind_dev ", file.content, re.M):
        for group in _GROUP.findall(file.content):
            yield from (str(ip_interface(vip)) for vip in _MEMBER.findall(group))


def rebinding(changes: Sequence[tuple[File | None, File | None]]) -> list[str]:
    """The commands that bring VIPs bound by scripts to what they would be, had their service started with its new file.

    Args:
        changes: keepalived's files, each before and after.
    """
    before, after = ([_bound(pair[n]) for pair in changes] for n in (0, 1))
    wanted = {vip for vips in after for vip in vips} | {vip for _, file in changes for vip in _taken_over(file)}
    lines = []
    for old, new in zip(before, after, strict=True):
        lines += [f"ip address del {vip} dev {dev} 2>/dev/null || :" for vip, dev in old.items() if vip not in wanted]
        stays = next((vip for vip in old if vip in new), None)
        for vip, dev in new.items():
            # Bound as the others of its service are; the first of a new service waits for the quorum.
            if vip not in old and stays is not None:
                lines.append(
                    f'[ -z "$(ip -o address show dev {dev} to {stays})" ] || ip address replace {vip} dev {dev}'
                )
    return lines


def pack(files: Sequence[File]) -> bytes:
    """Files as a tar that only needs to be unpacked."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for file in files:
            content = file.content.encode("utf-8", "surrogateescape")
            member = tarfile.TarInfo(file.path.lstrip("/"))
            member.size, member.mode = len(content), file.mode
            member.uname = member.gname = file.owner
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


# --- what runs on the host: /bin/sh with -eu

# The daemons read as themselves, so that folders are open and the files' own modes count.
_UNPACK = f"""
umask 022
cd {STATE}
rm -rf new old absent
mkdir new old
chmod 700 old
tar -C new -xpf new.tar
rm new.tar
if [ -e new/etc/keepalived/keepalived.conf ]; then
    keepalived --config-test --use-file {STATE}/new/etc/keepalived/keepalived.conf
fi
for daemon in {" ".join(ROUTING)}; do
    if [ -e new/etc/quagga/$daemon.conf ]; then
        said=$(/usr/sbin/$daemon -C -f {STATE}/new/etc/quagga/$daemon.conf 2>&1) || {{ echo "$said" >&2; exit 1; }}
        # A line that it does not know is no failure for it.
        case $said in *"on config line"*) echo "$daemon.conf: $said" >&2; exit 1 ;; esac
    fi
done
"""

# The routes of networkd's files, as "INTERFACE DESTINATION"; a default route has no destination there.
_ROUTES = """
file_routes() {
    for file in /etc/systemd/network/10-cloud-init-*.network /etc/systemd/network/10-cloud-init-*.network.d/*.conf; do
        [ -e "$file" ] || continue
        nic=${file#*/10-cloud-init-}
        nic=${nic%%.network*}
        to= default=
        { cat "$file"; echo "[End]"; } | while read -r line; do
            case $line in
                Gateway=*:*) default=::/0 ;;
                Gateway=*.*) default=0.0.0.0/0 ;;
                Destination=?*) to=${line#*=} ;;
                "["*) [ -z "${to:-$default}" ] || echo "$nic ${to:-$default}"; to= default= ;;
            esac
        done
    done
}
"""

# Networkd's files are cloud-init's work on the first boot, and here. A route that has left a file is a foreign one to
# networkd at once, and those are not its to remove (networkd.conf): it would stay.
_NETWORK = f"""{_ROUTES}
if [ -e {NETWORK} ]; then
    macs=
    for nic in /sys/class/net/*; do
        [ ! -e "$nic/device" ] || macs="$macs -m ${{nic##*/}},$(cat "$nic/address")"
    done
    rm -f /etc/systemd/network/10-cloud-init-*.network /etc/systemd/network/10-cloud-init-*.link
    cloud-init devel net-convert -p {NETWORK} -k yaml -d / -D debian -O networkd $macs >/dev/null
    networkctl reload
    for nic in $(sed -n 's/^  \\([^ ]*\\):$/\\1/p' {NETWORK}); do
        networkctl reconfigure "$nic"
    done
    file_routes >{STATE}/wanted
    grep -vxFf {STATE}/wanted {STATE}/routes | while read -r nic to; do
        case $to in *:*) family=-6 ;; *) family=-4 ;; esac
        ip $family route flush exact "$to" dev "$nic" proto static
    done
fi
"""

# rc.local does it at boot only, and that of an image from before these files not even then.
_LOAD_VIPS = f"[ ! -e {VIPS} ] || nft list table inet lvs >/dev/null 2>&1 || nft -f {VIPS}\n"
_LOAD_VIP_ROUTES = f"[ ! -e {VIP_ROUTES} ] || ip -force -batch {VIP_ROUTES}\n"
# Of a VIP that has just left with its route, routers may not yet have heard.
_VIP_ROUTES = f"""{_LOAD_VIP_ROUTES}
wanted=$(grep -c ^route {VIP_ROUTES} 2>/dev/null) || :
found=$({{ ip -4 route show proto {BLACKHOLES}; ip -6 route show proto {BLACKHOLES}; }} | wc -l)
if [ "$found" -ne "${{wanted:-0}}" ]; then
    sleep 5
    ip -4 route flush proto {BLACKHOLES}
    ip -6 route flush proto {BLACKHOLES}
    {_LOAD_VIP_ROUTES}
fi
"""

_ACT: Mapping[str, str] = {
    "network": _NETWORK,
    "sysctl": "/lib/systemd/systemd-sysctl\n",
    "keepalived": "systemctl reload-or-restart keepalived\n",
    "vips": f"if [ -e {VIPS} ]; then nft -f {VIPS}\n"
    "else printf 'table inet lvs\\ndelete table inet lvs\\n' | nft -f -; fi\n",
    "vip-routes": _VIP_ROUTES,
    # Adds local addresses that are new, removes those that are gone.
    "rc-local": "systemctl restart rc-local\n",
    "toa-bpf": f"! {TOA_BPF_LOADED} || toa-bpf load\n",
    **{
        daemon: f"[ -e /etc/quagga/{daemon}.conf ] && verb=restart || verb=stop\nsystemctl $verb {daemon}\n"
        for daemon in ROUTING
    },
}

# What the kernel has now for each key that the new files name: the old ones need not name it.
_SETTINGS = """
keys=$(sed -n 's/^ *\\([a-z][^ =]*\\) *=.*/\\1/p' new/etc/sysctl.d/*.conf 2>/dev/null | sort -u) || :
sysctl -e $keys >settings 2>/dev/null || :
"""

_DONE = claim.STOP
# A timer that has fired is active for as long as its service is, and then gone.
_ENDING = f"""
systemctl is-active --quiet {_UNIT}.timer || {{ echo back; exit 0; }}
systemctl stop {_UNIT}.timer
! systemctl is-active --quiet {_UNIT}.service || echo back
systemctl reset-failed {_UNIT} 2>/dev/null || :
"""


def _keep(paths: Sequence[str], areas: Sequence[str], unbound: Sequence[str], back: Sequence[str], seconds: int) -> str:
    """Keep what is there, write down how to go back, and have the host do so by itself in a while."""
    words = " ".join(shlex.quote(path) for path in paths)
    # Local addresses first, which keepalived's old file refers to; what drops packets for VIPs after these left. With
    # the old files in place each service is told, even if another one fails; what it says is shown.
    acts = "".join(_ACT[area] for area in ("network", "sysctl", "rc-local", "toa-bpf", "keepalived") if area in areas)
    acts += "".join(f"{line}\n" for line in unbound)
    acts += "".join(_ACT[area] for area in ("vips", "vip-routes", *ROUTING) if area in areas)
    acts += f"sysctl -e -q -p {STATE}/settings\n" if "sysctl" in areas else ""
    acts += "".join(f"{line}\n" for line in back)
    routes = f"{_ROUTES}file_routes >{STATE}/routes\n" if "network" in areas else ""
    rollback = (
        # Not `old/.`, whose mode and owner / would get.
        f"cd {STATE}\n{routes}xargs -r rm -f <absent\nfind old -mindepth 1 -maxdepth 1 -exec cp -a -t / {{}} +\n"
        f"/usr/lib/lvsforge/drop-stale-files\nset +e\n{acts}exit 0"
    )
    return f"""
cd {STATE}
for file in {words}; do
    # From /, as Debian 12's cp looks for the parents of an absolute path where it stands.
    if [ -e "$file" ]; then (cd / && cp -a --parents "${{file#/}}" {STATE}/old); else echo "$file"; fi
done >absent
{_SETTINGS if "sysctl" in areas else ""}{routes}
cat >rollback <<'END'
set -eu
{rollback}
END
{_DONE}
systemd-run --quiet --unit={_UNIT} --on-active={seconds} /bin/sh {STATE}/rollback
"""


def _install(paths: Sequence[str], gone: Sequence[str]) -> str:
    """Put the new files in place, each whole; then those that are not wanted any more go."""
    words = " ".join(shlex.quote(path) for path in paths)
    return f"""
for file in {words}; do
    if cmp -s "{STATE}/new$file" "$file"; then
        chmod --reference="{STATE}/new$file" "$file"
        chown --reference="{STATE}/new$file" "$file"
    else
        mkdir -p "${{file%/*}}"
        cp -a "{STATE}/new$file" "$file.new"
        mv "$file.new" "$file"
    fi
done
rm -f {" ".join(shlex.quote(path) for path in gone)}
/usr/lib/lvsforge/drop-stale-files
{_LOAD_VIPS}{_LOAD_VIP_ROUTES}"""
