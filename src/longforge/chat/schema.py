"""Values from text, typed by a tool's JSON schema.

Both families write arguments as text without quotes around strings, so `5` is a number or a string only by
the schema. A value that does not fit any type its schema allows stays the string it was: the tool says what
is wrong.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["MAX_NESTING", "Schema", "look_up", "too_deep"]

MAX_NESTING = 100
"""Levels of lists and objects that a call's arguments may have: what reads and writes them is recursive."""

_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_FAILED = object()


class Schema:
    """A JSON schema as far as typing needs it: type, enum, const, anyOf, oneOf, allOf, local $ref, items,
    properties.

    Anything that is not a schema counts as one that allows everything.
    """

    def __init__(self, schema: Any, root: Any = None) -> None:
        self._schema = schema
        self._root = schema if root is None else root

    @property
    def types(self) -> frozenset[str]:
        """The JSON types a value may have; empty means any."""
        return _types(self._schema, self._root, frozenset())

    def property(self, name: str) -> "Schema":
        """The schema of one property of an object."""
        for variant in _variants(self._schema, self._root, frozenset()):
            properties = variant.get("properties")
            if isinstance(properties, dict) and name in properties:
                return Schema(properties[name], self._root)
        return self._first("additionalProperties")

    def has_property(self, name: str) -> bool:
        """Whether an object of this schema is said to have a property `name`."""
        variants = _variants(self._schema, self._root, frozenset())
        return any(name in each for v in variants if isinstance(each := v.get("properties"), dict))

    def items(self) -> "Schema":
        """The schema of an array's items."""
        return self._first("items")

    def value(self, text: str, *, null_literal: bool = False) -> Any:
        """The value that `text` stands for.

        Integral numbers become int. With `null_literal` the word null is None whatever the schema says (M2's
        rule). Without a type, text that is JSON is taken as JSON.
        """
        types = self.types
        if text == "null" and (null_literal or "null" in types):
            return None
        if not types:
            value = _json(text)
            return text if value is _FAILED or isinstance(value, str) else value
        for name, read in _READERS.items():
            if name in types and (value := read(text.strip())) is not _FAILED:
                return value
        return text

    def _first(self, key: str) -> "Schema":
        variants = _variants(self._schema, self._root, frozenset())
        return Schema(next((v[key] for v in variants if isinstance(v.get(key), dict)), {}), self._root)


def too_deep(value: Any, levels: int = MAX_NESTING) -> bool:
    """Whether a JSON value has more than so many levels of lists and objects."""
    level = [value]
    for _ in range(levels):
        level = [inner for outer in level for inner in _members(outer)]
    return any(isinstance(inner, dict | list) for inner in level)


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _variants(schema: Any, root: Any, seen: frozenset[str]) -> Iterator[dict[str, Any]]:
    """The schema and all that it refers to or is made of. A circle of references ends where it closes."""
    if not isinstance(schema, dict):
        return
    yield schema
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        yield from _variants(look_up(root, reference), root, seen | {reference})
    for key in ("anyOf", "oneOf", "allOf"):
        for inner in _list(schema.get(key)):
            yield from _variants(inner, root, seen)


def _types(schema: Any, root: Any, seen: frozenset[str]) -> frozenset[str]:
    """Types that the schema itself names, else those of its parts."""
    if not isinstance(schema, dict):
        return frozenset()
    named = schema.get("type")
    if named:
        return frozenset({named}) if isinstance(named, str) else frozenset(map(str, _list(named)))
    values = [schema["const"]] if "const" in schema else _list(schema.get("enum"))
    if values:
        return frozenset(map(_type_name, values))
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        return _types(look_up(root, reference), root, seen | {reference})
    for key in ("anyOf", "oneOf"):
        found = [_types(inner, root, seen) for inner in _list(schema.get(key))]
        if found:
            return frozenset().union(*found) if all(found) else frozenset()
    parts = (_types(inner, root, seen) for inner in _list(schema.get("allOf")))
    fallback = frozenset({"object"}) if "properties" in schema else frozenset[str]()
    return next(filter(None, parts), fallback)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _type_name(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "string")


def look_up(root: Any, reference: str) -> Any:
    """The part of `root` that a reference like #/$defs/Point names, or None."""
    if not reference.startswith("#"):
        return None
    place = root
    for part in reference[1:].strip("/").split("/"):
        if part:
            place = place.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(place, dict) else None
    return place


def _integer(text: str) -> Any:
    # More digits than int() accepts by default (4300) is no number that a tool could mean.
    return int(text) if _INTEGER.fullmatch(text) and len(text) < 4000 else _FAILED


def _number(text: str) -> Any:
    if not _NUMBER.fullmatch(text):
        return _FAILED
    if (whole := _integer(text)) is not _FAILED:
        return whole
    value = float(text)
    if not math.isfinite(value):
        return _FAILED
    return int(value) if value.is_integer() else value


def _boolean(text: str) -> Any:
    return _BOOLEANS.get(text.lower(), _FAILED)


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _FAILED


def _object(text: str) -> Any:
    value = _json(text) if text else {}
    return value if isinstance(value, dict) else _FAILED


def _array(text: str) -> Any:
    value = _json(text) if text else []
    return value if isinstance(value, list) else _FAILED


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# In the order in which the types of a union are tried; a string is what remains.
_READERS = {"integer": _integer, "number": _number, "boolean": _boolean, "object": _object, "array": _array}
