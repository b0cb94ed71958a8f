"""From a request's texts to token ids. Long ones are encoded in a thread, so that other answers go on."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from longforge.chat import ThinkingMode, Tokenizer, encode_prompt
from longforge.chat.tokenizer import LONG_TEXT
from longforge.protocol import Message, ToolSpec
from longforge.server.service import Service

__all__ = ["encoded_conversation", "encoded_texts"]

T = TypeVar("T")


async def encoded_texts(tokenizer: Tokenizer, texts: Sequence[str], context: int) -> list[list[int]]:
    """The ids of each text. ContextOverflow if one of them can never fit `context` tokens."""

    def encode() -> list[list[int]]:
        for text in texts:
            tokenizer.check_fits([text], context)
        return [tokenizer.encode(text) for text in texts]

    return await _where_it_holds_nobody_up(sum(map(len, texts)), encode)


async def encoded_conversation(
    service: Service,
    messages: Sequence[Message],
    tools: Sequence[ToolSpec],
    thinking: ThinkingMode,
    *,
    context: int | None,
) -> list[int]:
    """The prompt's ids. context: as in `encode_prompt`."""

    def encode() -> list[int]:
        family = service.loop.engine.config.family
        return encode_prompt(
            service.tokenizer, messages, tools, family=family, thinking=thinking, context=context
        )

    return await _where_it_holds_nobody_up(_characters(messages, tools), encode)


async def _where_it_holds_nobody_up(characters: int, encode: Callable[[], T]) -> T:
    return await asyncio.to_thread(encode) if characters >= LONG_TEXT else encode()


def _characters(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> int:
    """About as many as the prompt will have; the template takes time for each message too."""
    said = sum(40 + len(message.content) + len(message.thinking or "") for message in messages)
    called = sum(len(repr(call.arguments)) for message in messages for call in message.tool_calls)
    offered = sum(len(tool.description) + len(repr(tool.parameters)) for tool in tools)
    return said + called + offered
