"""What the parser looks for in each family's text, and where it must wait for more of it."""

import re
from dataclasses import dataclass
from re import Pattern

from longforge.chat.tokens import CALL_PREFIX, Family

__all__ = ["SYNTAX", "Marks", "Syntax"]


@dataclass(frozen=True)
class Marks:
    """Tags that mean something in one state. `partial` matches an end of text that could still become one."""

    whole: Pattern[str]
    partial: Pattern[str]


@dataclass(frozen=True)
class Syntax:
    """One family's tags.

    `content` finds what ends plain content (group names: think, close, block), `thinking` what ends thinking,
    `between` any tag where only tags and whitespace may stand, `value` any tag inside an argument's value. A
    tag is read from the groups `slash` and `body`. `newlines_after_*` is how many newlines belong to a think
    tag before them.
    """

    content: Marks
    thinking: Marks
    between: Marks
    value: Marks
    block: str
    newlines_after_open: int
    newlines_after_close: int


_BODY = r"[^<>\n]{1,200}"


def _prefixes(literal: str, tail: str = "") -> str:
    """A pattern for every prefix of `literal` (but the empty one); `tail` may follow all of it."""
    pattern = f"(?:{tail})?" if tail else ""
    for character in reversed(literal[1:]):
        pattern = f"(?:{re.escape(character)}{pattern})?"
    return re.escape(literal[0]) + pattern


def _marks(whole: str, *partial: str) -> Marks:
    return Marks(re.compile(whole), re.compile(f"(?:{'|'.join(partial)})\\Z"))


_PREFIX = re.escape(CALL_PREFIX)
_CALL_TAG = rf"{_PREFIX}<(?P<slash>/?)(?P<body>{_BODY})>"
_CALL_TAG_PARTIAL = _prefixes(CALL_PREFIX + "<", "[^<>\n]{1,201}")

_M3 = Syntax(
    content=_marks(
        rf"(?P<think><mm:think>)|(?P<close></mm:think>)|(?P<block>{_PREFIX}<tool_call>)",
        _prefixes("<mm:think>"),
        _prefixes("</mm:think>"),
        _prefixes(f"{CALL_PREFIX}<tool_call>"),
    ),
    thinking=_marks("</mm:think>", _prefixes("</mm:think>")),
    between=_marks(
        rf"(?:{_PREFIX}<|<(?=/))(?P<slash>/?)(?P<body>{_BODY})>",
        _CALL_TAG_PARTIAL,
        _prefixes("</", "[^<>\n]{1,200}"),
    ),
    value=_marks(_CALL_TAG, _CALL_TAG_PARTIAL),
    block="tool_call",
    newlines_after_open=0,
    newlines_after_close=0,
)

_M2_ENDS = ("parameter", "invoke", "minimax:tool_call")
_M2 = Syntax(
    content=_marks(
        r"(?P<think><think>)|(?P<close></think>)|(?P<block>\n?<minimax:tool_call>)",
        _prefixes("<think>"),
        _prefixes("</think>"),
        _prefixes("\n<minimax:tool_call>"),
        _prefixes("<minimax:tool_call>"),
    ),
    thinking=_marks("\n?</think>", _prefixes("\n</think>"), _prefixes("</think>")),
    between=_marks(rf"<(?P<slash>/?)(?P<body>{_BODY})>", _prefixes("<", "[^<>\n]{1,201}")),
    value=_marks(
        rf"<(?P<slash>/)(?P<body>{'|'.join(_M2_ENDS)})>", *(_prefixes(f"</{name}>") for name in _M2_ENDS)
    ),
    block="minimax:tool_call",
    newlines_after_open=1,
    newlines_after_close=2,
)

SYNTAX: dict[Family, Syntax] = {"m2": _M2, "m3": _M3}
