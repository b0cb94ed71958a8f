"""Linear attention with one fixed decay per head (the Lightning layers of MiniMax-01)."""

from longforge.kernels.lightning_attention.api import lightning_attention
from longforge.kernels.lightning_attention.decay import decay_slopes

__all__ = ["decay_slopes", "lightning_attention"]
