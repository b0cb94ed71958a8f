"""From the host to the model's device without waiting for it."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device.

    Copies to a GPU go through page-locked memory, which torch's allocator keeps until the copy is done: only
    such copies do not make the host wait for all work before them.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    if torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
