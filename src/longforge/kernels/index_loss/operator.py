"""The index loss as an operator. See ../traced.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.traced import gradients

__all__ = ["define"]


def define(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.ops.longforge.index_loss over run(backend, index_q, index_k_pages, q, k_pages, blocks, layout,
    scale, index_scale, weights)."""

    @torch.library.custom_op("longforge::index_loss", mutates_args=())
    def index_loss(
        index_q: Tensor,
        index_k_pages: Tensor,
        q: Tensor,
        k_pages: Tensor,
        blocks: Tensor | None,
        weights: Tensor,
        positions: Tensor,
        paths: Tensor,
        slots: Tensor,
        page_table: Tensor,
        block_size: int,
        scale: float,
        index_scale: float,
        backend: str,
    ) -> Tensor:
        layout = PackedLayout(positions, paths, slots, page_table, block_size)
        return run(
            backend, index_q, index_k_pages, q, k_pages, blocks, layout, scale, index_scale, weights
        ).clone()

    @index_loss.register_fake
    def _(
        index_q,
        index_k_pages,
        q,
        k_pages,
        blocks,
        weights,
        positions,
        paths,
        slots,
        page_table,
        block_size,
        scale,
        index_scale,
        backend,
    ):
        return weights.new_empty(())

    @torch.library.custom_op("longforge::index_loss_backward", mutates_args=())
    def backward(
        d_loss: Tensor,
        index_q: Tensor,
        index_k_pages: Tensor,
        q: Tensor,
        k_pages: Tensor,
        blocks: Tensor | None,
        weights: Tensor,
        positions: Tensor,
        paths: Tensor,
        slots: Tensor,
        page_table: Tensor,
        block_size: int,
        scale: float,
        index_scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        layout = PackedLayout(positions, paths, slots, page_table, block_size)

        def loss(index_q: Tensor, index_k_pages: Tensor) -> Tensor:
            return run(
                backend, index_q, index_k_pages, q, k_pages, blocks, layout, scale, index_scale, weights
            )

        d_index_q, d_index_k = gradients(loss, (index_q, index_k_pages), d_loss)
        return d_index_q, d_index_k

    @backward.register_fake
    def _(
        d_loss,
        index_q,
        index_k_pages,
        q,
        k_pages,
        blocks,
        weights,
        positions,
        paths,
        slots,
        page_table,
        block_size,
        scale,
        index_scale,
        backend,
    ):
        return index_q.new_empty(index_q.shape), index_k_pages.new_empty(index_k_pages.shape)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:10])
        ctx.rest = inputs[10:]

    def to_inputs(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(d_loss, *ctx.saved_tensors, *ctx.rest), *[None] * 12

    index_loss.register_autograd(to_inputs, setup_context=keep)
    return index_loss
