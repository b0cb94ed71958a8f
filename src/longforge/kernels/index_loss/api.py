"""The public door of the index loss."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.checks import (
    backend_name,
    check_blocks,
    check_heads,
    check_layout,
    check_pages,
    check_same_kind,
    check_shape,
    check_strides,
    without_autocast,
)
from longforge.kernels.index_loss import cpu, operator, reference
from longforge.kernels.layout import PackedLayout
from longforge.kernels.traced import is_traced

__all__ = ["BACKENDS", "index_loss"]


def _triton(*arguments: Any) -> Any:
    """Triton is imported with the first call."""
    from longforge.kernels.index_loss import triton_backend

    return triton_backend.index_loss(*arguments)


BACKENDS: dict[str, Callable[..., Any]] = {"reference": reference.index_loss, "cpu": cpu.index_loss}
if find_spec("triton") is not None:
    BACKENDS["triton"] = _triton


def _run(
    backend: str,
    index_q: Tensor,
    index_k_pages: Tensor,
    q: Tensor,
    k_pages: Tensor,
    blocks: Tensor | None,
    layout: PackedLayout,
    scale: float,
    index_scale: float,
    weights: Tensor,
    lse: Tensor | None = None,
) -> Tensor:
    # On a GPU the check would wait for the device at every step.
    if weights.device.type == "cpu" and weights.numel() and not float(weights.min()) >= 0:
        raise InputError(f"index_loss: weights of at least 0 expected, got {float(weights.min())}")
    with without_autocast(q.device):
        return BACKENDS[backend](
            index_q, index_k_pages, q, k_pages, blocks, layout, scale, index_scale, weights, lse
        )


OPERATOR = operator.define(_run)


def index_loss(
    index_q: Tensor,
    index_k_pages: Tensor,
    q: Tensor,
    k_pages: Tensor,
    blocks: Tensor | None,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    index_scale: float | None = None,
    weights: Tensor | None = None,
    lse: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL(teacher || student) over the support, averaged over weighted tokens and groups (MSA paper eq. 9-11).

    Support: the visible tokens of the selected blocks; with blocks=None the whole prefix (warm-up). Student:
    softmax(index_scale index_q.index_k). Teacher: the arithmetic mean over the group's G query heads of
    softmax(scale q.k), each normalised on the support; a constant: no gradient reaches q or k_pages.

    index_q        [N, Hkv, Di]         index_k_pages  [S, Bk, Di]
    q              [N, Hq, D]           k_pages        [S, Bk, Hkv, D]
    blocks         int32 [N, Hkv, K] as `select_blocks` returns them, or None
    scale          default D ** -0.5    index_scale    default Di ** -0.5
    weights        [N] of at least 0, default 1: how often a token counts. The divisor is sum(weights) * Hkv;
                   with no weight at all the loss is 0.
    lse            fp32 [N, Hq], what attention over the same q, k_pages, support and scale returned: it saves
                   a backend that takes it (bf16 on a CPU) from computing it again; the others do not look
    Returns a scalar, fp32 (fp64 for fp64 inputs). torch.autocast changes nothing here. Under torch.compile
    the call is the operator torch.ops.longforge.index_loss; elsewhere it goes straight to the backend (see
    kernels/traced.py).
    Raises InputError for shapes, dtypes or devices that do not fit together, for strides that the backend
    cannot take, and for a weight below 0 (looked for on the CPU alone).
    """
    name = "index_loss"
    check_shape(name, "index_q", index_q, (q.shape[0], None, None), "[N, Hkv, Di]")
    check_shape(name, "q", q, (None, None, None), "[N, Hq, D]")
    check_same_kind(name, index_q=index_q, index_k_pages=index_k_pages, q=q, k_pages=k_pages)
    chosen = backend_name(name, BACKENDS, backend, q.device, q.dtype)
    check_layout(name, layout, q.shape[0], q.device)
    check_pages(name, "k_pages", k_pages, layout)
    check_heads(name, q, k_pages)
    groups = k_pages.shape[2]
    check_shape(name, "index_q", index_q, (None, groups, None), "[N, Hkv, Di]")
    wanted = (k_pages.shape[0], k_pages.shape[1], index_q.shape[2])
    check_shape(name, "index_k_pages", index_k_pages, wanted, "[S, Bk, Di]")
    if blocks is not None:
        check_blocks(name, blocks, q, groups)
    weights = _in_full(weights, q)
    if lse is not None:
        check_shape(name, "lse", lse, tuple(q.shape[:2]), "[N, Hq]")
        if not lse.is_floating_point() or lse.device != q.device:
            raise InputError(
                f"{name}: lse in float32 on {q.device} expected, got {lse.dtype} on {lse.device}"
            )
        lse = lse.detach()
    check_strides(name, chosen, index_k_pages=index_k_pages, k_pages=k_pages)
    q, k_pages = q.detach(), k_pages.detach()
    factor = float(q.shape[2] ** -0.5 if scale is None else scale)
    index_factor = float(index_q.shape[2] ** -0.5 if index_scale is None else index_scale)
    if is_traced(q):
        tensors = index_q, index_k_pages, q, k_pages, blocks, weights
        return OPERATOR(*tensors, *layout.parts, factor, index_factor, chosen)
    tensors = index_q, index_k_pages, q, k_pages, blocks
    return _run(chosen, *tensors, layout, factor, index_factor, weights, lse)


def _in_full(weights: Tensor | None, q: Tensor) -> Tensor:
    """[N] in the dtype of the computation."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if weights is None:
        return torch.ones(q.shape[0], dtype=dtype, device=q.device)
    check_shape("index_loss", "weights", weights, (q.shape[0],), "[N]")
    return weights.detach().to(device=q.device, dtype=dtype)
