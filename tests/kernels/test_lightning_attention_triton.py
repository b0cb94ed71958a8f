"""Lightning attention in Triton: both orders of work against float64, interpreted or on a GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout
from longforge.kernels.lightning_attention import cpu, lightning_attention, plan, reference
from longforge.kernels.lightning_attention import triton_backend as backend
from longforge.kernels.lightning_attention.cases import (
    GPU_CASES,
    SMALL_CASES,
    Case,
    Inputs,
    make_inputs,
    take,
)
from triton_device import DEVICES, build_problems, need

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
"""The interpreter computes with numpy, which warns of infinities that masks then take away."""
each_device = pytest.mark.parametrize("device", DEVICES)
interpreted = pytest.mark.parametrize("device", ["cpu"])
"""On a GPU each new shape costs seconds of compilation, so there small cases are few."""
each_order = pytest.mark.parametrize("order", ["steps", "spans"])
each_case = pytest.mark.parametrize("case", SMALL_CASES, ids=lambda c: c.name)
NAMES = ("out", "d_q", "d_k", "d_v")
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of the largest element of a result: some tens of rounding steps of each dtype."""
LARGE = {**TOLERANCE, torch.float32: 2e-5}
"""Sums of thousands of terms."""


def on(device: str, inputs: Inputs) -> Inputs:
    layout = inputs.layout
    moved = PackedLayout(
        *(x.to(device) for x in (layout.positions, layout.paths, layout.slots, layout.page_table)),
        layout.block_size,
    )
    tensors = {name: getattr(inputs, name).to(device) for name in ("q", "k", "v", "slopes")}
    return replace(inputs, layout=moved, **tensors)


def attend(inputs: Inputs, states: Tensor | None = None, order: Any = None, compute: Any = backend) -> Tensor:
    more = (order,) if compute is backend else ()
    return compute.lightning_attention(
        inputs.q, inputs.k, inputs.v, inputs.slopes, inputs.layout, states, *more
    )


def with_gradients(inputs: Inputs, states: Tensor | None = None, compute: Any = backend) -> list[Tensor]:
    """[out, gradients of q, k, v] for one random cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    given = replace(inputs, q=leaves[0], k=leaves[1], v=leaves[2])
    out = attend(given, states, compute=compute)
    rng = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def exact(inputs: Inputs, states: Tensor | None = None) -> list[Tensor]:
    wide = None if states is None else states.double()
    return with_gradients(inputs.to(torch.float64), wide, reference)


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, g, w in zip(NAMES, got, wanted, strict=False):
        error = float((g.double() - w.double()).abs().max() / w.double().abs().max().clamp(min=1e-3))
        assert error <= tolerance, f"{name}: error {error:.2e}"


def fresh_states(inputs: Inputs) -> Tensor:
    """A pool of states in which nothing was written yet."""
    pages, heads, dim = int(inputs.layout.page_table.max()) + 2, *inputs.q.shape[1:]
    return torch.full((pages, heads, dim, dim), float("nan"), device=inputs.q.device)


@interpreted
@each_case
def test_output_and_gradients_equal_float64(case: Case, device: str):
    need(device)
    inputs = on(device, make_inputs(case))
    got = with_gradients(inputs)
    assert_close(got, exact(inputs), TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_within_its_rounding(dtype: torch.dtype, device: str):
    need(device)
    inputs = on(device, make_inputs(SMALL_CASES[2], dtype))
    got = with_gradients(inputs)
    assert [x.dtype for x in got] == [dtype] * 4
    assert_close(got, exact(inputs), TOLERANCE[dtype])


@interpreted
@each_order
@each_case
def test_outputs_and_states_equal_float64_and_no_other_page_is_written(case: Case, order: str, device: str):
    need(device)
    inputs = on(device, make_inputs(case))
    states = fresh_states(inputs)
    exact_states = states.double()
    out = attend(inputs, states, order)
    wanted = attend(inputs.to(torch.float64), exact_states, compute=reference)
    assert_close([out], [wanted], TOLERANCE[torch.float32])
    written = torch.unique(inputs.layout.slots // case.block_size)
    assert_close([states[written]], [exact_states[written]], TOLERANCE[torch.float32])
    assert torch.equal(states.isnan(), exact_states.isnan())


@each_device
@pytest.mark.parametrize("order, step", [("steps", 1), ("spans", 11), (None, 5)])
def test_chunks_with_states_equal_the_whole(order: Any, step: int, device: str):
    """Each path goes on by `step` tokens: batches of unequal runs, some of which start inside a page."""
    need(device)
    case = Case((16, 3, 12), 2, 7, 5)
    inputs = on(device, make_inputs(case))
    states = fresh_states(inputs)
    wanted = attend(inputs.to(torch.float64), compute=reference)
    got = torch.empty_like(inputs.q)
    for rounds in range(0, max(case.lengths), step):
        now = (inputs.layout.positions >= rounds) & (inputs.layout.positions < rounds + step)
        rows = torch.nonzero(now).flatten()
        got[rows] = attend(take(inputs, rows), states, order)
    assert_close([got], [wanted], TOLERANCE[torch.float32])


@each_device
def test_gradients_in_a_later_chunk_treat_the_stored_state_as_given(device: str):
    """The pages are overwritten by the forward pass; the backward pass still starts from what they held."""
    need(device)
    inputs = on(device, make_inputs(Case((14, 9), 2, 16, 4)))
    late = inputs.layout.positions >= torch.tensor([5, 0], device=device)[inputs.layout.paths]
    states = fresh_states(inputs)
    attend(take(inputs, torch.nonzero(~late).flatten()), states)
    rest = take(inputs, torch.nonzero(late).flatten())
    wanted = exact(rest, states.clone())
    assert_close(with_gradients(rest, states), wanted, TOLERANCE[torch.float32])
    assert not states.requires_grad


@interpreted
def test_long_paths_carry_their_state_from_span_to_span(device: str, monkeypatch: pytest.MonkeyPatch):
    need(device)
    monkeypatch.setattr(plan, "SPAN", 32)
    monkeypatch.setattr(plan, "PROGRAMS", 1)
    inputs = on(device, make_inputs(Case((75, 4, 41), 1, 16, 32)))
    assert plan.span_size(120, 1, 16) == 32
    wanted, states = exact(inputs), fresh_states(inputs)
    assert_close(with_gradients(inputs), wanted, TOLERANCE[torch.float32])
    assert_close([attend(inputs, states, "spans")], wanted[:1], TOLERANCE[torch.float32])


@interpreted
@each_order
def test_a_forked_path_starts_from_the_page_it_shares(order: Any, device: str):
    """Path 1 continues after path 0's first page with tokens of its own, on pages of its own."""
    need(device)
    whole = make_inputs(Case((10,), 1, 7, 4))
    table = torch.tensor([[0, 1, 2, -1], [0, 3, 4, -1]], dtype=torch.int32)
    layout = PackedLayout(
        torch.tensor([8, 9, 4, 5, 6, 7, 8]),
        torch.tensor([0, 0, 1, 1, 1, 1, 1]),
        torch.tensor([8, 9, 12, 13, 14, 15, 16]),
        table,
        4,
    )
    first = replace(take(whole, torch.arange(8)), layout=PackedLayout.from_lengths([8], 4))
    rest = replace(make_inputs(Case((7,), 1, 7, 4), seed=5), layout=layout)
    results = []
    for inputs, compute in ((torch.float32, backend), (torch.float64, reference)):
        states = torch.full((6, 1, 7, 7), float("nan"), dtype=inputs, device=device)
        attend(on(device, first.to(inputs)), states, order, compute)
        out = attend(on(device, rest.to(inputs)), states, order, compute)
        results.append([out, states.nan_to_num(7.0)])
    assert_close(results[0], results[1], TOLERANCE[torch.float32])


@interpreted
@each_order
def test_nothing_overflows_with_fast_decay(order: Any, device: str):
    need(device)
    inputs = on(device, make_inputs(Case((90,), 2, 16, 64)))
    inputs = replace(inputs, slopes=torch.tensor([0.0, 40.0], device=device))
    wanted = attend(inputs.to(torch.float64), compute=reference)
    assert_close([attend(inputs, None, order)], [wanted], TOLERANCE[torch.float32])


@interpreted
def test_queries_may_be_views_of_one_projection(device: str):
    need(device)
    inputs = on(device, make_inputs(SMALL_CASES[1]))
    views = torch.cat([inputs.q, inputs.k, inputs.v], 2).split(inputs.q.shape[2], 2)
    viewed = replace(inputs, q=views[0], k=views[1], v=views[2])
    assert not views[0].is_contiguous()
    assert torch.equal(attend(viewed), attend(inputs))
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(viewed), with_gradients(inputs), strict=True))


@each_device
@each_order
def test_paths_without_tokens_and_no_tokens_at_all(order: Any, device: str):
    need(device)
    inputs = on(device, make_inputs(SMALL_CASES[1]))
    middle = take(inputs, torch.nonzero(inputs.layout.paths != 1).flatten())
    wanted = attend(inputs.to(torch.float64), compute=reference)
    assert_close([attend(middle, None, order)], [wanted[inputs.layout.paths != 1]], TOLERANCE[torch.float32])
    none = take(inputs, torch.empty(0, dtype=torch.int64, device=device))
    states = fresh_states(inputs)
    assert attend(none, states, order).shape == none.q.shape and bool(states.isnan().all())
    assert all(x.shape == none.q.shape for x in with_gradients(none))


@pytest.mark.parametrize("seed", range(30))
def test_spans_are_the_paths_cut_at_multiples_of_their_size(seed: int):
    """Against a plain loop, for paths that start anywhere, some of them without tokens."""
    rng = torch.Generator().manual_seed(seed)
    rows = int(torch.randint(1, 7, (), generator=rng))
    counts = torch.randint(0, 50, (rows,), generator=rng)
    counts[seed % rows] += 1
    starts = torch.randint(0, 40, (rows,), generator=rng)
    size = int(torch.randint(1, 20, (), generator=rng))
    paths = torch.repeat_interleave(torch.arange(rows), counts)
    positions = torch.cat(
        [s + torch.arange(n) for s, n in zip(starts.tolist(), counts.tolist(), strict=True)]
    )
    layout = PackedLayout(positions, paths, positions, torch.zeros(rows, 1, dtype=torch.int32), 4)
    wanted, first_of_path = [], []
    for path in range(rows):
        first_of_path.append(len(wanted))
        own = torch.nonzero(paths == path).flatten().tolist()
        for row in own:
            if row == own[0] or int(positions[row]) % size == 0:
                wanted.append([row, 0])
            wanted[-1][1] += 1
    spans = plan.cut(layout, size)
    there = spans.count > 0
    assert torch.stack([spans.first, spans.count], 1)[there].tolist() == wanted
    assert bool(there[: len(wanted)].all())
    assert spans.path_span.tolist() == [*first_of_path, len(wanted)]


def test_decode_and_drafts_are_steps_and_prefill_is_spans():
    assert plan.steps_alone(tokens=32, paths=32) and plan.steps_alone(tokens=8, paths=1)
    assert not plan.steps_alone(tokens=9, paths=1)
    assert [plan.chunk_of_page(size, 64) for size in (1, 5, 16, 48, 128, 256, 130)] == [
        1,
        5,
        16,
        48,
        64,
        64,
        26,
    ]


def test_what_there_is_no_kernel_for_is_refused_in_one_line():
    need("cpu")
    inputs = make_inputs(SMALL_CASES[0])
    states = fresh_states(inputs)
    with pytest.raises(InputError, match="float32, bfloat16 or float16 expected, got"):
        attend(inputs.to(torch.float64))
    with pytest.raises(InputError, match=r"fp32 states with contiguous \[D, D\] expected, got torch.float64"):
        attend(inputs, states.double())
    with pytest.raises(InputError, match=r"fp32 states with contiguous \[D, D\] expected"):
        attend(inputs, states.transpose(2, 3))
    with pytest.raises(InputError, match="dims and blocks of at most 128 expected, got dims"):
        attend(make_inputs(Case((2,), 1, 129, 4)))


@pytest.mark.slow
def test_every_kernel_compiles_for_three_gpus_without_spills():
    assert build_problems("longforge.kernels.lightning_attention.triton_specs") == ""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case, dtype",
    [
        (GPU_CASES[0], torch.bfloat16),
        (GPU_CASES[0], torch.float32),
        (GPU_CASES[1], torch.bfloat16),
        (GPU_CASES[2], torch.float16),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_large_shapes_equal_float64(case: Case, dtype: torch.dtype):
    need("cuda")
    on_host = make_inputs(case, dtype)
    wanted = with_gradients(on_host.to(torch.float64), compute=cpu)
    inputs = on("cuda", on_host)
    got = with_gradients(inputs)
    assert_close([x.cpu() for x in got], wanted, LARGE[dtype])
    again = with_gradients(inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    states = fresh_states(inputs)
    assert_close([attend(inputs, states).cpu()], wanted[:1], LARGE[dtype])


@pytest.mark.gpu
@torch.no_grad()
def test_decode_asks_the_device_nothing_and_runs_in_a_graph():
    need("cuda")
    case = GPU_CASES[3]
    inputs = on("cuda", make_inputs(case, torch.bfloat16))
    before = fresh_states(inputs)
    ends = inputs.layout.positions == max(case.lengths) - 1
    attend(take(inputs, torch.nonzero(~ends).flatten()), before)
    last = take(inputs, torch.nonzero(ends).flatten())
    wanted = attend(last, before.clone())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for order in ("steps", "spans"):
            out = lightning_attention(
                last.q, last.k, last.v, last.slopes, last.layout, states=before.clone(), backend="triton"
            )
            assert out.shape == attend(last, before.clone(), order).shape
    finally:
        torch.cuda.set_sync_debug_mode("default")
    states, graph = before.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(last, states)
    states.copy_(before)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)
