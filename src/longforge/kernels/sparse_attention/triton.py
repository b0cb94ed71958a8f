"""Block-sparse attention on the GPU: which kernels run in which order for a shape, and their memory.

NOTES.md beside this counts the bytes and operations that the choices rest on.
"""

# pyright: reportMissingImports=false
from dataclasses import replace
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout
from longforge.kernels.page_readers import BYTES_PER_ENTRY, Readers, cut, readers
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
    check_tensors,
    padded,
    precision_of,
    with_dense_rows,
)

__all__ = ["MOST_HEADS", "WORKSPACE", "Order", "sparse_attention"]

Order = Literal["query", "split", "page"]
"""By query, by query with one program per slot (decode), by page."""

WORKSPACE = 1 << 30
"""Most bytes of partial results of one pass by page; longer inputs go through it in chunks of queries."""
MOST_HEADS = 16
"""Most query heads of a group."""
SPLIT_PROGRAMS = 1024
"""Fewer programs than this by query leave most of the device idle, so each slot gets its own."""
ROOMS = 2048
"""About the most partial gradients of pages that many queries read."""


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

    order: None chooses by shape. Results do not depend on it beyond rounding.
    Raises InputError for tensors that are not on CUDA, float64, dims or blocks above 128, more than 16 heads
    in a group.
    """
    check_tensors("sparse_attention", q, layout.block_size, q.shape[2])
    if q.shape[1] > MOST_HEADS * k_pages.shape[2]:
        raise InputError(
            f"sparse_attention backend 'triton': at most {MOST_HEADS} query heads in a group expected, "
            f"got {q.shape[1] // k_pages.shape[2]}"
        )
    blocks = blocks.to(torch.int32).contiguous()
    order = order or _order(q, k_pages, blocks, layout)
    if torch.is_grad_enabled() and (q.requires_grad or k_pages.requires_grad or v_pages.requires_grad):
        apply: Any = _SparseAttention.apply
        return apply(q, k_pages, v_pages, blocks, layout, scale, order)
    return _attend(q.contiguous(), k_pages, v_pages, blocks, layout, scale, order)


def _order(q: Tensor, k_pages: Tensor, blocks: Tensor, layout: PackedLayout) -> Order:
    """By page where partial results cost less memory traffic than reading each block once per query, and
    where a page has enough readers to fill half a tile of 128 rows."""
    n, groups, top_k = blocks.shape
    per_group = q.shape[1] // groups
    if n * groups < SPLIT_PROGRAMS:
        return "split"
    rows_per_block = n * top_k * per_group / max(1, layout.page_table.numel())
    return "page" if layout.block_size >= 4 * per_group and rows_per_block >= 64 else "query"


def _attend(q, k_pages, v_pages, blocks, layout, scale, order: Order) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] in q's dtype, lse fp32 [N, Hq]. q is contiguous."""
    k, v = with_dense_rows(k_pages), with_dense_rows(v_pages)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    if q.shape[0] == 0:
        return out, lse
    if order == "page":
        step = _queries_per_chunk(q, blocks, layout)
        for at in range(0, q.shape[0], step):
            rows = slice(at, at + step)
            _by_page(q[rows], k, v, blocks[rows], _rows_of(layout, rows), scale, out[rows], lse[rows])
    else:
        _by_query(q, k, v, blocks, layout, scale, out, lse, split=order == "split")
    return out, lse


def _by_query(q, k, v, blocks, layout, scale, out, lse, split: bool) -> None:
    n, heads, dim = q.shape
    groups, top_k = blocks.shape[1:]
    per_group = heads // groups
    splits = top_k if split else 1
    parts, part_lse = out, lse
    if splits > 1:
        parts = q.new_empty((n, groups, splits, per_group, dim), dtype=torch.float32)
        part_lse = lse.new_empty((n, groups, splits, per_group))
    wide = q.dtype == torch.float32
    forward_by_query[(n, groups, splits)](
        q, k, v, blocks, layout.positions, layout.paths, layout.page_table, parts, part_lse,
        scale * LOG2E, 1.0 if splits > 1 else LN2, layout.page_table.shape[1],
        *k.stride()[:3], *v.stride()[:3],
        HKV=groups, G=per_group, D=dim, TOP_K=top_k, SLOTS=top_k // splits, BLOCK=layout.block_size,
        ROWS=padded(per_group), DIM=padded(dim), TILE=min(padded(layout.block_size), 32 if wide else 64),
        PRECISION=precision_of(q.dtype), num_warps=4, num_stages=2 if wide else 3,
    )  # fmt: skip
    if splits > 1:
        _combine(parts, part_lse, out, lse)


def _by_page(q, k, v, blocks, layout, scale, out, lse) -> None:
    n, heads, dim = q.shape
    groups, top_k = blocks.shape[1:]
    per_group = heads // groups
    tile = _page_tile(q, layout)
    subs = triton.cdiv(layout.block_size, tile)
    rows, _ = _page_rows(q, forward=True)
    read = readers(blocks, layout, k.shape[0])
    pieces = cut(read, 8 * (rows // per_group))
    parts = q.new_empty((n, groups, top_k * subs, per_group, dim))
    part_lse = lse.new_full((n, groups, top_k * subs, per_group), float("-inf"))
    forward_by_page[(pieces.segment.shape[0], subs)](
        q, k, v, read.entries, read.seen, read.deepest, pieces.segment, pieces.first, pieces.count,
        parts, part_lse, scale * LOG2E, top_k, *k.stride()[:3], *v.stride()[:3],
        HKV=groups, G=per_group, D=dim, BLOCK=layout.block_size, ROWS=rows, DIM=padded(dim), TILE=tile,
        PRECISION=precision_of(q.dtype), num_warps=8 if rows == 128 else 4, num_stages=2,
    )  # fmt: skip
    _combine(parts, part_lse, out, lse)


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
        q, k_pages, v_pages, blocks, out, lse = ctx.saved_tensors
        grads = _gradients(
            q, with_dense_rows(k_pages), with_dense_rows(v_pages), blocks, ctx.layout, ctx.scale, ctx.order,
            out, lse, d_out.contiguous(),
        )  # fmt: skip
        return *(grad.to(x.dtype) for grad, x in zip(grads, (q, k_pages, v_pages), strict=True)), *[None] * 4


def _gradients(q, k, v, blocks, layout, scale, order: Order, out, lse, d_out) -> tuple[Tensor, ...]:
    """(d_q in q's dtype, d_k, d_v fp32 like k and v, contiguous)."""
    d_q = torch.empty_like(q)
    d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    if q.shape[0] == 0:
        return d_q, d_k, d_v
    delta = _output_products(out, d_out)
    by_page = order == "page"
    step = _queries_per_chunk(q, blocks, layout) if by_page else q.shape[0]
    for at in range(0, q.shape[0], step):
        rows = slice(at, at + step)
        part = _rows_of(layout, rows)
        read = readers(blocks[rows], part, k.shape[0])
        d_q_part = d_q[rows] if by_page else None
        _gradients_by_page(
            q[rows], k, v, read, part, scale, lse[rows], delta[rows], d_out[rows], d_q_part, d_k, d_v
        )
    if not by_page:
        _d_q_by_query(q, k, v, blocks, layout, scale, lse, delta, d_out, d_q)
    return d_q, d_k, d_v


def _output_products(out: Tensor, d_out: Tensor) -> Tensor:
    """fp32 [N, Hq]."""
    n, heads, dim = out.shape
    delta = out.new_empty((n, heads), dtype=torch.float32)
    output_products[(triton.cdiv(n * heads, 32),)](
        out, d_out, delta, n * heads, D=dim, DIM=padded(dim), ROWS=32, num_warps=4
    )
    return delta


def _gradients_by_page(
    q, k, v, read: Readers, layout, scale, lse, delta, d_out, d_q: Tensor | None, d_k, d_v
) -> None:
    """Adds to d_k and d_v; with d_q also writes that."""
    n, heads, dim = q.shape
    groups, top_k = read.shown.shape[1:]
    per_group = heads // groups
    tile = _page_tile(q, layout)
    subs = triton.cdiv(layout.block_size, tile)
    rows, warps = _page_rows(q, forward=False)
    pieces = cut(read, _piece_of_gradients(read.entries.shape[0], rows // per_group))
    partial_k, partial_v = (q.new_empty((pieces.rooms, k.shape[1], dim), dtype=torch.float32) for _ in "kv")
    parts = q if d_q is None else q.new_empty((n, groups, top_k, subs, per_group, dim))
    backward_by_page[(pieces.segment.shape[0], subs)](
        q, k, v, d_out, lse, delta, read.entries, read.seen, read.deepest,
        pieces.segment, pieces.first, pieces.count, pieces.room, d_k, d_v, partial_k, partial_v, parts,
        scale, top_k, *k.stride()[:3], *v.stride()[:3],
        HKV=groups, G=per_group, D=dim, BLOCK=layout.block_size, ROWS=rows, DIM=padded(dim), TILE=tile,
        WITH_DQ=d_q is not None, PRECISION=precision_of(q.dtype), num_warps=warps, num_stages=2,
    )  # fmt: skip
    add_pieces(partial_k, pieces, d_k)
    add_pieces(partial_v, pieces, d_v)
    if d_q is not None:
        add_parts(parts, read.shown, d_q, 1.0)


def _d_q_by_query(q, k, v, blocks, layout, scale, lse, delta, d_out, d_q) -> None:
    n, heads, dim = q.shape
    groups, top_k = blocks.shape[1:]
    wide = q.dtype == torch.float32
    d_q_by_query[(n, groups)](
        q, k, v, d_out, lse, delta, blocks, layout.positions, layout.paths, layout.page_table, d_q,
        scale, layout.page_table.shape[1], *k.stride()[:3], *v.stride()[:3],
        HKV=groups, G=heads // groups, D=dim, TOP_K=top_k, BLOCK=layout.block_size,
        ROWS=padded(heads // groups), DIM=padded(dim),
        TILE=min(padded(layout.block_size), 32 if wide else 64), PRECISION=precision_of(q.dtype),
        num_warps=4, num_stages=2,
    )  # fmt: skip


def _rows_of(layout: PackedLayout, rows: slice) -> PackedLayout:
    return replace(
        layout, positions=layout.positions[rows], paths=layout.paths[rows], slots=layout.slots[rows]
    )


def _page_tile(q: Tensor, layout: PackedLayout) -> int:
    """Tokens of a page that one program holds."""
    return min(padded(layout.block_size), 32 if q.dtype == torch.float32 else 128)


def _page_rows(q: Tensor, forward: bool) -> tuple[int, int]:
    """(query rows of one step by page, warps)."""
    if q.dtype == torch.float32:
        return 32, 4
    return (128, 8) if forward else (64, 8)


def _piece_of_gradients(entries: int, queries: int) -> int:
    """Entries of one program that sums gradients: enough programs for balance, not too many partial sums."""
    return max(32 * queries, triton.cdiv(2 * entries, ROOMS))


def _queries_per_chunk(q: Tensor, blocks: Tensor, layout: PackedLayout) -> int:
    """Queries whose partial results fit into WORKSPACE."""
    n, heads, dim = q.shape
    groups, top_k = blocks.shape[1:]
    subs = triton.cdiv(layout.block_size, _page_tile(q, layout))
    partial = heads * top_k * subs * (dim * q.element_size() + 4)
    return max(1, min(n, WORKSPACE // (partial + groups * top_k * BYTES_PER_ENTRY)))
