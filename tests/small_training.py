"""A model of a few thousand weights and something it can learn: for the tests of training."""

import dataclasses

import numpy as np

from longforge.model.presets import PRESETS
from longforge.training.data import Sample

__all__ = ["TINY", "Repeats"]

TINY = dataclasses.replace(
    PRESETS["micro"],
    layers=PRESETS["micro"].layers[:2],
    vocab_size=40,
    hidden_size=16,
    heads=4,
    kv_heads=2,
    head_dim=8,
    rotary_dim=4,
    experts=4,
    expert_size=8,
    shared_expert_size=8,
    dense_size=24,
    block_size=4,
    top_k_blocks=2,
    index_dim=8,
    max_positions=64,
)


class Repeats:
    """A few random tokens and the same again: the second half can be copied."""

    def sample(self, number):
        rng = np.random.default_rng(number)
        half = rng.integers(0, TINY.vocab_size, int(rng.integers(5, 12)))
        weights = np.repeat([0.1, 1.0], len(half)).astype(np.float32)
        return Sample(np.concatenate([half, half]), weights, (len(half), 2 * len(half)))
