"""An answer read in pieces, and what must hold of any deltas."""

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from longforge.chat import ChatParser, Delta, Family
from longforge.protocol import ToolSpec

NS = "]<]minimax[>["
OPEN, CLOSE = f"{NS}<tool_call>", f"{NS}</tool_call>"
M2_OPEN, M2_CLOSE = "<minimax:tool_call>", "</minimax:tool_call>"
GREP = ToolSpec("grep", "", {"type": "object", "properties": {"pattern": {"type": "string"}}})

TYPES: dict[str, Any] = {
    "path": {"type": "string"},
    "content": {"type": ["string", "null"]},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "either": {"type": ["string", "integer"]},
    "line": {"type": "integer"},
    "share": {"type": "number"},
    "all": {"type": "boolean"},
    "names": {"type": "array", "items": {"type": "string"}},
    "edits": {
        "type": "array",
        "items": {"type": "object", "properties": {"old": {"type": "string"}, "at": {"type": "integer"}}},
    },
    "where": {"type": "object", "properties": {"file": {"type": "string"}, "exact": {"type": "boolean"}}},
}
WRITE = ToolSpec("write", "", {"type": "object", "properties": TYPES})


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same deltas with neighbours of one kind joined: what a split may change and nothing else."""
    joined: list[Delta] = []
    for delta in deltas:
        if joined and delta.call is None and joined[-1].kind == delta.kind:
            joined[-1] = Delta(delta.kind, joined[-1].text + delta.text)
        else:
            joined.append(delta)
    return joined


def streamed(
    family: Family, pieces: Iterable[str], tools: Sequence[ToolSpec] = (GREP,), thinking_open: bool = False
) -> list[Delta]:
    """The merged deltas of a text that comes in `pieces`."""
    parser = ChatParser(family, tools, thinking_open)
    pushed = [delta for piece in pieces for delta in parser.push(piece)]
    return merged(pushed + parser.finish())


def cut_at(text: str, places: Iterable[int]) -> list[str]:
    """`text` in pieces."""
    borders = [0, *sorted(place for place in places if place < len(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


def check_calls(deltas: Sequence[Delta]) -> None:
    """Every call starts, goes on and ends, alone, and its JSON is that of its arguments."""
    name, written = None, ""
    for delta in deltas:
        if delta.kind == "call_start":
            assert name is None and delta.call is not None and not delta.call.arguments
            name, written = delta.call.name, ""
        elif delta.kind == "call_arguments":
            assert name is not None and delta.text
            written += delta.text
        elif delta.kind == "call_end":
            assert delta.call is not None and delta.call.name == name
            assert json.loads(written, object_pairs_hook=_distinct) == delta.call.arguments
            assert json.dumps(delta.call.arguments, ensure_ascii=False) == written
            name = None
        else:
            assert name is None, "nothing but arguments inside a call"
    assert name is None, "a call that was begun has an end"


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    assert len({name for name, _ in pairs}) == len(pairs), "a name stands once in an object"
    return dict(pairs)
