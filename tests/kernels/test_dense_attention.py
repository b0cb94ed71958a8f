"""Dense attention, full and windowed: values and gradients against float64, and what may not change them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.dense_attention import dense_attention
from longforge.kernels.dense_attention.api import BACKENDS
from longforge.kernels.dense_attention.cases import CASES, WINDOWS, Case, Inputs, make_inputs, take
from longforge.kernels.layout import PackedLayout
from longforge.kernels.tiles import attention_in_spans

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
each_window = pytest.mark.parametrize("window", WINDOWS)
NAMES = ("out", "lse", "d_q", "d_k", "d_v")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}
"""Of the largest element of a result, or of 1, the size of the inputs (a gradient may be exactly zero)."""
LSE_TOLERANCE = 1e-6
"""The log-sum-exp comes in fp32, whatever went in."""


def attend(
    inputs: Inputs, backend: str | None = None, window: int | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    return dense_attention(
        inputs.q, inputs.k, inputs.v, inputs.layout, window=window, scale=scale, backend=backend
    )


def with_gradients(
    inputs: Inputs, backend: str | None = None, window: int | None = None, seed: int = 1
) -> list[Tensor]:
    """[out, lse, gradients of q, k, v] for one random cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    q, k, v = leaves
    out, lse = dense_attention(q, k, v, inputs.layout, window=window, backend=backend)
    rng = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out.dtype)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, cotangent)]


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, g, w in zip(NAMES, got, wanted, strict=False):
        error = float((g.double() - w.double()).abs().max() / w.double().abs().max().clamp(min=1))
        assert error <= max(tolerance, LSE_TOLERANCE if name == "lse" else 0), f"{name}: error {error:.2e}"


@each_backend
@each_window
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each_case
def test_output_and_gradients_equal_float64(case: Case, dtype: torch.dtype, window: int | None, backend: str):
    inputs = make_inputs(case, dtype)
    wanted = with_gradients(inputs.to(torch.float64), "reference", window)
    got = with_gradients(inputs, backend, window)
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype, dtype, dtype]
    assert_close(got, wanted, TOLERANCE[dtype])
    with torch.no_grad():
        assert_close(list(attend(inputs, backend, window)), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 6])
def test_reference_is_the_formula_written_out_per_token(window: int | None):
    case = CASES[1]
    inputs = make_inputs(case, torch.float64)
    layout, size = inputs.layout, case.block_size
    out, lse = attend(inputs, "reference", window, scale=0.3)
    for n in range(0, len(out), 7):
        path, position = int(layout.paths[n]), int(layout.positions[n])
        first = 0 if window is None else max(0, position - window + 1)
        rows = [(int(layout.page_table[path, t // size]), t % size) for t in range(first, position + 1)]
        for head in range(case.heads):
            group = head // (case.heads // case.groups)
            keys = torch.stack([inputs.k[page, at, group] for page, at in rows])
            values = torch.stack([inputs.v[page, at, group] for page, at in rows])
            weights = torch.exp(0.3 * keys @ inputs.q[n, head])
            wanted = (weights[:, None] * values).sum(0) / weights.sum()
            torch.testing.assert_close(out[n, head], wanted, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(lse[n, head], weights.sum().log().float())


@each_backend
def test_window_edges_are_where_the_definition_puts_them(backend: str):
    """Values are one-hot by position, so an output names the positions it saw; all scores are equal."""
    length, window = 40, 7
    layout = PackedLayout.from_lengths([length], 8)
    q, k = torch.zeros(length, 1, length), torch.zeros(5, 8, 1, length)
    v = torch.eye(length).view(5, 8, 1, length)
    out, _ = dense_attention(q, k, v, layout, window=window, backend=backend)
    for t in range(length):
        first = max(0, t - window + 1)
        wanted = torch.zeros(length)
        wanted[first : t + 1] = 1 / (t + 1 - first)
        torch.testing.assert_close(out[t, 0], wanted)


@each_backend
@each_case
def test_a_window_as_long_as_the_path_is_no_window(case: Case, backend: str):
    inputs = make_inputs(case, torch.float64)
    assert_close(with_gradients(inputs, backend, max(case.lengths)), with_gradients(inputs, backend), 1e-13)


@each_window
@each_case
def test_chunks_and_single_queries_equal_the_whole(case: Case, window: int | None):
    inputs = make_inputs(case, torch.float64)
    wanted = attend(inputs, window=window)
    for step in (1, 3, 17, 64):
        for rows in torch.arange(len(wanted[0])).split(step)[:: max(1, 40 // step)]:
            part = attend(take(inputs, rows), window=window)
            assert_close(list(part), [w[rows] for w in wanted], 1e-12)


@pytest.mark.parametrize("window", [None, 20])
def test_other_paths_and_thread_numbers_do_not_change_a_bit(window: int | None):
    case = Case((700, 20, 900, 1), 8, 4, 32, 1, 16, 1)
    inputs = make_inputs(case)
    # One path decodes one token, one has a few queries, one is read whole.
    rows = torch.cat([torch.arange(699, 720), torch.arange(720, 1621)])
    mixed = take(inputs, rows)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append([*attend(mixed, window=window), *with_gradients(mixed, window=window)])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    for path in range(4):
        mine = torch.nonzero(mixed.layout.paths == path).flatten()
        alone = attend(take(mixed, mine), window=window)
        assert torch.equal(alone[0], runs[0][0][mine]) and torch.equal(alone[1], runs[0][1][mine])


def test_in_bf16_a_path_that_decodes_beside_a_prefill_gets_the_bits_it_gets_alone():
    """Over more blocks than a unit of few queries reads."""
    blocks = attention_in_spans.SPAN + 3
    inputs = make_inputs(Case((32 * blocks, 40), 8, 2, 32, 1, 32, 1), torch.bfloat16)
    mixed = take(inputs, torch.arange(32 * blocks - 3, 32 * blocks + 40))
    out, lse = attend(mixed)
    for path in range(2):
        mine = torch.nonzero(mixed.layout.paths == path).flatten()
        alone = attend(take(mixed, mine))
        assert torch.equal(alone[0], out[mine]) and torch.equal(alone[1], lse[mine])


def test_partial_sums_of_a_few_paths_at_a_time_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    inputs = make_inputs(Case((1500, 70, 1100, 9, 300), 8, 2, 32, 1, 32, 1), torch.bfloat16)
    ends = torch.tensor([1500, 1570, 2670, 2679, 2979])
    decode = take(inputs, torch.cat([torch.arange(end - 1 - i, end) for i, end in enumerate(ends.tolist())]))
    wanted = attend(decode)
    assert_close(list(wanted), list(attend(decode.to(torch.float64), "reference")), TOLERANCE[torch.bfloat16])
    for room in (1, 3 * 8 * 32 * 32):
        monkeypatch.setattr(attention_in_spans, "ROOM", room)
        assert all(torch.equal(a, b) for a, b in zip(attend(decode), wanted, strict=True))


@each_backend
@each_window
@each_case
def test_rows_without_a_token_are_never_read(case: Case, window: int | None, backend: str):
    inputs = make_inputs(case)
    empty = torch.isnan(inputs.k).flatten(2).all(2)
    assert bool(empty.any()), "the case has rows without a token"
    results = [*with_gradients(inputs, backend, window), *attend(inputs, backend, window)]
    assert all(bool(torch.isfinite(t).all()) for t in results)
    assert not results[3][empty].any() and not results[4][empty].any()


@each_backend
@each_case
def test_physical_places_of_pages_do_not_matter(case: Case, backend: str):
    inputs = make_inputs(case)
    order = torch.randperm(inputs.k.shape[0], generator=torch.Generator().manual_seed(5))
    table = inputs.layout.page_table
    moved = torch.where(table < 0, -1, order[table.long().clamp(min=0)]).int()
    back = torch.argsort(order)
    layout = replace(inputs.layout, page_table=moved)
    other = replace(inputs, layout=layout, k=inputs.k[back], v=inputs.v[back])
    out, lse, d_q, d_k, d_v = with_gradients(other, backend)
    wanted = [*with_gradients(inputs, backend), *attend(inputs, backend)]
    got = [out, lse, d_q, d_k[order], d_v[order], *attend(other, backend)]
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@each_backend
@pytest.mark.parametrize("window", [None, 7])
def test_pages_of_several_paths_get_the_sum_of_their_gradients(window: int | None, backend: str):
    """Two paths that share their first two pages, against the same two paths each on its own copy."""
    rng = torch.Generator().manual_seed(3)
    shared = PackedLayout(
        torch.arange(8, 14).repeat(2),
        torch.tensor([0] * 6 + [1] * 6),
        torch.tensor([8, 9, 10, 11, 12, 13, 16, 17, 18, 19, 20, 21]),
        torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]], dtype=torch.int32),
        4,
    )
    apart = replace(shared, page_table=torch.tensor([[0, 1, 2, 3], [6, 7, 4, 5]], dtype=torch.int32))
    q = torch.randn(12, 4, 8, generator=rng, dtype=torch.float64)
    k, v = (torch.randn(6, 4, 2, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    none = torch.empty(0)
    copied = Inputs(apart, none, none, q, torch.cat([k, k[:2]]), torch.cat([v, v[:2]]))
    out, _, d_q, d_k, d_v = with_gradients(Inputs(shared, none, none, q, k, v), backend, window)
    wanted = with_gradients(copied, "reference", window)
    folded = [x[:6] + torch.cat([x[6:], torch.zeros_like(x[:4])]) for x in wanted[3:]]
    for got, expected in zip((out, d_q, d_k, d_v), (wanted[0], wanted[2], *folded), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@each_backend
def test_large_scores_do_not_overflow(backend: str):
    inputs = make_inputs(CASES[2])
    inputs = replace(inputs, q=inputs.q * 300)
    wanted = with_gradients(inputs.to(torch.float64), "reference")
    # Scores of some thousands carry a rounding error of some 1e-4 each into the exponent.
    assert_close(with_gradients(inputs, backend), wanted, 2e-3)
    assert_close(list(attend(inputs, backend)), wanted, 2e-3)


def test_inputs_need_not_be_contiguous():
    inputs = make_inputs(CASES[2])
    strided = replace(
        inputs,
        q=inputs.q.transpose(0, 1).contiguous().transpose(0, 1),
        k=inputs.k.transpose(1, 2).contiguous().transpose(1, 2),
    )
    wanted = [*with_gradients(inputs), *attend(inputs)]
    got = [*with_gradients(strided), *attend(strided)]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@each_backend
def test_under_autocast_mixed_inputs_are_taken_in_its_dtype(backend: str):
    inputs = make_inputs(CASES[1])
    wanted, _ = attend(inputs.to(torch.bfloat16), backend)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attend(replace(inputs, v=inputs.v.bfloat16()), backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted)


@each_backend
def test_lse_has_no_gradient_and_inference_keeps_no_graph(backend: str):
    inputs = make_inputs(CASES[1])
    inputs.q.requires_grad_()
    out, lse = attend(inputs, backend)
    assert out.requires_grad and not lse.requires_grad
    with torch.no_grad():
        assert not attend(inputs, backend)[0].requires_grad


def test_what_does_not_fit_is_refused_in_one_line():
    inputs = make_inputs(CASES[1])
    with pytest.raises(InputError, match="a multiple of the 3 kv heads expected, got 4"):
        attend(replace(inputs, q=inputs.q[:, :4]))
    with pytest.raises(InputError, match="v_pages like k_pages"):
        attend(replace(inputs, v=inputs.v[:1]))
    with pytest.raises(InputError, match=r"window of at least 1 position expected .* got 0"):
        attend(inputs, window=0)
    with pytest.raises(InputError, match="as many queries as the layout has tokens"):
        attend(replace(inputs, q=inputs.q[1:]))
    with pytest.raises(InputError, match="one of cpu, few_queries, reference expected, got 'triton'"):
        attend(inputs, "triton")


@each_backend
def test_no_query_tokens_give_empty_results(backend: str):
    inputs = take(make_inputs(CASES[1]), torch.empty(0, dtype=torch.int64))
    out, lse = attend(inputs, backend)
    assert out.shape == (0, 6, 7) and lse.shape == (0, 6)
