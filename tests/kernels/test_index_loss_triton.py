"""The index loss in Triton: value and gradients against float64, under the interpreter or on a GPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from longforge.errors import InputError
from longforge.kernels.index_loss import index_loss, plan
from longforge.kernels.index_loss import triton_backend as backend
from longforge.kernels.index_loss.cases import GPU_CASES, SMALL_CASES, Case, Inputs, make_inputs
from longforge.kernels.page_readers import cut
from longforge.kernels.select_blocks import select_blocks
from triton_device import DEVICES, build_problems, need, on

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
"""The interpreter computes with numpy, which warns of infinities that masks then take away."""
each_device = pytest.mark.parametrize("device", DEVICES)
each_support = pytest.mark.parametrize("warm_up", [False, True], ids=["selected", "warm-up"])
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest element of a result: some tens of rounding steps of each dtype."""


def support_of(inputs: Inputs, case: Case, warm_up: bool) -> Tensor | None:
    if warm_up:
        return None
    return select_blocks(inputs.index_q, inputs.index_k, inputs.layout, case.top_k, backend="reference")


def some_weights(inputs: Inputs) -> Tensor:
    weights = torch.rand(len(inputs.q), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weights[::4] = 0.0
    weights[0] = 2.0
    return weights.to(inputs.q.device)


def with_gradients(inputs: Inputs, blocks: Tensor | None, name: str = "triton", **options) -> list[Tensor]:
    """[loss, gradients of index_q, index_k]."""
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.index_q, inputs.index_k)]
    loss = index_loss(
        leaves[0], leaves[1], inputs.q, inputs.k, blocks, inputs.layout, backend=name, **options
    )
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]


def exact(inputs: Inputs, blocks: Tensor | None, **options) -> list[Tensor]:
    return with_gradients(inputs.to(torch.float64), blocks, "reference", **options)


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, g, w in zip(("loss", "d_index_q", "d_index_k"), got, wanted, strict=True):
        error = float((g.double() - w.double()).abs().max() / w.double().abs().max().clamp(min=1e-6))
        assert error <= tolerance, f"{name}: error {error:.2e}"


@each_device
@each_support
@pytest.mark.parametrize("case", SMALL_CASES[1:], ids=lambda c: c.name)
def test_loss_and_gradients_equal_float64(case: Case, warm_up: bool, device: str):
    need(device)
    inputs = on(device, make_inputs(case))
    blocks, weights = support_of(inputs, case, warm_up), some_weights(inputs)
    got = with_gradients(inputs, blocks, weights=weights, scale=0.3, index_scale=0.2)
    wanted = exact(inputs, blocks, weights=weights, scale=0.3, index_scale=0.2)
    assert_close(got, wanted, TOLERANCE[torch.float32])


@each_device
@each_support
def test_one_token_has_nothing_to_choose_from(warm_up: bool, device: str):
    need(device)
    inputs = on(device, make_inputs(SMALL_CASES[0]))
    results = with_gradients(inputs, support_of(inputs, SMALL_CASES[0], warm_up))
    assert all(float(x.abs().max()) < 2e-6 for x in results)


@each_device
@each_support
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_within_its_rounding(dtype: torch.dtype, warm_up: bool, device: str):
    need(device)
    case = SMALL_CASES[2]
    inputs = on(device, make_inputs(case, dtype))
    blocks = support_of(inputs, case, warm_up)
    got = with_gradients(inputs, blocks)
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
    assert_close(got, exact(inputs, blocks), TOLERANCE[dtype])


@each_device
@each_support
def test_rows_without_a_token_are_never_read(warm_up: bool, device: str):
    need(device)
    case = SMALL_CASES[1]
    inputs = on(device, make_inputs(case))
    empty = torch.isnan(inputs.index_k).all(2)
    results = with_gradients(inputs, support_of(inputs, case, warm_up))
    assert all(bool(torch.isfinite(x).all()) for x in results)
    assert bool(empty.any()) and not results[2][empty].any()


@each_device
@each_support
def test_chunks_and_pieces_do_not_change_the_loss(
    warm_up: bool, device: str, monkeypatch: pytest.MonkeyPatch
):
    need(device)
    case = SMALL_CASES[1]
    inputs = on(device, make_inputs(case))
    blocks, weights = support_of(inputs, case, warm_up), some_weights(inputs)
    monkeypatch.setattr(plan, "WORKSPACE", 1 << 13)
    monkeypatch.setattr(backend, "cut", lambda read, size: cut(read, 3))
    got = with_gradients(inputs, blocks, weights=weights)
    assert_close(got, exact(inputs, blocks, weights=weights), TOLERANCE[torch.float32])


@each_device
def test_no_weight_at_all_is_no_loss(device: str):
    need(device)
    inputs = on(device, make_inputs(SMALL_CASES[1]))
    results = with_gradients(inputs, None, weights=torch.zeros(len(inputs.q)))
    assert all(not x.any() for x in results)


@each_device
def test_value_alone_needs_no_gradients(device: str):
    need(device)
    case = SMALL_CASES[1]
    inputs = on(device, make_inputs(case))
    blocks = support_of(inputs, case, False)
    loss = index_loss(
        inputs.index_q, inputs.index_k, inputs.q, inputs.k, blocks, inputs.layout, backend="triton"
    )
    assert not loss.requires_grad and torch.equal(loss, with_gradients(inputs, blocks)[0])


def test_what_there_is_no_kernel_for_is_refused_in_one_line():
    need("cpu")
    inputs = make_inputs(SMALL_CASES[0], torch.float64)
    with pytest.raises(InputError, match="float32, bfloat16 or float16 expected, got"):
        with_gradients(inputs, None)


@pytest.mark.slow
def test_every_kernel_compiles_for_three_gpus_without_spills():
    assert build_problems("longforge.kernels.index_loss.triton_specs") == ""


@pytest.mark.gpu
@each_support
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.name)
def test_large_shapes_equal_float64(case: Case, dtype: torch.dtype, warm_up: bool):
    need("cuda")
    inputs = on("cuda", make_inputs(case, dtype))
    blocks, weights = support_of(inputs, case, warm_up), some_weights(inputs)
    got = with_gradients(inputs, blocks, weights=weights)
    assert_close(got, exact(inputs, blocks, weights=weights), TOLERANCE[dtype])
    again = with_gradients(inputs, blocks, weights=weights)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
