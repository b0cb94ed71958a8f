"""From a generation's tokens to its text: whole characters, without the stop token, cut at a stop string."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from longforge.chat import StreamDecoder, Tokenizer
from longforge.engine import TokenEvent
from longforge.errors import LongforgeError
from longforge.protocol import SamplingParams, StopReason
from longforge.server.engine_loop import EngineLoop
from longforge.server.observed import Observed, Observer, ignore
from longforge.server.stops import StopStrings

__all__ = ["Answer", "Part"]


@dataclass(frozen=True, slots=True)
class Part:
    """What one batch of tokens adds."""

    text: str
    events: list[TokenEvent]
    reason: StopReason | None
    """Set on the last part."""
    pieces: list[str]
    """What each event adds to `text`."""


class Answer:
    """One request to the engine. The request is refused in the constructor or not at all.

    eager: parts come token by token, else all at the end. goes_on: as in `EngineLoop.open`. `close` it when
    done, however done.
    """

    def __init__(
        self,
        loop: EngineLoop,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        stops: Sequence[str] = (),
        eager: bool,
        tenant: str = "",
        priority: int = 0,
        report_blocks: bool = False,
        goes_on: bool = False,
        observer: Observer = ignore,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.cached_tokens = 0
        """Prompt tokens found in the cache; known from the first part on."""
        self.stop_string: str | None = None
        """The stop string that ended the answer."""
        self._loop = loop
        self._observer: Observer | None = observer
        self._outcome = "abort"
        self._decoder = StreamDecoder(tokenizer)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._stops = StopStrings(stops)
        # A stop string must be seen as soon as it is there, or tokens would be generated in vain.
        self._generation = loop.open(
            prompt_ids,
            params,
            eager=eager or bool(stops),
            tenant=tenant,
            priority=priority,
            report_blocks=report_blocks,
            goes_on=goes_on,
        )

    def close(self) -> None:
        """Cancels the generation if it still runs."""
        self._loop.close(self._generation)
        if self._observer is not None:
            generation, observer, self._observer = self._generation, self._observer, None
            arrivals = tuple(generation.arrivals)
            observer(Observed(self._outcome, generation.opened, arrivals, generation.let_in))

    async def parts(self) -> AsyncIterator[Part]:
        """The parts in order; the last one has a reason.

        Errors: EngineError if the engine stops before the end.
        """
        try:
            async for batch in self._generation.batches():
                part = self._part(batch)
                if part.reason is not None:
                    self._outcome = part.reason.value
                    self.close()
                yield part
                if part.reason is not None:
                    return
        except LongforgeError:
            self._outcome = "error"
            raise

    async def whole(self) -> Part:
        """Everything as one part."""
        events: list[TokenEvent] = []
        pieces: list[str] = []
        reason = None
        async for part in self.parts():
            events += part.events
            pieces += part.pieces
            reason = part.reason
        return Part("".join(pieces), events, reason, pieces)

    def _part(self, batch: list[TokenEvent]) -> Part:
        pieces: list[str] = []
        self.cached_tokens = batch[0].cached_tokens
        for place, event in enumerate(batch):
            stopped = event.stop_reason is StopReason.STOP and event.token_id in self._stop_ids
            text = self._stops.push("" if stopped else self._decoder.push((event.token_id,)))
            if event.stop_reason is not None and self._stops.found is None:
                text += self._stops.push(self._decoder.flush()) + self._stops.finish()
            pieces.append(text)
            if self._stops.found is not None:
                self.stop_string = self._stops.found
                return Part("".join(pieces), batch[: place + 1], StopReason.STOP, pieces)
        return Part("".join(pieces), batch, batch[-1].stop_reason, pieces)
