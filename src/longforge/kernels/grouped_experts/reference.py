"""The grouped expert feed-forward, expert by expert: the specification. See api.py for the contract."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longforge.kernels.grouped_experts.activation import activate

__all__ = ["grouped_experts"]


def grouped_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    activation: str,
    alpha: float,
    limit: float,
) -> Tensor:
    """x [N, d], gate_up [E, 2I, d], down [E, d, I], expert_ids and weights [N, k] -> [N, d]."""
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(x, dtype=wide)
    for expert in range(gate_up.shape[0]):
        token, choice = torch.where(expert_ids == expert)
        gate, up = F.linear(x[token].to(wide), gate_up[expert].to(wide)).chunk(2, dim=-1)
        y = F.linear(activate(gate, up, activation, alpha, limit), down[expert].to(wide))
        out = out.index_add(0, token, y.to(wide) * weights[token, choice, None].to(wide))
    return out.to(x.dtype)
