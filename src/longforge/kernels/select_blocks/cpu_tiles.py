"""Block selection on the CPU over bf16 keys or int8 codes: a scan on tiles, certified.

The tiles add products in their own order, so a block's scanned score may differ from the one that api.py
defines. Both are within a bound of the exact score (Higham, Accuracy and Stability, 3.1), so a block that is
ahead of the first one left out by more than twice the bound is selected, and one that is behind the last one
taken by more than that is not. What remains, seldom more than a block or two, is scored again by the rule.
The result is the reference's, bit for bit, at the speed of the scan.
"""

from typing import Any

import numpy as np
import torch
from numba import prange, types
from numba.extending import overload
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.numba_host import compiled, layout_arrays, parallel_region, path_starts, raw_array
from longforge.kernels.select_blocks.low_precision import CODE_DTYPES, LowPrecisionKeys
from longforge.kernels.select_blocks.ranking import chunks_of, insert_best, sort_ids
from longforge.kernels.tiles.engine import TILE_ENGINE
from longforge.kernels.tiles.forms import panel_of_columns, widen_codes
from longforge.kernels.tiles.product import begin_tiles, end_tiles, tile_product, tile_settings
from longforge.kernels.tiles.softmax import column_maxima, greatest_bits
from longforge.kernels.tiles.vectors import COLUMNS, STEP
from longforge.kernels.vector_code import largest, product_in_order, round_up, transpose, widen

__all__ = ["certified_select_blocks", "fits", "select_blocks"]

QUERIES = 64
"""Most queries of one path that a block's keys are read for at once."""
SPAN = 64
"""Blocks of one unit of parallel work: one decode query over a long path still fills all threads."""
SCRATCH = 1 << 23
"""Most block scores held at once (32 MiB)."""


def fits(index_q: Tensor, index_k_pages: Tensor) -> bool:
    """Whether tiles can scan: bf16 queries, bf16 keys or int8 codes, whole steps."""
    known = index_q.dtype == torch.bfloat16 and index_k_pages.dtype in (torch.bfloat16, *CODE_DTYPES)
    whole = index_q.shape[2] % STEP == 0 and index_k_pages.shape[1] % COLUMNS == 0
    return TILE_ENGINE is not None and known and whole


def select_blocks(
    index_q: Tensor, keys: Tensor, layout: PackedLayout, top_k: int, scales: Tensor | None = None
) -> Tensor:
    """index_q [N, Hkv, Di], keys [S, Bk, Di], with scales [S, Bk] where they are codes -> int32
    [N, Hkv, K]."""
    # Each of the two sums of Di exact products is within (Di + 16) 2^-24 of the sum of |q| |k|, and so of the
    # sum of |q| times the greatest |k|; a scale costs one rounding more, the comparison another.
    total = index_q.detach().double().abs().sum(2)
    reach = total * (2 * 2 * (index_q.shape[2] + 20) * 2.0**-24) + 1e-30
    return _selected(index_q, keys, scales, None, keys, scales, reach, layout, top_k)[0]


def certified_select_blocks(
    index_q: Tensor, index_k_pages: Tensor, low: LowPrecisionKeys, layout: PackedLayout, top_k: int
) -> tuple[Tensor, Tensor]:
    """The same over index_k_pages from a scan of low; and int32 [N, Hkv], blocks scored in full precision."""
    reach = index_q.detach().double().norm(dim=2) * (2 + 2**-20) + 1e-30
    return _selected(index_q, low.codes, low.scales, low.radius, index_k_pages, None, reach, layout, top_k)


def _selected(
    index_q: Tensor,
    scanned: Tensor,
    scanned_scales: Tensor | None,
    radius: Tensor | None,
    keys: Tensor,
    scales: Tensor | None,
    reach: Tensor,
    layout: PackedLayout,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """(selected, opened). reach [N, Hkv] times a page's radius bounds twice the distance between the scanned
    score of a block and the rule's over keys; without a radius it is the page's greatest |number|."""
    n, groups, _ = index_q.shape
    selected, opened = np.full((n, groups, top_k), -1, np.int32), np.zeros((n, groups), np.int32)
    if n == 0:
        return torch.from_numpy(selected), torch.from_numpy(opened)
    positions, paths, table = layout_arrays(layout)
    q, reaches = raw_array(index_q), reach.float().contiguous().numpy()
    some, full = (_raw(scanned), _scales(scanned_scales)), (_raw(keys), _scales(scales))
    radii = np.zeros(table.shape, np.float32)
    if radius is not None:
        radii = radius.float().numpy()[np.maximum(table, 0)]
    starts, blocks = path_starts(paths), int(positions.max()) // layout.block_size + 1
    slab = max(QUERIES, SCRATCH // (groups * blocks))
    with parallel_region(q.size * int(positions.max() + 1)):
        for first in range(0, n, slab):
            last = min(n, first + slab)
            # Nothing is ranked where every query may have all its blocks.
            maxima = np.empty((last - first, groups, blocks if blocks > top_k else 0), np.float32)
            if blocks > top_k:
                chunks = chunks_of(starts, first, last, QUERIES)
                _scan(
                    tile_settings(), q, *some, positions, paths, table, chunks, first, top_k,
                    radius is None, radii, maxima,
                )  # fmt: skip
            _rank(maxima, radii, reaches, q, *full, positions, paths, table, first, selected, opened)
    return torch.from_numpy(selected), torch.from_numpy(opened)


def _raw(keys: Tensor) -> np.ndarray:
    """bf16 bits, or int8 codes; FP8 codes as bf16, which holds them all."""
    keys = keys.detach()
    if keys.dtype == torch.int8:
        return keys.contiguous().numpy()
    return raw_array(keys.bfloat16())


def _scales(scales: Tensor | None) -> np.ndarray:
    return np.empty((0, 0), np.float32) if scales is None else scales.contiguous().numpy()


@compiled(parallel=True, error_model="numpy")
def _scan(settings, q, keys, scales, positions, paths, table, chunks, first, top_k, measure, radii, maxima):
    spans = (maxima.shape[2] + SPAN - 1) // SPAN
    for unit in prange(len(chunks) * spans):
        begin, end = chunks[unit // spans]
        from_block = unit % spans * SPAN
        # Ascending positions: the chunk's last query has most blocks.
        own = positions[end - 1] // keys.shape[1]
        to_block = min(from_block + SPAN, own)
        if to_block > from_block and own >= top_k:
            _scan_unit(
                settings, q, keys, scales, table[paths[begin]], measure, radii[paths[begin]], begin, end,
                np.int64(from_block), np.int64(to_block), first, maxima,
            )  # fmt: skip


@compiled(error_model="numpy")
def _scan_unit(
    settings, q, keys, scales, pages, measure, radii, begin, end, from_block, to_block, first, maxima
):
    """maxima[i - first, g, b] = max over block b of q[i, g] . key, as the tiles add it up."""
    _, groups, dim = q.shape
    block_size, blocks = keys.shape[1], maxima.shape[2]
    columns = (end - begin) * groups
    panels = (columns + COLUMNS - 1) // COLUMNS
    padded = np.zeros(panels * COLUMNS * dim, np.uint16)
    padded[: columns * dim] = q[begin:end].reshape(-1)
    size, score = dim // 2 * COLUMNS, block_size * COLUMNS
    queries = np.empty(panels * size, np.uint32)
    for j in range(panels):
        panel_of_columns(queries, j * size, padded.view(np.uint32), j * size, dim // 2, dim)
    scores, wide = np.empty(2 * score, np.float32), np.empty(block_size * dim, np.uint16)
    some = np.empty((COLUMNS, panels * COLUMNS), np.float32)
    flat, flat_some, flat_maxima = keys.reshape(-1), some.reshape(-1), maxima.reshape(-1)
    begin_tiles(settings)
    for b in range(from_block, to_block):
        page = np.int64(pages[b])
        rows_of, at = _rows_of(flat, page * block_size * dim, wide, block_size * dim)
        factors = scales[page] if len(scales) else scales.reshape(-1)
        if measure:
            radii[b] = _greatest_number(rows_of, at, block_size * dim, factors)
        for j in range(0, panels, 2):
            both = min(2, panels - j)
            tile_product(
                scores, 0, COLUMNS, score, rows_of, at, dim, queries, j * size, size, block_size // COLUMNS,
                both, dim // STEP, False,
            )  # fmt: skip
            for x in range(both):
                to = (b - from_block) % COLUMNS * panels * COLUMNS + (j + x) * COLUMNS
                column_maxima(flat_some, to, scores, x * score, block_size, factors, 0)
        done = (b - from_block) % COLUMNS + 1
        if done == COLUMNS or b + 1 == to_block:
            to = (begin - first) * groups * blocks + b + 1 - done
            transpose(flat_maxima, to, blocks, flat_some, 0, panels * COLUMNS, done, columns)
    end_tiles()


def _rows_of(keys, first, wide, count) -> Any:
    """(uint16 array, first element) with bf16 bits of keys[first:first + count]; codes go through `wide`."""
    raise NotImplementedError("compiled code only")


@overload(_rows_of)
def _rows_of_either(keys, first, wide, count):
    if keys.dtype == types.int8:

        def widened(keys, first, wide, count):
            widen_codes(wide, 0, keys, first, count)
            return wide, np.int64(0)

        return widened
    return lambda keys, first, wide, count: (keys, first)


@compiled(error_model="numpy")
def _greatest_number(rows, first, count, factors):
    """The greatest |number| of bf16 bits, times the greatest factor where there are some."""
    greatest = widen(greatest_bits(rows, first, count))
    return greatest * largest(factors) if len(factors) else greatest


@compiled(parallel=True, error_model="numpy")
def _rank(maxima, radii, reach, q, keys, scales, positions, paths, table, first, selected, opened):
    """selected[i, g]: the own block and the K - 1 best before it, ascending; -1s stay at the end."""
    for i in prange(maxima.shape[0]):
        _rank_query(
            maxima[i], radii, reach, q, keys, scales, positions, paths, table, np.int64(first + i),
            selected, opened,
        )  # fmt: skip


@compiled(error_model="numpy")
def _rank_query(maxima, radii, reach, q, keys, scales, positions, paths, table, i, selected, opened):
    _, groups, top_k = selected.shape
    own = positions[i] // keys.shape[1]
    if own < top_k:
        for g in range(groups):
            for b in range(own + 1):
                selected[i, g, b] = b
        return
    # The K best of the scan: the last of them is the first that may be left out.
    values, ids = np.empty(top_k, np.float32), np.empty(top_k, np.int32)
    exact, tile = np.empty(own, np.float32), np.empty(0, np.float32)
    top = largest(radii[paths[i], :own])
    for g in range(groups):
        row = selected[i, g]
        row[top_k - 1] = own
        if top_k == 1:
            continue
        scanned = maxima[g, :own]
        insert_best(scanned, values, ids)
        bound = reach[i, g] * top
        if own < top_k or values[top_k - 2] - values[top_k - 1] > bound:
            row[: top_k - 1] = ids[: top_k - 1]
        else:
            # Only what is not surely left out is looked at again; the negation catches NaN.
            bar, count = values[top_k - 2] - bound, 0
            sure = values[top_k - 1] + bound
            for b in range(own):
                exact[b] = -np.inf
                if scanned[b] > sure:
                    exact[b] = np.inf
                elif not scanned[b] < bar:
                    if len(tile) == 0:
                        tile = np.empty((keys.shape[2] + 1) * round_up(keys.shape[1]), np.float32)
                    exact[b] = _score_by_rule(q, keys, scales, i, g, np.int64(table[paths[i], b]), tile)
                    count += 1
            opened[i, g] = count
            insert_best(exact, values[: top_k - 1], ids[: top_k - 1])
            row[: top_k - 1] = ids[: top_k - 1]
        sort_ids(row, top_k - 1)


@compiled(error_model="numpy")
def _score_by_rule(q, keys, scales, i, g, page, tile):
    """The block's score as api.py defines it; tile: scratch."""
    _, block_size, dim = keys.shape
    width = round_up(block_size)
    flat = keys.reshape(-1)
    wide = np.empty(block_size * dim if len(scales) else 0, np.uint16)
    rows, first = _rows_of(flat, page * block_size * dim, wide, block_size * dim)
    transpose(tile, 0, width, rows, first, dim, block_size, dim)
    query, scores = np.empty(dim, np.float32), dim * width
    for d in range(dim):
        query[d] = widen(q[i, g, d])
    product_in_order(tile, scores, width, query, 0, dim, 1, tile, 0, width, 1, dim, width, False)
    if len(scales):
        for t in range(block_size):
            tile[scores + t] *= scales[page, t]
    return largest(tile[scores : scores + block_size])
