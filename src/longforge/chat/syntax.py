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

    `content` finds what ends plain content (group names: think, close, block); `loose` the same while a block
    of calls is open around that content (also invoke, end). `thinking` finds what ends thinking, `outside` a
    tag where no argument is open, `value` a tag inside an argument's value: all read from the groups `slash`
    and `body`. `newlines_after_*` is how many newlines belong to a think tag before them.
    """

    content: Marks
    loose: Marks
    thinking: Marks
    outside: Marks
    value: Marks
    block: str
    newlines_after_open: int
    newlines_after_close: int


_BODY = r"[^<>\n]{1,200}"
_HALF_BODY = r"[^<>\n]{1,201}"
_INVOKE = r'invoke\s+name="[^"<>\n]+"\s*'
_HALF_NAMED = r"\s[^<>\n]{0,200}"  # what may follow "<invoke" or "<parameter"


def _prefixes(literal: str, tail: str = "") -> str:
    """A pattern for every prefix of `literal` (but the empty one); `tail` may follow all of it."""
    pattern = f"(?:{tail})?" if tail else ""
    for character in reversed(literal[1:]):
        pattern = f"(?:{re.escape(character)}{pattern})?"
    return re.escape(literal[0]) + pattern


def _marks(whole: str, *partial: str) -> Marks:
    return Marks(re.compile(whole), re.compile(f"(?:{'|'.join(partial)})\\Z"))


def _content(block: str, think: str, ending: str, invoke: str, *half_invoke: str) -> tuple[Marks, Marks]:
    """Marks of content, and of content in an open block. `block`: what may stand before its tag."""
    opening = ending.replace("</", "<")
    whole = rf"(?P<think><{think}>)|(?P<close></{think}>)|(?P<block>{block}{re.escape(opening)})"
    partial = [_prefixes(f"<{think}>"), _prefixes(f"</{think}>"), _prefixes(opening)]
    if block:
        partial.append(_prefixes("\n" + opening))
    loose = rf"{whole}|(?P<invoke>{invoke})|(?P<end>{re.escape(ending)})"
    return _marks(whole, *partial), _marks(loose, *partial, *half_invoke, _prefixes(ending))


# M3: a tag stands behind the prefix. The model is known to lose the bracket of `<invoke` now and then.
_PREFIX = re.escape(CALL_PREFIX)
_CALL_TAG = rf"(?:{_PREFIX}<|{_PREFIX}(?=invoke\s))"
_HALF_CALL_TAG = _prefixes(CALL_PREFIX + "<", _HALF_BODY)
_HALF_BARE_INVOKE = _prefixes(CALL_PREFIX + "invoke", _HALF_NAMED)
_M3_CONTENT, _M3_LOOSE = _content(
    "", "mm:think", f"{CALL_PREFIX}</tool_call>", f"{_PREFIX}<?{_INVOKE}>", _HALF_CALL_TAG, _HALF_BARE_INVOKE
)
_M3 = Syntax(
    content=_M3_CONTENT,
    loose=_M3_LOOSE,
    thinking=_marks("</mm:think>", _prefixes("</mm:think>")),
    outside=_marks(
        rf"(?:{_CALL_TAG}|<(?=/))(?P<slash>/?)(?P<body>{_BODY})>",
        _HALF_CALL_TAG,
        _HALF_BARE_INVOKE,
        _prefixes("</", _HALF_BODY),
    ),
    value=_marks(rf"{_CALL_TAG}(?P<slash>/?)(?P<body>{_BODY})>", _HALF_CALL_TAG, _HALF_BARE_INVOKE),
    block="tool_call",
    newlines_after_open=0,
    newlines_after_close=0,
)

_M2_BLOCK = "minimax:tool_call"
_M2_OPENINGS = rf'parameter\s+name="[^"<>\n]+"\s*|invoke\s+name="[^"<>\n]*"\s*|{_M2_BLOCK}'
_HALF_M2_OPENINGS = (
    _prefixes("<invoke", _HALF_NAMED),
    _prefixes("<parameter", _HALF_NAMED),
    _prefixes(f"<{_M2_BLOCK}>"),
)
_M2_ENDS = ("parameter", "invoke", _M2_BLOCK)
_M2_CONTENT, _M2_LOOSE = _content("\n?", "think", f"</{_M2_BLOCK}>", f"<{_INVOKE}>", _HALF_M2_OPENINGS[0])
_M2 = Syntax(
    content=_M2_CONTENT,
    loose=_M2_LOOSE,
    thinking=_marks("\n?</think>", _prefixes("\n</think>"), _prefixes("</think>")),
    outside=_marks(
        rf"<(?P<slash>/?)(?P<body>(?<=/){_BODY}|(?<!/)(?:{_M2_OPENINGS}))>",
        *_HALF_M2_OPENINGS,
        _prefixes("</", _HALF_BODY),
    ),
    value=_marks(
        rf"<(?P<slash>/?)(?P<body>(?<=/)(?:{'|'.join(_M2_ENDS)})|(?<!/)(?:{_M2_OPENINGS}))>",
        *_HALF_M2_OPENINGS,
        *(_prefixes(f"</{name}>") for name in _M2_ENDS),
    ),
    block=_M2_BLOCK,
    newlines_after_open=1,
    newlines_after_close=2,
)

SYNTAX: dict[Family, Syntax] = {"m2": _M2, "m3": _M3}
