"""The index loss on the CPU: value and gradients in one pass, by the closed form.

The gradient with respect to a token's student logit is weight * (student - teacher) / divisor (MSA paper
4.3), so the forward pass has everything the backward pass would need and stores d_index_q and d_index_k. The
index key is shared by all groups: each group adds to its own copy of d_index_k and the copies are summed in
order, so the result does not depend on threads.
"""

import math
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from longforge.kernels.block_scores import score_blocks, transposed, visible
from longforge.kernels.index_loss import cpu_tiles
from longforge.kernels.layout import PackedLayout
from longforge.kernels.numba_host import (
    compiled,
    layout_arrays,
    parallel_region,
    path_starts,
    shares_pages,
    wide_array,
)
from longforge.kernels.vector_code import product, round_up, softmax

__all__ = ["index_loss"]


def index_loss(
    index_q: Tensor,
    index_k_pages: Tensor,
    q: Tensor,
    k_pages: Tensor,
    blocks: Tensor | None,
    layout: PackedLayout,
    scale: float,
    index_scale: float,
    weights: Tensor,
    lse: Tensor | None = None,
) -> Tensor:
    """index_q [N, Hkv, Di], index_k_pages [S, Bk, Di], q [N, Hq, D], k_pages [S, Bk, Hkv, D] -> scalar. See
    api.py."""
    apply: Any = _IndexLoss.apply
    return apply(index_q, index_k_pages, q, k_pages, blocks, layout, scale, index_scale, weights, lse)


class _IndexLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index_q, index_k_pages, q, k_pages, blocks, layout, scale, index_scale, weights, lse):
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if cpu_tiles.fits(index_q, q, k_pages):
            loss, d_index_q, d_index_k = cpu_tiles.divergences(
                index_q,
                index_k_pages,
                q,
                k_pages,
                blocks,
                layout,
                scale,
                index_scale,
                weights,
                lse,
                wanted,
            )
        else:
            arrays = [wide_array(x) for x in (index_q, index_k_pages, q, k_pages, weights)]
            loss, d_index_q, d_index_k = _divergences(arrays, blocks, layout, scale, index_scale, wanted)
        if wanted:
            ctx.save_for_backward(d_index_q.to(index_q.dtype), d_index_k.to(index_k_pages.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        d_index_q, d_index_k = ctx.saved_tensors
        return d_loss * d_index_q, d_loss * d_index_k, *[None] * 8


def _divergences(arrays, blocks, layout, scale, index_scale, wanted):
    """(loss, d_index_q, d_index_k) in the dtype of the computation; gradients are empty unless wanted."""
    index_q, index_k, q, k, weights = arrays
    positions, paths, table = layout_arrays(layout)
    kind, groups = q.dtype.type, k.shape[2]
    divisor = float(weights.sum(dtype=np.float64)) * groups
    each = weights / kind(divisor if divisor > 0 else 1)
    d_index_q = np.zeros_like(index_q) if wanted else np.empty((0, 0, 0), q.dtype)
    d_index_k = np.zeros((groups if wanted else 0, *index_k.shape), q.dtype)
    values = np.zeros((len(positions), groups), q.dtype)
    if blocks is None:
        ids = np.empty((0, 0, 0), np.int32)
        most = int(positions.max(initial=-1)) // layout.block_size + 1
    else:
        ids = blocks.to(torch.int32).contiguous().numpy()
        most = ids.shape[2]
    starts = np.array([0, len(paths)]) if shares_pages(table) else path_starts(paths)
    keys = index_k[:, :, None, :]
    with parallel_region(q.size * most * layout.block_size):
        tiles, tile_of = transposed(k, table, q.dtype)
        index_tiles, _ = transposed(keys, table, q.dtype)
        _all_units(
            index_q, keys, index_tiles, q, k, tiles, tile_of, ids, most, positions, paths, table,
            kind(scale), kind(index_scale), each, starts, values, d_index_q, d_index_k,
        )  # fmt: skip
    loss = (values.astype(np.float64) * each[:, None]).sum()
    d_k = torch.from_numpy(d_index_k).sum(0) if wanted else torch.empty(0)
    return torch.tensor(loss, dtype=torch.from_numpy(weights).dtype), torch.from_numpy(d_index_q), d_k


@compiled(parallel=True, error_model="numpy")
def _all_units(
    index_q, index_k, index_tiles, q, k, tiles, tile_of, blocks, most, positions, paths, table,
    scale, index_scale, weights, starts, values, d_index_q, d_index_k,
):  # fmt: skip
    for unit in prange((len(starts) - 1) * k.shape[2]):
        _unit(
            np.int64(unit), index_q, index_k, index_tiles, q, k, tiles, tile_of, blocks, most, positions,
            paths, table, scale, index_scale, weights, starts, values, d_index_q, d_index_k,
        )  # fmt: skip


@compiled(error_model="numpy")
def _unit(
    unit, index_q, index_k, index_tiles, q, k, tiles, tile_of, blocks, most, positions, paths, table,
    scale, index_scale, weights, starts, values, d_index_q, d_index_k,
):  # fmt: skip
    """One group of the queries of one path (of all paths where they share pages)."""
    _, heads, dim = q.shape
    _, block_size, groups, _ = k.shape
    index_dim = index_q.shape[2]
    per_group = heads // groups
    g = unit % groups
    room = most * block_size + round_up(block_size)
    flat_index_q, flat_q = index_q.reshape(-1), q.reshape(-1)
    wanted = len(d_index_k) > 0
    flat_d_index_q, flat_d_index_k = d_index_q.reshape(-1), d_index_k[g if wanted else 0 : g + 1].reshape(-1)
    teachers, student = np.empty(per_group * room, q.dtype), np.empty(room, q.dtype)
    every = np.arange(most).astype(np.int32)
    for i in range(starts[unit // groups], starts[unit // groups + 1]):
        if weights[i] == 0:
            continue
        position, pages = positions[i], table[paths[i]]
        ids = blocks[i, g] if len(blocks) else every[: position // block_size + 1]
        count = score_blocks(
            flat_q, (i * heads + g * per_group) * dim, per_group, k, g, tiles, tile_of, ids,
            position, pages, teachers, room,
        )  # fmt: skip
        for h in range(per_group):
            softmax(teachers, h * room, count, scale)
        first = (i * groups + g) * index_dim
        score_blocks(
            flat_index_q, first, 1, index_k, 0, index_tiles, tile_of, ids, position,
            pages, student, room,
        )  # fmt: skip
        teacher = _mean_of_heads(teachers, per_group, room, count)
        values[i, g] = _divergence(teacher, student, count, index_scale)
        if wanted:
            factor = weights[i] * index_scale
            for t in range(count):
                student[t] = (student[t] - teacher[t]) * factor
            _add_gradients(
                student, ids, position, pages, index_k, flat_index_q, first, flat_d_index_q, flat_d_index_k
            )


@compiled(error_model="numpy", fastmath={"contract"})
def _mean_of_heads(teachers, per_group, room, count):
    """The first head's row becomes the mean of all heads' rows."""
    teacher = teachers[:count]
    for h in range(1, per_group):
        other = teachers[h * room : h * room + count]
        for t in range(count):
            teacher[t] += other[t]
    share = teachers.dtype.type(1) / teachers.dtype.type(per_group)
    for t in range(count):
        teacher[t] *= share
    return teacher


@compiled(error_model="numpy")
def _divergence(teacher, student, count, index_scale):
    """KL(teacher || softmax(index_scale * student)); student becomes that softmax."""
    logits = student[:count]
    total = teacher.dtype.type(0)
    for t in range(count):
        logits[t] *= index_scale
    for t in range(count):
        if teacher[t] > 0:
            total += teacher[t] * (math.log(teacher[t]) - logits[t])
    # sum of teacher is 1, so its part of the student's log-sum-exp is that number itself.
    return total + softmax(student, 0, count, teacher.dtype.type(1))


@compiled(error_model="numpy")
def _add_gradients(d_logits, ids, position, pages, index_k, index_q, first, d_index_q, d_index_k):
    """d_index_q[query] = d_logits keys; d_index_k[token] += d_logit * index_q."""
    _, block_size, _, dim = index_k.shape
    keys = index_k.reshape(-1)
    at = 0
    for slot in range(len(ids)):
        seen = visible(ids[slot], position, block_size)
        if seen == 0:
            continue
        start = np.int64(pages[ids[slot]]) * block_size * dim
        product(d_index_q, first, dim, d_logits, at, 0, 1, keys, start, dim, 1, seen, dim, at > 0)
        product(d_index_k, start, dim, d_logits, at, 1, 0, index_q, first, dim, seen, 1, dim, True)
        at += seen
