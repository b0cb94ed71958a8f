"""Lightning attention as two operators: one without states, with gradients; one that overwrites states, with
none. See ../traced.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.traced import gradients

__all__ = ["Operators", "define"]


class Operators(NamedTuple):
    """The two: torch.ops.longforge.lightning_attention and .lightning_attention_step."""

    whole: Callable[..., Tensor]
    """(q, k, v, slopes, positions, paths, slots, page_table, block_size, backend) -> out"""
    step: Callable[..., Tensor]
    """(q, k, v, slopes, states, positions, ...) -> out; writes into states."""


def define(run: Callable[..., Tensor]) -> Operators:
    """The operators over run(backend, q, k, v, slopes, layout, states or None)."""
    return Operators(_whole(run), _step(run))


def _whole(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @torch.library.custom_op("longforge::lightning_attention", mutates_args=())
    def lightning_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        positions: Tensor,
        paths: Tensor,
        slots: Tensor,
        page_table: Tensor,
        block_size: int,
        backend: str,
    ) -> Tensor:
        layout = PackedLayout(positions, paths, slots, page_table, block_size)
        return run(backend, q, k, v, slopes, layout, None).contiguous()

    @lightning_attention.register_fake
    def _(q, k, v, slopes, positions, paths, slots, page_table, block_size, backend):
        return q.new_empty(q.shape)

    @torch.library.custom_op("longforge::lightning_attention_backward", mutates_args=())
    def backward(
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        positions: Tensor,
        paths: Tensor,
        slots: Tensor,
        page_table: Tensor,
        block_size: int,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = PackedLayout(positions, paths, slots, page_table, block_size)

        def out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return run(backend, q, k, v, slopes, layout, None)

        d_q, d_k, d_v = gradients(out, (q, k, v), d_out)
        return d_q, d_k, d_v

    @backward.register_fake
    def _(d_out, q, k, v, slopes, positions, paths, slots, page_table, block_size, backend):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:8])
        ctx.rest = inputs[8:]

    def to_inputs(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(d_out, *ctx.saved_tensors, *ctx.rest), *[None] * 7

    lightning_attention.register_autograd(to_inputs, setup_context=keep)
    return lightning_attention


def _step(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @torch.library.custom_op("longforge::lightning_attention_step", mutates_args=("states",))
    def lightning_attention_step(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        states: Tensor,
        positions: Tensor,
        paths: Tensor,
        slots: Tensor,
        page_table: Tensor,
        block_size: int,
        backend: str,
    ) -> Tensor:
        layout = PackedLayout(positions, paths, slots, page_table, block_size)
        return run(backend, q, k, v, slopes, layout, states).contiguous()

    @lightning_attention_step.register_fake
    def _(q, k, v, slopes, states, positions, paths, slots, page_table, block_size, backend):
        return q.new_empty(q.shape)

    return lightning_attention_step
