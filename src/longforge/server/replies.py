"""Reply bodies of the OpenAI dialect, whole and in chunks. The forge gateway builds its replies here too."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from longforge.protocol import Message, StopReason, ToolCall
from longforge.server.wire import message_body, tool_call_body

__all__ = [
    "DONE",
    "ReplyHead",
    "TokenRecord",
    "chat_body",
    "chat_chunk",
    "chat_delta_tool_call",
    "completion_body",
    "completion_choice",
    "error_body",
    "finish_reason",
    "new_call_id",
    "sse",
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


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What a completion tells about one sampled token."""

    token_id: int
    text: str
    logprob: float
    version: int
    top: tuple[tuple[str, float], ...] = ()


def new_call_id() -> str:
    """A fresh id of a tool call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def sse(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage_body(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens that a reply took."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def finish_reason(reason: StopReason, *, tool_calls: bool = False) -> str:
    """OpenAI's word. A length stop stays one even after complete tool calls."""
    if reason is StopReason.LENGTH:
        return "length"
    return "tool_calls" if tool_calls else "stop"


def chat_body(head: ReplyHead, message: Message, reason: StopReason, usage: dict[str, int]) -> dict[str, Any]:
    """A whole chat reply."""
    choice = {
        "index": 0,
        "message": message_body(message),
        "logprobs": None,
        "finish_reason": finish_reason(reason, tool_calls=bool(message.tool_calls)),
    }
    return head.body("chat.completion", choices=[choice], usage=usage)


def chat_chunk(head: ReplyHead, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """One chunk of a chat stream. `finish_reason` is present and null on all but the last."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return head.body("chat.completion.chunk", choices=[choice])


def chat_delta_tool_call(call: ToolCall, index: int) -> dict[str, Any]:
    """The delta that carries a whole tool call."""
    return {"tool_calls": [{"index": index, **tool_call_body(call)}]}


def completion_body(head: ReplyHead, choice: dict[str, Any], usage: dict[str, int] | None) -> dict[str, Any]:
    """A completion reply, or one chunk of it (`usage` None)."""
    return head.body("text_completion", choices=[choice], usage=usage)


def completion_choice(
    text: str,
    records: Sequence[TokenRecord],
    reason: StopReason | None,
    *,
    logprobs: int | None,
    return_token_ids: bool,
    prompt_ids: Sequence[int] | None,
    offset: int = 0,
) -> dict[str, Any]:
    """The one choice of a completion.

    records: the sampled tokens, a stop token among them; text: without the stop token or stop string.
    logprobs: how many alternatives were asked for (None: no log-probabilities). prompt_ids: given with
    `return_token_ids`, once per reply. offset: characters of the reply before this chunk.
    """
    choice: dict[str, Any] = {
        "index": 0,
        "text": text,
        "logprobs": None,
        "finish_reason": None if reason is None else finish_reason(reason),
        "weight_versions": [record.version for record in records],
    }
    if logprobs is not None:
        offsets = [offset]
        for record in records[:-1]:
            offsets.append(offsets[-1] + len(record.text))
        choice["logprobs"] = {
            "tokens": [record.text for record in records],
            "token_logprobs": [record.logprob for record in records],
            "top_logprobs": [dict(record.top) for record in records] if logprobs else None,
            "text_offset": offsets[: len(records)],
        }
    if return_token_ids:
        choice["token_ids"] = [record.token_id for record in records]
        if prompt_ids is not None:
            choice["prompt_token_ids"] = list(prompt_ids)
    return choice
