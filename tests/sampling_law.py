"""What a row must be sampled from, by the formulas of `SamplingParams` and nothing of the engine: one token
after another in float64."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longforge.protocol import SamplingParams


def mask_of(allowed: Sequence[int], vocab: int) -> NDArray[np.uint32]:
    """The grammar's mask that allows just these tokens."""
    words = [0] * -(-vocab // 32)
    for token in allowed:
        words[token // 32] |= 1 << (token % 32)
    return np.array(words, dtype=np.uint32)


def expected_law(
    logits: Sequence[float],
    params: SamplingParams,
    *,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
    allowed: Sequence[int] | None = None,
) -> NDArray[np.float64]:
    """Probabilities of the next token after `prompt` and `answer` (generated so far)."""
    x = [_penalised(float(value), token, params, prompt, answer) for token, value in enumerate(logits)]
    for token, bias in params.logit_bias:
        x[token] += bias
    for token in range(len(x)):
        stopped = len(answer) < params.min_tokens and token in params.stop_token_ids
        if stopped or (allowed is not None and token not in allowed):
            x[token] = -math.inf
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if params.temperature == 0:
        return np.eye(len(x))[order[0]]
    peak = x[order[0]]
    order = order[: params.top_k or None]
    weights = {token: math.exp((x[token] - peak) / params.temperature) for token in order}
    if params.top_p < 1:
        total, kept, before = sum(weights.values()), {}, 0.0
        for token in order:
            if before < params.top_p * total:
                kept[token] = weights[token]
            before += weights[token]
        weights = kept
    weights = {token: weight for token, weight in weights.items() if weight >= params.min_p}
    law = np.zeros(len(x))
    law[list(weights)] = np.array(list(weights.values())) / sum(weights.values())
    return law


def _penalised(
    x: float, token: int, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> float:
    if token in prompt or token in answer:
        x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
    count = list(answer).count(token)
    return x - params.frequency_penalty * count - params.presence_penalty * (count > 0)
