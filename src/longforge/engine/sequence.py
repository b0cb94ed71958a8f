"""A request inside the engine."""

from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from longforge.engine.draft_state import DraftState
from longforge.engine.request import GenerationRequest, PromptToken
from longforge.engine.sampler import TokenCounts

if TYPE_CHECKING:
    from longforge.engine.grammar import Matcher

__all__ = ["Sequence"]


class Sequence:
    """What is known of one request: its tokens, how far they are computed, and its pages.

    known     tokens of the prompt and those generated; the engine's one rule lets `computed` catch up with it
    computed  tokens whose keys and values are in the pages
    drafts    guesses at the tokens behind the known ones, to be verified with the next known token
    """

    __slots__ = (
        "arrival",
        "cached_tokens",
        "computed",
        "counts",
        "drafting",
        "drafts",
        "ids",
        "known",
        "let_in",
        "limit",
        "matcher",
        "page_keys",
        "pages",
        "prompt_tokens",
        "published",
        "request",
        "root",
        "row",
        "seed",
        "shown",
        "stops",
    )

    def __init__(self, request: GenerationRequest, *, limit: int, seed: int, arrival: int) -> None:
        self.request = request
        self.known = len(request.prompt_ids)
        self.limit = limit
        """Most tokens, prompt and generated together."""
        self.ids = np.array(request.prompt_ids, dtype=np.int64)
        """At least the known tokens; grows as they do."""
        self.seed = seed
        self.stops = frozenset(request.params.stop_token_ids)
        self.arrival = arrival
        self.let_in: float | None = None
        """When it was first let in, in seconds of the scheduler's clock; None: never yet."""
        self.computed = 0
        self.drafts: tuple[int, ...] = ()
        self.cached_tokens = 0
        """Prompt tokens found in the cache when it was first admitted."""
        self.pages: list[int] = []
        self.published = 0
        """Leading pages that the prefix cache knows."""
        self.root: Hashable | None = None
        """Where its pages belong in the prefix cache; None: they are not to be found by others."""
        self.page_keys: list[bytes] = []
        """Names of its leading pages in the slower tiers, as far as they were needed."""
        self.row = -1
        """Row of the page table while running."""
        self.shown = 0
        """Leading pages that its row shows."""
        self.drafting = DraftState()
        self.counts: TokenCounts | None = None
        """Its tokens so far, where they change the distribution."""
        self.matcher: Matcher | None = None
        """Where it stands in its grammar, if it has one."""
        self.prompt_tokens: list[PromptToken | None] = []
        """What the model thought of the prompt, where asked for, as far as it is computed."""

    @property
    def order(self) -> tuple[int, int]:
        """Sorts requests: the first is served first and preempted last."""
        return self.request.priority, self.arrival

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return self.known - len(self.request.prompt_ids)

    @property
    def last_token(self) -> int:
        """The newest known token."""
        return int(self.ids[self.known - 1])

    def append(self, token: int) -> None:
        """One more known token."""
        if self.known == len(self.ids):
            grown = min(self.limit, self.known + max(256, self.known // 2))
            self.ids = np.concatenate([self.ids, np.zeros(grown - self.known, np.int64)])
        self.ids[self.known] = token
        self.known += 1

    def block_ids(self, block: int, block_size: int) -> NDArray[np.int64]:
        """The ids of one whole block of its path."""
        return self.ids[block * block_size : (block + 1) * block_size]
