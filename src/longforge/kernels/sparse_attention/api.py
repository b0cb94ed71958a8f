"""The public door of block-sparse attention."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor

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
from longforge.kernels.layout import PackedLayout
from longforge.kernels.sparse_attention import cpu, operator, reference
from longforge.kernels.traced import is_traced

__all__ = ["BACKENDS", "sparse_attention"]


def _triton(*arguments: Any) -> Any:
    """Triton is imported with the first call."""
    from longforge.kernels.sparse_attention import triton_backend

    return triton_backend.sparse_attention(*arguments)


BACKENDS: dict[str, Callable[..., Any]] = {
    "reference": reference.sparse_attention,
    "cpu": cpu.sparse_attention,
}
if find_spec("triton") is not None:
    BACKENDS["triton"] = _triton


def _run(
    backend: str,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    blocks: Tensor,
    layout: PackedLayout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    with without_autocast(q.device):
        return BACKENDS[backend](q, k_pages, v_pages, blocks, layout, scale)


OPERATOR = operator.define(_run)


def sparse_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    blocks: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the visible tokens (position <= the query's) of the selected blocks (MSA paper, eq. 8).

    q        [N, Hq, D]; query heads g * G .. g * G + G - 1 share kv head (group) g
    k_pages  [S, Bk, Hkv, D], v_pages the same; rows after a query's position are never read for it
    blocks   int32 [N, Hkv, K], logical block ids of the query's path as `select_blocks` returns them: the own
             block is among them, -1 stands for none
    scale    default D ** -0.5
    Returns (out [N, Hq, D] in q's dtype, lse fp32 [N, Hq] = natural log of the sum of exp(scale q.k)).
    Gradients reach q, k_pages and v_pages (pages that several paths share get the sum); lse has none.
    torch.autocast changes nothing here: scores and sums are at least fp32. Under torch.compile the call is
    the operator torch.ops.longforge.sparse_attention; elsewhere it goes straight to the backend (see
    kernels/traced.py).
    Raises InputError for shapes, dtypes or devices that do not fit together, and for strides that the backend
    cannot take.
    """
    name = "sparse_attention"
    check_shape(name, "q", q, (None, None, None), "[N, Hq, D]")
    check_same_kind(name, q=q, k_pages=k_pages, v_pages=v_pages)
    chosen = backend_name(name, BACKENDS, backend, q.device, q.dtype)
    check_layout(name, layout, q.shape[0], q.device)
    check_pages(name, "k_pages", k_pages, layout)
    check_heads(name, q, k_pages)
    check_shape(name, "v_pages", v_pages, tuple(k_pages.shape), "like k_pages")
    check_blocks(name, blocks, q, k_pages.shape[2])
    check_strides(name, chosen, k_pages=k_pages, v_pages=v_pages)
    factor = float(q.shape[2] ** -0.5 if scale is None else scale)
    if is_traced(q):
        return OPERATOR(q, k_pages, v_pages, blocks, *layout.parts, factor, chosen)
    return _run(chosen, q, k_pages, v_pages, blocks, layout, factor)
