"""Thinking, content and tool calls out of a model's text, as it comes.

The result does not depend on how the text is split. Nothing is ever raised about what a model wrote. Text is
passed on as soon as it can no longer be the start of a tag, and a call as soon as its opening tag is whole
inside a block of calls: from then on it is a call, whatever follows.

Rules beyond the released formats (choices):

- A closing think tag at the very start of an M3 answer is a thought that was skipped: thinking "". Elsewhere
  in content it is text. Inside thinking only the closing tag means something.
- What stands between calls and is none (text, a call without a name, an argument outside a call) is content,
  in place, and the block goes on after it; before the first call the block's own tag is content with it. A
  block without any call is content as it was written. Closing tags of nothing and whitespace are dropped
  between calls, and so is whitespace after a block.
- A call that was begun is always ended, and its JSON is valid: by its own end, the next call, the next
  block, the end of the block or the end of the text. Arguments that are still open then end there.
- A call that the text's end cuts off (`ChatParser.cut_off`) has the arguments that came so far: a string as
  far as it came, half of another value as the text it was (so a tool that checks types refuses it), none for
  an argument of which nothing came. Half a tag at the very end is dropped.
- Text inside a call that is no argument becomes content after the call: text between arguments or beside
  nested tags, an argument given twice (the first counts). Nothing else of a call is lost but closing tags
  of nothing.
- M3's model leaves out the opening tag of a call's first argument: text there, up to a closing tag with a
  name, is that argument. A lost bracket (`]<]minimax[>[invoke`) is forgiven.
- Text may hold tags. M2: the last `</parameter>` before the next argument, call, `</invoke>` or end of block
  closes an argument; M3: the tag with its name does. While an argument is open, `</invoke>` or the end of a
  block is its text if the argument's own closing tag comes before another call, and is what it looks like
  otherwise; the text from there on waits for that. M3: in a string, the opening tag of an argument that the
  schema knows and that was not given ends the string; a closing tag of another name is text if the string's
  own comes next, and closes it otherwise. What cannot be told: M2 text that holds `</parameter>` and then
  what may follow one.
- M3's brackets come with the first nested tag; of a nested value whose schema says neither list nor object
  and which starts with `<item>`, when it is closed.
- Arguments nested deeper than `schema.MAX_NESTING` levels stay text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from re import Match
from typing import Literal

from longforge.chat.calls import INVOKE, CallReader
from longforge.chat.scanner import Scanner
from longforge.chat.syntax import SYNTAX
from longforge.chat.tokens import Family
from longforge.errors import InputError
from longforge.protocol import Message, ToolCall, ToolSpec

__all__ = ["ChatParser", "Delta", "message_of", "parse"]


@dataclass(frozen=True)
class Delta:
    """A stretch of thinking or of content, or a part of a tool call.

    A call comes as call_start, any number of call_arguments, call_end; two calls never overlap. The texts of
    its call_arguments together are the JSON of `call_end.call.arguments`. Thinking and content stand outside
    calls, and every call that starts ends.
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
        self.cut_off = False
        """Whether the text ended inside a call; known after `finish`."""
        self._family: Family = family
        self._syntax = SYNTAX[family]
        self._schemas = {tool.name: tool.parameters for tool in tools}
        self._state: Literal["thinking", "content", "block"] = "thinking" if thinking_open else "content"
        self._scanner = Scanner()
        self._deltas: list[Delta] = []
        self._untouched = not thinking_open  # nothing of the answer is dealt with yet
        self._thought_is_empty = True
        self._newlines = 0  # how many still belong to the tag before
        self._after_block = False  # whitespace still belongs to the block before
        self._loose = False  # the content stands in a block that is not closed
        self._block_is_empty = True
        self._unclaimed: list[str] = []  # of a block since its last call: content if what follows is no call
        self._call: CallReader | None = None

    def push(self, text: str) -> list[Delta]:
        """What `text` completes."""
        self._scanner.push(text)
        while self._step():
            pass
        if self._call is not None:
            self._pass_on(self._call)
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> list[Delta]:
        """What was held back: the text has ended."""
        if self._call is not None:
            self._call.cut(self._scanner)
            self.cut_off = self._call.cut_off
            self._end_call(self._call)
        self._scanner.final = True
        deltas = self.push("")
        if self._state == "block":
            self._give_back()
        return deltas + self._deltas

    def _step(self) -> bool:
        """Go on by one tag; False when that needs more text."""
        if self._state == "thinking":
            return self._step_in_thinking()
        if self._state == "content":
            return self._step_in_content()
        if self._call is None:
            return self._step_in_block()
        goes_on = self._call.step(self._scanner)
        if self._call.ended:
            self._end_call(self._call)
        return goes_on

    def _step_in_thinking(self) -> bool:
        if not self._skip_space():
            return False
        text, tag = self._scanner.until(self._syntax.thinking)
        if text:
            self._thought_is_empty = False
            self._deltas.append(Delta("thinking", text))
        if tag is None:
            return False
        if self._thought_is_empty:
            self._deltas.append(Delta("thinking"))
        self._enter("content", tag.end(), self._syntax.newlines_after_close)
        return True

    def _step_in_content(self) -> bool:
        untouched = self._untouched
        if not self._skip_space():
            return False
        text, tag = self._scanner.until(self._syntax.loose if self._loose else self._syntax.content)
        self._emit_content(text)
        if tag is None:
            return False
        self._untouched = False
        if tag["think"]:
            self._thought_is_empty = True
            self._enter("thinking", tag.end(), self._syntax.newlines_after_open)
        elif tag["block"]:
            self._block_is_empty = True
            self._unclaimed = [tag[0]]
            self._enter("block", tag.end())
        elif tag["close"] and untouched and not text:
            self._deltas.append(Delta("thinking"))
            self._enter("content", tag.end(), self._syntax.newlines_after_close)
        elif not (self._loose and self._step_in_loose(tag)):
            self._emit_content(tag[0])
            self._scanner.at = tag.end()
        return True

    def _step_in_loose(self, tag: Match[str]) -> bool:
        """A tag in content inside a block. Whether it means something."""
        if tag["invoke"]:
            self._enter("block", tag.end())
            self._start_call(tag["invoke"])
            return True
        if not tag["end"]:
            return False
        self._loose = False
        if not self._block_is_empty:
            self._leave_block(tag.end())
        return not self._block_is_empty

    def _step_in_block(self) -> bool:
        """One tag between the calls of a block."""
        self._unclaimed.append(self._scanner.space())
        possible, tag = self._scanner.here(self._syntax.outside)
        if not possible:
            self._give_back()
            return True
        if tag is None:
            return False
        invoke = None if tag["slash"] else INVOKE.fullmatch(tag["body"])
        if invoke and invoke[1]:
            self._scanner.at = tag.end()
            self._start_call(tag[0])
        elif not tag["slash"]:
            self._give_back()
        else:
            self._scanner.at = tag.end()
            self._unclaimed.append(tag[0])
            if tag["body"] == self._syntax.block:
                self._leave_block(tag.end())
        return True

    def _start_call(self, tag: str) -> None:
        match = INVOKE.search(tag)
        assert match is not None, "the tag opens a call"
        self._unclaimed.clear()
        self._block_is_empty = False
        self._call = CallReader(self._family, match[1], self._schemas.get(match[1]))
        self._deltas.append(Delta("call_start", call=ToolCall(match[1], {})))

    def _end_call(self, call: CallReader) -> None:
        self._pass_on(call)
        self._deltas.append(Delta("call_end", call=call.call()))
        self._call = None
        self._emit_content(call.stray())

    def _pass_on(self, call: CallReader) -> None:
        if text := call.take():
            self._deltas.append(Delta("call_arguments", text))

    def _leave_block(self, at: int) -> None:
        """The block is closed; without a call in it, it was content."""
        if self._block_is_empty:
            self._emit_content("".join(self._unclaimed))
        self._unclaimed.clear()
        self._enter("content", at)
        self._after_block = not self._block_is_empty
        self._loose = False

    def _give_back(self) -> None:
        """What was read of the block since its last call, and what follows, is content."""
        text = "".join(self._unclaimed)
        self._unclaimed.clear()
        if self._block_is_empty or not text.isspace():
            self._emit_content(text)
        self._enter("content", self._scanner.at)
        self._loose = True

    def _enter(self, state: Literal["thinking", "content", "block"], at: int, newlines: int = 0) -> None:
        self._state = state
        self._scanner.at = at
        self._newlines = newlines
        self._after_block = False

    def _skip_space(self) -> bool:
        """Pass over the whitespace that belongs to the tag before; False when more of it may come."""
        scanner = self._scanner
        while not scanner.empty and (self._newlines or self._after_block):
            character = scanner.text[scanner.at]
            if not (character == "\n" or (self._after_block and character.isspace())):
                self._newlines, self._after_block = 0, False
                return True
            self._newlines = max(0, self._newlines - 1)
            scanner.at += 1
        return not scanner.empty

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
