"""The sampler in torch, on any device: the readable twin of `sampler_cpu`."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longforge.engine.draws import uniforms
from longforge.engine.fixed_weights import LOG2_E, LOG_2, LOWEST, POWERS, SERIES, UNIT
from longforge.engine.sampler_rows import LOW_64, Chosen, Row, edits, stacked_masks

__all__ = ["choose", "kept_weights", "top", "totals"]


def choose(logits: Tensor, rows: Sequence[Row]) -> Chosen:
    """A token per row, by inverse transform sampling over ascending ids. logits: fp32 [R, V]."""
    mass = kept_weights(logits, rows).cumsum(dim=-1)
    low64 = np.array([row.seed & LOW_64 for row in rows], dtype=np.uint64)
    draws = uniforms(low64, np.array([row.position for row in rows], dtype=np.uint64))
    # A draw is below 1 by more than float64 rounds, so the target stays below the mass.
    target = (torch.from_numpy(draws).to(logits.device) * mass[:, -1]).long()
    # The first token whose cumulative mass passes the target; a token of no mass never does.
    tokens = torch.searchsorted(mass, target[:, None], right=True)
    picked = logits.gather(-1, tokens.clamp(max=logits.shape[-1] - 1))[:, 0].tolist()
    return Chosen(torch.where(mass[:, -1:] > 0, tokens, -1)[:, 0].tolist(), picked, *totals(logits))


def kept_weights(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """What each row is sampled from: weights (`fixed_weights`) after every step of `SamplingParams`' order.

    logits: fp32 [R, V]. Returns int64 [R, V]; all 0 for a row without a distribution: a logit is NaN or
    infinity, or nothing is allowed.
    """
    device, vocab = logits.device, logits.shape[-1]
    processed = _processed(logits, rows)
    peak = processed.amax(dim=-1, keepdim=True)
    alive = (logits < torch.inf).all(dim=-1, keepdim=True) & peak.isfinite()
    temperature = torch.tensor([r.params.temperature for r in rows], dtype=torch.float64, device=device)
    greedy = (temperature == 0)[:, None]
    weights = _weights((processed - peak) / torch.where(greedy[:, 0], 1.0, temperature)[:, None])
    first = torch.arange(vocab, device=device) == processed.argmax(dim=-1, keepdim=True)
    weights = torch.where(greedy, first * UNIT, weights) * alive
    ranked = processed.masked_fill(weights == 0, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    inside = _inside(weights.gather(-1, order), rows)
    return weights * torch.zeros_like(inside).scatter_(-1, order, inside)


def top(logits: Tensor, count: int) -> tuple[list[int], list[float]]:
    """The `count` highest of fp32 [V], highest first, ties to the lower id: (token ids, logits)."""
    values, ids = logits.sort(descending=True, stable=True)
    return ids[:count].tolist(), values[:count].tolist()


def totals(logits: Tensor) -> tuple[list[float], list[int]]:
    """(the highest logit of each row of fp32 [N, V], NaN if one of them is no number or infinity; the sum of
    their weights)."""
    wide = logits.double()
    peak = wide.amax(dim=-1, keepdim=True)
    peak = peak.masked_fill(~peak.isfinite(), torch.nan)
    return peak[:, 0].tolist(), _weights(wide - peak).sum(dim=-1).tolist()


def _processed(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits after penalties, bias, grammar and min_tokens: fp64 [R, V]."""
    processed = logits.double()
    vocab = logits.shape[-1]
    for at, row in enumerate(rows):
        change = edits(row, vocab)
        if change is not None:
            ids, repetition, taken, added = (torch.from_numpy(part).to(logits.device) for part in change)
            before = processed[at, ids]
            repeated = torch.where(before > 0, before / repetition, before * repetition)
            processed[at, ids] = repeated - taken + added
    masks, which = stacked_masks(rows, vocab)
    if len(masks):
        bits = np.unpackbits(masks.view(np.uint8), axis=-1, bitorder="little")[:, :vocab]
        masked = [at for at, mask in enumerate(which) if mask >= 0]
        forbidden = torch.from_numpy(bits == 0).to(logits.device)
        processed[masked] = processed[masked].masked_fill(forbidden, -torch.inf)
    return processed


def _weights(x: Tensor) -> Tensor:
    """round(exp(x) * UNIT) for x <= 0: fp64 [R, V] -> int64 [R, V]; 0 for NaN."""
    x = x.clamp(min=LOWEST).nan_to_num(nan=LOWEST)
    halvings = (x * -LOG2_E).round()
    rest = x + halvings * LOG_2
    series = torch.full_like(rest, SERIES[0])
    for coefficient in SERIES[1:]:
        series = series.mul_(rest).add_(coefficient)
    powers = torch.tensor(POWERS, dtype=torch.float64, device=x.device)
    return (series * powers[halvings.long()]).round().long()


def _inside(ordered: Tensor, rows: Sequence[Row]) -> Tensor:
    """Which of the weights, in descending order of likelihood, top-k, top-p and min-p keep. Bool [R, V]."""
    vocab, device = ordered.shape[-1], ordered.device
    top_k = torch.tensor([min(r.params.top_k or vocab, vocab) for r in rows], device=device)[:, None]
    top_p, min_p = (
        torch.tensor(values, dtype=torch.float64, device=device)[:, None]
        for values in ([r.params.top_p for r in rows], [r.params.min_p for r in rows])
    )
    inside = torch.arange(vocab, device=device) < top_k
    ordered = ordered * inside
    mass = ordered.cumsum(dim=-1)
    # A token stays if those likelier than it do not yet hold top_p; the likeliest always does.
    enough = (top_p * mass[:, -1:].double()).clamp(min=1)
    inside &= ((mass - ordered).double() < enough) | (top_p >= 1)
    return inside & (ordered.double() >= min_p * UNIT)
