"""The sampler in numba, for tensors of the CPU: the fast twin of `sampler_torch`.

The same numbers in the same single operations (`fixed_weights`), so the same tokens. Where the twin sorts,
this one finds the last token that stays by histograms of counts and masses.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from longforge.engine.draws_cpu import uniform
from longforge.engine.fixed_weights import LOG2_E, LOG_2, LOWEST, POWERS, SERIES, UNIT
from longforge.engine.sampler_cpu_filters import drop_unlikely, keep_leading
from longforge.engine.sampler_rows import LOW_32, Chosen, Edits, Row, edits, joined, stacked_masks
from longforge.kernels.numba_host import compiled

__all__ = ["choose", "top", "totals"]

_FEW = 64
"""Alternatives that are found by insertion; more of them by sorting."""
_POWERS = np.array(POWERS)
_NO_MASKS = np.zeros((0, 0), dtype=np.uint32)
_NO_INTEGERS = np.zeros(0, dtype=np.int64)
_NO_REALS = np.zeros(0)
_NO_EDITS = Edits(_NO_INTEGERS, _NO_REALS, _NO_REALS, _NO_REALS)
_A12, _A11, _A10, _A9, _A8, _A7, _A6, _A5, _A4, _A3, _A2, _A1, _A0 = SERIES


def choose(logits: Tensor, rows: Sequence[Row]) -> Chosen:
    """A token per row, by inverse transform sampling over ascending ids. logits: fp32 [R, V]."""
    vocab = logits.shape[-1]
    settings, edited, masked = list[float](), False, False
    for row in rows:
        p, seed = row.params, row.seed
        settings += (p.temperature, p.top_p, p.min_p, min(p.top_k, vocab), row.position)
        settings += (seed & LOW_32, seed >> 32 & LOW_32)
        edited |= bool(p.logit_bias) or p.needs_counts or row.generated < p.min_tokens
        masked |= row.mask is not None
    starts, change = _edits(rows, vocab) if edited else (_NO_INTEGERS, _NO_EDITS)
    masks, which = _masks(rows, vocab) if masked else (_NO_MASKS, _NO_INTEGERS)
    table = np.array(settings, dtype=np.float64).reshape(len(rows), 7)
    integers, reals = _choose(logits.contiguous().numpy(), table, starts, *change, masks, which)
    (tokens, totals), (logits_there, peaks) = integers.tolist(), reals.tolist()
    return Chosen(tokens, logits_there, peaks, totals)


def top(logits: Tensor, count: int) -> tuple[list[int], list[float]]:
    """The `count` highest of fp32 [V], highest first, ties to the lower id: (token ids, logits)."""
    row = logits.contiguous().numpy()
    ids = _top(row, count) if count <= _FEW else np.argsort(-row, kind="stable")[:count]
    return ids.tolist(), row[ids].tolist()


def totals(logits: Tensor) -> tuple[list[float], list[int]]:
    """(the highest logit of each row of fp32 [N, V], NaN if one of them is no number or infinity; the sum of
    their weights)."""
    peaks, sums = _totals(logits.contiguous().numpy())
    return peaks.tolist(), sums.tolist()


def _edits(rows: Sequence[Row], vocab: int) -> tuple[Any, Edits]:
    """(where each row's edits start, int64 [R + 1]; all rows' edits one after another)."""
    changes = [edits(row, vocab) or _NO_EDITS for row in rows]
    starts = np.cumsum([0, *(len(change.ids) for change in changes)], dtype=np.int64)
    return starts, joined(changes)


def _masks(rows: Sequence[Row], vocab: int) -> tuple[Any, Any]:
    masks, which = stacked_masks(rows, vocab)
    return masks, np.array(which, dtype=np.int64)


@compiled()
def _choose(logits, settings, starts, ids, repetition, taken, added, masks, which):
    """Per row: (token, sum of the raw weights) int64 [2, R] and (raw logit of the token, highest raw logit)
    float64 [2, R]. settings [R, 7]: temperature, top-p, min-p, top-k, position, and the seed's lower and
    upper 32 bits; one table, because making a second one takes as long as sampling from 500 tokens."""
    count, vocab = logits.shape
    integers, reals = np.zeros((2, count), dtype=np.int64), np.zeros((2, count))
    x, weights = np.empty(vocab), np.empty(vocab, dtype=np.int64)
    for row in range(count):
        integers[0, row] = -1
        if not _widen(logits[row], x):
            continue
        temperature = settings[row, 0]
        peak = reals[1, row] = _highest(x)
        total = integers[1, row] = _weigh(x, peak, 1.0, weights)
        edited = len(starts) > 0 and starts[row + 1] > starts[row]
        if edited:
            part = slice(starts[row], starts[row + 1])
            _edit(x, ids[part], repetition[part], taken[part], added[part])
        masked = len(which) > 0 and which[row] >= 0
        if masked:
            _forbid(x, masks[which[row]])
        if edited or masked:
            if not _widen(x, x):
                continue
            peak = _highest(x)
        if peak == -np.inf:
            continue
        if temperature > 0 and (edited or masked or temperature != 1):
            total = _weigh(x, peak, temperature, weights)
        token = _token(x, weights, peak, total, settings[row])
        integers[0, row], reals[0, row] = token, logits[row, token]
    return integers, reals


@compiled()
def _totals(logits):
    count, vocab = logits.shape
    peaks, sums = np.full(count, np.nan), np.zeros(count, dtype=np.int64)
    x, weights = np.empty(vocab), np.empty(vocab, dtype=np.int64)
    for row in range(count):
        if _widen(logits[row], x):
            peak = _highest(x)
            sums[row] = _weigh(x, peak, 1.0, weights)
            peaks[row] = peak if peak > -np.inf else np.nan
    return peaks, sums


@compiled()
def _top(logits, count):
    """Ids of the highest, by insertion: for small counts."""
    ids = np.empty(min(count, len(logits)), dtype=np.int64)
    size = 0
    for at in range(len(logits)):
        if size == len(ids) and not logits[at] > logits[ids[size - 1]]:
            continue
        place = size if size < len(ids) else size - 1
        size = place + 1
        while place > 0 and logits[at] > logits[ids[place - 1]]:
            ids[place] = ids[place - 1]
            place -= 1
        ids[place] = at
    return ids


@compiled()
def _token(x, weights, peak, total, setting):
    """The token of one row, in whose weights `total` is left."""
    if setting[0] == 0:
        token = 0
        while x[token] != peak:
            token += 1
        return token
    top_p, min_p, top_k = setting[1], setting[2], np.int64(setting[3])
    if 0 < top_k < len(x) or top_p < 1:
        total = keep_leading(x, weights, top_k if top_k > 0 else len(x), top_p, total)
    if min_p > 0:
        total = drop_unlikely(weights, min_p * UNIT)
    seed = np.uint64(setting[5]) | np.uint64(setting[6]) << np.uint64(32)
    target = np.int64(uniform(seed, np.uint64(setting[4])) * total)
    token = 0
    mass = weights[0]
    while mass <= target:
        token += 1
        mass += weights[token]
    return token


@compiled()
def _widen(source, x):
    """Copies a row to fp64; whether it has neither NaN nor +infinity."""
    bad = 0
    for at in range(len(x)):
        x[at] = source[at]
        bad += not (source[at] < np.inf)
    return bad == 0


@compiled()
def _highest(x):
    """The maximum, NaN left out; four at a time, as each comparison waits for the one before."""
    a = b = c = d = -np.inf
    whole = len(x) // 4 * 4
    for at in range(0, whole, 4):
        a = x[at] if x[at] > a else a
        b = x[at + 1] if x[at + 1] > b else b
        c = x[at + 2] if x[at + 2] > c else c
        d = x[at + 3] if x[at + 3] > d else d
    for at in range(whole, len(x)):
        a = x[at] if x[at] > a else a
    return max(max(a, b), max(c, d))


@compiled()
def _edit(x, ids, repetition, taken, added):
    for at in range(len(ids)):
        before = x[ids[at]]
        repeated = before / repetition[at] if before > 0 else before * repetition[at]
        x[ids[at]] = repeated - taken[at] + added[at]


@compiled()
def _forbid(x, mask):
    for at in range(len(x)):
        if not (mask[at >> 5] >> np.uint32(at & 31)) & 1:
            x[at] = -np.inf


@compiled()
def _weigh(x, peak, temperature, weights):
    """weights = round(exp((x - peak) / temperature) * UNIT); their sum."""
    total = 0
    for at in range(len(x)):
        scaled = (x[at] - peak) / temperature
        scaled = scaled if scaled > LOWEST else LOWEST
        halvings = np.rint(scaled * -LOG2_E)
        r = scaled + halvings * LOG_2
        high = (((((_A12 * r + _A11) * r + _A10) * r + _A9) * r + _A8) * r + _A7) * r + _A6
        series = (((((high * r + _A5) * r + _A4) * r + _A3) * r + _A2) * r + _A1) * r + _A0
        weights[at] = np.int64(np.rint(series * _POWERS[np.int64(halvings)]))
        total += weights[at]
    return total
