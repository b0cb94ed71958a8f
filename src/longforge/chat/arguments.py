"""The arguments of one call as JSON, written while they are read.

A value is written as soon as its form is certain:

- a string typed "string" (or "string" or null) as it comes;
- any other text as a string from the first character that starts no number, literal, list or object; until
  then, and if there is none, when its tag closes, typed by the schema;
- a nested object or list on the first tag inside it; where neither the schema nor that tag tells a list
  from an object, when its tag closes.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from longforge.chat.schema import MAX_NESTING, Schema, too_deep
from longforge.chat.tokens import Family

__all__ = ["ArgumentWriter"]

_STARTS_A_VALUE = frozenset("{[-+.0123456789tTfFn")


@dataclass
class _Value:
    """One argument or a part of one.

    form: "open" nothing certain yet, "held" text to be typed at its end, "string", "object", "list"; "tree":
    kept whole until it is known to be a list or an object, and so is all inside it; "void" not written.
    """

    name: str
    schema: Schema
    depth: int
    parent: "_Value | None" = None
    form: Literal["open", "held", "string", "object", "list", "tree", "void"] = "open"
    parts: list[str] = field(default_factory=list)
    blank: bool = True
    children: "list[_Value]" = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    filled: bool = False
    is_cut: bool = False

    def __post_init__(self) -> None:
        self.types = self.schema.types
        self.is_text = bool(self.types) and self.types <= {"string", "null"} and "string" in self.types

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def add(self, text: str) -> None:
        self.parts.append(text)
        self.blank = self.blank and text.isspace()


class ArgumentWriter:
    """Takes opening tags, texts and closing tags of arguments; `take` gives the JSON that they make certain.

    What is no part of the arguments (text beside nested tags, an argument given twice) is put into `stray`.
    """

    def __init__(self, family: Family, schema: Schema) -> None:
        self._m2 = family == "m2"
        self._path = [_Value("", schema, 0, form="object")]
        self._new = ["{"]
        self._taken: list[str] = []
        self._run: list[str] = []  # text since the last tag, where no text is an argument's
        self.run_is_blank = True
        """Whether only whitespace came since the last tag outside a text argument."""
        self.stray: list[str] = []

    @property
    def in_value(self) -> bool:
        """Whether an argument is open, so that text is its value."""
        return len(self._path) > 1

    @property
    def in_text(self) -> bool:
        """Whether the innermost open argument may be text, so that a tag in it may be one."""
        value = self._path[-1]
        if value.form == "tree":
            return not value.children
        return value.form in ("open", "held", "string")

    @property
    def open_names(self) -> list[str]:
        """Names of the open arguments, innermost first."""
        return [value.name for value in reversed(self._path[1:])]

    def misses(self, name: str) -> bool:
        """Whether the object around the innermost open argument has a property `name` that is not given."""
        around = self._path[-2] if self.in_value else self._path[-1]
        return around.form == "object" and name not in around.names and around.schema.has_property(name)

    def has(self, name: str) -> bool:
        """Whether an argument `name` was given."""
        return name in self._path[0].names

    def open(self, name: str) -> bool:
        """An argument or a part of the innermost one begins. False: nothing can begin inside a text."""
        self.end_run()
        parent = self._path[-1]
        if len(self._path) > MAX_NESTING or not (parent.form == "void" or self._holds(parent, name)):
            return False
        schema = parent.schema.items() if parent.form == "list" else parent.schema.property(name)
        value = _Value(name, schema, parent.depth + 1, parent)
        if parent.form == "void" or (name in parent.names and not _may_repeat(parent.form, name)):
            value.form = "void"
        elif parent.form == "tree":
            value.form = "tree"
            parent.children.append(value)
        parent.names.add(name)
        self._path.append(value)
        return True

    def add(self, text: str) -> None:
        """Text inside the innermost open argument, or where none is open."""
        value = self._path[-1]
        if not text:
            return
        if value.form in ("object", "list", "void") or value.children:
            self._run.append(text)
            self.run_is_blank = self.run_is_blank and text.isspace()
        elif value.form == "string":
            self._string(value, text)
        else:
            value.add(text)
            if value.form == "open":
                self._decide(value, text)

    def close(self, *, whole: bool = True) -> None:
        """The innermost open argument ends. Cut off (not `whole`), what it holds stays text; nothing if it
        holds none."""
        self.end_run()
        value = self._path.pop()
        if value.form == "string":
            if value.parts and not whole:
                self._new.append(_escaped(value.text))
            self._new.append('"')
        elif value.form in ("object", "list"):
            self._new.append("}" if value.form == "object" else "]")
        elif value.form == "tree" and value.parent is not None and value.parent.form == "tree":
            value.is_cut = not whole
            if value.is_cut and value.blank and not value.children:
                value.parent.children.pop()
        elif value.form != "void" and (whole or value.children or not value.blank):
            value.is_cut = not whole
            self._begin(value)
            self._new.append(json.dumps(self._read(value, value.schema), ensure_ascii=False))

    def take_run(self) -> str:
        """The text since the last tag, which is not stray after all."""
        run = "".join(self._run)
        self._run.clear()
        self.run_is_blank = True
        return run

    def end_run(self) -> None:
        """The text since the last tag is none of the arguments."""
        if not self.run_is_blank:
            self.stray += self._run
        self.take_run()

    def end(self, *, whole: bool = True) -> None:
        """All that is open ends, and the arguments with it."""
        while self._path:
            self.close(whole=whole)

    def take(self) -> str:
        """The JSON since the last time."""
        new = "".join(self._new)
        self._taken.append(new)
        self._new.clear()
        return new

    def arguments(self) -> dict[str, Any]:
        """The value of all JSON taken, when all is ended."""
        return json.loads("".join(self._taken))

    def _holds(self, value: _Value, name: str) -> bool:
        """Whether a part `name` can begin inside; what was open becomes an object or a list by it."""
        if value.form in ("object", "list"):
            return True
        if value.form not in ("open", "tree") or not value.blank:
            return False
        if value.form == "open":
            if value.is_text:
                return False
            value.parts.clear()
            value.form = _container(value.types, name)
            if value.form != "tree":
                self._begin(value)
                self._new.append("{" if value.form == "object" else "[")
        return True

    def _begin(self, value: _Value) -> None:
        """The comma and the name before a value."""
        parent = value.parent
        assert parent is not None, "the arguments themselves began at once"
        self._new.append(", " if parent.filled else "")
        if parent.form == "object":
            self._new.append(json.dumps(value.name, ensure_ascii=False) + ": ")
        parent.filled = True

    def _decide(self, value: _Value, text: str) -> None:
        """Whether `text`, the last that came, makes it certain what the value is."""
        if value.is_text:
            so_far = self._stripped(value.text) if self._m2 else value.text
            may_be_null = self._m2 or "null" in value.types
            if may_be_null and "null".startswith(so_far.removesuffix("\n") if self._m2 else so_far):
                return
        elif value.blank:
            return
        elif text.lstrip()[0] in _STARTS_A_VALUE:
            value.form = "held"
            return
        self._begin(value)
        self._new.append('"')
        value.form = "string"
        text = self._stripped(value.text)
        value.parts.clear()
        self._string(value, text)

    def _string(self, value: _Value, text: str) -> None:
        """More of a string; the newline that may belong to M2's closing tag waits."""
        if self._m2:
            text = value.text + text
            value.parts = ["\n"] if text.endswith("\n") else []
            text = text.removesuffix("\n")
        self._new.append(_escaped(text))

    def _stripped(self, text: str) -> str:
        """Without the newline that belongs to M2's opening tag."""
        return text.removeprefix("\n") if self._m2 else text

    def _read(self, value: _Value, schema: Schema) -> Any:
        """The value that was kept, typed by `schema`."""
        if value.children:
            only_items = all(child.name == "item" for child in value.children)
            if only_items and ("array" in schema.types or "object" not in schema.types):
                return [self._read(child, schema.items()) for child in value.children]
            return {child.name: self._read(child, schema.property(child.name)) for child in value.children}
        text = self._stripped(value.text)
        if value.is_cut:
            return text
        if self._m2:
            text = text.removesuffix("\n")
        read = schema.value(text, null_literal=self._m2)
        return text if too_deep(read, MAX_NESTING - value.depth) else read


def _may_repeat(form: str, name: str) -> bool:
    return form == "list" or (form == "tree" and name == "item")


def _container(types: frozenset[str], name: str) -> Literal["object", "list", "tree"]:
    """What a value is whose first part is called `name`, as far as that tells."""
    if name != "item" or ("object" in types and "array" not in types):
        return "object"
    return "list" if "array" in types and "object" not in types else "tree"


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
