"""Block-sparse attention: values and gradients against float64, and what may not change them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout, as_pages
from longforge.kernels.select_blocks import select_blocks
from longforge.kernels.sparse_attention import sparse_attention
from longforge.kernels.sparse_attention.api import BACKENDS
from longforge.kernels.sparse_attention.cases import CASES, Case, Inputs, make_inputs, take

HERE = [name for name in BACKENDS if name != "triton"]
"""test_sparse_attention_triton.py is about the other."""
each_backend = pytest.mark.parametrize("backend", HERE)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
NAMES = ("out", "lse", "d_q", "d_k", "d_v")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}
"""Of the largest element of a result: some tens of rounding steps of each dtype."""
LSE_TOLERANCE = 1e-6
"""The log-sum-exp comes in fp32, whatever went in."""


def selected(inputs: Inputs, top_k: int) -> Tensor:
    return select_blocks(inputs.index_q, inputs.index_k, inputs.layout, top_k)


def attend(
    inputs: Inputs, blocks: Tensor, backend: str | None = None, **options: float
) -> tuple[Tensor, Tensor]:
    return sparse_attention(inputs.q, inputs.k, inputs.v, blocks, inputs.layout, backend=backend, **options)


def with_gradients(inputs: Inputs, blocks: Tensor, backend: str | None = None, seed: int = 1) -> list[Tensor]:
    """[out, lse, gradients of q, k, v] for one random cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out, lse = sparse_attention(leaves[0], leaves[1], leaves[2], blocks, inputs.layout, backend=backend)
    rng = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out.dtype)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, cotangent)]


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, g, w in zip(NAMES, got, wanted, strict=False):
        error = float((g.double() - w.double()).abs().max() / w.double().abs().max().clamp(min=1e-3))
        assert error <= max(tolerance, LSE_TOLERANCE if name == "lse" else 0), f"{name}: error {error:.2e}"


def dense_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One path, plain: q [T, Hq, D], k and v [T, Hkv, D]."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = torch.einsum("nhd,thd->hnt", q, k) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), float("-inf"))
    return torch.einsum("hnt,thd->nhd", scores.softmax(-1), v)


@each_backend
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each_case
def test_output_and_gradients_equal_float64(case: Case, dtype: torch.dtype, backend: str):
    inputs = make_inputs(case, dtype)
    blocks = selected(inputs, case.top_k)
    wanted = with_gradients(inputs.to(torch.float64), blocks, "reference")
    got = with_gradients(inputs, blocks, backend)
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype, dtype, dtype]
    assert_close(got, wanted, TOLERANCE[dtype])


def test_reference_is_the_formula_written_out_per_token():
    case = CASES[1]
    inputs = make_inputs(case, torch.float64)
    blocks, layout, size = selected(inputs, case.top_k), inputs.layout, case.block_size
    out, lse = attend(inputs, blocks, "reference", scale=0.3)
    for n in range(0, len(out), 5):
        path, position = int(layout.paths[n]), int(layout.positions[n])
        for head in range(case.heads):
            group = head // (case.heads // case.groups)
            scores, values = [], []
            for block in blocks[n, group].tolist():
                for t in range(block * size, min((block + 1) * size, position + 1)) if block >= 0 else ():
                    page = int(layout.page_table[path, block])
                    scores.append(0.3 * inputs.q[n, head] @ inputs.k[page, t % size, group])
                    values.append(inputs.v[page, t % size, group])
            weights = torch.stack(scores).exp()
            wanted = (weights[:, None] * torch.stack(values)).sum(0) / weights.sum()
            torch.testing.assert_close(out[n, head], wanted, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(lse[n, head], weights.sum().log().float())


@each_backend
def test_selecting_all_blocks_is_dense_causal_attention(backend: str):
    case = CASES[1]
    inputs = make_inputs(case, torch.float64)
    out, _ = attend(inputs, selected(inputs, 20), backend)
    rows = inputs.layout.slots
    for path in range(len(case.lengths)):
        mine = inputs.layout.paths == path
        k, v = (pages.flatten(0, 1)[rows[mine]] for pages in (inputs.k, inputs.v))
        torch.testing.assert_close(out[mine], dense_causal(inputs.q[mine], k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_group", [1, 3])
def test_fast_gradients_pass_gradcheck(per_group: int):
    inputs = make_inputs(Case((7, 3), 2 * per_group, 2, 3, 3, 2, 2), torch.float64)
    rows = inputs.layout.slots
    blocks = selected(inputs, 2)

    def out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blank = inputs.k.new_zeros(inputs.k.flatten(0, 1).shape)
        k_pages, v_pages = (blank.index_copy(0, rows, x).view_as(inputs.k) for x in (k, v))
        return sparse_attention(q, k_pages, v_pages, blocks, inputs.layout, backend="cpu")[0]

    leaves = (inputs.q, *(pages.flatten(0, 1)[rows] for pages in (inputs.k, inputs.v)))
    assert torch.autograd.gradcheck(out, tuple(x.clone().requires_grad_() for x in leaves))


@each_backend
@each_case
def test_rows_without_a_token_are_never_read(case: Case, backend: str):
    inputs = make_inputs(case)
    empty = torch.isnan(inputs.k).flatten(2).all(2)
    assert bool(empty.any()), "the case has rows without a token"
    results = with_gradients(inputs, selected(inputs, case.top_k), backend)
    assert all(bool(torch.isfinite(t).all()) for t in results)
    assert not results[3][empty].any() and not results[4][empty].any()


def test_blocks_that_no_query_selected_are_never_read():
    """The fast path computes what is selected and nothing else: forward and backward."""
    case = Case((64,), 4, 2, 8, 8, 4, 2)
    inputs = take(make_inputs(case), torch.arange(56, 64))
    own = inputs.layout.positions // case.block_size
    blocks = torch.stack([torch.zeros_like(own), own], 1)[:, None].expand(-1, case.groups, -1).int()
    wanted = with_gradients(inputs, blocks, "cpu")
    unread = inputs.layout.page_table[0, 1:14].long()
    hidden = {name: getattr(inputs, name).index_fill(0, unread, float("nan")) for name in ("k", "v")}
    got = with_gradients(replace(inputs, **hidden), blocks, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@each_backend
@each_case
def test_physical_places_of_pages_do_not_matter(case: Case, backend: str):
    inputs = make_inputs(case)
    blocks = selected(inputs, case.top_k)
    order = torch.randperm(inputs.k.shape[0], generator=torch.Generator().manual_seed(5))
    table = inputs.layout.page_table
    moved = torch.where(table < 0, -1, order[table.long().clamp(min=0)]).int()
    layout = replace(inputs.layout, page_table=moved)
    back = torch.argsort(order)
    other = replace(inputs, layout=layout, k=inputs.k[back], v=inputs.v[back])
    out, lse, d_q, d_k, d_v = with_gradients(other, blocks, backend)
    wanted = with_gradients(inputs, blocks, backend)
    assert all(
        torch.equal(g, w) for g, w in zip((out, lse, d_q, d_k[order], d_v[order]), wanted, strict=True)
    )


@each_case
def test_chunks_attend_to_the_bit_as_the_whole_does(case: Case):
    inputs = make_inputs(case)
    blocks = selected(inputs, case.top_k)
    out, lse = attend(inputs, blocks)
    for step in (1, 7, 64):
        for rows in torch.arange(len(out)).split(step)[:: max(1, 24 // step)]:
            part_out, part_lse = attend(take(inputs, rows), blocks[rows])
            assert torch.equal(part_out, out[rows]) and torch.equal(part_lse, lse[rows])


@each_backend
def test_pages_of_several_paths_get_the_sum_of_their_gradients(backend: str):
    """Two paths that share their first two pages, against the same two paths each on its own copy."""
    size, groups = 4, 2
    rng = torch.Generator().manual_seed(3)
    shared = PackedLayout(
        torch.arange(8, 14).repeat(2),
        torch.tensor([0] * 6 + [1] * 6),
        torch.tensor([8, 9, 10, 11, 12, 13, 16, 17, 18, 19, 20, 21]),
        torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]], dtype=torch.int32),
        size,
    )
    apart = replace(shared, page_table=torch.tensor([[0, 1, 2, 3], [6, 7, 4, 5]], dtype=torch.int32))
    q = torch.randn(12, 4, 8, generator=rng, dtype=torch.float64)
    k = torch.randn(6, size, groups, 8, generator=rng, dtype=torch.float64)
    v = torch.randn(6, size, groups, 8, generator=rng, dtype=torch.float64)
    blocks = torch.tensor([0, 1, 2, -1]).repeat(12, groups, 1).int()
    blocks[4:6, :, :3] = blocks[10:, :, :3] = torch.tensor([0, 1, 3]).int()
    none = torch.empty(0)
    copied = Inputs(apart, none, none, q, torch.cat([k, k[:2]]), torch.cat([v, v[:2]]))
    out, _, d_q, d_k, d_v = with_gradients(Inputs(shared, none, none, q, k, v), blocks, backend)
    wanted = with_gradients(copied, blocks, "reference")
    folded = [x[:6] + torch.cat([x[6:], torch.zeros_like(x[:4])]) for x in wanted[3:]]
    for got, expected in zip((out, d_q, d_k, d_v), (wanted[0], wanted[2], *folded), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_repeats_and_thread_numbers_give_the_same_bits():
    case = Case((700, 900), 8, 4, 32, 32, 16, 8)
    inputs = make_inputs(case)
    blocks = selected(inputs, case.top_k)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(with_gradients(inputs, blocks))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@each_backend
def test_large_scores_do_not_overflow(backend: str):
    inputs = make_inputs(CASES[2])
    inputs = replace(inputs, q=inputs.q * 300)
    blocks = selected(inputs, CASES[2].top_k)
    wanted = with_gradients(inputs.to(torch.float64), blocks, "reference")
    # Scores of some thousands carry a rounding error of some 1e-4 each into the exponent.
    assert_close(with_gradients(inputs, blocks, backend), wanted, 2e-3)


def test_inputs_need_not_be_contiguous():
    case = CASES[2]
    inputs = make_inputs(case)
    blocks = selected(inputs, case.top_k)
    strided = replace(
        inputs,
        q=inputs.q.transpose(0, 1).contiguous().transpose(0, 1),
        k=inputs.k.transpose(1, 2).contiguous().transpose(1, 2),
    )
    wanted = with_gradients(inputs, blocks)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(strided, blocks.long()), wanted, strict=True))


@each_backend
def test_lse_has_no_gradient_and_inference_keeps_no_graph(backend: str):
    case = CASES[1]
    inputs = make_inputs(case)
    blocks = selected(inputs, case.top_k)
    inputs.q.requires_grad_()
    out, lse = attend(inputs, blocks, backend)
    assert out.requires_grad and not lse.requires_grad
    with torch.no_grad():
        assert not attend(inputs, blocks, backend)[0].requires_grad


def test_what_does_not_fit_is_refused_in_one_line():
    case = CASES[1]
    inputs = make_inputs(case)
    blocks = selected(inputs, case.top_k)
    with pytest.raises(InputError, match="a multiple of the 3 kv heads expected, got 4"):
        attend(replace(inputs, q=inputs.q[:, :4]), blocks)
    with pytest.raises(InputError, match=r"blocks \[N, Hkv, K\] = \[60, 3, any\] expected, got \[60, 2, 3\]"):
        attend(inputs, blocks[:, :2])
    with pytest.raises(InputError, match="v_pages like k_pages"):
        attend(replace(inputs, v=inputs.v[:1]), blocks)
    with pytest.raises(InputError, match="q of a floating dtype expected"):
        attend(replace(inputs, q=inputs.q.long()), blocks)
    with pytest.raises(InputError, match="backend 'cpu': CPU tensors expected, got meta"):
        elsewhere = {name: getattr(inputs, name).to("meta") for name in ("q", "k", "v")}
        attend(replace(inputs, **elsewhere), blocks, "cpu")


def test_no_query_tokens_give_empty_results():
    inputs = take(make_inputs(CASES[1]), torch.empty(0, dtype=torch.int64))
    for backend in HERE:
        blocks = select_blocks(inputs.index_q, inputs.index_k, inputs.layout, 2, backend=backend)
        out, lse = attend(inputs, blocks, backend)
        assert out.shape == (0, 6, 7) and lse.shape == (0, 6)


def test_as_pages_carries_gradients_to_packed_rows():
    layout = PackedLayout.from_lengths([5, 9], 4)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(14, 2, 8, generator=rng).requires_grad_() for _ in range(3))
    blocks = torch.arange(3).repeat(14, 2, 1)
    own = (layout.positions // 4)[:, None, None]
    blocks = torch.where(blocks <= own, blocks, -1)
    out, _ = sparse_attention(q, as_pages(k, layout), as_pages(v, layout), blocks, layout)
    out.sum().backward()
    wanted = torch.cat(
        [dense_causal(*(x.detach()[rows] for x in (q, k, v))) for rows in (slice(5), slice(5, 14))]
    )
    torch.testing.assert_close(out, wanted)
    assert k.grad is not None and v.grad is not None and v.grad.abs().sum(dim=(1, 2)).min() > 0
