"""Grouped experts with torch's grouped matrix product (torch.nn.functional.grouped_mm), under autograd.

The pairs are sorted as for the Triton kernels; the two products are torch's, what stands between them is
ordinary torch. On a GPU the product wants bf16; on a CPU it loops over the experts itself.
"""

from typing import Any

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.grouped_experts.activation import activate
from longforge.kernels.grouped_experts.order import product_dtype, sorted_by_expert

__all__ = ["grouped_experts"]

ALIGNMENT = 16
"""Bytes that rows of both operands have to be multiples of."""


def grouped_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    activation: str,
    alpha: float,
    limit: float,
) -> Tensor:
    """x [N, d], gate_up [E, 2I, d], down [E, d, I], expert_ids and weights [N, k] -> [N, d]. See api.py.

    Raises InputError for float64, on CUDA for anything but bf16, and for widths whose rows are not multiples
    of 16 bytes.
    """
    dtype = product_dtype(gate_up)
    _check(x, gate_up, down, dtype)
    tokens, choices = expert_ids.shape
    with torch.autocast(x.device.type, enabled=False):
        order = sorted_by_expert(expert_ids, gate_up.shape[0])
        used, ends = order.starts.diff() > 0, order.starts[1:]
        # Repeated before it is permuted: the backward pass then adds nothing in an order left to chance.
        rows = x.to(dtype)[:, None].expand(-1, choices, -1).reshape(-1, x.shape[1])
        rows = rows.index_select(0, order.pair)
        gate, up = _product(rows, gate_up.to(dtype), used, ends).float().chunk(2, 1)
        active = activate(gate, up, activation, alpha, limit).to(dtype)
        scales = weights.flatten().index_select(0, order.pair)
        y = _product(active, down.to(dtype), used, ends).float() * scales[:, None].float()
        parts = torch.empty_like(y).index_copy(0, order.pair, y)
        return parts.view(tokens, choices, x.shape[1]).sum(1).to(x.dtype)


def _product(rows: Tensor, weight: Tensor, used: Tensor, ends: Tensor) -> Tensor:
    """Each row [T, a] times its expert's weight [E, b, a]: [T, b]."""
    apply: Any = _Used.apply
    return torch.nn.functional.grouped_mm(rows, apply(weight, used).transpose(1, 2), offs=ends)


class _Used(torch.autograd.Function):
    """The weights as they are; experts without rows get zero gradients, whatever the product leaves there."""

    @staticmethod
    def forward(ctx, weight, used):
        ctx.save_for_backward(used)
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_weight):
        (used,) = ctx.saved_tensors
        return torch.where(used[:, None, None], d_weight, 0), None


def _check(x: Tensor, gate_up: Tensor, down: Tensor, dtype: torch.dtype) -> None:
    name = "grouped_experts backend 'torch'"
    kinds = (torch.bfloat16,) if x.is_cuda else (torch.float32, torch.bfloat16, torch.float16)
    if dtype not in kinds:
        raise InputError(f"{name}: {' or '.join(map(str, kinds))} on {x.device} expected, got {dtype}")
    per_row = ALIGNMENT // dtype.itemsize
    if gate_up.shape[2] % per_row or down.shape[2] % per_row:
        raise InputError(
            f"{name}: d and I multiples of {per_row} expected ({ALIGNMENT} bytes), got {gate_up.shape[2]} "
            f"and {down.shape[2]}; say backend='triton' or 'cpu'"
        )
