"""Certified selection: the bound holds, and what it selects is what full precision selects."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout, as_pages
from longforge.kernels.select_blocks import certified_select_blocks, cpu_tiles, lower_precision, select_blocks
from longforge.kernels.select_blocks.cases import CASES, Case, make_inputs
from longforge.kernels.select_blocks.reference import token_scores

each_code = pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.int8], ids=str)


def keys_of_kind(kind: str, n: int, dim: int, rng: torch.Generator) -> Tensor:
    """Keys that are easy or hard to tell apart in one byte."""
    keys = torch.randn(n, dim, generator=rng)
    if kind == "nearly equal":
        return keys[:1] + 1e-3 * keys
    if kind == "wide range":
        return keys * 10.0 ** torch.randint(-6, 7, (n, dim), generator=rng)
    if kind == "outliers":
        return keys + 1e3 * (torch.rand(n, dim, generator=rng) < 0.02)
    return keys if kind == "normal" else torch.zeros(n, dim)


KINDS = ("normal", "nearly equal", "wide range", "outliers", "zero")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS), st.sampled_from([torch.float8_e4m3fn, torch.int8]),
    st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 10**6), st.integers(1, 6),
)  # fmt: skip
def test_certified_selection_equals_full_selection(
    kind: str, code: torch.dtype, dtype: torch.dtype, seed: int, top_k: int
):
    rng = torch.Generator().manual_seed(seed)
    layout = PackedLayout.from_lengths([61, 1, 34], 4)
    q = torch.randn(96, 2, 16, generator=rng).to(dtype)
    pages = as_pages(keys_of_kind(kind, 96, 16, rng).to(dtype), layout)
    found = certified_select_blocks(q, pages, lower_precision(pages, code), layout, top_k)
    assert torch.equal(found.blocks, select_blocks(q, pages, layout, top_k, backend="reference"))
    before = (layout.positions // 4)[:, None]
    assert bool((found.opened <= before).all())
    if top_k > 1:
        assert bool((found.opened >= torch.clamp(before, max=top_k - 1)).all())


@each_code
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [3, 128])
def test_the_radius_bounds_the_difference_of_scores(kind: str, code: torch.dtype, dim: int):
    rng = torch.Generator().manual_seed(7)
    keys = keys_of_kind(kind, 8 * 16, dim, rng)
    low = lower_precision(keys.view(8, 16, dim), code)
    # Queries along the error are the worst there are.
    error = keys - (low.codes.double() * low.scales.double()[..., None]).view(-1, dim)
    q = torch.cat([torch.randn(40, dim, generator=rng), error.float()])[:, None]
    full = token_scores(q, keys)
    scanned = token_scores(q, low.codes.float().view(-1, dim)) * low.scales.view(-1)
    reach = low.radius.repeat_interleave(16) * q.norm(dim=2, keepdim=True)
    difference = (full.double() - scanned.double()).abs()
    assert bool((difference <= reach.double()).all())
    if kind == "normal":
        assert float((difference / reach).max()) > 0.9, "and no better bound of this form exists"


@each_code
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_most_blocks_stay_closed(code: torch.dtype, backend: str):
    case = Case((6000,), 2, 2, 8, 64, 16, 8, tail=2)
    inputs = make_inputs(case, torch.bfloat16)
    low = lower_precision(inputs.index_k, code)
    if backend == "cpu" and not cpu_tiles.fits(inputs.index_q, low.codes):
        pytest.skip("this processor does not multiply bf16: it looks at every block")
    found = certified_select_blocks(
        inputs.index_q, inputs.index_k, low, inputs.layout, case.top_k, backend=backend
    )
    assert found.share(inputs.layout) < (0.04 if code == torch.int8 else 0.25)


def test_unused_pages_may_hold_nan():
    for case in CASES[:3]:
        inputs = make_inputs(case)
        low = lower_precision(inputs.index_k)
        asked = (inputs.index_q, inputs.index_k, low, inputs.layout, case.top_k)
        wanted = select_blocks(inputs.index_q, inputs.index_k, inputs.layout, case.top_k, backend="reference")
        assert torch.equal(certified_select_blocks(*asked).blocks, wanted)


@each_code
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_selection_over_codes_follows_the_rule_of_arithmetic(case: Case, dtype, backend: str, code):
    inputs = make_inputs(case, dtype)
    low = lower_precision(inputs.index_k, code)
    asked = (inputs.index_q, low.codes, inputs.layout, case.top_k)
    wanted = select_blocks(*asked, index_k_scales=low.scales, backend="reference")
    assert torch.equal(select_blocks(*asked, index_k_scales=low.scales, backend=backend), wanted)


def test_coded_keys_alone_are_keys_of_their_own():
    inputs = make_inputs(CASES[1])
    low = lower_precision(inputs.index_k, torch.int8)
    blocks = select_blocks(inputs.index_q, low.codes, inputs.layout, 3, index_k_scales=low.scales)
    read = (low.codes.float() * low.scales[..., None]).nan_to_num(0.0)
    assert torch.equal(blocks, select_blocks(inputs.index_q, read, inputs.layout, 3, backend="reference"))


def test_the_operators_are_sound_and_give_what_the_functions_give():
    inputs = make_inputs(CASES[1])
    low = lower_precision(inputs.index_k, torch.int8)
    asked = (inputs.index_q, inputs.index_k, low, inputs.layout, 3)
    parts = low.codes, low.scales, low.radius, *inputs.layout.parts
    operands = (inputs.index_q, inputs.index_k, *parts, 3, "reference")
    torch.library.opcheck(torch.ops.longforge.certified_select_blocks.default, operands)
    blocks, opened = certified_select_blocks(*asked, backend="reference")
    got = torch.ops.longforge.certified_select_blocks(*operands)
    assert torch.equal(got[0], blocks) and torch.equal(got[1], opened)
    coded = (inputs.index_q, low.codes, *inputs.layout.parts, 3, "reference", low.scales)
    torch.library.opcheck(torch.ops.longforge.select_blocks.default, coded)


def test_what_does_not_fit_is_refused_in_one_line():
    inputs = make_inputs(CASES[1])
    low = lower_precision(inputs.index_k, torch.int8)
    q, layout = inputs.index_q, inputs.layout
    with pytest.raises(InputError, match=r"codes of one of .* expected, got torch.float32"):
        select_blocks(q, inputs.index_k, layout, 3, index_k_scales=low.scales)
    with pytest.raises(InputError, match=r"scales \[S, Bk\] = \[19, 4\] expected, got \[19, 3\]"):
        select_blocks(q, low.codes, layout, 3, index_k_scales=low.scales[:, :3])
    with pytest.raises(InputError, match=r"index_k_pages like index_q"):
        select_blocks(q, low.codes, layout, 3)
    with pytest.raises(InputError, match="one of reference"):
        select_blocks(q, low.codes, layout, 3, index_k_scales=low.scales, backend="fpga")
    with pytest.raises(InputError, match="dtype one of"):
        lower_precision(inputs.index_k, torch.float16)
