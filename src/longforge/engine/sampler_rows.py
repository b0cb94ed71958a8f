"""What the sampler is asked: rows, and what their parameters do to single logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from longforge.engine.token_counts import TokenCounts
from longforge.protocol import SamplingParams

__all__ = ["LOW_32", "LOW_64", "Chosen", "Edits", "Row", "edits", "joined", "stacked_masks"]

LOW_32, LOW_64 = 2**32 - 1, 2**64 - 1
"""The bits of a seed that count."""


@dataclass(slots=True)
class Row:
    """One token to sample. Several rows may be of one request: row j of a chain assumes that its drafts
    0..j-1 were appended."""

    params: SamplingParams
    seed: int
    """Any integer; its low 64 bits count."""
    position: int
    """Of the sampled token in its sequence."""
    generated: int = 0
    """Tokens generated before this row, its drafts included."""
    counts: TokenCounts | None = None
    """The request's tokens before its drafts. Needed where `params.needs_counts`."""
    drafts: tuple[int, ...] = ()
    """The chain's drafts before this row."""
    mask: NDArray[np.uint32] | None = None
    """ceil(V / 32) words; token t is allowed if bit t % 32 of word t // 32 is set. None allows all."""


class Chosen(NamedTuple):
    """What was drawn, R of each."""

    tokens: list[int]
    """-1 for a row without a distribution; then its other numbers mean nothing."""
    logits: list[float]
    """The tokens' raw logits."""
    peaks: list[float]
    """The highest raw logit."""
    totals: list[int]
    """The sum of the row's weights (`fixed_weights`) of its raw logits."""


class Edits(NamedTuple):
    """How single logits of one row change, each array [E] for E distinct tokens.

    x becomes (x / repetition if x > 0 else x * repetition) - taken + added.
    """

    ids: NDArray[np.int64]
    repetition: NDArray[np.float64]
    taken: NDArray[np.float64]
    added: NDArray[np.float64]


def edits(row: Row, vocab: int) -> Edits | None:
    """Penalties, bias and `min_tokens` of one row; None where there are none."""
    params = row.params
    added = dict[int, float]()
    for token, bias in params.logit_bias:
        added[token] = added.get(token, 0.0) + bias
    if row.generated < params.min_tokens:
        added.update((token, -np.inf) for token in params.stop_token_ids if 0 <= token < vocab)
    if not params.needs_counts:
        return _added(added) if added else None
    assert row.counts is not None, "penalties need the request's counts"
    ids, generated = row.counts.arrays(row.drafts)
    taken = params.frequency_penalty * generated + params.presence_penalty * (generated > 0)
    repetition = np.full(len(ids), params.repetition_penalty)
    bias = np.zeros(len(ids))
    if added:
        bias[:] = [added.pop(token, 0.0) for token in ids.tolist()]
    if not added:
        return Edits(ids, repetition, taken, bias)
    return joined([Edits(ids, repetition, taken, bias), _added(added)])


def joined(changes: Sequence[Edits]) -> Edits:
    """The edits one after another."""
    ids, repetition, taken, added = zip(*changes, strict=True)
    return Edits(*map(np.concatenate, (ids, repetition, taken, added)))


def stacked_masks(rows: Sequence[Row], vocab: int) -> tuple[NDArray[np.uint32], list[int]]:
    """(the masks that rows have, uint32 [M, ceil(V / 32)]; each row's index into them, -1 without)."""
    masks, which = list[NDArray[np.uint32]](), list[int]()
    words = -(-vocab // 32)
    for row in rows:
        which.append(-1 if row.mask is None else len(masks))
        if row.mask is not None:
            assert row.mask.dtype == np.uint32 and row.mask.shape == (words,), "a mask of another vocabulary"
            masks.append(row.mask)
    return (np.stack(masks) if masks else np.zeros((0, words), dtype=np.uint32)), which


def _added(added: dict[int, float]) -> Edits:
    size = len(added)
    ids = np.fromiter(added.keys(), dtype=np.int64, count=size)
    values = np.fromiter(added.values(), dtype=np.float64, count=size)
    return Edits(ids, np.ones(size), np.zeros(size), values)
