"""Block-sparse attention on the CPU.

One unit of work is (a few query tokens, one group): the group's G query heads share the keys they load.
Scores of a query's whole support stand in scratch, so the softmax is the plain two-pass one, and the backward
pass recomputes it from the log-sum-exp.
"""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from longforge.kernels.block_scores import score_blocks, transposed, visible
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
from longforge.kernels.tiles import attention, attention_backward
from longforge.kernels.vector_code import dot, exponentials, product, round_up, softmax

__all__ = ["sparse_attention"]

QUERIES = 16
"""Most query tokens of one unit of parallel work."""


def sparse_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, blocks: Tensor, layout: PackedLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """q [N, Hq, D], k_pages, v_pages [S, Bk, Hkv, D], blocks [N, Hkv, K] -> out, lse. See api.py."""
    if torch.is_grad_enabled() and (q.requires_grad or k_pages.requires_grad or v_pages.requires_grad):
        apply: Any = _SparseAttention.apply
        out, lse = apply(q, k_pages, v_pages, blocks, layout, scale)
    else:
        out, lse = _attend(q, k_pages, v_pages, blocks, layout, scale)
    return out, lse.float()


def _attend(q, k_pages, v_pages, blocks, layout, scale) -> tuple[Tensor, Tensor]:
    """out in q's dtype, lse in the dtype of the computation."""
    if attention.fits(q, k_pages):
        return attention.attend(q, k_pages, v_pages, blocks, layout, scale)
    positions, paths, table = layout_arrays(layout)
    wide_q, k, v = wide_array(q), raw_array(k_pages), raw_array(v_pages)
    out, lse = np.empty_like(wide_q), np.empty(wide_q.shape[:2], dtype=wide_q.dtype)
    ids = blocks.to(torch.int32).contiguous().numpy()
    with parallel_region(_work(q, layout.block_size, ids)):
        tiles, tile_of = transposed(k, table, wide_q.dtype, reads=ids.shape[0] * ids.shape[2])
        _forward(
            wide_q, k, v, tiles, tile_of, ids, positions, paths, table, wide_q.dtype.type(scale), out, lse
        )
    return torch.from_numpy(out).to(q.dtype), torch.from_numpy(lse)


def _work(q: Tensor, block_size: int, ids: np.ndarray) -> int:
    """Multiply-adds of the two products."""
    return 2 * q.numel() * ids.shape[2] * block_size


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k_pages, v_pages, blocks, layout, scale):
        out, lse = _attend(q, k_pages, v_pages, blocks, layout, scale)
        ctx.save_for_backward(q, k_pages, v_pages, blocks, out, lse)
        ctx.layout, ctx.scale = layout, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, _):
        q, k_pages, v_pages, blocks, out, lse = ctx.saved_tensors
        if attention.fits(q, k_pages):
            grads = attention_backward.gradients(
                q, k_pages, v_pages, blocks, ctx.layout, ctx.scale, out, lse, d_out
            )
            return *(grad.to(q.dtype) for grad in grads), None, None, None
        positions, paths, table = layout_arrays(ctx.layout)
        wide_q, k, v = wide_array(q), wide_array(k_pages), wide_array(v_pages)
        d_q, d_k, d_v = np.empty_like(wide_q), np.zeros_like(k), np.zeros_like(v)
        ids = blocks.to(torch.int32).contiguous().numpy()
        # A unit owns what it adds to: its group of its path's pages, or of all pages where paths share some.
        starts = np.array([0, len(paths)]) if shares_pages(table) else path_starts(paths)
        with parallel_region(_work(q, k.shape[1], ids)):
            k_tiles, tile_of = transposed(k, table, wide_q.dtype)
            v_tiles, _ = transposed(v, table, wide_q.dtype)
            _backward(
                wide_q, k, k_tiles, v_tiles, tile_of, ids, positions, paths, table,
                wide_q.dtype.type(ctx.scale), wide_array(d_out), lse.numpy(), starts, d_q, d_k, d_v,
            )  # fmt: skip
        grads = zip((d_q, d_k, d_v), (q, k_pages, v_pages), strict=True)
        return *(torch.from_numpy(grad).to(x.dtype) for grad, x in grads), None, None, None


@compiled(parallel=True, error_model="numpy")
def _forward(q, k, v, tiles, tile_of, blocks, positions, paths, table, scale, out, lse):
    units = (q.shape[0] + QUERIES - 1) // QUERIES * k.shape[2]
    for unit in prange(units):
        _forward_unit(
            np.int64(unit), q, k, v, tiles, tile_of, blocks, positions, paths, table, scale, out, lse
        )


@compiled(error_model="numpy")
def _forward_unit(unit, q, k, v, tiles, tile_of, blocks, positions, paths, table, scale, out, lse):
    n, heads, dim = q.shape
    _, block_size, groups, _ = k.shape
    per_group = heads // groups
    top_k = blocks.shape[2]
    room = top_k * block_size + round_up(block_size)
    flat_q, flat_v, flat_out = q.reshape(-1), v.reshape(-1), out.reshape(-1)
    g, begin = unit % groups, unit // groups * QUERIES
    scores = np.empty(per_group * room, q.dtype)
    if len(tile_of) == 0:
        tiles = np.zeros(dim * round_up(block_size), q.dtype)
    for i in range(begin, min(n, begin + QUERIES)):
        pages, ids, position = table[paths[i]], blocks[i, g], positions[i]
        first = (i * heads + g * per_group) * dim
        count = score_blocks(
            flat_q, first, per_group, k, g, tiles, tile_of, ids, position, pages, scores, room
        )
        for h in range(per_group):
            lse[i, g * per_group + h] = softmax(scores, h * room, count, scale)
        at = 0
        for slot in range(top_k):
            seen = visible(ids[slot], position, block_size)
            if seen > 0:
                start = (np.int64(pages[ids[slot]]) * block_size * groups + g) * dim
                product(
                    flat_out, first, dim, scores, at, room, 1, flat_v, start, groups * dim,
                    per_group, seen, dim, at > 0,
                )  # fmt: skip
            at += seen


@compiled(parallel=True, error_model="numpy")
def _backward(
    q, k, k_tiles, v_tiles, tile_of, blocks, positions, paths, table, scale, d_out, lse, starts, d_q, d_k, d_v
):
    for unit in prange((len(starts) - 1) * k.shape[2]):
        _backward_unit(
            np.int64(unit), q, k, k_tiles, v_tiles, tile_of, blocks, positions, paths, table, scale, d_out,
            lse, starts, d_q, d_k, d_v,
        )  # fmt: skip


@compiled(error_model="numpy")
def _backward_unit(
    unit,
    q,
    k,
    k_tiles,
    v_tiles,
    tile_of,
    blocks,
    positions,
    paths,
    table,
    scale,
    d_out,
    lse,
    starts,
    d_q,
    d_k,
    d_v,
):
    """Per query: dv += p d_out, ds = p (d_out.v - sum p d_out.v) scale, dq = ds k, dk += ds q."""
    _, heads, dim = q.shape
    _, block_size, groups, _ = k.shape
    per_group = heads // groups
    room = blocks.shape[2] * block_size + round_up(block_size)
    flat_q, flat_k, flat_d_out = q.reshape(-1), k.reshape(-1), d_out.reshape(-1)
    flat_d_q, flat_d_k, flat_d_v = d_q.reshape(-1), d_k.reshape(-1), d_v.reshape(-1)
    g, step = unit % groups, groups * dim
    p, d_s = np.empty(per_group * room, q.dtype), np.empty(per_group * room, q.dtype)
    for i in range(starts[unit // groups], starts[unit // groups + 1]):
        pages, ids, position = table[paths[i]], blocks[i, g], positions[i]
        first = (i * heads + g * per_group) * dim
        count = score_blocks(flat_q, first, per_group, k, g, k_tiles, tile_of, ids, position, pages, p, room)
        score_blocks(flat_d_out, first, per_group, k, g, v_tiles, tile_of, ids, position, pages, d_s, room)
        for h in range(per_group):
            _score_gradients(p, d_s, h * room, count, scale, lse[i, g * per_group + h])
        at = 0
        for slot in range(len(ids)):
            seen = visible(ids[slot], position, block_size)
            if seen == 0:
                continue
            start = (np.int64(pages[ids[slot]]) * block_size * groups + g) * dim
            product(flat_d_q, first, dim, d_s, at, room, 1, flat_k, start, step, per_group, seen, dim, at > 0)
            product(flat_d_k, start, step, d_s, at, 1, room, flat_q, first, dim, seen, per_group, dim, True)
            product(flat_d_v, start, step, p, at, 1, room, flat_d_out, first, dim, seen, per_group, dim, True)
            at += seen


@compiled(error_model="numpy")
def _score_gradients(p, d_s, start, count, scale, lse):
    """In place, for one head: scores -> probabilities, and their gradients -> gradients of the scores."""
    part, d_part = p[start : start + count], d_s[start : start + count]
    for t in range(count):
        part[t] *= scale
    exponentials(p, start, count, lse)
    mean = dot(part, d_part)
    for t in range(count):
        d_part[t] = part[t] * (d_part[t] - mean) * scale
