"""The one layout every attention operation sees: packed tokens, a page table, positions.

Legend of shapes, used by every kernel and mixer:

    N   packed query tokens of all paths            P   paths (sequences) in the batch
    S   physical pages in the pool                  M   most logical pages of a path
    Bk  block_size: tokens of a page = selection block
    Hq  query heads     Hkv  key/value heads (= GQA groups)     G = Hq / Hkv
    D   head dim        Di   index dim              K   selected blocks per query and group

Prefill, chunked prefill after a prefix hit, paged decode, verifying drafts and training are one case: each
packed token names its path and absolute position; block b of path p is physical page page_table[p, b].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from longforge.errors import InputError

__all__ = ["PackedLayout", "as_pages"]


@dataclass(frozen=True)
class PackedLayout:
    """Where each packed token stands and where its path's pages are."""

    positions: Tensor
    """int64 [N], absolute position in its path. Tokens of one path are adjacent and ascending."""
    paths: Tensor
    """int64 [N], row of `page_table`. Ascending."""
    slots: Tensor
    """int64 [N], page * Bk + offset: where this token's key, value and index key are written."""
    page_table: Tensor
    """int32 [P, M], physical page of each logical block, -1 where there is none."""
    block_size: int

    @cached_property
    def pages(self) -> int:
        """Number of physical pages that this layout's own slots need (training: no pool exists yet).

        Read from the table once; on a GPU that first time waits for the device.
        """
        return int(self.page_table.max()) + 1

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """(positions, paths, slots, page_table, block_size): what operators and `PackedLayout(*...)` take."""
        return self.positions, self.paths, self.slots, self.page_table, self.block_size

    @staticmethod
    def from_lengths(
        lengths: Sequence[int], block_size: int, device: torch.device | str = "cpu"
    ) -> "PackedLayout":
        """Whole sequences, each from position 0, each on fresh pages (training and scoring).

        lengths: tokens of each sequence, all at least 1.
        """
        n = torch.tensor(list(lengths), dtype=torch.int64)
        assert bool((n > 0).all()), "each sequence has at least one token"
        blocks = (n + block_size - 1) // block_size
        first_page = torch.cumsum(blocks, 0) - blocks
        paths = torch.repeat_interleave(torch.arange(len(n)), n)
        positions = torch.arange(int(n.sum())) - (torch.cumsum(n, 0) - n)[paths]
        slots = first_page[paths] * block_size + positions
        logical = torch.arange(int(blocks.max()) if len(n) else 0)
        table = torch.where(logical < blocks[:, None], first_page[:, None] + logical, -1)
        layout = PackedLayout(
            positions.to(device),
            paths.to(device),
            slots.to(device),
            table.to(torch.int32).to(device),
            block_size,
        )
        # Known here without asking the device.
        layout.__dict__["pages"] = int(blocks.sum())
        return layout

    @staticmethod
    def from_cu_seqlens(
        cu_seqlens: Tensor | Sequence[int], block_size: int, device: torch.device | str = "cpu"
    ) -> "PackedLayout":
        """Whole sequences side by side, the i-th in rows cu_seqlens[i] .. cu_seqlens[i + 1] - 1.

        cu_seqlens: integers [B + 1], 0 first, never falling; sequences of no tokens are left out. On a GPU
        its values are read, which waits for the device: build one layout for all layers.
        Raises InputError for anything else.
        """
        name = "cu_seqlens"
        if isinstance(cu_seqlens, Tensor):
            if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
                raise InputError(
                    f"{name}: integers [B + 1] expected, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
                )
            cu_seqlens = cu_seqlens.tolist()
        ends = list(cu_seqlens)
        if len(ends) < 2 or ends[0] != 0 or any(b < a for a, b in pairwise(ends)):
            raise InputError(f"{name}: B + 1 numbers that start at 0 and never fall expected, got {ends[:9]}")
        lengths = [b - a for a, b in pairwise(ends) if b > a]
        return PackedLayout.from_lengths(lengths, block_size, device)


def as_pages(packed: Tensor, layout: PackedLayout) -> Tensor:
    """Lays packed rows [N, ...] out as pages [S, Bk, ...] (zero where no token is). Differentiable."""
    rows = layout.pages * layout.block_size
    flat = packed.new_zeros((rows, *packed.shape[1:])).index_copy(0, layout.slots, packed)
    return flat.view(layout.pages, layout.block_size, *packed.shape[1:])
