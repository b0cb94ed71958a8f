"""Sampling: the right law, the right ties, and a draw that depends on (seed, position) only."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longforge.engine.draws import philox4x32, uniforms
from longforge.engine.sampler import sample
from longforge.errors import EngineError
from longforge.protocol import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def one(logits: list[float], params: SamplingParams, seed: int = 0, position: int = 5) -> int:
    return sample(torch.tensor([logits]), [params], [seed], [position]).token_ids[0]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_known_answers(counter: str, key: str, expected: str):
    words = [
        np.array([[int(w, 16)] for w in text.split()], dtype=np.uint64) for text in (counter, key, expected)
    ]
    assert philox4x32(words[0], words[1]).tolist() == words[2].tolist()


def test_draws_are_uniform_inside_the_open_interval():
    u = uniforms(np.full(20_000, 7, dtype=np.uint64), np.arange(20_000, dtype=np.uint64))
    assert u.min() > 0 and u.max() < 1
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-square, 19 degrees of freedom, p < 1e-4


def test_greedy_takes_the_lower_id_on_a_tie():
    assert one([0.0, 3.0, 3.0, 1.0], GREEDY) == 1


@pytest.mark.parametrize(
    ("params", "law"),
    [
        (SamplingParams(), [0.4, 0.3, 0.2, 0.1]),
        (SamplingParams(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (SamplingParams(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (SamplingParams(top_p=0.5), [4 / 7, 3 / 7, 0, 0]),
        (SamplingParams(top_p=0.39), [1, 0, 0, 0]),
        (
            SamplingParams(top_k=3, top_p=0.75),
            [4 / 7, 3 / 7, 0, 0],
        ),  # top-p on what top-k left: 4/9, 3/9, 2/9
        (SamplingParams(temperature=1e-12), [1, 0, 0, 0]),
    ],
)
def test_samples_follow_the_asked_law(params: SamplingParams, law: list[float]):
    draws = 4000
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(draws, 1)
    tokens = sample(logits, [params] * draws, [11] * draws, list(range(draws))).token_ids
    counts = np.bincount(tokens, minlength=4)
    expected = np.array(law) * draws
    assert not counts[expected == 0].any()
    seen = expected > 0
    assert (
        (counts[seen] - expected[seen]) ** 2 / expected[seen]
    ).sum() < 22  # p < 1e-4 at 3 degrees of freedom


def test_top_k_and_top_p_break_ties_towards_the_lower_id():
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.5)):
        tokens = {one([1.0] * 4, params, position=position) for position in range(60)}
        assert tokens == {0, 1}


@given(st.integers(0, 2**70), st.integers(0, 10_000), st.integers(0, 6))
def test_a_row_is_sampled_the_same_whatever_else_is_in_the_batch(seed: int, position: int, others: int):
    generator = torch.Generator().manual_seed(others)
    logits = torch.randn(others + 1, 33, generator=generator)
    mixture = [GREEDY, SamplingParams(top_k=3), SamplingParams(temperature=2.0, top_p=0.3, top_logprobs=2)]
    params = SamplingParams(temperature=0.8, top_p=0.9, top_logprobs=3)
    batch = sample(
        logits,
        [*(mixture[i % 3] for i in range(others)), params],
        [*range(others), seed],
        [*range(others), position],
    )
    alone = sample(logits[-1:], [params], [seed], [position])
    assert batch.token_ids[-1] == alone.token_ids[0]
    assert batch.logprobs[-1] == alone.logprobs[0]
    assert batch.top_logprobs[-1] == alone.top_logprobs[0]


def test_logprobs_are_the_models_own_whatever_the_filters():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    result = sample(logits, [SamplingParams(temperature=0.1, top_k=1, top_logprobs=2)], [0], [0])
    assert result.token_ids == [0]
    assert math.isclose(result.logprobs[0], math.log(0.4), abs_tol=1e-6)
    assert [token for token, _ in result.top_logprobs[0]] == [0, 1]
    assert math.isclose(result.top_logprobs[0][1][1], math.log(0.3), abs_tol=1e-6)


def test_top_logprobs_are_ordered_with_ties_to_the_lower_id():
    params = SamplingParams(temperature=0.0, top_logprobs=3)
    top = sample(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), [params], [0], [0]).top_logprobs[0]
    assert [token for token, _ in top] == [1, 2, 3]


def test_a_distribution_that_is_not_finite_is_refused():
    with pytest.raises(EngineError, match="weights are broken"):
        sample(torch.full((1, 4), float("nan")), [GREEDY], [0], [0])
