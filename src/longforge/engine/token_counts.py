"""Which tokens a request has seen, and how often it generated each."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["TokenCounts"]


class TokenCounts:
    """An incremental histogram over the distinct tokens of one request; its room does not depend on the
    vocabulary.

    prompt: the prompt's token ids, seen but not generated.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        ids = sorted(set(prompt))
        self._slots = {token: slot for slot, token in enumerate(ids)}
        self._ids = np.array(ids, dtype=np.int64)
        self._generated = np.zeros(len(ids), dtype=np.int64)

    def add(self, token: int) -> None:
        """Counts one generated token."""
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = len(self._slots)
            if slot == len(self._ids):  # full: twice the room, so that adding costs a constant on average
                room = np.zeros(max(16, slot), dtype=np.int64)
                self._ids = np.concatenate((self._ids, room))
                self._generated = np.concatenate((self._generated, room))
            self._ids[slot] = token
        self._generated[slot] += 1

    def arrays(self, drafts: Sequence[int] = ()) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(distinct token ids, how often each was generated), int64 [E] each, as if `drafts` had been added.

        Without drafts these are views, valid until the next `add`.
        """
        size = len(self._slots)
        ids, generated = self._ids[:size], self._generated[:size]
        if not drafts:
            return ids, generated
        unseen = [token for token in dict.fromkeys(drafts) if token not in self._slots]
        slots = {token: size + at for at, token in enumerate(unseen)}
        ids = np.concatenate((ids, np.array(unseen, dtype=np.int64)))
        generated = np.concatenate((generated, np.zeros(len(unseen), dtype=np.int64)))
        for token in drafts:
            generated[slots[token] if token in slots else self._slots[token]] += 1
        return ids, generated
