"""Sampling: the right law, the right ties, and a draw that depends on (seed, position) only."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longforge.engine.draws import philox4x32, uniforms
from longforge.engine.sampler import Row, TokenCounts, law, prompt_logprobs, sample
from longforge.errors import EngineError
from longforge.protocol import SamplingParams
from sampling_law import expected_law, mask_of

GREEDY = SamplingParams(temperature=0.0)


def one(logits: list[float], params: SamplingParams, seed: int = 0, position: int = 5) -> int:
    return sample(torch.tensor([logits]), [Row(params, seed, position)]).token_ids[0]


def counts_of(prompt: Sequence[int], answer: Sequence[int]) -> TokenCounts:
    counts = TokenCounts(prompt)
    for token in answer:
        counts.add(token)
    return counts


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
    tokens = sample(logits, [Row(params, 11, position) for position in range(draws)]).token_ids
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


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 2**70), st.integers(0, 10_000), st.integers(0, 6))
def test_a_row_is_sampled_the_same_whatever_else_is_in_the_batch(seed: int, position: int, others: int):
    generator = torch.Generator().manual_seed(others)
    logits = torch.randn(others + 1, 33, generator=generator)
    mixture = [GREEDY, SamplingParams(top_k=3), SamplingParams(temperature=2.0, top_p=0.3, top_logprobs=2)]
    params = SamplingParams(temperature=0.8, top_p=0.9, top_logprobs=3)
    company = [Row(mixture[i % 3], i, i) for i in range(others)]
    batch = sample(logits, [*company, Row(params, seed, position)])
    alone = sample(logits[-1:], [Row(params, seed, position)])
    assert batch.token_ids[-1] == alone.token_ids[0]
    assert batch.logprobs[-1] == alone.logprobs[0]
    assert batch.top_logprobs[-1] == alone.top_logprobs[0]


def test_logprobs_are_the_models_own_whatever_the_filters():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    result = sample(logits, [Row(SamplingParams(temperature=0.1, top_k=1, top_logprobs=2), 0, 0)])
    assert result.token_ids == [0]
    assert math.isclose(result.logprobs[0], math.log(0.4), abs_tol=1e-6)
    assert [token for token, _ in result.top_logprobs[0]] == [0, 1]
    assert math.isclose(result.top_logprobs[0][1][1], math.log(0.3), abs_tol=1e-6)


def test_top_logprobs_are_ordered_with_ties_to_the_lower_id():
    params = SamplingParams(temperature=0.0, top_logprobs=3)
    top = sample(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), [Row(params, 0, 0)]).top_logprobs[0]
    assert [token for token, _ in top] == [1, 2, 3]


# Tokens 0 to 6; 0 and 3 in the prompt, 1 once and 2 twice in the answer, 5 a stop token.
LOGITS = [1.5, 1.0, 2.0, -0.5, 0.0, 1.25, -1.0]
PROMPT, ANSWER, STOPS = (0, 3), (2, 1, 2), (5,)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.4),
        SamplingParams(temperature=3.0),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.6),
        SamplingParams(min_p=0.3),
        SamplingParams(presence_penalty=1.5),
        SamplingParams(presence_penalty=-1.5),
        SamplingParams(frequency_penalty=0.7),
        SamplingParams(repetition_penalty=1.8),
        SamplingParams(repetition_penalty=0.5),
        SamplingParams(logit_bias=((4, 2.5), (2, -3.0), (4, 0.5))),
        SamplingParams(min_tokens=4),
        SamplingParams(min_tokens=3),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.8, min_p=0.2, presence_penalty=0.5, min_tokens=9),
        SamplingParams(repetition_penalty=1.3, frequency_penalty=-0.6, logit_bias=((6, 4.0),), top_p=0.9),
        SamplingParams(temperature=0.0, repetition_penalty=3.0, logit_bias=((5, 9.0),), min_tokens=4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("allowed", [None, (1, 3, 4, 6)], ids=["free", "grammar"])
def test_each_parameter_gives_the_law_of_its_formula(params: SamplingParams, allowed: tuple[int, ...] | None):
    params = replace(params, stop_token_ids=STOPS)
    expected = expected_law(LOGITS, params, prompt=PROMPT, answer=ANSWER, allowed=allowed)
    mask = None if allowed is None else mask_of(allowed, 7)
    counted = Row(params, 3, 0, generated=3, counts=counts_of(PROMPT, ANSWER), mask=mask)
    drafted = replace(counted, counts=counts_of(PROMPT, ANSWER[:1]), drafts=ANSWER[1:])
    for row in (counted, drafted):
        logits = torch.tensor(LOGITS)
        np.testing.assert_allclose(law(logits, row), expected, atol=1e-12)
        # And the draws: token t exactly where the cumulative law passes the uniform number.
        rows = [replace(row, position=position) for position in range(200)]
        tokens = sample(logits.repeat(200, 1), rows).token_ids
        draws = uniforms(np.full(200, 3, dtype=np.uint64), np.arange(200, dtype=np.uint64))
        assert tokens == np.searchsorted(np.cumsum(law(logits, row)), draws, side="right").tolist()


@pytest.mark.parametrize(
    "name",
    ["top_k", "top_p", "min_p", "temperature", "presence_penalty", "frequency_penalty", "repetition_penalty"],
)
def test_no_parameter_is_without_effect(name: str):
    """Guards the test above against a formula that leaves its own law as it was."""
    value = {"top_k": 2}.get(name, 0.5)
    row = Row(SamplingParams(), 0, 0, counts=counts_of(PROMPT, ANSWER))
    changed = replace(row, params=SamplingParams(**{name: value}))
    assert abs(law(torch.tensor(LOGITS), row) - law(torch.tensor(LOGITS), changed)).max() > 0.01


def test_a_bad_row_fails_alone():
    plain = SamplingParams(top_logprobs=2)
    good = torch.tensor(LOGITS)
    nan, infinite, nothing = good.clone(), good.clone(), torch.full((7,), -math.inf)
    nan[3], infinite[2] = math.nan, math.inf
    unsampled = SamplingParams(min_tokens=1, stop_token_ids=tuple(range(7)))
    logits = torch.stack([good, nan, infinite, nothing, good, good, good])
    rows = [Row(plain, 1, 1)] * 4
    rows += [Row(plain, 1, 1, mask=mask_of((), 7)), Row(unsampled, 1, 1), Row(plain, 1, 1)]
    for params in (plain, GREEDY, SamplingParams(top_k=2, top_p=0.5)):
        mixed = [replace(row, params=params if row.params is plain else row.params) for row in rows]
        sampled, alone = sample(logits, mixed), sample(logits[:1], mixed[:1])
        assert sampled.failed == [False, True, True, True, True, True, False]
        for at, failed in enumerate(sampled.failed):
            if failed:
                assert sampled.token_ids[at] == -1 and math.isnan(sampled.logprobs[at])
                assert sampled.top_logprobs[at] == ()
            else:
                assert sampled.token_ids[at] == alone.token_ids[0]
                assert sampled.logprobs[at] == alone.logprobs[0]
                assert sampled.top_logprobs[at] == alone.top_logprobs[0]


def test_logits_of_minus_infinity_are_tokens_of_no_probability():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0])
    assert law(logits, Row(SamplingParams(), 0, 0)).tolist() == [0, 0.5, 0, 0.5]
    assert {one(logits.tolist(), SamplingParams(), position=position) for position in range(40)} == {1, 3}


def test_no_rows_give_no_tokens():
    assert sample(torch.zeros(0, 5), []).token_ids == []


def test_prompt_logprobs_are_the_log_softmax_with_ties_to_the_lower_id():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, -1.0, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0]])
    tokens = prompt_logprobs(logits, [3, 1, 2], 3)
    expected = torch.log_softmax(logits.double(), dim=-1)
    assert [token.token_id for token in tokens] == [3, 1, 2]
    assert [[i for i, _ in token.top_logprobs] for token in tokens] == [[1, 2, 3], [0, 3, 2], [0, 1, 2]]
    for row, token in enumerate(tokens):
        assert math.isclose(token.logprob, expected[row, token.token_id].item(), abs_tol=1e-9)
        for other, logprob in token.top_logprobs:
            assert math.isclose(logprob, expected[row, other].item(), abs_tol=1e-9)
    assert [token.top_logprobs for token in prompt_logprobs(logits, [3, 1, 2], 0)] == [()] * 3
    assert prompt_logprobs(logits[:0], [], 3) == []


def test_prompt_logprobs_of_broken_weights_are_refused():
    with pytest.raises(EngineError, match="weights are broken"):
        prompt_logprobs(torch.full((1, 4), float("nan")), [0], 0)


@given(st.lists(st.integers(0, 9), max_size=9), st.lists(st.integers(0, 99)), st.lists(st.integers(0, 99)))
def test_counts_are_a_histogram(prompt: list[int], answer: list[int], drafts: list[int]):
    counts = counts_of(prompt, answer)
    for extra in ([], drafts):
        ids, generated = counts.arrays(extra)
        histogram = Counter(answer + extra)
        assert dict(zip(ids.tolist(), generated.tolist(), strict=True)) == {
            token: histogram[token] for token in {*prompt, *answer, *extra}
        }
        assert len(set(ids.tolist())) == len(ids)
