"""A finished answer as the events of a stream, for agents that can only read one."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

from longforge.protocol import Message, StopReason
from longforge.server.replies import (
    DONE,
    ReplyHead,
    chat_chunk,
    chat_delta_tool_call,
    finish_reason,
    sse,
    thinking_fields,
)

__all__ = ["streamed"]


async def streamed(
    head: ReplyHead, message: Message, reason: StopReason, usage: dict[str, Any] | None, split: bool
) -> AsyncIterator[bytes]:
    """The events. usage: of the last chunk, if one was asked for. split: as in `thinking_fields`."""
    rest: dict[str, Any] = {} if usage is None else {"usage": None}
    for delta in _deltas(message, split):
        yield sse(chat_chunk(head, delta) | rest)
    yield sse(chat_chunk(head, {}, finish_reason(reason, tool_calls=bool(message.tool_calls))) | rest)
    if usage is not None:
        yield sse(head.body("chat.completion.chunk", choices=[], usage=usage))
    yield DONE


def _deltas(message: Message, split: bool) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": ""}
    if message.thinking:
        yield thinking_fields(message.thinking, split=split)
    if message.content:
        yield {"content": message.content}
    for index, call in enumerate(message.tool_calls):
        yield chat_delta_tool_call(call, index)
