"""Block selection as an operator. See ../traced.py."""

from collections.abc import Callable

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.select_blocks.low_precision import LowPrecisionKeys

__all__ = ["define", "define_certified"]


def define(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.ops.longforge.select_blocks over run(backend, index_q, index_k_pages, scales, layout, top_k)."""

    @torch.library.custom_op("longforge::select_blocks", mutates_args=())
    def select_blocks(
        index_q: Tensor,
        index_k_pages: Tensor,
        positions: Tensor,
        paths: Tensor,
        slots: Tensor,
        page_table: Tensor,
        block_size: int,
        top_k: int,
        backend: str,
        index_k_scales: Tensor | None = None,
    ) -> Tensor:
        layout = PackedLayout(positions, paths, slots, page_table, block_size)
        return run(backend, index_q, index_k_pages, index_k_scales, layout, top_k).contiguous()

    @select_blocks.register_fake
    def _(
        index_q, index_k_pages, positions, paths, slots, page_table, block_size, top_k, backend,
        index_k_scales=None,
    ):  # fmt: skip
        return index_q.new_empty((*index_q.shape[:2], top_k), dtype=torch.int32)

    return select_blocks


def define_certified(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """torch.ops.longforge.certified_select_blocks over run(backend, index_q, index_k_pages, low, layout,
    K)."""

    @torch.library.custom_op("longforge::certified_select_blocks", mutates_args=())
    def certified_select_blocks(
        index_q: Tensor,
        index_k_pages: Tensor,
        codes: Tensor,
        scales: Tensor,
        radius: Tensor,
        positions: Tensor,
        paths: Tensor,
        slots: Tensor,
        page_table: Tensor,
        block_size: int,
        top_k: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        layout = PackedLayout(positions, paths, slots, page_table, block_size)
        low = LowPrecisionKeys(codes, scales, radius)
        blocks, opened = run(backend, index_q, index_k_pages, low, layout, top_k)
        return blocks.contiguous(), opened.contiguous()

    @certified_select_blocks.register_fake
    def _(
        index_q, index_k_pages, codes, scales, radius, positions, paths, slots, page_table, block_size, top_k,
        backend,
    ):  # fmt: skip
        blocks = index_q.new_empty((*index_q.shape[:2], top_k), dtype=torch.int32)
        return blocks, index_q.new_empty(index_q.shape[:2], dtype=torch.int32)

    return certified_select_blocks
