"""How block-sparse attention is cut for a GPU: which order of work, tiles, warps, chunks of queries.

NOTES.md beside this counts the bytes and operations that the choices rest on.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from longforge.kernels.layout import PackedLayout
from longforge.kernels.page_readers import BYTES_PER_ENTRY
from longforge.kernels.triton_pages import padded

__all__ = [
    "WORKSPACE",
    "Order",
    "Shape",
    "Tiles",
    "backward_by_page_tiles",
    "by_query_tiles",
    "choose_order",
    "forward_by_page_tiles",
    "gradient_piece",
    "queries_per_chunk",
    "shape_of",
]

Order = Literal["query", "split", "page"]
"""By query; by query with one program per slot (decode); by page."""

WORKSPACE = 1 << 30
"""Most bytes of partial results of one pass by page; longer inputs go through it in chunks of queries."""
SPLIT_PROGRAMS = 1024
"""Fewer programs than this by query leave most of the device idle, so each slot gets its own."""
FULL_TILE = 64
"""Rows that a block's readers should fill for the order by page to be worth it: half a tile."""
ROOMS = 2048
"""About the most partial gradients of pages that many queries read."""


@dataclass(frozen=True)
class Shape:
    """What decides; see layout.py for the letters."""

    dtype: torch.dtype
    tokens: int
    groups: int
    per_group: int
    dim: int
    block_size: int
    top_k: int
    capability: int = 90
    """Compute capability of the device, 90 for 9.0."""


@dataclass(frozen=True)
class Tiles:
    """One launch: rows of queries and tokens of a page in a product, and what runs it."""

    rows: int
    tokens: int
    warps: int
    stages: int

    def per_block(self, block_size: int) -> int:
        """Tiles of a block."""
        return -(-block_size // self.tokens)


def shape_of(q: torch.Tensor, blocks: torch.Tensor, layout: PackedLayout) -> Shape:
    """q [N, Hq, D], blocks [N, Hkv, K]."""
    n, heads, dim = q.shape
    groups, top_k = blocks.shape[1:]
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    capability = 10 * major + minor
    return Shape(q.dtype, n, groups, heads // groups, dim, layout.block_size, top_k, capability)


def choose_order(shape: Shape, table_entries: int) -> Order:
    """By page where partial results cost less traffic than reading each block once per query, and where a
    block has readers enough. table_entries: P * M, the blocks there are at most."""
    if shape.tokens * shape.groups < SPLIT_PROGRAMS:
        return "split"
    rows_per_block = shape.tokens * shape.top_k * shape.per_group / max(1, table_entries)
    return "page" if shape.block_size >= 4 * shape.per_group and rows_per_block >= FULL_TILE else "query"


def by_query_tiles(shape: Shape) -> Tiles:
    """A query's heads are the rows; fp32 tiles are twice as large and take three products."""
    wide = shape.dtype == torch.float32
    tokens = min(padded(shape.block_size), 32 if wide else 64)
    return Tiles(padded(shape.per_group), tokens, warps=4, stages=2 if wide else 3)


def forward_by_page_tiles(shape: Shape) -> Tiles:
    """128 rows fill the matrix instructions of Hopper and Blackwell."""
    if shape.dtype == torch.float32:
        return Tiles(32, min(padded(shape.block_size), 32), warps=4, stages=2)
    return Tiles(128, min(padded(shape.block_size), 128), warps=8, stages=2)


def backward_by_page_tiles(shape: Shape) -> Tiles:
    """Four tiles of accumulators leave room for 64 rows; Blackwell's tensor memory, for 64 tokens as well."""
    if shape.dtype == torch.float32:
        return Tiles(32, min(padded(shape.block_size), 16), warps=8, stages=1)
    return Tiles(64, min(padded(shape.block_size), 64 if shape.capability >= 100 else 128), warps=8, stages=2)


def gradient_piece(shape: Shape) -> int:
    """Entries of one program that sums gradients: enough programs for balance, not too many partial sums."""
    queries = backward_by_page_tiles(shape).rows // shape.per_group
    entries = shape.tokens * shape.groups * shape.top_k
    return max(32 * queries, -(-2 * entries // ROOMS))


def queries_per_chunk(shape: Shape) -> int:
    """Queries whose partial results fit into WORKSPACE."""
    parts = shape.top_k * backward_by_page_tiles(shape).per_block(shape.block_size)
    partial = shape.per_group * parts * (shape.dim * shape.dtype.itemsize + 4)
    return max(1, min(shape.tokens, WORKSPACE // (shape.groups * (partial + shape.top_k * BYTES_PER_ENTRY))))
