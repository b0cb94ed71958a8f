"""Block selection, readable: the specification. See api.py for the contract."""

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.prefixes import prefixes

__all__ = ["select_blocks", "token_scores"]


def select_blocks(index_q: Tensor, index_k_pages: Tensor, layout: PackedLayout, top_k: int) -> Tensor:
    """index_q [N, Hkv, Di], index_k_pages [S, Bk, Di] -> int32 [N, Hkv, K]."""
    n, groups, _ = index_q.shape
    selected = torch.full((n, groups, top_k), -1, dtype=torch.int32, device=index_q.device)
    for path in prefixes(layout):
        scores = token_scores(index_q[path.rows], path.keys(index_k_pages))
        scores = scores.masked_fill(~path.causal()[:, None, :], float("-inf"))  # before the maximum
        own = path.positions // layout.block_size
        selected[path.rows] = best_blocks(block_maxima(scores, layout.block_size), own, top_k)
    return selected


def token_scores(index_q: Tensor, keys: Tensor) -> Tensor:
    """index_q [n, Hkv, Di], keys [T, Di] -> fp32 [n, Hkv, T], summed in ascending order of Di."""
    q, k = index_q.float(), keys.float()
    scores = q.new_zeros((*q.shape[:2], k.shape[0]))
    for d in range(q.shape[2]):
        scores = scores + q[:, :, d, None] * k[:, d]
    return scores


def block_maxima(scores: Tensor, block_size: int) -> Tensor:
    """scores [n, Hkv, T] -> [n, Hkv, blocks]; the last block may be short."""
    missing = -scores.shape[2] % block_size
    padded = torch.nn.functional.pad(scores, (0, missing), value=float("-inf"))
    return padded.unflatten(2, (-1, block_size)).amax(3)


def best_blocks(maxima: Tensor, own: Tensor, top_k: int) -> Tensor:
    """maxima [n, Hkv, blocks], own [n] -> int32 [n, Hkv, K]: the own block and the K - 1 best before it."""
    n, groups, blocks = maxima.shape
    own_ids = own[:, None, None].expand(n, groups, 1)
    others = maxima.scatter(2, own_ids, float("-inf"))
    # A stable descending sort keeps equal scores in block order: ties go to the lower id.
    values, ids = others.sort(dim=2, descending=True, stable=True)
    values, ids = values[..., : top_k - 1], ids[..., : top_k - 1]
    chosen = torch.cat([torch.where(values > float("-inf"), ids, blocks), own_ids], dim=2).sort(dim=2).values
    chosen = torch.where(chosen < blocks, chosen, -1)
    return torch.nn.functional.pad(chosen, (0, top_k - chosen.shape[2]), value=-1).int()
