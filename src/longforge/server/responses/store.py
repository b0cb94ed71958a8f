"""Responses that can be asked for again: in memory, bounded, the least recently used go first.

A response is found only by the tenant that made it.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from longforge.server.responses.reply import Reply

__all__ = ["ResponseStore", "Stored"]


@dataclass
class Stored:
    """One response. items: its conversation before its own output, instructions not among them; own: how
    many of these, from the end, were its input."""

    reply: Reply
    items: tuple[dict[str, Any], ...]
    own: int
    cancel: Callable[[], None] = field(default=lambda: None)
    """Ends it if it still runs."""

    @property
    def conversation(self) -> tuple[dict[str, Any], ...]:
        """What a response that follows it continues."""
        return (*self.items, *self.reply.output)

    @property
    def input_items(self) -> tuple[dict[str, Any], ...]:
        """What it was asked with."""
        return self.items[len(self.items) - self.own :]


class ResponseStore:
    """The responses of one server. limit: most responses; characters: most of their conversations together.

    A conversation counts in each of its responses, although they share it: a bound, not a measure.
    """

    def __init__(self, limit: int = 1000, characters: int = 2**28) -> None:
        self._limit = limit
        self._characters = characters
        self._entries: OrderedDict[tuple[str, str], Stored] = OrderedDict()
        self._sizes: dict[tuple[str, str], int] = {}
        self._total = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, tenant: str, stored: Stored) -> None:
        """Keeps a response. Others may go for it, and so may it, if it is larger than all together may be."""
        key = (tenant, stored.reply.id)
        self._drop(key)
        self._entries[key] = stored
        self._sizes[key] = len(json.dumps([stored.reply.body, stored.items]))
        self._total += self._sizes[key]
        while self._entries and (len(self._entries) > self._limit or self._total > self._characters):
            oldest = next(iter(self._entries))
            self._entries[oldest].cancel()
            self._drop(oldest)

    def grew(self, tenant: str, stored: Stored) -> None:
        """Measures a response again, if it is still kept."""
        if (tenant, stored.reply.id) in self._entries:
            self.put(tenant, stored)

    def get(self, tenant: str, name: str) -> Stored | None:
        """The response of that id, if this tenant has it."""
        stored = self._entries.get((tenant, name))
        if stored is not None:
            self._entries.move_to_end((tenant, name))
        return stored

    def delete(self, tenant: str, name: str) -> bool:
        """Forgets a response, and ends it if it still runs. False if there is none."""
        stored = self._entries.get((tenant, name))
        if stored is None:
            return False
        self._drop((tenant, name))
        stored.cancel()
        return True

    def _drop(self, key: tuple[str, str]) -> None:
        if self._entries.pop(key, None) is not None:
            self._total -= self._sizes.pop(key)
