"""The engine in a thread of its own, seen from asyncio.

The engine thread is the only one that touches the engine. It takes commands (submit, cancel, swap) between
steps and hands tokens over through one wake-up per step, however many requests got one. A reader that wants
only the whole answer is woken only at its end, so that it costs the step nothing.
"""

import asyncio
import contextlib
import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from longforge.engine import Engine, EngineStats, GenerationRequest, RequestFailed, TokenEvent
from longforge.errors import EngineError, LongforgeError, Overloaded
from longforge.protocol import SamplingParams
from longforge.server.generation import Generation
from longforge.server.page_watch import PageWatch

__all__ = ["EngineLoop", "Generation"]

FAILED = "engine: it has failed, see the server's log"


class EngineLoop:
    """Owns an engine. Methods are called from the asyncio loop in which `start` was called.

    threads: CPU threads of the engine (None: as torch is set). max_requests, max_tokens: most open requests,
    and most prompt tokens of open requests together; what is beyond is refused at once.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        threads: int | None = None,
        max_requests: int = 1024,
        max_tokens: int = 64_000_000,
    ) -> None:
        self.engine = engine
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self._threads = threads
        self._open: dict[str, int] = {}
        """Prompt tokens of each open request; only the asyncio side reads and writes it."""
        self._open_tokens = 0
        self._paused = False
        self._draining = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._names = itertools.count()
        self._lock = threading.Lock()  # guards _commands and _closed
        self._commands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._closed: EngineError | None = None
        self._crashed = False
        self._wake = threading.Event()
        self._stopping = False
        self._watch = PageWatch(engine.check_pages)
        self._generations: dict[str, Generation] = {}
        """Open generations; only the engine thread reads and writes it."""

    @property
    def failure(self) -> EngineError | None:
        """Why nothing is served any more, or None."""
        return self._closed

    @property
    def crashed(self) -> bool:
        """Whether the engine has ended by a bug; nothing will be served any more."""
        return self._crashed

    @property
    def page_check_failures(self) -> int:
        """How often the accounts of the pages did not add up when the engine had nothing to do."""
        return self._watch.failures

    def start(self) -> None:
        """Starts the engine thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the present step; open generations end with an EngineError."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()

    def open(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        eager: bool = True,
        tenant: str = "",
        priority: int = 0,
        cache: bool = True,
        report_blocks: bool = False,
        goes_on: bool = False,
    ) -> Generation:
        """Submits a request. eager: wake the reader at each token, not only at the end. goes_on: it is the
        rest of an answer that was let in before, which no limit and no drain breaks off. The others as in
        `GenerationRequest`.

        Errors: what `Engine.submit` refuses, at once; Overloaded; EngineError when the engine has stopped.
        """
        request = GenerationRequest(
            f"request-{next(self._names)}", tuple(prompt_ids), params, tenant, priority, cache, report_blocks
        )
        self.engine.check(request)
        if not goes_on:
            self._admit(request)
        self._open[request.id] = len(request.prompt_ids)
        self._open_tokens += len(request.prompt_ids)
        generation = Generation(request, eager=eager)

        def submit() -> None:
            self.engine.submit(request)
            self._generations[request.id] = generation

        try:
            submitted = self._command(submit)
        except EngineError:
            self._forget(request.id)
            raise
        submitted.add_done_callback(functools.partial(self._refused, generation))
        return generation

    def close(self, generation: Generation) -> None:
        """Cancels what is still running. Harmless at any time."""
        name = generation.request.id
        self._forget(name)

        def cancel() -> None:
            if self._generations.pop(name, None) is not None:
                self.engine.cancel(name)

        if not generation.ended:
            with contextlib.suppress(EngineError):  # the engine has stopped: nothing is left to cancel
                self._command(cancel)

    def pause(self) -> None:
        """Computes nothing more until `resume`; open requests keep their pages and wait, new ones queue."""
        self._paused = True

    def resume(self) -> None:
        """Goes on after `pause`."""
        self._paused = False
        self._wake.set()

    async def abort(self) -> None:
        """Ends every open request with an EngineError, between two steps."""

        def cancel_all() -> None:
            aborted, self._generations = list(self._generations.values()), {}
            for generation in aborted:
                self.engine.cancel(generation.request.id)
                generation.fail(EngineError("engine: the operator has paused it and ended open requests"))
            self._announce(aborted)

        await asyncio.wrap_future(self._command(cancel_all))

    @property
    def paused(self) -> bool:
        """Whether it was told to pause."""
        return self._paused

    @property
    def open_requests(self) -> int:
        """Requests that were accepted and not closed yet."""
        return len(self._open)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the server is about to end."""
        return self._draining

    def drain(self) -> None:
        """Refuses new requests from now on; those that are open go on."""
        self._draining = True

    async def swap_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """`Engine.swap_weights` between two steps; returns when the new weights are active."""
        await asyncio.wrap_future(self._command(lambda: self.engine.swap_weights(state, version)))

    async def reset_cache(self) -> int:
        """`Engine.reset_cache` between two steps. Returns how many pages were forgotten."""
        forgotten: list[int] = []
        await asyncio.wrap_future(self._command(lambda: forgotten.append(self.engine.reset_cache())))
        return forgotten[0]

    def stats(self) -> EngineStats:
        """Counters of the engine, at most one step old."""
        return self.engine.stats()

    def _admit(self, request: GenerationRequest) -> None:
        tokens = len(request.prompt_ids)
        if self._draining:
            raise Overloaded("server: it is shutting down and takes no new requests")
        if len(self._open) >= self.max_requests:
            raise Overloaded(f"server: {self.max_requests} requests are open already; try again later")
        if self._open and self._open_tokens + tokens > self.max_tokens:
            raise Overloaded(
                f"server: prompts of {self._open_tokens} tokens are open already, {tokens} more would pass "
                f"{self.max_tokens}; try again later"
            )

    def _forget(self, name: str) -> None:
        self._open_tokens -= self._open.pop(name, 0)

    def _command(self, action: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        with self._lock:
            if self._closed is not None:
                raise EngineError(*self._closed.args)  # a new one: a traceback grows with each raise
            self._commands.append((action, future))
        self._wake.set()
        return future

    # The engine thread.

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        reason = FAILED
        try:
            while not self._stopping:
                self._wake.clear()
                self._obey()
                if self.engine.has_work and not self._paused:
                    self._deliver(self.engine.step())
                    self._watch.worked()
                elif not self._stopping:
                    if not self.engine.has_work:
                        self._watch.check(self._wake)
                    self._wake.wait()
            reason = "engine: the server is shutting down"
        finally:
            self._crashed = reason is FAILED
            self._shut(EngineError(reason))

    def _obey(self) -> None:
        while True:
            with self._lock:
                if not self._commands:
                    return
                action, future = self._commands.popleft()
            if not future.set_running_or_notify_cancel():
                continue  # who asked for it has gone
            try:
                action()
            except LongforgeError as error:
                future.set_exception(error)
            else:
                future.set_result(None)
            finally:
                if not future.done():
                    future.set_exception(EngineError(FAILED))

    def _refused(self, generation: Generation, submitted: Future[None]) -> None:
        error = submitted.exception()
        if error is not None:
            assert isinstance(error, LongforgeError), "commands fail on purpose or as EngineError"
            generation.fail(error)
            self._announce([generation])

    def _deliver(self, events: Sequence[TokenEvent | RequestFailed]) -> None:
        news: list[Generation] = []
        now = time.perf_counter()
        for name, let_in in self.engine.let_in.items():
            self._generations[name].let_in = let_in
        for event in events:
            generation = self._generations[event.request_id]
            generation.take(event, now)
            if generation.ended:
                del self._generations[event.request_id]
            if generation.eager or generation.ended:
                news.append(generation)
        if news:
            self._announce(news)

    def _shut(self, error: EngineError) -> None:
        with self._lock:
            self._closed = error
            left = [future for _, future in self._commands]
            self._commands.clear()
        for future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        for generation in self._generations.values():
            generation.fail(error)
        self._announce(list(self._generations.values()))

    def _announce(self, generations: list[Generation]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_wake_readers, generations)


def _wake_readers(generations: list[Generation]) -> None:
    for generation in generations:
        generation.wake()
