"""Block selection against its specification, on the model's own index keys: that of the backend in use, and
that which an engine tells of its steps."""

import torch
from torch import Tensor

from longforge.engine import GenerationRequest
from longforge.kernels.layout import PackedLayout, as_pages
from longforge.kernels.prefixes import prefixes
from longforge.kernels.select_blocks import reference, select_blocks
from longforge.model.attention import SparseAttention
from longforge.verify.check import Check
from longforge.verify.drive import greedy, ids, run
from longforge.verify.subject import Subject

__all__ = ["selection_is_exact"]

MORE_BLOCKS = 4
"""Blocks beyond those that a query may select, so that it has to choose."""
ANSWER = 6
"""Tokens of which an engine tells what it selected: the first in the prompt's step, then one a step."""


def selection_is_exact(subject: Subject) -> Check:
    """Every query of a prompt and its last one alone, in each sparse layer; and those of an answer, as an
    engine computed it by whatever it computes few tokens with."""
    name, config = "selection_is_exact", subject.model.config
    if not config.has("sparse"):
        return Check(name, True, "no sparse layer: nothing to compare")
    length = min((config.top_k_blocks + MORE_BLOCKS) * subject.block + 3, config.max_positions)
    backend = _backend_selects(subject, subject.tokens(length, 51))
    if not backend.passed:
        return backend
    engine = _engine_selects(subject, subject.tokens(length - ANSWER, 52))
    return Check(
        name, engine.passed, f"{backend.detail}; {engine.detail}" if engine.passed else engine.detail
    )


def _backend_selects(subject: Subject, path: tuple[int, ...]) -> Check:
    """The operator, on index queries and keys of these tokens."""
    name, config = "selection_is_exact", subject.model.config
    layout = PackedLayout.from_lengths([len(path)], subject.block, subject.model.device)
    last = _last(layout, 1)
    queries = choosing = ties = 0
    for layer, (index_q, index_k) in _index_keys(subject, path, layout).items():
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


def _engine_selects(subject: Subject, prompt: tuple[int, ...]) -> Check:
    """How many groups of all layers selected each block for each token of an answer, as its events tell it.

    Compared with one pass of the model over the same tokens. An engine's steps may round otherwise, so a
    block whose score is within rounding of the last that is selected may be there or not.
    """
    name = "selection_is_exact"
    with subject.engine(pages=-(-(len(prompt) + ANSWER) // subject.block)) as engine:
        asked = GenerationRequest("told", prompt, greedy(ANSWER), report_blocks=True)
        events = run(engine, [asked])["told"]
    sure, possible, whole = _expected(subject, prompt + ids(events)[:-1], len(events))
    for place, event in enumerate(events):
        told = torch.zeros_like(sure[place])
        told[: len(event.blocks)] = torch.tensor(event.blocks)
        off = ((told < sure[place]) | (told > possible[place])).nonzero()[:, 0].tolist()
        if off or int(told.sum()) != int(whole[place]):
            blocks = f"{int(told.sum())} of {int(whole[place])} selections told, blocks {off} are others"
            return Check(name, False, f"engine, position {len(prompt) - 1 + place}: {blocks}")
    told = f"an engine's {int(whole.sum())} for {len(events)} tokens agree"
    return Check(name, True, f"{told}, {int(sure.sum())} of them beyond rounding")


def _expected(subject: Subject, path: tuple[int, ...], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the last `count` tokens: how many groups of all layers select each block for sure and may select it,
    int64 [count, blocks], and how many selections there are in all, int64 [count]."""
    top_k, rounding = subject.model.config.top_k_blocks, _rounding_of(subject.model.dtype)
    layout = PackedLayout.from_lengths([len(path)], subject.block, subject.model.device)
    last = _last(layout, count)
    each = torch.clamp(last.positions // subject.block + 1, max=top_k)
    sure = possible = torch.zeros(count, -(-len(path) // subject.block), dtype=torch.int64)
    whole = torch.zeros(count, dtype=torch.int64)
    for index_q, index_k in _index_keys(subject, path, layout).values():
        low, high = _bounds(index_q[-count:], as_pages(index_k, layout), last, top_k, rounding)
        sure, possible = sure + low.sum(1).cpu(), possible + high.sum(1).cpu()
        whole += (each * index_q.shape[1]).cpu()
    return sure, possible, whole


def _rounding_of(dtype: torch.dtype) -> float:
    """What two ways to compute one index score may differ by, as a share of the norms of query and key.

    The shipped model's steps of few tokens were seen off by 2 steps of bf16 at 1, after all its layers.
    """
    return max(4 * torch.finfo(dtype).eps, 2e-4)


def _bounds(
    index_q: Tensor, pages: Tensor, layout: PackedLayout, top_k: int, rounding: float
) -> tuple[Tensor, Tensor]:
    """What is selected for sure and what may be, where scores may be off by rounding: bool [N, Hkv, blocks].

    rounding: as a share of the norms of query and longest key.
    """
    (path,) = prefixes(layout)
    own = (path.positions // layout.block_size)[:, None, None]
    maxima = reference.visible_maxima(index_q[path.rows], pages, None, path, layout.block_size)
    numbers = torch.arange(maxima.shape[2], device=maxima.device)
    others = maxima.masked_fill(numbers >= own, -torch.inf)
    ranked = torch.nn.functional.pad(others.sort(dim=2, descending=True).values, (0, top_k), value=-torch.inf)
    # The worst that is selected beside the own block, and the best that is not.
    first_out = ranked[..., top_k - 1 : top_k]
    last_in = ranked[..., top_k - 2 : top_k - 1] if top_k > 1 else torch.full_like(first_out, torch.inf)
    # Two scores may approach each other from either side.
    near = (
        2 * rounding * index_q[path.rows].float().norm(dim=2, keepdim=True) * pages.float().norm(dim=-1).max()
    )
    before, is_own = others > -torch.inf, numbers == own
    return is_own | before & (others > first_out + near), is_own | before & (others >= last_in - near)


def _last(layout: PackedLayout, count: int) -> PackedLayout:
    """The last tokens of a layout's one path alone, as in decoding."""
    rows = slice(-count, None)
    return PackedLayout(
        layout.positions[rows], layout.paths[rows], layout.slots[rows], layout.page_table, layout.block_size
    )


def _index_keys(
    subject: Subject, path: tuple[int, ...], layout: PackedLayout
) -> dict[int, tuple[Tensor, Tensor]]:
    """Index queries [N, Hkv, Di] and keys [N, Di] of each sparse layer over these tokens."""
    model, kept = subject.model, dict[int, tuple[Tensor, Tensor]]()

    def keep(layer: torch.nn.Module, inputs: tuple) -> None:
        assert isinstance(layer, SparseAttention), "only such layers are watched"
        kept[layer.layer] = layer.project_index(*inputs)

    watched = [part for part in model.model.modules() if isinstance(part, SparseAttention)]
    handles = [part.register_forward_pre_hook(keep) for part in watched]
    try:
        with torch.inference_mode():
            model.forward_packed(torch.tensor(path, device=model.device), layout, expert_loads=False)
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
