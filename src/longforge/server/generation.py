"""The tokens of one request on their way from the engine's thread to who reads them."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator

from longforge.engine import GenerationRequest, RequestFailed, TokenEvent
from longforge.errors import LongforgeError

__all__ = ["Generation"]


class Generation:
    """The tokens of one request as they come.

    Read by one task; `EngineLoop.close` it when done, however done.
    """

    def __init__(self, request: GenerationRequest, *, eager: bool) -> None:
        self.request = request
        self.eager = eager
        self.opened = time.perf_counter()
        self.let_in: float | None = None
        """When the scheduler first let it in, once it has; the same clock."""
        self.arrivals: list[float] = []
        """When each token came, in seconds of `time.perf_counter`; the last may still be on its way to the
        reader."""
        self._events: deque[TokenEvent] = deque()
        self._news = asyncio.Event()
        self._error: LongforgeError | None = None
        self.ended = False
        """Whether nothing more comes from the engine."""

    def take(self, event: TokenEvent | RequestFailed, now: float) -> None:
        """What came of a step, at `now` of `time.perf_counter`. For the engine's thread."""
        if isinstance(event, RequestFailed):
            self.fail(event.error)
            return
        self._events.append(event)
        self.arrivals.append(now)
        self.ended = event.stop_reason is not None

    def fail(self, error: LongforgeError) -> None:
        """It ends here. For the engine's thread."""
        self._error = error
        self.ended = True

    def wake(self) -> None:
        """Lets its reader look. For the asyncio loop."""
        self._news.set()

    async def batches(self) -> AsyncIterator[list[TokenEvent]]:
        """What has come since the last time, until the token with a stop reason.

        If not eager, one batch with everything. Errors: EngineError if the engine stops before the end.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            batch = [self._events.popleft() for _ in range(len(self._events))]
            if batch:
                yield batch
                if batch[-1].stop_reason is not None:
                    return
            if self._error is not None:
                raise self._error
