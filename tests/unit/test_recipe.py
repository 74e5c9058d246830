"""Recipes are refused whole, with everything that is wrong, at its dotted path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import recipe
from pipeline.errors import BuildError

SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "version"],
    "properties": {
        "name": {"type": "string"},
        "version": {"type": "string", "pattern": r"^\d+\.\d+$"},
        "jobs": {"type": "integer"},
        "sources": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["sha256"],
                "properties": {"sha256": {"type": "string", "minLength": 64}},
            },
        },
        "notes": {
            "type": "object",
            "additionalProperties": False,
            "properties": {},
            "patternProperties": {"^x-": {"type": "string"}},
        },
    },
}


def load(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return recipe.load(path, SCHEMA)


def refusal(tmp_path: Path, text: str) -> BuildError:
    with pytest.raises(BuildError) as caught:
        load(tmp_path, text)
    assert "recipe.yaml" in caught.value.hint
    return caught.value


def test_a_good_recipe_is_what_it_says(tmp_path: Path) -> None:
    assert load(tmp_path, 'name: x\nversion: "1.31"\n') == {"name": "x", "version": "1.31"}


def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    error = refusal(
        tmp_path,
        "name: 3\njobs: two\ncolour: red\nsize: big\n"
        "sources:\n  - sha256: short\n  - sha265: typo\nnotes: {y: 1, x-a: ok}\n",
    )
    assert error.message.endswith("recipe.yaml: 8 problems")
    assert [line.removeprefix(str(tmp_path) + "/") for line in error.details] == sorted(
        [
            "jobs: 'two' is not of type 'integer'",
            "name: 3 is not of type 'string'",
            "notes: unknown key y (known: none; or a name like ^x-)",
            "recipe.yaml: missing key version",
            "recipe.yaml: unknown key colour, size (known: jobs, name, notes, sources, version)",
            "sources[0].sha256: 'short' is too short",
            "sources[1]: missing key sha256",
            "sources[1]: unknown key sha265 (known: sha256)",
        ],
        key=lambda line: line if "recipe.yaml" not in line else "/" + line,
    )


def test_a_version_must_be_text(tmp_path: Path) -> None:
    """YAML reads 1.10 as the number 1.1."""
    error = refusal(tmp_path, "name: x\nversion: 1.10\n")
    assert error.details == ("version: 1.1 is not of type 'string'",)


@pytest.mark.parametrize("number", ["100.0", "true"])
def test_an_integer_is_one_to_whoever_reads_it(tmp_path: Path, number: str) -> None:
    """By JSON Schema 100.0 is an integer; isinstance says that it is none, and a default would be taken."""
    (line,) = refusal(tmp_path, f"name: x\nversion: '1.1'\njobs: {number}\n").details
    assert line.startswith("jobs: ") and line.endswith(" is not of type 'integer'")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("name: a\nversion: '1.1'\nname: b\n", ":3:1: duplicate key 'name'"),
        ("name: a\nsources:\n  - sha256: a\n    sha256: b\n", ":4:5: duplicate key 'sha256'"),
        ("name: [a\n", ":2:1: "),
        ("name: a\n\tversion: b\n", ":2:1: "),
        ("? [a, b]\n: c\n", ":1:3: "),
        ("name: !!python/object:os.system {}\n", ":1:7: "),
        ("name: \x00\n", ": not YAML: "),
        ("name: 2024-02-30\n", ": day is out of range for month"),
    ],
)
def test_what_is_no_yaml_or_loses_a_line_has_a_place(tmp_path: Path, text: str, place: str) -> None:
    error = refusal(tmp_path, text)
    assert error.message.startswith(f"{tmp_path}/recipe.yaml{place}")


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(BuildError, match=r"recipe\.yaml: not UTF-8"):
        recipe.load(path, SCHEMA)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- a\n", "text\n"])
def test_an_empty_or_misshapen_recipe(tmp_path: Path, text: str) -> None:
    error = refusal(tmp_path, text)
    assert len(error.details) == 1
    assert "is not of type 'object'" in error.details[0]


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"gone\.yaml does not exist") as caught:
        recipe.load(tmp_path / "gone.yaml", SCHEMA)
    assert caught.value.hint == f"ls {tmp_path}"


def test_merge_keys_are_no_duplicates(tmp_path: Path) -> None:
    parsed = recipe.parse("base: &b {a: 1, c: 3}\nmine: {<<: *b, a: 2}\n", "x.yaml")
    assert parsed["mine"] == {"a": 2, "c": 3}


@given(st.lists(st.integers(min_value=0, max_value=99) | st.from_regex(r"[a-z_]+", fullmatch=True), max_size=5))
def test_dotted_paths_can_be_taken_apart_again(path: list[int | str]) -> None:
    text = recipe.dotted(path)
    parts: list[int | str] = []
    for piece in text.replace("[", ".[").split("."):
        if piece.startswith("["):
            parts.append(int(piece[1:-1]))
        elif piece:
            parts.append(piece)
    assert parts == path


def test_dotted() -> None:
    assert recipe.dotted(["directors", 1, "local_addresses", 0]) == "directors[1].local_addresses[0]"
    assert recipe.dotted([]) == ""
