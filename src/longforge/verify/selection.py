"""Block selection of the backend in use, against its specification, on the model's own index keys."""

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout, as_pages
from longforge.kernels.prefixes import prefixes
from longforge.kernels.select_blocks import reference, select_blocks
from longforge.model.attention import SparseAttention
from longforge.verify.check import Check
from longforge.verify.subject import Subject

__all__ = ["selection_is_exact"]

MORE_BLOCKS = 4
"""Blocks beyond those that a query may select, so that it has to choose."""


def selection_is_exact(subject: Subject) -> Check:
    """Every query of a prompt and its last one alone, in each sparse layer."""
    name, config = "selection_is_exact", subject.model.config
    if not config.has("sparse"):
        return Check(name, True, "no sparse layer: nothing to compare")
    length = min((config.top_k_blocks + MORE_BLOCKS) * subject.block + 3, config.max_positions)
    layout = PackedLayout.from_lengths([length], subject.block, subject.model.device)
    last = _last(layout)
    queries = choosing = ties = 0
    for layer, (index_q, index_k) in _index_keys(subject, length, layout).items():
        pages = as_pages(index_k, layout)
        for q, where in ((index_q, layout), (index_q[-1:], last)):
            backend = subject.model.backend
            chosen = select_blocks(q, pages, where, config.top_k_blocks, backend=backend)
            expected = reference.select_blocks(q, pages, where, config.top_k_blocks)
            wrong = _wrong(subject, q, pages, where, chosen, expected)
            if wrong is not None and wrong[1] > wrong[2]:
                position = int(where.positions[wrong[0]])
                return Check(
                    name,
                    False,
                    f"layer {layer}, position {position}: other blocks, scores {wrong[1]:.1e} apart",
                )
            ties += wrong is not None
            queries += chosen.shape[0] * chosen.shape[1]
            choosing += int((where.positions // subject.block >= config.top_k_blocks).sum()) * chosen.shape[1]
    told = f"{queries} selections of {config.top_k_blocks} blocks equal, {choosing} of them leave blocks out"
    return Check(name, True, told + (f"; {ties} ties within rounding" if ties else ""))


def _last(layout: PackedLayout) -> PackedLayout:
    """The last token of a layout's one path alone, as in decoding."""
    return PackedLayout(
        layout.positions[-1:], layout.paths[-1:], layout.slots[-1:], layout.page_table, layout.block_size
    )


def _index_keys(subject: Subject, length: int, layout: PackedLayout) -> dict[int, tuple[Tensor, Tensor]]:
    """Index queries [N, Hkv, Di] and keys [N, Di] of each sparse layer over a seeded prompt."""
    model, kept = subject.model, dict[int, tuple[Tensor, Tensor]]()

    def keep(layer: torch.nn.Module, inputs: tuple) -> None:
        assert isinstance(layer, SparseAttention), "only such layers are watched"
        kept[layer.layer] = layer.project_index(*inputs)

    watched = [part for part in model.model.modules() if isinstance(part, SparseAttention)]
    handles = [part.register_forward_pre_hook(keep) for part in watched]
    try:
        with torch.inference_mode():
            ids = torch.tensor(subject.tokens(length, 51), device=model.device)
            model.forward_packed(ids, layout, expert_loads=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def _wrong(
    subject: Subject, q: Tensor, pages: Tensor, layout: PackedLayout, chosen: Tensor, expected: Tensor
) -> tuple[int, float, float] | None:
    """The row where the choice is worst, how much score it gives away, and how much rounding explains.

    None where all are equal. A CPU adds in the order of the definition: there rounding explains nothing.
    """
    rows = (chosen != expected).any(dim=-1).any(dim=-1).nonzero()[:, 0].tolist()
    if not rows:
        return None
    if subject.model.device.type == "cpu":
        return rows[0], torch.inf, 0.0
    (path,) = prefixes(layout)
    maxima = reference.visible_maxima(q[path.rows], pages, None, path, layout.block_size)
    worst = (rows[0], -1.0)
    for row in rows:
        for group in range(q.shape[1]):
            given, wanted = (set(one[row, group].tolist()) - {-1} for one in (chosen, expected))
            scores = maxima[row, group]
            best = max((float(scores[block]) for block in wanted - given), default=0.0)
            taken = min((float(scores[block]) for block in given - wanted), default=best)
            short = torch.inf if len(given) != len(wanted) else best - taken
            worst = max(worst, (row, short), key=lambda pair: pair[1])
    explained = 1e-5 * float(q.double().norm(dim=-1).max() * pages.double().norm(dim=-1).max())
    return worst[0], worst[1], explained
