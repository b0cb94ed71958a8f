"""The public door of block-sparse attention."""

from torch import Tensor

from longforge.kernels.checks import (
    check_heads,
    check_layout,
    check_pages,
    check_same_kind,
    check_shape,
    choose_backend,
)
from longforge.kernels.layout import PackedLayout
from longforge.kernels.sparse_attention import cpu, reference

__all__ = ["BACKENDS", "sparse_attention"]

BACKENDS = {"reference": reference.sparse_attention, "cpu": cpu.sparse_attention}


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
    Raises InputError for shapes that do not fit together.
    """
    name = "sparse_attention"
    check_shape(name, "q", q, (None, None, None), "[N, Hq, D]")
    check_same_kind(name, q=q, k_pages=k_pages, v_pages=v_pages)
    check_layout(name, layout, q.shape[0])
    check_pages(name, "k_pages", k_pages, layout)
    check_heads(name, q, k_pages)
    check_shape(name, "v_pages", v_pages, tuple(k_pages.shape), "like k_pages")
    check_shape(name, "blocks", blocks, (q.shape[0], k_pages.shape[2], None), "[N, Hkv, K]")
    compute = choose_backend(name, BACKENDS, backend, q.device)
    return compute(q, k_pages, v_pages, blocks, layout, q.shape[2] ** -0.5 if scale is None else scale)
