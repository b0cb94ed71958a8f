"""How the index loss is cut for a GPU: tiles, and chunks of queries. NOTES.md beside this has the counts."""

from dataclasses import dataclass

import torch

from longforge.kernels.page_readers import BYTES_PER_ENTRY
from longforge.kernels.triton_pages import padded

__all__ = [
    "WORKSPACE",
    "Tiles",
    "gradient_piece",
    "gradient_tiles",
    "log_sum_tiles",
    "queries_per_chunk",
]

WORKSPACE = 1 << 30
"""About the most bytes of partial results of one chunk of queries."""
ROOMS = 2048
"""About the most partial gradients of pages that many queries read."""


@dataclass(frozen=True)
class Tiles:
    """One step of a kernel: queries (one head of each at a time) by tokens of a page."""

    queries: int
    tokens: int
    warps: int
    stages: int

    def per_block(self, block_size: int) -> int:
        """Tiles of a block."""
        return -(-block_size // self.tokens)


def log_sum_tiles(dtype: torch.dtype, block_size: int) -> Tiles:
    """fp32 tiles are twice as large and take three products."""
    if dtype == torch.float32:
        return Tiles(32, min(padded(block_size), 16), warps=4, stages=1)
    return Tiles(64, min(padded(block_size), 128), warps=8, stages=2)


def gradient_tiles(dtype: torch.dtype, block_size: int) -> Tiles:
    """Two more tiles of accumulators than the log-sum-exps have, so half the tokens."""
    if dtype == torch.float32:
        return Tiles(16, min(padded(block_size), 32), warps=8, stages=1)
    return Tiles(64, min(padded(block_size), 64), warps=8, stages=2)


def gradient_piece(tiles: Tiles, entries: int) -> int:
    """Entries of one program that sums gradients: enough programs for balance, not too many partial sums."""
    return max(4 * tiles.queries, -(-2 * entries // ROOMS))


def queries_per_chunk(per_query: int, per_group: int, index_row: int, subs: int) -> int:
    """Queries whose partial results fit into WORKSPACE. per_query: entries of one, Hkv * K; index_row: bytes
    of an index query; subs: tiles of a block, the more of the two kernels."""
    entry = subs * (4 * per_group + 8 + index_row) + BYTES_PER_ENTRY
    return max(1, WORKSPACE // (per_query * entry))
