"""The public door of block selection."""

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.checks import (
    backend_name,
    check_layout,
    check_pages,
    check_same_kind,
    check_shape,
    check_strides,
)
from longforge.kernels.layout import PackedLayout
from longforge.kernels.select_blocks import cpu, operator, reference
from longforge.kernels.traced import is_traced

__all__ = ["BACKENDS", "select_blocks"]

BACKENDS = {"reference": reference.select_blocks, "cpu": cpu.select_blocks}


def _run(backend: str, index_q: Tensor, index_k_pages: Tensor, layout: PackedLayout, top_k: int) -> Tensor:
    return BACKENDS[backend](index_q, index_k_pages, layout, top_k)


OPERATOR = operator.define(_run)


@torch.no_grad()
def select_blocks(
    index_q: Tensor, index_k_pages: Tensor, layout: PackedLayout, top_k: int, *, backend: str | None = None
) -> Tensor:
    """Selects, per query token and GQA group, the top_k blocks of the query's path (MSA paper 3.1, eq. 5-7).

    A block's score is the maximum over its visible tokens (position <= the query's) of index_q . index_k. The
    query's own block always takes one of the slots; the others go to the best scores, ties to the lower block
    id. 1/sqrt(Di) does not change the ranking and is left out. The rule of arithmetic is part of the
    definition: inputs are rounded to fp32, products are rounded to fp32 and added in ascending order of the
    index dimension. So the choice does not depend on how tokens are packed or chunked, and both backends
    choose the same.

    index_q        [N, Hkv, Di]
    index_k_pages  [S, Bk, Di], one key shared by all groups
    top_k          K >= 1
    Returns int32 [N, Hkv, K], logical block ids, ascending, -1 at the end where there are fewer. No gradient.
    Under torch.compile the call is the operator torch.ops.longforge.select_blocks; elsewhere it goes straight
    to the backend (see kernels/traced.py).
    Raises InputError for shapes, dtypes or devices that do not fit together, and for strides that the backend
    cannot take.
    """
    name = "select_blocks"
    check_shape(name, "index_q", index_q, (None, None, None), "[N, Hkv, Di]")
    check_same_kind(name, index_q=index_q, index_k_pages=index_k_pages)
    check_layout(name, layout, index_q.shape[0], index_q.device)
    check_pages(name, "index_k_pages", index_k_pages, layout)
    check_shape(name, "index_k_pages", index_k_pages, (None, None, index_q.shape[2]), "[S, Bk, Di]")
    if top_k < 1:
        raise InputError(f"{name}: top_k of at least 1 expected (the query's own block), got {top_k}")
    chosen = backend_name(name, BACKENDS, backend, index_q.device, index_q.dtype)
    check_strides(name, chosen, index_k_pages=index_k_pages)
    index_q, index_k_pages = index_q.detach(), index_k_pages.detach()
    if is_traced(index_q):
        return OPERATOR(index_q, index_k_pages, *layout.parts, top_k, chosen)
    return _run(chosen, index_q, index_k_pages, layout, top_k)
