"""Compiled: which blocks a query reads, and softmax attention over them; a query's row at a time.

A query's keys are taken in spans of blocks; spans' results are merged in order. Where spans begin follows
from the query's own position alone, so a result does not depend on who else is in the step.
"""

from typing import Any, NamedTuple

import numpy as np

from longforge.kernels.few_tokens.pages import exponentials_and_sum, gathered, greatest, prefetch, spread
from longforge.kernels.few_tokens.products import add_page, score_page
from longforge.kernels.few_tokens.vectors import borrowed
from longforge.kernels.numba_host import compiled
from longforge.kernels.select_blocks.ranking import insert_best, sort_ids
from longforge.kernels.vector_code import (
    exponential,
    largest,
    product_in_order,
    round_up,
    transpose,
)

__all__ = [
    "CHUNK",
    "HEADS",
    "SCAN",
    "SPANS",
    "attend",
    "block_maxima",
    "borrowed_desk",
    "desk_for",
    "merge_spans",
    "rank",
    "shares",
    "spans_of",
]

f32 = np.float32
CHUNK = 512
"""Keys whose scores are held at once, and a short prefix's span."""
HEADS = 16
"""Heads that a unit holds scores of, if they are of several groups."""
SPANS = 64
"""Most spans of a prefix: beyond, spans grow."""
SCAN = 8
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


class Desk(NamedTuple):
    """Where a unit of attention works: G kv heads of H heads each, up to P pages at once, of W scores."""

    pages: Any
    """int64 [G P 3]: a page's first element of this kv head, and which of its keys are seen, from and to."""
    q: Any
    """fp32 [G H D], spread."""
    scores: Any
    """fp32 [G H W], W >= P Bk a multiple of sixteen; then their exponentials."""
    sums: Any
    """fp32 [G H D], spread: weighted sums of values."""
    tops: Any
    """fp32 [G H], greatest scores."""
    totals: Any
    """fp32 [G H], sums of exponentials."""
    best: Any
    """fp32 [K], for ranking."""


@compiled()
def pages_at_once(block_size):
    """Pages whose scores are held together."""
    return max(1, CHUNK // block_size)


@compiled()
def desk_for(groups, heads, dim, block_size, top_k):
    pages = pages_at_once(block_size)
    rows = groups * heads
    return Desk(
        np.empty(groups * pages * 3, np.int64), np.empty(rows * dim, f32),
        np.empty(rows * round_up(pages * block_size), f32), np.empty(rows * dim, f32), np.empty(rows, f32),
        np.empty(rows, f32), np.empty(max(1, top_k), f32),
    )  # fmt: skip


@compiled()
def borrowed_desk(desk):
    """The same without owners, see `borrowed`."""
    return Desk(
        borrowed(desk.pages), borrowed(desk.q), borrowed(desk.scores), borrowed(desk.sums),
        borrowed(desk.tops), borrowed(desk.totals), borrowed(desk.best),
    )  # fmt: skip


@compiled(error_model="numpy")
def _list_pages(desk, groups, dim, key_row, head, block_size, pages, blocks, first, count, position, window):
    """desk.pages of the next `count` blocks; of a block without a page nothing is seen."""
    at_once = pages_at_once(block_size)
    for g in range(groups):
        for e in range(count):
            b = first + e if blocks.shape[0] == 0 else np.int64(blocks[g, first + e])
            page = np.int64(-1) if b < 0 else np.int64(pages[b])
            at = (g * at_once + e) * 3
            if page < 0:
                desk.pages[at] = desk.pages[at + 1] = desk.pages[at + 2] = 0
                continue
            desk.pages[at] = page * block_size * key_row + head + g * dim
            desk.pages[at + 1] = max(np.int64(0), position - window + 1 - b * block_size)
            desk.pages[at + 2] = min(block_size, position + 1 - b * block_size)


@compiled(error_model="numpy")
def attend(
    q, q0, groups, heads, dim, keys, values, key_row, head, block_size, pages, blocks, first, count, position,
    window, desk,
):  # fmt: skip
    """What a query at `position` sees of the blocks: desk.sums get the sums of exp(q . key - top) * value.

    blocks [G, K] holds each kv head's, and those at first : first + count are read; where it is empty they
    are first, first + 1, ... The kv heads stand beside each other from `head` on in each key row, key_row
    long; tops and totals go to the desk.
    """
    at_once, rows = pages_at_once(block_size), groups * heads
    width = round_up(at_once * block_size)
    for r in range(rows):
        spread(desk.q, r * dim, q, q0 + r * dim, dim, keys)
        desk.tops[r], desk.totals[r] = f32(-np.inf), f32(0)
    for d in range(rows * dim):
        desk.sums[d] = f32(0)
    for begin in range(first, first + count, at_once):
        held = min(at_once, first + count - begin)
        _list_pages(
            desk, groups, dim, key_row, head, block_size, pages, blocks, begin, held, position, window
        )
        _score_pages(desk, groups, heads, dim, keys, values, key_row, block_size, held)
        padded = round_up(held * block_size)
        for r in range(rows):
            for j in range(r * width + held * block_size, r * width + padded):
                desk.scores[j] = f32(-np.inf)
            _weigh(desk, r, dim, r * width, padded)
        _add_pages(desk, groups, heads, dim, values, key_row, block_size, held)


@compiled(error_model="numpy")
def _score_pages(desk, groups, heads, dim, keys, values, key_row, block_size, held):
    """Scores of the listed pages. Page after page: kv heads of one share its memory. The next is asked for
    before this one is read, and then the first page of values."""
    at_once = pages_at_once(block_size)
    width = round_up(at_once * block_size)
    for e in range(held):
        for g in range(groups):
            at, row = (g * at_once + e) * 3, g * heads
            if e + 1 < held:
                prefetch(keys, desk.pages[at + 3], key_row, block_size, dim)
            else:
                prefetch(values, desk.pages[at - 3 * e], key_row, block_size, dim)
            score_page(
                desk.scores, row * width + e * block_size, width, desk.q, row * dim, heads, dim, keys,
                desk.pages[at], key_row, desk.pages[at + 1], desk.pages[at + 2], block_size,
            )  # fmt: skip


@compiled(error_model="numpy")
def _add_pages(desk, groups, heads, dim, values, key_row, block_size, held):
    at_once = pages_at_once(block_size)
    width = round_up(at_once * block_size)
    for e in range(held):
        for g in range(groups):
            at, row = (g * at_once + e) * 3, g * heads
            if e + 1 < held:
                prefetch(values, desk.pages[at + 3], key_row, block_size, dim)
            add_page(
                desk.sums, row * dim, heads, dim, desk.scores, row * width + e * block_size, width, values,
                desk.pages[at], key_row, desk.pages[at + 1], desk.pages[at + 2],
            )  # fmt: skip


@compiled(error_model="numpy")
def _weigh(desk, r, dim, first, count):
    """A step of the online softmax of row r: scores[first : first + count] become exp(itself - top)."""
    top = max(desk.tops[r], greatest(desk.scores, first, count))
    if top == -np.inf:  # nothing is seen yet
        return
    if top > desk.tops[r]:
        shrink = exponential(desk.tops[r] - top)
        desk.tops[r] = top
        desk.totals[r] *= shrink
        for d in range(r * dim, (r + 1) * dim):
            desk.sums[d] *= shrink
    desk.totals[r] += exponentials_and_sum(desk.scores, first, count, top)


@compiled(error_model="numpy")
def shares(out, o, rows, dim, desk, values):
    """out[o + r * dim :] = what row r of the desk gets from attention: its sums over its total."""
    for r in range(rows):
        gathered(out, o + r * dim, desk.sums, r * dim, dim, f32(1) / desk.totals[r], values)


@compiled(error_model="numpy")
def merge_spans(parts, first, states, spans, out):
    """A head's attention from its spans' sums: span s has them at parts[first + s * dim :], its top and sum
    of weights at parts[states + 2 * s :]; out [dim]."""
    dim = out.shape[0]
    top = parts[states]
    for s in range(1, spans):
        top = max(top, parts[states + 2 * s])
    total = f32(0)
    out[:] = 0
    for s in range(spans):
        weight = exponential(parts[states + 2 * s] - top)
        total += weight * parts[states + 2 * s + 1]
        for d in range(dim):
            out[d] += weight * parts[first + s * dim + d]
    for d in range(dim):
        out[d] /= total
