"""Thinking, content and tool calls out of a model's text, as it comes.

The result does not depend on how the text is split. Nothing is ever raised about what a model wrote, and no
text is lost: what cannot be a tool call is given back as content, in place. Text is passed on as soon as it
can no longer be the start of a tag.

Rules beyond the released formats (choices):
- A closing think tag at the very start of an M3 answer is a thought that was skipped: thinking "". Elsewhere
  in content it is text.
- Inside thinking only the closing tag means something.
- A call counts when all its arguments are closed and its own end, the next call or the end of the block
  follows. A call cut off by the end of the text is content: half its arguments may be missing.
- Arguments nested deeper than `schema.MAX_NESTING` levels are no call.
- Closing tags of nothing between calls or arguments are dropped, and so is whitespace after a block of calls.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from re import Match
from typing import Literal

from longforge.chat.calls import INVOKE, CallReader, Malformed
from longforge.chat.syntax import SYNTAX, Marks
from longforge.chat.tokens import Family
from longforge.errors import InputError
from longforge.protocol import Message, ToolCall, ToolSpec

__all__ = ["ChatParser", "Delta", "message_of", "parse"]

_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Delta:
    """A stretch of thinking or of content, or a part of a tool call.

    A call comes as call_start, any number of call_arguments, call_end; two calls never overlap. The texts of
    its call_arguments together are the JSON of `call_end.call.arguments`.
    """

    kind: Literal["thinking", "content", "call_start", "call_arguments", "call_end"]
    text: str = ""
    """thinking, content: the text. call_arguments: the next stretch of JSON."""
    call: ToolCall | None = None
    """call_start: the name alone. call_end: the whole call."""


class ChatParser:
    """Reads one answer of the assistant.

    `tools` give the types of arguments; a call of a tool that is not among them is read without types.
    `thinking_open` says that the prompt left the model inside a thinking block (`chat.starts_in_thinking`).
    """

    def __init__(
        self, family: Family = "m3", tools: Sequence[ToolSpec] = (), thinking_open: bool = False
    ) -> None:
        if family not in SYNTAX:
            raise InputError(f"family: expected m2 or m3, got {family!r}")
        self._family: Family = family
        self._syntax = SYNTAX[family]
        self._schemas = {tool.name: tool.parameters for tool in tools}
        self._state: Literal["thinking", "content", "block"] = "thinking" if thinking_open else "content"
        self._buffer = ""
        self._at = 0  # what lies before is dealt with
        self._final = False
        self._deltas: list[Delta] = []
        self._untouched = not thinking_open  # nothing of the answer is dealt with yet
        self._thought_is_empty = True
        self._newlines = 0  # how many still belong to the tag before
        self._after_block = False  # whitespace still belongs to the block before
        self._block_start = 0  # of the text that becomes content if the rest of the block goes wrong
        self._block_is_empty = True
        self._call: CallReader | None = None

    def push(self, text: str) -> list[Delta]:
        """What `text` completes."""
        self._buffer += text
        while self._step():
            pass
        kept = self._block_start if self._state == "block" else self._at
        self._buffer = self._buffer[kept:]
        self._at -= kept
        self._block_start = 0
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> list[Delta]:
        """What was held back: the text has ended."""
        self._final = True
        deltas = self.push("")
        if self._state == "block":
            self._at = len(self._buffer)
            self._give_block_back()
        return deltas + self._deltas

    def _step(self) -> bool:
        """Go on by one tag; False when that needs more text."""
        if self._state == "thinking":
            return self._step_in_thinking()
        if self._state == "content":
            return self._step_in_content()
        try:
            return self._step_in_block()
        except Malformed:
            self._give_block_back()
            return True

    def _step_in_thinking(self) -> bool:
        match = self._until(self._syntax.thinking, self._emit_thinking) if self._skip_space() else None
        if match is None:
            return False
        if self._thought_is_empty:
            self._deltas.append(Delta("thinking"))
        self._enter("content", match.end(), self._syntax.newlines_after_close)
        return True

    def _step_in_content(self) -> bool:
        untouched = self._untouched
        match = self._until(self._syntax.content, self._emit_content) if self._skip_space() else None
        if match is None:
            return False
        self._untouched = False
        if match["think"]:
            self._thought_is_empty = True
            self._enter("thinking", match.end(), self._syntax.newlines_after_open)
        elif match["block"]:
            self._block_start = match.start()
            self._block_is_empty = True
            self._enter("block", match.end())
        elif untouched and match.start() == 0:
            self._deltas.append(Delta("thinking"))
            self._enter("content", match.end(), self._syntax.newlines_after_close)
        else:
            self._emit_content(match[0])
            self._at = match.end()
        return True

    def _step_in_block(self) -> bool:
        """One tag of a block of calls. Malformed leaves `_at` at the first character that is wrong."""
        call = self._call
        if call is not None and call.in_value:
            match = self._until(self._syntax.value, call.text)
            if match is None:
                return False
            if match["slash"]:
                call.close(match["body"])
            else:
                self._open_argument(match["body"])
        else:
            match = self._tag()
            if match is None:
                return False
            if match["slash"]:
                self._close_outside(match)
            else:
                self._open_outside(match)
        self._at = match.end()
        return True

    def _open_outside(self, match: Match[str]) -> None:
        invoke = INVOKE.fullmatch(match["body"])
        if invoke is None:
            self._open_argument(match["body"])
            return
        call = CallReader(self._family, invoke[1], self._schemas.get(invoke[1]))
        self._end_call(match.start())
        self._call = call

    def _open_argument(self, body: str) -> None:
        if self._call is None or body == self._syntax.block:
            raise Malformed
        self._call.open(body)

    def _close_outside(self, match: Match[str]) -> None:
        """A closing tag with no argument open; of a call, of the block, or of nothing."""
        if match["body"] == "invoke":
            self._end_call(match.end())
        elif match["body"] == self._syntax.block:
            self._end_call(match.end())
            if self._block_is_empty:
                raise Malformed
            self._enter("content", match.end())
            self._after_block = True

    def _end_call(self, end: int) -> None:
        if self._call is not None:
            call = self._call.call()
            self._deltas.append(Delta("call_start", call=ToolCall(call.name, {})))
            self._deltas.append(Delta("call_arguments", json.dumps(call.arguments, ensure_ascii=False)))
            self._deltas.append(Delta("call_end", call=call))
            self._call = None
            self._block_start = end
            self._block_is_empty = False

    def _give_block_back(self) -> None:
        """What was read of the block since its last good call is content after all."""
        text = self._buffer[self._block_start : self._at]
        if self._block_is_empty or not text.isspace():
            self._emit_content(text)
        self._call = None
        self._enter("content", self._at)

    def _enter(self, state: Literal["thinking", "content", "block"], at: int, newlines: int = 0) -> None:
        self._state = state
        self._at = at
        self._newlines = newlines
        self._after_block = False

    def _skip_space(self) -> bool:
        """Pass over the whitespace that belongs to the tag before; False when more of it may come."""
        while self._at < len(self._buffer) and (self._newlines or self._after_block):
            character = self._buffer[self._at]
            if not (character == "\n" or (self._after_block and character.isspace())):
                self._newlines, self._after_block = 0, False
                return True
            self._newlines = max(0, self._newlines - 1)
            self._at += 1
        return self._at < len(self._buffer)

    def _until(self, marks: Marks, take: Callable[[str], None]) -> Match[str] | None:
        """Hand over the text before the next of `marks` and stand before it; None: it is not whole yet."""
        match = marks.whole.search(self._buffer, self._at)
        if match is not None:
            end = match.start()
        else:
            start = None if self._final else marks.partial.search(self._buffer, self._at)
            end = len(self._buffer) if start is None else start.start()
        text = self._buffer[self._at : end]
        if text:
            take(text)
        self._at = end
        return match

    def _tag(self) -> Match[str] | None:
        """The tag that stands next, whitespace before it passed over; None when it is not whole yet."""
        space = _SPACE.match(self._buffer, self._at)
        self._at = space.end() if space else self._at
        match = self._syntax.between.whole.match(self._buffer, self._at)
        hopeless = match is None and not self._syntax.between.partial.match(self._buffer, self._at)
        if hopeless and self._at < len(self._buffer):
            raise Malformed
        return match

    def _emit_thinking(self, text: str) -> None:
        self._thought_is_empty = False
        self._deltas.append(Delta("thinking", text))

    def _emit_content(self, text: str) -> None:
        if text:
            self._untouched = False
            self._deltas.append(Delta("content", text))


def parse(
    text: str, family: Family = "m3", tools: Sequence[ToolSpec] = (), thinking_open: bool = False
) -> Message:
    """The assistant's message that `text`, without the marker that ends a turn, stands for."""
    parser = ChatParser(family, tools, thinking_open)
    return message_of([*parser.push(text), *parser.finish()])


def message_of(deltas: Iterable[Delta]) -> Message:
    """All deltas of an answer as one message. `thinking` is None when there was no thinking block at all."""
    everything = list(deltas)
    thoughts = [delta.text for delta in everything if delta.kind == "thinking"]
    return Message(
        role="assistant",
        content="".join(delta.text for delta in everything if delta.kind == "content"),
        thinking="".join(thoughts) if thoughts else None,
        tool_calls=tuple(d.call for d in everything if d.kind == "call_end" and d.call is not None),
    )
