"""How much of full attention's mass the selected blocks hold."""

import torch
from torch import Tensor

from longforge.kernels.checks import check_heads, check_layout, check_pages, check_same_kind, check_shape
from longforge.kernels.index_loss.reference import teacher_probabilities
from longforge.kernels.layout import PackedLayout
from longforge.kernels.prefixes import prefixes, visible_tokens

__all__ = ["selection_recall"]


@torch.no_grad()
def selection_recall(
    q: Tensor, k_pages: Tensor, blocks: Tensor, layout: PackedLayout, *, scale: float | None = None
) -> Tensor:
    """Mean, over tokens and heads, of the full causal softmax's mass that lies in the selected blocks.

    q [N, Hq, D], k_pages [S, Bk, Hkv, D], blocks int32 [N, Hkv, K], scale default D ** -0.5. Returns a
    float64 scalar in [0, 1] (the score recall of MSA paper fig. 3). It scores whole prefixes: a measurement,
    not a step of training. Raises InputError for shapes that do not fit together.
    """
    name = "selection_recall"
    check_shape(name, "q", q, (None, None, None), "[N, Hq, D]")
    check_same_kind(name, q=q, k_pages=k_pages)
    check_layout(name, layout, q.shape[0])
    check_pages(name, "k_pages", k_pages, layout)
    check_heads(name, q, k_pages)
    check_shape(name, "blocks", blocks, (q.shape[0], k_pages.shape[2], None), "[N, Hkv, K]")
    factor = float(q.shape[2] ** -0.5 if scale is None else scale)
    captured = torch.zeros((), dtype=torch.float64, device=q.device)
    for path in prefixes(layout):
        chosen = visible_tokens(path, blocks[path.rows], layout.block_size)
        full = teacher_probabilities(q[path.rows], path.keys(k_pages), path.causal()[:, None, :], factor)
        captured += full.double().masked_fill(~chosen, 0.0).sum()
    return captured / max(1, q.shape[0] * k_pages.shape[2])
