"""What every operation's public door checks, and which backend computes it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout

__all__ = ["check_heads", "check_layout", "check_pages", "check_same_kind", "check_shape", "choose_backend"]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def choose_backend(
    operation: str, backends: Mapping[str, Callable[..., Any]], backend: str | None, device: torch.device
) -> Callable[..., Any]:
    """The function that computes. None means the fast path of the tensors' device; a name never falls back.

    Raises InputError for an unknown name, and for "cpu" asked for with tensors that are elsewhere.
    """
    if backend is None:
        backend = "cpu" if device.type == "cpu" and "cpu" in backends else "reference"
    if backend not in backends:
        raise InputError(f"{operation} backend: one of {', '.join(backends)} expected, got {backend!r}")
    if backend == "cpu" and device.type != "cpu":
        raise InputError(
            f"{operation} backend 'cpu': CPU tensors expected, got {device}; say backend='reference'"
        )
    return backends[backend]


def check_shape(
    operation: str, name: str, tensor: Tensor, shape: tuple[int | None, ...], legend: str
) -> None:
    """Raises InputError unless the tensor has this shape; None stands for any size."""
    if tensor.dim() == len(shape) and all(
        w is None or w == g for w, g in zip(shape, tensor.shape, strict=True)
    ):
        return
    wanted = ", ".join("any" if w is None else str(w) for w in shape)
    raise InputError(f"{operation}: {name} {legend} = [{wanted}] expected, got {list(tensor.shape)}")


def check_same_kind(operation: str, **tensors: Tensor) -> None:
    """Raises InputError unless all tensors are of one floating dtype and on one device."""
    (first_name, first), *rest = tensors.items()
    if first.dtype not in FLOATS:
        raise InputError(f"{operation}: {first_name} of a floating dtype expected, got {first.dtype}")
    for name, tensor in rest:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise InputError(
                f"{operation}: {name} like {first_name} ({first.dtype} on {first.device}) expected, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def check_layout(operation: str, layout: PackedLayout, tokens: int) -> None:
    """Raises InputError unless the layout describes this many packed tokens."""
    if layout.positions.shape[0] != tokens:
        raise InputError(
            f"{operation}: as many queries as the layout has tokens ({layout.positions.shape[0]}) expected, "
            f"got {tokens}"
        )


def check_pages(operation: str, name: str, pages: Tensor, layout: PackedLayout) -> None:
    """Raises InputError unless pages of this tensor hold the layout's block_size rows each."""
    if pages.dim() < 3 or pages.shape[1] != layout.block_size:
        raise InputError(
            f"{operation}: {name} [S, {layout.block_size}, ...] expected (the layout's block_size), "
            f"got {list(pages.shape)}"
        )


def check_heads(operation: str, q: Tensor, k_pages: Tensor) -> None:
    """Raises InputError unless k_pages is [S, Bk, Hkv, D] with q's D and Hq is a multiple of Hkv."""
    check_shape(operation, "k_pages", k_pages, (None, None, None, q.shape[2]), "[S, Bk, Hkv, D]")
    groups = k_pages.shape[2]
    if q.shape[1] % groups:
        raise InputError(
            f"{operation}: query heads a multiple of the {groups} kv heads expected, got {q.shape[1]}"
        )
