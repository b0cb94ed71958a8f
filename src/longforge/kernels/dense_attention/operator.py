"""Dense attention as an operator. See ../traced.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.traced import gradients

__all__ = ["define"]


def define(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """torch.ops.longforge.dense_attention over run(backend, q, k_pages, v_pages, layout, window, scale)."""

    @torch.library.custom_op("longforge::dense_attention", mutates_args=())
    def dense_attention(
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        positions: Tensor,
        paths: Tensor,
        slots: Tensor,
        page_table: Tensor,
        block_size: int,
        window: int | None,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        layout = PackedLayout(positions, paths, slots, page_table, block_size)
        out, lse = run(backend, q, k_pages, v_pages, layout, window, scale)
        return out.contiguous(), lse.contiguous()

    @dense_attention.register_fake
    def _(q, k_pages, v_pages, positions, paths, slots, page_table, block_size, window, scale, backend):
        return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)

    @torch.library.custom_op("longforge::dense_attention_backward", mutates_args=())
    def backward(
        d_out: Tensor,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        positions: Tensor,
        paths: Tensor,
        slots: Tensor,
        page_table: Tensor,
        block_size: int,
        window: int | None,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = PackedLayout(positions, paths, slots, page_table, block_size)

        def out(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
            return run(backend, q, k_pages, v_pages, layout, window, scale)[0]

        d_q, d_k, d_v = gradients(out, (q, k_pages, v_pages), d_out)
        return d_q, d_k, d_v

    @backward.register_fake
    def _(
        d_out, q, k_pages, v_pages, positions, paths, slots, page_table, block_size, window, scale, backend
    ):
        return q.new_empty(q.shape), k_pages.new_empty(k_pages.shape), v_pages.new_empty(v_pages.shape)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.rest = inputs[7:]
        ctx.mark_non_differentiable(output[1])

    def to_inputs(ctx: Any, d_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return *backward(d_out, *ctx.saved_tensors, *ctx.rest), *[None] * 8

    dense_attention.register_autograd(to_inputs, setup_context=keep)
    return dense_attention
