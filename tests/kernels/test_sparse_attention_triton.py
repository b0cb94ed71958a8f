"""Block-sparse attention in Triton: every order of work against float64, interpreted or on a GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout
from longforge.kernels.select_blocks import select_blocks
from longforge.kernels.sparse_attention import plan, reference
from longforge.kernels.sparse_attention import triton_backend as backend
from longforge.kernels.sparse_attention.cases import GPU_CASES, SMALL_CASES, Case, Inputs, make_inputs, take
from triton_device import DEVICES, build_problems, need, on

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
"""The interpreter computes with numpy, which warns of infinities that masks then take away."""
each_device = pytest.mark.parametrize("device", DEVICES)
each_order = pytest.mark.parametrize("order", ["query", "split", "page"])
NAMES = ("out", "lse", "d_q", "d_k", "d_v")
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest element of a result: some tens of rounding steps of each dtype."""
LSE_TOLERANCE = 2e-6
"""The log-sum-exp comes in fp32, whatever went in."""


def selected(inputs: Inputs, top_k: int) -> Tensor:
    return select_blocks(inputs.index_q, inputs.index_k, inputs.layout, top_k, backend="reference")


def with_gradients(inputs: Inputs, blocks: Tensor, compute: Any, *options: Any) -> list[Tensor]:
    """[out, lse, gradients of q, k, v] for one random cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out, lse = compute(*leaves, blocks, inputs.layout, inputs.q.shape[2] ** -0.5, *options)
    rng = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, cotangent)]


def exact(inputs: Inputs, blocks: Tensor) -> list[Tensor]:
    return with_gradients(inputs.to(torch.float64), blocks, reference.sparse_attention)


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, g, w in zip(NAMES, got, wanted, strict=False):
        error = float((g.double() - w.double()).abs().max() / w.double().abs().max().clamp(min=1e-3))
        assert error <= (LSE_TOLERANCE if name == "lse" else tolerance), f"{name}: error {error:.2e}"


@each_device
@each_order
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda c: c.name)
def test_output_and_gradients_equal_float64(case: Case, order: str, device: str):
    need(device)
    inputs = on(device, make_inputs(case))
    blocks = selected(inputs, case.top_k)
    got = with_gradients(inputs, blocks, backend.sparse_attention, order)
    assert_close(got, exact(inputs, blocks), TOLERANCE[torch.float32])


@each_device
@each_order
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_within_its_rounding(dtype: torch.dtype, order: str, device: str):
    need(device)
    case = SMALL_CASES[2]
    inputs = on(device, make_inputs(case, dtype))
    blocks = selected(inputs, case.top_k)
    got = with_gradients(inputs, blocks, backend.sparse_attention, order)
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype, dtype]
    assert_close(got, exact(inputs, blocks), TOLERANCE[dtype])


@each_device
@each_order
def test_rows_without_a_token_are_never_read(order: str, device: str):
    need(device)
    case = SMALL_CASES[1]
    inputs = on(device, make_inputs(case))
    empty = torch.isnan(inputs.k).flatten(2).all(2)
    assert bool(empty.any()), "the case has rows without a token"
    results = with_gradients(inputs, selected(inputs, case.top_k), backend.sparse_attention, order)
    assert all(bool(torch.isfinite(x).all()) for x in results)
    assert not results[3][empty].any() and not results[4][empty].any()


@each_device
@each_order
def test_blocks_that_no_query_selected_are_never_read(order: str, device: str):
    need(device)
    case = Case((32,), 4, 2, 16, 16, 4, 2)
    inputs = on(device, take(make_inputs(case), torch.arange(29, 32)))
    own = inputs.layout.positions // case.block_size
    blocks = torch.stack([torch.zeros_like(own), own], 1)[:, None].expand(-1, case.groups, -1).int()
    wanted = with_gradients(inputs, blocks, backend.sparse_attention, order)
    unread = inputs.layout.page_table[0, 1:7].long()
    hidden = {name: getattr(inputs, name).index_fill(0, unread, float("nan")) for name in ("k", "v")}
    got = with_gradients(replace(inputs, **hidden), blocks, backend.sparse_attention, order)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@each_device
@each_order
def test_slots_without_a_block_may_stand_anywhere(order: str, device: str):
    """The block that holds the query first, then none, then another: the same numbers up to rounding."""
    need(device)
    case = Case((11,), 2, 1, 16, 16, 4, 4)
    inputs = on(device, take(make_inputs(case), torch.tensor([5, 9, 10])))
    blocks = torch.tensor([[-1, 0, -1, 1], [2, -1, 0, -1], [-1, -1, 2, 1]], dtype=torch.int32)[:, None]
    got = with_gradients(inputs, blocks.to(device), backend.sparse_attention, order)
    assert_close(got, exact(inputs, blocks.to(device)), TOLERANCE[torch.float32])


def shared_pages() -> tuple[Inputs, Tensor]:
    """Two paths whose first two pages are the same physical ones, and which each query selects."""
    size, groups, dim = 4, 2, 16
    layout = PackedLayout(
        torch.arange(8, 14).repeat(2),
        torch.tensor([0] * 6 + [1] * 6),
        torch.tensor([8, 9, 10, 11, 12, 13, 16, 17, 18, 19, 20, 21]),
        torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]], dtype=torch.int32),
        size,
    )
    rng = torch.Generator().manual_seed(3)
    q = torch.randn(12, 4, dim, generator=rng)
    k, v = (torch.randn(6, size, groups, dim, generator=rng) for _ in range(2))
    own = (layout.positions // size)[:, None].expand(-1, groups)
    blocks = torch.stack([torch.zeros_like(own), torch.ones_like(own), own], 2).int()
    return Inputs(layout, q[:, :groups], k[:, :, 0], q, k, v), blocks


@each_device
@each_order
def test_pages_of_several_paths_get_the_sum_of_their_gradients(order: str, device: str):
    need(device)
    inputs, blocks = shared_pages()
    inputs, blocks = on(device, inputs), blocks.to(device)
    got = with_gradients(inputs, blocks, backend.sparse_attention, order)
    assert_close(got, exact(inputs, blocks), TOLERANCE[torch.float32])


@each_device
@pytest.mark.parametrize("order", ["query", "page"])
def test_a_page_that_many_read_is_summed_in_pieces(order: str, device: str, monkeypatch: pytest.MonkeyPatch):
    need(device)
    inputs, blocks = shared_pages()
    inputs, blocks = on(device, inputs), blocks.to(device)
    monkeypatch.setattr(plan, "gradient_piece", lambda shape: 5)
    got = with_gradients(inputs, blocks, backend.sparse_attention, order)
    assert_close(got, exact(inputs, blocks), TOLERANCE[torch.float32])
    again = with_gradients(inputs, blocks, backend.sparse_attention, order)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@each_device
def test_little_workspace_means_more_chunks(device: str, monkeypatch: pytest.MonkeyPatch):
    need(device)
    inputs, blocks = shared_pages()
    inputs, blocks = on(device, inputs), blocks.to(device)
    wanted = with_gradients(inputs, blocks, backend.sparse_attention, "page")
    monkeypatch.setattr(plan, "WORKSPACE", 1 << 13)
    assert 1 < plan.queries_per_chunk(plan.shape_of(inputs.q, blocks, inputs.layout)) < 12
    got = with_gradients(inputs, blocks, backend.sparse_attention, "page")
    assert_close(got, wanted, TOLERANCE[torch.float32])


@each_device
@each_order
def test_chunks_attend_to_the_bit_as_the_whole_does(order: Any, device: str):
    need(device)
    case = SMALL_CASES[1]
    inputs = on(device, make_inputs(case))
    blocks = selected(inputs, case.top_k)
    out, lse = attend(inputs, blocks, order)
    for rows in torch.arange(len(out), device=device).split(9):
        part = attend(take(inputs, rows), blocks[rows], order)
        # By page, a query stands in another row of its tile, which numpy's products may round otherwise.
        if order == "page" and device == "cpu":
            assert_close(list(part), [out[rows], lse[rows]], TOLERANCE[torch.float32])
        else:
            assert torch.equal(part[0], out[rows]) and torch.equal(part[1], lse[rows])


def attend(inputs: Inputs, blocks: Tensor, order: Any = None) -> tuple[Tensor, Tensor]:
    scale = inputs.q.shape[2] ** -0.5
    return backend.sparse_attention(inputs.q, inputs.k, inputs.v, blocks, inputs.layout, scale, order)


@each_device
@each_order
def test_pages_may_be_views_of_a_larger_pool(order: Any, device: str):
    need(device)
    case = SMALL_CASES[4]
    inputs = on(device, make_inputs(case))
    blocks = selected(inputs, case.top_k)
    pool = torch.stack([inputs.k, inputs.v], 2)
    views = replace(inputs, k=pool[:, :, 0], v=pool[:, :, 1])
    assert not views.k.is_contiguous()
    for g, w in zip(attend(views, blocks.long(), order), attend(inputs, blocks, order), strict=True):
        assert torch.equal(g, w)


def test_the_order_follows_the_shape():
    def order(tokens: int, per_group: int, block_size: int, pages: int) -> str:
        return plan.choose_order(plan.Shape(torch.bfloat16, tokens, 4, per_group, 128, block_size, 16), pages)

    assert order(8, 16, 128, 8192) == "split"
    assert order(8192, 16, 128, 8192) == "page"
    assert order(8192, 16, 32, 8192) == "query"
    assert order(512, 1, 128, 8192) == "query"


def test_what_there_is_no_kernel_for_is_refused_in_one_line():
    need("cpu")
    inputs = make_inputs(SMALL_CASES[0])
    blocks = selected(inputs, 1)
    with pytest.raises(InputError, match="float32, bfloat16 or float16 expected, got"):
        attend(inputs.to(torch.float64), blocks)
    with pytest.raises(InputError, match="at most 16 query heads in a group expected, got 17"):
        attend(replace(inputs, q=torch.zeros(1, 17, 16)), blocks)
    with pytest.raises(InputError, match=r"at most 128 expected, got dims \[256\]"):
        attend(replace(inputs, q=torch.zeros(1, 1, 256), k=torch.zeros(3, 16, 1, 256)), blocks)


@each_device
@each_order
def test_no_query_tokens_give_empty_results(order: Any, device: str):
    need(device)
    inputs = on(device, take(make_inputs(SMALL_CASES[1]), torch.empty(0, dtype=torch.int64)))
    blocks = torch.empty((0, 2, 3), dtype=torch.int32, device=device)
    out, _, _, d_k, _ = with_gradients(inputs, blocks, backend.sparse_attention, order)
    assert out.shape == (0, 4, 16) and not d_k.any()


@pytest.mark.slow
def test_every_kernel_compiles_for_three_gpus_without_spills():
    assert build_problems("longforge.kernels.sparse_attention.triton_specs") == ""


@pytest.mark.gpu
@each_order
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.name)
def test_large_shapes_equal_float64(case: Case, dtype: torch.dtype, order: str):
    need("cuda")
    inputs = on("cuda", make_inputs(case, dtype))
    blocks = selected(inputs, case.top_k)
    got = with_gradients(inputs, blocks, backend.sparse_attention, order)
    assert_close(got, exact(inputs, blocks), TOLERANCE[dtype])
    again = with_gradients(inputs, blocks, backend.sparse_attention, order)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
def test_decode_asks_the_device_nothing_and_runs_in_a_graph():
    need("cuda")
    case = GPU_CASES[4]
    inputs = on("cuda", make_inputs(case, torch.bfloat16))
    blocks = selected(inputs, case.top_k)
    wanted = attend(inputs, blocks)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for order in ("split", "query", "page"):
            attend(inputs, blocks, order)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(inputs, blocks)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])
