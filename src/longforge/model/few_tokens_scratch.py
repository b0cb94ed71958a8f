"""Memory that steps of few tokens write to and nobody reads afterwards: the same for every step, it grows."""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longforge.kernels.few_tokens.attention import CHUNK, SPANS
from longforge.kernels.few_tokens.orders import Pass
from longforge.kernels.few_tokens.rooms import pad
from longforge.kernels.few_tokens.step import PHASES_OF_LAYER, PHASES_OF_PASS
from longforge.model.config import ModelConfig

__all__ = ["Scratch", "Sizes", "sizes_of"]


class Sizes(NamedTuple):
    """Of a model, as every step needs them."""

    hidden: int
    padded: int
    """hidden in whole vectors."""
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    ranked_from: int
    """Blocks up to which nothing is ranked."""


def sizes_of(c: ModelConfig) -> Sizes:
    """Of this configuration."""
    ranked_from = c.top_k_blocks if c.has("sparse") else sys.maxsize
    return Sizes(
        c.hidden_size,
        pad(c.hidden_size),
        c.vocab_size,
        c.heads,
        c.kv_heads,
        c.head_dim,
        c.block_size,
        ranked_from,
    )


class Scratch:
    """The arrays that `kernels.few_tokens.step` wants beside its rooms."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._maxima = self._parts = self._held = np.empty(0, np.float32)
        none = np.empty((0, sizes.vocab), np.float32)
        self._logits = none, torch.from_numpy(none)
        self._turns = np.empty(0, np.int64)

    def of(self, rows: int, blocks: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(spans, maxima, parts) of a pass of so many rows over prefixes of so many blocks at most."""
        s = self._sizes
        # Spans grow with the prefix: the row with most of them need not be the last, see `spans_of`.
        spans = min(SPANS, -(-blocks // max(1, CHUNK // s.block_size)))
        ranked = blocks if blocks > s.ranked_from else 0
        self._maxima = _grown(self._maxima, rows * s.kv_heads * ranked)
        self._parts = _grown(self._parts, rows * s.heads * spans * (s.head_dim + 2))
        maxima = self._maxima[: rows * s.kv_heads * ranked].reshape(rows, s.kv_heads, ranked)
        return spans, maxima, self._parts

    def turns(self, passes: Sequence[Pass], threads: int) -> np.ndarray:
        """int64 [phases, threads + 1, 8]."""
        phases = sum((end - first) * PHASES_OF_LAYER + PHASES_OF_PASS for first, end, *_ in passes)
        self._turns = _grown(self._turns, phases * (threads + 1) * 8)
        return self._turns[: phases * (threads + 1) * 8].reshape(phases, threads + 1, 8)

    def logits(self, count: int) -> tuple[np.ndarray, Tensor]:
        """fp32 [count, V], as an array and as a tensor."""
        if count != len(self._logits[0]):
            self._held = _grown(self._held, count * self._sizes.vocab)
            array = self._held[: count * self._sizes.vocab].reshape(count, self._sizes.vocab)
            self._logits = array, torch.from_numpy(array)
        return self._logits


def _grown(held: np.ndarray, count: int) -> np.ndarray:
    return held if count <= len(held) else np.empty(count + count // 4, held.dtype)
