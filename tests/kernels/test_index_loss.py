"""The index loss: its value by the formula, its gradient by autograd, and whom it may teach."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.index_loss import index_loss, selection_recall
from longforge.kernels.index_loss.api import BACKENDS
from longforge.kernels.index_loss.cases import CASES, Case, Inputs, make_inputs
from longforge.kernels.select_blocks import select_blocks
from longforge.kernels.sparse_attention import sparse_attention

HERE = [name for name in BACKENDS if name != "triton"]
"""test_index_loss_triton.py is about the other."""
each_backend = pytest.mark.parametrize("backend", HERE)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
each_support = pytest.mark.parametrize("warm_up", [False, True], ids=["selected", "warm-up"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}
"""Of the largest element of a result: some tens of rounding steps of each dtype."""


def support_of(inputs: Inputs, case: Case, warm_up: bool) -> Tensor | None:
    return None if warm_up else select_blocks(inputs.index_q, inputs.index_k, inputs.layout, case.top_k)


def some_weights(inputs: Inputs) -> Tensor:
    weights = torch.rand(len(inputs.q), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weights[::4] = 0.0
    weights[0] = 2.0
    return weights


def loss_of(inputs: Inputs, blocks: Tensor | None, backend: str | None = None, **options) -> Tensor:
    return index_loss(
        inputs.index_q, inputs.index_k, inputs.q, inputs.k, blocks, inputs.layout, backend=backend, **options
    )


def with_gradients(
    inputs: Inputs, blocks: Tensor | None, backend: str | None = None, **options
) -> list[Tensor]:
    """[loss, gradients of index_q, index_k]."""
    inputs = replace(
        inputs,
        index_q=inputs.index_q.detach().clone().requires_grad_(),
        index_k=inputs.index_k.detach().clone().requires_grad_(),
    )
    loss = loss_of(inputs, blocks, backend, **options)
    return [loss.detach(), *torch.autograd.grad(3 * loss, (inputs.index_q, inputs.index_k))]


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, g, w in zip(("loss", "d_index_q", "d_index_k"), got, wanted, strict=True):
        error = float((g.double() - w.double()).abs().max() / w.double().abs().max().clamp(min=1e-6))
        assert error <= tolerance, f"{name}: error {error:.2e}"


def loss_by_hand(inputs: Inputs, blocks: Tensor | None, weights: Tensor) -> Tensor:
    """The formula token by token, on autograd: mean of KL(mean of the heads' softmaxes || the student's)."""
    layout, size = inputs.layout, inputs.layout.block_size
    groups = inputs.k.shape[2]
    per_group = inputs.q.shape[1] // groups
    total = weights.new_zeros(())
    for n in range(len(inputs.q)):
        path, position = int(layout.paths[n]), int(layout.positions[n])
        for g in range(groups):
            ids = range(position // size + 1) if blocks is None else blocks[n, g].tolist()
            seen = [(b, t) for b in ids if b >= 0 for t in range(size) if b * size + t <= position]
            where = [(int(layout.page_table[path, b]), t) for b, t in seen]
            keys = torch.stack([inputs.k[page, t, g] for page, t in where])
            index_keys = torch.stack([inputs.index_k[page, t] for page, t in where])
            heads = inputs.q[n, g * per_group : (g + 1) * per_group]
            teacher = (heads @ keys.T * heads.shape[1] ** -0.5).softmax(-1).mean(0).detach()
            logits = index_keys @ inputs.index_q[n, g] * index_keys.shape[1] ** -0.5
            divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), teacher, reduction="sum")
            total = total + weights[n] * divergence
    return total / (weights.sum() * groups)


@each_backend
@each_support
def test_loss_and_gradients_are_the_formula_on_autograd(warm_up: bool, backend: str):
    case = CASES[1]
    inputs = make_inputs(case, torch.float64)
    blocks, weights = support_of(inputs, case, warm_up), some_weights(inputs)
    leaves = [x.clone().requires_grad_() for x in (inputs.index_q, inputs.index_k)]
    loss = loss_by_hand(replace(inputs, index_q=leaves[0], index_k=leaves[1]), blocks, weights)
    wanted = [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]
    assert_close(with_gradients(inputs, blocks, backend, weights=weights), wanted, 1e-12)


@each_backend
@each_support
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each_case
def test_loss_and_gradients_equal_float64(case: Case, dtype: torch.dtype, warm_up: bool, backend: str):
    inputs = make_inputs(case, dtype)
    blocks, weights = support_of(inputs, case, warm_up), some_weights(inputs)
    wanted = with_gradients(inputs.to(torch.float64), blocks, "reference", weights=weights)
    got = with_gradients(inputs, blocks, backend, weights=weights)
    assert [t.dtype for t in got] == [
        torch.float64 if dtype == torch.float64 else torch.float32,
        dtype,
        dtype,
    ]
    assert_close(got, wanted, TOLERANCE[dtype])


@each_backend
def test_scales_are_used(backend: str):
    case = CASES[1]
    inputs = make_inputs(case, torch.float64)
    blocks = support_of(inputs, case, False)
    stretched = replace(inputs, q=2 * inputs.q, index_q=3 * inputs.index_q)
    wanted = loss_of(stretched, blocks, backend)
    scales = {"scale": 2 * case.dim**-0.5, "index_scale": 3 * case.index_dim**-0.5}
    torch.testing.assert_close(loss_of(inputs, blocks, backend, **scales), wanted, rtol=1e-12, atol=1e-12)


@each_backend
def test_warm_up_is_the_loss_of_all_blocks(backend: str):
    inputs = make_inputs(CASES[1], torch.float64)
    every = select_blocks(inputs.index_q, inputs.index_k, inputs.layout, 20)
    got = with_gradients(inputs, None, backend)
    assert_close(got, with_gradients(inputs, every, backend), 1e-12)


@each_backend
@each_support
def test_a_perfect_student_has_no_loss_and_no_gradient(warm_up: bool, backend: str):
    case = Case((41, 6), 1, 1, 8, 8, 4, 3)
    inputs = make_inputs(case, torch.float64)
    inputs = replace(inputs, index_q=inputs.q, index_k=inputs.k[:, :, 0])
    results = with_gradients(inputs, support_of(inputs, case, warm_up), backend)
    assert all(float(x.abs().max()) < 1e-14 for x in results)


@each_backend
def test_language_loss_and_index_loss_teach_different_tensors(backend: str):
    """No gradient of attention reaches the index branch, none of the index loss reaches queries and keys."""
    case = CASES[2]
    inputs = make_inputs(case)
    leaves = {name: getattr(inputs, name).requires_grad_() for name in ("index_q", "index_k", "q", "k", "v")}
    blocks = select_blocks(inputs.index_q, inputs.index_k, inputs.layout, case.top_k, backend=backend)
    out, _ = sparse_attention(inputs.q, inputs.k, inputs.v, blocks, inputs.layout, backend=backend)
    out.square().sum().backward()
    assert [name for name, x in leaves.items() if x.grad is not None] == ["q", "k", "v"]
    for x in leaves.values():
        x.grad = None
    (loss_of(inputs, blocks, backend) + loss_of(inputs, None, backend)).backward()
    assert [name for name, x in leaves.items() if x.grad is not None] == ["index_q", "index_k"]


@each_backend
@each_support
def test_weights_are_multiplicities(warm_up: bool, backend: str):
    """A path that counts three times weighs as the same path packed three times."""
    case = CASES[1]
    inputs = make_inputs(case, torch.float64)
    layout, blocks = inputs.layout, support_of(inputs, case, warm_up)
    first, rest = (layout.paths == 0).nonzero().flatten(), (layout.paths > 0).nonzero().flatten()
    rows = torch.cat([first, first, first, rest])
    copies = [torch.full_like(first, i) for i in range(3)]
    paths = torch.cat([*copies, layout.paths[rest] + 2])
    table = torch.cat([layout.page_table[:1]] * 3 + [layout.page_table[1:]])
    packed = replace(
        layout, positions=layout.positions[rows], paths=paths, slots=layout.slots[rows], page_table=table
    )
    thrice = replace(inputs, layout=packed, index_q=inputs.index_q[rows], q=inputs.q[rows])
    loss, _, d_index_k = with_gradients(thrice, blocks if blocks is None else blocks[rows], backend)
    weights = torch.where(layout.paths == 0, 3.0, 1.0)
    wanted_loss, _, wanted_d_index_k = with_gradients(inputs, blocks, backend, weights=weights)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d_index_k, wanted_d_index_k, rtol=1e-12, atol=1e-14)


@each_backend
def test_no_weight_at_all_is_no_loss(backend: str):
    inputs = make_inputs(CASES[1])
    results = with_gradients(inputs, None, backend, weights=torch.zeros(len(inputs.q)))
    assert all(not x.any() for x in results)


@each_backend
@each_support
def test_rows_without_a_token_are_never_read(warm_up: bool, backend: str):
    case = CASES[1]
    inputs = make_inputs(case)
    empty = torch.isnan(inputs.index_k).all(2)
    results = with_gradients(inputs, support_of(inputs, case, warm_up), backend)
    assert all(bool(torch.isfinite(x).all()) for x in results)
    assert bool(empty.any()) and not results[2][empty].any()


@each_support
def test_repeats_and_thread_numbers_give_the_same_bits(warm_up: bool):
    case = Case((300, 200, 90), 8, 4, 32, 32, 16, 8)
    inputs = make_inputs(case)
    blocks = support_of(inputs, case, warm_up)
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


def test_following_the_gradient_raises_recall():
    """What the loss is for: a selector trained on it finds more of attention's mass."""
    case = Case((160,), 4, 2, 8, 8, 4, 4)
    inputs = make_inputs(case)
    inputs = replace(inputs, q=3 * inputs.q)
    leaves = [x.clone().requires_grad_() for x in (inputs.index_q, torch.nan_to_num(inputs.index_k))]
    student = replace(inputs, index_q=leaves[0], index_k=leaves[1])

    def recall() -> float:
        blocks = select_blocks(student.index_q, student.index_k, student.layout, case.top_k)
        return float(selection_recall(inputs.q, inputs.k, blocks, inputs.layout))

    optimiser = torch.optim.Adam(leaves, lr=0.05)
    before = recall()
    for _ in range(60):
        optimiser.zero_grad()
        loss_of(student, None).backward()
        optimiser.step()
    assert recall() > before + 0.1


def test_recall_is_the_captured_mass():
    case = CASES[1]
    inputs = make_inputs(case, torch.float64)
    chosen = select_blocks(inputs.index_q, inputs.index_k, inputs.layout, case.top_k)
    every = select_blocks(inputs.index_q, inputs.index_k, inputs.layout, 20)
    # The mass of the chosen tokens is the ratio of the two sums of exponentials.
    own, full = (
        sparse_attention(inputs.q, inputs.k, inputs.v, blocks, inputs.layout)[1].double()
        for blocks in (chosen, every)
    )
    got = selection_recall(inputs.q, inputs.k, chosen, inputs.layout)
    assert got.dtype == torch.float64 and got.shape == ()
    torch.testing.assert_close(got, (own - full).exp().mean(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        selection_recall(inputs.q, inputs.k, every, inputs.layout), torch.tensor(1.0, dtype=torch.float64)
    )


def test_what_does_not_fit_is_refused_in_one_line():
    inputs = make_inputs(CASES[1])
    with pytest.raises(InputError, match="weights of at least 0 expected"):
        loss_of(inputs, None, weights=torch.full((len(inputs.q),), -1.0))
    with pytest.raises(InputError, match=r"weights \[N\] = \[60\] expected, got \[3\]"):
        loss_of(inputs, None, weights=torch.ones(3))
    with pytest.raises(InputError, match=r"index_q \[N, Hkv, Di\] = \[any, 3, any\] expected"):
        loss_of(replace(inputs, index_q=inputs.index_q[:, :2]), None)
    with pytest.raises(InputError, match=r"index_k_pages \[S, Bk, Di\]"):
        loss_of(replace(inputs, index_k=inputs.index_k[1:]), None)
    with pytest.raises(InputError, match=r"lse in float32 on cpu expected, got torch.int64 on cpu"):
        lse = torch.zeros(inputs.q.shape[:2], dtype=torch.int64)
        index_loss(inputs.index_q, inputs.index_k, inputs.q, inputs.k, None, inputs.layout, lse=lse)
