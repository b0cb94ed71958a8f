"""Signs of life while a stream waits for its next part."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

__all__ = ["with_silences"]

T = TypeVar("T")


async def with_silences(source: AsyncIterator[T], seconds: float) -> AsyncGenerator[T | None]:
    """The items of `source`, and None whenever none came for so many seconds."""
    waiting: asyncio.Future[T] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(anext(source))
            while not (await asyncio.wait({waiting}, timeout=seconds))[0]:
                yield None
            try:
                item = waiting.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if waiting is not None:
            waiting.cancel()
