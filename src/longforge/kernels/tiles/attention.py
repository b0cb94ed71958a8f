"""Attention on the CPU in bf16, on tiles: over selected blocks, or over the whole prefix.

Key/value-outer: a unit of work (some queries, one group) goes through the blocks that its queries see, in
ascending order, and through the queries of each. So a block's keys and values are read once for all of them,
and results of a query add up in the order of its blocks, whatever else is in the batch. All products have
keys, or channels of values, as rows and the G query heads of one query as columns: softmax is then plain
vector arithmetic over rows. Probabilities are rounded to bf16 before they multiply values, as FlashAttention
does (Dao 2023, section 3.1).
"""

import numpy as np
import torch
from numba import get_num_threads, prange
from torch import Tensor

from longforge.kernels.block_visits import block_visits, chosen_blocks, written
from longforge.kernels.layout import PackedLayout
from longforge.kernels.numba_host import compiled, layout_arrays, parallel_region, raw_array
from longforge.kernels.tiles.engine import TILE_ENGINE
from longforge.kernels.tiles.forms import narrow, panel_of_columns, panels_of_known_rows
from longforge.kernels.tiles.product import TILE_SETTINGS, begin_tiles, end_tiles, tile_product
from longforge.kernels.tiles.softmax import multiply_rows, online_softmax
from longforge.kernels.tiles.vectors import COLUMNS, STEP
from longforge.kernels.vector_code import transpose

__all__ = ["LOG2_E", "attend", "columns_of", "fits", "pairs_per_query", "transposed_block"]

f32 = np.float32
LOG2_E = 1.4426950408889634
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
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty(n, heads)
    ids = chosen_blocks(blocks)
    with parallel_region(2 * q.numel() * pairs_per_query(blocks, layout)):
        queries = max(1, min(QUERIES, -(-n * groups // (4 * get_num_threads()))))
        _forward(
            TILE_SETTINGS, columns_of(q, groups), raw_array(k_pages), raw_array(v_pages), ids, positions,
            paths, table, np.float32(scale * LOG2_E), queries, out.view(torch.uint16).numpy(), lse.numpy(),
        )  # fmt: skip
    return out, lse


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
    dim, block_size = q.shape[3], k.shape[1]
    row = k.shape[2] * dim
    flat_q, flat_k = q.reshape(-1).view(np.uint32), k.reshape(-1)
    sums = np.zeros((end - begin) * dim * COLUMNS, np.float32)
    state = np.zeros((end - begin) * 3 * COLUMNS, np.float32)
    for i in range(end - begin):
        state[i * 3 * COLUMNS : (i * 3 + 1) * COLUMNS] = -np.inf
    panel, tile, size = dim // 2 * COLUMNS, dim * COLUMNS, block_size * COLUMNS
    heads = np.empty(2 * panel, np.uint32)
    scores, shares = np.empty(2 * size, np.float32), np.empty(size, np.uint32)
    values = np.empty(dim * block_size // 2, np.uint32)
    pairs = np.empty(dim * block_size // 2, np.uint32)
    starts, queries = block_visits(blocks, positions, block_size, g, begin, end, table.shape[1])
    begin_tiles(settings)
    for b in range(table.shape[1]):
        page, at, same = np.int64(-1), starts[b], starts[b]
        while at < starts[b + 1]:
            i = queries[at]
            if at == same:
                page = np.int64(table[paths[i], b])
                same, known = written(queries, at, starts[b + 1], positions, paths, table, b, block_size)
                transposed_block(values, pairs, v, page, g, known)
            j, both = i, 1
            if at + 1 < same:
                j, both = queries[at + 1], 2
            for x in range(both):
                first = (queries[at + x] * q.shape[1] + g) * panel
                panel_of_columns(heads, x * panel, flat_q, first, dim // 2, dim)
            # Positions ascend inside a path, but two paths may share the page.
            furthest = max(positions[i], positions[queries[at + both - 1]])
            steps = (min(block_size, furthest - b * block_size + 1) + STEP - 1) // STEP
            first = (page * block_size * k.shape[2] + g) * dim
            tile_product(
                scores, 0, COLUMNS, size, flat_k, first, row, heads, 0, panel, 2 * steps, both, dim // STEP,
                False,
            )  # fmt: skip
            for x in range(both):
                seen = min(block_size, positions[queries[at + x]] - b * block_size + 1)
                mine = (queries[at + x] - begin) * 3 * COLUMNS
                if online_softmax(
                    scores, x * size, seen, steps * STEP, scale, state, mine, shares, x * size // 2
                ):
                    multiply_rows(sums, (queries[at + x] - begin) * tile, dim, state, mine + 2 * COLUMNS)
            tile_product(
                sums, (i - begin) * tile, COLUMNS, (j - i) * tile, values, 0, block_size // 2, shares, 0,
                size // 2, dim // COLUMNS, both, steps, True,
            )  # fmt: skip
            at += both
    end_tiles()
    _finish(sums, state, g, k.shape[2], begin, end, out, lse)


@compiled(error_model="numpy")
def transposed_block(out, pairs, pages, page, g, known):
    """out, bf16 [D, Bk] in uint32: pages[page, :, g] transposed, zeros from row `known` on. pairs: scratch
    of the same size."""
    _, block_size, groups, dim = pages.shape
    half, first = block_size // 2, (page * block_size * groups + g) * dim
    panels_of_known_rows(
        pairs, 0, half * COLUMNS, pages.reshape(-1), first, groups * dim, block_size, known, dim
    )
    for j in range(dim // COLUMNS):
        transpose(out, j * COLUMNS * half, half, pairs, j * half * COLUMNS, COLUMNS, half, COLUMNS)


@compiled(error_model="numpy")
def _finish(sums, state, g, groups, begin, end, out, lse):
    """out = sums over the state's sum, heads first; lse."""
    _, heads, dim = out.shape
    per_group = heads // groups
    flat_out = out.reshape(-1)
    rows = np.empty(COLUMNS * dim, np.float32)
    for i in range(begin, end):
        mine = (i - begin) * 3 * COLUMNS
        for c in range(COLUMNS):
            state[mine + 2 * COLUMNS + c] = np.float32(1) / state[mine + COLUMNS + c]
        multiply_rows(sums, (i - begin) * dim * COLUMNS, dim, state, mine + 2 * COLUMNS)
        transpose(rows, 0, dim, sums, (i - begin) * dim * COLUMNS, COLUMNS, dim, COLUMNS)
        for h in range(per_group):
            narrow(flat_out, (i * heads + g * per_group + h) * dim, rows, h * dim, dim)
            lse[i, g * per_group + h] = state[mine + h] / f32(LOG2_E) + np.log(state[mine + COLUMNS + h])
