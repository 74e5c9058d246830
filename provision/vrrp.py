"""What both directors must agree on in VRRP: where they do not, both are master."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import BuildError
from provision.host import Host
from provision.model import Cluster, Director
from provision.remote import Opener, command, login
from provision.render import Renderer

# A backup passes over advertisements with another of these: it waits in vain, and takes the VIPs. The family of the
# first VIP is that of the protocol; the priority and the state are each director's own.
_SAME = ("virtual_router_id", "advert_int", "auth_type", "auth_pass", "virtual_ipaddress")
_KEYS = ("interface", *_SAME[:-1])
_INSTANCE = re.compile(r"^\s*vrrp_instance\s+(\S+)\s*\{(.*?)^\}", re.M | re.S)
# The first, behind remarks.
_VIPS = re.compile(r"\bvirtual_ipaddress\s*\{(?:\s|[#!][^\n]*\n)*([^\s#!}]+)")
# Nothing where keepalived does not run: then it advertises nothing, and takes nothing.
_PRESENT = """
systemctl is-active --quiet keepalived || exit 0
cd /etc/keepalived 2>/dev/null || exit 0
cat keepalived.conf $(sed -n 's/^ *include *//p' keepalived.conf 2>/dev/null) 2>/dev/null || :
"""


def spoken(text: str) -> dict[str, dict[str, str]]:
    """What each instance of keepalived's files says to its peers, by key."""
    found = {}
    for name, body in _INSTANCE.findall(text):
        values = dict(re.findall(rf"^\s*({'|'.join(_KEYS)})\s+(\S+)", body, re.M))
        if vips := _VIPS.search(body):
            values["virtual_ipaddress"] = f"IPv{6 if ':' in vips[1] else 4}"
        found[name] = values
    return found


def refuse_two_masters(
    cluster: Cluster, hosts: Sequence[Host], render: Renderer, connect: Opener, ssh_config: Path | None
) -> None:
    """Look whether changing directors one after another leaves two that do not hear each other.

    Args:
        cluster: the cluster; of another mode than vrrp nothing is asked.
        hosts: those to be changed, in this order.
        render: renders their new files.
        connect: opens connections; directors are asked for their present files.
        ssh_config: what `connect` reads, for the commands to type next.

    Raises:
        BuildError: a director would run with another value than one that runs now; or one cannot be asked.
    """
    changed = [host for host in hosts if isinstance(host, Director)]
    if cluster.mode != "vrrp" or not changed:
        return
    wanted, known = {}, {each.name: each for each in cluster.directors}
    for each in cluster.directors:
        files = (file for file in render.root_files(each) if file.path.startswith("/etc/keepalived/"))
        wanted[each.name] = spoken("\n".join(file.content for file in files))

    @functools.cache
    def present(name: str) -> dict[str, dict[str, str]]:
        with connect(known[name]) as remote:
            return spoken(remote.run(_PRESENT, what="reading its VRRP instances").stdout)

    for number, director in enumerate(changed):
        # A peer is asked only where there is something to compare: it may be down, and the reason for the change.
        own = present(director.name)
        new = {name: values for name, values in wanted[director.name].items() if own.get(name) != values}
        peers = [each for each in cluster.directors if each not in changed[: number + 1]]
        for name, peer in itertools.product(new, peers):
            if name not in wanted[peer.name] or (theirs := present(peer.name).get(name)) is None:
                continue
            keys = [key for key in _SAME if theirs.get(key) != new[name].get(key)]
            # Interfaces have names of their own on each director: only a move says something.
            keys += ["interface"] * (theirs.get("interface") != wanted[peer.name][name].get("interface"))
            if keys:
                raise _refused(director, peer, name, keys, command("apply", cluster.path, ssh_config), ssh_config)


def _refused(
    director: Director, peer: Director, name: str, keys: Sequence[str], again: str, ssh_config: Path | None
) -> BuildError:
    backup, master = sorted((director, peer), key=lambda each: each.priority)
    return BuildError(
        f"{director.name} and {peer.name} would both be master of {name}: they would differ in {', '.join(keys)}",
        f"{login(backup, ssh_config)} systemctl stop keepalived && {again} --host {master.name}"
        f" && {again} --host {backup.name}",
        [
            "nothing was changed; it can be while only one of them runs: the line below leaves the VIPs without a"
            f" backup until its end, and {master.name} may be without them for some seconds while it reads the change"
        ],
    )
