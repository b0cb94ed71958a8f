"""An answer in the Messages dialect: its stream of events, and the whole message, which is those events put
together.

Choices: `message_start` waits for the first token, so that its usage is true; before it a stream that waits
sends comments. `cache_creation_input_tokens` is 0: pages are kept as a by-product and nothing is charged for
them. An answer that fills the model's context ends with `model_context_window_exceeded`.
"""

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from longforge.chat.parser import Delta
from longforge.protocol import StopReason
from longforge.server.seal import Seal

__all__ = [
    "BlockEvents",
    "Event",
    "Usage",
    "Writer",
    "error_body",
    "message_of_events",
    "start",
    "stop_reason",
]

Event = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Tokens that an answer took."""

    prompt: int
    cached: int
    completion: int

    @property
    def body(self) -> dict[str, int]:
        """`input_tokens` are those that were not found in the cache."""
        return {
            "input_tokens": self.prompt - self.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self.cached,
            "output_tokens": self.completion,
        }


@dataclass(frozen=True)
class Writer:
    """What is needed to write thinking down. hidden: only inside its mark. drops_empty: a thought that was
    skipped is no block, since none was asked for."""

    seal: Seal
    hidden: bool = False
    drops_empty: bool = False


@dataclass
class BlockEvents:
    """Events of the content blocks, one block after the other.

    version: of the weights that wrote last; the caller keeps it up to date.
    """

    writer: Writer
    version: int = 0
    blocks: int = 0
    """Blocks that were opened so far."""
    _open: Literal["thinking", "text", "tool_use"] | None = None
    _thought: str = ""
    _late: list[Delta] = field(default_factory=list)
    """What came while the block of a call was open; it must not interleave."""

    def push(self, deltas: Iterable[Delta]) -> Iterator[Event]:
        """Events of the next deltas."""
        for delta in deltas:
            if self._open == "tool_use" and delta.kind in ("thinking", "content"):
                self._late.append(delta)
                continue
            yield from self._one(delta)
            if delta.kind == "call_end":
                late, self._late = self._late, []
                yield from self.push(late)

    def finish(self) -> Iterator[Event]:
        """The end of the last block. An answer without any block gets an empty text."""
        yield from self._close()
        yield from self.push(self._late)
        yield from self._close()
        if not self.blocks:
            yield from self._start("text", {"type": "text", "text": ""})
            yield from self._close()

    def _one(self, delta: Delta) -> Iterator[Event]:
        if delta.kind == "call_start":
            assert delta.call is not None, "a call starts with its name"
            block = {"type": "tool_use", "id": delta.call.id, "name": delta.call.name, "input": {}}
            yield from self._start("tool_use", block)
        elif delta.kind == "call_arguments":
            yield self._delta({"type": "input_json_delta", "partial_json": delta.text})
        elif delta.kind == "call_end":
            yield from self._close()
        elif delta.kind == "content":
            if self._open != "text":
                yield from self._start("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": delta.text})
        else:
            yield from self._think(delta.text)

    def _think(self, text: str) -> Iterator[Event]:
        if self._open != "thinking":
            if self.writer.drops_empty and not text:
                return
            yield from self._start("thinking", {"type": "thinking", "thinking": "", "signature": ""})
        self._thought += text
        if text and not self.writer.hidden:
            yield self._delta({"type": "thinking_delta", "thinking": text})

    def _start(self, kind: Literal["thinking", "text", "tool_use"], block: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self._open = kind
        self.blocks += 1
        yield {"type": "content_block_start", "index": self.blocks - 1, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self.blocks - 1, "delta": delta}

    def _close(self) -> Iterator[Event]:
        if self._open is None:
            return
        if self._open == "thinking":
            make = self.writer.seal.wrap if self.writer.hidden else self.writer.seal.sign
            yield self._delta({"type": "signature_delta", "signature": make(self._thought, self.version)})
            self._thought = ""
        self._open = None
        yield {"type": "content_block_stop", "index": self.blocks - 1}


def start(model: str, usage: Usage) -> Event:
    """The first event of a stream."""
    message = {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage.body,
    }
    return {"type": "message_start", "message": message}


def stop_reason(reason: StopReason, usage: Usage, limit: int, stop_string: str | None, calls: int) -> Event:
    """The event that says why the answer ended. limit: most tokens it might have had."""
    if reason is StopReason.LENGTH:
        word = "max_tokens" if usage.completion >= limit else "model_context_window_exceeded"
    elif stop_string is not None:
        word = "stop_sequence"
    else:
        word = "tool_use" if calls else "end_turn"
    delta = {"stop_reason": word, "stop_sequence": stop_string}
    return {"type": "message_delta", "delta": delta, "usage": usage.body}


def message_of_events(events: Sequence[Event]) -> dict[str, Any]:
    """The whole message that a stream of these events tells, from message_start to message_delta."""
    message: dict[str, Any] = dict(events[0]["message"])
    blocks: list[dict[str, Any]] = []
    arguments: dict[int, str] = {}
    for event in events[1:]:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            if delta["type"] == "input_json_delta":
                arguments[event["index"]] = arguments.get(event["index"], "") + delta["partial_json"]
            else:
                name = delta["type"].removesuffix("_delta")
                block[name] += delta[name]
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    for place, text in arguments.items():
        blocks[place]["input"] = json.loads(text)
    return message | {"content": blocks}


def error_body(message: str, kind: str) -> dict[str, Any]:
    """An error in Anthropic's form; also the event of one."""
    return {"type": "error", "error": {"type": kind, "message": message}}
