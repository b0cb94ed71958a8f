"""The index loss on the GPU: value and closed-form gradients in two passes over the pages.

The gradient of a token's student logit is weight * (student - teacher) / divisor, so the forward pass has
all that the backward pass would need and keeps d_index_q and d_index_k. Queries go through in chunks whose
partial results fit into plan.WORKSPACE; the whole prefix (warm-up) is the case where every block is selected.
Everything is summed by one owner in a fixed order: no atomics.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longforge.kernels.index_loss import plan
from longforge.kernels.index_loss.triton_kernels import GAIN, gradient_by_page, lse_by_page
from longforge.kernels.layout import PackedLayout
from longforge.kernels.page_readers import Pieces, Readers, cut, readers
from longforge.kernels.triton_pages import (
    add_parts,
    add_pieces,
    check_sizes,
    padded,
    precision_of,
)

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
    api.py. Raises InputError for float64, dims or blocks above 128."""
    check_sizes("index_loss", q, layout.block_size, q.shape[2], index_q.shape[2])
    apply: Any = _IndexLoss.apply
    return apply(index_q, index_k_pages, q, k_pages, blocks, layout, scale, index_scale, weights)


class _IndexLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index_q, index_k_pages, q, k_pages, blocks, layout, scale, index_scale, weights):
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        inputs = _Inputs(
            index_q.contiguous(), index_k_pages, q.contiguous(), k_pages, layout, scale, index_scale
        )  # fmt: skip
        loss, *grads = _divergence(inputs, blocks, weights, wanted)
        if wanted:
            ctx.save_for_backward(*grads)
            ctx.dtypes = index_q.dtype, index_k_pages.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        # Kept in fp32: one token's share of the mean is below what fp16 holds, before d_loss scales it up.
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *((d_loss * grad).to(dtype) for grad, dtype in grads), *[None] * 7


@dataclass(frozen=True)
class _Inputs:
    index_q: Tensor
    index_k: Tensor
    q: Tensor
    k: Tensor
    layout: PackedLayout
    scale: float
    index_scale: float

    def rows(self, rows: slice) -> "_Inputs":
        """Only these queries, over the same pages."""
        layout = replace(
            self.layout,
            positions=self.layout.positions[rows],
            paths=self.layout.paths[rows],
            slots=self.layout.slots[rows],
        )
        return replace(self, index_q=self.index_q[rows], q=self.q[rows], layout=layout)

    def sizes(self, tiles: plan.Tiles) -> dict[str, Any]:
        """The arguments that both kernels take by name."""
        dim, index_dim, groups = self.q.shape[2], self.index_q.shape[2], self.k.shape[2]
        return {
            "HKV": groups, "G": self.q.shape[1] // groups, "D": dim, "DIM": padded(dim), "DI": index_dim,
            "DIM_I": padded(index_dim), "BLOCK": self.layout.block_size, "QUERIES": tiles.queries,
            "TILE": tiles.tokens, "PRECISION": precision_of(self.q.dtype), "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }  # fmt: skip

    @property
    def gradient_tiles(self) -> plan.Tiles:
        return plan.gradient_tiles(self.q.dtype, self.layout.block_size)


def _divergence(inputs: _Inputs, blocks: Tensor | None, weights: Tensor, wanted: bool) -> list[Tensor]:
    """[loss, and where wanted d_index_q [N, Hkv, Di], d_index_k [S, Bk, Di]], fp32."""
    n, groups, index_dim = inputs.index_q.shape
    total = weights.sum(dtype=torch.float64)
    largest = weights.amax() if n else weights.new_zeros(())
    # Relative weights: their products with index queries stay within what half precision holds.
    relative = weights / torch.where(largest > 0, largest, 1.0)
    factor = (largest / torch.where(total > 0, total * groups, 1.0)).float()
    loss = torch.zeros((), dtype=torch.float64, device=weights.device)
    d_index_q = torch.empty(inputs.index_q.shape if wanted else (0,), device=weights.device)
    page_shape = (*inputs.index_k.shape[:2], groups, index_dim)
    d_index_k = torch.zeros(page_shape if wanted else (0,), device=weights.device)
    top_k = inputs.layout.page_table.shape[1] if blocks is None else blocks.shape[2]
    index_row = index_dim * inputs.index_q.element_size()
    per_group = inputs.q.shape[1] // groups
    subs = inputs.gradient_tiles.per_block(inputs.layout.block_size)
    step = min(max(1, n), plan.queries_per_chunk(groups * top_k, per_group, index_row, subs))
    for at in range(0, n, step):
        rows = slice(at, at + step)
        part = inputs.rows(rows)
        chosen = _whole_prefix(part, groups) if blocks is None else blocks[rows].to(torch.int32)
        chosen = torch.where(relative[rows, None, None] > 0, chosen, -1)
        d_rows = d_index_q[rows] if wanted else None
        loss += _chunk(part, chosen, relative[rows], d_rows, d_index_k)
    loss = (loss * factor).float()
    if not wanted:
        return [loss]
    d_index_q *= (relative * factor)[:, None, None]
    return [loss, d_index_q, d_index_k.sum(2) * (factor * (inputs.index_scale / GAIN))]


def _whole_prefix(inputs: _Inputs, groups: int) -> Tensor:
    """int32 [n, Hkv, M]: every block up to the query's own."""
    layout = inputs.layout
    ids = torch.arange(layout.page_table.shape[1], dtype=torch.int32, device=layout.positions.device)
    own = layout.positions.int() // layout.block_size
    return torch.where(ids <= own[:, None], ids, -1)[:, None].expand(-1, groups, -1)


def _chunk(
    inputs: _Inputs, blocks: Tensor, weights: Tensor, d_index_q: Tensor | None, d_index_k: Tensor
) -> Tensor:
    """The weighted sum of the queries' divergences, fp64. With d_index_q [n, Hkv, Di] fp32 also writes that
    (without weights) and adds to d_index_k fp32 [S, Bk, Hkv, Di] (times GAIN, without index_scale)."""
    read = readers(blocks.contiguous(), inputs.layout, inputs.k.shape[0])
    teacher, student = _log_sums(inputs, read)
    n, groups, index_dim = inputs.index_q.shape
    top_k, tiles = blocks.shape[2], inputs.gradient_tiles
    subs = tiles.per_block(inputs.layout.block_size)
    wanted = d_index_q is not None
    pieces = cut(read, plan.gradient_piece(tiles, read.entries.shape[0]))
    parts = inputs.index_q.new_empty((n, groups, top_k, subs, 1, index_dim) if wanted else (0,))
    rooms = (pieces.rooms if wanted else 0, inputs.layout.block_size, index_dim)
    partial = torch.empty(rooms, dtype=torch.float32, device=weights.device)
    divergence = torch.zeros((n, groups, top_k, subs), dtype=torch.float32, device=weights.device)
    gradient_by_page[(pieces.segment.shape[0] * subs,)](
        inputs.index_q, inputs.index_k, inputs.q, inputs.k, weights.float(), teacher, student,
        *_passing(read, pieces), pieces.room, divergence, parts, d_index_k, partial,
        inputs.scale, inputs.index_scale, top_k, *inputs.index_k.stride()[:2], *inputs.k.stride()[:3],
        WITH_GRADIENTS=wanted, **inputs.sizes(tiles),
    )  # fmt: skip
    if d_index_q is not None:
        add_pieces(partial, pieces, d_index_k)
        add_parts(parts, read.shown, d_index_q[:, :, None], inputs.index_scale / GAIN)
    return (divergence.sum((1, 2, 3), dtype=torch.float64) * weights).sum()


def _log_sums(inputs: _Inputs, read: Readers) -> tuple[Tensor, Tensor]:
    """Log-sum-exps over the support: fp32 (teacher [n, Hkv, G], student [n, Hkv])."""
    n, groups, top_k = read.shown.shape
    tiles = plan.log_sum_tiles(inputs.q.dtype, inputs.layout.block_size)
    subs, per_group = tiles.per_block(inputs.layout.block_size), inputs.q.shape[1] // groups
    parts = torch.full((n, groups, top_k * subs, per_group), float("-inf"), device=inputs.q.device)
    index_parts = torch.full((n, groups, top_k * subs), float("-inf"), device=inputs.q.device)
    pieces = cut(read, 4 * tiles.queries)
    lse_by_page[(pieces.segment.shape[0] * subs,)](
        inputs.index_q, inputs.index_k, inputs.q, inputs.k, *_passing(read, pieces), parts, index_parts,
        inputs.scale, inputs.index_scale, top_k, *inputs.index_k.stride()[:2], *inputs.k.stride()[:3],
        **inputs.sizes(tiles),
    )  # fmt: skip
    return parts.logsumexp(2), index_parts.logsumexp(2)


def _passing(read: Readers, pieces: Pieces) -> tuple[Tensor, ...]:
    """What both kernels are told about who reads which page."""
    return read.entries, read.seen, read.deepest, pieces.segment, pieces.first, pieces.count
