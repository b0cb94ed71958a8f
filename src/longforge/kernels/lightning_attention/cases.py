"""The shapes that tests and benchmarks of lightning attention use."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.lightning_attention.decay import decay_slopes

__all__ = ["CASES", "GPU_CASES", "SMALL_CASES", "SPEED_CASES", "Case", "Inputs", "make_inputs", "take"]


@dataclass(frozen=True)
class Case:
    """Whole paths of these lengths, H heads of width D, pages of block_size."""

    lengths: tuple[int, ...]
    heads: int
    dim: int
    block_size: int

    @property
    def name(self) -> str:
        return f"T{max(self.lengths)}x{len(self.lengths)}-H{self.heads}-D{self.dim}-Bk{self.block_size}"


@dataclass(frozen=True)
class Inputs:
    """Queries, keys and values [N, H, D], slopes [H]."""

    layout: PackedLayout
    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype; slopes stay as they are."""
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))


CASES = (
    Case((1,), 1, 1, 1),
    Case((37, 5, 18, 1), 3, 7, 4),
    Case((70, 64, 129), 2, 16, 16),
    Case((150, 3), 4, 5, 256),
)
SMALL_CASES = (
    Case((1,), 1, 16, 16),
    Case((23, 1, 9), 2, 7, 4),
    Case((70, 33), 1, 32, 16),
    Case((17,), 1, 96, 256),
)
"""Few programs: Triton's interpreter takes milliseconds for each."""
GPU_CASES = (
    Case((2100, 1, 700, 64), 16, 128, 128),
    Case((1500, 333), 8, 64, 64),
    Case((900, 513), 4, 96, 48),
    Case((300,) * 40, 4, 32, 16),
)
SPEED_CASES = {
    "training": Case((300, 600, 450, 380, 520, 410, 333, 577, 500, 26), 8, 32, 16),
    "decode 32": Case((1,) * 32, 8, 32, 16),
}


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Normal numbers; the slopes of the first of four layers; physical pages are shuffled."""
    rng = torch.Generator().manual_seed(seed)
    whole = PackedLayout.from_lengths(case.lengths, case.block_size)
    order = torch.randperm(whole.pages, generator=rng)
    table = torch.where(whole.page_table < 0, -1, order[whole.page_table.long().clamp(min=0)]).int()
    page, offset = whole.slots // case.block_size, whole.slots % case.block_size
    layout = replace(whole, page_table=table, slots=order[page] * case.block_size + offset)
    shape = (3, len(whole.positions), case.heads, case.dim)
    q, k, v = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
    return Inputs(layout, q, k, v, decay_slopes(case.heads, 0, 4))


def take(inputs: Inputs, rows: Tensor) -> Inputs:
    """Only these tokens (ascending): a chunk of a prefill, or a decode step."""
    layout = inputs.layout
    part = replace(
        layout, positions=layout.positions[rows], paths=layout.paths[rows], slots=layout.slots[rows]
    )
    return replace(inputs, layout=part, q=inputs.q[rows], k=inputs.k[rows], v=inputs.v[rows])
