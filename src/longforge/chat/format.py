"""Tool calls as text, in the canonical form of each family. `calls.py` is the inverse.

M3: every tag stands behind the token `]<]minimax[>[`; one tag per argument, objects as nested tags, lists as
`<item>` tags, None left out, true and false as JSON, everything else as it is. M2: `<parameter name="k">`
with a string as it is and any other value as JSON.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from longforge.chat.tokens import CALL_PREFIX, Family
from longforge.protocol import ToolCall

__all__ = ["Piece", "call_pieces", "call_text", "value_text"]


class Piece(NamedTuple):
    """A stretch of a rendered prompt. Only `markup` may become special tokens; the rest is data."""

    text: str
    markup: bool


def call_pieces(call: ToolCall, family: Family) -> Iterator[Piece]:
    """One call, from its opening `<invoke` to its `</invoke>`, without the block around it."""
    pieces = _m2_call(call) if family == "m2" else _m3_call(call)
    return (piece for piece in pieces if piece.text)


def call_text(call: ToolCall, family: Family, *, nulls: bool = False) -> str:
    """The same as one string. With `nulls`, None is written in M3 too, for one who shall miss nothing."""
    if nulls and family == "m3":
        call = replace(call, arguments=_nulls_as_text(call.arguments))
    return "".join(piece.text for piece in call_pieces(call, family))


def value_text(value: Any, family: Family) -> str:
    """The text of one argument that has no tags inside."""
    return _m2_value(value) if family == "m2" else _scalar(value)


def _nulls_as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _nulls_as_text(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_nulls_as_text(inner) for inner in value]
    return "null" if value is None else value


def _m3_call(call: ToolCall) -> Iterator[Piece]:
    yield Piece(f'{CALL_PREFIX}<invoke name="', True)
    yield Piece(call.name, False)
    yield Piece('">', True)
    yield from _m3_value(call.arguments)
    yield Piece(f"{CALL_PREFIX}</invoke>", True)


def _m3_value(value: Any) -> Iterator[Piece]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if inner is not None:
                yield from _m3_tag(str(name), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            if inner is not None:
                yield from _m3_tag("item", inner)
    else:
        yield Piece(_scalar(value), False)


def _m3_tag(name: str, value: Any) -> Iterator[Piece]:
    yield Piece(f"{CALL_PREFIX}<", True)
    yield Piece(name, False)
    yield Piece(">", True)
    yield from _m3_value(value)
    yield Piece(f"{CALL_PREFIX}</", True)
    yield Piece(name, False)
    yield Piece(">", True)


def _m2_call(call: ToolCall) -> Iterator[Piece]:
    yield Piece('<invoke name="', True)
    yield Piece(call.name, False)
    yield Piece('">\n', True)
    for name, value in call.arguments.items():
        yield Piece('<parameter name="', True)
        yield Piece(name, False)
        yield Piece('">', True)
        yield Piece(_m2_value(value), False)
        yield Piece("</parameter>\n", True)
    yield Piece("</invoke>", True)


def _m2_value(value: Any) -> str:
    """Readers take one newline off either end, so a string that has its own is given a pair to lose."""
    text = _scalar(value)
    return f"\n{text}\n" if text.startswith("\n") or text.endswith("\n") else text


def _scalar(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # readers make an int of it, so this is what they would write
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
