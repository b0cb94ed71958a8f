"""Compiled: the best score of each block, on tiles, as cpu_tiles.py needs it.

Keys are rows and (query, group) pairs are columns of the products, so a block's score is a maximum over rows.
Queries that meet int8 codes are cut into two int8 parts: query ~ range (128 high + low), 15 bits of the
greatest number. Sums of their products are exact in int32.
"""

from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import overload

from longforge.kernels.numba_host import compiled
from longforge.kernels.tiles.forms import panel_of_columns
from longforge.kernels.tiles.product import begin_tiles, end_tiles, tile_product
from longforge.kernels.tiles.softmax import code_maxima, column_maxima, greatest_bits
from longforge.kernels.tiles.vectors import COLUMNS, STEP
from longforge.kernels.vector_code import transpose, widen

__all__ = ["LEVELS", "MOST_CODES", "scan"]

SPAN = 64
"""Blocks of one unit of parallel work: one decode query over a long path still fills all threads."""
LEVELS = 127 * 128
"""Greatest whole number that stands for a query's number."""
MOST_CODES = 1024
"""Longest keys of codes whose sums int32 holds: 1024 * 128 * LEVELS < 2**31."""
GREATEST_FP8, GREATEST_INT8 = 448, 128
f32 = np.float32


@compiled(parallel=True, error_model="numpy")
def scan(settings, q, keys, scales, positions, paths, table, chunks, first, top_k, radii, maxima):
    """maxima[i - first, g, b] = max over block b of q[i, g] . key, as the tiles add it up, for the blocks b
    before the query's own; radii[p, b] = a bound of the |numbers| of the page's keys.

    q uint16 [N, Hkv, Di]; keys [S, Bk, Di], uint16 or int8; scales fp32 [S, Bk] or [0, 0]; chunks int64
    [C, 2], runs of queries of one path; maxima fp32 [n, Hkv, blocks]; radii fp32 [P, M].
    """
    spans = (maxima.shape[2] + SPAN - 1) // SPAN
    for unit in prange(len(chunks) * spans):
        begin, end = chunks[unit // spans]
        from_block = unit % spans * SPAN
        # Ascending positions: the chunk's last query has most blocks.
        own = positions[end - 1] // keys.shape[1]
        to_block = min(from_block + SPAN, own)
        if to_block > from_block and own >= top_k:
            _scan_unit(
                settings, q, keys, scales, table[paths[begin]], radii[paths[begin]], begin, end,
                np.int64(from_block), np.int64(to_block), first, maxima,
            )  # fmt: skip


@compiled(error_model="numpy")
def _scan_unit(settings, q, keys, scales, pages, radii, begin, end, from_block, to_block, first, maxima):
    groups, blocks, columns = q.shape[1], maxima.shape[2], (end - begin) * q.shape[1]
    panels = (columns + COLUMNS - 1) // COLUMNS
    padded = np.zeros(panels * COLUMNS * q.shape[2], np.uint16)
    padded[: columns * q.shape[2]] = q[begin:end].reshape(-1)
    queries, ranges, scores = _prepared(padded, panels, keys)
    some = np.empty((COLUMNS, panels * COLUMNS), np.float32)
    flat_some, flat_maxima = some.reshape(-1), maxima.reshape(-1)
    begin_tiles(settings)
    for b in range(from_block, to_block):
        to = (b - from_block) % COLUMNS * panels * COLUMNS
        radii[b] = _scan_block(
            queries, ranges, panels, keys, scales, np.int64(pages[b]), scores, flat_some, to
        )
        done = (b - from_block) % COLUMNS + 1
        if done == COLUMNS or b + 1 == to_block:
            at = (begin - first) * groups * blocks + b + 1 - done
            transpose(flat_maxima, at, blocks, flat_some, 0, panels * COLUMNS, done, columns)
    end_tiles()


# numba chooses by the keys' dtype while it compiles; the two functions that raise are only the names it knows
# the choice by.
def _prepared(rows, panels, keys) -> Any:
    """(panels of the queries, ranges of their columns, scratch for scores) as _scan_block wants them."""
    raise NotImplementedError("compiled code only")


@overload(_prepared)
def _either_prepared(rows, panels, keys):
    return _prepared_for_codes if keys.dtype == types.int8 else _prepared_for_bf16


def _scan_block(queries, ranges, panels, keys, scales, page, scores, out, to) -> Any:
    """out[to + c] = the best score of the page for column c; returns a bound of the |numbers| of its keys."""
    raise NotImplementedError("compiled code only")


@overload(_scan_block)
def _scan_either_block(queries, ranges, panels, keys, scales, page, scores, out, to):
    return _scan_codes if keys.dtype == types.int8 else _scan_bf16


def _prepared_for_bf16(rows, panels, keys):
    dim, size = keys.shape[2], keys.shape[2] // 2 * COLUMNS
    queries = np.empty(panels * size, np.uint32)
    for j in range(panels):
        panel_of_columns(queries, j * size, rows.view(np.uint32), j * size, dim // 2, dim)
    return queries, np.empty(0, np.float32), np.empty(2 * keys.shape[1] * COLUMNS, np.float32)


def _scan_bf16(queries, ranges, panels, keys, scales, page, scores, out, to):
    _, block_size, dim = keys.shape
    size, score, first = dim // 2 * COLUMNS, block_size * COLUMNS, page * block_size * dim
    factors, flat = scales[page] if len(scales) else ranges, keys.reshape(-1)
    for j in range(0, panels, 2):
        both = min(2, panels - j)
        tile_product(
            scores, 0, COLUMNS, score, flat, first, dim, queries, j * size, size, block_size // COLUMNS, both,
            dim // STEP, False,
        )  # fmt: skip
        for x in range(both):
            column_maxima(out, to + (j + x) * COLUMNS, scores, x * score, block_size, factors, 0)
    if len(scales):
        return f32(GREATEST_FP8) * _greatest(factors)
    return widen(greatest_bits(flat, first, block_size * dim))


@compiled(error_model="numpy", fastmath={"nnan", "nsz", "reassoc"})
def _greatest(factors):
    """The greatest |factor| of a non-empty row."""
    best = abs(factors[0])
    for t in range(factors.shape[0]):
        best = max(best, abs(factors[t]))
    return best


def _prepared_for_codes(rows, panels, keys):
    dim, columns = keys.shape[2], panels * COLUMNS
    parts, ranges = np.empty((2, columns * dim), np.int8), np.empty(columns, np.float32)
    for c in range(columns):
        greatest = f32(0)
        for d in range(dim):
            greatest = max(greatest, abs(widen(rows[c * dim + d])))
        ranges[c] = greatest / f32(LEVELS) if greatest > 0 else f32(1)
        for d in range(dim):
            level = np.int64(np.rint(widen(rows[c * dim + d]) / ranges[c]))
            high = (level + 64) >> 7
            parts[0, c * dim + d] = high
            parts[1, c * dim + d] = level - 128 * high
    size = dim // 4 * COLUMNS
    queries = np.empty(2 * panels * size, np.uint32)
    for j in range(panels):
        for x in range(2):
            quads = parts[x].view(np.uint32)
            panel_of_columns(queries, (2 * j + x) * size, quads, j * size, dim // 4, dim // 2)
    return queries, ranges, np.empty(2 * keys.shape[1] * COLUMNS, np.int32)


def _scan_codes(queries, ranges, panels, keys, scales, page, scores, out, to):
    _, block_size, dim = keys.shape
    size, score = dim // 4 * COLUMNS, block_size * COLUMNS
    factors, flat = scales[page], keys.reshape(-1)
    for j in range(panels):
        tile_product(
            scores, 0, COLUMNS, score, flat, page * block_size * dim, dim, queries, 2 * j * size, size,
            block_size // COLUMNS, 2, dim // (2 * STEP), False,
        )  # fmt: skip
        code_maxima(
            out, to + j * COLUMNS, scores[:score], scores[score:], 0, block_size, factors, 0, ranges,
            j * COLUMNS,
        )  # fmt: skip
    return f32(GREATEST_INT8) * _greatest(factors)
