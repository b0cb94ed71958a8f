"""Block selection as an operator. See ../traced.py."""

from collections.abc import Callable

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout

__all__ = ["define"]


def define(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.ops.longforge.select_blocks over run(backend, index_q, index_k_pages, layout, top_k)."""

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
    ) -> Tensor:
        layout = PackedLayout(positions, paths, slots, page_table, block_size)
        return run(backend, index_q, index_k_pages, layout, top_k).contiguous()

    @select_blocks.register_fake
    def _(index_q, index_k_pages, positions, paths, slots, page_table, block_size, top_k, backend):
        return index_q.new_empty((*index_q.shape[:2], top_k), dtype=torch.int32)

    return select_blocks
