"""JSON schemas narrowed to values whose JSON never spells out a tag that `parser.py` would act on."""

import json
import re
from collections.abc import Callable
from typing import Any

from longforge.chat.lark import text_without
from longforge.chat.schema_limits import check_limits
from longforge.errors import InputError

__all__ = ["Guard"]

_ALL_TYPES = ("null", "boolean", "number", "string", "array", "object")
_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "$comment", "strict"})
_ONE = ("additionalProperties", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_COMBINED = ("$ref", "anyOf", "oneOf", "allOf")
_FREE_LEVELS = 4
_BOUND = 10**15
# Patterns that surely match no `<`: whole names of listed characters.
_TAME = re.compile(r"\^(?:[A-Za-z0-9_\-+*?{},|$]|\\[dw]|\[[A-Za-z0-9_\-]+\])*\$")


class Guard:
    """Rewrites schemas so that in no string or name a `<` is followed by one of the words.

    bounded: numbers without bounds get some, so that none is too large for a float. Choices: an object that
    names properties has no others, one that names none has any; values of no schema are of few levels.
    Errors: InputError about `where`.
    """

    def __init__(self, words: tuple[str, ...], where: str, *, bounded: bool = False) -> None:
        self._words = words
        self._pattern = f"^{text_without(words)}$"
        self._where = where
        self._bounded = bounded
        self._shared: dict[str, Any] = {}

    def rewrite(self, schema: dict[str, Any]) -> dict[str, Any]:
        """What is left of `schema`.

        Errors: InputError if it is no schema, is too much work, or insists on a text that is ruled out.
        """
        check_limits(schema, self._where)
        self._shared = {}
        node = self._node(schema, False)
        if self._shared:
            own = node.get("$defs", {})
            taken = own.keys() & self._shared.keys()
            if taken:
                raise InputError(f"{self._where}: $defs: the name {taken.pop()!r} is reserved")
            node["$defs"] = {**own, **self._shared}
        return node

    def _node(self, schema: Any, part: bool) -> Any:
        """part: the schema is one side of an intersection, so it must not rule out what the other names."""
        if schema is False:
            return False
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise InputError(f"{self._where}: expected a JSON schema, got {type(schema).__name__}")
        node = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
        if not node:
            return self._any(_FREE_LEVELS)
        if node == {"type": "string"}:
            return self._share("guarded-text", lambda: {"type": "string", "pattern": self._pattern})
        self._check_texts([node.get(key) for key in ("enum", "const", "required")])
        combined = any(key in node for key in _COMBINED)
        open_ended = not combined and "enum" not in node and "const" not in node
        if open_ended:
            node = self._explicit(node, part)
        inside = part or (combined and len(node.keys() - {"$defs", "definitions"}) > 1)
        for key in _ONE:
            if key in node:
                node[key] = self._node(node[key], False)
        for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            if key in node:
                parts = self._expect(node, key, list)
                together = key == "allOf" and len(parts) > 1
                node[key] = [
                    self._node(inner, key != "prefixItems" and (inside or together)) for inner in parts
                ]
        for key in _NAMED:
            if key in node:
                named = self._expect(node, key, dict)
                node[key] = {name: self._node(inner, False) for name, inner in named.items()}
        if open_ended and "string" in _types(node):
            if "pattern" in node or "format" in node:
                node["allOf"] = [{"pattern": self._pattern}]
            else:
                node["pattern"] = self._pattern
        return node

    def _explicit(self, node: dict[str, Any], part: bool) -> dict[str, Any]:
        """What the schema leaves open, said; names and strings guarded."""
        if "type" not in node:
            object_like = "properties" in node or "patternProperties" in node
            kind = "object" if object_like else "array" if "items" in node else list(_ALL_TYPES)
            node = {"type": kind, **node}
        types = _types(node)
        if "array" in types and "prefixItems" not in node:
            node.setdefault("items", {})
        if "object" in types:
            self._names(node, part)
        if self._bounded and ("number" in types or "integer" in types):
            node |= {} if "exclusiveMinimum" in node else {"minimum": node.get("minimum", -_BOUND)}
            node |= {} if "exclusiveMaximum" in node else {"maximum": node.get("maximum", _BOUND)}
        return node

    def _names(self, node: dict[str, Any], part: bool) -> None:
        """Which names an object may have."""
        others = node.pop("additionalProperties", True)
        others = {} if others is True else others
        node["additionalProperties"] = False
        properties = dict(self._expect(node, "properties", dict)) if "properties" in node else {}
        self._check_texts(list(properties))
        patterns = self._expect(node, "patternProperties", dict) if "patternProperties" in node else {}
        wild = [pattern for pattern in patterns if not _TAME.fullmatch(pattern)]
        if wild:
            raise InputError(
                f"{self._where}: patternProperties {wild[0]!r}: only plain characters are supported"
            )
        if others is False:
            return
        if part or not (properties or patterns):
            node["patternProperties"] = {**patterns, self._pattern: others}
            return
        required = self._expect(node, "required", list) if "required" in node else []
        node["properties"] = {**properties, **{name: others for name in required if name not in properties}}

    def _any(self, levels: int) -> dict[str, Any]:
        """Any value with so many levels of lists and objects in it."""

        def make() -> dict[str, Any]:
            schema: dict[str, Any] = {
                "type": list(_ALL_TYPES if levels else _ALL_TYPES[:4]),
                "pattern": self._pattern,
            }
            if self._bounded:
                schema |= {"minimum": -_BOUND, "maximum": _BOUND}
            if levels:
                inner = self._any(levels - 1)
                names = {"patternProperties": {self._pattern: inner}, "additionalProperties": False}
                schema |= {"items": inner, **names}
            return schema

        return self._share(f"guarded-any-{levels}", make)

    def _share(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A reference to a definition, made if it is not there."""
        if name not in self._shared:
            self._shared[name] = make()
        return {"$ref": f"#/$defs/{name}"}

    def _expect(self, node: dict[str, Any], key: str, kind: type) -> Any:
        if not isinstance(node[key], kind):
            raise InputError(
                f"{self._where}: {key}: expected {'a list' if kind is list else 'an object'}, "
                f"got {type(node[key]).__name__}"
            )
        return node[key]

    def _check_texts(self, value: Any) -> None:
        text = json.dumps(value, ensure_ascii=False)
        for word in self._words:
            if f"<{word}" in text:
                raise InputError(
                    f"{self._where}: the text {'<' + word!r} cannot be in an answer of this form"
                )


def _types(node: dict[str, Any]) -> list[Any]:
    return node["type"] if isinstance(node["type"], list) else [node["type"]]
