"""Grouped experts over torch's grouped product, which also runs on a CPU."""

import pytest
import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.grouped_experts import grouped_experts
from longforge.kernels.grouped_experts.api import BACKENDS, Activation
from longforge.kernels.grouped_experts.cases import ALIGNED_CASES, GPU_CASES, Case, make_inputs

pytestmark = pytest.mark.skipif("torch" not in BACKENDS, reason="this torch has no grouped_mm")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}
Inputs = tuple[Tensor, ...]


def with_gradients(inputs: Inputs, activation: Activation, name: str = "torch") -> list[Tensor]:
    """[out, gradients of x, gate_up, down, weights] for one random cotangent."""
    x, gate_up, down, ids, weights = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (x, gate_up, down, weights)]
    out = grouped_experts(*leaves[:3], ids, leaves[3], activation=activation, backend=name)
    rng = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def assert_close(got: list[Tensor], inputs: Inputs, activation: Activation, tolerance: float) -> None:
    exact = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    for g, w in zip(got, with_gradients(exact, activation, "reference"), strict=True):
        error = float((g.double() - w).abs().max() / w.abs().max().clamp(min=1e-3))
        assert error <= tolerance, f"error {error:.2e}"


@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", ALIGNED_CASES, ids=lambda c: c.name)
def test_output_and_gradients_equal_float64(case: Case, dtype: torch.dtype, activation: Activation):
    inputs = make_inputs(case, dtype, spread=3.0)
    got = with_gradients(inputs, activation)
    assert all(t.dtype == dtype for t in got)
    assert_close(got, inputs, activation, TOLERANCE[dtype])
    again = with_gradients(inputs, activation)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_experts_without_tokens_are_never_read_and_get_zero_gradients():
    x, gate_up, down, ids, weights = make_inputs(ALIGNED_CASES[1])
    unused = sorted(set(range(5)) - set(ids.flatten().tolist()))
    gate_up[unused], down[unused] = float("nan"), float("nan")
    got = with_gradients((x, gate_up, down, ids, weights), "silu")
    assert unused and all(bool(t.isfinite().all()) for t in got)
    assert not got[2][unused].any() and not got[3][unused].any()


def test_no_tokens_give_no_rows_and_zero_gradients():
    x, gate_up, down, ids, weights = make_inputs(ALIGNED_CASES[1])
    got = with_gradients((x[:0], gate_up, down, ids[:0], weights[:0]), "silu")
    assert [len(t) for t in got] == [0, 0, 5, 5, 0] and not any(t.any() for t in got)


def test_autocast_computes_in_bf16_and_gives_gradients_in_the_inputs_dtype():
    inputs = make_inputs(ALIGNED_CASES[2])
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(inputs, "silu")
    assert all(t.dtype == torch.float32 for t in got)
    assert not torch.equal(got[0], with_gradients(inputs, "silu")[0])
    assert_close(got, inputs, "silu", TOLERANCE[torch.bfloat16])


def test_what_the_product_does_not_take_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"d and I multiples of 4 expected \(16 bytes\), got 6 and 3"):
        with_gradients(make_inputs(Case(7, 6, 3, 5, 2, 3)), "silu")
    with pytest.raises(
        InputError, match=r"torch.bfloat16 or torch.float16 on cpu expected, got torch.float64"
    ):
        with_gradients(make_inputs(ALIGNED_CASES[0], torch.float64), "silu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.name)
def test_large_shapes_equal_float64_on_a_gpu(case: Case):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    inputs = tuple(t.cuda() for t in make_inputs(case, torch.bfloat16))
    assert_close(with_gradients(inputs, "silu"), inputs, "silu", TOLERANCE[torch.bfloat16])
