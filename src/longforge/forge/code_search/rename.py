"""Consistent renaming of an episode: classes, methods, modules and paths get new names.

A tiny model that always meets the same names learns them by heart. With new names in most traces, the only
way to be right is to copy from what the tools returned. Names change part by part (`HTTPServer` is HTTP +
Server), so that two names that share a part still share it, and a search for part of a name still matches.
"""

import keyword
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from longforge.forge.code_search.prompts import SYSTEM_PROMPT
from longforge.forge.code_search.questions import KINDS
from longforge.forge.code_search.scripted import THOUGHTS
from longforge.protocol import Message

__all__ = ["NamePool", "name_parts", "names_in", "rename_messages", "rename_text"]

_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_TOOL_WORDS = "error no match more file lines to has in the tree path py init self cls object"
_KEPT = frozenset(keyword.kwlist) | frozenset(
    re.findall(r"\w+", " ".join([*KINDS.values(), *THOUGHTS, SYSTEM_PROMPT, _TOOL_WORDS]))
)
_CONSONANTS = (
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "st",
    "tr",
    "qu",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
_ENDINGS = ("", "", "n", "r", "l", "x", "t", "m")


class NamePool:
    """Makes new name parts: real ones of the tree in random order, or syllables that mean nothing."""

    def __init__(self, names: Iterable[str], real_share: float = 0.5) -> None:
        parts = {part.lower() for name in names for part in name_parts(name)}
        self._real = sorted(part for part in parts if 3 <= len(part) <= 10)
        self._real_share = real_share

    def draw(self, like: str, rng: random.Random) -> str:
        """A new part in the style of `like`: Capital, ALL CAPITALS or small letters."""
        if self._real and rng.random() < self._real_share:
            part = rng.choice(self._real)
        else:
            part = "".join(
                rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + rng.choice(_ENDINGS)
                for _ in range(rng.randint(1, 3))
            )
        if like.isupper():
            return part[: max(2, len(like))].upper()
        return part.capitalize() if like[0].isupper() else part


def name_parts(name: str) -> list[str]:
    """The words of a CamelCase or snake_case name, as they are written."""
    return _PART.findall(name)


def names_in(messages: Sequence[Message], symbol: str) -> list[str]:
    """The names an episode turns on: its subject, and each class, method, base and path a tool showed."""
    found = {symbol}
    for message in messages:
        if message.role == "tool":
            found.update(re.findall(r"\b(?:class|def) (\w+)", message.content))
            for bases in re.findall(r"\bclass \w+\(([\w., ]*)", message.content):
                found.update(re.findall(r"\w+", bases))
            for path in re.findall(r"^(\S+)\.py:", message.content, re.MULTILINE):
                found.update(path.split("/"))
    return sorted(found)


def rename_messages(
    messages: Sequence[Message], names: Iterable[str], pool: NamePool, rng: random.Random
) -> tuple[list[Message], Mapping[str, str]]:
    """The messages with every part of `names` replaced, and the table of parts (old to new, one to one)."""
    table: dict[str, str] = {}
    for part in sorted({part for name in names for part in name_parts(name)}):
        if len(part) > 1 and part not in _KEPT:
            new = pool.draw(part, rng)
            while new in table.values() or new in _KEPT:
                new = pool.draw(part, rng) + (pool.draw("x", rng) if rng.random() < 0.1 else "")
            table[part] = new
    return [_rename_message(message, table) for message in messages], table


def rename_text(text: str, table: Mapping[str, str]) -> str:
    """`text` with the parts in `table` replaced wherever they stand."""
    return _PART.sub(lambda match: table.get(match[0], match[0]), text)


def _rename_message(message: Message, table: Mapping[str, str]) -> Message:
    calls = tuple(
        replace(
            call,
            arguments={
                key: rename_text(value, table) if isinstance(value, str) else value
                for key, value in call.arguments.items()
            },
        )
        for call in message.tool_calls
    )
    thinking = None if message.thinking is None else rename_text(message.thinking, table)
    return replace(message, content=rename_text(message.content, table), thinking=thinking, tool_calls=calls)
