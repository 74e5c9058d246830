"""The cluster's rules: each broken once, with the exact lines that must come of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import BuildError, Problems
from provision import cluster as clusters
from provision import render, secret
from provision.secret import Secret
from tests.unit.bad_clusters import BAD_OSPF, BAD_VRRP
from tests.unit.clusters import OSPF, VRRP

# what is wrong: the good cluster, how to break it, and every line that must come of it (FOLDER is the file's folder)
BAD = {
    **{f"ospf: {name}": (OSPF, *case) for name, case in BAD_OSPF.items()},
    **{f"vrrp: {name}": (VRRP, *case) for name, case in BAD_VRRP.items()},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with secrets to refer to."""
    place = tmp_path / "in"
    place.mkdir()
    secrets = {"ospf": "k3y\n", "vrrp": "s3cret", "long": "1234567890abcdefg", "words": "two words", "empty": "\n"}
    for name, text in {**secrets, "open": "k3y", "hash": "k3y/k3y.k3y0A"}.items():
        (place / name).write_text(text, encoding="utf-8")
        (place / name).chmod(0o644 if name == "open" else 0o600)
    return place


def write(folder: Path, data: Any) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("base", [OSPF, VRRP], ids=["ospf", "vrrp"])
def test_the_good_clusters_are_good(base: dict[str, Any], folder: Path) -> None:
    assert [host.name for host in clusters.load(write(folder, base)).hosts] == ["lvs-1", "lvs-2", "rs-1"]
    assert len(BAD) >= 40


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input(case: str, folder: Path, tmp_path: Path) -> None:
    base, change, expected = BAD[case]
    data = copy.deepcopy(base)
    change(data)
    path = write(folder, data)
    with pytest.raises(BuildError) as caught:
        render.render_cluster(path, tmp_path / "out")
    assert [line.replace(str(folder), "FOLDER") for line in caught.value.details] == sorted(expected)
    assert caught.value.hint == f"correct {path}"
    assert not (tmp_path / "out").exists()


def test_all_problems_at_once(folder: Path) -> None:
    """Those of the schema, of hosts, of services and of what concerns several, in one list."""
    data = copy.deepcopy(OSPF)
    wanted: list[str] = []
    for name in (
        "unknown key of ospf",
        "ssh",
        "slot beyond the pool",
        "long secret",
        "VIP outside",
        "hysteresis as large as the quorum",
        "path of a check",
    ):
        change, lines = BAD_OSPF[name]
        change(data)
        wanted += lines
    with pytest.raises(BuildError) as caught:
        clusters.load(write(folder, data))
    assert [line.replace(str(folder), "FOLDER") for line in caught.value.details] == sorted(wanted)
    assert caught.value.message.endswith(f": {len(wanted)} problems")


# --- secrets


def test_a_secret_does_not_show(folder: Path) -> None:
    cluster = clusters.load(write(folder, OSPF))
    assert cluster.ospf is not None and cluster.ospf.key == Secret("k3y")
    assert "k3y" not in f"{cluster!r} {cluster.ospf.key} {cluster.ospf.key!r}"


def test_without_secrets_the_rest_is_read(folder: Path) -> None:
    (folder / "ospf").unlink()
    path = write(folder, OSPF)
    assert clusters.load(path, secrets=False).services
    with pytest.raises(BuildError, match="1 problem"):
        clusters.load(path)


def test_a_wrong_secret_is_not_told(folder: Path) -> None:
    problems = Problems()
    assert secret.read({"file": "long"}, folder, problems, "x", 8) is None
    assert problems and "1234567" not in "".join(problems.lines)


@pytest.mark.parametrize("wrong", ["vrrp", "long"])
def test_an_encrypted_password_is_a_hash(wrong: str, folder: Path) -> None:
    """With another word nobody could log in, and nothing would say so."""
    data = copy.deepcopy(OSPF)
    data["vty"] = {"password": {"file": wrong}, "encrypted": True}
    path = write(folder, data)
    with pytest.raises(BuildError) as caught:
        clusters.load(path)
    (line,) = caught.value.details
    assert line.startswith("vty.password: with encrypted: true a hash is wanted, 13 characters")
    assert "s3cret" not in line and "1234567" not in line
    assert clusters.load(path, secrets=False).vty
    data["vty"]["encrypted"] = False
    assert clusters.load(write(folder, data)).vty
    data["vty"] = {"password": {"file": "hash"}, "encrypted": True}
    vty = clusters.load(write(folder, data)).vty
    assert vty is not None and vty.encrypted and vty.password == Secret("k3y/k3y.k3y0A")


def test_hidden_in_what_a_checker_says() -> None:
    """A daemon repeats the line that it does not take."""
    lines = ("ip ospf message-digest-key 8 md5 k3y", "enable password 8 k3y", "auth_pass k3y", "key-string k3y")
    for line in (*lines, "area 1 virtual-link 192.0.2.1 message-digest-key 1 md5 k3y", "authentication-key k3y"):
        shown = secret.hide(f"2026/11/28 No such command on config line 9:  {line}\nthe end")
        assert shown.endswith("(secret)\nthe end") and "k3y" not in shown


def test_hidden_in_what_is_shown(folder: Path, tmp_path: Path) -> None:
    """Every secret of a rendered file is found again by the words before it."""
    data = copy.deepcopy(OSPF)
    data["vty"] = {"password": {"file": "hash"}, "encrypted": True}
    for base in (data, VRRP):
        render.render_cluster(write(folder, base), tmp_path / "out")
    count = 0
    for path in (tmp_path / "out").rglob("*.conf"):
        text = path.read_text(encoding="utf-8")
        count += text.count("k3y") + text.count("s3cret")
        shown = secret.hide(text)
        assert "k3y" not in shown and "s3cret" not in shown
    # per director: OSPF's key twice (both families), six lines of three terminals' passwords; or VRRP's once
    assert count > 0
