"""Block-sparse attention on the GPU: launches the kernels beside this as plan.py says."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout
from longforge.kernels.page_readers import cut, readers
from longforge.kernels.sparse_attention import plan
from longforge.kernels.sparse_attention.plan import Order, Shape, shape_of
from longforge.kernels.sparse_attention.triton_backward import (
    backward_by_page,
    d_q_by_query,
    output_products,
)
from longforge.kernels.sparse_attention.triton_forward import combine, forward_by_page, forward_by_query
from longforge.kernels.triton_pages import (
    LN2,
    LOG2E,
    add_parts,
    add_pieces,
    check_sizes,
    padded,
    precision_of,
)

__all__ = ["MOST_HEADS", "sparse_attention"]

MOST_HEADS = 16
"""Most query heads of a group."""


def sparse_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    blocks: Tensor,
    layout: PackedLayout,
    scale: float,
    order: Order | None = None,
) -> tuple[Tensor, Tensor]:
    """q [N, Hq, D], k_pages, v_pages [S, Bk, Hkv, D], blocks [N, Hkv, K] -> out, lse. See api.py.

    order: None chooses by shape. Results do not depend on it beyond rounding, and never on chance.
    Raises InputError for float64, dims or blocks above 128, more than 16 heads in a group.
    """
    check_sizes("sparse_attention", q, layout.block_size, q.shape[2])
    if q.shape[1] > MOST_HEADS * k_pages.shape[2]:
        raise InputError(
            f"sparse_attention backend 'triton': at most {MOST_HEADS} query heads in a group expected, "
            f"got {q.shape[1] // k_pages.shape[2]}"
        )
    blocks = blocks.to(torch.int32).contiguous()
    order = order or plan.choose_order(shape_of(q, blocks, layout), layout.page_table.numel())
    if torch.is_grad_enabled() and (q.requires_grad or k_pages.requires_grad or v_pages.requires_grad):
        apply: Any = _SparseAttention.apply
        return apply(q, k_pages, v_pages, blocks, layout, scale, order)
    return _attend(q.contiguous(), k_pages, v_pages, blocks, layout, scale, order)


def _attend(q, k, v, blocks, layout, scale, order: Order) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] in q's dtype, lse fp32 [N, Hq]. q is contiguous, k and v in their last dimension."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    if q.shape[0] == 0:
        return out, lse
    if order == "page":
        step = plan.queries_per_chunk(shape_of(q, blocks, layout))
        for at in range(0, q.shape[0], step):
            rows = slice(at, at + step)
            _by_page(q[rows], k, v, blocks[rows], _rows_of(layout, rows), scale, out[rows], lse[rows])
    else:
        _by_query(q, k, v, blocks, layout, scale, out, lse, split=order == "split")
    return out, lse


def _by_query(q, k, v, blocks, layout, scale, out, lse, split: bool) -> None:
    shape = shape_of(q, blocks, layout)
    tiles = plan.by_query_tiles(shape)
    splits = shape.top_k if split else 1
    parts, part_lse = out, lse
    if splits > 1:
        rows = shape.tokens, shape.groups, splits, shape.per_group
        parts = q.new_empty((*rows, shape.dim), dtype=torch.float32)
        part_lse = lse.new_empty(rows)
    forward_by_query[(shape.tokens, shape.groups, splits)](
        q, k, v, blocks, *_places(layout), parts, part_lse, scale * LOG2E, 1.0 if splits > 1 else LN2,
        *k.stride()[:3], *v.stride()[:3], **_by_query_sizes(shape), SLOTS=shape.top_k // splits,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        _combine(parts, part_lse, out, lse)


def _by_query_sizes(shape: Shape) -> dict[str, Any]:
    tiles = plan.by_query_tiles(shape)
    return {
        "HKV": shape.groups, "G": shape.per_group, "D": shape.dim, "TOP_K": shape.top_k,
        "BLOCK": shape.block_size, "ROWS": tiles.rows, "DIM": padded(shape.dim), "TILE": tiles.tokens,
        "PRECISION": precision_of(shape.dtype),
    }  # fmt: skip


def _by_page(q, k, v, blocks, layout, scale, out, lse) -> None:
    shape = shape_of(q, blocks, layout)
    tiles = plan.forward_by_page_tiles(shape)
    subs = tiles.per_block(shape.block_size)
    read = readers(blocks, layout, k.shape[0])
    pieces = cut(read, 8 * (tiles.rows // shape.per_group))
    rows = shape.tokens, shape.groups, shape.top_k * subs, shape.per_group
    parts = q.new_empty((*rows, shape.dim))
    part_lse = lse.new_full(rows, float("-inf"))
    forward_by_page[(pieces.segment.shape[0] * subs,)](
        q, k, v, read.entries, read.seen, read.deepest, pieces.segment, pieces.first, pieces.count,
        parts, part_lse, scale * LOG2E, shape.top_k, *k.stride()[:3], *v.stride()[:3],
        **_by_page_sizes(shape, tiles), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    _combine(parts, part_lse, out, lse)


def _by_page_sizes(shape: Shape, tiles: plan.Tiles) -> dict[str, Any]:
    return {
        "HKV": shape.groups, "G": shape.per_group, "D": shape.dim, "BLOCK": shape.block_size,
        "ROWS": tiles.rows, "DIM": padded(shape.dim), "TILE": tiles.tokens,
        "PRECISION": precision_of(shape.dtype),
    }  # fmt: skip


def _combine(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """parts [N, Hkv, parts, G, D] -> out [N, Hq, D]."""
    n, groups, count, per_group, dim = parts.shape
    combine[(n * groups * per_group,)](
        parts, part_lse, out, lse, count, G=per_group, D=dim, DIM=padded(dim), STEP=16, num_warps=4
    )


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k_pages, v_pages, blocks, layout, scale, order):
        q = q.contiguous()
        out, lse = _attend(q, k_pages, v_pages, blocks, layout, scale, order)
        ctx.save_for_backward(q, k_pages, v_pages, blocks, out, lse)
        ctx.layout, ctx.scale, ctx.order = layout, scale, order
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, _):
        q, k, v, blocks, out, lse = ctx.saved_tensors
        grads = _gradients(q, k, v, blocks, ctx.layout, ctx.scale, ctx.order, out, lse, d_out.contiguous())
        return *(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)), *[None] * 4


def _gradients(q, k, v, blocks, layout, scale, order: Order, out, lse, d_out) -> tuple[Tensor, ...]:
    """(d_q in q's dtype, d_k, d_v fp32 like k and v, contiguous)."""
    d_q = torch.empty_like(q)
    d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    if q.shape[0] == 0:
        return d_q, d_k, d_v
    delta = _output_products(out, d_out)
    by_page = order == "page"
    step = plan.queries_per_chunk(shape_of(q, blocks, layout)) if by_page else q.shape[0]
    for at in range(0, q.shape[0], step):
        rows = slice(at, at + step)
        _gradients_by_page(
            q[rows], k, v, blocks[rows], _rows_of(layout, rows), scale, lse[rows], delta[rows], d_out[rows],
            d_q[rows] if by_page else None, d_k, d_v,
        )  # fmt: skip
    if not by_page:
        _d_q_by_query(q, k, v, blocks, layout, scale, lse, delta, d_out, d_q)
    return d_q, d_k, d_v


def _output_products(out: Tensor, d_out: Tensor) -> Tensor:
    """fp32 [N, Hq]."""
    n, heads, dim = out.shape
    delta = out.new_empty((n, heads), dtype=torch.float32)
    rows = 16
    output_products[(-(-n * heads // rows),)](
        out, d_out, delta, n * heads, D=dim, DIM=padded(dim), ROWS=rows, num_warps=4
    )
    return delta


def _gradients_by_page(
    q, k, v, blocks, layout, scale, lse, delta, d_out, d_q: Tensor | None, d_k, d_v
) -> None:
    """Adds to d_k and d_v; with d_q also writes that."""
    shape = shape_of(q, blocks, layout)
    tiles = plan.backward_by_page_tiles(shape)
    subs = tiles.per_block(shape.block_size)
    read = readers(blocks, layout, k.shape[0])
    pieces = cut(read, plan.gradient_piece(shape))
    rooms = pieces.rooms, shape.block_size, shape.dim
    partial_k, partial_v = (q.new_empty(rooms, dtype=torch.float32) for _ in "kv")
    parts = q
    if d_q is not None:
        parts = q.new_empty((shape.tokens, shape.groups, shape.top_k, subs, shape.per_group, shape.dim))
    backward_by_page[(pieces.segment.shape[0] * subs,)](
        q, k, v, d_out, lse, delta, read.entries, read.seen, read.deepest,
        pieces.segment, pieces.first, pieces.count, pieces.room, d_k, d_v, partial_k, partial_v, parts,
        scale, shape.top_k, *k.stride()[:3], *v.stride()[:3], **_by_page_sizes(shape, tiles),
        WITH_DQ=d_q is not None, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    add_pieces(partial_k, pieces, d_k)
    add_pieces(partial_v, pieces, d_v)
    if d_q is not None:
        add_parts(parts, read.shown, d_q, 1.0)


def _d_q_by_query(q, k, v, blocks, layout, scale, lse, delta, d_out, d_q) -> None:
    shape = shape_of(q, blocks, layout)
    d_q_by_query[(shape.tokens, shape.groups)](
        q, k, v, d_out, lse, delta, blocks, *_places(layout), d_q, scale,
        *k.stride()[:3], *v.stride()[:3], **_by_query_sizes(shape),
        num_warps=plan.by_query_tiles(shape).warps, num_stages=2,
    )  # fmt: skip


def _places(layout: PackedLayout) -> tuple[Any, ...]:
    """What kernels by query take to find a query's pages; the table may be a view of a wider one."""
    table = layout.page_table
    table = table if table.stride(1) == 1 else table.contiguous()
    return layout.positions.contiguous(), layout.paths.contiguous(), table, table.stride(0)


def _rows_of(layout: PackedLayout, rows: slice) -> PackedLayout:
    return replace(
        layout, positions=layout.positions[rows], paths=layout.paths[rows], slots=layout.slots[rows]
    )
