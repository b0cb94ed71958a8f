"""The grouped expert feed-forward as an operator. See ../traced.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longforge.kernels.traced import gradients

__all__ = ["define"]


def define(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.ops.longforge.grouped_experts over run(backend, x, gate_up, down, expert_ids, weights,
    activation, alpha, limit).

    `products` is autocast's dtype where autocast was on when the call was made, None where it was off: the
    operator may compute when that is long over.
    """

    @torch.library.custom_op("longforge::grouped_experts", mutates_args=())
    def grouped_experts(
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        activation: str,
        alpha: float,
        limit: float,
        products: torch.dtype | None,
        backend: str,
    ) -> Tensor:
        with torch.autocast(x.device.type, dtype=products, enabled=products is not None):
            return run(backend, x, gate_up, down, expert_ids, weights, activation, alpha, limit).contiguous()

    @grouped_experts.register_fake
    def _(x, gate_up, down, weights, expert_ids, activation, alpha, limit, products, backend):
        return x.new_empty(x.shape)

    @torch.library.custom_op("longforge::grouped_experts_backward", mutates_args=())
    def backward(
        d_out: Tensor,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        activation: str,
        alpha: float,
        limit: float,
        products: torch.dtype | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def out(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype=products, enabled=products is not None):
                return run(backend, x, gate_up, down, expert_ids, weights, activation, alpha, limit)

        d_x, d_gate_up, d_down, d_weights = gradients(out, (x, gate_up, down, weights), d_out)
        return d_x, d_gate_up, d_down, d_weights

    @backward.register_fake
    def _(d_out, x, gate_up, down, weights, expert_ids, activation, alpha, limit, products, backend):
        return tuple(t.new_empty(t.shape) for t in (x, gate_up, down, weights))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.rest = inputs[5:]

    def to_inputs(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(d_out, *ctx.saved_tensors, *ctx.rest), *[None] * 6

    grouped_experts.register_autograd(to_inputs, setup_context=keep)
    return grouped_experts
