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
from longforge.kernels.select_blocks.cpu_scan import LEVELS, MOST_CODES, scan
from longforge.kernels.select_blocks.low_precision import CODE_DTYPES, LowPrecisionKeys
from longforge.kernels.select_blocks.ranking import chunks_of, insert_best, sort_ids
from longforge.kernels.tiles.engine import TILE_ENGINE
from longforge.kernels.tiles.forms import widen_codes
from longforge.kernels.tiles.product import TILE_SETTINGS
from longforge.kernels.tiles.vectors import COLUMNS, STEP
from longforge.kernels.vector_code import largest, product_in_order, round_up, transpose, widen

__all__ = ["certified_select_blocks", "fits", "select_blocks"]

OVERFLOW = 2.0**126
"""Sums below it, with their rounding, do not overflow in fp32."""
LARGE = 2.0**90
"""Neither do whole numbers of a query in levels times a scale below it."""
QUERIES = 64
"""Most queries of one path that a block's keys are read for at once."""
SCRATCH = 1 << 23
"""Most block scores held at once (32 MiB)."""


def fits(index_q: Tensor, index_k_pages: Tensor) -> bool:
    """Whether tiles can scan: bf16 queries, bf16 keys or codes, whole steps, sums of int8 codes in int32."""
    known = index_q.dtype == torch.bfloat16 and index_k_pages.dtype in (torch.bfloat16, *CODE_DTYPES)
    codes, dim = index_k_pages.dtype == torch.int8, index_q.shape[2]
    whole = dim % (2 * STEP if codes else STEP) == 0 and index_k_pages.shape[1] % COLUMNS == 0
    return TILE_ENGINE is not None and known and whole and not (codes and dim > MOST_CODES)


def select_blocks(
    index_q: Tensor, keys: Tensor, layout: PackedLayout, top_k: int, scales: Tensor | None = None
) -> Tensor:
    """index_q [N, Hkv, Di], keys [S, Bk, Di], with scales [S, Bk] where they are codes -> int32
    [N, Hkv, K]."""
    return _selected(index_q, keys, scales, None, keys, scales, layout, top_k)[0]


def certified_select_blocks(
    index_q: Tensor, index_k_pages: Tensor, low: LowPrecisionKeys, layout: PackedLayout, top_k: int
) -> tuple[Tensor, Tensor]:
    """The same over index_k_pages from a scan of low; and int32 [N, Hkv], blocks scored in full precision."""
    return _selected(index_q, low.codes, low.scales, low.radius, index_k_pages, None, layout, top_k)


def _selected(
    index_q: Tensor,
    scanned: Tensor,
    scanned_scales: Tensor | None,
    radius: Tensor | None,
    keys: Tensor,
    scales: Tensor | None,
    layout: PackedLayout,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """(selected, opened): scanned is what is scanned, within radius [S] (0 where there is none) of keys, by
    which the rule of arithmetic decides."""
    n, groups, dim = index_q.shape
    selected, opened = np.full((n, groups, top_k), -1, np.int32), np.zeros((n, groups), np.int32)
    if n == 0:
        return torch.from_numpy(selected), torch.from_numpy(opened)
    positions, paths, table = layout_arrays(layout)
    q, some, full = (
        raw_array(index_q),
        (_raw(scanned), _scales(scanned_scales)),
        (_raw(keys), _scales(scales)),
    )
    reach = _reach(dim, scanned.dtype)
    radii = np.zeros((2, *table.shape), np.float32)
    if radius is not None:
        radii[1] = radius.float().numpy()[np.maximum(table, 0)]
    blocks = int(positions.max()) // layout.block_size + 1
    slab = max(QUERIES, SCRATCH // (groups * blocks))
    with parallel_region(q.size * int(positions.max() + 1)):
        for first in range(0, n, slab):
            last = min(n, first + slab)
            # Nothing is ranked where every query may have all its blocks.
            maxima = np.empty((last - first, groups, blocks if blocks > top_k else 0), np.float32)
            if blocks > top_k:
                chunks = chunks_of(path_starts(paths), first, last, QUERIES)
                scan(TILE_SETTINGS, q, *some, positions, paths, table, chunks, first, top_k, radii[0], maxima)
            _rank(maxima, radii, reach, q, *full, positions, paths, table, first, selected, opened)
    return torch.from_numpy(selected), torch.from_numpy(opened)


def _reach(dim: int, scanned: torch.dtype) -> np.ndarray:
    """fp64 [4]: with r the greatest |number| of a page's keys and s its radius, twice the distance between a
    scanned score and the rule's is at most

        r (reach[0] sum |q| + reach[1] max |q|) + s reach[2] norm(q).

    Each of the two sums of Di products is within (Di + 16) 2^-24 of the sum of |q| |k|; a scale costs one
    rounding more, the comparison another. A query in levels is within half a level of itself. reach[3] is the
    greatest code: sums over codes are multiplied by their scale only when they are complete.
    """
    levels = dim / LEVELS * (1 + 2**-10) if scanned == torch.int8 else 0.0
    return np.array([2 * 2 * (dim + 20) * 2.0**-24, levels, 2 + 2**-20, CODE_DTYPES.get(scanned, 0.0)])


def _raw(keys: Tensor) -> np.ndarray:
    """bf16 bits, or int8 codes; FP8 codes as bf16, which holds them all."""
    keys = keys.detach()
    if keys.dtype == torch.int8:
        return keys.contiguous().numpy()
    return raw_array(keys.bfloat16())


def _scales(scales: Tensor | None) -> np.ndarray:
    return np.empty((0, 0), np.float32) if scales is None else scales.contiguous().numpy()


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
    greatest, radius = largest(radii[0, paths[i], :own]), largest(radii[1, paths[i], :own])
    for g in range(groups):
        row = selected[i, g]
        row[top_k - 1] = own
        if top_k == 1:
            continue
        scanned = maxima[g, :own]
        insert_best(scanned, values, ids)
        bound = np.float32(_bound(q[i, g], greatest, radius, reach))
        if values[top_k - 2] - values[top_k - 1] > bound:
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
def _bound(q, greatest, radius, reach):
    """Twice the greatest distance of a scanned score from the rule's, see _reach; infinite where sums might
    overflow, or a query has no levels."""
    total, squares, top = 0.0, 0.0, 0.0
    for bits in q:
        x = abs(np.float64(widen(bits)))
        total += x
        squares += x * x
        top = max(top, x)
    fits_fp32 = total * max(greatest, reach[3]) < OVERFLOW and greatest < LARGE
    if not (fits_fp32 and (top == 0 or top > 1 / LARGE)):
        return np.inf
    rounding = greatest * (reach[0] * total + reach[1] * top)
    # Tiles take numbers below 2^-126 as zeros: far less than the last term.
    return (rounding + radius * reach[2] * np.sqrt(squares)) * (1 + 1e-6) + 1e-30 * (1 + greatest) * (
        1 + total
    )


@compiled(error_model="numpy")
def _score_by_rule(q, keys, scales, i, g, page, tile):
    """The block's score as api.py defines it; tile: scratch."""
    _, block_size, dim = keys.shape
    width = round_up(block_size)
    _widened(tile, width, keys, page)
    query, scores = np.empty(dim, np.float32), dim * width
    for d in range(dim):
        query[d] = widen(q[i, g, d])
    product_in_order(tile, scores, width, query, 0, dim, 1, tile, 0, width, 1, dim, width, False)
    if len(scales):
        for t in range(block_size):
            tile[scores + t] *= scales[page, t]
    return largest(tile[scores : scores + block_size])


# Chosen by dtype while numba compiles, as in cpu_scan.py.
def _widened(tile, width, keys, page) -> Any:
    """tile[d * width + t] = keys[page, t, d] in fp32."""
    raise NotImplementedError("compiled code only")


@overload(_widened)
def _either_widened(tile, width, keys, page):
    return _codes_widened if keys.dtype == types.int8 else _bf16_widened


def _bf16_widened(tile, width, keys, page):
    _, block_size, dim = keys.shape
    transpose(tile, 0, width, keys.reshape(-1), page * block_size * dim, dim, block_size, dim)


def _codes_widened(tile, width, keys, page):
    _, block_size, dim = keys.shape
    rows = np.empty(block_size * dim, np.uint16)
    widen_codes(rows, 0, keys.reshape(-1), page * block_size * dim, block_size * dim)
    transpose(tile, 0, width, rows, 0, dim, block_size, dim)
