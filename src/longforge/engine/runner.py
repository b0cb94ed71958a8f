"""Turns stretches of tokens into one packed batch and runs the model on it."""

from collections.abc import Sequence as Seq
from itertools import accumulate
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
from longforge.model.few_tokens import FewTokens, Heads

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
    ids: list[int]


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
        self._known_logits: tuple[Tensor, Seq[int], Tensor] | None = None
        """Hidden states that `run` returned last, places among them, and the logits there."""
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

    def run(
        self, stretches: Seq[Stretch], places: Seq[int] = (), blocks: list[Tensor] | None = None
    ) -> Tensor:
        """Computes the stretches and fills their pages.

        Returns hidden states [N, d]. places: ascending rows whose logits will be asked for. blocks: gets each
        sparse layer's selection, [N, Hkv, K].
        """
        self._known_logits = None
        if self._few is None or not _is_little(stretches):
            return self._run_model(self._pack(stretches), blocks)
        rows = self._rows(stretches)
        hidden, logits = self._few.step(rows, self._page_table, places)
        self._known_logits = hidden, places, logits
        if blocks is not None:
            blocks += [torch.from_numpy(layer[: len(hidden)].copy()) for layer in self._selected()]
        if self.cache.tail is not None:
            for row, slot in enumerate(rows[3]):  # seldom one of them: not worth gathering
                if (slot + 1) % self.block_size == 0:
                    self.cache.tail[slot // self.block_size].copy_(hidden[row])
        return hidden

    def _run_model(self, batch: Batch, blocks: list[Tensor] | None) -> Tensor:
        """The same by torch's operators, or by a graph of them, which keeps the tails itself."""
        with torch.inference_mode():
            if self._graphs is not None and blocks is None:
                known = self._graphs.step(batch)
                if known is not None:
                    self._known_logits = known[0], range(len(known[0])), known[1]
                    return known[0]
            ids, layout = self._moved(batch)
            hidden = self.model.forward_packed(
                ids, layout, self.cache, expert_loads=False, blocks=blocks
            ).hidden
        if self.cache.tail is not None:
            self._keep_tails(hidden, batch.slots)
        return hidden

    def logits_at(self, hidden: Tensor, places: Seq[int]) -> Tensor:
        """Logits fp32 [len(places), V] at ascending places of hidden [N, d]. Those of what `run` returned may
        be known already; they are valid until the model runs again."""
        if self._known_logits is not None:
            seen, known, logits = self._known_logits
            if seen is hidden and (known is places or list(known) == list(places)):
                return logits
        return self.logits(self.rows(hidden, places))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits fp32 [B, V] of hidden states [B, d]."""
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
        if self._few is not None and _is_little(stretches):
            ids, positions, paths, slots = map(np.array, self._rows(stretches))
            return self._few.mtp(0, before, ids, positions, paths, slots, self._page_table)
        batch = self._pack(stretches)
        with torch.inference_mode():
            drafted = None if self._graphs is None else self._graphs.draft(batch, before)
            if drafted is not None:
                return drafted
            ids, layout = self._moved(batch)
            before = before.to(self.model.dtype)
            return self.model.mtp_packed(before, ids, layout, cache=self.cache).hidden

    def guess(
        self, stretches: Seq[Stretch], before: Seq[Tensor], lengths: Seq[int]
    ) -> list[list[int]] | None:
        """What the first MTP module guesses behind each stretch: so many tokens, each the likeliest after
        those before. before: of each stretch, the hidden states of the positions before its tokens'. None
        where `run_drafts` has to do it pass by pass."""
        if self._few is None or not _is_little(stretches):
            return None
        self._known_logits = None  # the guesses' logits are written where these were
        later, passes = _later_guesses(stretches, lengths)
        given = self._few.guesses(before, self._rows([*stretches, *later]), self._page_table, passes)
        passes_of = [iter(tokens) for tokens in given]
        return [[next(tokens) for tokens in passes_of[:length]] for length in lengths]

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

    def _rows(self, stretches: Seq[Stretch]) -> tuple[list[int], list[int], list[int], list[int]]:
        """Ids, positions, rows of the page table, and slots. Lists are faster than numpy for the few tokens
        that a step decodes."""
        size = self.block_size
        ids, positions, paths, slots = list[int](), list[int](), list[int](), list[int]()
        for sequence, start, tokens in stretches:
            ids += tokens
            for position in range(start, start + len(tokens)):
                positions.append(position)
                paths.append(sequence.row)
                slots.append(sequence.pages[position // size] * size + position % size)
        return ids, positions, paths, slots

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
        ids = np.array([token for s in stretches for token in s.ids], dtype=np.int64)
        return Batch(ids, positions, paths, slots, table)

    def _pack_one(self, stretch: Stretch) -> Batch:
        """The same of one stretch, with less ado: a single answer waits for it at every token."""
        size, row = self.block_size, stretch.sequence.row
        end = stretch.start + len(stretch.ids)
        positions = np.arange(stretch.start, end)
        table = self._page_table[row : row + 1, : (end - 1) // size + 1]
        slots = table[0, positions // size] * np.int64(size) + positions % size
        return Batch(np.array(stretch.ids), positions, np.zeros(len(positions), np.int64), slots, table)

    def _moved(self, batch: Batch) -> tuple[Tensor, PackedLayout]:
        """Ids int64 [N] and their layout, on the device."""
        ids, positions, paths, slots, table = (to_device(part, self.device) for part in batch)
        return ids, PackedLayout(positions, paths, slots, table, self.block_size)


def _is_little(stretches: Seq[Stretch]) -> bool:
    """Whether a batch is one for the compiled step: few tokens, none of them far into a long prefix."""
    ends = max(s.start + len(s.ids) for s in stretches)
    return ends <= LONG and sum(len(s.ids) for s in stretches) <= FEW


def _later_guesses(stretches: Seq[Stretch], lengths: Seq[int]) -> tuple[list[Stretch], list[Heads]]:
    """The rows behind the first guesses, one for each further guess, and the passes that they make.

    A pass has a row for each stretch that wants a guess more; its token is the guess before it.
    """
    ends = [end - 1 for end in accumulate(len(s.ids) for s in stretches)]
    going = [(s, length, end) for s, length, end in zip(stretches, lengths, ends, strict=True) if length]
    count, later, passes = ends[-1] + 1, list[Stretch](), list[Heads]()
    for number in range(max(lengths)):
        heads, further = list[tuple[int, int]](), []
        for s, length, row in going:
            if length > number + 1:
                further.append((s, length, count + len(later)))
                later.append(Stretch(s.sequence, s.start + len(s.ids) + number, [0]))
            heads.append((row, further[-1][2] if length > number + 1 else -1))
        passes.append(Heads(count + len(later) - len(further), heads))
        going = further
    return later, passes or [Heads(count, [])]
