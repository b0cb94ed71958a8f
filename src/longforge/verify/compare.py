"""Compares answers to the same requests that were computed in two ways.

Floating-point results may depend on how many rows are multiplied together, so two right ways can differ in
the last bits of a logit, and where two tokens are all but equally likely, in the token. So

  tokens             are compared exactly, in order. The first that differs is judged: if what separates the
                     two tokens is within the noise, it is a tie and what comes after it, which stands on
                     other text, is not compared; otherwise the check fails and tells the place
  noise              is the largest difference between log-probabilities of the two ways at the same prefix,
                     up to that place. It is noise only while it is below the dtype's tolerance
  log-probabilities  of the tokens and of the likeliest at each place must agree within the tolerance

A greedy tie: the logits of the two tokens differ by at most twice the noise. A sampled one: the position's
draw is that close to the border between the two tokens in the distribution that it is looked up in.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from longforge.engine import GenerationRequest, TokenEvent
from longforge.engine.draws import uniforms
from longforge.engine.sampler import Row, law
from longforge.engine.sampler_rows import LOW_64
from longforge.kernels.layout import PackedLayout
from longforge.verify.check import Check
from longforge.verify.drive import Asked
from longforge.verify.subject import Subject

__all__ = ["Comparison"]

Answers = dict[str, list[TokenEvent]]


class Comparison:
    """Collects what was compared for one check, the largest difference, ties and faults."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.answers = self.tokens = 0
        self.largest = 0.0
        """Largest difference between two log-probabilities."""
        self.ties: list[str] = []
        self.faults: list[str] = []

    def expect(self, holds: bool, otherwise: str) -> None:
        """A fault unless something holds."""
        if not holds:
            self.faults.append(otherwise)

    def same(self, asked: Asked, way: Answers, other: Answers, label: str = "") -> None:
        """Compares all answers of two ways to do the same."""
        for request in asked:
            self._same(request, way[request.id], other[request.id], f"{label}{request.id}")

    def verdict(self, name: str, extra: str = "") -> Check:
        """The check, with what was compared in words."""
        if self.faults:
            more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
            return Check(name, False, self.faults[0] + more)
        told = [
            f"{self.answers} answers, {self.tokens} tokens equal",
            f"log-probabilities within {self.largest:.1e}",
            *self.ties,
            *([extra] if extra else []),
        ]
        return Check(name, True, "; ".join(told))

    def _same(
        self, request: GenerationRequest, way: Sequence[TokenEvent], other: Sequence[TokenEvent], where: str
    ) -> None:
        self.answers += 1
        noise = 0.0
        for place, (one, two) in enumerate(zip(way, other, strict=False)):
            noise = max(noise, _difference(one, two))
            if one.token_id != two.token_id:
                self._judge(request, way[:place], one, two, noise, f"{where}, token {place}")
                break
            self.tokens += 1
        else:
            ended = [(len(events), events[-1].stop_reason) for events in (way, other) if events]
            self.expect(
                len(ended) == 2 and ended[0] == ended[1], f"{where}: ends differ, {ended[0]} and {ended[-1]}"
            )
        self.largest = max(self.largest, noise)
        self.expect(
            noise <= self.subject.tolerance,
            f"{where}: log-probabilities differ by {noise:.1e}, rounding explains "
            f"{self.subject.tolerance:.0e}",
        )

    def _judge(
        self,
        request: GenerationRequest,
        before: Sequence[TokenEvent],
        one: TokenEvent,
        two: TokenEvent,
        noise: float,
        where: str,
    ) -> None:
        prefix = (*request.prompt_ids, *(event.token_id for event in before))
        if request.params.temperature == 0:
            gap = _gap(one, two)
        else:
            gap = self._distance(request, prefix, (one.token_id, two.token_id))
        if gap <= 2 * noise and noise <= self.subject.tolerance:
            self.ties.append(f"tie within rounding at {where}")
            return
        self.faults.append(
            f"{where}: {one.token_id} and {two.token_id}, {gap:.1e} apart where the noise is {noise:.1e}"
        )

    def _distance(
        self, request: GenerationRequest, prefix: tuple[int, ...], tokens: tuple[int, int]
    ) -> float:
        """How far the draw is from the nearer side of the farther of two tokens, in the model's own law."""
        model, params = self.subject.model, request.params
        layout = PackedLayout.from_lengths([len(prefix)], model.config.block_size, model.device)
        with torch.inference_mode():
            ids = torch.tensor(prefix, device=model.device)
            hidden = model.forward_packed(ids, layout, expert_loads=False).hidden[-1:]
            logits = model.logits(hidden)[0]
        assert params.seed is not None, "sampled requests have a seed"
        ends = law(logits, Row(params, params.seed, len(prefix))).cumsum()
        seeds = np.array([params.seed & LOW_64], dtype=np.uint64)
        draw = float(uniforms(seeds, np.array([len(prefix)], dtype=np.uint64))[0])
        spans = [(ends[token - 1] if token else 0.0, ends[token]) for token in tokens]
        return max(max(low - draw, draw - high, 0.0) for low, high in spans)


def _difference(one: TokenEvent, two: TokenEvent) -> float:
    """The largest difference of log-probabilities that both places tell; infinite if one is no number."""
    first, second = _told(one), _told(two)
    apart = [abs(first[token] - second[token]) for token in first.keys() & second.keys()]
    return math.inf if any(map(math.isnan, apart)) else max(apart, default=0.0)


def _gap(one: TokenEvent, two: TokenEvent) -> float:
    """How much likelier the first way finds its own token than the second way's."""
    told = _told(one)
    return one.logprob - told.get(two.token_id, -torch.inf)


def _told(event: TokenEvent) -> dict[int, float]:
    return {**dict(event.top_logprobs), event.token_id: event.logprob}
