"""From logits to tokens, the whole batch at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longforge.engine.draws import uniforms
from longforge.errors import EngineError
from longforge.protocol import SamplingParams

__all__ = ["Sampled", "sample"]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row. `top_logprobs` rows are empty where none were asked for."""

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[tuple[tuple[int, float], ...]]


def sample(
    logits: Tensor, params: Sequence[SamplingParams], seeds: Sequence[int], positions: Sequence[int]
) -> Sampled:
    """Samples one token per row.

    logits: fp32 [B, V]; params, seeds (any int, its low 64 bits count), positions (of the sampled token): B
    each. A row's token depends on its own logits, parameters, seed and position only. Order of the filters:
    temperature, top-k, then top-p on what top-k left, renormalised; ties to the lower id everywhere. Errors:
    EngineError if a row has no finite distribution (broken weights).
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    temperatures = np.array([p.temperature for p in params])
    tokens = logprobs.argmax(dim=-1)  # the first maximum, hence the lower id
    drawn = np.flatnonzero(temperatures > 0).tolist()
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen = logprobs if len(drawn) == len(params) else logprobs[rows]
        tokens[rows] = _draw(
            chosen, [params[i] for i in drawn], [seeds[i] for i in drawn], [positions[i] for i in drawn]
        )
    picked = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
    if not np.isfinite(picked).all():
        raise EngineError("logits: expected finite numbers, got NaN or infinity; the weights are broken")
    return Sampled(tokens.tolist(), picked, _top(logprobs, params))


def _draw(logprobs: Tensor, params: list[SamplingParams], seeds: list[int], positions: list[int]) -> Tensor:
    """Inverse transform sampling over token ids in ascending order, the cumulative mass in float64.

    logprobs [R, V] -> int64 [R].
    """
    device = logprobs.device
    # A floor that no difference of logits can feel keeps 0 / temperature from becoming 0 / 0.
    temperature = torch.tensor([max(p.temperature, 1e-30) for p in params], device=device)
    # Subtracting the maximum first keeps small temperatures from overflowing.
    scaled = (logprobs - logprobs.amax(dim=-1, keepdim=True)).div_(temperature[:, None])
    weights = scaled.exp_()
    filtered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if filtered:
        rows = torch.tensor(filtered, device=device)
        kept = _kept(weights[rows], [params[i] for i in filtered])
        weights[rows] = weights[rows] * kept
    mass = weights.cumsum(dim=-1, dtype=torch.float64)
    low64 = np.array([seed & (2**64 - 1) for seed in seeds], dtype=np.uint64)
    draws = torch.from_numpy(uniforms(low64, np.array(positions, dtype=np.uint64))).to(device)
    # The first token whose cumulative mass passes the draw; a token of no mass never does.
    return torch.searchsorted(mass, (draws * mass[:, -1])[:, None], right=True)[:, 0].clamp_(
        max=mass.shape[-1] - 1
    )


def _kept(weights: Tensor, params: list[SamplingParams]) -> Tensor:
    """Which tokens top-k and top-p leave. weights: unnormalised [R, V]. Returns bool [R, V]."""
    vocab = weights.shape[-1]
    top_k = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=weights.device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=weights.device)[:, None]
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    inside = torch.arange(vocab, device=weights.device) < top_k
    ordered = ordered * inside
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    # A token stays if those likelier than it do not yet hold top_p; so the likeliest always stays.
    inside &= before < top_p * ordered.sum(dim=-1, keepdim=True, dtype=torch.float64)
    return torch.zeros_like(inside).scatter_(-1, order, inside)


def _top(logprobs: Tensor, params: Sequence[SamplingParams]) -> list[tuple[tuple[int, float], ...]]:
    top: list[tuple[tuple[int, float], ...]] = [()] * len(params)
    for row, asked in enumerate(params):
        if asked.top_logprobs:
            values, ids = logprobs[row].sort(descending=True, stable=True)
            count = asked.top_logprobs
            top[row] = tuple(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
    return top
