"""How fast each head of each layer forgets."""

from functools import lru_cache

import torch
from torch import Tensor

from longforge.errors import InputError

__all__ = ["decay_slopes"]


def decay_slopes(heads: int, layer: int, layers: int, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [heads]: slope s of each head; a state loses the factor exp(-s) per token. Not to be written to.

    s_h = 2^(-8 (h + 1) / heads) * (1 - layer / (layers - 1 + 1e-5) + 1e-5), layer from 0: the ALiBi slopes
    (Press et al. 2022) times a factor that falls with depth (MiniMax-01, arXiv 2501.08313, section 2.2). A
    head remembers about 1 / s tokens.
    Raises InputError unless 0 <= layer < layers and heads >= 1.
    """
    if heads < 1 or not 0 <= layer < layers:
        raise InputError(
            f"decay_slopes: heads >= 1 and 0 <= layer < layers expected, got {heads}, {layer}, {layers}"
        )
    return _slopes(heads, layer, layers, torch.device(device))


@lru_cache(maxsize=256)
def _slopes(heads: int, layer: int, layers: int, device: torch.device) -> Tensor:
    """Kept: on a GPU a step would wait for the copy, and could not be captured in a graph."""
    # Outside inference mode, so that a later training step may use the same tensor.
    with torch.inference_mode(False):
        rate = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
        return (rate * (1 - layer / (layers - 1 + 1e-5) + 1e-5)).float().to(device)
