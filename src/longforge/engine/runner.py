"""Turns a step's work into one packed batch and runs the model on it."""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from longforge.engine.scheduler import Sequence, Work
from longforge.kernels.layout import PackedLayout
from longforge.model.cache import KVCache
from longforge.model.causal_lm import CausalLM

__all__ = ["Runner"]


class Runner:
    """The model, its pages and the page table. Rows of the table belong to running sequences."""

    def __init__(self, model: CausalLM, *, pages: int, max_running: int, context: int) -> None:
        self.model = model
        self.device = model.device
        self.block_size = model.config.block_size
        self.cache = KVCache(model.config, pages, model.device, model.dtype)
        self._page_table = np.full((max_running, -(-context // self.block_size)), -1, dtype=np.int32)

    def enter(self, sequence: Sequence) -> None:
        """Writes an admitted sequence's pages into its row."""
        row = self._page_table[sequence.row]
        row[:] = -1
        row[: len(sequence.pages)] = sequence.pages

    def run(self, work: Seq[Work]) -> Tensor:
        """Computes the work's tokens and fills their pages.

        Returns fp32 logits [B, V], a row per sampling work.
        """
        ids, layout, last_rows = self._pack(work)
        with torch.inference_mode():
            hidden = self.model.forward_packed(ids, layout, self.cache, expert_loads=False).hidden
            return self.model.logits(hidden[last_rows] if len(last_rows) < len(ids) else hidden)

    def _pack(self, work: Seq[Work]) -> tuple[Tensor, PackedLayout, Tensor]:
        """Ids int64 [N], their layout, and the packed row of each sampling work's last token."""
        sequences = [item.sequence for item in work]
        counts = np.array([item.tokens for item in work], dtype=np.int64)
        ends = counts.cumsum()
        starts = np.array([s.computed for s in sequences], dtype=np.int64)
        paths = np.arange(len(work), dtype=np.int64)
        positions = starts
        if ends[-1] != len(work):  # some work has more than one token
            paths = np.repeat(paths, counts)
            positions = np.arange(ends[-1]) + (starts - ends + counts)[paths]
        longest_blocks = int((starts + counts).max() - 1) // self.block_size + 1
        table = self._page_table[[s.row for s in sequences], :longest_blocks]
        slots = (
            table[paths, positions // self.block_size] * np.int64(self.block_size)
            + positions % self.block_size
        )
        layout = PackedLayout(
            self._tensor(positions),
            self._tensor(paths),
            self._tensor(slots),
            self._tensor(table),
            self.block_size,
        )
        last_rows = ends[[item.samples for item in work]] - 1
        return self._tensor(_ids(work)), layout, self._tensor(last_rows)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _ids(work: Seq[Work]) -> np.ndarray:
    if all(item.sequence.generated for item in work):
        return np.array([item.sequence.last_token for item in work], dtype=np.int64)
    return np.concatenate(
        [
            [s.last_token] if s.generated else s.prompt[s.computed : s.computed + item.tokens]
            for item in work
            for s in (item.sequence,)
        ]
    ).astype(np.int64, copy=False)
