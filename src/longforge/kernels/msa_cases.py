"""Inputs that the three operations of sparse attention share: what their cases.py lists is made here."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout

__all__ = ["Case", "Inputs", "make_inputs", "take"]


@dataclass(frozen=True)
class Case:
    """Whole paths of these lengths; `tail` > 0 keeps only the last tokens of each as queries (decode)."""

    lengths: tuple[int, ...]
    heads: int
    groups: int
    dim: int
    index_dim: int
    block_size: int
    top_k: int
    tail: int = 0

    @property
    def name(self) -> str:
        tokens = f"T{max(self.lengths)}x{len(self.lengths)}" + (f"-last{self.tail}" if self.tail else "")
        heads = f"H{self.heads}-{self.groups}-D{self.dim}-Di{self.index_dim}"
        return f"{tokens}-{heads}-Bk{self.block_size}-K{self.top_k}"


@dataclass(frozen=True)
class Inputs:
    """Queries and pages in the layout's shapes; rows of pages where no token is hold NaN."""

    layout: PackedLayout
    index_q: Tensor
    index_k: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype."""
        tensors = {name: getattr(self, name).to(dtype) for name in ("index_q", "index_k", "q", "k", "v")}
        return replace(self, **tensors)


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Normal numbers. Physical pages are shuffled, with two more that belong to nobody."""
    rng = torch.Generator().manual_seed(seed)
    whole = PackedLayout.from_lengths(case.lengths, case.block_size)
    n = len(whole.positions)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    order = torch.randperm(whole.pages + 2, generator=rng)
    table = torch.where(whole.page_table < 0, -1, order[whole.page_table.long().clamp(min=0)]).int()
    page, offset = whole.slots // case.block_size, whole.slots % case.block_size
    layout = replace(whole, page_table=table, slots=order[page] * case.block_size + offset)

    def pages(packed: Tensor) -> Tensor:
        empty = torch.full(
            ((whole.pages + 2) * case.block_size, *packed.shape[1:]), float("nan"), dtype=dtype
        )
        return empty.index_copy(0, layout.slots, packed).unflatten(0, (-1, case.block_size))

    inputs = Inputs(
        layout,
        normal(n, case.groups, case.index_dim),
        pages(normal(n, case.index_dim)),
        normal(n, case.heads, case.dim),
        pages(normal(n, case.groups, case.dim)),
        pages(normal(n, case.groups, case.dim)),
    )
    if not case.tail:
        return inputs
    lengths = torch.tensor(case.lengths)[whole.paths]
    return take(inputs, torch.nonzero(whole.positions >= lengths - case.tail).flatten())


def take(inputs: Inputs, rows: Tensor) -> Inputs:
    """Only these query tokens (ascending), over the same pages: a chunk of a prefill, or a decode step."""
    layout = inputs.layout
    part = replace(
        layout, positions=layout.positions[rows], paths=layout.paths[rows], slots=layout.slots[rows]
    )
    return replace(inputs, layout=part, index_q=inputs.index_q[rows], q=inputs.q[rows])
