"""Which tokens go through the model in the next step: continuous batching with one rule.

A sequence has tokens that are known and tokens that are computed, and a step lets the computed ones catch up
under the budget. (Rule from vLLM's v1 scheduler.) A prompt, a chunk of one, the rest of a prompt behind a
prefix hit, a sequence that comes back after preemption, and the verification of drafts are all this rule.

Sequences are ordered by priority, then arrival. Each step first gives those that generate their one token and
their drafts, then spends what is left on longer stretches, in order. Pages are taken as they are needed. When
none can be had, the last sequence in the order is preempted: its pages go back (those that are full stay in
the prefix cache), it waits again and is recomputed later. So the first in the order always goes on, and
since the door refuses what could never fit, everything ends.

The head of the waiting line is never overtaken. It is let in when a row is free and its known tokens fit
beside what runs; a head of a strictly better priority pushes out the last of those that run.
"""

import heapq
import time
from bisect import insort
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from longforge.engine.prefix_cache import PrefixCache
from longforge.engine.sequence import Sequence

__all__ = ["Scheduler", "Work"]


class Work(NamedTuple):
    """The next `tokens` uncomputed tokens of a sequence and, behind them, its drafts.

    `samples` if the tokens are the last known ones; only then are there drafts.
    """

    sequence: Sequence
    tokens: int
    drafts: tuple[int, ...]
    samples: bool


class Restorer(Protocol):
    """Brings pages that left the pool back into it."""

    def __call__(self, sequence: Sequence, pages: list[int], most: int) -> list[int]:
        """Pages behind `pages` on the sequence's path, held for it, at most `most`."""
        ...


class Scheduler:
    """Queues, rows and pages of requests. Knows nothing of tensors.

    spare: positions behind the known tokens and drafts for which pages are kept ready (new drafts). clock: in
    seconds; tells when a sequence is first let in.
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        max_running: int,
        max_batch_tokens: int,
        spare: int = 0,
        restore: Restorer | None = None,
        on_preempt: Callable[[Sequence], None] = lambda sequence: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._cache = cache
        self._block_size = cache.block_size
        self._max_batch_tokens = max_batch_tokens
        self._spare = spare
        self._restore = restore
        self._on_preempt = on_preempt
        self._clock = clock
        self._free_rows = list(range(max_running - 1, -1, -1))
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # heap
        self.running: list[Sequence] = []
        """In order."""
        self.preemptions = 0
        self.queried_tokens = 0
        self.hit_tokens = 0

    @property
    def waiting(self) -> int:
        """Sequences that wait to be let in."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Lets a sequence wait."""
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, waiting or running, and gives its row and all its pages back."""
        if sequence.row >= 0:
            self._stop(sequence)
            return
        self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
        heapq.heapify(self._waiting)

    def schedule(self) -> list[Work]:
        """The next step's work, at most `max_batch_tokens` tokens, drafts among them."""
        work: dict[Sequence, Work] = {}
        budget = self._max_batch_tokens
        for generating in (True, False):
            if len(work) == len(self.running):
                break
            for sequence in tuple(self.running):
                if budget > 0 and sequence.row >= 0 and self._generates(sequence) == generating:
                    budget -= self._give(sequence, budget, work)
        while budget > 0 and self._waiting and self._let_in(work):
            budget -= self._give(self._newest, budget, work)
        return list(work.values())

    def publish(self, sequence: Sequence) -> list[int]:
        """Makes the pages that a sequence has filled known to others. Returns the pages that changed."""
        changed = []
        while sequence.root is not None and (sequence.published + 1) * self._block_size <= sequence.computed:
            block = sequence.published
            before = sequence.pages[block - 1] if block else None
            own = sequence.pages[block]
            page = self._cache.add(sequence.root, before, sequence.block_ids(block, self._block_size), own)
            if page != own:
                sequence.pages[block] = page
                changed.append(block)
            sequence.published += 1
        return changed

    def _generates(self, sequence: Sequence) -> bool:
        return sequence.known - sequence.computed == 1 and sequence.generated > 0

    def _give(self, sequence: Sequence, budget: int, work: dict[Sequence, Work]) -> int:
        """Plans a sequence's next tokens; returns how many of the budget that takes, drafts included."""
        left = sequence.known - sequence.computed
        tokens = min(left, budget)
        # Drafts leave a token for each that runs and has none yet.
        others = len(self.running) - len(work) - 1
        drafts = sequence.drafts[: max(0, budget - tokens - others)] if tokens == left else ()
        if tokens == 0 or not self._make_room(sequence, sequence.computed + tokens + len(drafts), work):
            return 0
        work[sequence] = Work(sequence, tokens, drafts, tokens == left)
        return tokens + len(drafts)

    def _make_room(self, sequence: Sequence, positions: int, work: dict[Sequence, Work]) -> bool:
        """Takes the pages for `positions` tokens, preempting from the end of the order. False if it had to
        go itself."""
        if positions + self._spare <= len(sequence.pages) * self._block_size:
            return True
        # The last token is never fed back, so its key needs no slot.
        positions = min(positions + self._spare, sequence.limit - 1)
        short = -(-positions // self._block_size) - len(sequence.pages)
        while short > self._cache.available:
            last = self.running[-1]
            self._preempt(last)
            work.pop(last, None)
            if last is sequence:
                return False
        if short > 0:
            sequence.pages += self._cache.take(short)
        return True

    def _let_in(self, work: dict[Sequence, Work]) -> bool:
        """Lets the head of the line in, if it can be."""
        head = self._waiting[0][1]
        while not self._admit(head):
            last = self.running[-1] if self.running else None
            if last is None or last.request.priority <= head.request.priority:
                return False
            self._preempt(last)
            work.pop(last, None)
            if self._waiting[0][1] is not head:
                return False
        heapq.heappop(self._waiting)
        insort(self.running, head, key=lambda s: s.order)
        self._newest = head
        return True

    def _admit(self, sequence: Sequence) -> bool:
        if not self._free_rows:
            return False
        found = self._find(sequence)
        self._cache.hold(found)
        positions = min(sequence.known + self._spare, sequence.limit - 1)
        needed = -(-positions // self._block_size) - len(found)
        # Beside others, a page for each of them is left, so that the next step need not push this one out.
        if needed + len(self.running) * bool(self.running) > self._cache.available:
            self._cache.release(found)
            return False
        found += self._restored(sequence, found)
        # Who comes back finds its own pages.
        if sequence.let_in is None:
            sequence.let_in = self._clock()
            self._count_found(sequence, len(found))
        sequence.pages = found
        sequence.published = len(found)
        sequence.computed = len(found) * self._block_size
        sequence.row = self._free_rows.pop()
        return True

    def _count_found(self, sequence: Sequence, pages: int) -> None:
        if sequence.root is not None:
            sequence.cached_tokens = pages * self._block_size
            self.queried_tokens += sequence.known
            self.hit_tokens += sequence.cached_tokens

    def _find(self, sequence: Sequence) -> list[int]:
        if sequence.root is None or sequence.request.params.prompt_logprobs is not None:
            return []
        ids: NDArray[np.int64] = sequence.ids[: sequence.known]
        return self._cache.find(sequence.root, ids, self._most_found(sequence))

    def _restored(self, sequence: Sequence, found: list[int]) -> list[int]:
        most = self._most_found(sequence) - len(found)
        if self._restore is None or sequence.root is None or most <= 0:
            return []
        if sequence.request.params.prompt_logprobs is not None:
            return []
        return self._restore(sequence, found, most)

    def _most_found(self, sequence: Sequence) -> int:
        """Pages that may be found: at least one token is left to compute, since one has to be sampled."""
        return (sequence.known - 1) // self._block_size

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self.preemptions += 1
        self._on_preempt(sequence)
        self.add(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._cache.release(sequence.pages)
        self._free_rows.append(sequence.row)
        sequence.pages, sequence.row, sequence.published, sequence.shown = [], -1, 0, 0
        sequence.computed, sequence.drafts = 0, ()
