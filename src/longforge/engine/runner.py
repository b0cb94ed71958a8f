"""Turns stretches of tokens into one packed batch and runs the model on it."""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longforge.engine.graphs import Batch, DecodeGraphs, capture_for
from longforge.engine.sequence import Sequence
from longforge.engine.transfer import to_device
from longforge.kernels.layout import PackedLayout
from longforge.model.cache import KVCache
from longforge.model.causal_lm import CausalLM
from longforge.model.few_tokens import FewTokens

__all__ = ["Runner", "Stretch"]

FEW = 64
"""Tokens up to which a step counts as one of few tokens."""

LONG = 131_072
"""Position from which on the operators' scans of the prefix win more than their starts cost."""


class Stretch(NamedTuple):
    """Adjacent tokens of one sequence that go through the model together."""

    sequence: Sequence
    start: int
    """Position of the first of them."""
    ids: NDArray[np.int64]


class Runner:
    """The model, its pages and the page table. Rows of the table belong to running sequences.

    drafts: the most that are verified with a token. cuda_graphs: whether small batches become CUDA graphs,
    where the model allows it; the cache then has one page more, for padding.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        pages: int,
        max_running: int,
        context: int,
        drafts: int = 0,
        cuda_graphs: bool = True,
    ) -> None:
        self.model = model
        self.device = model.device
        self.block_size = model.config.block_size
        capture = capture_for(model, cuda_graphs)
        held = pages if capture is None else pages + 1
        self.cache = KVCache(model.config, held, model.device, model.dtype, drafts=drafts > 0)
        self._graphs: DecodeGraphs | None = None
        if capture is not None:
            self._graphs = DecodeGraphs(
                model, self.cache, scratch=pages, rows_per_path=1 + drafts, capture=capture
            )
        self._known_logits: tuple[Tensor, Tensor] | None = None
        compiled = capture is None and FewTokens.supports(model)
        self._few = FewTokens(model, self.cache, FEW) if compiled else None
        """What runs few tokens faster on a CPU."""
        self._page_table = np.full((max_running, -(-context // self.block_size)), -1, dtype=np.int32)

    def warm_up(self) -> None:
        """Captures graphs of short prefixes ahead of time, where there are graphs."""
        if self._graphs is not None:
            with torch.inference_mode():
                self._graphs.warm_up(len(self._page_table))

    def show_pages(self, sequence: Sequence, known: int) -> int:
        """Writes a sequence's pages behind the first `known` into its row. Returns how many it has."""
        count = len(sequence.pages)
        if count > known:
            self._page_table[sequence.row, known:count] = sequence.pages[known:]
        return count

    def replace_pages(self, sequence: Sequence, blocks: Seq[int]) -> None:
        """Writes the pages of some blocks of a sequence anew."""
        for block in blocks:
            self._page_table[sequence.row, block] = sequence.pages[block]

    def run(self, stretches: Seq[Stretch], blocks: list[Tensor] | None = None) -> Tensor:
        """Computes the stretches and fills their pages.

        Returns hidden states [N, d]. blocks: gets each sparse layer's selection, [N, Hkv, K].
        """
        batch = self._pack(stretches)
        if self._few is not None and _is_little(batch):
            hidden = self._few.hidden(*batch)
            if blocks is not None:
                blocks += [torch.from_numpy(layer[: len(hidden)].copy()) for layer in self._selected()]
        else:
            hidden = self._run_model(batch, blocks)
            if self._known_logits is not None:
                return hidden
        if self.cache.tail is not None:
            self._keep_tails(hidden, batch.slots)
        return hidden

    def _run_model(self, batch: Batch, blocks: list[Tensor] | None) -> Tensor:
        """The same by torch's operators, or by a graph of them, which has kept the tails as well."""
        self._known_logits = None
        with torch.inference_mode():
            if self._graphs is not None and blocks is None:
                self._known_logits = self._graphs.step(batch)
                if self._known_logits is not None:
                    return self._known_logits[0]
            ids, layout = self._moved(batch)
            return self.model.forward_packed(
                ids, layout, self.cache, expert_loads=False, blocks=blocks
            ).hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits fp32 [B, V] of hidden states [B, d]. Those of what `run` returned last may be known already;
        they are valid until it runs again."""
        if self._known_logits is not None and hidden is self._known_logits[0]:
            return self._known_logits[1]
        if self._few is not None and len(hidden) <= FEW:
            return self._few.logits(hidden)
        with torch.inference_mode():
            return self.model.logits(hidden)

    def likeliest(self, hidden: Tensor) -> list[int]:
        """The token of the highest logit for each row of hidden [B, d]; ties to the lower id."""
        if self._few is not None and len(hidden) <= FEW:
            return self._few.likeliest(hidden)
        return self.logits(hidden).argmax(dim=-1).tolist()

    def run_drafts(self, stretches: Seq[Stretch], before: Tensor) -> Tensor:
        """The first MTP module over tokens, each with the hidden state of the position before it: [N, d]."""
        batch = self._pack(stretches)
        if self._few is not None and _is_little(batch):
            return self._few.mtp(0, before, *batch)
        with torch.inference_mode():
            drafted = None if self._graphs is None else self._graphs.draft(batch, before)
            if drafted is not None:
                return drafted
            ids, layout = self._moved(batch)
            before = before.to(self.model.dtype)
            return self.model.mtp_packed(before, ids, layout, cache=self.cache).hidden

    def weights_changed(self) -> None:
        """The model's weights are others now."""
        if self._few is not None:
            self._few.refresh()

    def _selected(self) -> NDArray[np.int32]:
        """int32 [sparse layers, tokens, Hkv, K] of the last few tokens; those of MTP modules stand last."""
        assert self._few is not None, "few tokens were run"
        return self._few.selected[: sum(layer.mixer == "sparse" for layer in self.model.config.layers)]

    def rows(self, hidden: Tensor, places: Seq[int]) -> Tensor:
        """Rows of hidden [N, d] at ascending places: [len(places), d]."""
        if len(places) == places[-1] - places[0] + 1:
            return hidden[places[0] : places[-1] + 1] if len(places) < len(hidden) else hidden
        with torch.inference_mode():
            return hidden.index_select(0, to_device(np.array(places, dtype=np.int64), self.device))

    def tail(self, page: int) -> Tensor:
        """Hidden state [1, d] of a page's last token."""
        assert self.cache.tail is not None, "tails are kept for drafts"
        return self.cache.tail[page : page + 1]

    def _keep_tails(self, hidden: Tensor, slots: NDArray[np.int64]) -> None:
        assert self.cache.tail is not None, "tails are kept for drafts"
        ends = slots % self.block_size == self.block_size - 1
        if ends.any():
            with torch.inference_mode():
                rows = to_device(np.flatnonzero(ends), self.device)
                pages = to_device(slots[ends] // self.block_size, self.device)
                tails = hidden.index_select(0, rows).to(self.cache.tail.dtype)
                self.cache.tail.index_copy_(0, pages, tails)

    def _pack(self, stretches: Seq[Stretch]) -> Batch:
        """Ids and their layout, on the host."""
        if len(stretches) == 1:
            return self._pack_one(stretches[0])
        counts = np.array([len(s.ids) for s in stretches], dtype=np.int64)
        starts = np.array([s.start for s in stretches], dtype=np.int64)
        ends = counts.cumsum()
        paths = np.arange(len(stretches), dtype=np.int64)
        positions = starts
        if ends[-1] != len(stretches):  # some stretch has more than one token
            paths = np.repeat(paths, counts)
            positions = np.arange(ends[-1]) + (starts - ends + counts)[paths]
        longest_blocks = int((starts + counts).max() - 1) // self.block_size + 1
        table = self._page_table[[s.sequence.row for s in stretches], :longest_blocks]
        slots = (
            table[paths, positions // self.block_size] * np.int64(self.block_size)
            + positions % self.block_size
        )
        return Batch(np.concatenate([s.ids for s in stretches]), positions, paths, slots, table)

    def _pack_one(self, stretch: Stretch) -> Batch:
        """The same of one stretch, with less ado: a single answer waits for it at every token."""
        size, row = self.block_size, stretch.sequence.row
        end = stretch.start + len(stretch.ids)
        positions = np.arange(stretch.start, end)
        table = self._page_table[row : row + 1, : (end - 1) // size + 1]
        slots = table[0, positions // size] * np.int64(size) + positions % size
        return Batch(stretch.ids, positions, np.zeros(len(positions), np.int64), slots, table)

    def _moved(self, batch: Batch) -> tuple[Tensor, PackedLayout]:
        """Ids int64 [N] and their layout, on the device."""
        ids, positions, paths, slots, table = (to_device(part, self.device) for part in batch)
        return ids, PackedLayout(positions, paths, slots, table, self.block_size)


def _is_little(batch: Batch) -> bool:
    """Whether a batch is one for the compiled step: few tokens, none of them far into a long prefix."""
    return len(batch.ids) <= FEW and int(batch.positions.max()) < LONG
