"""Server-sent events on their way out: signs of life between them, an end where nobody takes them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

__all__ = ["EventStream", "Patience"]

WAITING = b": waiting\n\n"
"""A comment, which every client skips."""

PIECE = 2**16
"""Most bytes of a write. There is no room for the next one before nearly all of a write was taken: of a long
one, a slow reader would pass for one who takes nothing."""

BURST = 4
"""Writes after which the event loop gets a turn: only then does it tell that the connection was lost."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long a stream waits, in seconds."""

    silence: float = 10.0
    """After so long without an event a sign of life is sent: proxies hang up on what was silent for 60."""
    stall: float = 60.0
    """A write that the reader made no room for in so long ends the stream."""


class EventStream(StreamingResponse):
    """A reply of server-sent events.

    close: called when the stream ends, whether it was read to its end or dropped. sign: a sign of life.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        patience: Patience,
        sign: Callable[[], bytes] = lambda: WAITING,
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._close = close
        self._patience = patience
        self._sign = sign

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()

    async def stream_response(self, send: Send) -> None:
        """Sends the events until they end or nobody takes them."""
        writes = _Writes(send)
        sending = asyncio.ensure_future(super().stream_response(writes.send))
        watching = asyncio.ensure_future(self._watch(writes))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                watching.result()
                logger.warning("a reader took nothing for %g s; its answer was ended", self._patience.stall)
        finally:
            sending.cancel()
            watching.cancel()

    async def _watch(self, writes: "_Writes") -> None:
        """Gives signs of life; returns when a write has waited for too long.

        One task beside the stream, so that an event costs two readings of the clock and no timer.
        """
        silence, stall = self._patience.silence, self._patience.stall
        while True:
            quiet = writes.seconds()
            if writes.pending:
                if quiet >= stall:
                    return
                await asyncio.sleep(min(silence, stall - quiet))
            elif quiet < silence:
                await asyncio.sleep(min(silence - quiet, stall))
            else:
                sign: Message = {"type": "http.response.body", "body": self._sign(), "more_body": True}
                try:
                    async with asyncio.timeout(stall):  # no task of its own, which might write too late
                        await writes.send(sign)
                except TimeoutError:
                    return


class _Writes:
    """What is sent, one part after the other, and since when it is or nothing is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._turn = asyncio.Lock()  # no sign of life between the pieces of an event
        self._now = asyncio.get_running_loop().time
        self._since = self._now()
        self._count = 0

    @property
    def pending(self) -> bool:
        """Whether a write waits for its reader."""
        return self._turn.locked()

    def seconds(self) -> float:
        """How long the present write has waited, or how long ago the last one ended."""
        return self._now() - self._since

    async def send(self, message: Message) -> None:
        """Sends a part of the reply, a large one in pieces; of one without bytes nothing, so that it is no
        sign of life."""
        body, more = message.get("body", b""), message.get("more_body", False)
        if more and not body:
            return
        async with self._turn:
            if not more or len(body) <= PIECE:
                await self._write(message)
                return
            for start in range(0, len(body), PIECE):
                await self._write({**message, "body": body[start : start + PIECE]})

    async def _write(self, message: Message) -> None:
        self._since = self._now()
        try:
            await self._send(message)
        finally:
            self._since = self._now()
        self._count += 1
        if self._count % BURST == 0:
            await asyncio.sleep(0)
