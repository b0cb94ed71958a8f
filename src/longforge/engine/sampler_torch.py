"""The sampler in torch, on any device: the readable twin of `sampler_cpu`.

On a GPU the host waits once, for what was drawn: parameters go there through page-locked memory, and nothing
in between is asked of the device.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longforge.engine.draws import uniforms
from longforge.engine.fixed_weights import LOG2_E, LOG_2, LOWEST, POWERS, SERIES, UNIT
from longforge.engine.sampler_rows import LOW_64, Chosen, Row, edits, stacked_masks
from longforge.engine.transfer import to_device

__all__ = ["choose", "drawn", "kept_weights", "top", "totals"]


def choose(logits: Tensor, rows: Sequence[Row]) -> Chosen:
    """A token per row, by inverse transform sampling over ascending ids. logits: fp32 [R, V]."""
    found = drawn(logits, rows).cpu()
    tokens, sums = found[0].tolist(), found[3].tolist()
    picked, peaks = found[1:3].view(torch.float64).tolist()
    return Chosen(tokens, picked, peaks, sums)


def drawn(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """What `Chosen` holds, int64 [4, R] on the device of logits; logits and peaks as the bits of float64."""
    asked = _asked(rows, logits)
    mass = _kept(logits, rows, asked).cumsum(dim=-1)
    # A draw is below 1 by more than float64 rounds, so the target stays below the mass.
    target = (asked.draw * mass[:, -1:]).long()
    # The first token whose cumulative mass passes the target; a token of no mass never does.
    tokens = torch.searchsorted(mass, target, right=True)
    picked = logits.gather(-1, tokens.clamp(max=logits.shape[-1] - 1)).double()
    tokens = torch.where(mass[:, -1:] > 0, tokens, -1)
    peaks, sums = _totals(logits)
    return torch.cat([tokens, picked.view(torch.int64), peaks.view(torch.int64), sums], dim=1).T.contiguous()


def kept_weights(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """What each row is sampled from: weights (`fixed_weights`) after every step of `SamplingParams`' order.

    logits: fp32 [R, V]. Returns int64 [R, V]; all 0 for a row without a distribution: a logit is NaN or
    infinity, or nothing is allowed.
    """
    return _kept(logits, rows, _asked(rows, logits))


def top(logits: Tensor, count: int) -> tuple[list[int], list[float]]:
    """The `count` highest of fp32 [V], highest first, ties to the lower id: (token ids, logits)."""
    values, ids = logits.sort(descending=True, stable=True)
    return ids[:count].tolist(), values[:count].tolist()


def totals(logits: Tensor) -> tuple[list[float], list[int]]:
    """(the highest logit of each row of fp32 [N, V], NaN if one of them is no number or infinity; the sum of
    their weights)."""
    peaks, sums = _totals(logits)
    return peaks[:, 0].tolist(), sums[:, 0].tolist()


class _Asked(NamedTuple):
    """Numbers of each row's parameters, float64 [R, 1] each."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    draw: Tensor


def _asked(rows: Sequence[Row], logits: Tensor) -> _Asked:
    vocab = logits.shape[-1]
    low64 = np.array([row.seed & LOW_64 for row in rows], dtype=np.uint64)
    draws = uniforms(low64, np.array([row.position for row in rows], dtype=np.uint64))
    numbers = [
        (p.temperature, min(p.top_k or vocab, vocab), p.top_p, p.min_p) for p in (row.params for row in rows)
    ]
    columns = np.column_stack([np.array(numbers, dtype=np.float64).reshape(-1, 4), draws])
    return _Asked(*to_device(columns, logits.device).split(1, dim=1))


def _kept(logits: Tensor, rows: Sequence[Row], asked: _Asked) -> Tensor:
    processed = _processed(logits, rows)
    peak = processed.amax(dim=-1, keepdim=True)
    alive = (logits < torch.inf).all(dim=-1, keepdim=True) & peak.isfinite()
    greedy = asked.temperature == 0
    weights = _weights((processed - peak) / torch.where(greedy, 1.0, asked.temperature))
    first = torch.arange(logits.shape[-1], device=logits.device) == processed.argmax(dim=-1, keepdim=True)
    weights = torch.where(greedy, first * UNIT, weights) * alive
    ranked = processed.masked_fill(weights == 0, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    inside = _inside(weights.gather(-1, order), asked)
    return weights * torch.zeros_like(inside).scatter_(-1, order, inside)


def _processed(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits after penalties, bias, grammar and min_tokens: fp64 [R, V]."""
    processed = logits.double()
    vocab, device = logits.shape[-1], logits.device
    changes = [(at, change) for at, row in enumerate(rows) if (change := edits(row, vocab)) is not None]
    if changes:
        places = to_device(np.concatenate([at * vocab + change.ids for at, change in changes]), device)
        numbers = np.concatenate([np.stack(change[1:]) for _, change in changes], axis=1)
        repetition, taken, added = to_device(numbers, device)
        flat = processed.view(-1)
        before = flat.index_select(0, places)
        repeated = torch.where(before > 0, before / repetition, before * repetition)
        flat.index_copy_(0, places, repeated - taken + added)
    masks, which = stacked_masks(rows, vocab)
    if len(masks):
        bits = np.unpackbits(masks.view(np.uint8), axis=-1, bitorder="little")[:, :vocab]
        masked = to_device(np.flatnonzero(np.array(which) >= 0), device)
        forbidden = to_device(bits == 0, device)
        allowed = processed.index_select(0, masked).masked_fill(forbidden, -torch.inf)
        processed.index_copy_(0, masked, allowed)
    return processed


def _totals(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`totals` as float64 and int64 [N, 1]."""
    wide = logits.double()
    peak = wide.amax(dim=-1, keepdim=True)
    peak = peak.masked_fill(~peak.isfinite(), torch.nan)
    return peak, _weights(wide - peak).sum(dim=-1, keepdim=True)


def _weights(x: Tensor) -> Tensor:
    """round(exp(x) * UNIT) for x <= 0: fp64 [R, V] -> int64 [R, V]; 0 for NaN."""
    x = x.clamp(min=LOWEST).nan_to_num(nan=LOWEST)
    halvings = (x * -LOG2_E).round()
    rest = x + halvings * LOG_2
    series = torch.full_like(rest, SERIES[0])
    for coefficient in SERIES[1:]:
        series = series.mul_(rest).add_(coefficient)
    return (series * _powers(x.device)[halvings.long()]).round().long()


@lru_cache
def _powers(device: torch.device) -> Tensor:
    # Outside inference mode, so that it may be used anywhere.
    with torch.inference_mode(False):
        return to_device(np.array(POWERS), device)


def _inside(ordered: Tensor, asked: _Asked) -> Tensor:
    """Which of the weights, in descending order of likelihood, top-k, top-p and min-p keep. Bool [R, V]."""
    inside = torch.arange(ordered.shape[-1], device=ordered.device) < asked.top_k
    ordered = ordered * inside
    mass = ordered.cumsum(dim=-1)
    # A token stays if those likelier than it do not yet hold top_p; the likeliest always does.
    enough = (asked.top_p * mass[:, -1:].double()).clamp(min=1)
    inside &= ((mass - ordered).double() < enough) | (asked.top_p >= 1)
    return inside & (ordered.double() >= asked.min_p * UNIT)
