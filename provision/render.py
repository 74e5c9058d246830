"""Rendering: a host file becomes that host's files at their real paths, and the NoCloud seed that brings them there.

    OUT/<host>/rootfs/etc/…                                the files, to be read and compared
    OUT/<host>/seed/{user-data,meta-data,network-config}   the same inside a seed
    OUT/<host>/seed.iso                                    the seed as the disk that a machine boots with

Templates are stored at the path they render to, with `.j2` behind; one that renders to nothing makes no file. The seed
runs no command: the image applies the kernel settings, runs /etc/rc.local and starts those services whose configuration
is there, all after the seed's files have arrived.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pipeline import progress, seed
from pipeline.errors import BuildError
from pipeline.store import remove_tree
from provision import host as model
from provision.host import File, Host, Interface

TEMPLATES = Path(__file__).with_name("templates")
_RENDERED_MODE = 0o644  # templates hold no secrets, and operators read these without sudo


def render_host(path: Path, out: Path) -> Path:
    """Write a host's files and its seed.

    Nothing is written unless all is right; an earlier result is replaced whole. The same input gives the same bytes.

    Args:
        path: the host file.
        out: the folder that gets a folder for each host.

    Returns:
        The host's folder. Only its owner may read it: passwords of VRRP and OSPF are in there.

    Raises:
        BuildError: the host file is wrong, or the folder's place is taken by something else.
    """
    with progress.step(f"rendering {path}"):
        host = model.load(path)
        files = root_files(host)
        parts = seed_files(host, files)
        target = out / host.name
        if target.exists() and not (target / "seed" / "meta-data").is_file():
            raise BuildError(
                f"{target} is there and is no rendered host", f"mv {target} {target}.old   (or choose another --out)"
            )
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            beside = out / f".{host.name}.new"
            remove_tree(beside)
            _write(beside, files, parts)
            _replace(target, beside)
    return target


def root_files(host: Host) -> tuple[File, ...]:
    """The host's files, rendered and handed over, sorted by path."""
    rendered = [File(path, text, _RENDERED_MODE) for path, text in _templates(host) if text.strip()]
    return tuple(sorted([*rendered, *host.files], key=lambda file: file.path))


def seed_files(host: Host, files: Sequence[File]) -> dict[str, str]:
    """The seed's parts by name; there is no network-config for a host without interfaces."""
    parts = {"user-data": _user_data(host, files)}
    if host.interfaces:
        parts["network-config"] = _yaml({"version": 2, "ethernets": {i.name: _ethernet(i) for i in host.interfaces}})
    # cloud-init leaves a host as it is while the id stays: any change of content must change the id.
    identity = seed.instance_id(*(f"{name}\n{parts[name]}" for name in sorted(parts)))
    parts["meta-data"] = _yaml({"instance-id": identity, "local-hostname": host.name})
    return parts


def template_paths() -> list[str]:
    """The absolute paths that templates render to."""
    found = sorted(TEMPLATES.rglob("*.j2"))
    if not found:
        raise BuildError(f"no template in {TEMPLATES}", "git status   (were they deleted or moved?)")
    return ["/" + path.relative_to(TEMPLATES).as_posix().removesuffix(".j2") for path in found]


def _templates(host: Host) -> Iterator[tuple[str, str]]:
    environment = jinja2.Environment(  # noqa: S701  configuration files, not HTML
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for path in template_paths():
        yield path, environment.get_template(f"{path[1:]}.j2").render(host=host)


def _user_data(host: Host, files: Sequence[File]) -> str:
    data: dict[str, Any] = {"hostname": host.name.split(".")[0]}
    if "." in host.name:
        data["fqdn"] = host.name
    # The keys are root's: the image has no other account. No `users: []` here, which cloud-init's schema refuses.
    data["disable_root"] = False
    data["ssh_authorized_keys"] = list(host.ssh_authorized_keys)
    if files:
        data["write_files"] = [
            {"path": file.path, "permissions": f"{file.mode:04o}", "content": file.content} for file in files
        ]
    return "#cloud-config\n" + _yaml(data)


def _ethernet(interface: Interface) -> dict[str, Any]:
    """An interface as network-config v2.

    Default routers as gateway4 and gateway6, though netplan calls them old: cloud-init 22.4 makes ::/64 of a route to
    ::/0, and stops at a route to "default".
    """
    data: dict[str, Any] = {"match": {"macaddress": interface.mac}, "set-name": interface.name}
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


def _yaml(data: Mapping[str, Any]) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def _write(folder: Path, files: Sequence[File], parts: Mapping[str, str]) -> None:
    folder.mkdir(mode=0o700)
    (folder / "rootfs").mkdir()
    for file in files:
        place = folder / "rootfs" / file.path.removeprefix("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.content.encode())
        place.chmod(file.mode)
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
