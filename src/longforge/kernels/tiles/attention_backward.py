"""Gradients of attention.py.

Key/value-outer too. Gradients of a block's keys and values grow in scratch while its queries
go by, a batch of them side by side, so that one product adds the whole batch; those of a query grow in fp32
until its segment of the path is done. A unit of work owns what it adds to: its group of its path's pages, or
of all pages where paths share some. So no sum depends on threads.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from longforge.kernels.block_visits import block_visits, chosen_blocks, written
from longforge.kernels.layout import PackedLayout
from longforge.kernels.numba_host import (
    compiled,
    layout_arrays,
    parallel_region,
    path_starts,
    raw_array,
    shares_pages,
)
from longforge.kernels.tiles.attention import columns_of, pairs_per_query
from longforge.kernels.tiles.attention_step import LOG2_E, transposed_block
from longforge.kernels.tiles.forms import narrow, panel_of_columns, panels_of_rows
from longforge.kernels.tiles.product import TILE_SETTINGS, begin_tiles, end_tiles, tile_product
from longforge.kernels.tiles.softmax import softmax_gradients
from longforge.kernels.tiles.vectors import COLUMNS, STEP
from longforge.kernels.vector_code import transpose

__all__ = ["gradients"]

SEGMENT = 512
"""Queries whose gradients are held at once, 8 KiB each at D = 128; a block is read once for each segment."""
BATCH = 8
"""Queries that one product adds to a block's gradients."""


def gradients(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    blocks: Tensor | None,
    layout: PackedLayout,
    scale: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_q in bf16, d_k and d_v in fp32)."""
    groups = k_pages.shape[2]
    positions, paths, table = layout_arrays(layout)
    delta = (d_out.float() * out.float()).sum(-1)
    d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32) for x in (k_pages, v_pages))
    ids = chosen_blocks(blocks)
    starts = np.array([0, len(paths)]) if shares_pages(table) else path_starts(paths)
    with parallel_region(5 * q.numel() * pairs_per_query(blocks, layout)):
        _backward(
            TILE_SETTINGS, columns_of(q, groups), columns_of(d_out.to(q.dtype), groups), raw_array(k_pages),
            raw_array(v_pages), ids, positions, paths, table, np.float32(scale), _lanes(lse * LOG2_E, groups),
            _lanes(delta, groups), starts, d_q.view(torch.uint16).numpy(), d_k.numpy(), d_v.numpy(),
        )  # fmt: skip
    return d_q, d_k, d_v


def _lanes(x: Tensor, groups: int) -> np.ndarray:
    """x [N, Hq] -> fp32 [N, Hkv, 16], zeros where there is no head."""
    x = x.float().unflatten(1, (groups, -1))
    return torch.nn.functional.pad(x, (0, COLUMNS - x.shape[2])).contiguous().numpy()


@compiled(parallel=True, error_model="numpy")
def _backward(
    settings, q, d_out, k, v, blocks, positions, paths, table, scale, lse, delta, starts, d_q, d_k, d_v
):
    groups = k.shape[2]
    for unit in prange((len(starts) - 1) * groups):
        g, begin, end = unit % groups, starts[unit // groups], starts[unit // groups + 1]
        for first in range(begin, end, SEGMENT):
            _segment(
                settings, q, d_out, k, v, blocks, positions, paths, table, scale, lse, delta, np.int64(g),
                np.int64(first), np.int64(min(end, first + SEGMENT)), d_q, d_k, d_v,
            )  # fmt: skip


@compiled(error_model="numpy")
def _segment(
    settings, q, d_out, k, v, blocks, positions, paths, table, scale, lse, delta, g, begin, end, d_q, d_k, d_v
):
    dim, block_size = q.shape[3], k.shape[1]
    d_queries = np.zeros((end - begin) * dim * COLUMNS, np.float32)
    d_keys, d_values = np.empty((2, block_size * dim), np.float32)
    keys = np.empty(dim * block_size // 2, np.uint32)
    pairs = np.empty(dim * block_size // 2, np.uint32)
    # Of a batch: shares and gradients of scores, queries and output gradients as right sides.
    shares, d_scores = np.zeros((2, block_size * BATCH * COLUMNS), np.uint16)
    right_q, right_d_out = np.zeros((2, dim * BATCH * COLUMNS // 2), np.uint32)
    starts, queries = block_visits(blocks, positions, block_size, g, begin, end, table.shape[1])
    begin_tiles(settings)
    for b in range(table.shape[1]):
        at = starts[b]
        while at < starts[b + 1]:
            page = np.int64(table[paths[queries[at]], b])
            same, known = written(queries, at, starts[b + 1], positions, paths, table, b, block_size)
            transposed_block(keys, pairs, k, page, g, known)
            d_keys[:] = 0
            d_values[:] = 0
            while at < same:
                count = min(BATCH, same - at)
                for x in range(0, count, 2):
                    _visit(
                        q, d_out, k, v, keys, page, b, positions, scale, lse, delta, g,
                        queries[at + x : at + min(x + 2, count)], begin, x, shares, d_scores, right_q,
                        right_d_out, d_queries,
                    )  # fmt: skip
                at += count
                _add_batch(count, shares, right_d_out, d_values, block_size, dim)
                _add_batch(count, d_scores, right_q, d_keys, block_size, dim)
            _add_block(d_keys, d_k, page, g, known, scale)
            _add_block(d_values, d_v, page, g, known, np.float32(1))
    end_tiles()
    _store_queries(d_queries, g, k.shape[2], begin, end, scale, d_q)


@compiled(error_model="numpy")
def _visit(
    q, d_out, k, v, keys, page, b, positions, scale, lse, delta, g, queries, begin, place, shares, d_scores,
    right_q, right_d_out, d_queries,
):  # fmt: skip
    """One or two queries at one block: their places in the batch are filled, and their own gradients grow."""
    _, block_size, groups, dim = k.shape
    both, size, row = len(queries), block_size * COLUMNS, BATCH * COLUMNS
    scores, d_shares = np.empty((2, 2 * size), np.float32)
    panel, tiles, steps = max(dim, block_size) // 2 * COLUMNS, block_size // COLUMNS, dim // STEP
    panels, first = np.empty(2 * panel, np.uint32), (page * block_size * groups + g) * dim
    for matrix, rows, out in ((q, k, scores), (d_out, v, d_shares)):
        for x in range(both):
            at = (queries[x] * groups + g) * COLUMNS * dim // 2
            panel_of_columns(panels, x * panel, matrix.reshape(-1).view(np.uint32), at, dim // 2, dim)
        tile_product(
            out, 0, COLUMNS, size, rows.reshape(-1), first, groups * dim, panels, 0, panel, tiles, both,
            steps, False,
        )  # fmt: skip
    for x in range(both):
        lanes, seen = (queries[x] * groups + g) * COLUMNS, positions[queries[x]] - b * block_size + 1
        softmax_gradients(
            scores, d_shares, x * size, min(block_size, seen), block_size, scale * np.float32(LOG2_E),
            lse.reshape(-1), delta.reshape(-1), lanes, shares, d_scores, (place + x) * COLUMNS, row, panels,
            x * panel,
        )  # fmt: skip
        to = (place + x) * COLUMNS // 2 * COLUMNS
        panels_of_rows(right_q, to, row // 2 * COLUMNS, q.reshape(-1), lanes * dim, dim, COLUMNS, dim)
        panels_of_rows(right_d_out, to, row // 2 * COLUMNS, d_out.reshape(-1), lanes * dim, dim, COLUMNS, dim)
    own, other = (queries[0] - begin) * dim * COLUMNS, (queries[both - 1] - begin) * dim * COLUMNS
    tile_product(
        d_queries, own, COLUMNS, other - own, keys, 0, block_size // 2, panels, 0, panel, dim // COLUMNS,
        both, block_size // STEP, True,
    )  # fmt: skip


@compiled(error_model="numpy")
def _add_batch(count, left, right, sums, block_size, dim):
    """sums [Bk, D] += left [Bk, 16 count] @ right [16 count, D]."""
    row = BATCH * COLUMNS
    if count * COLUMNS % STEP:
        for r in range(block_size):
            left[r * row + count * COLUMNS : r * row + (count + 1) * COLUMNS] = 0
    steps = (count * COLUMNS + STEP - 1) // STEP
    tile_product(
        sums, 0, dim, COLUMNS, left, 0, row, right, 0, row // 2 * COLUMNS, block_size // COLUMNS,
        dim // COLUMNS, steps, True,
    )  # fmt: skip


@compiled(error_model="numpy")
def _add_block(sums, pages, page, g, known, factor):
    """pages[page, :known, g] += factor * sums."""
    dim = pages.shape[3]
    for r in range(known):
        target, source = pages[page, r, g], sums[r * dim : (r + 1) * dim]
        for d in range(dim):
            target[d] += factor * source[d]


@compiled(error_model="numpy")
def _store_queries(d_queries, g, groups, begin, end, scale, d_q):
    _, heads, dim = d_q.shape
    per_group = heads // groups
    rows = np.empty(COLUMNS * dim, np.float32)
    for i in range(begin, end):
        transpose(rows, 0, dim, d_queries, (i - begin) * dim * COLUMNS, COLUMNS, dim, COLUMNS)
        for x in range(len(rows)):
            rows[x] *= scale
        for h in range(per_group):
            narrow(d_q.reshape(-1), (i * heads + g * per_group + h) * dim, rows, h * dim, dim)
