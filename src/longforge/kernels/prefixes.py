"""The plain view of a packed layout that the reference backends loop over: one path and its whole prefix at a
time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout

__all__ = ["Prefix", "prefixes", "visible_tokens"]


@dataclass(frozen=True)
class Prefix:
    """The query tokens of one path and where the keys of its prefix lie."""

    rows: slice
    """The path's query tokens among the N packed ones (n of them)."""
    positions: Tensor
    """int64 [n], their absolute positions."""
    key_rows: Tensor
    """int64 [T], row page * Bk + offset of positions 0..T-1 in pages flattened to [S * Bk, ...]; T - 1 is the
    last query's position, so a row that was never written is never named."""

    def keys(self, pages: Tensor) -> Tensor:
        """pages [S, Bk, ...] -> the prefix's rows [T, ...]. Differentiable."""
        return pages.flatten(0, 1).index_select(0, self.key_rows)

    def causal(self) -> Tensor:
        """bool [n, T]: key position <= query position."""
        return torch.arange(len(self.key_rows), device=self.positions.device) <= self.positions[:, None]


def prefixes(layout: PackedLayout) -> Iterator[Prefix]:
    """One Prefix per path that has query tokens, in packed order."""
    paths, counts = torch.unique_consecutive(layout.paths, return_counts=True)
    start = 0
    for path, count in zip(paths.tolist(), counts.tolist(), strict=True):
        rows = slice(start, start + count)
        positions = layout.positions[rows]
        t = torch.arange(int(positions.max()) + 1, device=positions.device)
        pages = layout.page_table[path].long()[t // layout.block_size]
        yield Prefix(rows, positions, pages * layout.block_size + t % layout.block_size)
        start += count


def visible_tokens(prefix: Prefix, blocks: Tensor, block_size: int) -> Tensor:
    """bool [n, Hkv, T]: the token lies in a selected block and is not after the query.

    blocks: int [n, Hkv, K], logical block ids, -1 for none.
    """
    tokens = len(prefix.key_rows)
    count = (tokens + block_size - 1) // block_size
    # One more column takes the -1s and is cut off again.
    chosen = torch.zeros((*blocks.shape[:2], count + 1), dtype=torch.bool, device=blocks.device)
    chosen.scatter_(2, torch.where(blocks < 0, count, blocks).long(), True)
    in_block = chosen[..., :count].repeat_interleave(block_size, dim=2)[..., :tokens]
    return in_block & prefix.causal()[:, None, :]
