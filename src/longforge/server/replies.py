"""Reply bodies of the OpenAI dialect, whole and in chunks. The forge gateway builds its replies here too."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from longforge.protocol import Message, StopReason, ToolCall
from longforge.server.wire import message_body, tool_call_body
from longforge.server.wire_bytes import json_bytes

__all__ = [
    "DONE",
    "ReplyHead",
    "chat_body",
    "chat_choice",
    "chat_chunk",
    "chat_delta_tool_call",
    "error_body",
    "finish_reason",
    "new_call_id",
    "reply_message",
    "sse",
    "thinking_fields",
    "usage_body",
]

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class ReplyHead:
    """What all bodies of one reply share."""

    model: str
    prefix: str
    """Start of the id: "chatcmpl" or "cmpl"."""
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", f"{self.prefix}-{uuid.uuid4().hex}")

    def body(self, kind: str, **rest: Any) -> dict[str, Any]:
        """A body of object type `kind`."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **rest}


def new_call_id() -> str:
    """A fresh id of a tool call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def sse(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json_bytes(body) + b"\n\n"


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage_body(
    prompt_tokens: int, completion_tokens: int, *, cached_tokens: int = 0, thinking_tokens: int | None = None
) -> dict[str, Any]:
    """Tokens that a reply took.

    cached_tokens: of the prompt, found in the caller's own cache. thinking_tokens: of the answer, if known.
    """
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    if thinking_tokens is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": thinking_tokens}
    return usage


def finish_reason(reason: StopReason, *, tool_calls: bool = False, named: bool = False) -> str:
    """OpenAI's word. A length stop stays one even after complete tool calls.

    named: the request named the tool; then the word is "stop", as OpenAI has it.
    """
    if reason is StopReason.LENGTH:
        return "length"
    return "tool_calls" if tool_calls and not named else "stop"


def thinking_fields(text: str, *, split: bool = False) -> dict[str, Any]:
    """Thinking under each name that clients read it by.

    split: in MiniMax's `reasoning_details` form too.
    """
    fields: dict[str, Any] = {"reasoning_content": text, "reasoning": text}
    if split:
        detail = {"type": "reasoning.text", "id": "reasoning-text-1", "index": 0, "text": text}
        fields["reasoning_details"] = [{**detail, "format": "MiniMax-response-v1"}]
    return fields


def reply_message(message: Message, *, split: bool = False) -> dict[str, Any]:
    """The assistant's message in a reply."""
    thinking = {} if message.thinking is None else thinking_fields(message.thinking, split=split)
    return message_body(message) | thinking


def chat_choice(
    message: dict[str, Any], finish: str, *, index: int = 0, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One choice of a whole chat reply."""
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}


def chat_body(head: ReplyHead, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
    """A whole chat reply."""
    return head.body("chat.completion", choices=choices, usage=usage)


def chat_chunk(
    head: ReplyHead,
    delta: dict[str, Any],
    finish: str | None = None,
    *,
    index: int = 0,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One chunk of a chat stream. `finish_reason` is present and null on all but the last."""
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return head.body("chat.completion.chunk", choices=[choice])


def chat_delta_tool_call(call: ToolCall, index: int) -> dict[str, Any]:
    """The delta that carries a whole tool call."""
    return {"tool_calls": [{"index": index, **tool_call_body(call)}]}
