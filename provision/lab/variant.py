"""The lab's copy of a cluster file: the same cluster, with what only the lab knows. It is the file to work on.

Added are a key that the lab logs in with and a NIC for that on each host; secrets stand in files of the lab's, made up
where the environment has none; files named by a relative path are named by their whole path. All else, comments too,
stays as it is.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml.comments import CommentedMap, CommentedSeq

from provision import operations
from provision.lab.topology import CONTROL, control_mac

_MADE_UP = 8  # hex digits: VRRP takes no longer password
_HASH = 13  # characters of a hash; nobody knows a password that has it


def write(source: Path, target: Path, public_key: str) -> None:
    """Write the lab's copy, and its secrets beside it.

    Args:
        source: the cluster file.
        target: the copy; its folder must be for its owner only.
        public_key: the lab's key, as in authorized_keys.

    Raises:
        BuildError: the cluster file is wrong.
    """
    texts: dict[Path, str] = {}
    edit = operations.edit(source, change(source.resolve().parent, target.parent / "secrets", public_key, texts))
    for path, text in texts.items():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(f"{text}\n", encoding="utf-8")
    target.write_text(edit.after, encoding="utf-8")


def change(folder: Path, secret_folder: Path, public_key: str, texts: dict[Path, str]) -> operations.Change:
    """The edit that makes the copy.

    Args:
        folder: where the cluster file's relative paths start.
        secret_folder: where the lab's secrets are.
        public_key: the lab's key.
        texts: takes the secrets, by file.
    """

    def edit(data: Any) -> None:
        vty = data.get("vty") or {}
        hashed = vty.get("password") if vty.get("encrypted") else None
        for item in list(_mappings(data)):
            if isinstance(name := item.get("env"), str) and len(item) == 1:
                path = secret_folder / name
                length = _HASH if item is hashed else _MADE_UP
                texts[path] = os.environ.get(name) or secrets.token_hex(length)[:length]
                del item["env"]
                item["file"] = str(path.resolve())
            elif isinstance(name := item.get("file"), str):
                item["file"] = str((folder / name).resolve())
        keys = data.setdefault("ssh_authorized_keys", CommentedSeq())
        operations.append(keys, public_key)
        for number, host in enumerate([*data["directors"], *data.get("real_servers", [])]):
            nic = CommentedMap({"name": CONTROL, "mac": control_mac(number), "dhcp4": True})
            nic.fa.set_flow_style()
            operations.append(host["interfaces"], nic)

    return edit


def _mappings(data: Any) -> Iterator[Any]:
    if isinstance(data, dict):
        yield data
    for each in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from _mappings(each)
