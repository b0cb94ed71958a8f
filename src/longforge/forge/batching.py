"""Groups of episodes as packed micro-batches of loss edges: one sample per call.

A sample is a call's prompt and answer. Row r of a packed path predicts the id at r + 1, so the edges of a
call are the rows from its last prompt token to its last but one sampled token; the last sampled token is a
target only and is not fed. Weights make the sum over all edges of a batch the token mean; calls whose
advantage is zero are not computed, and their tokens still count in the mean.

Calls of an episode begin with the calls before them, and episodes of a group with the same question. In a
micro-batch, whole pages of such common beginnings are computed once: samples are sorted by their ids, which
puts each behind the one that it shares most with, and reads that one's pages. CISPO and its gradient are
the same; edges that meet in one row add up there. The index loss and the routers' loads count a shared token
once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from longforge.forge.advantage import group_advantages
from longforge.kernels.layout import PackedLayout
from longforge.protocol import Call, Group
from longforge.training.data import shared_layout, shared_tokens
from longforge.training.losses import Edges

__all__ = ["Batch", "MicroBatch", "Sample", "make_batch", "micro_batches"]


@dataclass(frozen=True)
class Sample:
    """One call to train on."""

    call: Call
    advantage: float
    weight: float
    """Share of each of its sampled tokens in the mean."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens that are fed."""
        return self.call.prompt_ids + self.call.sampled_ids[:-1]


@dataclass(frozen=True)
class Batch:
    """A training step's samples, and what was counted on the way."""

    samples: tuple[Sample, ...]
    calls: int
    """All calls of the batch, those without advantage included."""
    sampled_tokens: int
    """Of all calls: the normaliser of the token mean."""


@dataclass(frozen=True)
class MicroBatch:
    """Packed samples. N fed tokens, E sampled tokens."""

    ids: Tensor
    """int64 [N]."""
    lengths: tuple[int, ...]
    """Tokens of each sample, those on pages of another one included."""
    layout: PackedLayout
    """A path for each sample."""
    edges: Edges
    advantages: Tensor
    """fp32 [E], of the episode each edge belongs to."""
    old_logprobs: Tensor
    """fp32 [E], under the weights that sampled the token."""
    versions: Tensor
    """int64 [E], version of those weights."""
    sampled: Tensor
    """fp32 [N], 1 where a fed token was sampled by the policy."""


def make_batch(
    groups: Sequence[Group], *, normalise: bool = False, mean_over: Literal["batch", "group"] = "batch"
) -> Batch:
    """Advantages of all episodes and the samples that carry one.

    mean_over: "batch" weighs every sampled token alike, "group" gives every group the same total weight.
    """
    sizes = [sum(len(c.sampled_ids) for e in group.episodes for c in e.calls) for group in groups]
    total = sum(sizes)
    samples: list[Sample] = []
    for group, size in zip(groups, sizes, strict=True):
        weight = 1.0 / (len(groups) * max(size, 1) if mean_over == "group" else max(total, 1))
        rewards = [episode.reward or 0.0 for episode in group.episodes]
        advantages = group_advantages(rewards, normalise=normalise)
        for episode, advantage in zip(group.episodes, advantages, strict=True):
            if advantage != 0.0:
                samples += [Sample(call, advantage, weight) for call in episode.calls]
    calls = sum(len(episode.calls) for group in groups for episode in group.episodes)
    return Batch(tuple(samples), calls, total)


def micro_batches(
    samples: Sequence[Sample], max_tokens: int, block_size: int, *, share: bool = True
) -> Iterator[MicroBatch]:
    """Packs samples in the order of their ids, at most `max_tokens` to compute; a longer sample goes alone.

    share: whether common beginnings are computed once, in whole pages.
    """
    packing = _Packing(block_size, share=share)
    for sample in sorted(samples, key=lambda sample: (sample.ids, sample.call.call_id)):
        if packing.filled and packing.filled + packing.cost(sample) > max_tokens:
            yield packing.micro_batch()
            packing = _Packing(block_size, share=share)
        packing.add(sample)
    if packing.filled:
        yield packing.micro_batch()


class _Packing:
    """A micro-batch that grows. Samples come in the order of their ids."""

    def __init__(self, block_size: int, *, share: bool) -> None:
        self._block_size = block_size
        self._share = share
        self._samples: list[Sample] = []
        self._heads: list[tuple[int, int]] = []
        """For each sample, whose first pages it reads, and how many tokens they hold."""
        self._rows: list[np.ndarray] = []
        """For each sample, the packed row of each of its tokens."""
        self.filled = 0
        """Tokens to compute so far."""

    def cost(self, sample: Sample) -> int:
        """Tokens that this sample would add."""
        return len(sample.ids) - self._shared(sample)

    def add(self, sample: Sample) -> None:
        shared = self._shared(sample)
        own = len(sample.ids) - shared
        before = self._rows[-1][:shared] if self._rows else np.zeros(0, dtype=np.int64)
        self._rows.append(np.concatenate([before, self.filled + np.arange(own)]))
        self._heads.append((len(self._samples) - 1, shared))
        self._samples.append(sample)
        self.filled += own

    def micro_batch(self) -> MicroBatch:
        ids = np.zeros(self.filled, dtype=np.int64)
        sampled = np.zeros(self.filled, dtype=np.float32)
        edge_rows = []
        for sample, rows in zip(self._samples, self._rows, strict=True):
            prompt = len(sample.call.prompt_ids)
            ids[rows] = sample.ids
            sampled[rows[prompt:]] = 1.0
            edge_rows.append(rows[prompt - 1 :])
        lengths = tuple(len(rows) for rows in self._rows)
        each = [(s, len(s.call.sampled_ids)) for s in self._samples]
        edges = Edges(
            torch.from_numpy(np.concatenate(edge_rows)),
            torch.tensor([token for s, _ in each for token in s.call.sampled_ids]),
            torch.tensor([weight for s, n in each for weight in [s.weight] * n]),
        )
        return MicroBatch(
            ids=torch.from_numpy(ids),
            lengths=lengths,
            layout=shared_layout(self._heads, lengths, self._block_size),
            edges=edges,
            advantages=torch.tensor([advantage for s, n in each for advantage in [s.advantage] * n]),
            old_logprobs=torch.tensor([logprob for s, _ in each for logprob in s.call.logprobs]),
            versions=torch.tensor([version for s, _ in each for version in s.call.versions]),
            sampled=torch.from_numpy(sampled),
        )

    def _shared(self, sample: Sample) -> int:
        """Tokens of the sample before whose pages this one reads."""
        if not (self._share and self._samples):
            return 0
        return shared_tokens(np.array(sample.ids), np.array(self._samples[-1].ids), self._block_size)
