"""One response in the making: from the parts of a turn to events and to the response object."""

from collections.abc import Iterator

from longforge.errors import LongforgeError
from longforge.protocol import StopReason
from longforge.server.responses.events import Event, ItemEvents
from longforge.server.responses.reply import Reply, usage_body
from longforge.server.seal import Seal
from longforge.server.turn import Turn, TurnPart

__all__ = ["Answering"]


class Answering:
    """Turns parts into events with sequence numbers, and keeps `reply` up to date."""

    def __init__(self, turn: Turn, reply: Reply, seal: Seal) -> None:
        self.turn = turn
        self.reply = reply
        asked = reply.request
        self._items = ItemEvents(
            seal if asked.seals else None, drops_empty=asked.thinking_mode == "disabled", output=reply.output
        )
        self._sequence = 0

    def begin(self) -> Iterator[Event]:
        """The events that come first."""
        yield self._state("response.created")
        yield self._state("response.in_progress")

    def take(self, part: TurnPart) -> Iterator[Event]:
        """The events of one part; after the last the reply has ended."""
        if part.events:
            self._items.version = part.events[-1].version
        for event in self._items.push(part.deltas):
            yield self._numbered(event)
        if part.reason is None:
            return
        cut = part.reason is StopReason.LENGTH
        for event in self._items.finish(cut=cut):
            yield self._numbered(event)
        turn = self.turn
        usage = usage_body(turn.prompt_ids, turn.cached_tokens, turn.completion_tokens, turn.thinking_tokens)
        self.reply.end(cut=cut, usage=usage)
        yield self._state("response.incomplete" if cut else "response.completed")

    def fail(self, error: LongforgeError) -> Event:
        """The event of an answer that was broken off."""
        self.reply.fail(error)
        return self._state("response.failed")

    def _state(self, kind: str) -> Event:
        return self._numbered({"type": kind, "response": self.reply.body})

    def _numbered(self, event: Event) -> Event:
        self._sequence += 1
        return {**event, "sequence_number": self._sequence - 1}
