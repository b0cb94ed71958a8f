"""Small batches as CUDA graphs: decoding, the verification of drafts, and the passes of the draft module.

A batch is padded to a bucket: paths to 1, 2, 4 ... 64, rows to one for each path or to one and the most
drafts, the page table's width to a power of two. Each bucket has input buffers at fixed addresses. One copy
fills them, then the bucket's graph is replayed, which the first batch of the bucket has captured.

Padding rows belong to a path of their own, the last row of the table. All its blocks are one page that is
never handed out, so padding reads and writes nothing of others, and what comes out for it is cut off.

A capture records what the host decided. From shapes and numbers it may; what it decided from the values of
tensors would be wrong in a replay, or would wait for the device. Where a pass over a cache could do so:

    model.attention, `_all_selected`      reads positions; on a CPU alone
    kernels.layout, `PackedLayout.pages`  reads the page table; only without a cache
    dense attention                       the reference reads the layout; few queries on CUDA take
                                          "few_queries", which goes by the table's width
    select_blocks, `make_plan`            goes by rows, paths and the table's width
    sparse attention, `choose_order`      goes by rows and the table's entries
    grouped experts                       `_check_ids` reads ids on a CPU alone; order and tiles of pairs have
                                          room for the worst case. The reference (fp64) reads ids
    Lightning attention                   models with such layers run without graphs
    counts of expert loads                not asked for
    tails of full pages                   `keep_tails` finds on the device which rows end a page

The buffers of all graphs lie in one pool of memory. A graph's outputs are valid until its next replay.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longforge.engine.transfer import copy_into
from longforge.kernels.layout import PackedLayout
from longforge.model.cache import KVCache
from longforge.model.causal_lm import CausalLM

__all__ = ["Batch", "Bucket", "Capture", "DecodeGraphs", "Outputs", "bucket_of", "capture_for"]

Outputs = tuple[Tensor, ...]
Capture = Callable[[Callable[[], Outputs]], Callable[[], Outputs]]
"""Makes of a function over tensors at fixed addresses one that does the same again, faster. Its outputs may
be the same tensors each time."""

MOST_PATHS = 64
WARM_UPS = 2
"""Passes before a capture: kernels are compiled and libraries find their workspaces."""
ALIGNED = 16
"""Parts of a buffer begin at multiples of so many int64: kernels are compiled for aligned addresses."""


class Batch(NamedTuple):
    """A packed batch on the host, see `PackedLayout`."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    paths: NDArray[np.int64]
    slots: NDArray[np.int64]
    page_table: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes that a batch is padded to: paths (without the padding's), rows, width of the page table."""

    paths: int
    rows: int
    blocks: int


def bucket_of(batch: Batch, block_size: int, rows_per_path: int) -> Bucket | None:
    """The smallest bucket that holds a batch; None if there is none.

    rows_per_path: the most that a path has on average.
    """
    paths, blocks = batch.page_table.shape
    padded = _power_of_two(paths)
    rows = padded if len(batch.ids) <= padded else padded * rows_per_path
    if paths > MOST_PATHS or len(batch.ids) > rows:
        return None
    # The padding's path is as long as there are rows.
    return Bucket(padded, rows, _power_of_two(max(blocks, -(-rows // block_size))))


class DecodeGraphs:
    """The model's forward passes over small batches, from fixed buffers.

    scratch: the page of the cache that belongs to nobody. rows_per_path: 1 and the most drafts.
    """

    def __init__(
        self, model: CausalLM, cache: KVCache, *, scratch: int, rows_per_path: int, capture: Capture
    ) -> None:
        self._model = model
        self._cache = cache
        self._scratch = scratch
        self._rows_per_path = rows_per_path
        self._capture = capture
        self._steps: dict[Bucket, _Graph] = {}
        self._drafts: dict[Bucket, _Graph] = {}

    @property
    def captured(self) -> int:
        """Graphs there are."""
        return len(self._steps) + len(self._drafts)

    def step(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """(hidden states [N, d], logits fp32 [N, V]) of a batch, whose pages and tails it fills.

        None if it is too large. The logits are valid until the next call."""
        bucket = bucket_of(batch, self._cache.block_size, self._rows_per_path)
        if bucket is None:
            return None
        graph = self._steps.get(bucket) or self._steps.setdefault(bucket, self._graph(bucket))
        graph.inputs.fill(batch, self._scratch)
        hidden, logits = graph.run(self._capture, self._forward)
        # Hidden states are kept for the draft module, longer than the buffer stays as it is.
        return hidden[: len(batch.ids)].clone(), logits[: len(batch.ids)]

    def draft(self, batch: Batch, before: Tensor) -> Tensor | None:
        """The first MTP module's hidden states [N, d]; before [N, d]: those of the positions before. None if
        the batch is too large."""
        bucket = bucket_of(batch, self._cache.block_size, self._rows_per_path)
        if bucket is None:
            return None
        graph = self._drafts.get(bucket) or self._drafts.setdefault(bucket, self._graph(bucket))
        graph.inputs.fill(batch, self._scratch)
        graph.inputs.hidden[: len(before)].copy_(before)
        (hidden,) = graph.run(self._capture, self._draft)
        return hidden[: len(batch.ids)].clone()

    def warm_up(self, most_paths: int) -> None:
        """Captures the buckets of up to so many paths and short prefixes, on padding alone."""
        nothing = np.zeros(0, dtype=np.int64)
        batch = Batch(nothing, nothing, nothing, nothing, np.zeros((0, 0), dtype=np.int32))
        for bucket in _shortest(min(most_paths, MOST_PATHS), self._rows_per_path, self._cache.block_size):
            for graphs, function in ((self._steps, self._forward), (self._drafts, self._draft)):
                if bucket not in graphs and (graphs is self._steps or self._rows_per_path > 1):
                    graph = graphs[bucket] = self._graph(bucket)
                    graph.inputs.fill(batch, self._scratch)
                    graph.run(self._capture, function)

    def _graph(self, bucket: Bucket) -> "_Graph":
        return _Graph(_Inputs(bucket, self._model))

    def _forward(self, inputs: "_Inputs") -> Outputs:
        hidden = self._model.forward_packed(inputs.ids, inputs.layout, self._cache, expert_loads=False).hidden
        if self._cache.tail is not None:
            keep_tails(self._cache.tail, hidden, inputs.layout, self._scratch)
        return hidden, self._model.logits(hidden)

    def _draft(self, inputs: "_Inputs") -> Outputs:
        return (self._model.mtp_packed(inputs.hidden, inputs.ids, inputs.layout, cache=self._cache).hidden,)


def keep_tails(tail: Tensor, hidden: Tensor, layout: PackedLayout, scratch: int) -> None:
    """Writes the hidden state of each row that ends a page into tail [pages, d], the others' to `scratch`."""
    size = layout.block_size
    ends = layout.slots % size == size - 1
    tail.index_copy_(0, torch.where(ends, layout.slots // size, scratch), hidden)


class _Inputs:
    """The buffers of one bucket: parts of one tensor, so that one copy fills them."""

    def __init__(self, bucket: Bucket, model: CausalLM) -> None:
        self.bucket = bucket
        self._part = -(-bucket.rows // ALIGNED) * ALIGNED
        entries = (bucket.paths + 1) * bucket.blocks
        self._words = 4 * self._part + -(-entries // 2)
        self._all = torch.zeros(self._words, dtype=torch.int64, device=model.device)
        ids, positions, paths, slots = (self._rows(self._all, part) for part in range(4))
        table = self._all[4 * self._part :].view(torch.int32)[:entries].view(-1, bucket.blocks)
        self.ids = ids
        self.layout = PackedLayout(positions, paths, slots, table, model.config.block_size)
        self.hidden = torch.zeros(
            bucket.rows, model.config.hidden_size, dtype=model.dtype, device=model.device
        )
        """Of the positions before, for the draft module."""

    def fill(self, batch: Batch, scratch: int) -> None:
        """Copies a batch and its padding in."""
        words = np.zeros(self._words, dtype=np.int64)
        size, count = self.layout.block_size, len(batch.ids)
        padding = np.arange(self.bucket.rows - count)
        rows = [self._rows(words, part) for part in range(4)]
        for row, given in zip(rows, batch[:4], strict=True):
            row[:count] = given
        _, positions, paths, slots = (row[count:] for row in rows)
        positions[:] = padding
        paths[:] = self.bucket.paths
        slots[:] = scratch * size + padding % size
        table = words[4 * self._part :].view(np.int32)[: self.layout.page_table.numel()]
        table = table.reshape(-1, self.bucket.blocks)
        table[:-1] = -1
        table[-1] = scratch
        table[: len(batch.page_table), : batch.page_table.shape[1]] = batch.page_table
        copy_into(self._all, words)

    def _rows(self, words: Any, part: int) -> Any:
        return words[part * self._part : part * self._part + self.bucket.rows]


class _Graph:
    """One bucket's inputs, and what is run on them."""

    def __init__(self, inputs: _Inputs) -> None:
        self.inputs = inputs
        self._replay: Callable[[], Outputs] | None = None

    def run(self, capture: Capture, function: Callable[[_Inputs], Outputs]) -> Outputs:
        """The function's outputs for the inputs as they are; the first call captures it."""
        if self._replay is None:
            self._replay = capture(lambda: function(self.inputs))
        return self._replay()


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        # One for all captures: libraries keep a workspace for each stream.
        self._stream = torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Runs the function a few times and captures it."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    function()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Threads that copy pages to slower tiers may go on meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                outputs = function()
            self._pool = self._pool or graph.pool()

        def replay() -> Outputs:
            with torch.cuda.device(self._device):
                graph.replay()
            return outputs

        return replay


def capture_for(model: CausalLM, wanted: bool) -> Capture | None:
    """How this model's passes are captured; None where they are not.

    Not elsewhere than on CUDA, without Triton, in fp64, with Lightning layers, or where a backend is named.
    """
    fits = (
        wanted
        and model.device.type == "cuda"
        and model.dtype != torch.float64
        and not model.config.has("lightning")
        and model.backend is None
        and find_spec("triton") is not None
    )
    return CudaCapture(model.device) if fits else None


def _shortest(most_paths: int, rows_per_path: int, block_size: int) -> list[Bucket]:
    """The buckets of each number of paths and rows with the narrowest tables, largest first: the memory that
    their graphs take, the others use again."""
    buckets = list[Bucket]()
    paths = _power_of_two(most_paths)
    while paths:
        for rows in sorted({paths * rows_per_path, paths}, reverse=True):
            buckets.append(Bucket(paths, rows, _power_of_two(-(-rows // block_size))))
        paths //= 2
    return buckets


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
