"""Groups of episodes as packed micro-batches of loss edges: one sample per call.

A sample is a call's prompt and answer. Row r of a packed path predicts the id at r + 1, so the edges of a
call are the rows from its last prompt token to its last but one sampled token; the last sampled token is a
target only and is not fed. Weights make the sum over all edges of a batch the token mean; calls whose
advantage is zero are not computed, and their tokens still count in the mean.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longforge.forge.advantage import group_advantages
from longforge.kernels.layout import PackedLayout
from longforge.protocol import Call, Group
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
    def tokens(self) -> int:
        """Tokens that are fed."""
        return len(self.call.prompt_ids) + len(self.call.sampled_ids) - 1


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
    """Tokens of each sample."""
    edges: Edges
    advantages: Tensor
    """fp32 [E], of the episode each edge belongs to."""
    old_logprobs: Tensor
    """fp32 [E], under the weights that sampled the token."""
    versions: Tensor
    """int64 [E], version of those weights."""

    def layout(self, block_size: int) -> PackedLayout:
        """Each sample on pages of its own."""
        return PackedLayout.from_lengths(self.lengths, block_size)

    def sampled_mask(self) -> Tensor:
        """fp32 [N], 1 where a fed token was sampled by the policy."""
        mask = torch.zeros(len(self.ids))
        inner = self.edges.rows[self.edges.rows + 1 < len(self.ids)] + 1
        starts = torch.cumsum(torch.tensor((0, *self.lengths[:-1])), 0)
        mask[inner] = 1.0
        mask[starts] = 0.0
        return mask


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


def micro_batches(samples: Sequence[Sample], max_tokens: int) -> Iterator[MicroBatch]:
    """Packs samples in order of length, at most `max_tokens` together; a longer sample goes alone."""
    ordered = sorted(samples, key=lambda sample: (sample.tokens, sample.call.call_id))
    packed: list[Sample] = []
    filled = 0
    for sample in ordered:
        if packed and filled + sample.tokens > max_tokens:
            yield _pack(packed)
            packed, filled = [], 0
        packed.append(sample)
        filled += sample.tokens
    if packed:
        yield _pack(packed)


def _pack(samples: Sequence[Sample]) -> MicroBatch:
    ids: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    advantages: list[float] = []
    logprobs: list[float] = []
    versions: list[int] = []
    for sample in samples:
        call, n = sample.call, len(sample.call.sampled_ids)
        first = len(ids) + len(call.prompt_ids) - 1
        rows += range(first, first + n)
        ids += call.prompt_ids + call.sampled_ids[:-1]
        targets += call.sampled_ids
        weights += [sample.weight] * n
        advantages += [sample.advantage] * n
        logprobs += call.logprobs
        versions += call.versions
    return MicroBatch(
        ids=torch.tensor(ids),
        lengths=tuple(sample.tokens for sample in samples),
        edges=Edges(torch.tensor(rows), torch.tensor(targets), torch.tensor(weights)),
        advantages=torch.tensor(advantages),
        old_logprobs=torch.tensor(logprobs),
        versions=torch.tensor(versions),
    )
