"""The activations of the expert feed-forward, in torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["activate"]


def activate(gate: Tensor, up: Tensor, activation: str, alpha: float, limit: float) -> Tensor:
    """gate and up [..., I] -> hidden [..., I]."""
    if activation == "silu":
        return F.silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)
