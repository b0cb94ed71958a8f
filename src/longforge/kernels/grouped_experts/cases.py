"""The shapes that tests and benchmarks of grouped experts use."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ALIGNED_CASES", "CASES", "GPU_CASES", "SPEED_CASES", "Case", "make_inputs"]


@dataclass(frozen=True)
class Case:
    """N tokens of width d, each sent to k of E experts of inner size I; `used`: experts that get tokens."""

    tokens: int
    width: int
    inner: int
    experts: int
    choices: int
    used: int

    @property
    def name(self) -> str:
        return f"N{self.tokens}-d{self.width}-I{self.inner}-E{self.experts}-k{self.choices}-used{self.used}"


CASES = (
    Case(1, 3, 5, 1, 1, 1),
    Case(7, 6, 3, 5, 2, 3),
    Case(33, 17, 9, 4, 4, 4),
    Case(50, 8, 16, 9, 1, 2),
)
ALIGNED_CASES = (
    Case(1, 8, 16, 1, 1, 1),
    Case(7, 16, 8, 5, 2, 3),
    Case(50, 24, 16, 9, 3, 4),
)
"""Widths that are multiples of eight, which torch's grouped product wants."""
GPU_CASES = (
    Case(4096, 512, 256, 8, 2, 8),
    Case(700, 768, 384, 64, 8, 40),
    Case(333, 200, 72, 16, 4, 16),
    Case(32, 1536, 512, 128, 8, 128),
    Case(1, 512, 256, 32, 8, 32),
)
SPEED_CASES = {
    "training": Case(4096, 192, 192, 8, 2, 8),
    "decode 32": Case(32, 192, 192, 8, 2, 8),
    "decode 1": Case(1, 192, 192, 8, 2, 8),
}


def make_inputs(
    case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x, gate_up, down, expert_ids, weights). A spread of 1 gives pre-activations of about unit size.

    A token never chooses an expert twice.
    """
    rng = torch.Generator().manual_seed(seed)
    n, d, inner = case.tokens, case.width, case.inner

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    x, gate_up = normal(n, d), normal(case.experts, 2 * inner, d) * (spread * d**-0.5)
    down = normal(case.experts, d, inner) * inner**-0.5
    scores = torch.rand(n, case.experts, generator=rng)
    scores[:, torch.randperm(case.experts, generator=rng)[: case.experts - case.used]] = -1.0
    ids = scores.topk(case.choices, dim=1).indices
    weights = torch.rand(n, case.choices, generator=rng, dtype=torch.float64)
    return x.to(dtype), gate_up.to(dtype), down.to(dtype), ids, weights.to(dtype)
