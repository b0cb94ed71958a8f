"""Turns stretches of tokens into one packed batch and runs the model on it."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longforge.engine.sequence import Sequence
from longforge.kernels.layout import PackedLayout
from longforge.model.cache import KVCache
from longforge.model.causal_lm import CausalLM
from longforge.model.few_tokens import FewTokens

__all__ = ["Runner", "Stretch"]

FEW = 64
"""Tokens up to which a step counts as one of few tokens."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Adjacent tokens of one sequence that go through the model together."""

    sequence: Sequence
    start: int
    """Position of the first of them."""
    ids: NDArray[np.int64]


class _Packed(NamedTuple):
    """Stretches side by side: ids and, as in `PackedLayout`, positions, paths, slots and the page table."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    paths: NDArray[np.int64]
    slots: NDArray[np.int64]
    page_table: NDArray[np.int32]


class Runner:
    """The model, its pages and the page table. Rows of the table belong to running sequences."""

    def __init__(
        self, model: CausalLM, *, pages: int, max_running: int, context: int, drafts: bool = False
    ) -> None:
        self.model = model
        self.device = model.device
        self.block_size = model.config.block_size
        self.cache = KVCache(model.config, pages, model.device, model.dtype, drafts=drafts)
        self._few = FewTokens(model, self.cache, FEW) if FewTokens.supports(model) else None
        """What runs few tokens faster, where there is such a thing."""
        self._page_table = np.full((max_running, -(-context // self.block_size)), -1, dtype=np.int32)

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
        packed = self._pack(stretches)
        if self._few is not None and len(packed.ids) <= FEW:
            hidden = self._few.hidden(*packed)
            if blocks is not None:
                blocks += [torch.from_numpy(layer[: len(hidden)].copy()) for layer in self._selected()]
        else:
            with torch.inference_mode():
                hidden = self.model.forward_packed(
                    self._tensor(packed.ids),
                    self._layout(packed),
                    self.cache,
                    expert_loads=False,
                    blocks=blocks,
                ).hidden
        if self.cache.tail is not None:
            self._keep_tails(hidden, packed.slots)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits fp32 [B, V] of hidden states [B, d]."""
        if self._few is not None and len(hidden) <= FEW:
            return self._few.logits(hidden)
        with torch.inference_mode():
            return self.model.logits(hidden)

    def run_drafts(self, stretches: Seq[Stretch], before: Tensor) -> Tensor:
        """The first MTP module over tokens, each with the hidden state of the position before it: [N, d]."""
        packed = self._pack(stretches)
        if self._few is not None and len(packed.ids) <= FEW:
            return self._few.mtp(0, before, *packed)
        with torch.inference_mode():
            return self.model.mtp_packed(
                before.to(self.model.dtype), self._tensor(packed.ids), self._layout(packed), cache=self.cache
            ).hidden

    def weights_changed(self) -> None:
        """The model's weights are others now."""
        if self._few is not None:
            self._few.refresh()

    def _selected(self) -> NDArray[np.int32]:
        """int32 [sparse layers, tokens, Hkv, K] of the last few tokens; those of MTP modules stand last."""
        assert self._few is not None, "few tokens were run"
        return self._few.selected[: sum(layer.mixer == "sparse" for layer in self.model.config.layers)]

    def tail(self, page: int) -> Tensor:
        """Hidden state [1, d] of a page's last token."""
        assert self.cache.tail is not None, "tails are kept for drafts"
        return self.cache.tail[page : page + 1]

    def _keep_tails(self, hidden: Tensor, slots: NDArray[np.int64]) -> None:
        assert self.cache.tail is not None, "tails are kept for drafts"
        rows = np.flatnonzero(slots % self.block_size == self.block_size - 1)
        if len(rows):
            with torch.inference_mode():
                pages = self._tensor(slots[rows] // self.block_size)
                tails = hidden[self._tensor(rows)].to(self.cache.tail.dtype)
                self.cache.tail.index_copy_(0, pages, tails)

    def _pack(self, stretches: Seq[Stretch]) -> "_Packed":
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
        ids = stretches[0].ids if len(stretches) == 1 else np.concatenate([s.ids for s in stretches])
        return _Packed(ids, positions, paths, slots, table)

    def _layout(self, packed: "_Packed") -> PackedLayout:
        return PackedLayout(
            self._tensor(packed.positions),
            self._tensor(packed.paths),
            self._tensor(packed.slots),
            self._tensor(packed.page_table),
            self.block_size,
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)
