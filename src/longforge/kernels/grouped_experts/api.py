"""The public door of the grouped expert feed-forward."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.checks import FLOATS, backend_name, check_same_kind, check_shape
from longforge.kernels.grouped_experts import cpu, operator, reference, torch_backend
from longforge.kernels.traced import is_traced

__all__ = ["BACKENDS", "Activation", "grouped_experts"]

Activation = Literal["silu", "swiglu_oai"]


def _triton(*arguments: Any) -> Any:
    """Triton is imported with the first call."""
    from longforge.kernels.grouped_experts import triton_backend

    return triton_backend.grouped_experts(*arguments)


BACKENDS: dict[str, Callable[..., Any]] = {
    "cpu": cpu.grouped_experts,
    "reference": reference.grouped_experts,
}
if hasattr(torch.nn.functional, "grouped_mm"):
    BACKENDS["torch"] = torch_backend.grouped_experts
if find_spec("triton") is not None:
    BACKENDS["triton"] = _triton


def _run(
    backend: str,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    activation: str,
    alpha: float,
    limit: float,
) -> Tensor:
    _check_ids(expert_ids, gate_up.shape[0])
    return BACKENDS[backend](x, gate_up, down, expert_ids, weights, activation, alpha, limit)


OPERATOR = operator.define(_run)


def grouped_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    *,
    activation: Activation,
    alpha: float = 1.702,
    limit: float = 7.0,
    backend: str | None = None,
) -> Tensor:
    """Sum over each token's experts of weight * down_e(act(gate_e x, up_e x)).

    x           [N, d]
    gate_up     [E, 2I, d], the I gate rows first, then the I up rows; down [E, d, I]
    expert_ids  int64 [N, k], values in 0..E-1; weights [N, k] float, as the router gives them
    activation  "silu": silu(gate) * up (Shazeer 2020, SwiGLU); "swiglu_oai": with gate = min(gate, limit) and
                up = clamp(up, -limit, limit), (up + 1) * gate * sigmoid(alpha * gate)
    Returns [N, d] in x's dtype. Gradients reach x, gate_up, down and weights; an expert without tokens gets
    zeros.
    Under torch.autocast the matrix products run in autocast's dtype; gradients keep each input's dtype.
    Under torch.compile the call is the operator torch.ops.longforge.grouped_experts; elsewhere it goes
    straight to the backend (see kernels/traced.py).
    Raises InputError for shapes, dtypes or devices that do not fit together, for an id outside 0..E-1 (looked
    for on the CPU alone), and for an unknown activation.
    """
    name = "grouped_experts"
    check_shape(name, "x", x, (None, None), "[N, d]")
    check_shape(name, "gate_up", gate_up, (None, None, x.shape[1]), "[E, 2I, d]")
    if gate_up.shape[1] % 2:
        raise InputError(f"{name}: gate_up with 2I rows (gate, then up) expected, got {gate_up.shape[1]}")
    check_shape(name, "down", down, (gate_up.shape[0], x.shape[1], gate_up.shape[1] // 2), "[E, d, I]")
    check_shape(name, "expert_ids", expert_ids, (x.shape[0], None), "[N, k]")
    check_shape(name, "weights", weights, tuple(expert_ids.shape), "like expert_ids")
    if torch.is_autocast_enabled(x.device.type):
        check_same_kind(name, gate_up=gate_up, down=down)
    else:
        check_same_kind(name, x=x, gate_up=gate_up, down=down)
    if weights.dtype not in FLOATS:
        raise InputError(f"{name}: weights of a floating dtype expected, got {weights.dtype}")
    if expert_ids.dtype != torch.int64:
        raise InputError(f"{name}: expert_ids in int64 expected, got {expert_ids.dtype}")
    if not x.device == gate_up.device == expert_ids.device == weights.device:
        raise InputError(
            f"{name}: gate_up, expert_ids and weights on {x.device} like x expected, got {gate_up.device}, "
            f"{expert_ids.device} and {weights.device}"
        )
    if activation not in ("silu", "swiglu_oai"):
        raise InputError(f"{name}: activation 'silu' or 'swiglu_oai' expected, got {activation!r}")
    chosen = backend_name(name, BACKENDS, backend, x.device, x.dtype)
    if is_traced(x):
        device = x.device.type
        products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return OPERATOR(x, gate_up, down, weights, expert_ids, activation, alpha, limit, products, chosen)
    return _run(chosen, x, gate_up, down, expert_ids, weights, activation, alpha, limit)


def _check_ids(expert_ids: Tensor, experts: int) -> None:
    # On a GPU the check would wait for the device, so there the indexing itself has to fail.
    if expert_ids.device.type != "cpu" or not expert_ids.numel():
        return
    low, high = (int(t) for t in torch.aminmax(expert_ids))
    if low < 0 or high >= experts:
        raise InputError(f"grouped_experts: expert_ids in 0..{experts - 1} expected, got {low}..{high}")
