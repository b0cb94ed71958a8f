"""JSON schemas narrowed to values whose JSON never spells out a tag that `parser.py` would act on."""

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from longforge.chat.lark import text_without
from longforge.chat.schema import MAX_NESTING, too_deep
from longforge.errors import InputError

__all__ = ["Guard", "any_json"]

_ALL_TYPES = ("null", "boolean", "number", "string", "array", "object")
_ONE = ("additionalProperties", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_COMBINED = ("$ref", "anyOf", "oneOf", "allOf")
_FREE_LEVELS = 4
_BOUND = 10**15
# Patterns that surely match no `<`: whole names of listed characters.
_TAME = re.compile(r"\^(?:[A-Za-z0-9_\-+*?{},|$]|\\[dw]|\[[A-Za-z0-9_\-]+\])*\$")


def any_json(types: Collection[str] = _ALL_TYPES, levels: int = _FREE_LEVELS) -> dict[str, Any]:
    """A schema of any value of those types, with so many levels of lists and objects in it."""
    schema: dict[str, Any] = {"type": list(types)}
    inner = any_json(_ALL_TYPES if levels > 1 else _ALL_TYPES[:4], levels - 1) if levels else False
    if "array" in types:
        schema["items"] = inner
    if "object" in types:
        schema["additionalProperties"] = inner
    return schema


class Guard:
    """Rewrites schemas so that in no string or name a `<` is followed by one of the words.

    bounded: numbers without bounds get some, so that none is too large for a float. Choices: an object that
    names properties has no others, one that names none has any; values of no schema are of few levels.
    Errors: InputError about `where`.
    """

    def __init__(self, words: Sequence[str], where: str, *, bounded: bool = False) -> None:
        self._words = words
        self._pattern = f"^{text_without(words)}$"
        self._where = where
        self._bounded = bounded

    def rewrite(self, schema: dict[str, Any]) -> dict[str, Any]:
        """What is left of `schema`.

        Errors: InputError if it is no schema, is nested too deeply, or insists on a text that is ruled out.
        """
        if too_deep(schema):
            raise InputError(f"{self._where}: nested deeper than {MAX_NESTING} levels")
        return self._node(schema, False)

    def _node(self, schema: Any, part: bool) -> Any:
        """part: the schema is one side of an intersection, so it must not rule out what the other names."""
        if schema is False:
            return False
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise InputError(f"{self._where}: expected a JSON schema, got {type(schema).__name__}")
        node = dict(schema)
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
            kinds = ("object",) if object_like else ("array",) if "items" in node else _ALL_TYPES
            node = {**any_json(kinds), **node} if len(kinds) > 1 else {"type": kinds[0], **node}
        types = _types(node)
        if "array" in types and "prefixItems" not in node:
            node.setdefault("items", any_json())
        if "object" in types:
            self._names(node, part)
        if self._bounded and ("number" in types or "integer" in types):
            node |= {} if "exclusiveMinimum" in node else {"minimum": node.get("minimum", -_BOUND)}
            node |= {} if "exclusiveMaximum" in node else {"maximum": node.get("maximum", _BOUND)}
        return node

    def _names(self, node: dict[str, Any], part: bool) -> None:
        """Which names an object may have."""
        others = node.pop("additionalProperties", True)
        others = any_json() if others is True else others
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
