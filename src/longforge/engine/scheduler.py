"""Which tokens go through the model in the next step: continuous batching with chunked prefill.

There is one rule for prompts and for generated tokens: a sequence has tokens that are known and tokens that
are computed, and a step lets the computed ones catch up under the budget. (Rule from vLLM's v1 scheduler.)

Each step first gives every sequence that generates its one token, then spends what is left of the budget on
prompts, first come, first served, in chunks. A waiting request is admitted only when a row is free and pages
for its prompt and everything it may generate can be reserved; so a running request never runs out of pages
and nothing is ever preempted. The price: a request that allows itself a long answer holds the pages of a long
answer. The head of the queue is never overtaken.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from longforge.engine.pages import PageAllocator
from longforge.engine.request import GenerationRequest

__all__ = ["Scheduler", "Sequence", "Work"]


class Sequence:
    """A request inside the engine."""

    __slots__ = (
        "computed",
        "generated",
        "last_token",
        "limit",
        "pages",
        "prompt",
        "request",
        "row",
        "seed",
        "stops",
    )

    def __init__(self, request: GenerationRequest, *, limit: int, seed: int) -> None:
        self.request = request
        self.prompt = np.asarray(request.prompt_ids, dtype=np.int64)
        self.limit = limit
        """Most tokens, prompt and generated together."""
        self.seed = seed
        self.stops = frozenset(request.params.stop_token_ids)
        self.computed = 0
        """Tokens whose keys and values are in the pages."""
        self.generated = 0
        self.last_token = -1
        self.pages: list[int] = []
        self.row = -1
        """Row of the page table while running."""

    @property
    def known(self) -> int:
        """Tokens of the prompt and those generated so far."""
        return len(self.prompt) + self.generated


@dataclass(frozen=True, slots=True)
class Work:
    """The next `tokens` uncomputed tokens of a sequence; `samples` if they are the last known ones."""

    sequence: Sequence
    tokens: int
    samples: bool


class Scheduler:
    """Queues, rows and reservations. Knows nothing of tensors."""

    def __init__(
        self, pages: PageAllocator, *, block_size: int, max_running: int, max_batch_tokens: int
    ) -> None:
        self._pages = pages
        self._block_size = block_size
        self._max_batch_tokens = max_batch_tokens
        self._free_rows = list(range(max_running - 1, -1, -1))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission."""

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, waiting or running, and gives its row and all its pages back."""
        if sequence.row < 0:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._pages.release(sequence.pages)
        self._free_rows.append(sequence.row)
        sequence.pages, sequence.row = [], -1

    def schedule(self) -> tuple[list[Work], list[Sequence]]:
        """The next step's work, at most `max_batch_tokens` tokens, and the sequences it admitted."""
        work: list[Work] = []
        budget = self._max_batch_tokens
        prefilling: list[Sequence] = []
        for sequence in self.running:
            if sequence.generated == 0:
                prefilling.append(sequence)
            elif budget > 0:
                work.append(Work(sequence, 1, True))
                budget -= 1
        for sequence in prefilling:
            budget -= self._chunk(sequence, budget, work)
        admitted: list[Sequence] = []
        while budget > 0 and self.waiting and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            admitted.append(sequence)
            budget -= self._chunk(sequence, budget, work)
        return work, admitted

    def _admit(self, sequence: Sequence) -> bool:
        # The last generated token is never fed back, so its key needs no slot.
        needed = -(-(sequence.limit - 1) // self._block_size)
        if not self._free_rows or not self._pages.can_allocate(needed):
            return False
        sequence.row = self._free_rows.pop()
        sequence.pages = self._pages.allocate(needed)
        self.running.append(sequence)
        return True

    @staticmethod
    def _chunk(sequence: Sequence, budget: int, work: list[Work]) -> int:
        left = len(sequence.prompt) - sequence.computed
        tokens = min(left, budget)
        if tokens > 0:
            work.append(Work(sequence, tokens, tokens == left))
        return tokens
