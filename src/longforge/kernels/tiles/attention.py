"""Attention on the CPU in bf16, on tiles: over selected blocks, or over the whole prefix.

Key/value-outer: a unit of work (some queries, one group) goes through the blocks that its queries see, in
ascending order, and through the queries of each. So a block's keys and values are read once for all of them,
and results of a query add up in the order of its blocks, whatever else is in the batch. All products have
keys, or channels of values, as rows and the G query heads of one query as columns: softmax is then plain
vector arithmetic over rows. Probabilities are rounded to bf16 before they multiply values, as FlashAttention
does (Dao 2023, section 3.1).
"""

from dataclasses import replace

import numpy as np
import torch
from numba import get_num_threads, prange
from torch import Tensor

from longforge.kernels.block_visits import block_visits, chosen_blocks, written
from longforge.kernels.layout import PackedLayout
from longforge.kernels.numba_host import compiled, layout_arrays, parallel_region, raw_array
from longforge.kernels.tiles.attention_in_spans import attend_in_spans, of_few_queries
from longforge.kernels.tiles.attention_step import LOG2_E, finish, fresh_sums, scratch_of, visit_block
from longforge.kernels.tiles.engine import TILE_ENGINE
from longforge.kernels.tiles.product import TILE_SETTINGS, begin_tiles, end_tiles
from longforge.kernels.tiles.vectors import COLUMNS, STEP

__all__ = ["attend", "columns_of", "fits", "pairs_per_query"]

QUERIES = 256
"""Most queries of a unit: their sums, 8 KiB each at D = 128, should stay in the second cache."""


def fits(q: Tensor, k_pages: Tensor) -> bool:
    """Whether tiles can compute it: bf16, whole steps, and heads of a group that fill some of a tile."""
    per_group = q.shape[1] // k_pages.shape[2]
    whole = q.shape[2] % STEP == 0 and k_pages.shape[1] % STEP == 0
    return TILE_ENGINE is not None and q.dtype == torch.bfloat16 and whole and 4 <= per_group <= COLUMNS


def columns_of(q: Tensor, groups: int) -> np.ndarray:
    """uint16 [N, Hkv, 16, D]: the heads of each group, and zeros."""
    heads = q.detach().unflatten(1, (groups, -1))
    missing = COLUMNS - heads.shape[2]
    return raw_array(torch.nn.functional.pad(heads, (0, 0, 0, missing)) if missing else heads)


def attend(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, blocks: Tensor | None, layout: PackedLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """q [N, Hq, D], k_pages and v_pages [S, Bk, Hkv, D], blocks int32 [N, Hkv, K], None for the whole prefix
    -> out [N, Hq, D] in bf16, lse fp32 [N, Hq]."""
    n, heads, _ = q.shape
    groups = k_pages.shape[2]
    positions, paths, table = layout_arrays(layout)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((n, heads), dtype=torch.float32)
    if n == 0:
        return out, lse
    if scale < 0:  # the maximum over scores is taken before they are scaled
        q, scale = -q, -scale
    few = of_few_queries(paths) if blocks is None else np.zeros(n, np.bool_)
    if few.any() and not few.all():
        # Which way a path goes, and so its last bits, must not depend on its neighbours.
        for rows in (torch.from_numpy(few), torch.from_numpy(~few)):
            out[rows], lse[rows] = attend(q[rows], k_pages, v_pages, None, _of_rows(layout, rows), scale)
        return out, lse
    ids = chosen_blocks(blocks)
    columns, k, v = columns_of(q, groups), raw_array(k_pages), raw_array(v_pages)
    factor = np.float32(scale * LOG2_E)
    with parallel_region(2 * q.numel() * pairs_per_query(blocks, layout)):
        if few.all():
            attend_in_spans(
                TILE_SETTINGS, columns, k, v, positions, paths, table, factor, out.view(torch.uint16).numpy(),
                lse.numpy(),
            )  # fmt: skip
            return out, lse
        queries = max(1, min(QUERIES, -(-n * groups // (4 * get_num_threads()))))
        _forward(
            TILE_SETTINGS, columns, k, v, ids, positions, paths, table, factor, queries,
            out.view(torch.uint16).numpy(), lse.numpy(),
        )  # fmt: skip
    return out, lse


def _of_rows(layout: PackedLayout, rows: Tensor) -> PackedLayout:
    """The layout of these tokens alone."""
    positions, paths, slots = (x[rows] for x in (layout.positions, layout.paths, layout.slots))
    return replace(layout, positions=positions, paths=paths, slots=slots)


def pairs_per_query(blocks: Tensor | None, layout: PackedLayout) -> int:
    """(query, key) pairs of a query and head, at most."""
    if blocks is not None:
        return blocks.shape[2] * layout.block_size
    return int(layout.positions.max()) + 1 if len(layout.positions) else 0


@compiled(parallel=True, error_model="numpy")
def _forward(settings, q, k, v, blocks, positions, paths, table, scale, queries, out, lse):
    groups = k.shape[2]
    units = (q.shape[0] + queries - 1) // queries * groups
    for u in prange(units):
        # Later queries may see more: early and late ones take turns, so that every thread gets as much work.
        unit = u // 2 if u % 2 == 0 else units - 1 - u // 2
        begin = unit // groups * queries
        _forward_unit(
            settings, q, k, v, blocks, positions, paths, table, scale, np.int64(unit % groups),
            np.int64(begin), np.int64(min(q.shape[0], begin + queries)), out, lse,
        )  # fmt: skip


@compiled(error_model="numpy")
def _forward_unit(settings, q, k, v, blocks, positions, paths, table, scale, g, begin, end, out, lse):
    dim, block_size, groups = q.shape[3], k.shape[1], k.shape[2]
    sums, state = fresh_sums(end - begin, dim)
    scratch = scratch_of(dim, block_size)
    starts, queries = block_visits(blocks, positions, block_size, g, begin, end, table.shape[1])
    begin_tiles(settings)
    for b in range(table.shape[1]):
        at = starts[b]
        while at < starts[b + 1]:
            page = np.int64(table[paths[queries[at]], b])
            same, known = written(queries, at, starts[b + 1], positions, paths, table, b, block_size)
            visit_block(
                q, k, v, positions, b, page, g, queries[at:same], known, scale, begin, 1, 0, sums, state,
                scratch,
            )  # fmt: skip
            at = same
    end_tiles()
    finish(sums, state, g, groups, begin, end, 1, 0, out, lse)
