"""One tool call read tag by tag: the inverse of `format.py`."""

import re
from dataclasses import dataclass, field
from typing import Any

from longforge.chat.schema import MAX_NESTING, Schema, too_deep
from longforge.chat.tokens import Family
from longforge.protocol import ToolCall

__all__ = ["INVOKE", "CallReader", "Malformed"]

INVOKE = re.compile(r'invoke\s+name="([^"]*)"\s*')
_PARAMETER = re.compile(r'parameter\s+name="([^"]+)"\s*')


class Malformed(Exception):
    """The text cannot be a tool call. Caught by the parser, which gives the text back as content."""


@dataclass
class _Node:
    """One argument, or a part of one: its text, or the tags inside it."""

    name: str
    parts: list[str] = field(default_factory=list)
    children: "list[_Node]" = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


class CallReader:
    """Takes the tags and texts between `<invoke name="...">` and its end."""

    def __init__(self, family: Family, name: str, schema: Any) -> None:
        if not name:
            raise Malformed
        self._family = family
        self._name = name
        self._schema = Schema(schema)
        self._root = _Node(name)
        self._path = [self._root]

    @property
    def in_value(self) -> bool:
        """Whether an argument is open, so that text is its value."""
        return len(self._path) > 1

    def text(self, text: str) -> None:
        """Text inside an argument."""
        node = self._path[-1]
        node.parts.append(text)
        if node.children and not text.isspace():
            raise Malformed

    def open(self, body: str) -> None:
        """An opening tag, given without its brackets."""
        name = body
        if INVOKE.fullmatch(body):
            raise Malformed
        if self._family == "m2":
            match = _PARAMETER.fullmatch(body)
            if match is None:
                raise Malformed
            name = match[1]
        parent = self._path[-1]
        if len(self._path) > MAX_NESTING:
            raise Malformed
        if parent.text.strip() or (name != "item" and any(child.name == name for child in parent.children)):
            raise Malformed
        node = _Node(name)
        parent.children.append(node)
        self._path.append(node)

    def close(self, name: str) -> None:
        """A closing tag inside an argument. A tag that closes what is not open inside is malformed."""
        if name != ("parameter" if self._family == "m2" else self._path[-1].name):
            raise Malformed
        self._path.pop()

    def call(self) -> ToolCall:
        """The finished call."""
        if self.in_value:
            raise Malformed
        read = _m2_value if self._family == "m2" else _m3_value
        arguments = {node.name: read(node, self._schema.property(node.name)) for node in self._root.children}
        if too_deep(arguments):
            raise Malformed
        return ToolCall(self._name, arguments)


def _m2_value(node: _Node, schema: Schema) -> Any:
    text = node.text
    return schema.value(text.removeprefix("\n").removesuffix("\n"), null_literal=True)


def _m3_value(node: _Node, schema: Schema) -> Any:
    if not node.children:
        return schema.value(node.text)
    only_items = all(child.name == "item" for child in node.children)
    if only_items and ("array" in schema.types or "object" not in schema.types):
        return [_m3_value(child, schema.items()) for child in node.children]
    return {child.name: _m3_value(child, schema.property(child.name)) for child in node.children}
