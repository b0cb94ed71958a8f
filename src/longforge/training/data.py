"""Samples and how they are packed into steps: real tokens only, no padding, common beginnings once.

A source gives sample number i for any i and always the same one, so the whole stream is a function of the
seed and a few counters, and a resumed run sees exactly the batches that an uninterrupted one would have seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout

__all__ = [
    "ASSISTANT",
    "Batch",
    "BatchStream",
    "Packer",
    "Sample",
    "Source",
    "pack",
    "shared_layout",
    "shared_tokens",
]


ASSISTANT = 0.5
"""Tokens of at least this weight were written by the assistant."""


@dataclass(frozen=True)
class Sample:
    """One sequence. `weights[i]` is how much the prediction of token i counts."""

    ids: np.ndarray
    """int64 [T]"""
    weights: np.ndarray
    """float32 [T]"""
    answer: tuple[int, int] = (0, 0)
    """Token range [start, stop) of the assistant's last turn; empty where there is none."""

    def __len__(self) -> int:
        return len(self.ids)


class Source(Protocol):
    """Numbered samples without end."""

    def sample(self, number: int) -> Sample: ...


@dataclass(frozen=True)
class Batch:
    """One step's tokens: N packed tokens of P paths."""

    ids: Tensor
    """int64 [N]"""
    weights: Tensor
    """float32 [N]"""
    layout: PackedLayout
    answers: tuple[tuple[int, int], ...]
    """Row ranges of each path's last assistant turn."""

    def to(self, device: torch.device | str) -> "Batch":
        moved = PackedLayout(
            self.layout.positions.to(device),
            self.layout.paths.to(device),
            self.layout.slots.to(device),
            self.layout.page_table.to(device),
            self.layout.block_size,
        )
        return Batch(self.ids.to(device), self.weights.to(device), moved, self.answers)


LOOKAHEAD = 4
"""Tokens behind a shared page that must be common too: MTP modules read ahead."""


class Packer:
    """Lays samples side by side, each a path of its own.

    Samples that begin alike share the whole pages of their common beginning with the first of them (only what
    no assistant wrote): a prompt that all conversations open with is computed once.
    """

    def __init__(self, block_size: int, *, share: bool = True) -> None:
        self._block_size = block_size
        self._share = share
        self._samples: list[Sample] = []
        self._heads: list[tuple[int, int]] = []
        """For each sample: which sample's first pages it uses, and how many tokens of them."""
        self._first_with: dict[bytes, int] = {}
        self.tokens = 0
        """Packed tokens so far."""

    def cost(self, sample: Sample) -> int:
        """Tokens that this sample would add."""
        return len(sample) - self._head(sample)[1]

    def add(self, sample: Sample) -> None:
        self._heads.append(self._head(sample))
        self._first_with.setdefault(self._opening(sample), len(self._samples))
        self._samples.append(sample)
        self.tokens += len(sample) - self._heads[-1][1]

    def batch(self) -> Batch:
        assert self._samples, "a batch has at least one sample"
        starts = np.array([shared for _, shared in self._heads])
        lengths = np.array([len(sample) for sample in self._samples])
        ends = np.cumsum(lengths - starts)
        rows = ends - lengths  # row of a sample's token 0, were it there
        return Batch(
            ids=torch.from_numpy(self._joined("ids")),
            weights=torch.from_numpy(self._joined("weights")),
            layout=shared_layout(self._heads, lengths, self._block_size),
            answers=tuple(
                (int(row) + sample.answer[0], int(row) + sample.answer[1])
                for row, sample in zip(rows, self._samples, strict=True)
            ),
        )

    def _joined(self, field: str) -> np.ndarray:
        parts = zip(self._samples, self._heads, strict=True)
        return np.concatenate([getattr(sample, field)[shared:] for sample, (_, shared) in parts])

    def _head(self, sample: Sample) -> tuple[int, int]:
        first = self._first_with.get(self._opening(sample)) if self._share else None
        if first is None:
            return len(self._samples), 0
        other = self._samples[first]
        spoken = np.flatnonzero(sample.weights >= ASSISTANT)
        most = min(len(sample), len(other), int(spoken[0]) if len(spoken) else len(sample))
        return first, shared_tokens(sample.ids[:most], other.ids[:most], self._block_size)

    def _opening(self, sample: Sample) -> bytes:
        return sample.ids[: self._block_size].tobytes()


def shared_tokens(ids: np.ndarray, others: np.ndarray, block_size: int) -> int:
    """Tokens on whole pages that both sequences begin with, the few tokens that follow them alike too."""
    most = min(len(ids), len(others))
    differing = np.flatnonzero(ids[:most] != others[:most])
    common = int(differing[0]) if len(differing) else most
    return max(common - LOOKAHEAD, 0) // block_size * block_size


def shared_layout(
    heads: Sequence[tuple[int, int]], lengths: Sequence[int] | np.ndarray, block_size: int
) -> PackedLayout:
    """The layout of paths that begin on pages of earlier paths; only their other tokens are packed.

    heads: for each path, which path's first pages it uses (any, where it uses none), and how many tokens
    those hold, a multiple of block_size below the path's length. lengths: whole tokens of each path.
    """
    size = block_size
    lengths, starts = np.asarray(lengths), np.array([shared for _, shared in heads])
    pages = -(-lengths // size)
    own = pages - starts // size
    first_page = np.cumsum(own) - own
    table = np.full((len(lengths), pages.max()), -1, dtype=np.int32)
    for path, (head, shared) in enumerate(heads):
        table[path, : shared // size] = table[head, : shared // size]
        table[path, shared // size : pages[path]] = first_page[path] + np.arange(own[path])
    counts = lengths - starts
    paths = np.repeat(np.arange(len(lengths)), counts)
    positions = np.arange(counts.sum()) - (np.cumsum(counts) - lengths)[paths]
    slots = table[paths, positions // size].astype(np.int64) * size + positions % size
    return PackedLayout(
        torch.from_numpy(positions),
        torch.from_numpy(paths),
        torch.from_numpy(slots),
        torch.from_numpy(table),
        size,
    )


def pack(samples: Sequence[Sample], block_size: int, *, share: bool = True) -> Batch:
    """All samples in one batch."""
    packer = Packer(block_size, share=share)
    for sample in samples:
        packer.add(sample)
    return packer.batch()


class BatchStream:
    """Draws samples from weighted sources and fills each batch with at most `tokens` packed tokens.

    A sample longer than `tokens` gets a batch of its own. `state()` and `load()` carry the counters over a
    restart.
    """

    def __init__(
        self,
        sources: Mapping[str, tuple[Source, float]],
        *,
        tokens: int,
        block_size: int,
        seed: int,
    ) -> None:
        if not sources or any(share < 0 for _, share in sources.values()):
            raise InputError("sources: expected at least one, each with a share of 0 or more")
        self._sources = {name: source for name, (source, share) in sources.items() if share > 0}
        shares = np.array([sources[name][1] for name in self._sources])
        self._bounds = np.cumsum(shares / shares.sum())
        self._tokens = tokens
        self._block_size = block_size
        self._seed = seed
        self._draws = 0
        self._taken = dict.fromkeys(self._sources, 0)

    def next(self) -> Batch:
        """The next batch."""
        packer = Packer(self._block_size)
        while True:
            name, sample = self._peek()
            if packer.tokens and packer.tokens + packer.cost(sample) > self._tokens:
                return packer.batch()
            packer.add(sample)
            self._draws += 1
            self._taken[name] += 1

    def state(self) -> dict[str, Any]:
        return {"draws": self._draws, "taken": dict(self._taken)}

    def load(self, state: Mapping[str, Any]) -> None:
        self._draws = int(state["draws"])
        self._taken = {name: int(state["taken"].get(name, 0)) for name in self._taken}

    def _peek(self) -> tuple[str, Sample]:
        """The sample that comes next, without taking it."""
        uniform = np.random.default_rng((self._seed, 1, self._draws)).random()
        name = list(self._sources)[min(int(np.searchsorted(self._bounds, uniform)), len(self._sources) - 1)]
        return name, self._sources[name].sample(self._taken[name])
