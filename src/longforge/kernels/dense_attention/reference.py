"""Dense attention, readable: the specification. See api.py for the contract."""

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.prefixes import prefixes

__all__ = ["dense_attention"]


def dense_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    layout: PackedLayout,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [N, Hq, D], k_pages and v_pages [S, Bk, Hkv, D] -> out [N, Hq, D], lse [N, Hq]."""
    kv_heads = k_pages.shape[2]
    outs, lses = [q.new_zeros((0, *q.shape[1:]))], [q.new_zeros((0, q.shape[1]), dtype=torch.float32)]
    for path in prefixes(layout):
        seen = path.causal()  # [n, T]
        if window is not None:
            seen &= torch.arange(seen.shape[1], device=q.device) > path.positions[:, None] - window
        queries = _widened(q[path.rows]).unflatten(1, (kv_heads, -1))
        keys, values = _widened(path.keys(k_pages)), _widened(path.keys(v_pages))
        scores = torch.einsum("nghd,tgd->nght", queries, keys) * scale
        scores = scores.masked_fill(~seen[:, None, None, :], float("-inf"))
        outs.append(torch.einsum("nght,tgd->nghd", scores.softmax(-1), values).flatten(1, 2).to(q.dtype))
        lses.append(scores.detach().logsumexp(-1).flatten(1, 2).float())
    return torch.cat(outs), torch.cat(lses)


def _widened(x: Tensor) -> Tensor:
    """At least fp32: what half-precision inputs are computed in."""
    return x if x.dtype == torch.float64 else x.float()
