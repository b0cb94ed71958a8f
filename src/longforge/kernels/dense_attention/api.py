"""The public door of dense attention."""

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.checks import check_layout, check_pages, check_same_kind, check_shape, choose_backend
from longforge.kernels.dense_attention import cpu, reference
from longforge.kernels.layout import PackedLayout

__all__ = ["BACKENDS", "dense_attention"]

BACKENDS = {"cpu": cpu.dense_attention, "reference": reference.dense_attention}


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
    Under torch.autocast inputs of several dtypes are taken in autocast's, as torch's own attention does.
    Raises InputError for shapes that do not fit together and for a window below 1.
    """
    name = "dense_attention"
    if torch.is_autocast_enabled(q.device.type) and not q.dtype == k_pages.dtype == v_pages.dtype:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k_pages, v_pages = q.to(dtype), k_pages.to(dtype), v_pages.to(dtype)
    check_shape(name, "q", q, (None, None, None), "[N, Hq, D]")
    check_same_kind(name, q=q, k_pages=k_pages, v_pages=v_pages)
    check_layout(name, layout, q.shape[0])
    check_pages(name, "k_pages", k_pages, layout)
    check_shape(name, "k_pages", k_pages, (None, None, None, q.shape[2]), "[S, Bk, Hkv, D]")
    check_shape(name, "v_pages", v_pages, tuple(k_pages.shape), "like k_pages")
    if q.shape[1] % k_pages.shape[2]:
        raise InputError(
            f"{name}: query heads a multiple of the {k_pages.shape[2]} kv heads expected, got {q.shape[1]}"
        )
    if window is not None and window < 1:
        raise InputError(f"{name}: window of at least 1 position expected (the query's own), got {window}")
    compute = choose_backend(name, BACKENDS, backend, q.device)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        return compute(q, k_pages, v_pages, layout, window, scale)
