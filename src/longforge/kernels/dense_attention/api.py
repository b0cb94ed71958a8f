"""The public door of dense attention."""

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.checks import (
    backend_name,
    check_heads,
    check_layout,
    check_pages,
    check_same_kind,
    check_shape,
    check_strides,
    without_autocast,
)
from longforge.kernels.dense_attention import cpu, few_queries, operator, reference
from longforge.kernels.layout import PackedLayout
from longforge.kernels.traced import is_traced

__all__ = ["BACKENDS", "dense_attention"]

BACKENDS = {
    "cpu": cpu.dense_attention,
    "few_queries": few_queries.dense_attention,
    "reference": reference.dense_attention,
}


def _run(
    backend: str,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    layout: PackedLayout,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    with without_autocast(q.device):
        return BACKENDS[backend](q, k_pages, v_pages, layout, window, scale)


OPERATOR = operator.define(_run)


def dense_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    layout: PackedLayout,
    *,
    window: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention of each query over its path's prefix, grouped heads (Ainslie et al. 2023).

    q        [N, Hq, D]; query heads g * G .. g * G + G - 1 share kv head g
    k_pages  [S, Bk, Hkv, D], v_pages the same; rows after a path's last query are never read
    window   None: all positions up to the query's own; w: the last w of them, the query's own included
    scale    default D ** -0.5
    Returns (out [N, Hq, D] in q's dtype, lse fp32 [N, Hq] = natural log of the sum of exp(scale q.k)).
    Gradients reach q, k_pages and v_pages (pages that several paths share get the sum); lse has none.
    On CUDA a batch of few queries to a path goes to "few_queries", which never waits for the device; the
    reference, which takes the others, reads the layout on the host.
    Under torch.autocast inputs of several dtypes are taken in autocast's, as torch's own attention does.
    Under torch.compile the call is the operator torch.ops.longforge.dense_attention; elsewhere it goes
    straight to the backend (see kernels/traced.py).
    Raises InputError for shapes, dtypes or devices that do not fit together, for strides that the backend
    cannot take, and for a window below 1.
    """
    name = "dense_attention"
    if torch.is_autocast_enabled(q.device.type) and not q.dtype == k_pages.dtype == v_pages.dtype:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k_pages, v_pages = q.to(dtype), k_pages.to(dtype), v_pages.to(dtype)
    check_shape(name, "q", q, (None, None, None), "[N, Hq, D]")
    check_same_kind(name, q=q, k_pages=k_pages, v_pages=v_pages)
    chosen = backend_name(name, BACKENDS, backend, q.device, q.dtype)
    if backend is None and q.device.type == "cuda" and _is_decoding(q, layout):
        chosen = "few_queries"
    check_layout(name, layout, q.shape[0], q.device)
    check_pages(name, "k_pages", k_pages, layout)
    check_heads(name, q, k_pages)
    check_shape(name, "v_pages", v_pages, tuple(k_pages.shape), "like k_pages")
    if window is not None and window < 1:
        raise InputError(f"{name}: window of at least 1 position expected (the query's own), got {window}")
    check_strides(name, chosen, k_pages=k_pages, v_pages=v_pages)
    factor = float(q.shape[2] ** -0.5 if scale is None else scale)
    if is_traced(q):
        return OPERATOR(q, k_pages, v_pages, *layout.parts, window, factor, chosen)
    return _run(chosen, q, k_pages, v_pages, layout, window, factor)


def _is_decoding(q: Tensor, layout: PackedLayout) -> bool:
    return len(q) <= few_queries.MOST_QUERIES * len(layout.page_table)
