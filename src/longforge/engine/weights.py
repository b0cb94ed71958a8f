"""Replacing weights in place: everything is checked before anything is touched."""

from collections.abc import Mapping

import torch
from torch import Tensor

from longforge.errors import CheckpointError

__all__ = ["check_weights", "copy_weights"]


def check_weights(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """CheckpointError, naming a tensor, unless `state` has the names and shapes of `target` and is finite."""
    missing = sorted(target.keys() - state.keys())
    if missing:
        raise CheckpointError(
            f"weights: {len(missing)} of {len(target)} tensors are missing, first {missing[0]}"
        )
    unknown = sorted(state.keys() - target.keys())
    if unknown:
        raise CheckpointError(
            f"weights: {len(unknown)} tensors have no place in the model, first {unknown[0]}"
        )
    for name, tensor in state.items():
        expected = tuple(target[name].shape)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(f"weights: {name}: expected shape {expected}, got {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"weights: {name}: expected finite numbers, got NaN or infinity")


def copy_weights(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copies checked weights into the model's own tensors, converting dtype and device."""
    with torch.no_grad():
        for name, tensor in state.items():
            target[name].copy_(tensor)
