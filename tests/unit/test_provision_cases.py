"""Rendering by golden cases: `tests/cases/render/<case>/`.

    host.yaml     the input; what it refers to lies beside it or in provision/examples
    expected/     what is rendered, at its real paths, without the disk image

After a wanted change, render the case (`invoke render-seed --host …`), copy rootfs/ and seed/ over expected/, and
read the diff.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import recipe, run, seed
from provision import host as model
from provision import render

TOP = Path(__file__).parent.parent.parent
CASES = sorted(p for p in (TOP / "tests/cases/render").iterdir() if p.is_dir())
EXAMPLES = sorted((TOP / "provision/examples").glob("*.yaml"))
ALL = [*(case / "host.yaml" for case in CASES), *EXAMPLES]
BLOCK = 2048


def name_of(path: Path) -> str:
    return path.parent.name if path.name == "host.yaml" else path.stem


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_there_are_cases() -> None:
    assert len(CASES) >= 5
    assert {p.name for p in EXAMPLES} == {"director.yaml", "realserver.yaml"}
    assert all((case / "expected/seed/user-data").is_file() for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_case(case: Path, tmp_path: Path) -> None:
    target = render.render_host(case / "host.yaml", tmp_path / "out")
    rendered = contents(target)
    assert rendered.pop("seed.iso")
    assert rendered == contents(case / "expected")
    assert target.parent == tmp_path / "out"
    assert target.name == yaml.safe_load((case / "host.yaml").read_text(encoding="utf-8"))["name"]


def test_the_minimal_case_is_one_without_network_and_files() -> None:
    assert sorted(contents(TOP / "tests/cases/render/minimal-realserver/expected")) == [
        "seed/meta-data",
        "seed/user-data",
    ]


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_the_seed_carries_the_files(path: Path, tmp_path: Path) -> None:
    target = render.render_host(path, tmp_path)
    text = (target / "seed/user-data").read_text(encoding="utf-8")
    assert text.startswith("#cloud-config\n")
    user = yaml.safe_load(text)
    root = target / "rootfs"
    on_disk = {
        "/" + p.relative_to(root).as_posix(): (p.read_bytes(), p.stat().st_mode & 0o7777)
        for p in root.rglob("*")
        if p.is_file()
    }
    written = {f["path"]: (f["content"].encode(), int(f["permissions"], 8)) for f in user.get("write_files", [])}
    assert written == on_disk
    assert not {"password", "chpasswd", "passwd", "ssh_pwauth", "users"} & user.keys()
    assert user["ssh_authorized_keys"]


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_the_disk_carries_the_seed(path: Path, tmp_path: Path) -> None:
    target = render.render_host(path, tmp_path)
    image = (target / "seed.iso").read_bytes()
    assert seed.LABEL.encode() in image[16 * BLOCK : 17 * BLOCK]
    parts = {p.name: p.read_bytes() for p in (target / "seed").iterdir()}
    assert parts.keys() <= set(seed.FILES)
    for name, content in parts.items():
        assert name.encode() in image
        assert image.index(content) % BLOCK == 0


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_the_same_input_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    first = contents(render.render_host(path, tmp_path / "one"))
    assert contents(render.render_host(path, tmp_path / "other")) == first
    assert contents(render.render_host(path, tmp_path / "one")) == first
    assert [p.name for p in (tmp_path / "one").iterdir()] == [p.name for p in (tmp_path / "other").iterdir()]


def test_a_list_in_another_order_in_the_same_words_is_the_same_host(tmp_path: Path) -> None:
    """Keys of a mapping have no order, so a file whose `files` are sorted otherwise must not become a new instance."""
    data = yaml.safe_load((EXAMPLES[0]).read_text(encoding="utf-8"))
    folder = tmp_path / "in"
    shutil.copytree(EXAMPLES[0].parent, folder)
    data = {key: data[key] for key in reversed(data)}
    data["files"] = {key: data["files"][key] for key in reversed(data["files"])}
    (folder / "turned.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    assert contents(render.render_host(folder / "turned.yaml", tmp_path / "a")) == contents(
        render.render_host(EXAMPLES[0], tmp_path / "b")
    )


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_the_model_and_its_schema_agree(path: Path) -> None:
    """Examples and cases use every key that the schema knows, so that none is accepted and then forgotten."""
    assert not recipe.check(yaml.safe_load(path.read_text(encoding="utf-8")), model.SCHEMA, "")


def used_keys(data: Any, schema: Any, place: str = "") -> set[str]:
    if "$ref" in schema:
        schema = model.SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    found: set[str] = set()
    if isinstance(data, dict):
        for key, value in data.items():
            known = schema.get("properties", {})
            if key in known:
                found |= {f"{place}{key}"} | used_keys(value, known[key], f"{place}{key}.")
            else:
                found |= used_keys(value, schema.get("additionalProperties") or {}, place)
    elif isinstance(data, list):
        for item in data:
            found |= used_keys(item, schema.get("items", {}), place)
    return found


def known_keys(schema: Any, place: str = "") -> set[str]:
    if "$ref" in schema:
        schema = model.SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    found: set[str] = set()
    for key, below in schema.get("properties", {}).items():
        found |= {f"{place}{key}"} | known_keys(below, f"{place}{key}.")
    for below in (schema.get("additionalProperties"), schema.get("items")):
        if isinstance(below, dict):
            found |= known_keys(below, place)
    return found


def test_the_cases_use_every_key() -> None:
    used: set[str] = set()
    for path in ALL:
        used |= used_keys(yaml.safe_load(path.read_text(encoding="utf-8")), model.SCHEMA)
    assert used == known_keys(model.SCHEMA)
    assert len(used) > 20


def test_no_remark_of_the_manual_is_left() -> None:
    files = [p for p in (TOP / "provision/examples/manual").rglob("*") if p.suffix == ".conf"]
    assert len(files) == 6
    assert not [p for p in files if re.search(r"//|[^\x00-\x7f]", p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("case", ["director-ospf", "director-vrrp", "director-dual-stack"])
@pytest.mark.runs("bash")
def test_the_image_understands_host_conf(case: str, tmp_path: Path) -> None:
    """/etc/rc.local of the director's image, with recording tools in the place of the real ones."""
    source = TOP / "tests/cases/render" / case / "host.yaml"
    host = model.load(source)
    root = render.render_host(source, tmp_path) / "rootfs"
    tools = root / "usr/sbin"
    tools.mkdir(parents=True)
    for tool in ("ip", "ethtool", "set_irq_affinity"):
        (tools / tool).write_text(f'#!/bin/bash\necho "{tool} $*" >>"$LVS_ROOT/log"\n', encoding="utf-8")
        (tools / tool).chmod(0o755)
    for interface in host.interfaces:
        nic = root / "sys/class/net" / interface.name
        nic.mkdir(parents=True)
        (nic / "ifindex").write_text("1\n", encoding="utf-8")
    script = TOP / "image/director/rootfs/etc/rc.local"
    result = run.run(["bash", script], env={"LVS_ROOT": str(root)})
    assert "left out" not in result.stdout + result.stderr
    log = (root / "log").read_text(encoding="utf-8").splitlines()
    added = [line.split() for line in log if line.startswith("ip address replace ")]
    assert [words[3].split("/")[0] for words in added] == list(host.local_addresses)
    assert {words[5] for words in added} == {host.downlink}
    assert [line for line in log if line.startswith("set_irq_affinity")] == [
        f"set_irq_affinity --local-node {' '.join(dict.fromkeys([host.uplink or '', host.downlink or '']))}"
    ]
