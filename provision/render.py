"""Rendering: a cluster file becomes each host's files at their real paths, and the NoCloud seed that brings them there.

    OUT/<host>/rootfs/etc/…                                the files, to be read and compared
    OUT/<host>/seed/{user-data,meta-data,network-config}   the same inside a seed
    OUT/<host>/seed.iso                                    the seed as the disk that a machine boots with

Templates are stored at the path they render to, with `.j2` behind; one that renders to nothing makes no file, and one
whose name has `@SERVICE@` in it makes a file for each service. The seed runs no command: the image applies the kernel
settings, removes files of an earlier seed (/etc/lvs/files is the list), runs /etc/rc.local and starts those services
whose configuration is there, all after the seed's files have arrived.
"""

from __future__ import annotations

import fcntl
import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pipeline import progress, seed, settings
from pipeline.errors import BuildError
from pipeline.store import remove_tree
from provision import cluster as clusters
from provision.host import File, Host, Interface, Network
from provision.model import BLACKHOLES, Cluster, Director, Instance, Service

TEMPLATES = Path(__file__).with_name("templates")
FILES = "/etc/lvs/files"
NETWORK = "/etc/lvs/network-config"
# Beside what cloud-init makes of network-config for the interface.
_GATEWAY = "/etc/systemd/network/10-cloud-init-{nic}.network.d/50-gateway.conf"
# Of a route that is not its own zebra takes the metric's first byte for the distance; OSPF's is 110, and smaller wins.
_LAST_METRIC = 254 << 24
_SERVICE = "@SERVICE@"
# The folders whose files hold passwords, and who must be able to read them: the routing daemons run as frr.
_OWNERS: Mapping[str, str] = {"/etc/keepalived": "root", "/etc/quagga": "frr"}
_LONGEST_PREEMPT_DELAY = 1000  # seconds; keepalived.conf(5), preempt_delay
_SECRET_MODE = 0o640
_RENDERED_MODE = 0o644  # the other templates hold no secrets, and operators read these without sudo


@clusters.uncollected()
def render_cluster(path: Path, out: Path, names: Sequence[str] = ()) -> list[Path]:
    """Write each host's files and its seed.

    Nothing is written unless all is right; an earlier result is replaced whole. The same input gives the same bytes.

    Args:
        path: the cluster file.
        out: the folder that gets a folder for each host.
        names: only these hosts; all where empty.

    Returns:
        The hosts' folders. Only their owner may read them: passwords of VRRP and OSPF are in there.

    Raises:
        BuildError: the cluster file is wrong, or a folder's place is taken by something else.
    """
    with progress.step(f"rendering {path}"):
        cluster = clusters.load(path)
        chosen = cluster.chosen(tuple(names))
        targets = [out / host.name for host in chosen]
        for target in targets:
            if target.exists() and not (target / "seed" / "meta-data").is_file():
                raise BuildError(
                    f"{target} is there and is no rendered host",
                    f"mv {target} {target}.old   (or choose another --out)",
                )
        render = Renderer(cluster)
        rendered = [(host, render.root_files(host)) for host in chosen]
        if settings.current.dry_run:
            progress.note(f"would write {', '.join(map(str, targets))}")
            return targets
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            for host, files in rendered:
                beside = out / f".{host.name}.new"
                remove_tree(beside)
                _write(beside, files, seed_files(host, files))
            for target in targets:
                _replace(target, target.with_name(f".{target.name}.new"))
    return targets


class Renderer:
    """Renders the hosts of a cluster; what is the same on many of them is rendered once."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._environment = jinja2.Environment(  # noqa: S701  configuration files, not HTML
            loader=jinja2.FileSystemLoader(TEMPLATES),
            undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._paths = template_paths()
        self._services: dict[str, str] = {}

    def root_files(self, host: Host) -> tuple[File, ...]:
        """The host's files, rendered and handed over, sorted by path."""
        rendered = [_file(path, text) for path, text in self._templates(host) if text.strip()]
        if host.interfaces:
            rendered.append(_file(NETWORK, network_config(host)))
            rendered += _gateways(host)
        files = sorted([*rendered, *host.files], key=lambda file: file.path)
        if files:
            files.append(_file(FILES, "".join(f"{file.path}\n" for file in files)))
        return tuple(sorted(files, key=lambda file: file.path))

    def _templates(self, host: Host) -> Iterator[tuple[str, str]]:
        services = self.cluster.services_of(host) if isinstance(host, Director) else ()
        for path in self._paths:
            if _SERVICE in path:
                for service in services:
                    yield path.replace(_SERVICE, service.name), self._service(path, host, service, services)
            else:
                yield (
                    path,
                    self._template(path).render(
                        host=host,
                        cluster=self.cluster,
                        services=services,
                        announced=self._announced,
                        passing=self.cluster.passing(host),
                        withdrawable=self.cluster.withdrawable(host),
                        route=f"metric {_LAST_METRIC} proto {BLACKHOLES}",
                        networks=lambda version, host=host: self._networks(host, version),
                    ),
                )

    def _service(self, path: str, host: Host, service: Service, services: Sequence[Service]) -> str:
        """A service's file: the same on all directors, but for who is master."""
        assert isinstance(host, Director)  # noqa: S101  real servers have no services
        instances = list(self._instances(host, service, services))
        if not instances and service.name in self._services:
            return self._services[service.name]
        groups = [
            {
                "name": service.group(version),
                "vips": [vip for vip in service.vips if vip.version == version],
                "real_servers": [each for each in service.real_servers if each.address.version == version],
                "sorry": [each for each in service.sorry if each[0].version == version],
            }
            for version in service.versions
        ]
        text = self._template(path).render(
            service=service, groups=groups, instances=instances, bind_by_script=self.cluster.mode == "ospf"
        )
        if not instances:
            self._services[service.name] = text
        return text

    def _instances(self, host: Director, service: Service, services: Sequence[Service]) -> Iterator[dict[str, Any]]:
        """The VRRP instance that stands in a service's file: the first one of its services has it."""
        # All of a director's instances come back together: with NAT clients come in by one, and the answers of real
        # servers by another, whose VIP is their gateway.
        theirs = {each.instance for each in services}
        settling = _settling(host, [each for each in self.cluster.instances if each.name in theirs], services)
        for instance in self.cluster.instances:
            mine = [each for each in services if each.instance == instance.name]
            if not mine or mine[0] is not service:
                continue
            vips = list(dict.fromkeys(vip for each in mine for vip in each.vips))
            # One protocol for one family: what it says of IPv6 besides goes in the list that is not advertised.
            first = min(vip.version for vip in vips)
            names = {name for each in mine for name in each.directors}
            rivals = [director.priority for director in self.cluster.directors if director.name in names]
            here, there = _links(host, instance)
            yield {
                "name": instance.name,
                # keepalived ignores the delay of who begins as MASTER; the priority alone elects the same one.
                "state": "MASTER" if host.priority == max(rivals) and not settling else "BACKUP",
                "preempt_delay": settling,
                "interface": here,
                "track": there if instance.track and there != here else "",
                "id": instance.id,
                "priority": host.priority,
                "advert_int": instance.advert_int,
                "password": instance.password,
                "vips": [vip for vip in vips if vip.version == first],
                "excluded": [vip for vip in vips if vip.version != first],
            }

    def _announced(self, version: int) -> list[Network]:
        return [prefix for prefix in self.cluster.vip_prefixes if prefix.version == version]

    def _networks(self, host: Host, version: int) -> list[Network]:
        """OSPF's networks: those of the VIPs, and the uplink's, on which it speaks."""
        assert isinstance(host, Director)  # noqa: S101  no real server speaks OSPF
        own = [network for network in host.interface(host.uplink).networks if network.version == version]
        return list(dict.fromkeys([*self._announced(version), *own]))

    @functools.cache  # noqa: B019  a renderer lives as long as one run
    def _template(self, path: str) -> jinja2.Template:
        return self._environment.get_template(f"{path[1:]}.j2")


def _links(host: Director, instance: Instance) -> tuple[str, str]:
    """The interface on which a VRRP instance speaks, and the director's other one; one arm has the same for both."""
    here, there = host.uplink, host.downlink
    return (here, there) if instance.interface == "uplink" else (there, here)


def _settling(host: Director, instances: Iterable[Instance], services: Sequence[Service]) -> int:
    """Seconds for which a director leaves the VIPs to a backup that has them, when it could have them itself.

    Until then its health checks have found the real servers, which they had taken out while its downlink was down. The
    second more is for the answers to the last check. 0 where no instance looks at the downlink, as in the manual.
    """
    if not any(each.track or _links(host, each)[0] == host.downlink for each in instances):
        return 0
    checks = (each.check.revival(service.delay_loop) for service in services for each in service.real_servers)
    slowest = max(checks, default=0)
    return min(slowest + 1, _LONGEST_PREEMPT_DELAY) if slowest else 0


def _file(path: str, text: str) -> File:
    owner = _OWNERS.get(os.path.dirname(path))
    return File(path, text, _RENDERED_MODE) if owner is None else File(path, text, _SECRET_MODE, owner)


def seed_files(host: Host, files: Sequence[File]) -> dict[str, str]:
    """The seed's parts by name; there is no network-config for a host without interfaces."""
    parts = {"user-data": _user_data(host, files)}
    if host.interfaces:
        parts["network-config"] = network_config(host)
    # cloud-init leaves a host as it is while the id stays: any change of content must change the id.
    identity = seed.instance_id(*(f"{name}\n{parts[name]}" for name in sorted(parts)))
    parts["meta-data"] = _yaml({"instance-id": identity, "local-hostname": host.name})
    return parts


def network_config(host: Host) -> str:
    """A host's network as cloud-init's network-config, version 2."""
    if _learns_routes(host):
        return _network_config(tuple(replace(nic, gateway4=None, gateway6=None) for nic in host.interfaces))
    return _network_config(host.interfaces)


def _learns_routes(host: Host) -> bool:
    return isinstance(host, Director) and host.mode == "ospf"


def _gateways(host: Host) -> Iterator[File]:
    """Default routers of a director that has OSPF: they count until OSPF has learnt better, and when it has lost it.

    In network-config they would have no metric, and zebra would leave OSPF's default route out for theirs.
    """
    for nic in host.interfaces if _learns_routes(host) else ():
        parts = [f"[Route]\nGateway={router}\nMetric=" for router in (nic.gateway4, nic.gateway6) if router]
        parts += ["[DHCPv4]\nRouteMetric="] * nic.dhcp4
        parts += ["[IPv6AcceptRA]\nRouteMetric="]  # which any router on the link may send
        head = f"# {host.name}: default routers for as long as OSPF has none. Rendered from its cluster file.\n"
        yield _file(_GATEWAY.format(nic=nic.name), head + "\n".join(f"{part}{_LAST_METRIC}\n" for part in parts))


@functools.lru_cache(maxsize=4096)  # it is a file of the host and a part of its seed
def _network_config(interfaces: tuple[Interface, ...]) -> str:
    return _yaml({"version": 2, "ethernets": {nic.name: _ethernet(nic) for nic in interfaces}})


def template_paths() -> list[str]:
    """The absolute paths that templates render to."""
    found = sorted(TEMPLATES.rglob("*.j2"))
    if not found:
        raise BuildError(f"no template in {TEMPLATES}", "git status   (were they deleted or moved?)")
    return ["/" + path.relative_to(TEMPLATES).as_posix().removesuffix(".j2") for path in found]


def _user_data(host: Host, files: Sequence[File]) -> str:
    data: dict[str, Any] = {"hostname": host.name.split(".")[0]}
    if "." in host.name:
        data["fqdn"] = host.name
    # The keys are root's: the image has no other account. No `users: []` here, which cloud-init's schema refuses.
    data["disable_root"] = False
    data["ssh_authorized_keys"] = list(host.ssh_authorized_keys)
    text = "#cloud-config\n" + _yaml(data)
    return text + "write_files:\n" + "".join(map(_entry, files)) if files else text


@functools.lru_cache(maxsize=4096)
def _entry(file: File) -> str:
    """A file in `write_files`; most are the same on many hosts."""
    if not _is_plain(file.content):
        return _listed({**_about(file.path, file.owner, file.mode), "content": file.content})
    # The emitter looks at every character several times; this is what it comes to for ordinary files.
    body = file.content.replace("\n", "\n      ").rstrip(" ").replace("\n      \n", "\n\n")
    return f"{_head(file.path, file.owner, file.mode)}    content: |\n      {body}"


@functools.lru_cache(maxsize=4096)
def _head(path: str, owner: str, mode: int) -> str:
    return _listed(_about(path, owner, mode))


def _about(path: str, owner: str, mode: int) -> dict[str, str]:
    group = {} if owner == "root" else {"owner": f"{owner}:{owner}"}
    return {"path": path, **group, "permissions": f"{mode:04o}"}


def _listed(data: Mapping[str, str]) -> str:
    """A mapping as a member of the list `write_files`."""
    return _yaml({"write_files": [data]}).partition("\n")[2]


def _is_plain(text: str) -> bool:
    """Whether a text is lines of printable characters, none of them empty but inside, as a block takes them."""
    return (
        text.endswith("\n")
        and not text.endswith("\n\n")
        and not text[0].isspace()
        and text.replace("\n", "").isprintable()
        and " \n" not in text
    )


def _ethernet(interface: Interface) -> dict[str, Any]:
    """An interface as network-config v2.

    Default routers as gateway4 and gateway6, though netplan calls them old: cloud-init 22.4 makes ::/64 of a route to
    ::/0, and stops at a route to "default".
    """
    data: dict[str, Any] = {}
    if interface.mac is not None:
        data = {"match": {"macaddress": interface.mac}, "set-name": interface.name}
    for key, value in (
        ("dhcp4", interface.dhcp4),
        ("dhcp6", interface.dhcp6),
        ("addresses", list(interface.addresses)),
        ("gateway4", interface.gateway4),
        ("gateway6", interface.gateway6),
        ("routes", [{"to": route.to, "via": route.via} for route in interface.routes]),
        ("mtu", interface.mtu),
    ):
        if value:
            data[key] = value
    return data


class _Dumper(yaml.SafeDumper):
    """YAML for people: texts of several lines as blocks, lists indented, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _string(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Blocks for what they carry exactly, whatever reads them; quotes with escapes for characters that are hard to see.
    plain = all(c == "\n" or c.isprintable() for c in text)
    style = '"' if not plain else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _string)


def _yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def _write(folder: Path, files: Sequence[File], parts: Mapping[str, str]) -> None:
    folder.mkdir(mode=0o700)
    root = str(folder / "rootfs")
    for parent in sorted({root + os.path.dirname(file.path) for file in files} | {root}):
        os.makedirs(parent, exist_ok=True)
    for file in files:
        # Plain strings: a path object for each of very many files costs as much as writing them.
        with open(root + file.path, "wb") as out:
            out.write(file.content.encode())
            os.fchmod(out.fileno(), file.mode)
    (folder / "seed").mkdir()
    for name, text in parts.items():
        (folder / "seed" / name).write_bytes(text.encode())
    seed.write(folder / "seed.iso", parts)


def _replace(target: Path, beside: Path) -> None:
    """Put a folder in the place of another; killed between the two renames it leaves none, which the next run mends."""
    old = target.with_name(f".{target.name}.old")
    remove_tree(old)
    if target.exists():
        target.rename(old)
    beside.rename(target)
    remove_tree(old)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One writer at a time in a folder; the lock goes with the process."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
