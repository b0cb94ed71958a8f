"""Several answers read together."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.exceptions import HTTPException

from longforge.errors import InputError
from longforge.server.choices import all_of, merged, open_all


class Answer:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("error", [InputError("no"), HTTPException(403), RuntimeError("a bug")])
def test_when_one_is_refused_the_others_are_closed(error: Exception):
    first = Answer()

    def refused() -> Answer:
        raise error

    with pytest.raises(type(error)):
        open_all([lambda: first, refused])
    assert first.closed


async def counting(count: int, taken: list[int] | None = None) -> AsyncIterator[int]:
    for number in range(count):
        if taken is not None:
            taken.append(number)
        yield number
        await asyncio.sleep(0)


def test_merged_streams_lose_nothing_and_keep_each_ones_order():
    async def read() -> list[tuple[int, int]]:
        return [item async for item in merged([counting(3), counting(0), counting(5)])]

    items = asyncio.run(read())
    assert [value for place, value in items if place == 0] == [0, 1, 2]
    assert [value for place, value in items if place == 2] == [0, 1, 2, 3, 4]
    assert len(items) == 8


def test_a_slow_reader_holds_one_item_of_each_stream():
    async def read() -> list[int]:
        taken: list[int] = []
        streams = merged([counting(50, taken), counting(50, taken)])
        await anext(streams)
        for _ in range(100):
            await asyncio.sleep(0)
        await streams.aclose()
        return taken

    assert len(asyncio.run(read())) <= 2


async def failing() -> AsyncIterator[int]:
    yield 1
    raise InputError("broken")


def test_an_error_of_one_ends_all():
    async def read() -> None:
        async for _ in merged([failing(), counting(10**9)]):
            pass

    with pytest.raises(InputError, match="broken"):
        asyncio.run(read())


def test_of_whole_answers_an_error_cancels_the_others():
    async def never() -> int:
        await asyncio.Event().wait()
        return 1

    async def fails() -> int:
        raise InputError("broken")

    async def scenario() -> int:
        with pytest.raises(InputError, match="broken"):
            await all_of([never(), fails()])
        await asyncio.sleep(0)
        return len(asyncio.all_tasks())

    assert asyncio.run(scenario()) == 1, "only the scenario itself is left"
