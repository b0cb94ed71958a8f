"""Block selection, readable: the specification. See api.py for the contract."""

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.prefixes import Prefix, prefixes
from longforge.kernels.select_blocks.low_precision import LowPrecisionKeys

__all__ = ["certified_select_blocks", "select_blocks", "token_scores"]


def select_blocks(
    index_q: Tensor,
    index_k_pages: Tensor,
    layout: PackedLayout,
    top_k: int,
    index_k_scales: Tensor | None = None,
) -> Tensor:
    """index_q [N, Hkv, Di], index_k_pages [S, Bk, Di], index_k_scales [S, Bk] -> int32 [N, Hkv, K]."""
    n, groups, _ = index_q.shape
    selected = torch.full((n, groups, top_k), -1, dtype=torch.int32, device=index_q.device)
    for path in prefixes(layout):
        maxima = visible_maxima(index_q[path.rows], index_k_pages, index_k_scales, path, layout.block_size)
        own = path.positions // layout.block_size
        selected[path.rows] = best_blocks(maxima, own, top_k)
    return selected


def certified_select_blocks(
    index_q: Tensor, index_k_pages: Tensor, low: LowPrecisionKeys, layout: PackedLayout, top_k: int
) -> tuple[Tensor, Tensor]:
    """The selection where only blocks that can matter are looked at in full, and how many those are.

    Returns int32 [N, Hkv, K] and int32 [N, Hkv].
    """
    n, groups, _ = index_q.shape
    selected = torch.full((n, groups, top_k), -1, dtype=torch.int32, device=index_q.device)
    opened = torch.zeros((n, groups), dtype=torch.int32, device=index_q.device)
    for path in prefixes(layout):
        q, size = index_q[path.rows], layout.block_size
        own = path.positions // size
        scanned = visible_maxima(q, low.codes, low.scales, path, size)
        pages = path.key_rows[::size] // size
        # fp32 squares of small queries would be zeros.
        reach = low.radius[pages] * q.double().norm(dim=2, keepdim=True)
        before = torch.arange(scanned.shape[2], device=own.device) < own[:, None, None]
        lower = torch.where(before, scanned - reach, float("-inf"))
        # The K-1-th greatest lower bound. A block of the K-1 best has a score, hence an upper bound, of at
        # least that; with fewer blocks than K-1 all are opened.
        rank = min(top_k - 1, lower.shape[2])
        bar = (
            lower.topk(rank, dim=2).values[..., -1:]
            if rank
            else torch.full_like(lower[..., :1], float("inf"))
        )
        wanted = before & (scanned + reach >= bar)
        maxima = visible_maxima(q, index_k_pages, None, path, size)
        selected[path.rows] = best_blocks(torch.where(wanted, maxima, float("-inf")), own, top_k)
        opened[path.rows] = wanted.sum(2, dtype=torch.int32)
    return selected, opened


def visible_maxima(
    index_q: Tensor, pages: Tensor, scales: Tensor | None, path: Prefix, block_size: int
) -> Tensor:
    """index_q [n, Hkv, Di] of a path -> fp32 [n, Hkv, blocks]: each block's best score among visible
    tokens."""
    scores = token_scores(index_q, path.keys(pages))
    if scales is not None:
        scores = scores * path.keys(scales).float()
    scores = scores.masked_fill(~path.causal()[:, None, :], float("-inf"))  # before the maximum
    return block_maxima(scores, block_size)


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
