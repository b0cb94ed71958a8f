"""RMSNorm, plain (times w) and Gemma's (times 1 + w), computed in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longforge.model.config import ModelConfig

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * w, or * (1 + w) with Gemma norms; over the last dimension."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.gemma = config.gemma_norm
        self.weight = nn.Parameter(torch.full((size,), config.norm_start))

    def scale(self) -> Tensor:
        """The factor [size], fp32 (fp64 for an fp64 model)."""
        weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
        return 1.0 + weight if self.gemma else weight

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale()
        return F.rms_norm(x.to(scale.dtype), scale.shape, scale, self.eps).to(x.dtype)
