"""Recipes: YAML read under a JSON Schema, refused whole when anything in it is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jsonschema
import yaml

from pipeline.errors import BuildError, Problems

# libyaml's where PyYAML was built with it: eight times as fast, which a large cluster file needs.
if TYPE_CHECKING:
    _Loader = yaml.SafeLoader
else:
    _Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


# By the draft 100.0 is an integer; to whoever reads the value then it is none.
_Validator = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)


class _UniqueKeys(_Loader):
    """PyYAML keeps the last of two equal keys silently; a recipe must not lose a line that way."""


_MERGE = "tag:yaml.org,2002:merge"  # `<<: *anchor`


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == _MERGE:
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key that is no plain text", key_node.start_mark)
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse(text: str, name: str) -> Any:
    """Read YAML.

    Args:
        text: the document.
        name: what to call it in errors, usually its path.

    Raises:
        BuildError: it is not YAML, or a key stands twice; with line and column.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeys)  # noqa: S506  a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise BuildError(f"{place}: {error.problem}", f"correct {name}") from None
    except yaml.YAMLError as error:
        raise BuildError(f"{name}: not YAML: {error}", f"correct {name}") from None
    except ValueError as error:  # what looks like a date or a number, and is none
        raise BuildError(f"{name}: {error}", f"correct {name}, or put the value in quotes") from None


def check(data: Any, schema: Mapping[str, Any], name: str) -> Problems:
    """Hold data against a JSON Schema and return everything that is wrong, with dotted paths."""
    problems = Problems()
    validator = _Validator(schema, format_checker=jsonschema.FormatChecker())
    for error in validator.iter_errors(data):
        problems.add(dotted(error.absolute_path) or name, _sentence(error))
    return problems


def load(path: Path, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Read a recipe.

    Raises:
        BuildError: missing, not YAML, or against its schema; all problems at once, with dotted paths.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BuildError(f"{path} does not exist", f"ls {path.parent}") from None
    except UnicodeDecodeError as error:
        raise BuildError(f"{path}: not UTF-8: byte {error.start}", f"iconv -t UTF-8 {path}") from None
    data = parse(text, str(path))
    check(data, schema, str(path)).raise_if_any(str(path), f"correct {path}")
    result: dict[str, Any] = data
    return result


def dotted(path: Any) -> str:
    """`['directors', 1, 'name']` as `directors[1].name`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def _sentence(error: jsonschema.ValidationError) -> str:
    schema = cast(Any, error.schema)
    wanted = cast(Any, error.validator_value)
    kind = str(error.validator)
    if kind == "additionalProperties":
        known, patterns = set(schema.get("properties", {})), list(schema.get("patternProperties", {}))
        keys = [str(key) for key in cast(Any, error.instance) if key not in known]
        unknown = sorted(key for key in keys if not any(re.search(pattern, key) for pattern in patterns))
        names = ", ".join(sorted(known)) or "none"
        like = f"; or a name like {', '.join(patterns)}" if patterns else ""
        return f"unknown key {', '.join(unknown)} (known: {names}{like})"
    if kind == "required":
        missing = [key for key in list(wanted) if key not in cast(Any, error.instance)]
        return f"missing key {', '.join(missing)}"
    return str(error.message)
