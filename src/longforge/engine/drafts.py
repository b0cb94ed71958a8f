"""Drafting with the model's MTP module: guesses at the next tokens, which the next step verifies.

The module takes the hidden state of position t-1 and the token of position t and predicts the token of t+1.
Its keys for that pair stand at position t (`model.KVCache` says why), so before it can guess behind the known
tokens it must have seen every pair up to the newest known token. Pairs that are not needed for a guess yet
are kept until one is, or until their page is full: a page that others can find has all its draft keys.

A second and third guess feed the module its own output in place of the hidden state; the keys of such a pair
are overwritten with the true ones as soon as these are known.
"""

from collections.abc import Sequence as Seq
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from longforge.engine.draft_length import DraftCosts, best_length
from longforge.engine.runner import Runner, Stretch
from longforge.engine.scheduler import Work
from longforge.engine.sequence import Sequence
from longforge.engine.transfer import to_device
from longforge.errors import InputError

__all__ = ["Drafter"]

JUDGE_EVERY = 4
"""Verifications after which the number of guesses is thought over."""

LOOKS = 4
"""Answers' steps without guesses that are looked at, for each size of a batch."""

FASTER, SLOWER = 0.3, 0.05
"""Weight of the newest step in the running estimate of what one takes, by what it was. The estimate stays
near the lower quartile: what disturbs a step makes it slower."""

RETRY_EVERY = 8
"""Judgements, of any request, after which the largest number of guesses is tried: what once seemed slow would
not be seen again."""

PROBE_TOKENS = 32
"""A request that drafts nothing tries one token again after so many."""


class Drafter:
    """Guesses up to `most` tokens for each request.

    costs: what decides how many are worth it, until steps have been seen; observe: whether to go by these.
    """

    def __init__(self, runner: Runner, most: int, costs: DraftCosts, *, observe: bool) -> None:
        self._runner = runner
        self.most = most
        self.costs = costs
        self._observe = observe
        self._seen: dict[tuple[int, int], float] = {}
        """Seconds of steps by (requests, guesses of each)."""
        self._begun: set[tuple[int, int]] = set()
        """Those that were there once."""
        self._looks: dict[int, int] = {}
        """Looks at steps without guesses so far, by requests."""
        self._judgements = 0

    def saw(self, work: Seq[Work], seconds: float) -> None:
        """A whole step took so long. It tells something where all its requests did the same: generate, and
        verify as many guesses as they made."""
        length = len(work[0].drafts)
        same = all(len(w.drafts) == len(w.sequence.drafts) == length and w.tokens == 1 for w in work)
        if self._observe and same:
            key = (len(work), length)
            if key not in self._begun:
                self._begun.add(key)  # the first of a kind may have compiled something
                return
            before = self._seen.get(key, seconds)
            rate = FASTER if seconds < before else SLOWER
            self._seen[key] = before + rate * (min(seconds, 2 * before) - before)

    def forget(self) -> None:
        """Steps seen so far do not count."""
        self._seen.clear()
        self._looks.clear()

    def _seconds(self, batch: int, length: int) -> float:
        """Of such a step: as seen; if not, by the costs, in proportion to what was seen without guesses."""
        if (batch, length) in self._seen:
            return self._seen[batch, length]
        plain = self.costs.seconds(batch, 0)
        return self.costs.seconds(batch, length) * self._seen.get((batch, 0), plain) / plain

    def begin(self, sequence: Sequence) -> None:
        """The sequence was let in: its first `computed` tokens are on its pages, draft keys included."""
        state = sequence.drafting
        state.done = sequence.computed
        if sequence.computed:
            state.pending = [
                self._runner.tail(sequence.pages[sequence.computed // self._runner.block_size - 1])
            ]
        else:
            width = self._runner.model.config.hidden_size
            state.pending = [torch.zeros(1, width, device=self._runner.device)]

    def propose(self, sequences: Seq[Sequence], ending: Seq[Sequence]) -> None:
        """Brings draft keys up to date where they are needed, and sets the drafts of those that go on.

        sequences: those of the last step, `ending` among them.
        """
        batch = len(sequences) - len(ending)
        lengths = {s: 0 if s in ending else self._length(s, batch) for s in sequences}
        filled = [s for s in sequences if lengths[s] or self._page_is_full(s) or len(s.drafting.pending) > 64]
        if not filled:
            return
        wanted = [lengths[s] for s in filled]
        stretches, before = self._pairs(filled, ending)
        guesses = None
        if all(s.matcher is None for s in filled):
            guesses = self._runner.guess(stretches, before, wanted)
        if guesses is None:
            guesses = self._guess_by_passes(filled, stretches, before, wanted)
        for sequence, guess in zip(filled, guesses, strict=True):
            sequence.drafts = _worth_verifying(sequence, guess)

    def _guess_by_passes(
        self, filled: Seq[Sequence], stretches: Seq[Stretch], before: Seq[Tensor], wanted: Seq[int]
    ) -> list[list[int]]:
        """So many guesses behind each stretch, a pass of the module over all of them at a time."""
        states = before[0] if len(before) == 1 else torch.cat(list(before))
        ends = [end - 1 for end in accumulate(len(s.ids) for s in stretches)]
        last = self._runner.rows(self._runner.run_drafts(stretches, states), ends)
        guessing = [place for place, length in enumerate(wanted) if length]
        guesses: list[list[int]] = [[] for _ in filled]
        hidden = last
        for step in range(max(wanted)):
            if step:
                hidden = self._again([filled[p] for p in guessing], [guesses[p] for p in guessing], hidden)
            else:
                hidden = self._runner.rows(hidden, guessing)
            tokens = self._likeliest(hidden, [filled[p] for p in guessing], [guesses[p] for p in guessing])
            for place, token in zip(guessing, tokens, strict=True):
                guesses[place].append(token)
            going = [row for row, p in enumerate(guessing) if wanted[p] > step + 1]
            if going:
                guessing, hidden = [guessing[row] for row in going], self._runner.rows(hidden, going)
        return guesses

    def _likeliest(self, hidden: Tensor, sequences: Seq[Sequence], guesses: Seq[Seq[int]]) -> list[int]:
        """The next guess of each, within its grammar."""
        if all(sequence.matcher is None for sequence in sequences):
            return self._runner.likeliest(hidden)
        logits = self._runner.logits(hidden)
        for row, (sequence, guess) in enumerate(zip(sequences, guesses, strict=True)):
            _forbid(logits[row], sequence, guess)
        return logits.argmax(dim=-1).tolist()

    def _length(self, sequence: Sequence, batch: int) -> int:
        if sequence.generated == 0:
            return 0
        state = sequence.drafting
        most = min(self.most, sequence.limit - sequence.known - 1)
        judgement = state.verified // JUDGE_EVERY
        if state.judged != (batch, judgement):
            state.judged = (batch, judgement)
            state.length = best_length(
                state.acceptance, lambda length: self._seconds(batch, length), self.most
            )
            self._judgements += 1
            if self._observe and state.length and self._judgements % RETRY_EVERY == 0:
                state.length = self.most
        length = min(state.length, most)
        if self._observe and state.verified > JUDGE_EVERY and self._looks.get(batch, 0) < LOOKS:
            self._looks[batch] = self._looks.get(batch, 0) + 1
            length = 0  # a look at what a step without guesses takes
        state.idle_tokens = 0 if length else state.idle_tokens + 1
        if state.idle_tokens >= PROBE_TOKENS and most > 0:
            state.idle_tokens = 0
            return 1
        return length

    def _page_is_full(self, sequence: Sequence) -> bool:
        return (
            sequence.computed // self._runner.block_size > sequence.drafting.done // self._runner.block_size
        )

    def _pairs(self, sequences: Seq[Sequence], ending: Seq[Sequence]) -> tuple[list[Stretch], list[Tensor]]:
        """All pairs that are known and that the module has not seen: of each sequence, tokens and the hidden
        states of the positions before them. From now on they count as seen."""
        stretches, before = [], []
        for sequence in sequences:
            state = sequence.drafting
            # Who ends has no page for the pair of its last token, nor any use for it.
            end = sequence.computed + (sequence not in ending)
            stretches.append(Stretch(sequence, state.done, sequence.ids[state.done : end].tolist()))
            pending = state.pending[0] if len(state.pending) == 1 else torch.cat(state.pending)
            before.append(pending if len(pending) == end - state.done else pending[: end - state.done])
            state.done, state.pending = end, []
        return stretches, before

    def _again(self, sequences: Seq[Sequence], guesses: Seq[Seq[int]], hidden: Tensor) -> Tensor:
        stretches = [
            Stretch(s, s.known + len(guess) - 1, [guess[-1]])
            for s, guess in zip(sequences, guesses, strict=True)
        ]
        return self._runner.run_drafts(stretches, hidden)


@torch.inference_mode()
def _forbid(logits: Tensor, sequence: Sequence, guess: Seq[int]) -> None:
    """Takes what the sequence's grammar forbids after its guesses out of the logits [V]."""
    if sequence.matcher is None:
        return
    try:
        mask = sequence.matcher.masks(guess)[-1]
    except InputError:  # its grammar became too much work: told when it samples
        return
    # An earlier mask where what follows the guesses is too much work: then this guess will be dropped.
    allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(logits)].astype(bool)
    logits.masked_fill_(to_device(~allowed, logits.device), -torch.inf)


def _worth_verifying(sequence: Sequence, guess: Seq[int]) -> tuple[int, ...]:
    """The guesses up to where the answer would end or leave its grammar."""
    count = next((place for place, token in enumerate(guess) if token in sequence.stops), len(guess))
    if count and sequence.matcher is not None:
        try:
            count = len(sequence.matcher.masks(guess[:count])) - 1
        except InputError:  # its grammar became too much work: told when it samples
            count = 0
    return tuple(guess[:count])
