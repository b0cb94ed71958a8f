"""Lightning attention: values and gradients against the float64 recurrence, states in pages, and a peer."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout
from longforge.kernels.lightning_attention import decay_slopes, lightning_attention
from longforge.kernels.lightning_attention.api import BACKENDS
from longforge.kernels.lightning_attention.cases import CASES, Case, Inputs, make_inputs, take

each_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
NAMES = ("out", "d_q", "d_k", "d_v")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the largest element of a result."""


def attend(inputs: Inputs, backend: str | None = None, states: Tensor | None = None) -> Tensor:
    return lightning_attention(
        inputs.q, inputs.k, inputs.v, inputs.slopes, inputs.layout, states=states, backend=backend
    )


def with_gradients(inputs: Inputs, backend: str, states: Tensor | None = None) -> list[Tensor]:
    """[out, gradients of q, k, v] for one random cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out = attend(replace(inputs, q=leaves[0], k=leaves[1], v=leaves[2]), backend, states)
    rng = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, g, w in zip(NAMES, got, wanted, strict=False):
        error = float((g.double() - w.double()).abs().max() / w.double().abs().max().clamp(min=1e-3))
        assert error <= tolerance, f"{name}: error {error:.2e}"


def fresh_states(inputs: Inputs) -> Tensor:
    """A pool of states in which nothing was written yet."""
    pages = int(inputs.layout.page_table.max()) + 2
    heads, dim = inputs.q.shape[1:]
    wide = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    return torch.full((pages, heads, dim, dim), float("nan"), dtype=wide)


@each_backend
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each_case
def test_output_and_gradients_equal_float64(case: Case, dtype: torch.dtype, backend: str):
    inputs = make_inputs(case, dtype)
    wanted = with_gradients(inputs.to(torch.float64), "reference")
    got = with_gradients(inputs, backend)
    assert all(t.dtype == dtype for t in got)
    assert_close(got, wanted, TOLERANCE[dtype])


def test_reference_is_the_sum_over_the_past():
    inputs = make_inputs(CASES[1], torch.float64)
    out, start = attend(inputs, "reference"), 0
    for length in CASES[1].lengths:
        rows = slice(start, start + length)
        age = torch.arange(length)[:, None] - torch.arange(length)
        weight = torch.exp(-inputs.slopes.double()[:, None, None] * age).tril()
        scores = torch.einsum("ihd,jhd->hij", inputs.q[rows], inputs.k[rows]) * weight
        wanted = torch.einsum("hij,jhd->ihd", scores, inputs.v[rows])
        torch.testing.assert_close(out[rows], wanted, rtol=1e-12, atol=1e-12)
        start += length


@each_backend
@each_case
def test_states_are_those_after_the_last_token_of_each_page(case: Case, backend: str):
    inputs = make_inputs(case, torch.float64)
    states = fresh_states(inputs)
    out = attend(inputs, backend, states)
    torch.testing.assert_close(out, attend(inputs, "reference"), rtol=1e-11, atol=1e-11)
    layout = inputs.layout
    written = torch.unique(layout.slots // case.block_size)
    for page in written.tolist():
        last = int(torch.nonzero(layout.slots // case.block_size == page).max())
        first = int(torch.nonzero(layout.paths == layout.paths[last]).min())
        age = torch.arange(last - first, -1, -1)
        weight = torch.exp(-inputs.slopes.double() * age[:, None])
        rows = slice(first, last + 1)
        wanted = torch.einsum("th,thd,the->hde", weight, inputs.k[rows], inputs.v[rows])
        torch.testing.assert_close(states[page], wanted, rtol=1e-11, atol=1e-11)
    untouched = torch.ones(len(states), dtype=torch.bool)
    untouched[written] = False
    assert bool(untouched.any()) and bool(states[untouched].isnan().all())


@each_backend
@pytest.mark.parametrize("step", [1, 3, 16, 50])
@each_case
def test_chunks_with_states_equal_the_whole(case: Case, step: int, backend: str):
    inputs = make_inputs(case, torch.float64)
    wanted, states = attend(inputs, "reference"), fresh_states(inputs)
    got = torch.empty_like(wanted)
    for rounds in range(0, max(case.lengths), step):
        # Each path goes on by `step` tokens: batches of unequal runs, and single tokens for step 1.
        now = (inputs.layout.positions >= rounds) & (inputs.layout.positions < rounds + step)
        rows = torch.nonzero(now).flatten()
        got[rows] = attend(take(inputs, rows), backend, states)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@each_backend
def test_a_forked_path_starts_from_the_page_it_shares(backend: str):
    """Path 1 continues after path 0's first two pages with tokens of its own, on pages of its own."""
    inputs = make_inputs(Case((20,), 2, 5, 4), torch.float64)
    states = fresh_states(inputs)
    states = torch.cat([states, states])
    attend(inputs, backend, states)
    table = inputs.layout.page_table
    kept = states.clone()
    new = torch.arange(3) + len(states) - 3
    fork = PackedLayout(
        torch.arange(8, 15),
        torch.ones(7, dtype=torch.int64),
        new[torch.arange(7) // 4] * 4 + torch.arange(7) % 4,
        torch.cat([table, torch.cat([table[0, :2], new.int()])[None]]),
        4,
    )
    tail = make_inputs(Case((7,), 2, 5, 4), torch.float64, seed=9)
    got = attend(replace(tail, layout=fork), backend, states)
    pairs = ((inputs.q, tail.q), (inputs.k, tail.k), (inputs.v, tail.v))
    q, k, v = (torch.cat([prefix[:8], rest]) for prefix, rest in pairs)
    layout = PackedLayout.from_lengths([15], 4)
    whole = lightning_attention(q, k, v, inputs.slopes, layout, backend="reference")
    torch.testing.assert_close(got, whole[8:], rtol=1e-11, atol=1e-11)
    assert torch.equal(states[: len(kept) - 3].nan_to_num(), kept[: len(kept) - 3].nan_to_num())


@each_backend
def test_gradients_in_a_later_chunk_treat_the_stored_state_as_given(backend: str):
    inputs = make_inputs(Case((30,), 2, 5, 4), torch.float64)
    states = fresh_states(inputs)
    attend(take(inputs, torch.arange(13)), "reference", states)
    rest = take(inputs, torch.arange(13, 30))
    wanted = with_gradients(rest, "reference", states.clone())
    got = with_gradients(rest, backend, states)
    assert_close(got, wanted, 1e-12)
    assert not states.requires_grad


@each_backend
def test_nothing_overflows_over_a_long_path_with_fast_decay(backend: str):
    inputs = make_inputs(Case((700,), 2, 3, 256))
    inputs = replace(inputs, slopes=torch.tensor([0.0, 4.0]))
    states = fresh_states(inputs)
    out = attend(inputs, backend, states)
    exact = inputs.to(torch.float64)
    wanted = attend(exact, "reference")
    assert_close([out], [wanted], 1e-5)


@each_backend
def test_autocast_does_not_lower_the_precision(backend: str):
    inputs = make_inputs(CASES[1])
    plain = attend(inputs, backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(inputs, backend), plain)


@pytest.mark.parametrize("heads, layers", [(1, 1), (4, 3), (6, 80)])
def test_decay_slopes_are_the_formula(heads: int, layers: int):
    for layer in {0, layers // 2, layers - 1}:
        slopes = decay_slopes(heads, layer, layers)
        depth = 1 - layer / (layers - 1 + 1e-5) + 1e-5
        wanted = torch.tensor([2 ** (-8 * (h + 1) / heads) * depth for h in range(heads)])
        torch.testing.assert_close(slopes, wanted)
        assert bool((slopes > 0).all())


def test_decay_slopes_of_an_engine_serve_training():
    with torch.inference_mode():
        slopes = decay_slopes(5, 1, 9)
    assert slopes is decay_slopes(5, 1, 9) and not slopes.is_inference()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_equals_the_module_of_transformers(layer: int):
    """The whole Lightning mixer around our operation against transformers' MiniMax module, same weights."""
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    configuration = pytest.importorskip("transformers.models.minimax.configuration_minimax")
    heads, dim, hidden, length = 4, 6, 10, 21
    config = configuration.MiniMaxConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=dim,
        num_hidden_layers=3,
        block_size=8,
        vocab_size=16,
        intermediate_size=8,
        layer_types=["linear_attention"] * 3,
    )
    torch.manual_seed(0)
    module = minimax.MiniMaxLightningAttention(config, layer).eval()
    x = torch.randn(2, length, hidden)
    with torch.no_grad():
        wanted = module(x, position_embeddings=None, attention_mask=None)[0]
        q, k, v = (
            torch.nn.functional.silu(module.qkv_proj(x)).view(2 * length, heads, 3 * dim).split(dim, dim=-1)
        )
        layout = PackedLayout.from_lengths([length, length], 8)
        out = lightning_attention(q, k, v, decay_slopes(heads, layer, 3), layout)
        normed = module.norm(out.reshape(2, length, heads * dim))
        got = module.out_proj(torch.sigmoid(module.output_gate(x)) * normed)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused_in_one_line():
    inputs = make_inputs(CASES[1])
    late = take(inputs, torch.arange(3, len(inputs.q)))
    with pytest.raises(InputError, match="got a start at 3; pass states"):
        attend(late)
    gap = take(inputs, torch.cat([torch.arange(3), torch.arange(4, len(inputs.q))]))
    with pytest.raises(InputError, match="consecutive positions"):
        attend(gap)
    with pytest.raises(InputError, match="states in fp32 expected"):
        attend(inputs, states=fresh_states(inputs).bfloat16())
    with pytest.raises(InputError, match=r"decay_slopes \[H\]"):
        attend(replace(inputs, slopes=inputs.slopes[:1]))
    with pytest.raises(InputError, match="v like q"):
        attend(replace(inputs, v=inputs.v[:, :, :1]))
    with pytest.raises(InputError, match="0 <= layer < layers"):
        decay_slopes(4, 3, 3)


@each_backend
def test_no_tokens_give_no_rows(backend: str):
    inputs = take(make_inputs(CASES[1]), torch.empty(0, dtype=torch.int64))
    assert attend(inputs, backend).shape == inputs.q.shape
