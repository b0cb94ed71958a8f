"""The index loss, readable: the specification. Its gradient is autograd's. See api.py for the contract."""

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.prefixes import Prefix, prefixes, visible_tokens

__all__ = ["index_loss", "teacher_probabilities"]


def index_loss(
    index_q: Tensor,
    index_k_pages: Tensor,
    q: Tensor,
    k_pages: Tensor,
    blocks: Tensor | None,
    layout: PackedLayout,
    scale: float,
    index_scale: float,
    weights: Tensor,
    lse: Tensor | None = None,
) -> Tensor:
    """index_q [N, Hkv, Di], index_k_pages [S, Bk, Di], q [N, Hq, D], k_pages [S, Bk, Hkv, D] -> scalar."""
    total = weights.new_zeros(())
    for path in prefixes(layout):
        support = token_support(path, blocks, layout.block_size)[:, : index_q.shape[1]]
        teacher = teacher_probabilities(q[path.rows], path.keys(k_pages), support, scale)
        student_q = index_q[path.rows].to(weights.dtype)
        student_k = path.keys(index_k_pages).to(weights.dtype)
        logits = torch.einsum("ngd,td->ngt", student_q, student_k) * index_scale
        # Outside the support a large finite value keeps 0 * log p at 0, where -inf would make it NaN.
        log_student = logits.masked_fill(~support, float("-inf")).log_softmax(-1).masked_fill(~support, 0.0)
        divergence = (torch.xlogy(teacher, teacher) - teacher * log_student).sum(-1)
        total = total + (divergence * weights[path.rows, None]).sum()
    divisor = weights.sum() * index_q.shape[1]
    return total / torch.where(divisor > 0, divisor, 1.0)


def token_support(path: Prefix, blocks: Tensor | None, block_size: int) -> Tensor:
    """bool [n, Hkv or 1, T]: which tokens the two distributions are over."""
    if blocks is None:
        return path.causal()[:, None, :]
    return visible_tokens(path, blocks[path.rows], block_size)


@torch.no_grad()
def teacher_probabilities(q: Tensor, keys: Tensor, support: Tensor, scale: float) -> Tensor:
    """q [n, Hq, D], keys [T, Hkv, D], support bool [n, Hkv or 1, T] -> [n, Hkv, T], the mean over a group's
    heads."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(wide).unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("nghd,tgd->nght", grouped, keys.to(wide)) * scale
    return scores.masked_fill(~support[:, :, None, :], float("-inf")).softmax(-1).mean(2)
