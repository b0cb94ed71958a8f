"""Tool calls as rules of a grammar: whatever the rules allow, `parser.py` reads as calls of the schemas."""

import re
from collections.abc import Sequence
from typing import Any

from longforge.chat.format import value_text
from longforge.chat.guarded_schema import Guard
from longforge.chat.lark import (
    Rules,
    embedded_json,
    escape,
    literal,
    markup,
    one_of,
    regex,
    split_text,
    symbols,
    text_without,
)
from longforge.chat.patterns import whole_text_pattern
from longforge.chat.schema import Schema
from longforge.chat.tokenizer import Tokenizer
from longforge.chat.tokens import CALL_PREFIX, Family
from longforge.chat.tool_schema import Budget, Forms, forms_of, inlined
from longforge.errors import InputError
from longforge.protocol import ToolSpec

__all__ = ["CallGrammar"]

_NAME = re.compile(r'[^<>"\n\r/][^<>"\n\r]{0,150}')
# What a value must not spell after a `<`, lest it be read as a tag. Beginnings of tags rule out a little more
# than the tags themselves, and make smaller grammars.
_VALUE_WORDS: dict[Family, tuple[str, ...]] = {
    "m2": ("/parameter", "/invoke", "/minimax"),
    "m3": ("]minimax",),
}
_INTEGER = r"-?(?:0|[1-9][0-9]{0,14})"
_SCALARS = {
    "integer": _INTEGER,
    "number": _INTEGER + r"(?:\.[0-9]{1,17})?(?:[eE][+\-]?[0-9]{1,2})?",
    "boolean": "true|false",
    "null": "null",
}
_BLANK = r"[\s\x1c-\x1f]*"
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ESCAPES = {"json_allowed_escapes": 'nrbtf\\"'}
# Texts that read as a number too large for a float.
_HUGE = r"[ \t\n\r]*-?(?:[0-9]{200,}(?s:.*)|[0-9]+(?:\.[0-9]+)?[eE]\+?[0-9]{3,}[ \t\n\r]*)"


class CallGrammar:
    """Writes blocks of calls into `rules`."""

    def __init__(self, rules: Rules, family: Family, tokenizer: Tokenizer) -> None:
        self._rules = rules
        self._family: Family = family
        self._tokenizer = tokenizer
        self._prefix = CALL_PREFIX if family == "m3" else ""
        self._budget = Budget()
        self._markups: dict[str, list[str | int]] = {}
        self._words = _VALUE_WORDS[family]

    def block(self, tools: Sequence[ToolSpec], parallel: bool) -> tuple[str, str]:
        """A block of at least one call: the text it begins with, if it is text, and a rule for the rest.

        Errors: InputError naming a tool and what its schema asks that cannot be served.
        """
        name = "tool_call" if self._family == "m3" else "minimax:tool_call"
        head, opening = split_text(self._markup(f"{self._prefix}<{name}>\n"))
        call = one_of(self._call(tool) for tool in tools)
        closing = self._symbols(f"{self._prefix}</{name}>")
        return head, self._rules.rule(f"{opening} {call}{'+' if parallel else ''} {closing}")

    def _markup(self, text: str) -> list[str | int]:
        if text not in self._markups:
            self._markups[text] = markup(text, self._tokenizer)
        return self._markups[text]

    def _symbols(self, text: str) -> str:
        return symbols(self._markup(text))

    def _call(self, tool: ToolSpec) -> str:
        where = f"tools: {tool.name}"
        if not _NAME.fullmatch(tool.name):
            raise InputError(f"{where}: such a name cannot be written in a call")
        schema = inlined(tool.parameters, where, self._budget)
        objects = forms_of(schema, where).objects or [{"type": "object"}]
        if "anyOf" in schema or schema.get("type", "object") != "object":
            raise InputError(f"{where}: parameters: expected a schema of type object")
        arguments = self._properties(objects[0], Schema(tool.parameters), where)
        opening = self._symbols(f'{self._prefix}<invoke name="')
        after_name = literal('">\n' if self._family == "m2" else '">')
        closing = self._symbols(f"{self._prefix}</invoke>\n")
        return self._rules.rule(f"{opening} {literal(tool.name)} {after_name} {arguments} {closing}")

    def _properties(self, node: dict[str, Any], reader: Schema, where: str) -> str:
        required = node.get("required", [])
        parts = []
        for name, schema in node.get("properties", {}).items():
            if not _NAME.fullmatch(name) or (self._family == "m3" and name == "tool_call"):
                raise InputError(f"{where}: property {name!r:.80}: such a name cannot be written in a call")
            argument = self._argument(name, schema, reader.property(name), f"{where}: {name}")
            parts.append(argument if name in required else f"{argument}?")
        return " ".join(parts)

    def _argument(self, name: str, schema: dict[str, Any], reader: Schema, where: str) -> str:
        """A rule of one argument with its tags."""
        if self._family == "m2":
            opening = (
                f"{self._symbols('<parameter name=' + chr(34))} {literal(name)} {literal(chr(34) + '>')}"
            )
            end: list[str | int] = self._markup("</parameter>\n")
        else:
            opening = f"{self._symbols(f'{CALL_PREFIX}<')} {literal(f'{name}>')}"
            end = [*self._markup(f"{CALL_PREFIX}</"), f"{name}>"]
        return self._rules.rule(f"{opening} {self._value(schema, reader, end, where)}")

    def _value(self, schema: dict[str, Any], reader: Schema, end: list[str | int], where: str) -> str:
        head, tail = split_text(end)
        forms = forms_of(schema, where)
        nested = self._nested(forms, reader, where)
        alternatives = [f"{body} {literal(head)} {tail}" for body in nested]
        texts = self._texts(forms, reader, where)
        if texts:
            text = self._rules.terminal(f"{one_of(texts)} {literal(head)}")
            alternatives.append(f"{text} {tail}")
        return self._rules.rule(one_of(alternatives))

    def _nested(self, forms: Forms, reader: Schema, where: str) -> list[str]:
        """What is more than one stretch of text: lists, objects, and numbers with bounds."""
        if forms.anything:
            return [self._json({"type": ["array", "object"]}, where)]
        if self._family == "m2":
            return [self._json(part, where) for part in (*forms.numbers, *forms.objects, *forms.arrays)]
        for kind, several in (("object", forms.objects), ("array", forms.arrays)):
            if len(several) > 1:
                raise InputError(f"{where}: anyOf of several {kind} schemas is not supported")
        if forms.objects and forms.arrays:
            raise InputError(f"{where}: a value that may be a list or an object is not supported")
        bodies = [self._json(part, where) for part in forms.numbers]
        bodies += [self._tagged_object(part, reader, where) for part in forms.objects]
        return bodies + [self._tagged_array(part, reader, where) for part in forms.arrays]

    def _tagged_object(self, node: dict[str, Any], reader: Schema, where: str) -> str:
        if not node.get("properties") and node.get("additionalProperties") is not False:
            return self._json(node, where)  # names that are not known cannot be closed by a grammar's tags
        return f"({self._properties(node, reader, where)})" if node.get("properties") else ""

    def _tagged_array(self, node: dict[str, Any], reader: Schema, where: str) -> str:
        low, high = node.get("minItems", 0), node.get("maxItems")
        if high is not None and high < low:
            raise InputError(f"{where}: maxItems {high} is less than minItems {low}")
        items = node.get("items", {})
        if not isinstance(items, dict) or high == 0:
            return ""
        item = self._argument("item", items, reader.items(), f"{where}: items")
        return f"{item}{{{low},{'' if high is None else high}}}"

    def _json(self, schema: dict[str, Any], where: str) -> str:
        guarded = Guard(self._words, where, bounded=True).rewrite(schema)
        return self._rules.rule(embedded_json({**guarded, "x-guidance": {**_COMPACT, **_ESCAPES}}))

    def _texts(self, forms: Forms, reader: Schema, where: str) -> list[str]:
        """Values of one stretch of text, as terminals' alternatives."""
        free = regex(text_without(self._words))
        if forms.anything:
            return [rf"{free} & ~/{_BLANK}[\[{{](?s:.*)/ & ~/{_HUGE}/"]
        texts = [self._string(spec, forms, where) for spec in forms.strings]
        texts += [regex(_SCALARS[name]) for name in sorted(forms.scalars)]
        literals = [text for value in forms.literals if (text := self._literal(value, reader)) is not None]
        if forms.literals and not literals:
            raise InputError(f"{where}: none of the values of enum or const can be written in a call")
        return texts + [regex(escape(text)) for text in literals]

    def _string(self, spec: dict[str, Any], forms: Forms, where: str) -> str:
        """A string as it is, but none that would be read as something else that is not allowed."""
        others = [value for value in forms.literals if not isinstance(value, str | None)]
        if forms.numbers or others:
            raise InputError(f"{where}: a string or else certain numbers or constants is not supported")
        parts = [regex(text_without(self._words))]
        if "pattern" in spec:
            parts.append(regex(whole_text_pattern(spec["pattern"], where)))
        if "minLength" in spec or "maxLength" in spec:
            parts.append(regex(f"(?s:.){{{spec.get('minLength', 0)},{spec.get('maxLength', '')}}}"))
        if self._family == "m2":
            if len(parts) > 1:
                parts += [r"~/\n(?s:.*)/", r"~/(?s:.*)\n/"]  # readers take them off
            if "null" not in forms.scalars and None not in forms.literals:
                parts.append(r"~/\n?null\n?/")
        if forms.objects or forms.arrays:
            parts.append(rf"~/{_BLANK}([\[{{](?s:.*))?/")
        return " & ".join(parts)

    def _literal(self, value: Any, reader: Schema) -> str | None:
        """The text of a constant; None if readers would not find the same value in it."""
        text = value_text(value, self._family)
        plain = text.removeprefix("\n").removesuffix("\n") if self._family == "m2" else text
        back = reader.value(plain, null_literal=self._family == "m2")
        same = type(back) is type(value) and back == value
        return text if same and not any(f"<{word}" in text for word in self._words) else None
