"""Partial rotary position embedding: the first channels of a head rotate, the others pass.

Pairs are split-half inside the rotated part (channel i with i + r/2), as in the released M2 and M3 code.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rotary", "frequencies", "rotary_table", "rotate"]


class Rotary(NamedTuple):
    """cos and sin of each token's angles, both [N, 1, r/2]."""

    cos: Tensor
    sin: Tensor


def rotary_table(positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Angles position * theta^(-2i/r) for positions [N]; computed in fp32 (fp64 for an fp64 model)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions.to(wide)[:, None, None] * frequencies(rotary_dim, theta, positions.device, wide)
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


@lru_cache
def frequencies(rotary_dim: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """theta^(-2i/r) [r/2], rounded to fp32 as the released code has them."""
    # Outside inference mode, so that a later training step may use the same tensor.
    with torch.inference_mode(False):
        steps = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
        return (1.0 / theta ** (steps / max(rotary_dim, 1))).to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotates heads x [N, H, D] by each token's angles."""
    cos, sin = rotary
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat(
        [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin), rest],
        dim=-1,
    )
