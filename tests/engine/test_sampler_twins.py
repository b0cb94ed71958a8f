"""The numba sampler and the torch sampler choose the same tokens, bit for bit, whatever the logits are."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longforge.engine import sampler_cpu, sampler_torch
from longforge.engine.draws import uniforms
from longforge.engine.draws_cpu import uniform
from longforge.engine.fixed_weights import UNIT
from longforge.engine.sampler import Row, TokenCounts, law
from longforge.protocol import SamplingParams

VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2**-23, 1.0 - 2**-24, -1.0, 30.0, -31.5, -32.0, -math.inf]),
    st.floats(-40, 40, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
BROKEN = st.sampled_from([math.nan, math.inf])


@st.composite
def asked(draw: st.DrawFn) -> SamplingParams:
    token = st.integers(0, 9)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 5e-324, 1e-30, 1e-6, 0.3, 1.0, 1.0, 2.0, 1e6, 1e300])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 3, 7, 1000, 2**70])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.75, 0.5, 0.25, 0.1, 1e-9, 5e-324])),
        min_p=draw(st.sampled_from([0.0, 0.0, 1e-6, 0.1, 0.5, 1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.1, -1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.1, 0.3, 100.0, 5e-324])),
        logit_bias=tuple(draw(st.lists(st.tuples(token, st.floats(-100, 100)), max_size=3))),
        stop_token_ids=tuple(draw(st.lists(st.integers(0, 200), max_size=3))),
        min_tokens=draw(st.integers(0, 3)),
    )


@st.composite
def rows_of(draw: st.DrawFn, vocab: int) -> Row:
    token = st.integers(0, vocab - 1)
    counts = TokenCounts(draw(st.lists(token, max_size=5)))
    for generated in draw(st.lists(token, max_size=5)):
        counts.add(generated)
    words = st.integers(0, 2**32 - 1)
    size = -(-vocab // 32)
    mask = draw(st.none() | st.lists(words, min_size=size, max_size=size))
    return Row(
        draw(asked()),
        seed=draw(st.integers(-(2**63), 2**70)),
        position=draw(st.integers(0, 2**40)),
        generated=draw(st.integers(0, 4)),
        counts=counts,
        drafts=tuple(draw(st.lists(token, max_size=3))),
        mask=None if mask is None else np.array(mask, dtype=np.uint32),
    )


@settings(deadline=None)  # the first call compiles
@given(st.data())
def test_both_twins_choose_the_same_tokens(data: st.DataObject):
    vocab = data.draw(st.integers(10, 75))
    pool = data.draw(st.lists(VALUES, min_size=1, max_size=6))  # few values: duplicates and near-ties
    value = st.sampled_from(pool) if data.draw(st.booleans()) else VALUES
    rows = data.draw(st.lists(rows_of(vocab), min_size=1, max_size=4))
    values = [data.draw(st.lists(value, min_size=vocab, max_size=vocab)) for _ in rows]
    if data.draw(st.integers(0, 9)) == 0:
        values[0][-1] = data.draw(BROKEN)
    logits = torch.tensor(values, dtype=torch.float32)
    fast, plain = sampler_cpu.choose(logits, rows), sampler_torch.choose(logits, rows)
    assert fast.tokens == plain.tokens
    for at, token in enumerate(fast.tokens):
        if token >= 0:
            assert [part[at] for part in fast] == [part[at] for part in plain]
            alone = sampler_cpu.choose(logits[at : at + 1], rows[at : at + 1])
            assert [part[at] for part in fast] == [part[0] for part in alone]


@pytest.mark.parametrize("vocab", [2048, 20_011])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.05, 3.0, 30.0])
def test_both_twins_choose_the_same_tokens_of_a_large_vocabulary(vocab: int, spread: float):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(24, vocab, generator=generator) * spread
    logits[::2] = logits[::2].bfloat16().float()  # many exact ties
    rows = [
        Row(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), top_k, at)
        for at, (temperature, top_k, top_p, min_p) in enumerate(
            (temperature, top_k, top_p, min_p)
            for temperature in (0.5, 1.0)
            for top_k in (0, 50, 1500)
            for top_p, min_p in ((1.0, 0.0), (0.9, 0.0), (0.3, 0.01), (0.99999, 0.0))
        )
    ]
    assert sampler_cpu.choose(logits, rows) == sampler_torch.choose(logits, rows)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30])
def test_logits_spaced_by_powers_of_two_are_filtered_as_by_sorting(scale: float):
    """The worst case of the histograms: at each range, almost every candidate falls into one bucket."""
    logits = torch.tensor([[-(2.0**-n) for n in range(120)] * 2]) * min(scale, 1e20)
    for top_k in (1, 5, 100, 150, 239):
        row = Row(SamplingParams(temperature=scale, top_k=top_k, top_p=0.8), 1, top_k)
        assert sampler_cpu.choose(logits, [row]) == sampler_torch.choose(logits, [row])


@settings(deadline=None)  # the first call compiles
@given(st.lists(VALUES, min_size=1, max_size=90), st.integers(1, 90))
def test_both_twins_list_the_same_alternatives(values: list[float], count: int):
    logits = torch.tensor(values, dtype=torch.float32)
    fast, plain = sampler_cpu.top(logits, count), sampler_torch.top(logits, count)
    assert fast == plain
    assert len(fast[0]) == min(count, len(values))


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_the_compiled_draw_is_the_published_one(seed: int, position: int):
    one = uniform(np.uint64(seed), np.uint64(position))
    assert one == uniforms(np.array([seed], dtype=np.uint64), np.array([position], dtype=np.uint64))[0]


def test_weights_are_exp_in_units():
    x = torch.linspace(-33, 0, 100_001, dtype=torch.float32)
    weights = sampler_torch.kept_weights(x[None], [Row(SamplingParams(), 0, 0)])[0].numpy()
    assert weights[-1] == UNIT
    np.testing.assert_allclose(weights, np.exp(x.double().numpy()) * UNIT, rtol=3e-16, atol=0.500001)
    assert abs(law(x, Row(SamplingParams(), 0, 0)).sum() - 1) < 1e-12
