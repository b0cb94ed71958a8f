"""Block selection in Triton against the reference: interpreted on the CPU, compiled on a GPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout, as_pages
from longforge.kernels.select_blocks import (
    LowPrecisionKeys,
    certified_select_blocks,
    lower_precision,
    reference,
    select_blocks,
)
from longforge.kernels.select_blocks import triton_backend as backend
from longforge.kernels.select_blocks import triton_plan as plans
from longforge.kernels.select_blocks.cases import CASES, GPU_CASES, Case, Inputs, make_inputs, take
from longforge.kernels.select_blocks.low_precision import rounding
from longforge.kernels.select_blocks.triton_kernels import decoded
from triton_device import DEVICES, need, on

each_device = pytest.mark.parametrize("device", DEVICES)
each_case = pytest.mark.parametrize(
    "case",
    [replace(c, tail=c.tail or 16 if max(c.lengths) > 200 else 0) for c in CASES],
    ids=lambda c: c.name,
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
each_code = pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.int8], ids=str)
SMALL = Case((37, 5, 18), 6, 3, 7, 5, 4, 3)
LONG = Case((203, 130), 4, 2, 8, 8, 3, 6)


def choose(inputs: Inputs, top_k: int) -> Tensor:
    return select_blocks(inputs.index_q, inputs.index_k, inputs.layout, top_k, backend="triton")


def plainly(inputs: Inputs, top_k: int) -> Tensor:
    return select_blocks(inputs.index_q, inputs.index_k, inputs.layout, top_k, backend="reference")


def integers(inputs: Inputs) -> Inputs:
    """Small whole numbers: every sum is exact in every order, and there are ties everywhere."""
    return replace(inputs, index_q=(2 * inputs.index_q).round(), index_k=(2 * inputs.index_k).round())


def assert_right_up_to_rounding(
    inputs: Inputs, blocks: Tensor, top_k: int, scales: Tensor | None = None
) -> None:
    """No block was left out whose exact score is above a chosen one's by more than rounding explains."""
    layout, size = inputs.layout, inputs.layout.block_size
    for path in reference.prefixes(layout):
        q, k = inputs.index_q[path.rows].double(), path.keys(inputs.index_k).double()
        if scales is not None:
            k = k * path.keys(scales).double()[:, None]
        exact = torch.einsum("ngd,td->ngt", q, k).masked_fill(~path.causal()[:, None], float("-inf"))
        sizes = torch.einsum("ngd,td->ngt", q.abs(), k.abs())
        maxima = reference.block_maxima(exact, size)
        slack = rounding(q.shape[2]) * reference.block_maxima(sizes, size)
        own = path.positions // size
        before = torch.arange(maxima.shape[2], device=own.device) < own[:, None, None]
        mine = blocks[path.rows].long()
        taken = torch.zeros_like(torch.nn.functional.pad(maxima, (0, 1)), dtype=torch.bool)
        taken = taken.scatter(2, torch.where(mine < 0, maxima.shape[2], mine), True)[..., :-1]
        worst = (maxima + slack).masked_fill(~(taken & before), float("inf")).amin(2)
        missed = (maxima - slack).masked_fill(taken | ~before, float("-inf")).amax(2)
        assert bool((worst >= missed).all())
        assert torch.equal(
            taken.sum(2), torch.minimum(own + 1, torch.tensor(top_k))[:, None].expand_as(worst)
        )
    assert_form(blocks, layout)


def assert_form(blocks: Tensor, layout: PackedLayout) -> None:
    """int32, ascending, own block last, -1 only after it."""
    assert blocks.dtype == torch.int32
    count = (blocks >= 0).sum(2)
    padded = torch.where(blocks < 0, 2**31 - 1, blocks)
    assert bool((padded.diff(dim=2) >= 0).all())
    assert bool(((blocks[..., 1:] != blocks[..., :-1]) | (blocks[..., 1:] < 0)).all())
    last = blocks.gather(2, (count - 1)[..., None].long())[..., 0]
    assert torch.equal(last, (layout.positions // layout.block_size).int()[:, None].expand_as(last))


@each_device
@each_case
@each_dtype
def test_choice_is_right_up_to_rounding(case: Case, dtype: torch.dtype, device: str):
    need(device)
    inputs = on(device, make_inputs(case, dtype))
    assert_right_up_to_rounding(inputs, choose(inputs, case.top_k), case.top_k)


@each_device
@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_choice_is_the_references_where_sums_are_exact(case: Case, dtype: torch.dtype, device: str):
    need(device)
    inputs = on(device, integers(make_inputs(case, dtype, seed=3)))
    assert torch.equal(choose(inputs, case.top_k), plainly(inputs, case.top_k))


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda c: c.name)
def test_full_size_choice_is_right_up_to_rounding(case: Case, dtype: torch.dtype):
    need("cuda")
    inputs = on("cuda", make_inputs(case, dtype))
    assert_right_up_to_rounding(inputs, choose(inputs, case.top_k), case.top_k)


@each_device
@each_dtype
def test_chunks_and_single_decodes_choose_what_the_whole_chooses(dtype: torch.dtype, device: str):
    need(device)
    case = SMALL if device == "cpu" else GPU_CASES[0]
    inputs = on(device, make_inputs(case, dtype))
    whole = choose(inputs, case.top_k)
    n = len(whole)
    for step in (1, 7, 64):
        for rows in torch.arange(n, device=device).split(step)[:: max(1, n // step // 6)]:
            assert torch.equal(choose(take(inputs, rows), case.top_k), whole[rows])


@each_device
@pytest.mark.parametrize(("drafts", "dtype"), [(2, torch.float16), (3, torch.float32), (8, torch.bfloat16)])
def test_verify_rows_choose_what_single_decodes_choose(drafts: int, dtype: torch.dtype, device: str):
    need(device)
    case = replace(LONG if device == "cpu" else GPU_CASES[1], tail=drafts)
    inputs = on(device, make_inputs(case, dtype, seed=drafts))
    together = choose(inputs, case.top_k)
    for row in torch.arange(len(together), device=device).split(1)[:: 1 if drafts < 4 else 5]:
        assert torch.equal(choose(take(inputs, row), case.top_k), together[row])


@each_device
@each_dtype
def test_a_prefix_hit_chooses_what_a_cold_start_chooses(dtype: torch.dtype, device: str):
    """Two paths share the pages of their common prefix; one query batch over both equals each alone."""
    need(device)
    case = Case((61, 61), 4, 2, 8, 16, 4, 4)
    inputs = make_inputs(case, dtype)
    layout, shared = inputs.layout, 9
    first, second = layout.page_table[0, :shared].long(), layout.page_table[1, :shared].long()
    inputs.index_k[second] = inputs.index_k[first]
    cold = on(device, inputs)
    table = layout.page_table.clone()
    table[1, :shared] = table[0, :shared]
    poisoned = inputs.index_k.clone()
    poisoned[second] = float("nan")
    rows = torch.nonzero((layout.paths == 0) | (layout.positions >= shared * 4)).flatten()
    hit = take(replace(inputs, layout=replace(layout, page_table=table), index_k=poisoned), rows)
    assert torch.equal(choose(on(device, hit), 4), choose(cold, 4)[rows])


@each_device
@pytest.mark.parametrize("splits", [1, 2, 5, 64])
def test_the_number_of_splits_does_not_matter(splits: int, device: str, monkeypatch: pytest.MonkeyPatch):
    need(device)
    inputs = on(device, integers(make_inputs(replace(LONG, tail=2))))
    monkeypatch.setattr(plans, "MERGED", 16)  # lists of 8 slots, so several stages of merging
    got = backend.select_blocks(inputs.index_q, inputs.index_k, inputs.layout, 6, splits=splits)
    assert torch.equal(got, plainly(inputs, 6))


@each_device
def test_ties_go_to_the_lower_block_and_zero_ties_with_minus_zero(device: str):
    need(device)
    layout = on(device, make_inputs(Case((50,), 1, 1, 3, 3, 4, 4))).layout
    ones = torch.ones(50, 1, 3, device=device)
    keys = torch.ones(layout.slots.max() + 5, 3, device=device)[: 15 * 4].view(15, 4, 3)
    assert select_blocks(ones, keys, layout, 4, backend="triton")[-1, 0].tolist() == [0, 1, 2, 12]
    signs = torch.ones(15, 4, 3, device=device)
    signs[layout.page_table[0, :5].long()] = -1.0
    zeros = select_blocks(0 * ones, signs, layout, 4, backend="triton")
    assert zeros[-1, 0].tolist() == [0, 1, 2, 12]


@each_device
def test_groups_choose_for_themselves(device: str):
    need(device)
    layout = PackedLayout.from_lengths([24], 4, device)
    keys = torch.zeros(24, 2, device=device)
    keys[2, 0], keys[13, 1] = 1.0, 1.0
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device).expand(24, 2, 2)
    blocks = select_blocks(q, as_pages(keys, layout), layout, 2, backend="triton")
    assert blocks[-1].tolist() == [[0, 5], [3, 5]]


@each_device
def test_the_shortest_inputs(device: str):
    need(device)
    inputs = on(device, make_inputs(Case((1, 1, 2), 2, 2, 4, 4, 2, 3)))
    assert choose(inputs, 3)[:, 0].tolist() == [[0, -1, -1]] * 4
    none = take(inputs, torch.arange(0, device=device))
    assert choose(none, 3).shape == (0, 2, 3)
    assert choose(inputs, 1)[:, 1].tolist() == [[0]] * 4
    everything = on(device, make_inputs(replace(SMALL, tail=2)))
    assert torch.equal(choose(everything, 40), plainly(everything, 40))


@each_device
def test_pages_may_be_a_view_of_a_larger_pool(device: str):
    need(device)
    inputs = on(device, integers(make_inputs(SMALL)))
    pool = torch.full((2, *inputs.index_k.shape[:2], 9), float("nan"), device=device)
    pool[1, :, :, 2:7] = inputs.index_k
    view = replace(inputs, index_k=pool[1, :, :, 2:7])
    assert torch.equal(choose(view, 3), plainly(inputs, 3))


@each_device
@each_code
@each_dtype
def test_coded_keys_are_chosen_by_code_times_scale(code: torch.dtype, dtype: torch.dtype, device: str):
    need(device)
    for case in (SMALL, replace(CASES[2], tail=2)):
        inputs = make_inputs(case)
        low = lower_precision(inputs.index_k, code)
        coded = on(device, replace(inputs.to(dtype), index_k=low.codes))
        scales = low.scales.to(device)
        blocks = select_blocks(
            coded.index_q, coded.index_k, coded.layout, case.top_k, index_k_scales=scales, backend="triton"
        )
        assert_right_up_to_rounding(coded, blocks, case.top_k, scales)


@each_device
@each_code
def test_coded_keys_give_the_references_choice_where_sums_are_exact(code: torch.dtype, device: str):
    need(device)
    inputs = on(device, integers(make_inputs(SMALL)))
    codes = inputs.index_k.nan_to_num(9.0).to(code)
    scales = 2.0 ** torch.randint(-2, 3, codes.shape[:2], device=device)
    asked = (inputs.index_q.bfloat16(), codes, inputs.layout, 3)
    got = select_blocks(*asked, index_k_scales=scales, backend="triton")
    assert torch.equal(got, select_blocks(*asked, index_k_scales=scales, backend="reference"))


@triton.jit
def decode_all(Codes, Out, BY_HAND: tl.constexpr, DTYPE: tl.constexpr):
    i = tl.arange(0, 256)
    how: tl.constexpr = 2 if BY_HAND else 1
    tl.store(Out + i, decoded(tl.load(Codes + i), DTYPE, how).to(tl.float32))


@each_device
@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "converted"])
@pytest.mark.parametrize("dtype", [tl.bfloat16, tl.float16, tl.float32], ids=str)
def test_every_code_of_fp8_is_read_exactly(by_hand: bool, dtype: tl.dtype, device: str):
    need(device)
    if device == "cuda" and not by_hand and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not convert e4m3")
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    read = torch.full((256,), float("nan"), device=device)
    decode_all[(1,)](codes, read, by_hand, dtype)
    numbers = (codes & 0x7F) != 0x7F
    assert torch.equal(read[numbers], codes.view(torch.float8_e4m3fn).float()[numbers])


@each_device
@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float32),
        (torch.int8, torch.bfloat16),
        (torch.int8, torch.float16),
    ],
    ids=str,
)
def test_certified_selection_equals_full_selection(code: torch.dtype, dtype: torch.dtype, device: str):
    need(device)
    for case in (replace(SMALL, tail=9), replace(LONG, tail=2)):
        inputs = make_inputs(case, dtype)
        moved, low = on(device, inputs), lowered(inputs, code, device)
        asked = (moved.index_q, moved.index_k, low, moved.layout, case.top_k)
        blocks, opened = certified_select_blocks(*asked, backend="triton")
        assert torch.equal(blocks, choose(moved, case.top_k))
        before = (moved.layout.positions // case.block_size)[:, None]
        assert bool((opened <= before).all())
        assert bool((opened >= torch.clamp(before, max=case.top_k - 1)).all())
        counted = certified_select_blocks(*asked, backend="reference").opened
        assert int((opened - counted).abs().max()) <= 1, "bounds differ by rounding alone"


@each_device
def test_certified_selection_leaves_most_blocks_closed(device: str):
    need(device)
    case = Case((400,), 2, 2, 8, 16, 4, 4, tail=2)
    inputs = make_inputs(case, torch.bfloat16)
    low = lowered(inputs, torch.int8, device)
    moved = on(device, inputs)
    found = certified_select_blocks(
        moved.index_q, moved.index_k, low, moved.layout, case.top_k, backend="triton"
    )
    assert found.share(moved.layout) < 0.1


@each_device
def test_certified_selection_in_slabs_changes_nothing(device: str, monkeypatch: pytest.MonkeyPatch):
    need(device)
    inputs = make_inputs(replace(SMALL, tail=4))
    moved, low = on(device, inputs), lowered(inputs, torch.int8, device)
    asked = (moved.index_q, moved.index_k, low, moved.layout, 3)
    whole = backend.certified_select_blocks(*asked)
    monkeypatch.setattr(backend, "SCANNED", 1)
    slabs = backend.certified_select_blocks(*asked, splits=2)
    assert torch.equal(slabs[0], whole[0]) and torch.equal(slabs[1], whole[1])


def lowered(inputs: Inputs, code: torch.dtype, device: str) -> LowPrecisionKeys:
    low = lower_precision(inputs.index_k, code)
    return LowPrecisionKeys(low.codes.to(device), low.scales.to(device), low.radius.to(device))


@pytest.mark.gpu
def test_decode_can_be_captured_and_waits_for_nothing():
    need("cuda")
    case = replace(GPU_CASES[1], tail=1)
    inputs = on("cuda", make_inputs(case, torch.bfloat16))
    low = lower_precision(inputs.index_k)
    asked = (inputs.index_q, inputs.index_k, low, inputs.layout, case.top_k)
    wanted = choose(inputs, case.top_k)
    certified_select_blocks(*asked, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plain = choose(inputs, case.top_k)
            certified = certified_select_blocks(*asked, backend="triton").blocks
    finally:
        torch.cuda.set_sync_debug_mode("default")
    other = on("cuda", make_inputs(case, torch.bfloat16, seed=1))
    graph.replay()
    assert torch.equal(plain, wanted) and torch.equal(certified, wanted)
    inputs.index_q.copy_(other.index_q)  # another step: same shapes, other queries
    graph.replay()
    assert torch.equal(plain, choose(inputs, case.top_k)) and torch.equal(certified, plain)


@each_device
def test_what_the_kernels_have_no_tiles_for_is_refused(device: str):
    need(device)
    inputs = on(device, make_inputs(SMALL))
    with pytest.raises(InputError, match=r"top_k of at most 64 expected, got 65; say backend='reference'"):
        choose(inputs, 65)
    with pytest.raises(InputError, match=r"float32, bfloat16 or float16 expected, got torch.float64"):
        choose(inputs.to(torch.float64), 3)
    wide = on(device, make_inputs(Case((9,), 1, 1, 4, 130, 4, 2)))
    with pytest.raises(InputError, match=r"index_q's Di of at most 128 expected, got 130"):
        choose(wide, 2)
    with pytest.raises(InputError, match=r"index_k_pages with stride 1 in its last dimension expected"):
        choose(replace(inputs, index_k=inputs.index_k.transpose(1, 2).contiguous().transpose(1, 2)), 3)
