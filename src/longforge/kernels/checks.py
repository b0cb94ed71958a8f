"""What every operation's public door checks, and which backend computes it."""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout

__all__ = [
    "FLOATS",
    "backend_name",
    "check_blocks",
    "check_heads",
    "check_layout",
    "check_pages",
    "check_same_kind",
    "check_shape",
    "check_strides",
    "choose_backend",
    "without_autocast",
]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HOMES = {"cpu": "cpu", "triton": "cuda"}
"""The device that a backend's tensors have to be on; the reference takes any."""


def backend_name(
    operation: str,
    backends: Mapping[str, Callable[..., Any]],
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> str:
    """Which backend computes. None means the fast path of the tensors' device; a name never falls back.

    The fast path is "triton" on CUDA where the operation has it (not for fp64, which is there for checking),
    "cpu" on the CPU, "reference" elsewhere. With TRITON_INTERPRET=1 in the environment "triton" may be named
    for CPU tensors too.
    Raises InputError for an unknown name, and for a backend asked for with tensors that are elsewhere.
    """
    if backend is None:
        fast = "triton" if device.type == "cuda" and dtype != torch.float64 else "cpu"
        return fast if fast in backends and _HOMES[fast] == device.type else "reference"
    if backend not in backends:
        missing = "; triton is not installed" if backend == "triton" else ""
        raise InputError(
            f"{operation} backend: one of {', '.join(backends)} expected, got {backend!r}{missing}"
        )
    home = _HOMES.get(backend, device.type)
    if home != device.type and not (backend == "triton" and device.type == "cpu" and _interpreted()):
        raise InputError(
            f"{operation} backend {backend!r}: {home.upper()} tensors expected, got {device}; "
            "say backend='reference'"
        )
    return backend


def choose_backend(
    operation: str,
    backends: Mapping[str, Callable[..., Any]],
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Callable[..., Any]:
    """The function of the backend that `backend_name` names."""
    return backends[backend_name(operation, backends, backend, device, dtype)]


def _interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Arithmetic in the dtypes that an operation names, whatever autocast says.

    Entering torch.autocast takes microseconds, so it is entered only where autocast is on.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


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


def check_layout(
    operation: str, layout: PackedLayout, tokens: int, device: torch.device | None = None
) -> None:
    """Raises InputError unless the layout describes this many packed tokens, and is on the device if one is
    named."""
    if layout.positions.shape[0] != tokens:
        raise InputError(
            f"{operation}: as many queries as the layout has tokens ({layout.positions.shape[0]}) expected, "
            f"got {tokens}"
        )
    if device is None:
        return
    for name in ("positions", "page_table"):
        given = getattr(layout, name).device
        if given != device:
            raise InputError(f"{operation}: layout.{name} on {device} like the queries expected, got {given}")


def check_blocks(operation: str, blocks: Tensor, queries: Tensor, groups: int) -> None:
    """Raises InputError unless blocks is int32 or int64 [N, Hkv, K] on the queries' device."""
    check_shape(operation, "blocks", blocks, (queries.shape[0], groups, None), "[N, Hkv, K]")
    if blocks.dtype not in (torch.int32, torch.int64) or blocks.device != queries.device:
        raise InputError(
            f"{operation}: blocks in int32 on {queries.device} expected, got {blocks.dtype} on "
            f"{blocks.device}"
        )


def check_strides(operation: str, backend: str, **pools: Tensor) -> None:
    """Raises InputError for pages whose last dimension has gaps, where the backend would have to copy them.

    The Triton backends would, the whole pool at every step: a cost nobody asked for. The other dimensions may
    have any strides, so that a pool can be a view of a larger one. The other backends take everything.
    """
    if backend != "triton":
        return
    for name, pool in pools.items():
        if pool.stride(-1) != 1 and pool.shape[-1] > 1:
            raise InputError(
                f"{operation} backend 'triton': {name} with stride 1 in its last dimension expected, got "
                f"strides {list(pool.stride())}; call .contiguous()"
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
