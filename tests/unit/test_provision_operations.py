"""Daily operations: what an edit leaves of a cluster file's form, and what is refused before anything is touched."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from pipeline import run, settings
from pipeline.errors import BuildError
from provision import checking, ipvs, remote, rollout
from provision import cluster as clusters
from provision import operations as ops

TEXT = """\
# The cluster of the shop.
mode: ospf

ssh_authorized_keys:
  - ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDHFUBiRgJrP4XztCc+jX2nD2tZasydDolGOJRyqxxoj example

vip_prefixes: [203.0.113.0/24]   # announced
ospf: {area: 0.0.0.11}

local_addresses:
  laddr_g1:
    addresses: ['192.168.100.1-192.168.100.10']   # quoted by habit
    per_director: 5

directors:
  # the first one
  - name: lvs-1
    slot: 1
    interfaces:
      - {name: eth0, addresses: [192.0.2.1/24]}
      - {name: eth1, addresses: [192.168.100.201/24]}
    uplink: eth0
    downlink: eth1

  # the second one
  - name: lvs-2
    slot: 2
    interfaces:
      - {name: eth0, addresses: [192.0.2.2/24]}
      - {name: eth1, addresses: [192.168.100.202/24]}
    uplink: eth0
    downlink: eth1

services:
  # what earns the money
  - name: shop
    vips:
      - 203.0.113.1   # www
      - 203.0.113.2   # api
    ports: [80]
    real_servers:
      - {address: 198.51.100.1, weight: 100}   # rack 1
      - {address: 198.51.100.2, weight: 100}   # rack 2

  # and what does not
  - name: docs
    vips: [203.0.113.3]
    ports: [8080]
    quorum: 1
    real_servers:
      - address: 198.51.100.1
        weight: 3
      # slow
      - address: 198.51.100.2
        port: 81

# the end
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text(TEXT, encoding="utf-8")
    return file


def changed(edit: ops.Edit) -> list[str]:
    """The lines that came and went."""
    return [line for line in edit.lines[2:] if line[0] in "+-"]


Operation = Callable[[Path], ops.Change]
EDITS: dict[str, tuple[Operation, list[str]]] = {
    "real server among flow mappings": (
        lambda path: ops.add_real_server("shop", "198.51.100.3", 0, 50),
        ["+      - {address: 198.51.100.3, weight: 50}"],
    ),
    "real server with a port": (
        lambda path: ops.add_real_server("shop", "198.51.100.3", 8080, 1),
        ["+      - {address: 198.51.100.3, port: 8080}"],
    ),
    "real server among block mappings, last before a comment": (
        lambda path: ops.add_real_server("docs", "198.51.100.3", 8080, 1),
        ["+      - address: 198.51.100.3"],
    ),
    "drained": (
        lambda path: ops.drain_real_server("shop", "198.51.100.2", 0),
        [
            "-      - {address: 198.51.100.2, weight: 100}   # rack 2",
            "+      - {address: 198.51.100.2, weight: 0}     # rack 2",  # in its column
        ],
    ),
    "drained that had no weight": (
        lambda path: ops.drain_real_server("docs", "198.51.100.2", 81),
        ["+        weight: 0"],
    ),
    "last real server removed": (
        lambda path: ops.remove_real_server("shop", "198.51.100.2", 80),
        ["-      - {address: 198.51.100.2, weight: 100}   # rack 2"],
    ),
    "first real server removed": (
        lambda path: ops.remove_real_server("shop", "198.51.100.1", 0),
        ["-      - {address: 198.51.100.1, weight: 100}   # rack 1"],
    ),
    "VIP in a block": (
        lambda path: ops.add_vip("shop", "203.0.113.4"),
        ["+      - 203.0.113.4"],
    ),
    "VIP of a new service": (
        lambda path: ops.add_vip("tools", "203.0.113.3", "docs", 8081),
        [
            *("+  - name: tools", "+    vips: [203.0.113.3]", "+    ports: [8081]", "+    quorum: 1"),
            *("+    real_servers:", "+      - address: 198.51.100.1", "+        weight: 3"),
            *("+      - address: 198.51.100.2", "+        port: 81"),
        ],
    ),
    "VIP of a new service, among block lists with remarks": (
        lambda path: ops.add_vip("store", "203.0.113.9", "shop"),
        [
            *("+  - name: store", "+    vips:", "+      - 203.0.113.9", "+    ports: [80]", "+    real_servers:"),
            "+      - {address: 198.51.100.1, weight: 100}",
            "+      - {address: 198.51.100.2, weight: 100}",
        ],
    ),
    "VIP in a flow": (
        lambda path: ops.add_vip("docs", "203.0.113.4"),
        ["-    vips: [203.0.113.3]", "+    vips: [203.0.113.3, 203.0.113.4]"],
    ),
    "VIP removed": (
        lambda path: ops.remove_vip("shop", "203.0.113.1"),
        ["-      - 203.0.113.1   # www"],
    ),
    "local address beyond the share": (
        lambda path: ops.add_local_address(path, "lvs-2", "192.168.100.77", ""),
        ["+    local_addresses:", "+      laddr_g1: [192.168.100.77]"],
    ),
    "local address of the share removed": (
        lambda path: ops.remove_local_address(path, "lvs-2", "192.168.100.7", "laddr_g1"),
        ["+    without: [192.168.100.7]"],
    ),
}


@pytest.mark.parametrize("case", EDITS, ids=str)
def test_an_edit_changes_its_lines_and_no_others(case: str, path: Path) -> None:
    operation, lines = EDITS[case]
    edit = ops.edit(path, operation(path))
    got = changed(edit)
    if case.startswith("real server among block"):
        assert got in (lines, [*lines, "+        port: 8080"])
    else:
        assert got == lines
    assert path.read_text(encoding="utf-8") == TEXT, "it is written when it is asked for"
    edit.write()
    assert path.read_text(encoding="utf-8") == edit.after
    assert [p.name for p in path.parent.iterdir()] == ["cluster.yaml"]


def test_what_stands_between_services_stays(path: Path) -> None:
    """The empty line and the comment after a list belong to what comes next."""
    edit = ops.edit(path, ops.add_real_server("shop", "198.51.100.3", 0, 100))
    assert (
        "# rack 2\n      - {address: 198.51.100.3, weight: 100}\n\n  # and what does not\n  - name: docs\n"
        in edit.after
    )
    edit = ops.edit(path, ops.remove_real_server("shop", "198.51.100.2", 0))
    assert "# rack 1\n\n  # and what does not\n  - name: docs\n" in edit.after
    edit = ops.edit(path, ops.add_real_server("docs", "198.51.100.3", 0, 7))
    assert edit.after.endswith("        port: 81\n      - address: 198.51.100.3\n        weight: 7\n\n# the end\n")


def test_what_stands_after_a_mapping_stays_there(path: Path) -> None:
    edit = ops.edit(path, ops.remove_local_address(path, "lvs-1", "192.168.100.3", ""))
    assert "    per_director: 5\n    without: [192.168.100.3]\n\ndirectors:\n" in edit.after
    edit = ops.edit(path, ops.add_local_address(path, "lvs-1", "192.168.100.77", ""))
    assert (
        "    downlink: eth1\n    local_addresses:\n      laddr_g1: [192.168.100.77]\n\n  # the second one\n"
        in edit.after
    )


def test_there_and_back_again(path: Path) -> None:
    """Each operation, then the one that undoes it: the file is as it was."""
    pairs: list[tuple[Operation, Operation]] = [
        (lambda p: ops.add_vip("shop", "203.0.113.9"), lambda p: ops.remove_vip("shop", "203.0.113.9")),
        (
            lambda p: ops.add_real_server("shop", "198.51.100.9", 0, 1),
            lambda p: ops.remove_real_server("shop", "198.51.100.9", 0),
        ),
        (
            lambda p: ops.add_real_server("docs", "198.51.100.9", 0, 1),
            lambda p: ops.remove_real_server("docs", "198.51.100.9", 0),
        ),
        (
            lambda p: ops.add_local_address(p, "lvs-1", "192.168.100.77", ""),
            lambda p: ops.remove_local_address(p, "lvs-1", "192.168.100.77", ""),
        ),
        (
            lambda p: ops.remove_local_address(p, "lvs-1", "192.168.100.3", ""),
            lambda p: ops.add_local_address(p, "lvs-1", "192.168.100.3", ""),
        ),
    ]
    for there, back in pairs:
        ops.edit(path, there(path)).write()
        assert path.read_text(encoding="utf-8") != TEXT
        ops.edit(path, back(path)).write()
        assert path.read_text(encoding="utf-8") == TEXT


def test_the_last_vip_takes_its_service_along(path: Path) -> None:
    edit = ops.edit(path, ops.remove_vip("docs", "203.0.113.3"))
    assert [each.name for each in edit.cluster.services] == ["shop"]
    assert edit.after.endswith("# the end\n")


def test_an_address_taken_out_is_not_given_to_another(path: Path) -> None:
    """It was lvs-2's: for lvs-1 it is an address beyond its share."""
    ops.edit(path, ops.remove_local_address(path, "lvs-2", "192.168.100.7", "")).write()
    edit = ops.edit(path, ops.add_local_address(path, "lvs-1", "192.168.100.7", ""))
    one, two = edit.cluster.directors
    assert [str(a) for a in one.local_addresses["laddr_g1"]][-1] == "192.168.100.7"
    assert "192.168.100.7" not in map(str, two.local_addresses["laddr_g1"])


@pytest.mark.parametrize("mapping, sequence, offset", [(2, 4, 2), (2, 2, 0), (4, 4, 2)])
def test_other_indentations_stay(mapping: int, sequence: int, offset: int, tmp_path: Path) -> None:
    import io

    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 4096
    yaml.preserve_quotes = True
    yaml.indent(mapping=mapping, sequence=sequence, offset=offset)
    out = io.StringIO()
    yaml.dump(yaml.load(TEXT), out)
    path = tmp_path / "cluster.yaml"
    path.write_text(out.getvalue(), encoding="utf-8")
    edit = ops.edit(path, ops.add_vip("docs", "203.0.113.4"))
    assert len(changed(edit)) == 2


def test_one_text_that_was_folded_leaves_the_rest(path: Path) -> None:
    """As PyYAML writes a long key; the lines behind it are found elsewhere then."""
    path.write_text(yaml.safe_dump(yaml.safe_load(TEXT), sort_keys=False), encoding="utf-8")
    lines = changed(ops.edit(path, ops.add_vip("shop", "203.0.113.4")))
    assert [line for line in lines if "ssh-ed25519" not in line] == ["-  example", "+  - 203.0.113.4"]


def test_line_ends_of_another_world_stay(path: Path) -> None:
    path.write_bytes(TEXT.replace("\n", "\r\n").encode())
    edit = ops.edit(path, ops.add_vip("docs", "203.0.113.4"))
    assert edit.after.count("\r\n") == edit.after.count("\n") == TEXT.count("\n")
    assert len(changed(edit)) == 2


REFUSED: dict[str, tuple[Operation, str, str]] = {
    "no such service": (
        lambda p: ops.add_vip("shoop", "203.0.113.4"),
        "there is no service 'shoop'",
        "choose among shop, docs; --like makes a new one",
    ),
    "new service that is there": (
        lambda p: ops.add_vip("docs", "203.0.113.4", "shop"),
        "there is a service 'docs'",
        "without --like it gets the VIP",
    ),
    "new service like none": (
        lambda p: ops.add_vip("tools", "203.0.113.4", "shoop"),
        "there is no service 'shoop'",
        "choose among shop, docs",
    ),
    "new service with a VIP and port that are taken": (
        lambda p: ops.add_vip("tools", "203.0.113.3", "docs"),
        "FILE would be wrong: 1 problem; it was not changed",
        "look at the lines above",
    ),
    "no address": (
        lambda p: ops.add_vip("shop", "203.0.113"),
        "'203.0.113' is no address",
        "type an IPv4 or IPv6 address without prefix length",
    ),
    "no such VIP": (
        lambda p: ops.remove_vip("shop", "203.0.113.9"),
        "shop has no VIP 203.0.113.9",
        "choose among 203.0.113.1, 203.0.113.2",
    ),
    "no such real server": (
        lambda p: ops.remove_real_server("docs", "198.51.100.2", 0),
        "docs has no real server 198.51.100.2 port 8080",
        "choose among 198.51.100.1 8080, 198.51.100.2 81",
    ),
    "no such director": (
        lambda p: ops.add_local_address(p, "lvs-9", "192.168.100.77", ""),
        "there is no director 'lvs-9'",
        "choose among lvs-1, lvs-2",
    ),
    "no such pool": (
        lambda p: ops.add_local_address(p, "lvs-1", "192.168.100.77", "g9"),
        "there is no pool 'g9'",
        "--pool, one of: laddr_g1",
    ),
    "another director's local address": (
        lambda p: ops.remove_local_address(p, "lvs-1", "192.168.100.7", ""),
        "lvs-1 has no local address 192.168.100.7 in laddr_g1",
        "choose among 192.168.100.1, 192.168.100.2, 192.168.100.3, 192.168.100.4, 192.168.100.5",
    ),
    "VIP outside the prefixes": (
        lambda p: ops.add_vip("shop", "198.51.100.9"),
        "FILE would be wrong: 1 problem; it was not changed",
        "look at the lines above",
    ),
    "local address that is the downlink's own": (
        lambda p: ops.add_local_address(p, "lvs-1", "192.168.100.201", ""),
        "FILE would be wrong: 1 problem; it was not changed",
        "look at the lines above",
    ),
    "real server that is there": (
        lambda p: ops.add_real_server("shop", "198.51.100.1", 80, 1),
        "FILE would be wrong: 1 problem; it was not changed",
        "look at the lines above",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused(case: str, path: Path) -> None:
    operation, message, hint = REFUSED[case]
    with pytest.raises(BuildError) as caught:
        ops.edit(path, operation(path))
    assert caught.value.message.replace(str(path), "FILE") == message
    assert caught.value.hint == hint
    assert path.read_text(encoding="utf-8") == TEXT


def test_a_file_that_is_wrong_already_is_not_edited(path: Path) -> None:
    path.write_text(TEXT.replace("quorum: 1", "quorum: 99"), encoding="utf-8")
    with pytest.raises(BuildError, match="1 problem"):
        ops.edit(path, ops.add_vip("shop", "203.0.113.4"))


def test_an_edit_of_somebody_else_is_not_lost(path: Path) -> None:
    edit = ops.edit(path, ops.add_vip("shop", "203.0.113.4"))
    path.write_text(TEXT + "# mine\n", encoding="utf-8")
    with pytest.raises(BuildError, match="was changed meanwhile"):
        edit.write()
    assert path.read_text(encoding="utf-8").endswith("# mine\n")


def test_a_link_to_the_file_stays_one(path: Path) -> None:
    link = path.with_name("link") / "cluster.yaml"
    link.parent.mkdir()
    link.symlink_to(path)
    ops.edit(link, ops.add_vip("shop", "203.0.113.4")).write()
    assert link.is_symlink() and "203.0.113.4" in path.read_text(encoding="utf-8")
    refused = pytest.raises(BuildError, match=f"another operation is at work in {path.parent}")
    with ops.alone(link), refused, ops.alone(path):
        raise AssertionError


SHARED: dict[str, tuple[list[tuple[str, str]], ops.Change]] = {
    "a list": (
        [
            ("    vips:\n      - 203.0.113.1", "    vips: &all\n      - 203.0.113.1"),
            ("vips: [203.0.113.3]", "vips: *all"),
        ],
        ops.remove_vip("shop", "203.0.113.1"),
    ),
    "a list of a mapping that is merged": (
        [("- name: shop", "- &shop\n    name: shop"), ("vips: [203.0.113.3]", "<<: *shop")],
        ops.add_vip("docs", "203.0.113.4"),
    ),
    "a mapping": (
        [
            ("- {address: 198.51.100.1,", "- &one {address: 198.51.100.1, port: 80,"),
            ("- address: 198.51.100.1\n        weight: 3", "- *one"),
        ],
        ops.drain_real_server("docs", "198.51.100.1", 80),
    ),
}


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_what_stands_elsewhere_too_is_not_edited(case: str, path: Path) -> None:
    """By an alias: a service that was not named would change."""
    replaced, operation = SHARED[case]
    text = TEXT
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BuildError, match=rf"^{path}:\d+: what stands here stands elsewhere too, by a YAML alias"):
        ops.edit(path, operation)
    # What is one service's own may change all the same.
    assert changed(ops.edit(path, ops.drain_real_server("docs", "198.51.100.2", 81))) == ["+        weight: 0"]


def test_one_operation_at_a_time(path: Path) -> None:
    with ops.alone(path), pytest.raises(BuildError, match="another operation is at work"), ops.alone(path):
        raise AssertionError
    with ops.alone(path):
        pass


def test_without_roll_out_the_file_is_changed_and_said(
    path: Path, capsys: pytest.CaptureFixture[str], events: Any
) -> None:
    where = checking.Where(Path("lab/ssh_config"))
    rollout.perform(path, ops.add_vip("docs", "203.0.113.4"), rollout.Options(where=where))
    assert "+    vips: [203.0.113.3, 203.0.113.4]" in capsys.readouterr().out
    assert "203.0.113.4" in path.read_text(encoding="utf-8")
    reach = f"--cluster {path} --ssh-config lab/ssh_config"
    assert f"{path} is changed, no host is: invoke plan {reach}, then invoke apply {reach}" in events.texts("note")


def test_a_dry_run_changes_nothing(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(settings.current, "dry_run", True)
    rollout.perform(path, ops.add_vip("docs", "203.0.113.4"), rollout.Options(apply=True))
    rollout.remove_real_server(path, "shop", "198.51.100.1", 0, rollout.Options(apply=True))
    assert "203.0.113.4" in capsys.readouterr().out
    assert path.read_text(encoding="utf-8") == TEXT


def test_removing_goes_by_draining(path: Path) -> None:
    """Without rolling out: weight 0 first; the same command again removes."""
    rollout.remove_real_server(path, "shop", "198.51.100.1", 0, rollout.Options())
    (first, _) = clusters.load(path).services[0].real_servers
    assert first.weight == 0
    rollout.remove_real_server(path, "shop", "198.51.100.1", 0, rollout.Options())
    assert [str(each.address) for each in clusters.load(path).services[0].real_servers] == ["198.51.100.2"]


LISTING = """\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn
TCP  203.0.113.1:80 rr
  -> 198.51.100.1:80              FullNat 100    7          1
  -> 198.51.100.2:80              FullNat 0      3          9
  -> 198.51.100.3:80              FullNat 0      0          2
UDP  203.0.113.1:80 rr
  -> 198.51.100.3:80              FullNat 0      0          1
TCP  203.0.113.2:80 rr
  -> 198.51.100.2:80              FullNat 0      2          0
TCP  203.0.113.3:8080 rr
  -> 198.51.100.2:80              FullNat 1      50         0
"""


# By the services, and one that another service has at the same port of the real server.
CONNECTIONS = """\
Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData LocalIP LPrt
TCP C0000201 0FA0 CB007101 0050 C6336403 0050 FIN_WAIT        119 - - C0A86403 0400
TCP C0000201 0FA1 CB007102 0050 C6336403 0050 CLOSE_WAIT       59 - - C0A86403 0401
TCP C0000201 0FA2 CB007101 0050 C6336403 0050 TIME_WAIT       119 - - C0A86403 0402
TCP C0000201 0FA3 CB007101 0050 C6336403 0051 FIN_WAIT        119 - - C0A86403 0403
TCP C0000201 0FA4 CB007103 1F90 C6336403 0050 FIN_WAIT        119 - - C0A86403 0404
UDP C0000201 0FA5 CB007101 0050 C6336403 0050 UDP             299 - - C0A86403 0405
TCP C0000200 0000 CB007101 0050 C6336403 0050 ASSURED          50
"""


@pytest.mark.runs("sh")
def test_connections_are_counted_over_the_services_vips(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ipvs, "CONNECTIONS", str(tmp_path / "ip_vs_conn"))
    (tmp_path / "ip_vs_conn").write_text(CONNECTIONS)
    asked = []

    class Director:
        def run(self, script: str, **_: Any) -> remote.Answer:
            asked.append(script)
            if script == "ipvsadm -Ln":
                return remote.Answer(0, LISTING, "")
            return remote.Answer(0, run.run(["sh", "-eu"], stdin=script).stdout, "")

    def counted(address: str, port: int) -> int | None:
        asked.clear()
        return ops.connections(cast(remote.Remote, Director()), shop, ip_address(address), port)

    shop = clusters.load(path).services[0]
    assert counted("198.51.100.2", 80) == 5
    assert counted("198.51.100.1", 80) == 7
    assert counted("198.51.100.1", 81) == 0
    assert asked == ["ipvsadm -Ln"]  # the other table is dear to read
    assert counted("198.51.100.3", 80) == 2
    shop = dataclasses.replace(shop, protocol="UDP")  # of which no one knows when it has ended
    assert counted("198.51.100.3", 80) == 0
    assert asked == ["ipvsadm -Ln"]


def test_a_director_that_cannot_count_holds_nobody_up(path: Path, monkeypatch: Any, events: Any) -> None:
    """It is asked once, and what was not looked for is said."""
    asked: list[Any] = []
    monkeypatch.setattr(ops, "connections", lambda *_: asked.append(_))
    ops.drained(clusters.load(path), "shop", "198.51.100.2", 80, lambda _: contextlib.nullcontext(), 30)  # type: ignore[arg-type,return-value]
    directors = ops.serving(clusters.load(path), "shop")
    assert len(asked) == len(directors)
    note = "too many connections to find those of 198.51.100.2 that are half closed"
    assert [text for text in events.texts("note") if note in text] == [f"{each.name}: {note}" for each in directors]
