"""Pieces of grammar text: literals, regular expressions, rules; in llguidance's dialect of Lark.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from longforge.chat.tokenizer import Tokenizer

__all__ = [
    "Rules",
    "embedded_json",
    "escape",
    "literal",
    "markup",
    "one_of",
    "regex",
    "split_text",
    "symbols",
    "text_without",
]

_PLAIN = re.compile(r"[A-Za-z0-9]")
_CONTROLS = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


class Rules:
    """The rules of one grammar under construction; each gets a name of its own."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._names: dict[str, str] = {}

    def rule(self, body: str) -> str:
        """The name of a rule of that body; equal bodies are one rule."""
        return self._name("r", body)

    def terminal(self, body: str) -> str:
        """The same of a terminal: one regular expression, matched as a whole."""
        return self._name("T", body)

    def text(self, start: str) -> str:
        """The whole grammar; `start` is the body of its first rule."""
        return "\n".join([f"start: {start}", *self._lines]) + "\n"

    def _name(self, kind: str, body: str) -> str:
        key = f"{kind}: {body}"
        if key not in self._names:
            self._names[key] = f"{kind}{len(self._names)}"
            self._lines.append(f"{self._names[key]}: {body}")
        return self._names[key]


def literal(text: str) -> str:
    """Exactly `text`; nothing for the empty text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def regex(pattern: str) -> str:
    """A regular expression whose slashes are escaped already."""
    return f"/{pattern}/" if pattern else '""'


def one_of(alternatives: Iterable[str]) -> str:
    """Any of the alternatives."""
    return "(" + " | ".join(alternatives) + ")"


def escape(text: str) -> str:
    """A pattern of exactly `text`, fit to stand between slashes."""
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character in _CONTROLS:
        return _CONTROLS[character]
    return character if _PLAIN.match(character) or ord(character) >= 128 else rf"\x{ord(character):02x}"


@cache
def text_without(words: tuple[str, ...]) -> str:
    """A pattern of every text in which no `<` is followed by one of the words. No word holds a `<`."""
    return f"[^<]*(?:<{_not_on_to(words)})*"


def _not_on_to(words: Sequence[str]) -> str:
    """What may come up to the next `<` without spelling out a word."""
    starts = sorted({word[0] for word in words})
    others = "".join(map(_escaped, starts))
    paths = [f"[^<{others}][^<]*"]
    for start in starts:
        rest = [word[1:] for word in words if word[0] == start]
        if all(rest):
            paths.append(_escaped(start) + _not_on_to(rest))
    return f"(?:{'|'.join(paths)})?"


def markup(text: str, tokenizer: Tokenizer) -> list[str | int]:
    """`text` as a prompt would hold it: ids where it spells special tokens, the rest as text."""
    parts: list[str | int] = []
    pending: list[int] = []
    special = set(tokenizer.special_ids)
    for token in tokenizer.encode(text):
        if token in special:
            parts += [tokenizer.decode(pending), token] if pending else [token]
            pending = []
        else:
            pending.append(token)
    return [*parts, tokenizer.decode(pending)] if pending else parts


def split_text(parts: Sequence[str | int]) -> tuple[str, str]:
    """The text that `markup` begins with (it may be empty), and symbols for the rest of it."""
    count = next((place for place, part in enumerate(parts) if isinstance(part, int)), len(parts))
    return "".join(map(str, parts[:count])), symbols(parts[count:])


def symbols(parts: Sequence[str | int]) -> str:
    """`markup` as a part of a rule."""
    return " ".join(literal(part) if isinstance(part, str) else f"<[{part}]>" for part in parts)


def embedded_json(schema: dict[str, Any]) -> str:
    """JSON of a schema, as a part of a rule."""
    return f"%json {json.dumps(schema)}"
