"""Losses live on edges: (query row, target id, weight). A shifted sequence is the special case of one path.

Packed paths, prefix trees and multi-token prediction all build edges; one cross entropy reads them. Rows that
carry no weight never reach the output head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.model.causal_lm import PackedOutput

__all__ = [
    "Edges",
    "MtpLoss",
    "MtpModel",
    "cross_entropy",
    "mtp_loss",
    "next_token_edges",
    "predecessors",
    "thin_edges",
]


@dataclass(frozen=True)
class Edges:
    """E loss terms: hidden row `rows[e]` should predict `targets[e]`, counted `weights[e]` times."""

    rows: Tensor
    """int64 [E], row of the packed hidden states."""
    targets: Tensor
    """int64 [E], token id."""
    weights: Tensor
    """float32 [E], positive."""

    def __len__(self) -> int:
        return self.rows.numel()


class MtpModel(Protocol):
    """What the multi-token loss needs of a model."""

    def logits(self, hidden: Tensor) -> Tensor: ...

    def mtp_packed(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        layout: PackedLayout,
        module: int = 0,
        *,
        index_loss: bool = False,
    ) -> PackedOutput: ...


class MtpLoss(NamedTuple):
    """What the multi-token prediction modules give to train on."""

    loss: Tensor
    """Scalar: the mean over modules of their cross entropy."""
    index_loss: Tensor | None
    """Scalar: the sum over the modules' sparse layers."""
    expert_loads: list[Tensor]


def predecessors(layout: PackedLayout) -> Tensor:
    """int64 [N]: the row of the token before each token in its path, -1 where there is none.

    That row may belong to another path, where paths share their first pages.
    """
    rows = torch.arange(layout.positions.numel(), device=layout.positions.device)
    row_of_slot = rows.new_full((layout.pages * layout.block_size,), -1)
    row_of_slot[layout.slots] = rows
    before = (layout.positions - 1).clamp(min=0)
    page = layout.page_table[layout.paths, before // layout.block_size].to(torch.int64)
    found = row_of_slot[page * layout.block_size + before % layout.block_size]
    return torch.where(layout.positions > 0, found, -1)


def next_token_edges(ids: Tensor, layout: PackedLayout, token_weights: Tensor, *, ahead: int = 1) -> Edges:
    """Edges from each token to the one `ahead` places later in the same path.

    ids int64 [N], token_weights float [N]: how much it counts that this token is predicted. Edges of weight 0
    are left out, and so are tokens with no predecessor that far. All tokens stand in this layout: a token
    that several paths share has one row, and an edge to each of its successors.
    """
    assert ids.shape == token_weights.shape and ids.dim() == 1 and ahead >= 1, (
        ids.shape,
        token_weights.shape,
    )
    previous = predecessors(layout)
    targets = torch.where((token_weights > 0) & (previous >= 0))[0]
    rows = previous[targets]
    for _ in range(ahead - 1):
        targets, rows = targets[previous[rows] >= 0], previous[rows][previous[rows] >= 0]
    return Edges(rows, ids[targets], token_weights[targets].to(torch.float32))


def thin_edges(
    edges: Edges, *, below: float, share: float, generator: torch.Generator | None = None
) -> Edges:
    """Keeps each edge of weight < `below` with probability `share` and multiplies its weight by 1/share.

    The weighted sum keeps its expectation, and the output head computes fewer rows.
    """
    assert 0 < share <= 1, share
    if share == 1:
        return edges
    light = edges.weights < below
    drawn = torch.rand(len(edges), generator=generator).to(light.device) < share
    kept = ~light | drawn
    weights = torch.where(light, edges.weights / share, edges.weights)
    return Edges(edges.rows[kept], edges.targets[kept], weights[kept])


def cross_entropy(
    hidden: Tensor, edges: Edges, head: Callable[[Tensor], Tensor], *, normaliser: float | None = None
) -> Tensor:
    """Weighted mean of -log softmax(head(hidden[row]))[target] over the edges.

    hidden [N, d]; head maps [E, d] to logits [E, V]. `normaliser` is what the weighted sum is divided by, the
    sum of the weights by default. Without edges the loss is 0 and still differentiable.
    """
    if len(edges) == 0:
        return hidden.sum() * 0.0
    logits = head(hidden.index_select(0, edges.rows)).float()
    terms = F.cross_entropy(logits, edges.targets, reduction="none")
    total = edges.weights.sum() if normaliser is None else normaliser
    return (terms * edges.weights).sum() / total


def mtp_loss(
    model: MtpModel,
    hidden: Tensor,
    ids: Tensor,
    layout: PackedLayout,
    token_weights: Tensor,
    *,
    modules: int = 1,
) -> MtpLoss:
    """Loss of the multi-token prediction modules (M2 report, section 2.3).

    Module m sees the hidden state of token t and the true token t+m+1, and predicts token t+m+2. Detach
    `hidden` to keep the gradient out of the main model's layers; the shared embedding and head need
    `backward(inputs=...)`. Where paths share pages, the `modules` tokens after the last shared one must be
    the same in all of them (`training.data.pack` sees to that).
    """
    losses, index, loads = [], [], []
    for module in range(modules):
        output = model.mtp_packed(hidden, _shifted(ids, module + 1), layout, module, index_loss=True)
        hidden = output.hidden
        edges = next_token_edges(ids, layout, token_weights, ahead=module + 2)
        losses.append(cross_entropy(hidden, edges, model.logits))
        loads += output.expert_loads
        if output.index_loss is not None:
            index.append(output.index_loss)
    return MtpLoss(torch.stack(losses).mean(), torch.stack(index).sum() if index else None, loads)


def _shifted(ids: Tensor, by: int) -> Tensor:
    """ids [N] moved `by` places to the front; the tail repeats the last id (no edge reads those rows)."""
    return torch.cat([ids[by:], ids[-1:].expand(min(by, ids.numel()))])
