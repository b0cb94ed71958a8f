"""From the host to the model's device without waiting for it.

Copies to a GPU go through page-locked memory, which torch's allocator keeps until the copy is done: only such
copies do not make the host wait for all work before them.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["copy_into", "to_device"]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device. On a CPU it is the same memory."""
    return _page_locked(array, device).to(device, non_blocking=True)


def copy_into(target: Tensor, array: np.ndarray) -> None:
    """Copies an array into a tensor of its shape and dtype."""
    target.copy_(_page_locked(array, target.device), non_blocking=True)


def _page_locked(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor
