"""Grouped experts in Triton: values and gradients against float64, under the interpreter or on a GPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from longforge.errors import InputError
from longforge.kernels.grouped_experts import grouped_experts, plan
from longforge.kernels.grouped_experts import triton_backend as backend
from longforge.kernels.grouped_experts.api import Activation
from longforge.kernels.grouped_experts.cases import CASES, GPU_CASES, Case, make_inputs
from longforge.kernels.grouped_experts.order import most_tiles, sorted_by_expert, tiles
from triton_device import DEVICES, build_problems, need

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
"""The interpreter computes with numpy, which warns of infinities that masks then take away."""
each_device = pytest.mark.parametrize("device", DEVICES)
interpreted = pytest.mark.parametrize("device", ["cpu"])
"""On a GPU each new shape costs seconds of compilation, so there small cases are few."""
each_activation = pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
NAMES = ("out", "x", "gate_up", "down", "weights")
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Of the largest element of a result: some tens of rounding steps of each dtype."""
LARGE = {**TOLERANCE, torch.float32: 2e-5}
"""Sums of thousands of terms."""

Inputs = tuple[Tensor, ...]


def given(case: Case, device: str, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> Inputs:
    return tuple(t.to(device) for t in make_inputs(case, dtype, spread=spread))


def run(inputs: Inputs, activation: Activation, name: str = "triton") -> Tensor:
    x, gate_up, down, ids, weights = inputs
    return grouped_experts(x, gate_up, down, ids, weights, activation=activation, backend=name)


def with_gradients(inputs: Inputs, activation: Activation, name: str = "triton") -> list[Tensor]:
    """[out, gradients of x, gate_up, down, weights] for one random cotangent."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    out = run(tuple(leaves), activation, name)
    rng = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t.requires_grad], cotangent)]


def exact(inputs: Inputs, activation: Activation) -> list[Tensor]:
    wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    return with_gradients(wide, activation, "reference")


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, g, w in zip(NAMES, got, wanted, strict=False):
        error = float((g.double() - w.double()).abs().max() / w.double().abs().max().clamp(min=1e-3))
        assert error <= tolerance, f"{name}: error {error:.2e}"


@interpreted
@each_activation
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_output_and_gradients_equal_float64(case: Case, activation: Activation, device: str):
    need(device)
    inputs = given(case, device)
    wanted = exact(inputs, activation)
    assert_close(with_gradients(inputs, activation), wanted, TOLERANCE[torch.float32])
    assert_close([run(inputs, activation)], wanted, TOLERANCE[torch.float32])


@interpreted
@each_activation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_within_its_rounding(dtype: torch.dtype, activation: Activation, device: str):
    need(device)
    inputs = given(CASES[1], device, dtype)
    got = with_gradients(inputs, activation)
    assert [x.dtype for x in got] == [dtype] * 5
    assert_close(got, exact(inputs, activation), TOLERANCE[dtype])


@interpreted
def test_widths_of_several_tiles(device: str, monkeypatch: pytest.MonkeyPatch):
    need(device)
    monkeypatch.setattr(plan, "for_rows", lambda rows, *_: plan.Tile(rows, 16, 16, 4, 1))
    monkeypatch.setattr(plan, "for_outer_products", lambda *_: plan.Tile(16, 32, 16, 4, 1))
    inputs = given(Case(19, 33, 18, 2, 1, 2), device)
    assert_close(with_gradients(inputs, "silu"), exact(inputs, "silu"), TOLERANCE[torch.float32])


@each_device
def test_experts_without_tokens_are_never_read_and_get_zero_gradients(device: str):
    need(device)
    x, gate_up, down, ids, weights = given(CASES[1], device)
    unused = sorted(set(range(CASES[1].experts)) - set(ids.flatten().tolist()))
    assert unused
    gate_up[unused], down[unused] = float("nan"), float("nan")
    inputs = x, gate_up, down, ids, weights
    out, d_x, d_gate_up, d_down, d_weights = with_gradients(inputs, "swiglu_oai")
    assert all(bool(t.isfinite().all()) for t in (out, run(inputs, "swiglu_oai"), d_x, d_weights))
    assert not d_gate_up[unused].any() and not d_down[unused].any()


@interpreted
def test_all_tokens_may_choose_one_expert_even_twice(device: str):
    need(device)
    x, gate_up, down, ids, weights = given(CASES[2], device)
    inputs = x, gate_up, down, torch.full_like(ids, 2), weights
    wanted = exact(inputs, "silu")
    assert_close(with_gradients(inputs, "silu"), wanted, TOLERANCE[torch.float32])
    assert_close([run(inputs, "silu")], wanted, TOLERANCE[torch.float32])


@each_device
def test_many_pairs_are_sorted_and_give_the_same_bits(device: str, monkeypatch: pytest.MonkeyPatch):
    need(device)
    inputs = given(CASES[1], device)
    few = run(inputs, "silu")
    monkeypatch.setattr(plan, "FEW_PAIRS", 0)
    assert torch.equal(run(inputs, "silu"), few)


@each_device
@pytest.mark.parametrize("pairs, experts", [(1, 1), (70, 3), (200, 7), (40, 300)])
def test_tiles_cover_every_row_once_whichever_way_they_are_found(pairs: int, experts: int, device: str):
    need(device)
    rng = torch.Generator().manual_seed(pairs)
    ids = torch.randint(0, experts, (pairs, 1), generator=rng).to(device)
    order = sorted_by_expert(ids, experts)
    pair, counted = backend._ranked(ids, experts, 16)
    assert torch.equal(pair, order.pair)
    for cut in (counted, tiles(order, 16)):
        assert len(cut.count) <= max(pairs, most_tiles(pairs, experts, 16))
        rows = []
        for expert, first, count in zip(*(t.tolist() for t in cut), strict=True):
            assert 0 <= count <= 16
            assert (ids.flatten()[order.pair[first : first + count]] == expert).all()
            rows += range(first, first + count)
        assert sorted(rows) == list(range(pairs))


def test_few_pairs_and_many_experts_mean_few_tiles():
    assert most_tiles(pairs=8, experts=256, size=16) == 8
    assert most_tiles(pairs=4096 * 8, experts=256, size=128) == 256 + 256
    assert plan.rows_of_tile(8, 256, torch.bfloat16) == 16
    assert plan.rows_of_tile(4096 * 8, 256, torch.bfloat16) == 128


@each_device
def test_ids_that_no_expert_has_touch_nothing_else(device: str):
    """On a GPU ids are not looked at beforehand: the rows of other tokens have to stay as they are."""
    need(device)
    x, gate_up, down, ids, weights = given(CASES[1], device)
    wanted = run((x, gate_up, down, ids, weights), "silu")
    wrong = ids.clone()
    wrong[3, 0], wrong[5, 1] = -1, CASES[1].experts
    got = backend.grouped_experts(x, gate_up, down, wrong, weights, "silu", 1.702, 7.0)
    right = [0, 1, 2, 4, 6]
    assert torch.equal(got[right], wanted[right])


@each_device
def test_no_tokens_give_no_rows_and_zero_gradients(device: str):
    need(device)
    x, gate_up, down, ids, weights = given(CASES[1], device)
    inputs = x[:0], gate_up, down, ids[:0], weights[:0]
    out, d_x, d_gate_up, d_down, d_weights = with_gradients(inputs, "silu")
    assert out.shape == d_x.shape == run(inputs, "silu").shape == (0, 6) and d_weights.shape == (0, 2)
    assert not d_gate_up.any() and not d_down.any()


@interpreted
@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_input_leaves_the_other_gradients_as_they_are(frozen: int, device: str):
    need(device)
    x, gate_up, down, ids, weights = given(CASES[1], device)
    wanted = with_gradients((x, gate_up, down, ids, weights), "swiglu_oai")[1:]
    leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate((x, gate_up, down, weights))]
    out = run((*leaves[:3], ids, leaves[3]), "swiglu_oai")
    rng = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out))
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (i == frozen)
        assert leaf.grad is None or torch.equal(leaf.grad, wanted[i])


@each_device
def test_autocast_computes_in_bf16_and_gives_gradients_in_the_inputs_dtype(device: str):
    need(device)
    inputs = given(CASES[1], device)
    wanted = exact(inputs, "silu")
    with torch.autocast(device, torch.bfloat16):
        got = with_gradients(inputs, "silu")
    assert all(x.dtype == torch.float32 for x in got)
    assert not torch.equal(got[0], run(inputs, "silu"))
    assert_close(got, wanted, TOLERANCE[torch.bfloat16])


def test_what_there_is_no_kernel_for_is_refused_in_one_line():
    need("cpu")
    with pytest.raises(InputError, match="float32, bfloat16 or float16 expected, got"):
        run(given(CASES[0], "cpu", torch.float64), "silu")


@pytest.mark.slow
def test_every_kernel_compiles_for_three_gpus_without_spills():
    assert build_problems("longforge.kernels.grouped_experts.triton_specs") == ""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case, dtype, activation",
    [
        (GPU_CASES[0], torch.bfloat16, "swiglu_oai"),
        (GPU_CASES[0], torch.float32, "silu"),
        (GPU_CASES[1], torch.bfloat16, "silu"),
        (GPU_CASES[2], torch.float16, "swiglu_oai"),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_large_shapes_equal_float64(case: Case, dtype: torch.dtype, activation: Activation):
    need("cuda")
    inputs = given(case, "cuda", dtype, spread=1.0)
    wanted = exact(inputs, activation)
    got = with_gradients(inputs, activation)
    assert_close(got, wanted, LARGE[dtype])
    assert_close([run(inputs, activation)], wanted, LARGE[dtype])
    again = with_gradients(inputs, activation)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES[2:], ids=lambda c: c.name)
@torch.no_grad()
def test_decode_asks_the_device_nothing_and_runs_in_a_graph(case: Case):
    need("cuda")
    inputs = given(case, "cuda", torch.bfloat16, spread=1.0)
    wanted = run(inputs, "silu")
    assert_close(
        [wanted],
        [run(tuple(t.double() if t.is_floating_point() else t for t in inputs), "silu", "reference")],
        TOLERANCE[torch.bfloat16],
    )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, "silu")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(inputs, "silu")
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)
