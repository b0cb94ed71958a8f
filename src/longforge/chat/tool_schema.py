"""A tool's JSON schema made simple enough to write a grammar from: references resolved, nothing ignored."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from longforge.chat.schema import look_up
from longforge.errors import InputError

__all__ = ["Budget", "Forms", "forms_of", "inlined"]

MAX_PARTS = 5000
"""Schemas within the schemas of all tools, each reference counted as what it stands for."""
MAX_LEVELS = 40

_TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")
_NARROWING = {
    "string": ("pattern", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
_NARROWING["integer"] = _NARROWING["number"]
_KEPT = frozenset({"type", "enum", "const", *sum(_NARROWING.values(), ())})
_REFUSED = frozenset(
    {
        *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies"),
        *("patternProperties", "propertyNames", "minProperties", "maxProperties", "unevaluatedProperties"),
        *("unevaluatedItems", "prefixItems", "additionalItems", "contains", "minContains", "maxContains"),
        *("uniqueItems", "$dynamicRef", "$recursiveRef"),
    }
)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")


@dataclass
class Budget:
    """How many schemas may still be looked at: the work of writing a grammar is in proportion."""

    left: int = MAX_PARTS


@dataclass
class Forms:
    """What a value may be. `anything` stands for all other fields."""

    anything: bool = False
    literals: list[Any] = field(default_factory=list)
    scalars: set[str] = field(default_factory=set)
    """integer, number, boolean, null, without bounds."""
    strings: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[dict[str, Any]] = field(default_factory=list)
    """Schemas of integers and numbers that have bounds."""
    objects: list[dict[str, Any]] = field(default_factory=list)
    arrays: list[dict[str, Any]] = field(default_factory=list)


def inlined(schema: Any, where: str, budget: Budget) -> dict[str, Any]:
    """The schema without references and annotations.

    Its only keywords are `anyOf`, alone, or type, enum, const and what narrows a type. `format` and keywords
    that JSON Schema does not know are annotations. Errors: InputError naming `where` and the keyword that
    cannot be served, or saying that the schema refers to itself or is too large.
    """
    return _Inliner(schema, where, budget).node(schema, frozenset(), 0)


class _Inliner:
    def __init__(self, root: Any, where: str, budget: Budget) -> None:
        self._root = root
        self._where = where
        self._budget = budget

    def node(self, schema: Any, seen: frozenset[str], level: int) -> dict[str, Any]:
        self._budget.left -= 1
        if self._budget.left < 0 or level > MAX_LEVELS:
            raise self._error(f"too large; at most {MAX_PARTS} parts in all tools and {MAX_LEVELS} levels")
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise self._error(f"expected a JSON schema, got {schema!r:.40}")
        for key in schema:
            if key in _REFUSED and schema[key] not in (False, None, [], {}):
                raise self._error(f"{key} is not supported where calls are constrained")
        kept = {key: value for key, value in schema.items() if key in _KEPT}
        for key in ("$ref", "allOf", "anyOf", "oneOf"):
            if key in schema:
                others = [
                    other for other in ("$ref", "allOf", "anyOf", "oneOf") if other in schema and other != key
                ]
                beside = [other for other in (*others, *kept) if other != "type"]
                if beside:
                    raise self._error(
                        f"{key} beside {beside[0]} is not supported where calls are constrained"
                    )
                return self._combined(key, schema[key], seen, level)
        return self._plain(kept, seen, level)

    def _combined(self, key: str, value: Any, seen: frozenset[str], level: int) -> dict[str, Any]:
        if key == "$ref":
            target = look_up(self._root, value) if isinstance(value, str) else None
            if target is None:
                raise self._error(f"$ref {value!r:.60}: no such part of the schema")
            if value in seen:
                raise self._error(f"$ref {value!r:.60} refers to itself, which is not supported")
            return self.node(target, seen | {value}, level + 1)
        if not isinstance(value, list) or not value:
            raise self._error(f"{key}: expected a list of schemas, got {value!r:.40}")
        parts = [self.node(part, seen, level + 1) for part in value]
        if key == "allOf":
            if len(parts) > 1:
                raise self._error("allOf of several schemas is not supported where calls are constrained")
            return parts[0]
        variants = [variant for part in parts for variant in part.get("anyOf", [part])]
        if key == "oneOf" and _overlap(variants):
            raise self._error(
                "oneOf of schemas that share a type is not supported where calls are constrained"
            )
        return {"anyOf": variants}

    def _plain(self, node: dict[str, Any], seen: frozenset[str], level: int) -> dict[str, Any]:
        types = node.get("type", [])
        for name in types if isinstance(types, list) else [types]:
            if name not in _TYPES:
                raise self._error(f"type: expected one of {', '.join(_TYPES)}, got {name!r:.40}")
        for key in _COUNTS:
            if key in node and not (isinstance(node[key], int) and 0 <= node[key] < 100_000):
                raise self._error(f"{key}: expected a count below 100000, got {node[key]!r:.40}")
        for key, kind in (("enum", list), ("properties", dict), ("required", list), ("pattern", str)):
            if key in node and not isinstance(node[key], kind):
                raise self._error(f"{key}: expected {kind.__name__}, got {node[key]!r:.40}")
        for key in ("items", "additionalProperties"):
            if isinstance(node.get(key), dict):
                node[key] = self.node(node[key], seen, level + 1)
        if "properties" in node:
            properties = {name: self.node(part, seen, level + 1) for name, part in node["properties"].items()}
            node["properties"] = properties
            for name in node.get("required", []):
                properties.setdefault(name, {})
        return node

    def _error(self, problem: str) -> InputError:
        return InputError(f"{self._where}: {problem}")


def _overlap(variants: Sequence[dict[str, Any]]) -> bool:
    """Whether a value could be of two of the variants."""
    seen: set[str] = set()
    for variant in variants:
        values = [variant["const"]] if "const" in variant else variant.get("enum")
        types = variant.get("type", list(_TYPES))
        if values is not None:
            kinds = {f"={value!r}" for value in values}
            types = []
        else:
            kinds = {
                "number" if name == "integer" else name
                for name in ([types] if isinstance(types, str) else types)
            }
        literals = any(name.startswith("=") for name in seen)
        if (
            kinds & seen
            or (values is None and literals)
            or (values is not None and len(seen) and not literals)
        ):
            return True
        seen |= kinds
    return False


def forms_of(schema: dict[str, Any], where: str) -> Forms:
    """The forms of an inlined schema. Errors: InputError for a keyword without the type that it narrows."""
    forms = Forms()
    for variant in schema.get("anyOf", [schema]):
        _add(forms, variant, where)
    return Forms(anything=True) if forms.anything else forms


def _add(forms: Forms, variant: dict[str, Any], where: str) -> None:
    types = variant.get("type")
    if "enum" in variant or "const" in variant:
        beside = [key for key in variant if key not in ("enum", "const", "type")]
        if beside or ("enum" in variant and "const" in variant):
            raise InputError(
                f"{where}: enum or const beside {beside[0] if beside else 'each other'} is not supported"
            )
        forms.literals += [variant["const"]] if "const" in variant else variant["enum"]
        return
    if types is None:
        types = [kind for kind in ("object", "array") if any(key in variant for key in _NARROWING[kind])]
        if not types and variant:
            raise InputError(f"{where}: {next(iter(variant))} without a type is not supported")
        forms.anything = forms.anything or not types
    for kind in [types] if isinstance(types, str) else types:
        narrow = {key: variant[key] for key in _NARROWING.get(kind, ()) if key in variant}
        if kind == "string":
            forms.strings.append(narrow)
        elif kind == "object":
            forms.objects.append({"type": kind, **narrow})
        elif kind == "array":
            forms.arrays.append({"type": kind, **narrow})
        elif narrow:
            forms.numbers.append({"type": kind, **narrow})
        else:
            forms.scalars.add(kind)
