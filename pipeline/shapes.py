"""A quick yes: whether data is plainly of the shape that a JSON Schema describes.

jsonschema looks at a large file for as long as everything else takes together, and what it looks at is nearly always
right. Here a schema becomes functions that say yes, or nothing: whoever is not told yes asks jsonschema, whose words
those of an error are. A keyword that is not known here is never a yes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Judge = Callable[[Any], bool]

_TYPES: Mapping[str, type] = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
# Those that say nothing of the data, and those that `_object` and `_array` look at.
_SILENT = frozenset({"$schema", "$defs", "title", "description"})
_INNER = frozenset({"properties", "required", "additionalProperties", "items", "minItems", "minimum", "maximum"})


def judge(schema: Mapping[str, Any]) -> Judge:
    """A function that is true only of data in which jsonschema finds nothing wrong."""
    return _Compiler(schema).judge(schema)


def _no(_: Any) -> bool:
    return False


class _Compiler:
    """Turns the parts of one schema into functions, each part of `$defs` once."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root = root
        self.known: dict[str, Judge] = {}

    def judge(self, schema: Any) -> Judge:
        if not isinstance(schema, dict):
            return _no
        words = schema.keys() - _SILENT
        if words == {"$ref"}:
            return self.reference(schema["$ref"])
        if words == {"enum"} and all(isinstance(each, str) for each in schema["enum"]):
            allowed = frozenset(schema["enum"])
            return lambda data: type(data) is str and data in allowed
        names = schema.get("type")
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not set(names) <= _TYPES.keys() or words - _INNER - {"type", "enum"}:
            return _no
        kinds = {_TYPES[name]: self.inner(name, schema) for name in names}

        def judged(data: Any) -> bool:
            # By the exact type: True is an int for isinstance, and 1.0 an integer for jsonschema.
            inner = kinds.get(type(data), _no)
            return inner is None or inner(data)

        return judged

    def reference(self, name: str) -> Judge:
        if not name.startswith("#/$defs/"):
            return _no
        if name not in self.known:
            self.known[name] = lambda data: self.known[name](data)  # one that contains itself
            self.known[name] = self.judge(self.root["$defs"].get(name.removeprefix("#/$defs/")))
        return self.known[name]

    def inner(self, name: str, schema: Mapping[str, Any]) -> Judge | None:
        """What there is to say of data that has the type; None where that is all."""
        if "enum" in schema:
            if name != "string" or not all(isinstance(each, str) for each in schema["enum"]):
                return _no
            allowed = frozenset(schema["enum"])
            return lambda data: data in allowed
        if name == "object":
            return self.members(schema)
        if name == "array":
            return self.items(schema)
        if name == "integer" and schema.keys() & {"minimum", "maximum"}:
            low, high = schema.get("minimum", float("-inf")), schema.get("maximum", float("inf"))
            return lambda data: bool(low <= data <= high)
        return None

    def members(self, schema: Mapping[str, Any]) -> Judge:
        known = {key: self.judge(each) for key, each in schema.get("properties", {}).items()}
        required = frozenset(schema.get("required", ()))
        rest = schema.get("additionalProperties", True)
        other = None if rest is True else _no if rest is False else self.judge(rest)

        def judged(data: Any) -> bool:
            for key, value in data.items():
                look = known.get(key, other)
                if look is not None and not look(value):
                    return False
            return bool(required <= data.keys())

        return judged

    def items(self, schema: Mapping[str, Any]) -> Judge:
        least = schema.get("minItems", 0)
        each = self.judge(schema["items"]) if "items" in schema else None
        return lambda data: len(data) >= least and (each is None or all(map(each, data)))
