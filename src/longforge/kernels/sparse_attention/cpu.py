"""Block-sparse attention on the CPU.

One unit of work is (a few query tokens, one group): the group's G query heads share the keys they load. Scores of a
query's whole support stand in scratch, so the softmax is the plain two-pass one and the backward pass recomputes it
from the log-sum-exp. Keys are the vector lanes of scores, so they are read transposed: all pages at once where many
queries will read them (training, prefill), a block at a time where few do (decode). Both give the same numbers.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.numba_host import (
    compiled,
    layout_arrays,
    parallel_region,
    path_starts,
    raw_array,
    shares_pages,
    wide_array,
)
from longforge.kernels.vector_code import exponentials, product, round_up, widen

__all__ = ["sparse_attention"]

QUERIES = 16
"""Query tokens of one unit of parallel work."""


def sparse_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, blocks: Tensor, layout: PackedLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """q [N, Hq, D], k_pages, v_pages [S, Bk, Hkv, D], blocks [N, Hkv, K] -> out, lse. See api.py."""
    if torch.is_grad_enabled() and (q.requires_grad or k_pages.requires_grad or v_pages.requires_grad):
        out, lse = _SparseAttention.apply(q, k_pages, v_pages, blocks, layout, scale)  # pyright: ignore
    else:
        out, lse = _attend(q, k_pages, v_pages, blocks, layout, scale)
    return out, lse.float()


def _attend(q, k_pages, v_pages, blocks, layout, scale) -> tuple[Tensor, Tensor]:
    """out in q's dtype, lse in the dtype of the computation."""
    positions, paths, table = layout_arrays(layout)
    wide_q, k, v = wide_array(q), raw_array(k_pages), raw_array(v_pages)
    out, lse = np.empty_like(wide_q), np.empty(wide_q.shape[:2], dtype=wide_q.dtype)
    ids = blocks.to(torch.int32).contiguous().numpy()
    with parallel_region():
        tiles, tile_of = _transposed(k, table, ids.shape[0] * ids.shape[2], wide_q.dtype)
        _forward(
            wide_q, k, v, tiles, tile_of, ids, positions, paths, table, wide_q.dtype.type(scale), out, lse
        )
    return torch.from_numpy(out).to(q.dtype), torch.from_numpy(lse)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k_pages, v_pages, blocks, layout, scale):
        out, lse = _attend(q, k_pages, v_pages, blocks, layout, scale)
        ctx.save_for_backward(q, k_pages, v_pages, blocks, lse)
        ctx.layout, ctx.scale = layout, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, _):
        q, k_pages, v_pages, blocks, lse = ctx.saved_tensors
        positions, paths, table = layout_arrays(ctx.layout)
        wide_q, k, v = wide_array(q), wide_array(k_pages), wide_array(v_pages)
        d_q, d_k, d_v = np.empty_like(wide_q), np.zeros_like(k), np.zeros_like(v)
        ids = blocks.to(torch.int32).contiguous().numpy()
        # A unit owns what it adds to: its group of the pages of its path, or of all pages where paths share some.
        ends = path_starts(paths)
        starts = np.array([0, len(paths)]) if shares_pages(table) else ends
        work = ids.shape[0] * ids.shape[2]
        with parallel_region():
            k_tiles, tile_of = _transposed(k, table, work, wide_q.dtype, always=True)
            v_tiles, _ = _transposed(v, table, work, wide_q.dtype, always=True)
            _backward(
                wide_q, k, k_tiles, v_tiles, tile_of, ids, positions, paths, table, wide_q.dtype.type(ctx.scale),
                wide_array(d_out), lse.numpy(), starts, d_q, d_k, d_v,
            )  # fmt: skip
        grads = (torch.from_numpy(g).to(x.dtype) for g, x in ((d_q, q), (d_k, k_pages), (d_v, v_pages)))
        return *grads, None, None, None


def _transposed(pages, table, reads, dtype, always=False):
    """(tiles [U, Hkv, D, round_up(Bk)], tile_of int32 [S]) for the U pages of the table, or (empty, empty) where so
    few blocks are read that transposing them one by one is less work."""
    slots, block_size, groups, dim = pages.shape
    used = np.unique(table)
    used = used[used >= 0]
    if not always and reads < 2 * len(used):
        return np.empty((0, 0, 0, 0), dtype), np.empty(0, np.int32)
    tiles = np.zeros((len(used), groups, dim, -block_size % 16 + block_size), dtype)
    tile_of = np.full(slots, -1, np.int32)
    tile_of[used] = np.arange(len(used), dtype=np.int32)
    _transpose(pages, used, tiles)
    return tiles, tile_of


@compiled(parallel=True, error_model="numpy")
def _transpose(pages, used, tiles):
    for u in prange(len(used)):
        for g in range(tiles.shape[1]):
            _transpose_block(pages, used[u], g, tiles[u, g])


@compiled(error_model="numpy")
def _transpose_block(pages, page, g, tile):
    """tile[d, j] = pages[page, j, g, d]."""
    for j in range(pages.shape[1]):
        for d in range(pages.shape[3]):
            tile[d, j] = widen(pages[page, j, g, d])


@compiled(error_model="numpy")
def _visible(block, position, block_size):
    """How many tokens of the block a query at this position may see; 0 for a missing block (-1)."""
    if block < 0:
        return 0
    return max(0, min(block_size, position - block * block_size + 1))


@compiled(parallel=True, error_model="numpy")
def _forward(q, k, v, tiles, tile_of, blocks, positions, paths, table, scale, out, lse):
    n, heads, dim = q.shape
    _, block_size, groups, _ = k.shape
    per_group = heads // groups
    top_k = blocks.shape[2]
    # A whole block is scored even where only its first tokens are visible: room for the rest of the last one.
    room = top_k * block_size + round_up(block_size)
    flat_q, flat_v, flat_out = q.reshape(-1), v.reshape(-1), out.reshape(-1)
    units = (n + QUERIES - 1) // QUERIES
    for unit in prange(units * groups):
        g, begin = unit % groups, unit // groups * QUERIES
        scores = np.empty(per_group * room, q.dtype)
        scratch = np.zeros((dim, round_up(block_size)), q.dtype)
        for i in range(begin, min(n, begin + QUERIES)):
            row = table[paths[i]]
            ids = blocks[i, g]
            first = (i * heads + g * per_group) * dim
            count = _scores(
                flat_q, first, per_group, k, g, tiles, tile_of, scratch, ids, positions[i], row, scores, room
            )  # fmt: skip
            for h in range(per_group):
                lse[i, g * per_group + h] = _softmax(scores, h * room, count, scale)
            at = 0
            for slot in range(top_k):
                seen = _visible(ids[slot], positions[i], block_size)
                if seen > 0:
                    start = (np.int64(row[ids[slot]]) * block_size * groups + g) * dim
                    product(
                        flat_out, first, dim, scores, at, room, 1, flat_v, start, groups * dim,
                        per_group, seen, dim, at > 0,
                    )  # fmt: skip
                at += seen


@compiled(error_model="numpy")
def _scores(q, first, per_group, k, g, tiles, tile_of, scratch, ids, position, row, scores, room):
    """scores[h * room + t] = q[h] . k[t] for the visible tokens t of the query's blocks, side by side; returns how
    many they are."""
    _, block_size, _, dim = k.shape
    width = scratch.shape[1]
    at = 0
    for slot in range(len(ids)):
        seen = _visible(ids[slot], position, block_size)
        if seen == 0:
            continue
        page = row[ids[slot]]
        if len(tile_of):
            tile = tiles[tile_of[page], g].reshape(-1)
        else:
            _transpose_block(k, page, g, scratch)
            tile = scratch.reshape(-1)
        product(scores, at, room, q, first, dim, 1, tile, 0, width, per_group, dim, width, False)
        at += seen
    return at


@compiled(error_model="numpy", fastmath={"nnan", "nsz", "reassoc"})
def _largest(x):
    best = x[0]
    for i in range(x.shape[0]):
        best = max(best, x[i])
    return best


@compiled(error_model="numpy", fastmath={"nsz", "reassoc"})
def _sum(x):
    total = x.dtype.type(0)
    for i in range(x.shape[0]):
        total += x[i]
    return total


@compiled(error_model="numpy")
def _softmax(scores, start, count, scale):
    """scores[start:start + count] = softmax(scale * itself); returns the log-sum-exp."""
    part = scores[start : start + count]
    for i in range(count):
        part[i] *= scale
    top = _largest(part)
    exponentials(scores, start, count, top)
    total = _sum(part)
    for i in range(count):
        part[i] /= total
    return top + np.log(total)


@compiled(parallel=True, error_model="numpy")
def _backward(
    q, k, k_tiles, v_tiles, tile_of, blocks, positions, paths, table, scale, d_out, lse, starts, d_q, d_k, d_v
):
    _, heads, dim = q.shape
    _, block_size, groups, _ = k.shape
    per_group = heads // groups
    room = blocks.shape[2] * block_size + round_up(block_size)
    for unit in prange((len(starts) - 1) * groups):
        g = unit % groups
        p = np.empty(per_group * room, q.dtype)
        d_p = np.empty(per_group * room, q.dtype)
        for i in range(starts[unit // groups], starts[unit // groups + 1]):
            _backward_query(
                q.reshape(-1), k, k_tiles, v_tiles, tile_of, blocks[i, g], positions[i], table[paths[i]], scale,
                d_out.reshape(-1), lse[i], i, g, heads, d_q.reshape(-1), d_k.reshape(-1), d_v.reshape(-1), p, d_p, room,
            )  # fmt: skip


@compiled(error_model="numpy")
def _backward_query(
    q,
    k,
    k_tiles,
    v_tiles,
    tile_of,
    ids,
    position,
    row,
    scale,
    d_out,
    lse,
    i,
    g,
    heads,
    d_q,
    d_k,
    d_v,
    p,
    d_p,
    room,
):
    """Adds one query's part, for one group: dv += p d_out, ds = p (d_out.v - sum p d_out.v), dq = ds k, dk += ds q."""
    _, block_size, groups, dim = k.shape
    per_group = heads // groups
    first = (i * heads + g * per_group) * dim
    count = _scores(q, first, per_group, k, g, k_tiles, tile_of, k_tiles[0, 0], ids, position, row, p, room)
    _scores(d_out, first, per_group, k, g, v_tiles, tile_of, v_tiles[0, 0], ids, position, row, d_p, room)
    for h in range(per_group):
        part, d_part = p[h * room : h * room + count], d_p[h * room : h * room + count]
        for t in range(count):
            part[t] *= scale
        exponentials(p, h * room, count, lse[g * per_group + h])
        mean = _dot(part, d_part)
        for t in range(count):
            d_part[t] = part[t] * (d_part[t] - mean) * scale
    flat_k = k.reshape(-1)
    step = groups * dim
    at = 0
    for slot in range(len(ids)):
        seen = _visible(ids[slot], position, block_size)
        if seen == 0:
            continue
        start = (np.int64(row[ids[slot]]) * block_size * groups + g) * dim
        product(d_q, first, dim, d_p, at, room, 1, flat_k, start, step, per_group, seen, dim, at > 0)
        product(d_k, start, step, d_p, at, 1, room, q, first, dim, seen, per_group, dim, True)
        product(d_v, start, step, p, at, 1, room, d_out, first, dim, seen, per_group, dim, True)
        at += seen


@compiled(error_model="numpy", fastmath={"nsz", "reassoc", "contract"})
def _dot(x, y):
    total = x.dtype.type(0)
    for i in range(x.shape[0]):
        total += x[i] * y[i]
    return total
