"""Block-sparse attention, readable: the specification. See api.py for the contract."""

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.prefixes import prefixes, visible_tokens

__all__ = ["head_scores", "sparse_attention"]


def sparse_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, blocks: Tensor, layout: PackedLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """q [N, Hq, D], k_pages and v_pages [S, Bk, Hkv, D], blocks [N, Hkv, K] -> out [N, Hq, D], lse [N,
    Hq]."""
    outs, lses = [q.new_zeros((0, *q.shape[1:]))], [q.new_zeros((0, q.shape[1]), dtype=torch.float32)]
    for path in prefixes(layout):
        mask = visible_tokens(path, blocks[path.rows], layout.block_size)
        scores = head_scores(q[path.rows], path.keys(k_pages), scale)
        scores = scores.masked_fill(~mask[:, :, None, :], float("-inf"))
        values = widened(path.keys(v_pages))
        out = torch.einsum("nght,tgd->nghd", scores.softmax(-1), values)
        outs.append(out.flatten(1, 2).to(q.dtype))
        lses.append(scores.detach().logsumexp(-1).flatten(1, 2).float())
    return torch.cat(outs), torch.cat(lses)


def head_scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """q [n, Hq, D], keys [T, Hkv, D] -> scale q.k [n, Hkv, G, T], in fp32 (fp64 for fp64)."""
    grouped = widened(q).unflatten(1, (keys.shape[1], -1))
    return torch.einsum("nghd,tgd->nght", grouped, widened(keys)) * scale


def widened(x: Tensor) -> Tensor:
    """At least fp32: what half-precision inputs are computed in."""
    return x if x.dtype == torch.float64 else x.float()
