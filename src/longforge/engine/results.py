"""From a step's hidden states to events: sampling, acceptance of drafts, and why requests end."""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
from torch import Tensor

from longforge.engine.request import RequestFailed, TokenEvent
from longforge.engine.runner import Runner
from longforge.engine.sampler import Row, Sampled, prompt_logprobs, sample
from longforge.engine.scheduler import Work
from longforge.engine.sequence import Sequence
from longforge.engine.speculation import accepted
from longforge.errors import EngineError, InputError, LongforgeError
from longforge.protocol import StopReason

__all__ = ["Results", "Span", "spans_of"]

SLICE = 512
"""Rows of logits of a prompt that are held at once."""

WHOLE = 256
"""Rows up to which a step's hidden states may stay as long as any of them is needed."""


class Results:
    """What came of the steps so far, and the version of the weights that it came from."""

    def __init__(self, runner: Runner, version: int) -> None:
        self._runner = runner
        self.version = int(version)
        self.generated_tokens = self.finished = self.failed = 0
        self.drafts = self.drafted_tokens = self.accepted_tokens = 0
        self.accepted_by_place = [0, 0, 0]

    def take(
        self, spans: Seq["Span"], hidden: Tensor, blocks: Seq[Tensor] | None
    ) -> tuple[list[TokenEvent | RequestFailed], list[Sequence]]:
        """Books the computed tokens, samples, and accepts drafts. hidden: [N, d], the work's rows in order.

        Returns the events in order and the sequences that have ended.
        """
        events: list[TokenEvent | RequestFailed] = []
        ended: list[Sequence] = []
        rows, places = [], []
        for span in spans:
            try:
                self._judge_prompt(span, hidden)
                rows += _rows(span)
            except (EngineError, InputError) as error:  # no finite logits; its grammar became too much work
                events.append(self._failure(span.work.sequence, error))
                ended.append(span.work.sequence)
                continue
            places += span.sampled
        sampled = None
        if rows:
            sampled = sample(self._runner.logits_at(hidden, places), rows)
        first, keeping = 0, self._runner.cache.tail is not None
        for span in spans:
            (sequence, computed, _, samples), start, its_rows = span
            sequence.computed += computed
            if samples and sequence not in ended:
                assert sampled is not None, "rows were sampled"
                before = sequence.known
                if self._follow(span, sampled, first, blocks, events):
                    ended.append(sequence)
                first += len(its_rows)
                right = max(0, sequence.known - before - 1)
                sequence.computed += right
                computed += right
            if keeping:
                sequence.drafting.pending.append(_kept(hidden, start, computed))
        return events, ended

    def _follow(
        self,
        span: "Span",
        sampled: Sampled,
        first: int,
        blocks: Seq[Tensor] | None,
        events: list[TokenEvent | RequestFailed],
    ) -> bool:
        """Takes a sequence's sampled tokens as far as its drafts were right. Whether that ended it."""
        sequence, drafts = span.work.sequence, span.work.drafts
        right = accepted(sampled.token_ids[first : first + len(drafts) + 1], drafts)
        self._learn(sequence, len(drafts), right)
        sequence.drafts = ()
        for row in range(first, first + right + 1):
            if sampled.failed[row]:
                self.failed += 1
                error = EngineError(
                    "answer: no token can follow, its logits are not finite or none is allowed"
                )
                events.append(RequestFailed(sequence.request.id, error))
                return True
            token = sampled.token_ids[row]
            sequence.append(token)
            reason = _stop_reason(sequence, token)
            self.generated_tokens += 1
            first_event = sequence.generated == 1
            events.append(
                TokenEvent(
                    sequence.request.id,
                    token,
                    sampled.logprobs[row],
                    self.version,
                    sampled.top_logprobs[row],
                    reason,
                    sequence.cached_tokens,
                    tuple(sequence.prompt_tokens) if first_event else (),
                    self._blocks(sequence, blocks, span.sampled[row - first]),
                )
            )
            if reason is not None:
                self.finished += 1
                return True
            if sequence.counts is not None:
                sequence.counts.add(token)
            if sequence.matcher is not None:
                try:
                    sequence.matcher.accept(token)
                except InputError as error:  # its grammar became too much work
                    events.append(self._failure(sequence, error))
                    return True
        return False

    def _failure(self, sequence: Sequence, error: LongforgeError) -> RequestFailed:
        self.failed += 1
        return RequestFailed(sequence.request.id, error)

    def _learn(self, sequence: Sequence, drafted: int, right: int) -> None:
        if not drafted:
            return
        sequence.drafting.learn(drafted, right)
        self.drafts += 1
        self.drafted_tokens += drafted
        self.accepted_tokens += right
        for place in range(right):
            self.accepted_by_place[place] += 1

    def _judge_prompt(self, span: "Span", hidden: Tensor) -> None:
        """Log-probabilities of prompt tokens, where a request asked for them. EngineError if logits are not
        finite."""
        sequence = span.work.sequence
        top = sequence.request.params.prompt_logprobs
        if top is None:
            return
        judged = sequence.prompt_tokens or [None]
        # The hidden state of position p judges token p + 1.
        begin = len(judged) - 1 - sequence.computed
        end = min(sequence.computed + span.work.tokens, len(sequence.request.prompt_ids) - 1)
        for start in range(begin, end - sequence.computed, SLICE):
            stop = min(start + SLICE, end - sequence.computed)
            logits = self._runner.logits(hidden[span.start + start : span.start + stop])
            targets = sequence.ids[sequence.computed + start + 1 : sequence.computed + stop + 1]
            judged += prompt_logprobs(logits, targets.tolist(), top)
        sequence.prompt_tokens = judged

    def _blocks(self, sequence: Sequence, blocks: Seq[Tensor] | None, row: int) -> tuple[int, ...]:
        """How many groups of all sparse layers selected each block for the token of packed row `row`."""
        if blocks is None or not sequence.request.report_blocks:
            return ()
        chosen = np.concatenate(
            [layer[row].flatten().cpu().numpy() for layer in blocks] or [np.zeros(0, int)]
        )
        return tuple(np.bincount(chosen[chosen >= 0].astype(np.int64)).tolist())


class Span(NamedTuple):
    """One work's rows in the packed batch: `start` is its first, `sampled` those that are sampled."""

    work: Work
    start: int
    sampled: range


def _kept(hidden: Tensor, start: int, count: int) -> Tensor:
    """Rows of hidden [N, d] for a later step; copied where they would keep a large step's whole tensor."""
    rows = hidden[start : start + count]
    return rows.clone() if len(hidden) > WHOLE and 2 * count < len(hidden) else rows


def spans_of(work: Seq[Work]) -> list[Span]:
    """The rows of each work, packed one after the other."""
    spans, start = [], 0
    for item in work:
        end = start + item.tokens + len(item.drafts)
        sampled = range(start + item.tokens - 1, end) if item.samples else range(0)
        spans.append(Span(item, start, sampled))
        start = end
    return spans


def _rows(span: Span) -> list[Row]:
    """What the sampler needs to know: the row of the last known token, and one behind each draft."""
    sequence, drafts = span.work.sequence, span.work.drafts
    if not span.work.samples:
        return []
    if not drafts and sequence.matcher is None:
        params, seed = sequence.request.params, sequence.seed
        return [Row(params, seed, sequence.known, sequence.generated, sequence.counts)]
    masks = [None] * (len(drafts) + 1) if sequence.matcher is None else sequence.matcher.masks(drafts)
    return [
        Row(
            sequence.request.params,
            sequence.seed,
            sequence.known + place,
            sequence.generated + place,
            sequence.counts,
            drafts[:place],
            masks[place],
        )
        for place in range(len(drafts) + 1)
    ]


def _stop_reason(sequence: Sequence, token: int) -> StopReason | None:
    if token in sequence.stops:
        return StopReason.STOP
    return StopReason.LENGTH if sequence.known >= sequence.limit else None
