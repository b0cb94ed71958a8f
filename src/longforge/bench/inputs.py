"""The tensors that all contestants of one measurement share."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from longforge.bench.work import Shape, Work
from longforge.kernels.layout import PackedLayout

__all__ = ["DTYPES", "Inputs", "make_inputs"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Inputs:
    """Queries [n, Hq, D] and [n, Hkv, Di]; pages [S, Bk, Hkv, D] and [S, Bk, Di]. Pages stand in shuffled
    order, as in an engine's pool; in training in order, as a batch is laid out."""

    shape: Shape
    work: Work
    layout: PackedLayout
    q: Tensor
    index_q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    index_k_pages: Tensor

    @property
    def device(self) -> torch.device:
        return self.q.device

    @cached_property
    def k_by_head(self) -> Tensor:
        """The same keys for rivals that know no pages: [1, Hkv, keys, D], in order."""
        return self._by_head(self.k_pages)

    @cached_property
    def v_by_head(self) -> Tensor:
        """The same values, likewise."""
        return self._by_head(self.v_pages)

    @cached_property
    def index_k_in_order(self) -> Tensor:
        """The same index keys: [1, 1, keys, Di], in order."""
        return self._by_head(self.index_k_pages[:, :, None])

    def _by_head(self, pages: Tensor) -> Tensor:
        size, groups, dim = pages.shape[1:]
        table = self.layout.page_table[0].long()
        out = pages.new_empty(1, groups, len(table) * size, dim)
        step = 256  # pages at a time: the pool may be most of the memory there is
        for at in range(0, len(table), step):
            part = pages[table[at : at + step]].flatten(0, 1)
            out[0, :, at * size : at * size + len(part)] = part.transpose(0, 1)
        return out[:, :, : self.work.keys]


def make_inputs(shape: Shape, work: Work, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Normal numbers."""
    rng = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device).normal_(generator=rng)

    size = shape.block_size
    blocks = (work.keys + size - 1) // size
    order = torch.arange(blocks, device=device)
    if work.phase != "train":
        order = torch.randperm(blocks, generator=rng, device=device)
    positions = torch.arange(work.first, work.keys, device=device)
    layout = PackedLayout(
        positions,
        torch.zeros_like(positions),
        order[positions // size] * size + positions % size,
        order[None].int(),
        size,
    )
    return Inputs(
        shape,
        work,
        layout,
        normal(work.queries, shape.heads, shape.dim),
        normal(work.queries, shape.groups, shape.index_dim),
        normal(blocks, size, shape.groups, shape.dim),
        normal(blocks, size, shape.groups, shape.dim),
        normal(blocks, size, shape.index_dim),
    )
