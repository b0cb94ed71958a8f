"""Several answers to one request, read together."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

__all__ = ["Closable", "all_of", "close_all", "merged", "open_all"]

T = TypeVar("T")


class Closable(Protocol):
    """An answer."""

    def close(self) -> None:
        """Cancels it if it still runs."""
        ...


C = TypeVar("C", bound=Closable)


def open_all(openers: Sequence[Callable[[], C]]) -> list[C]:
    """All of them, or none: what is refused closes those that were opened before it."""
    opened: list[C] = []
    try:
        for opener in openers:
            opened.append(opener())
    except BaseException:
        close_all(opened)
        raise
    return opened


def close_all(answers: Sequence[Closable]) -> None:
    """Closes each."""
    for answer in answers:
        answer.close()


async def all_of(answers: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order. An error of one ends all."""
    tasks = [asyncio.ensure_future(answer) for answer in answers]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def merged(streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """What the streams give, with the place of the stream, as it comes.

    A stream is asked for its next item only after the last was taken, so that a slow reader holds at most one
    item of each. An error of one ends all.
    """
    if len(streams) == 1:
        async for item in streams[0]:
            yield 0, item
        return
    waiting: dict[asyncio.Task[Any], int] = {
        asyncio.create_task(_next(stream)): place for place, stream in enumerate(streams)
    }
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                place = waiting.pop(task)
                for item in task.result():
                    yield place, item
                    waiting[asyncio.create_task(_next(streams[place]))] = place
    finally:
        for task in waiting:
            task.cancel()


async def _next(stream: AsyncIterator[T]) -> tuple[T, ...]:
    """The next item alone, or nothing at the end."""
    async for item in stream:
        return (item,)
    return ()
