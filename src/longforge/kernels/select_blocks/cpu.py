"""Block selection on the CPU: scores and block maximum in one pass, then a small insertion top-k.

bf16 queries go to cpu_tiles.py where the processor multiplies bf16; what follows is for the others. Products
and sums follow api.py's rule of arithmetic to the bit (no fused multiply-add, no reordering), so the choice
equals the reference's and does not depend on chunks or threads. A block of index keys is transposed once into
scratch and serves all groups of a few queries. The own block is forced, so its score is never needed, and
every block that is scored lies wholly before the query: no mask is left.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.numba_host import compiled, layout_arrays, parallel_region, path_starts, raw_array
from longforge.kernels.select_blocks import cpu_tiles
from longforge.kernels.select_blocks.low_precision import CODE_DTYPES, LowPrecisionKeys
from longforge.kernels.select_blocks.ranking import chunks_of, insert_best, sort_ids
from longforge.kernels.vector_code import product_in_order, round_up, transpose

__all__ = ["certified_select_blocks", "select_blocks"]

QUERIES = 16
"""Most queries of one path that share a transposed block."""
SPAN = 64
"""Blocks of one unit of parallel work: one decode query over a long path still fills all threads."""
SCRATCH = 1 << 23
"""Most block scores held at once (32 MiB)."""


def select_blocks(
    index_q: Tensor,
    index_k_pages: Tensor,
    layout: PackedLayout,
    top_k: int,
    index_k_scales: Tensor | None = None,
) -> Tensor:
    """index_q [N, Hkv, Di], index_k_pages [S, Bk, Di], index_k_scales [S, Bk] -> int32 [N, Hkv, K]. See
    api.py."""
    if cpu_tiles.fits(index_q, index_k_pages):
        return cpu_tiles.select_blocks(index_q, index_k_pages, layout, top_k, index_k_scales)
    n, groups, _ = index_q.shape
    selected = np.full((n, groups, top_k), -1, dtype=np.int32)
    if n == 0:
        return torch.from_numpy(selected)
    positions, paths, table = layout_arrays(layout)
    q = index_q.float().contiguous().numpy()
    rounded = index_k_pages.dtype in (torch.float64, *CODE_DTYPES)
    keys = raw_array(index_k_pages.float() if rounded else index_k_pages)
    scales = np.empty((0, 0), np.float32)
    if index_k_scales is not None:
        scales = index_k_scales.contiguous().numpy()
    blocks = int(positions.max()) // layout.block_size + 1
    slab = max(QUERIES, SCRATCH // (groups * blocks))
    with parallel_region(q.size * int(positions.max() + 1)):
        for first in range(0, n, slab):
            last = min(n, first + slab)
            # Nothing is ranked where every query may have all its blocks.
            maxima = np.empty((last - first, groups, blocks if blocks > top_k else 0), dtype=np.float32)
            if blocks > top_k:
                chunks = chunks_of(path_starts(paths), first, last, QUERIES)
                _block_maxima(q, keys, scales, positions, paths, table, chunks, first, top_k, maxima)
            _best_blocks(maxima, positions[first:last], layout.block_size, selected[first:last])
    return torch.from_numpy(selected)


def certified_select_blocks(
    index_q: Tensor, index_k_pages: Tensor, low: LowPrecisionKeys, layout: PackedLayout, top_k: int
) -> tuple[Tensor, Tensor]:
    """The same, and int32 [N, Hkv], how many blocks were looked at in full precision: without tiles, where
    low precision saves nothing, all of them."""
    if cpu_tiles.fits(index_q, low.codes):
        return cpu_tiles.certified_select_blocks(index_q, index_k_pages, low, layout, top_k)
    own = (layout.positions // layout.block_size).int()
    return select_blocks(index_q, index_k_pages, layout, top_k), own[:, None].repeat(1, index_q.shape[1])


@compiled(parallel=True, error_model="numpy")
def _block_maxima(q, keys, scales, positions, paths, table, chunks, first, top_k, maxima):
    """maxima[i - first, g, b] = max over block b of q[i, g] . key, for the blocks b before the query's
    own."""
    _, groups, dim = q.shape
    block_size = keys.shape[1]
    flat_q, flat_keys = q.reshape(-1), keys.reshape(-1)
    width = round_up(block_size)
    spans = (maxima.shape[2] + SPAN - 1) // SPAN
    for unit in prange(len(chunks) * spans):
        begin, end = chunks[unit // spans]
        from_block = unit % spans * SPAN
        # Ascending positions: the chunk's last query has most blocks.
        to_block = min(from_block + SPAN, positions[end - 1] // block_size)
        if to_block <= from_block or positions[end - 1] // block_size < top_k:
            continue
        tile = np.zeros(dim * width, dtype=np.float32)
        scores = np.empty(groups * width, dtype=np.float32)
        for b in range(from_block, to_block):
            page = table[paths[begin], b]
            transpose(tile, 0, width, flat_keys, np.int64(page) * block_size * dim, dim, block_size, dim)
            for i in range(begin, end):
                own = positions[i] // block_size
                if b < own and own >= top_k:
                    product_in_order(
                        scores, 0, width, flat_q, i * groups * dim, dim, 1, tile, 0, width, groups, dim,
                        width, False
                    )  # fmt: skip
                    for g in range(groups):
                        if len(scales):
                            for t in range(block_size):
                                scores[g * width + t] *= scales[page, t]
                        maxima[i - first, g, b] = _largest(scores[g * width : g * width + block_size])


@compiled(fastmath={"nnan", "nsz"})
def _largest(x):
    best = x[0]
    for i in range(x.shape[0]):
        best = max(best, x[i])
    return best


@compiled(parallel=True, error_model="numpy")
def _best_blocks(maxima, positions, block_size, selected):
    """selected[i, g]: the own block and the K - 1 best before it, ascending; -1s stay at the end."""
    n, groups, top_k = selected.shape
    for i in prange(n):
        own = positions[i] // block_size
        values = np.empty(top_k - 1, dtype=np.float32)
        for g in range(groups):
            row = selected[i, g]
            if own < top_k:
                for b in range(own + 1):
                    row[b] = b
            else:
                insert_best(maxima[i, g, :own], values, row[: top_k - 1])
                sort_ids(row, top_k - 1)
                row[top_k - 1] = own
