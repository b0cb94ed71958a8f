"""Dense attention of few queries to a path, as in decode: shapes alone decide what runs, so a step can be
captured in a CUDA graph.

On CUDA with Triton and without a window it is block-sparse attention in which each query selects every block
of its prefix: one program to a block, whose results are combined. Elsewhere each query's pages are gathered:
readable torch, its room the queries times the table's width, or the window's. Gradients are the reference's.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from longforge.kernels.dense_attention import reference
from longforge.kernels.layout import PackedLayout

__all__ = ["MOST_QUERIES", "all_blocks", "by_blocks", "by_gathering", "dense_attention"]

MOST_QUERIES = 8
"""Queries of a path, on average, up to which a batch counts as decoding."""
MOST_HEADS, MOST_SIZE = 16, 128
"""What block-sparse attention in Triton takes: heads of a group; head dims and tokens of a block."""
SPLIT_BYTES = 1 << 28
"""Most bytes of partial results; above it one program reads all blocks of a query."""
HAS_TRITON = find_spec("triton") is not None
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def dense_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, layout: PackedLayout, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [N, Hq, D], k_pages and v_pages [S, Bk, Hkv, D] -> out [N, Hq, D], lse [N, Hq]. See api.py."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_pages, v_pages)):
        return reference.dense_attention(q, k_pages, v_pages, layout, window, scale)
    if window is None and _takes_blocks(q, k_pages, v_pages, layout):
        return by_blocks(q, k_pages, v_pages, layout, scale)
    return by_gathering(q, k_pages, v_pages, layout, window, scale)


def by_blocks(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, layout: PackedLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """The whole prefix, as block-sparse attention in Triton over all of its blocks."""
    from longforge.kernels.sparse_attention.triton_backend import sparse_attention

    blocks = all_blocks(layout, k_pages.shape[2])
    partial = 4 * q.numel() * blocks.shape[2]
    order = "split" if partial <= SPLIT_BYTES else "query"
    return sparse_attention(q, k_pages, v_pages, blocks, layout, scale, order)


def all_blocks(layout: PackedLayout, groups: int) -> Tensor:
    """Every block of each query's prefix, int32 [N, Hkv, width], -1 behind the own one.

    The width is that of the page table, rounded up to a power of two: kernels are compiled for it.
    """
    width = 1 << max(0, layout.page_table.shape[1] - 1).bit_length()
    block = torch.arange(width, dtype=torch.int32, device=layout.positions.device)
    own = (layout.positions // layout.block_size)[:, None]
    return torch.where(block <= own, block, -1)[:, None].expand(-1, groups, -1).contiguous()


def by_gathering(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, layout: PackedLayout, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The pages of each query's prefix or window, side by side."""
    size, width = layout.block_size, layout.page_table.shape[1]
    own = layout.positions // size
    block = torch.arange(width, device=own.device).expand(len(own), -1)
    if window is not None:
        # Up to the own one, as many as a window can touch; those before the first are none.
        width = min(width, (window + size - 2) // size + 1)
        block = own[:, None] - torch.arange(width - 1, -1, -1, device=own.device)
    entry = layout.paths[:, None] * layout.page_table.shape[1] + block.clamp(min=0)
    page = layout.page_table.flatten()[entry].clamp(min=0)
    place = block[:, :, None] * size + torch.arange(size, device=own.device)
    behind = layout.positions[:, None] - place.flatten(1)
    seen = (behind >= 0) & (place.flatten(1) >= 0)
    if window is not None:
        seen &= behind < window
    queries = _widened(q).unflatten(1, (k_pages.shape[2], -1))
    # Rows that are not seen may hold anything, infinities too.
    keys, values = (
        torch.where(seen[:, :, None, None], _widened(pool[page].flatten(1, 2)), 0)
        for pool in (k_pages, v_pages)
    )
    scores = torch.einsum("nghd,ntgd->nght", queries, keys) * scale
    scores = scores.masked_fill(~seen[:, None, None, :], float("-inf"))
    out = torch.einsum("nght,ntgd->nghd", scores.softmax(-1), values).flatten(1, 2).to(q.dtype)
    return out, scores.logsumexp(-1).flatten(1, 2).float()


def _takes_blocks(q: Tensor, k_pages: Tensor, v_pages: Tensor, layout: PackedLayout) -> bool:
    return (
        q.is_cuda
        and q.dtype in HALF_AND_SINGLE
        and q.shape[1] <= MOST_HEADS * k_pages.shape[2]
        and max(q.shape[2], layout.block_size) <= MOST_SIZE
        and k_pages.stride(-1) == v_pages.stride(-1) == 1
        and HAS_TRITON
    )


def _widened(x: Tensor) -> Tensor:
    """At least fp32: what half-precision inputs are computed in."""
    return x if x.dtype == torch.float64 else x.float()
