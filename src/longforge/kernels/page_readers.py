"""A selection turned round: for each page and group, which queries read it.

Selection names blocks per query. Kernels that keep a page in fast memory and let its queries pass by need the
inverse. It is a stable sort of all (query, group, slot) entries by (page, group), so it is the same every
time, shared pages gather the readers of all their paths, and nothing is ever asked of the device: every
size below follows from shapes alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout

__all__ = ["BYTES_PER_ENTRY", "Pieces", "Readers", "cut", "readers"]

BYTES_PER_ENTRY = 64
"""At most what `readers` holds per entry while it works: keys, 64-bit places, and the sort's own."""


@dataclass(frozen=True)
class Readers:
    """Entries are numbered (query * Hkv + group) * K + slot; segments are page * Hkv + group."""

    entries: Tensor
    """int32 [E = N * Hkv * K], all entries, those of a segment side by side and ascending."""
    seen: Tensor
    """int32 [E], how many tokens of its block the entry beside it sees."""
    starts: Tensor
    """int32 [S * Hkv + 1], where each segment's entries begin; those after the last read nothing."""
    deepest: Tensor
    """int32 [S * Hkv], the most tokens that any entry of the segment sees; rows after may hold anything."""
    shown: Tensor
    """int32 [N, Hkv, K], `seen` in the order of the entries' numbers; 0 reads nothing."""


@dataclass(frozen=True)
class Pieces:
    """Segments cut into pieces, so that a page that everybody reads is not one program's work. T pieces are
    room for the worst case; those that are not there have count 0."""

    segment: Tensor
    """int32 [T]."""
    first: Tensor
    """int32 [T], the piece's first entry."""
    count: Tensor
    """int32 [T], its number of entries."""
    room: Tensor
    """int32 [T], which of `rooms` places for partial results is its own; -1 for all of a segment."""
    segment_room: Tensor
    """int32 [S * Hkv], the first place of a segment that has several pieces."""
    segment_pieces: Tensor
    """int32 [S * Hkv], how many pieces the segment has."""
    rooms: int


def readers(blocks: Tensor, layout: PackedLayout, pages: int) -> Readers:
    """blocks int32 [N, Hkv, K], -1 for none; pages: S, the number of physical pages."""
    groups = blocks.shape[1]
    size, table = layout.block_size, layout.page_table
    known = blocks.clamp(min=0)
    page = table.flatten()[layout.paths[:, None, None] * table.shape[1] + known]
    shown = (layout.positions.int()[:, None, None] - known * size + 1).clamp(0, size)
    shown = torch.where((blocks < 0) | (page < 0), 0, shown)
    segments = pages * groups
    segment = page * groups + torch.arange(groups, dtype=torch.int32, device=blocks.device)[:, None]
    segment = torch.where(shown > 0, segment, segments).flatten()
    ordered, order = torch.sort(segment, stable=True)
    bounds = torch.arange(segments + 1, dtype=torch.int32, device=blocks.device)
    starts = torch.searchsorted(ordered, bounds, out_int32=True)
    deepest = shown.new_zeros(segments + 1).scatter_reduce_(0, segment.long(), shown.flatten(), "amax")
    return Readers(order.int(), shown.flatten()[order], starts, deepest[:segments], shown)


def cut(read: Readers, size: int) -> Pieces:
    """Pieces of at most `size` entries each."""
    starts, entries = read.starts, read.entries.shape[0]
    segments = starts.shape[0] - 1
    each = (starts.diff() + size - 1) // size
    ends = each.cumsum(0)
    most = min(segments, entries) + entries // size
    t = torch.arange(most, device=starts.device)
    segment = torch.searchsorted(ends, t, right=True)
    there = segment < segments
    segment = segment.clamp(max=segments - 1)
    number = t - (ends - each)[segment]
    first = starts[segment] + number * size
    count = torch.where(there, (starts[segment + 1] - first).clamp(max=size), 0)
    # A segment of several pieces has more than `size` entries, so it has fewer than 2 entries / size pieces.
    kept = torch.where(each > 1, each, 0)
    segment_room = kept.cumsum(0) - kept
    room = torch.where(each[segment] > 1, segment_room[segment] + number, -1)
    numbers = (x.int() for x in (segment, first, count, room, segment_room, each))
    return Pieces(*numbers, rooms=2 * entries // size)
