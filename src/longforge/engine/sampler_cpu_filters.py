"""Top-k, top-p and min-p without sorting, for compiled loops: what `sampler_torch._inside` keeps."""

import numpy as np

from longforge.kernels.numba_host import compiled

__all__ = ["drop_unlikely", "keep_leading"]

_BUCKETS = 1024
_FEW = 64
"""Candidates that are sorted rather than spread over buckets."""


@compiled()
def drop_unlikely(weights, lowest):
    """Empties the weights below `lowest`; the sum of the others."""
    total = 0
    for at in range(len(weights)):
        weights[at] = weights[at] if weights[at] >= lowest else 0
        total += weights[at]
    return total


@compiled()
def keep_leading(x, weights, top_k, top_p, total):
    """Top-k, then top-p on what it left: empties the weights of the others; the sum of what stays."""
    size = 0
    ids = np.empty(len(x), dtype=np.int64)
    for at in range(len(x)):
        ids[size] = at
        size += weights[at] > 0
    ids = ids[:size]
    if size > top_k:
        ids, total = _leading(x, weights, ids, top_k, np.inf)
    if top_p < 1:
        ids, total = _leading(x, weights, ids, len(ids), max(top_p * total, 1.0))
    kept = weights[ids]
    weights[:] = 0
    weights[ids] = kept
    return total


@compiled()
def _leading(x, weights, ids, count, limit):
    """The ids, ascending, that lead in the order of (x descending, id ascending): at most `count`, and those
    before which less than `limit` of mass lies. Returns (ids that stay, in no order; their mass).

    Each round spreads the range of x over buckets, keeps the leading buckets that stay whole and goes on
    inside the first that does not.
    """
    kept = np.empty(min(count, len(ids)), dtype=np.int64)
    size = mass = 0
    counts, masses = np.empty(_BUCKETS, dtype=np.int64), np.empty(_BUCKETS, dtype=np.int64)
    buckets = np.empty(len(ids), dtype=np.int64)
    while len(ids) > _FEW:
        low, high = _range(x, ids)
        if not 0 < high - low < np.inf:
            break
        counts[:] = 0
        masses[:] = 0
        for at in range(len(ids)):
            bucket = np.int64((high - x[ids[at]]) / (high - low) * (_BUCKETS - 1))
            buckets[at] = bucket
            counts[bucket] += 1
            masses[bucket] += weights[ids[at]]
        edge = 0
        while edge < _BUCKETS and size + counts[edge] <= count and mass + masses[edge] < limit:
            size += counts[edge]
            mass += masses[edge]
            edge += 1
        ids = _split(ids, buckets, edge, kept, size)
    order = np.argsort(-x[ids], kind="mergesort")
    for at in order:
        if size == count or not mass < limit:
            break
        kept[size] = ids[at]
        mass += weights[ids[at]]
        size += 1
    return kept[:size], mass


@compiled()
def _range(x, ids):
    low = high = x[ids[0]]
    for at in ids:
        low, high = min(low, x[at]), max(high, x[at])
    return low, high


@compiled()
def _split(ids, buckets, edge, kept, end):
    """Puts the ids of the buckets before `edge` into `kept` up to `end`; returns those of bucket `edge`."""
    inside = np.empty(len(ids), dtype=np.int64)
    size = 0
    for at in range(len(ids) - 1, -1, -1):
        if buckets[at] < edge:
            end -= 1
            kept[end] = ids[at]
    for at in range(len(ids)):
        if buckets[at] == edge:
            inside[size] = ids[at]
            size += 1
    return inside[:size]
