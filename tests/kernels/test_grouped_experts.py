"""Grouped experts: every backend and every gradient against float64 autograd over the readable reference."""

import pytest
import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.grouped_experts import grouped_experts
from longforge.kernels.grouped_experts.api import BACKENDS, Activation
from longforge.kernels.grouped_experts.cases import CASES, Case, make_inputs

HERE = [name for name in BACKENDS if name not in ("triton", "torch")]
"""The others have dtypes and widths that they want, and tests of their own."""
ACTIVATIONS: tuple[Activation, ...] = ("silu", "swiglu_oai")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Relative to the largest element: float64 rounding, fp32 sums of up to 50 terms, bf16 products."""


def with_gradients(
    inputs: tuple[Tensor, ...], activation: Activation, backend: str, seed: int = 1
) -> list[Tensor]:
    """[out, gradients of x, gate_up, down, weights] for one random cotangent."""
    x, gate_up, down, ids, weights = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (x, gate_up, down, weights)]
    out = grouped_experts(
        leaves[0], leaves[1], leaves[2], ids, leaves[3], activation=activation, backend=backend
    )
    rng = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, g, w in zip(("out", "x", "gate_up", "down", "weights"), got, wanted, strict=True):
        error = float((g.double() - w.double()).abs().max() / w.double().abs().max().clamp(min=1e-3))
        assert error <= tolerance, f"{name}: error {error:.2e}"


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_output_and_gradients_equal_float64(
    case: Case, dtype: torch.dtype, activation: Activation, backend: str
):
    inputs = make_inputs(case, dtype)
    exact = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    wanted = with_gradients(exact, activation, "reference")
    assert_close(with_gradients(inputs, activation, backend), wanted, TOLERANCE[dtype])


def test_reference_is_the_formula_written_out_per_token():
    x, gate_up, down, ids, weights = make_inputs(CASES[1], torch.float64, spread=20.0)
    inner = CASES[1].inner
    out = torch.zeros_like(x)
    for n in range(len(x)):
        for j, expert in enumerate(ids[n].tolist()):
            gate = (gate_up[expert, :inner] @ x[n]).clamp(max=7.0)
            up = (gate_up[expert, inner:] @ x[n]).clamp(-7.0, 7.0)
            hidden = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
            out[n] += weights[n, j] * (down[expert] @ hidden)
    got = grouped_experts(x, gate_up, down, ids, weights, activation="swiglu_oai", backend="reference")
    torch.testing.assert_close(got, out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", HERE)
def test_an_expert_without_tokens_gets_zero_gradients_even_next_to_nan_weights(backend: str):
    x, gate_up, down, ids, weights = make_inputs(CASES[1])
    unused = sorted(set(range(CASES[1].experts)) - set(ids.flatten().tolist()))
    assert unused
    gate_up[unused], down[unused] = float("nan"), float("nan")
    out, d_x, d_gate_up, d_down, d_weights = with_gradients(
        (x, gate_up, down, ids, weights), "swiglu_oai", backend
    )
    assert out.isfinite().all() and d_x.isfinite().all() and d_weights.isfinite().all()
    assert (d_gate_up[unused] == 0).all() and (d_down[unused] == 0).all()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(
    "gate, up, passes_gate, passes_up",
    [
        (7.0, 7.0, True, True),
        (7.5, 1.0, False, True),
        (-9.0, 7.5, True, False),
        (1.0, -7.5, True, False),
        (-9.0, -7.0, True, True),
    ],
)
def test_clamp_edges_stop_the_gradient_beyond_the_limit_only(
    gate: float, up: float, passes_gate: bool, passes_up: bool, backend: str
):
    x = torch.ones(1, 1, dtype=torch.float64)
    gate_up = torch.tensor([[[gate], [up]]], dtype=torch.float64, requires_grad=True)
    down = torch.ones(1, 1, 1, dtype=torch.float64)
    ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.float64)
    out = grouped_experts(x, gate_up, down, ids, weights, activation="swiglu_oai", backend=backend)
    g, u = min(gate, 7.0), min(max(up, -7.0), 7.0)
    torch.testing.assert_close(out.item(), (u + 1) * g / (1 + torch.tensor(-1.702 * g).double().exp().item()))
    (gradient,) = torch.autograd.grad(out.sum(), gate_up)
    assert bool(gradient[0, 0, 0] != 0) == passes_gate
    assert bool(gradient[0, 1, 0] != 0) == passes_up


@pytest.mark.parametrize("backend", HERE)
def test_order_of_tokens_and_of_choices_does_not_matter(backend: str):
    x, gate_up, down, ids, weights = make_inputs(CASES[2], torch.float64)
    rng = torch.Generator().manual_seed(3)
    tokens = torch.randperm(len(x), generator=rng)
    choices = torch.randperm(ids.shape[1], generator=rng)
    plain = grouped_experts(x, gate_up, down, ids, weights, activation="silu", backend=backend)
    mixed = grouped_experts(
        x[tokens],
        gate_up,
        down,
        ids[tokens][:, choices],
        weights[tokens][:, choices],
        activation="silu",
        backend=backend,
    )
    torch.testing.assert_close(mixed, plain[tokens], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", HERE)
def test_the_same_expert_chosen_twice_counts_twice(backend: str):
    x, gate_up, down, _, weights = make_inputs(CASES[1], torch.float64)
    twice = torch.full_like(weights, 2, dtype=torch.int64)
    once = grouped_experts(
        x, gate_up, down, twice[:, :1], weights.sum(1, keepdim=True), activation="silu", backend=backend
    )
    both = grouped_experts(x, gate_up, down, twice, weights, activation="silu", backend=backend)
    torch.testing.assert_close(both, once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", HERE)
def test_no_tokens_give_no_rows_and_zero_gradients(backend: str):
    x, gate_up, down, ids, weights = make_inputs(CASES[1])
    out, d_x, d_gate_up, d_down, d_weights = with_gradients(
        (x[:0], gate_up, down, ids[:0], weights[:0]), "silu", backend
    )
    assert out.shape == d_x.shape == (0, CASES[1].width) and d_weights.shape == (0, 2)
    assert (d_gate_up == 0).all() and (d_down == 0).all()


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_input_leaves_the_other_gradients_as_they_are(frozen: int):
    inputs = make_inputs(CASES[2], torch.float64)
    wanted = with_gradients(inputs, "swiglu_oai", "reference")[1:]
    x, gate_up, down, ids, weights = inputs
    leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate((x, gate_up, down, weights))]
    out = grouped_experts(
        leaves[0], leaves[1], leaves[2], ids, leaves[3], activation="swiglu_oai", backend="cpu"
    )
    rng = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=rng, dtype=torch.float64))
    for i, leaf in enumerate(leaves):
        if i == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, wanted[i], rtol=1e-11, atol=1e-11)


def test_autocast_computes_in_bf16_and_gives_gradients_in_the_inputs_dtype():
    inputs = make_inputs(CASES[2])
    wanted = with_gradients(inputs, "swiglu_oai", "reference")
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(inputs, "swiglu_oai", "cpu")
        mixed = grouped_experts(inputs[0].bfloat16(), *inputs[1:], activation="swiglu_oai", backend="cpu")
    assert all(g.dtype == torch.float32 for g in got)
    assert mixed.dtype == torch.bfloat16
    assert not torch.equal(got[0], wanted[0])
    assert_close(got, wanted, TOLERANCE[torch.bfloat16])


def test_two_runs_give_the_same_bits():
    inputs = make_inputs(CASES[2])
    first, second = (with_gradients(inputs, "swiglu_oai", "cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"expert_ids": torch.full((7, 2), 5)}, r"expert_ids in 0\.\.4 expected, got 5\.\.5"),
        ({"expert_ids": torch.full((7, 2), -1)}, "expert_ids in 0..4"),
        ({"expert_ids": torch.zeros(7, 2, dtype=torch.int32)}, "int64"),
        ({"weights": torch.ones(7, 3)}, "weights like expert_ids"),
        ({"gate_up": torch.ones(5, 5, 6)}, "2I rows"),
        ({"down": torch.ones(5, 3, 6)}, "down"),
        ({"x": torch.ones(7, 6, dtype=torch.float64)}, "gate_up like x"),
        ({"activation": "relu"}, "'silu' or 'swiglu_oai' expected, got 'relu'"),
        ({"backend": "cuda"}, "backend: one of cpu, reference"),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(change: dict, message: str):
    x, gate_up, down, ids, weights = make_inputs(CASES[1])
    arguments = {
        "x": x,
        "gate_up": gate_up,
        "down": down,
        "expert_ids": ids,
        "weights": weights,
        "activation": "silu",
    }
    with pytest.raises(InputError, match=message) as error:
        grouped_experts(**(arguments | change))
    assert "\n" not in str(error.value)
