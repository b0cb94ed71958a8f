"""From logits to tokens, the whole batch at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from longforge.engine import sampler_cpu, sampler_torch
from longforge.engine.fixed_weights import MAX_VOCAB, UNIT
from longforge.engine.request import PromptToken
from longforge.engine.sampler_rows import Row
from longforge.engine.token_counts import TokenCounts
from longforge.errors import EngineError

__all__ = ["Row", "Sampled", "TokenCounts", "law", "prompt_logprobs", "sample"]

_Top = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row. `top_logprobs` rows are empty where none were asked for."""

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[_Top]
    failed: list[bool]
    """Rows without a distribution: a logit is NaN or infinity (broken weights), or the mask, `min_tokens` and
    logits of -infinity leave no token. Their token is -1, their log-probability NaN."""


def sample(logits: Tensor, rows: Sequence[Row]) -> Sampled:
    """Samples one token per row, in the order of steps that `SamplingParams` states.

    logits: fp32 [R, V]; R rows. A row's result depends on its own logits and `Row` only, down to the last
    bit. Token choice is the same on every device (`fixed_weights` says how); log-probabilities are of the raw
    logits, good to 1e-6.
    """
    assert logits.shape[0] == len(rows) and logits.shape[1] <= MAX_VOCAB
    if not rows:
        return Sampled([], [], [], [])
    chosen = _twin(logits).choose(logits, rows)
    failed = [token < 0 for token in chosen.tokens]
    logprobs = [
        logit - peak - math.log(total / UNIT) if token >= 0 else math.nan
        for token, logit, peak, total in zip(*chosen, strict=True)
    ]
    tops: list[_Top] = [()] * len(rows)
    for at, row in enumerate(rows):
        if row.params.top_logprobs and not failed[at]:
            rest = math.log(chosen.totals[at] / UNIT)
            tops[at] = _top(logits[at], row.params.top_logprobs, chosen.peaks[at], rest)
    return Sampled(chosen.tokens, logprobs, tops, failed)


def law(logits: Tensor, row: Row) -> NDArray[np.float64]:
    """The probabilities that `row` is sampled with: fp32 [V] -> float64 [V], all 0 for a row that fails.

    Exact but for the rounding of the weights, 2**-45 of the likeliest token's.
    """
    weights = sampler_torch.kept_weights(logits[None], [row])[0].double().cpu().numpy()
    return weights / max(weights.sum(), 1.0)


def prompt_logprobs(logits: Tensor, targets: Sequence[int], top: int) -> list[PromptToken]:
    """What the model thought of given tokens: raw log-probabilities, each with the `top` likeliest tokens.

    logits: fp32 [N, V]; targets: N token ids. Errors: EngineError if logits are not finite.
    """
    assert logits.shape[0] == len(targets) and logits.shape[1] <= MAX_VOCAB
    if not len(targets):
        return []
    twin = _twin(logits)
    peaks, totals = twin.totals(logits)
    if any(math.isnan(peak) for peak in peaks):
        raise EngineError("logits: expected finite numbers, got NaN or infinity; the weights are broken")
    tokens = list[PromptToken]()
    for row, target, peak, total in zip(logits, targets, peaks, totals, strict=True):
        rest = math.log(total / UNIT)
        tops = _top(row, top, peak, rest) if top else ()
        tokens.append(PromptToken(int(target), float(row[target]) - peak - rest, tops))
    return tokens


def _top(logits: Tensor, count: int, peak: float, rest: float) -> _Top:
    ids, values = _twin(logits).top(logits, count)
    return tuple((token, value - peak - rest) for token, value in zip(ids, values, strict=True))


def _twin(logits: Tensor):
    return sampler_cpu if logits.device.type == "cpu" else sampler_torch
