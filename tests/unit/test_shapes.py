"""A quick yes is never said of data that jsonschema finds something wrong with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import recipe, settings, shapes
from provision import bench
from provision.cluster import SCHEMA
from tests.unit.test_provision_cluster import BAD, OSPF, VRRP, Change

SLOW = jsonschema.Draft202012Validator(SCHEMA)
QUICK = shapes.judge(SCHEMA)
EXAMPLES = sorted((settings.TOP / "provision/examples").glob("*.yaml"))
# What a place may hold by mistake; True and 1.0 are what types are easily mistaken about.
STRANGE: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    1.0,
    0.5,
    70000,
    2**40,
    "",
    "x",
    "tcp",
    "TCP",
    "rr",
    [],
    [1],
    [""],
    {},
]
STRANGE += [{"x": 1}, {"file": "x"}, {"env": 1}, {"none": True}, {1: 2}]


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys."""
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else []
    return [(data, key) for key in keys] + [place for key in keys for place in places(data[key])]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_plainly_right(path: Path) -> None:
    assert QUICK(recipe.parse(path.read_text(encoding="utf-8"), path.name))


def test_a_large_fleet_is_plainly_right() -> None:
    assert QUICK(recipe.parse("\n".join(bench.fleet(4, 4, 8, 2)), "fleet"))


@pytest.mark.parametrize(("base", "change"), [(base, change) for base, change, _ in BAD.values()], ids=list(BAD))
def test_what_is_wrong_is_not_plainly_right(base: dict[str, Any], change: Change) -> None:
    data = copy.deepcopy(base)
    change(data)
    assert not QUICK(data) or SLOW.is_valid(data)


@given(st.sampled_from([OSPF, VRRP]), st.data())
def test_a_yes_is_jsonschemas(base: dict[str, Any], choice: st.DataObject) -> None:
    data = copy.deepcopy(base)
    for _ in range(choice.draw(st.integers(1, 3))):
        where, key = choice.draw(st.sampled_from(places(data)))
        match choice.draw(st.sampled_from(["replace", "drop", "add"])):
            case "replace":
                where[key] = copy.deepcopy(choice.draw(st.sampled_from(STRANGE)))
            case "drop":
                del where[key]
            case _ if isinstance(where, list):
                where.append(copy.deepcopy(choice.draw(st.sampled_from(STRANGE))))
            case _:
                where[choice.draw(st.sampled_from(["x", "port", "mtu", "check", "files"]))] = copy.deepcopy(
                    choice.draw(st.sampled_from(STRANGE))
                )
    assert not QUICK(data) or SLOW.is_valid(data)
    # Of what it knows it misses nothing but what jsonschema is more generous about: 1.0 for 1.
    assert QUICK(data) or not SLOW.is_valid(data) or "1.0" in repr(data)


# One schema for each thing that could be mistaken, with data that is wrong by it.
TRAPS: list[tuple[dict[str, Any], Any]] = [
    ({"type": "integer"}, True),
    ({"type": "boolean"}, 1),
    ({"type": "string", "pattern": "^a"}, "b"),
    ({"type": "array", "uniqueItems": True}, [1, 1]),
    ({"enum": [1]}, 2),
    ({"type": "integer", "enum": [1]}, 2),
    ({"type": "object", "patternProperties": {"^a": {"type": "string"}}}, {"a": 1}),
    ({"type": "object", "required": ["a"]}, {}),
    ({"type": ["string", "object"], "required": ["a"]}, {}),
    ({"type": "object", "additionalProperties": {"type": "string"}}, {"a": 1}),
    ({"anyOf": [{"type": "string"}]}, 1),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}}, 1),
    ({"$ref": "#/$defs/a", "required": ["b"], "$defs": {"a": {"type": "object"}}}, {}),
    ({"$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"}, {"a": 1}),
    ({"type": "array", "items": {"type": "string"}, "minItems": 2}, ["a"]),
]


@pytest.mark.parametrize(("schema", "data"), TRAPS)
def test_traps(schema: dict[str, Any], data: Any) -> None:
    assert not jsonschema.Draft202012Validator(schema).is_valid(data), "no trap"
    assert not shapes.judge(schema)(data)
