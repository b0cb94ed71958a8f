"""The three operations of sparse attention in bf16 on matrix tiles: selections to the bit, the rest against
float64, and what may not change either."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longforge.kernels.dense_attention import dense_attention
from longforge.kernels.index_loss import cpu_tiles as loss_tiles
from longforge.kernels.index_loss import index_loss
from longforge.kernels.layout import PackedLayout, as_pages
from longforge.kernels.msa_cases import Case, Inputs, make_inputs, take
from longforge.kernels.select_blocks import certified_select_blocks, cpu_scan, lower_precision, select_blocks
from longforge.kernels.select_blocks import cpu_tiles as scan_tiles
from longforge.kernels.sparse_attention import sparse_attention
from longforge.kernels.tiles import attention as attention_tiles
from longforge.kernels.tiles.attention_backward import SEGMENT
from longforge.kernels.tiles.engine import TILE_ENGINE

pytestmark = pytest.mark.skipif(TILE_ENGINE is None, reason="this processor does not multiply bf16")

TOLERANCE = 2e-2
"""Of the largest element of a result: some tens of rounding steps of bf16."""
SINGLE = 2e-6
"""What comes in fp32 from bf16 inputs: a log-sum-exp."""
CASES = (
    Case((1,), 4, 1, 32, 32, 32, 1),
    Case((200, 33, 1, 64), 8, 2, 32, 32, 32, 3),
    Case((150, 90), 10, 2, 64, 32, 64, 2),
    Case((300, 131), 14, 2, 128, 64, 32, 4, tail=40),
    Case((300,), 16, 1, 128, 128, 128, 2),
    Case((SEGMENT + 190,), 4, 1, 32, 64, 128, 3),  # several segments add to one block
    Case((SEGMENT + 37, 80), 12, 1, 64, 32, 64, 4),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
each_support = pytest.mark.parametrize("warm_up", [False, True], ids=["selected", "warm-up"])


def made(case: Case, seed: int = 0) -> Inputs:
    """Inputs that go to the tiles, in every operation."""
    inputs = make_inputs(case, torch.bfloat16, seed)
    assert scan_tiles.fits(inputs.index_q, inputs.index_k)
    assert attention_tiles.fits(inputs.q, inputs.k) and loss_tiles.fits(inputs.index_q, inputs.q, inputs.k)
    return inputs


def selected(inputs: Inputs, top_k: int) -> Tensor:
    return select_blocks(inputs.index_q, inputs.index_k, inputs.layout, top_k, backend="reference")


def attention(inputs: Inputs, blocks: Tensor, backend: str = "cpu") -> list[Tensor]:
    """[out, lse, gradients of q, k, v] for one random cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out, lse = sparse_attention(leaves[0], leaves[1], leaves[2], blocks, inputs.layout, backend=backend)
    rng = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(torch.bfloat16).to(out.dtype)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, cotangent)]


def loss(
    inputs: Inputs,
    blocks: Tensor | None,
    weights: Tensor | None = None,
    backend: str = "cpu",
    lse: Tensor | None = None,
) -> list[Tensor]:
    """[loss, gradients of index_q and index_k]."""
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.index_q, inputs.index_k)]
    value = index_loss(
        leaves[0], leaves[1], inputs.q, inputs.k, blocks, inputs.layout, weights=weights, lse=lse,
        backend=backend,
    )  # fmt: skip
    return [value.detach(), *torch.autograd.grad(3 * value, leaves)]


def assert_close(names: tuple[str, ...], got: list[Tensor], wanted: list[Tensor]) -> None:
    for name, g, w in zip(names, got, wanted, strict=True):
        assert bool(torch.isfinite(g).all()), name
        error = float((g.double() - w.double()).abs().max() / w.double().abs().max().clamp(min=1e-3))
        assert error <= (SINGLE if name == "lse" else TOLERANCE), f"{name}: error {error:.2e}"


def assert_attention_is_float64s(inputs: Inputs, blocks: Tensor) -> list[Tensor]:
    got = attention(inputs, blocks)
    wanted = attention(inputs.to(torch.float64), blocks, "reference")
    assert_close(("out", "lse", "d_q", "d_k", "d_v"), got, wanted)
    return got


def assert_loss_is_float64s(
    inputs: Inputs, blocks: Tensor | None, weights: Tensor | None = None
) -> list[Tensor]:
    got = loss(inputs, blocks, weights)
    assert_close(
        ("loss", "d_index_q", "d_index_k"),
        got,
        loss(inputs.to(torch.float64), blocks, weights, "reference"),
    )
    return got


def same(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def with_threads(count: int, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return compute()
    finally:
        torch.set_num_threads(threads)


# Selection.


def uniform(rng: torch.Generator, *shape: int) -> Tensor:
    return 2 * torch.rand(*shape, generator=rng, dtype=torch.float64) - 1


def from_bits(rng: torch.Generator, first: int, last: int, *shape: int) -> Tensor:
    """bf16 numbers of either sign whose bits lie in first .. last."""
    bits = torch.randint(first, last + 1, shape, generator=rng)
    signed = bits - 32768 * torch.randint(0, 2, shape, generator=rng)
    return signed.to(torch.int16).view(torch.bfloat16).double()


def asked_of_kind(kind: str, n: int, groups: int, dim: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """(queries [N, Hkv, Di], keys [N, Di]) in bf16 that are hard to rank."""
    q, keys = (
        torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((n, groups, dim), (n, dim))
    )
    match kind:
        case "all equal":
            keys = keys[:1].expand(n, dim)
        case "duplicates":
            keys = keys[torch.randint(0, 3, (n,), generator=rng)]
        case "one step apart":
            # One number of a key moves by one step of bf16.
            bits = keys[:1].to(torch.bfloat16).view(torch.int16).repeat(n, 1)
            bits[torch.arange(n), torch.randint(0, dim, (n,), generator=rng)] += 1
            keys = bits.view(torch.bfloat16).double()
        case "nearly equal, asked along an error":
            # Of the codes: in these directions they are as far off as the bound allows.
            keys = (keys[:1] + 3e-3 * keys).to(torch.bfloat16).double()
            steps = keys.abs().amax(1, keepdim=True) / 127
            error = keys - steps * (keys / steps).round()
            q = error[torch.randint(0, n, (n, groups), generator=rng)] * 100
            q = torch.where(torch.rand(n, groups, 1, generator=rng) < 0.5, q, -q)
        case "huge range":
            keys = keys * 10.0 ** torch.randint(-25, 26, (n, dim), generator=rng)
        case "cancelling":
            # The two halves of a score are large and cancel almost.
            q, keys = (torch.cat([x[..., : dim // 2]] * 2, -1) for x in (q, keys))
            keys[:, dim // 2 :] *= -1
            keys = 1e4 * keys.to(torch.bfloat16).double() + uniform(rng, n, dim)
        case "subnormal keys":
            keys = from_bits(rng, 0, 0x7F, n, dim)
        case "subnormal queries":
            q = from_bits(rng, 0, 0xFF, n, groups, dim)
        case "around the least normal number":
            # Of a key's numbers half are just below it, which tiles take as zeros.
            q, keys = q.abs() + 0.5, from_bits(rng, 0x60, 0x9F, n, dim).abs()
        case "products around the least normal number":
            q, keys = 2.0**-63 * (0.5 + uniform(rng, n, groups, dim).abs()), 2.0**-63 * uniform(rng, n, dim)
        case "small times large":
            q, keys = 2.0**100 * uniform(rng, n, groups, dim), from_bits(rng, 0, 0x17F, n, dim)
        case "zeros":
            q, keys = 0 * q, 0 * keys
        case "zeros of both signs":
            keys = torch.where(keys > 0, 0.0, -0.0)
        case "sums around the greatest number":
            q, keys = 2.0**61 * uniform(rng, n, groups, dim), 2.0**63 * uniform(rng, n, dim)
        case "sums beyond the greatest number":
            q, keys = 2.0**63 * uniform(rng, n, groups, dim), 2.0**64 * uniform(rng, n, dim)
        case "queries near the greatest number":
            q = 2.0**118 * uniform(rng, n, groups, dim)
        case _:
            assert kind == "normal"
    return q.to(torch.bfloat16), keys.to(torch.bfloat16)


KINDS = (
    "normal", "all equal", "duplicates", "one step apart", "nearly equal, asked along an error",
    "huge range", "cancelling", "subnormal keys", "subnormal queries", "around the least normal number",
    "products around the least normal number", "small times large", "zeros", "zeros of both signs",
    "sums around the greatest number", "sums beyond the greatest number",
    "queries near the greatest number",
)  # fmt: skip
CODES = (torch.int8, torch.float8_e4m3fn)


def take_rows(layout: PackedLayout, rows: Tensor) -> PackedLayout:
    return replace(
        layout, positions=layout.positions[rows], paths=layout.paths[rows], slots=layout.slots[rows]
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), groups=st.integers(1, 3), top_k=st.integers(1, 7),
    dim=st.sampled_from([32, 64, 128]), block_size=st.sampled_from([16, 32]), chunk=st.integers(1, 60),
)  # fmt: skip
def test_selection_is_the_references_for_keys_that_are_hard_to_rank(
    kind: str, seed: int, groups: int, top_k: int, dim: int, block_size: int, chunk: int
):
    """From bf16 keys, from codes of them, and certified, in chunks of any length."""
    rng = torch.Generator().manual_seed(seed)
    whole = PackedLayout.from_lengths([190, 1, 101], block_size)
    q, keys = asked_of_kind(kind, len(whole.positions), groups, dim, rng)
    pages = as_pages(keys, whole)
    # A fifth of the tokens asks; the reference is then a matter of milliseconds.
    rows = torch.arange(int(torch.randint(5, (), generator=rng)), len(whole.positions), 5)
    layout, q, n = take_rows(whole, rows), q[rows], len(rows)
    low = {code: lower_precision(pages, code) for code in CODES}
    wanted = select_blocks(q, pages, layout, top_k, backend="reference")
    coded = {
        code: select_blocks(q, x.codes, layout, top_k, index_k_scales=x.scales, backend="reference")
        for code, x in low.items()
    }
    for rows in torch.arange(n).split(chunk)[:: max(1, n // chunk // 8)]:
        part, asked = take_rows(layout, rows), q[rows]
        assert torch.equal(select_blocks(asked, pages, part, top_k, backend="cpu"), wanted[rows])
        for code, x in low.items():
            got = select_blocks(asked, x.codes, part, top_k, index_k_scales=x.scales, backend="cpu")
            assert torch.equal(got, coded[code][rows]), code
            found = certified_select_blocks(asked, pages, x, part, top_k, backend="cpu")
            assert torch.equal(found.blocks, wanted[rows]), f"certified {code}"
            before = (part.positions // block_size)[:, None]
            assert bool((found.opened <= before).all())


def test_selection_over_normal_keys_scores_few_blocks_again():
    """What makes the scan worth it."""
    inputs = made(Case((4000,), 4, 1, 32, 128, 32, 8, tail=64))
    low = lower_precision(inputs.index_k, torch.int8)
    _, opened = scan_tiles.certified_select_blocks(inputs.index_q, inputs.index_k, low, inputs.layout, 8)
    assert 0 < float(opened.float().mean()) < 40


def test_selection_reads_no_page_that_is_not_before_the_query():
    """Not even that of its own block: a page is looked at when it is full."""
    inputs = made(CASES[1])
    wanted = selected(inputs, 2)
    rows = torch.nonzero((inputs.layout.positions < 5 * 32) & (inputs.layout.paths == 0)).flatten()
    full = torch.zeros(len(inputs.index_k), dtype=torch.bool)
    full[inputs.layout.page_table[0, :4].long()] = True
    hidden = inputs.index_k.masked_fill(~full[:, None, None], torch.nan)
    early = take(inputs, rows)
    assert torch.equal(select_blocks(early.index_q, hidden, early.layout, 2, backend="cpu"), wanted[rows])


def test_a_slab_of_scores_at_a_time_and_more_blocks_than_a_unit_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
):
    inputs = made(Case((2300, 400), 4, 1, 32, 32, 32, 5, tail=90))
    assert cpu_scan.SPAN < 2300 // 32 and len(inputs.index_q) > scan_tiles.QUERIES
    wanted = selected(inputs, 5)
    for scratch in (scan_tiles.SCRATCH, 1):
        monkeypatch.setattr(scan_tiles, "SCRATCH", scratch)
        assert torch.equal(select_blocks(inputs.index_q, inputs.index_k, inputs.layout, 5), wanted)


def coded_keys(n: int, dim: int, code: torch.dtype) -> tuple[PackedLayout, Tensor, Tensor, Tensor]:
    """A layout, queries that hardly tell the keys apart, codes, and scales."""
    rng = torch.Generator().manual_seed(11)
    layout = PackedLayout.from_lengths([n], 16)
    q, keys = asked_of_kind("cancelling", n, 2, dim, rng)
    low = lower_precision(as_pages(keys, layout), code)
    return layout, q, low.codes, low.scales


@pytest.mark.parametrize("code", CODES, ids=str)
def test_scales_of_either_sign_are_bounded_by_their_size(code: torch.dtype):
    layout, q, codes, scales = coded_keys(500, 64, code)
    for signed in (-scales, scales * (1 - 2 * (torch.arange(16) % 2))):
        asked = (q, codes, layout, 4)
        wanted = select_blocks(*asked, index_k_scales=signed, backend="reference")
        assert torch.equal(select_blocks(*asked, index_k_scales=signed, backend="cpu"), wanted)


def test_codes_of_keys_too_long_for_int32_go_another_way():
    dim = cpu_scan.MOST_CODES + 64
    layout = PackedLayout.from_lengths([96], 16)
    q, codes = torch.ones(96, 1, dim, dtype=torch.bfloat16), torch.full((6, 16, dim), 1, dtype=torch.int8)
    codes[1] = 127  # the best block; its sum is above 2**31
    scales = torch.ones(6, 16)
    wanted = select_blocks(q, codes, layout, 2, index_k_scales=scales, backend="reference")
    assert bool((wanted[32:, 0, 0] == 1).all())
    assert torch.equal(select_blocks(q, codes, layout, 2, index_k_scales=scales, backend="cpu"), wanted)


# Attention and the index loss against float64.


@each_case
def test_attention_and_its_gradients_are_float64s(case: Case):
    inputs = made(case)
    assert_attention_is_float64s(inputs, selected(inputs, case.top_k))


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale_is_right(scale: float):
    inputs = made(Case((90, 41), 8, 2, 64, 32, 32, 2))
    blocks = selected(inputs, 2)
    got, wanted = (
        sparse_attention(x.q, x.k, x.v, blocks, x.layout, scale=scale, backend=backend)
        for x, backend in ((inputs, "cpu"), (inputs.to(torch.float64), "reference"))
    )
    assert_close(("out", "lse"), list(got), list(wanted))


@pytest.mark.parametrize("per_group", range(4, 17))
def test_any_number_of_heads_of_a_group_is_right(per_group: int):
    inputs = made(Case((70, 9), 2 * per_group, 2, 32, 32, 32, 2), seed=per_group)
    blocks = selected(inputs, 2)
    assert_attention_is_float64s(inputs, blocks)
    assert_loss_is_float64s(inputs, blocks)


@pytest.mark.parametrize("per_group", [1, 3, 17])
def test_groups_that_fill_too_little_of_a_tile_or_more_than_one_go_another_way(per_group: int):
    case = Case((70, 9), 2 * per_group, 2, 32, 32, 32, 2)
    inputs = make_inputs(case, torch.bfloat16)
    assert not attention_tiles.fits(inputs.q, inputs.k)
    assert not loss_tiles.fits(inputs.index_q, inputs.q, inputs.k)


def some_weights(inputs: Inputs) -> Tensor:
    weights = torch.rand(len(inputs.q), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weights[1::4] = 0.0
    weights[0] = 2.0
    return weights


@each_support
@each_case
def test_index_loss_and_its_gradients_are_float64s(case: Case, warm_up: bool):
    inputs = made(case)
    blocks = None if warm_up else selected(inputs, case.top_k)
    assert_loss_is_float64s(inputs, blocks, some_weights(inputs))


@each_support
@each_case
def test_the_index_loss_from_attentions_log_sum_exp_is_float64s(case: Case, warm_up: bool):
    inputs, blocks = made(case), None
    if warm_up:
        _, lse = dense_attention(inputs.q, inputs.k, inputs.v, inputs.layout)
    else:
        blocks = selected(inputs, case.top_k)
        _, lse = sparse_attention(inputs.q, inputs.k, inputs.v, blocks, inputs.layout)
    weights = some_weights(inputs)
    lse = lse.masked_fill((weights == 0)[:, None], torch.nan)
    wanted = loss(inputs.to(torch.float64), blocks, weights, "reference")
    assert_close(("loss", "d_index_q", "d_index_k"), loss(inputs, blocks, weights, lse=lse), wanted)
    if case.lengths != (1,):  # it is looked at: twice the sums halve the teacher
        assert abs(float(loss(inputs, blocks, weights, lse=lse + 0.7)[0] - wanted[0])) > 0.1


@each_support
def test_queries_of_no_weight_may_hold_anything(warm_up: bool):
    case = CASES[1]
    inputs, blocks = made(case), None
    if not warm_up:
        blocks = selected(inputs, case.top_k)
    weights = some_weights(inputs)
    unweighted = weights == 0
    q, index_q = (x.masked_fill(unweighted[:, None, None], torch.nan) for x in (inputs.q, inputs.index_q))
    assert same(loss(replace(inputs, q=q, index_q=index_q), blocks, weights), loss(inputs, blocks, weights))
    nothing = loss(replace(inputs, q=q, index_q=index_q), blocks, torch.zeros(len(q)))
    assert not any(x.any() for x in nothing)


def test_a_broken_query_shows_in_its_own_results_and_in_no_other():
    case = CASES[1]
    inputs = made(case)
    blocks = selected(inputs, case.top_k)
    q = inputs.q.clone()
    q[100, 2] = torch.nan
    out, lse = sparse_attention(q, inputs.k, inputs.v, blocks, inputs.layout)
    wanted, wanted_lse = sparse_attention(inputs.q, inputs.k, inputs.v, blocks, inputs.layout)
    assert bool(torch.isnan(out[100, 2]).all()) and bool(torch.isnan(lse[100, 2]))
    out[100, 2], lse[100, 2] = wanted[100, 2], wanted_lse[100, 2]
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
    assert bool(torch.isnan(loss(replace(inputs, q=q), blocks)[0]))


def test_large_scores_do_not_overflow():
    inputs = made(CASES[2])
    inputs = replace(inputs, q=inputs.q * 300, index_q=inputs.index_q * 30)
    blocks = selected(inputs, 2)
    got, wanted = attention(inputs, blocks), attention(inputs.to(torch.float64), blocks, "reference")
    # Gradients of nearly one-hot softmaxes are differences of almost equal numbers.
    assert_close(("out", "lse"), got[:2], wanted[:2])
    assert all(bool(torch.isfinite(x).all()) for x in got)
    assert all(bool(torch.isfinite(x).all()) for x in loss(inputs, blocks))


# What may not change a bit.


@each_case
def test_chunks_other_batches_and_decode_attend_to_the_bit_as_the_whole(case: Case):
    inputs = made(case)
    blocks, layout = selected(inputs, case.top_k), inputs.layout
    out, lse = sparse_attention(inputs.q, inputs.k, inputs.v, blocks, layout)
    n = len(out)
    parts = [rows for step in (1, 7, 64) for rows in torch.arange(n).split(step)[:: max(1, 24 // step)]]
    parts += [torch.nonzero(layout.paths == path).flatten() for path in range(len(case.lengths))]
    parts += [torch.arange(n)[::3], torch.nonzero(layout.paths != 0).flatten()]
    for rows in parts:
        some = take(inputs, rows)
        got = sparse_attention(some.q, some.k, some.v, blocks[rows], some.layout)
        assert same(list(got), [out[rows], lse[rows]])


@each_case
def test_threads_and_physical_places_of_pages_change_no_bit(case: Case):
    inputs = made(case)
    blocks, table = selected(inputs, case.top_k), inputs.layout.page_table
    order = torch.randperm(inputs.k.shape[0], generator=torch.Generator().manual_seed(5))
    moved = torch.where(table < 0, -1, order[table.long().clamp(min=0)]).int()
    back = torch.argsort(order)
    pages = {name: getattr(inputs, name)[back] for name in ("index_k", "k", "v")}
    other = replace(inputs, layout=replace(inputs.layout, page_table=moved), **pages)
    weights = some_weights(inputs)

    def results(of: Inputs, order: Tensor) -> list[Tensor]:
        out, lse, d_q, d_k, d_v = attention(of, blocks)
        value, d_index_q, d_index_k = loss(of, blocks, weights)
        early = loss(of, None, weights)
        ids = select_blocks(of.index_q, of.index_k, of.layout, case.top_k)
        return [
            out, lse, d_q, d_k[order], d_v[order], value, d_index_q, d_index_k[order], *early[:2],
            early[2][order], ids,
        ]  # fmt: skip

    straight = torch.arange(len(order))
    wanted = with_threads(1, lambda: results(inputs, straight))
    assert same(with_threads(2, lambda: results(inputs, straight)), wanted)
    assert same(with_threads(2, lambda: results(other, order)), wanted)


def test_two_callers_at_once_do_not_disturb_each_other():
    """An engine and a trainer in one process."""
    case = CASES[2]
    parts = [made(case, seed) for seed in range(2)]
    blocks = [selected(inputs, case.top_k) for inputs in parts]
    wanted = [attention(*x) + loss(*x) for x in zip(parts, blocks, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        for got, i in [
            (pool.submit(lambda i: attention(parts[i], blocks[i]) + loss(parts[i], blocks[i]), i % 2), i % 2)
            for i in range(12)
        ]:
            assert same(got.result(), wanted[i])


# Layouts of caches.


def shared_prefix(size: int = 32) -> Inputs:
    """Four paths of one prompt: all share blocks 0 and 1, the first and the third block 2 as well.

    The first brings queries for all its tokens, the next two for those after the prompt; the last ends inside
    of it. Two pages belong to nobody, and all rows that no path has hold NaN.
    """
    nan, rng = float("nan"), torch.Generator().manual_seed(3)
    rows_of = [[0, 1, 2, 3, -1], [0, 1, 4, 5, 8], [0, 1, 2, 6, -1], [0, 1, -1, -1, -1]]
    table = torch.tensor(rows_of, dtype=torch.int32)
    spans = ((0, 3 * size + 5), (2 * size, 4 * size + 3), (3 * size, 4 * size - 1), (size + 3, size + 20))
    positions = torch.cat([torch.arange(first, last) for first, last in spans])
    paths = torch.cat([torch.full((last - first,), path) for path, (first, last) in enumerate(spans)])
    slots = table[paths, positions // size].long() * size + positions % size
    layout = PackedLayout(positions, paths, slots, table, size)
    n = len(positions)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(torch.bfloat16)

    def pages(*shape: int) -> Tensor:
        rows = torch.full((10 * size, *shape), nan, dtype=torch.bfloat16)
        for path, (_, last) in enumerate(spans):
            at = torch.arange(last)
            rows[table[path, at // size].long() * size + at % size] = numbers(last, *shape)
        return rows.unflatten(0, (10, size))

    return Inputs(layout, numbers(n, 2, 32), pages(32), numbers(n, 8, 64), pages(2, 64), pages(2, 64))


@pytest.mark.parametrize("top_k", [2, 4])
def test_pages_of_several_paths_get_the_sum_of_their_gradients(top_k: int):
    inputs = shared_prefix()
    blocks = selected(inputs, top_k)
    assert bool((blocks == -1).any())
    assert torch.equal(select_blocks(inputs.index_q, inputs.index_k, inputs.layout, top_k), blocks)
    empty = torch.isnan(inputs.index_k).all(2)
    *_, d_k, d_v = assert_attention_is_float64s(inputs, blocks)
    assert not d_k[empty].any() and not d_v[empty].any()
    for support in (blocks, None):
        *_, d_index_k = assert_loss_is_float64s(inputs, support, some_weights(inputs))
        assert not d_index_k[empty].any()


def test_slots_without_a_block_may_stand_anywhere():
    inputs = shared_prefix()
    blocks = selected(inputs, 3)
    apart = torch.full((*blocks.shape[:2], 7), -1, dtype=torch.int32)
    apart[:, :, 1::2] = blocks
    assert same(attention(inputs, apart), attention(inputs, blocks))
    assert same(loss(inputs, apart), loss(inputs, blocks))


def test_blocks_that_no_query_selected_are_never_read():
    case = Case((300,), 8, 2, 32, 32, 32, 2)
    inputs = take(made(case), torch.arange(260, 300))
    own = inputs.layout.positions // case.block_size
    blocks = torch.stack([torch.ones_like(own), own], 1)[:, None].expand(-1, case.groups, -1).int()
    unread = inputs.layout.page_table[0, [0, *range(2, 8)]].long()
    hidden = {name: getattr(inputs, name).index_fill(0, unread, torch.nan) for name in ("k", "v", "index_k")}
    poisoned = replace(inputs, **hidden)
    assert same(attention(poisoned, blocks), attention(inputs, blocks))
    assert same(loss(poisoned, blocks), loss(inputs, blocks))


def test_no_query_tokens_give_empty_results():
    inputs = take(made(CASES[1]), torch.empty(0, dtype=torch.int64))
    blocks = select_blocks(inputs.index_q, inputs.index_k, inputs.layout, 3)
    assert blocks.shape == (0, 2, 3)
    low = lower_precision(inputs.index_k)
    assert certified_select_blocks(inputs.index_q, inputs.index_k, low, inputs.layout, 3).opened.numel() == 0
    out, lse, d_q, d_k, d_v = attention(inputs, blocks)
    assert out.shape == d_q.shape == (0, 8, 32) and lse.shape == (0, 8)
    assert not d_k.any() and not d_v.any()
    for support in (blocks, None):
        value, d_index_q, d_index_k = loss(inputs, support)
        assert float(value) == 0 and d_index_q.shape == (0, 2, 32) and not d_index_k.any()


def test_one_token_attends_to_itself():
    inputs = made(CASES[0])
    blocks = selected(inputs, 1)
    out, lse, _, _, d_v = attention(inputs, blocks)
    row = inputs.layout.page_table[0, 0]
    assert torch.equal(out[0], inputs.v[row, 0].expand(4, -1))
    score = (inputs.q[0].double() @ inputs.k[row, 0, 0].double()) * 32**-0.5
    torch.testing.assert_close(lse[0], score.float(), rtol=1e-6, atol=1e-6)
    assert not d_v[row, 1:].any()
    assert float(loss(inputs, blocks)[0]) == pytest.approx(0, abs=1e-6)


def test_torchs_default_dtype_changes_nothing():
    """Where a model is loaded it often is bf16."""
    inputs = made(CASES[1])
    blocks = selected(inputs, 3)

    def results() -> list[Tensor]:
        dense = dense_attention(inputs.q, inputs.k, inputs.v, inputs.layout)
        ids = select_blocks(inputs.index_q, inputs.index_k, inputs.layout, 3)
        return [*attention(inputs, blocks), *loss(inputs, blocks), *dense, ids]

    wanted = results()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert same(results(), wanted)
    finally:
        torch.set_default_dtype(torch.float32)
