"""Compiled: which blocks a query reads, and softmax attention over them; a query's row at a time.

A query's keys are taken in spans of blocks; spans' results are merged in order. Where spans begin follows
from the query's own position alone, so a result does not depend on who else is in the step.
"""

import numpy as np

from longforge.kernels.few_tokens.products import add_weighted, score_keys
from longforge.kernels.numba_host import compiled
from longforge.kernels.select_blocks.ranking import insert_best, sort_ids
from longforge.kernels.vector_code import (
    exponential,
    exponentials,
    largest,
    product_in_order,
    round_up,
    transpose,
)

__all__ = ["CHUNK", "SCAN", "attend", "block_maxima", "merge_spans", "rank", "spans_of"]

f32 = np.float32
CHUNK = 512
"""Keys whose scores are held at once, and a short prefix's span."""
SPANS = 64
"""Most spans of a prefix: beyond, spans grow."""
SCAN = 32
"""Blocks of a unit of the scan."""


@compiled()
def spans_of(position, window, block_size):
    """(first block, blocks of a span, number of spans) of what a query at this position sees."""
    first = max(0, position - window + 1) // block_size
    blocks = position // block_size - first + 1
    span = max(1, CHUNK // block_size)
    while (blocks + span - 1) // span > SPANS:
        span *= 2
    return first, span, (blocks + span - 1) // span


@compiled(error_model="numpy")
def block_maxima(
    q, q0, q_row, groups, dim, keys, block_size, pages, positions, begin, end, first, last, top_k, tile,
    scores, maxima,
):  # fmt: skip
    """maxima[i, g, b] = max over block b of q . key, for blocks first..last - 1 before the own of each query
    begin..end - 1 of a path that has more than top_k blocks; by the rule of select_blocks/api.py."""
    width = round_up(block_size)
    for b in range(first, last):
        page = np.int64(pages[b])
        if page >= 0:
            transpose(tile, 0, width, keys, page * block_size * dim, dim, block_size, dim)
        for i in range(begin, end):
            own = positions[i] // block_size
            if own < top_k or b >= own:
                continue
            product_in_order(
                scores, 0, width, q, q0 + i * q_row, dim, 1, tile, 0, width, groups, dim, width, False
            )
            for g in range(groups):
                best = largest(scores[g * width : g * width + block_size])
                maxima[i, g, b] = best if page >= 0 else f32(-np.inf)


@compiled(error_model="numpy")
def rank(maxima, own, values, ids):
    """ids [K] become the own block and the K - 1 best before it, ascending; -1 where there are fewer."""
    top_k = ids.shape[0]
    if own < top_k:
        for b in range(top_k):
            ids[b] = b if b <= own else -1
        return
    if top_k > 1:
        insert_best(maxima[:own], values[: top_k - 1], ids[: top_k - 1])
        sort_ids(ids, top_k - 1)
    ids[top_k - 1] = own


@compiled(error_model="numpy")
def _visit(q, q0, heads, dim, keys, values, at, count, scores, state, out, o):
    """One step of the online softmax over `count` keys; state [2, heads]: greatest scores, sums."""
    score_keys(scores, 0, CHUNK, q, q0, heads, dim, keys, at, count)
    for h in range(heads):
        part = scores[h * CHUNK : h * CHUNK + count]
        top = max(state[0, h], largest(part))
        if top > state[0, h]:
            shrink = exponential(state[0, h] - top)
            state[0, h] = top
            state[1, h] *= shrink
            for d in range(dim):
                out[o + h * dim + d] *= shrink
        exponentials(scores, h * CHUNK, count, top)
        state[1, h] += _sum(part)
    add_weighted(out, o, heads, dim, scores, 0, CHUNK, values, at, count)


@compiled(error_model="numpy", fastmath={"nsz", "reassoc"})
def _sum(x):
    total = f32(0)
    for i in range(x.shape[0]):
        total += x[i]
    return total


@compiled(error_model="numpy")
def attend(
    q, q0, heads, dim, keys, values, key_row, head, block_size, pages, blocks, first, count, position, window,
    at, scores, state, out, o,
):  # fmt: skip
    """out[o + h * dim :] = the sums of exp(q . key - top) * value over what a query at `position` sees of the
    blocks: blocks[first : first + count], or first, first + 1, ... where `blocks` is empty.

    Heads share the kv head at `head` of each key row, key_row long; state [2, heads] gets tops and sums.
    """
    out[o : o + heads * dim] = 0
    state[0, :heads], state[1, :heads] = f32(-np.inf), f32(0)
    held = 0
    for i in range(first, first + count):
        b = i if len(blocks) == 0 else np.int64(blocks[i])
        page = np.int64(-1) if b < 0 else np.int64(pages[b])
        if page < 0:
            continue
        low = max(np.int64(0), position - window + 1 - b * block_size)
        high = min(block_size, position + 1 - b * block_size)
        for t in range(low, high):
            at[held] = (page * block_size + t) * key_row + head
            held += 1
            if held == CHUNK:
                _visit(q, q0, heads, dim, keys, values, at, held, scores, state, out, o)
                held = 0
    if held:
        _visit(q, q0, heads, dim, keys, values, at, held, scores, state, out, o)


@compiled(error_model="numpy")
def merge_spans(parts, first, states, step, spans, out):
    """A head's attention from its spans' sums: span s has them at parts[first + s * step * dim :], its top
    and sum of weights at parts[states + 2 * s * step :]; out [dim]."""
    dim = out.shape[0]
    top = parts[states]
    for s in range(1, spans):
        top = max(top, parts[states + 2 * s * step])
    total = f32(0)
    out[:] = 0
    for s in range(spans):
        weight = exponential(parts[states + 2 * s * step] - top)
        total += weight * parts[states + 2 * s * step + 1]
        for d in range(dim):
            out[d] += weight * parts[first + s * step * dim + d]
    for d in range(dim):
        out[d] /= total
