"""How lightning attention is cut for a GPU: chunks, spans of chunks, tiles. NOTES.md beside this has counts.

A chunk is what one step of a program multiplies; a span is a run of chunks of one path that one program
walks. The carry from span to span is all that is sequential over a path, so spans are what runs side by side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.triton_pages import padded

__all__ = ["Spans", "Tiles", "chunk_of_page", "cut", "span_size", "steps_alone", "tiles_of"]

SPAN = 512
"""Tokens of a span, at most: it writes one state of D * D where its tokens hold 3 * 512 * D numbers."""
PROGRAMS = 1024
"""Spans are made shorter until there are about this many programs."""
STEPS = 8
"""Up to this many tokens for each path, on average, are walked one by one."""


@dataclass(frozen=True)
class Tiles:
    """One program and its step."""

    tokens: int
    """Tokens of a chunk, at most."""
    columns: int
    """Columns of the state, and of the values, that the program holds."""
    piece: int
    """Columns of queries and keys that are multiplied in one go."""
    warps: int
    stages: int


@dataclass(frozen=True)
class Spans:
    """Pieces of paths, in the order of their tokens. T is room for the worst case; those that are not there
    have count 0. Everything is found without asking the device."""

    first: Tensor
    """int32 [T], first packed token."""
    count: Tensor
    """int32 [T], number of tokens."""
    path_span: Tensor
    """int32 [P + 1], first span of each path, and the number of spans."""


def steps_alone(tokens: int, paths: int) -> bool:
    """Whether the recurrence itself, token by token, is the way: decode, and verifying drafts."""
    return tokens <= STEPS * paths


def chunk_of_page(block_size: int, most: int) -> int:
    """The chunk size where states are written: the largest divisor of the page up to `most`, so that chunks
    end where pages do."""
    return max(size for size in range(1, min(block_size, most) + 1) if block_size % size == 0)


def span_size(tokens: int, heads: int, chunk: int) -> int:
    """Tokens of a span: a power of two of chunks, few enough that there are PROGRAMS programs."""
    size = chunk
    while 2 * size <= SPAN and tokens * heads >= PROGRAMS * 2 * size:
        size *= 2
    return size


def tiles_of(dtype: torch.dtype, dim: int) -> Tiles:
    """The largest without spills. fp32 tiles are twice as large and take three products; fp16 multiplies the
    state as tf32."""
    dim = padded(dim)
    if dtype == torch.float32:
        return Tiles(16, 16, max(16, dim // 2), warps=4, stages=1)
    if dtype == torch.float16:
        return Tiles(32, min(dim, 64), max(16, dim // 2), warps=4, stages=2)
    return Tiles(64, min(dim, 64), max(16, dim // 2), warps=8, stages=2)


def cut(layout: PackedLayout, size: int) -> Spans:
    """Cuts each path at positions that are multiples of size."""
    positions, paths = layout.positions, layout.paths
    tokens, rows = positions.shape[0], layout.page_table.shape[0]
    new = positions % size == 0
    new[0] = True
    new[1:] |= paths[1:] != paths[:-1]
    number = new.cumsum(0)
    most = min(tokens, tokens // size + 2 * min(rows, tokens))
    first = torch.searchsorted(number, torch.arange(1, most + 2, device=paths.device), out_int32=True)
    path_row = torch.searchsorted(paths, torch.arange(rows + 1, device=paths.device))
    before = torch.cat([number.new_zeros(1), number])
    return Spans(first[:-1], first.diff(), before[path_row].int())
