"""The compiled building blocks of matrix tiles against float64, at sizes, strides and offsets that differ."""

import numpy as np
import pytest
import torch
from numba import types
from torch import Tensor

from longforge.kernels.numba_host import compiled, raw_array
from longforge.kernels.tiles import forms, product, softmax, vectors
from longforge.kernels.tiles.engine import TILE_ENGINE
from longforge.kernels.tiles.vectors import COLUMNS, STEP

pytestmark = pytest.mark.skipif(TILE_ENGINE is None, reason="this processor does not multiply bf16")

f32, LOG2_E = np.float32, 1.4426950408889634
UNIT = 2.0**-24
"""Of rounding to fp32; 2**-9 to bf16."""


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(f32)


def bits(x: np.ndarray | Tensor) -> np.ndarray:
    """bf16 bits (uint16), to nearest even as torch rounds."""
    return raw_array(torch.as_tensor(x).to(torch.bfloat16)).copy()


def wide(x: np.ndarray) -> np.ndarray:
    """float64 of bf16 bits (uint16, or pairs in uint32)."""
    return (x.view(np.uint16).astype(np.uint32) << 16).view(f32).astype(np.float64)


def panel_of(matrix: np.ndarray) -> np.ndarray:
    """A matrix [k, 16] as a panel, flat."""
    return np.ascontiguousarray(matrix.reshape(-1, 2, COLUMNS).transpose(0, 2, 1)).reshape(-1)


def matrix_of(panel: np.ndarray) -> np.ndarray:
    """The matrix [k, 16] of a panel (uint16, or pairs in uint32)."""
    return panel.view(np.uint16).reshape(-1, COLUMNS, 2).transpose(0, 2, 1).reshape(-1, COLUMNS)


@compiled()
def multiply(settings, c, c0, c_row, c_panel, a, a0, a_row, b, b0, b_panel, row_tiles, panels, steps, add):
    product.begin_tiles(settings)
    product.tile_product(
        c, c0, c_row, c_panel, a, a0, a_row, b, b0, b_panel, row_tiles, panels, steps, add
    )  # fmt: skip
    product.end_tiles()


@pytest.mark.parametrize("row_tiles", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("panels", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("left,right", [(np.uint16, np.uint16), (np.uint32, np.uint32)], ids=["16", "32"])
def test_a_product_is_the_matrix_product_and_touches_nothing_else(
    row_tiles: int, panels: int, steps: int, add: bool, left: type, right: type
):
    rows, inner = row_tiles * COLUMNS, steps * STEP
    a, b = bits(numbers(rows, inner)), bits(numbers(inner, panels * COLUMNS, seed=1))
    # Rows lie apart, arrays begin somewhere, and what lies between holds NaN or a mark.
    a_row, c_row, gap = inner + 6, panels * COLUMNS + 3, 10
    padded_a = np.full((rows, a_row), 0x7FC0, np.uint16)
    padded_a[:, :inner] = a
    flat_a = np.concatenate([np.full(4, 0x7FC0, np.uint16), padded_a.reshape(-1)]).view(left)
    parts = [np.concatenate([panel_of(b[:, COLUMNS * j :][:, :COLUMNS]), bits(np.full(gap, np.nan, f32))])
             for j in range(panels)]  # fmt: skip
    flat_b = np.concatenate([bits(np.full(gap, np.nan, f32)), *parts]).view(right)
    c = numbers(7 + rows * c_row, seed=2)
    before = c.copy()
    per_left, per_right = left().itemsize // 2, right().itemsize // 2
    multiply(
        product.TILE_SETTINGS, c, 7, c_row, COLUMNS, flat_a, 4 // per_left, a_row // per_left, flat_b,
        gap // per_right, (inner * COLUMNS + gap) // per_right, row_tiles, panels, steps, add,
    )  # fmt: skip
    got, old = (x[7:].reshape(rows, c_row) for x in (c, before))
    used = panels * COLUMNS
    start = old[:, :used].astype(np.float64) if add else 0.0
    reach = np.abs(start) + np.abs(wide(a)) @ np.abs(wide(b))
    assert (np.abs(got[:, :used] - (start + wide(a) @ wide(b))) <= (inner + 2) * UNIT * reach).all()
    assert np.array_equal(got[:, used:], old[:, used:]) and np.array_equal(c[:7], before[:7])


def test_a_column_of_a_product_depends_on_its_own_column_alone():
    rows, inner, panels = 48, 96, 3
    a, b = bits(numbers(rows, inner)), bits(numbers(inner, panels * COLUMNS, seed=1))
    noisy = bits(numbers(inner, panels * COLUMNS, seed=3))
    noisy[:, 5::7] = bits(np.array([np.nan, np.inf, -np.inf], f32)).repeat(32)[:, None]

    def times_a(right: np.ndarray, at: int, count: int) -> np.ndarray:
        c = np.empty(rows * count * COLUMNS, f32)
        flat = np.concatenate([panel_of(right[:, COLUMNS * j :][:, :COLUMNS]) for j in range(panels)])
        size = inner * COLUMNS
        multiply(product.TILE_SETTINGS, c, 0, count * COLUMNS, COLUMNS, a.reshape(-1), 0, inner, flat,
                 at * size, size, rows // COLUMNS, count, inner // STEP, False)  # fmt: skip
        return c.reshape(rows, -1)

    whole = times_a(b, 0, panels)
    for at, count in ((0, 1), (1, 1), (2, 1), (0, 2), (1, 2)):
        part = slice(at * COLUMNS, (at + count) * COLUMNS)
        assert np.array_equal(times_a(b, at, count), whole[:, part])
    for column in (0, 17, 47):
        mixed = noisy.copy()
        mixed[:, column] = b[:, column]
        assert np.array_equal(times_a(mixed, 0, panels)[:, column], whole[:, column])


def test_subnormal_numbers_count_as_zero_in_a_product():
    tiny = bits(np.full((16, 32), 2.0**-127, f32))
    assert tiny.all()
    c = np.empty(256, f32)
    for a, b in ((tiny, bits(np.full((32, 16), 2.0**20))), (bits(np.full((16, 32), 2.0**20)), tiny.T)):
        flat = panel_of(np.ascontiguousarray(b))
        multiply(product.TILE_SETTINGS, c, 0, 16, 16, a.reshape(-1), 0, 32, flat, 0, 0, 1, 1, 1, False)
        assert not c.any()


def test_panels_of_rows_hold_the_matrix():
    rows, columns, a_row, panel = 6, 48, 53, 70
    a = np.random.default_rng(0).integers(0, 1 << 16, 3 + rows * a_row, np.uint16)
    out = np.full(5 + 3 * panel, 7, np.uint32)
    forms.panels_of_rows(out, 5, panel, a, 3, a_row, rows, columns)
    for j in range(3):
        part = out[5 + j * panel : 5 + (j + 1) * panel]
        wanted = a[3:].reshape(rows, a_row)[:, j * COLUMNS : (j + 1) * COLUMNS]
        assert np.array_equal(matrix_of(part[: rows // 2 * COLUMNS]), wanted)
        assert (part[rows // 2 * COLUMNS :] == 7).all(), "what lies between panels is left alone"


@pytest.mark.parametrize("known", [0, 1, 2, 5, 31, 32])
def test_rows_that_nobody_wrote_become_zeros(known: int):
    rows, columns, a_row = 32, 32, 40
    a = np.random.default_rng(0).integers(0, 1 << 16, (rows, a_row), np.uint16)
    a[known:] = 0x7FC0
    out = np.full(2 * rows // 2 * COLUMNS, 0x7FC07FC0, np.uint32)
    flat = a.reshape(-1)
    forms.panels_of_known_rows(out, 0, rows // 2 * COLUMNS, flat, 0, a_row, rows, known, columns)
    wanted = np.where(np.arange(rows)[:, None] < known, a[:, :columns], 0)
    assert np.array_equal(np.hstack([matrix_of(half) for half in out.reshape(2, -1)]), wanted)


@pytest.mark.parametrize("inner", [32, 96])
def test_a_panel_of_columns_is_the_transposed_matrix(inner: int):
    a = np.random.default_rng(0).integers(0, 1 << 16, (COLUMNS, inner + 10), np.uint16)
    flat = np.concatenate([np.zeros(6, np.uint16), a.reshape(-1)]).view(np.uint32)
    out = np.zeros(2 + inner // 2 * COLUMNS, np.uint32)
    forms.panel_of_columns(out, 2, flat, 3, (inner + 10) // 2, inner)
    assert np.array_equal(matrix_of(out[2:]), a[:, :inner].T)


@compiled()
def narrow(out, o, x, x0, count):
    forms.narrow(out, o, x, x0, count)


def test_narrow_rounds_to_nearest_even_as_torch_does():
    rng = np.random.default_rng(0)
    # Every kind of exponent, and of each number its neighbours around the middle between two bf16 numbers.
    top = rng.integers(0, 1 << 16, 4096).astype(np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (top[:, None] | low).reshape(-1).view(f32)
    special = np.array([0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 1.0, 1.00390625], f32)
    x = np.concatenate([x, special, special])
    out = np.full(len(x) + 2, 9, np.uint16)
    narrow(out, 1, np.concatenate([x[:3], x]), 3, len(x))
    assert out[0] == out[-1] == 9
    got, wanted, exponent = out[1:-1], bits(x), x.view(np.uint32) >> 23 & 0xFF
    nan, subnormal = np.isnan(x), exponent == 0
    assert np.array_equal(got[~nan & ~subnormal], wanted[~nan & ~subnormal])
    assert np.isnan(wide(got[nan])).all()
    assert np.array_equal(got[subnormal], wanted[subnormal] & 0x8000), "subnormal numbers become zeros"


@compiled()
def widen_codes(out, o, a, a0, count):
    forms.widen_codes(out, o, a, a0, count)


def test_widened_codes_are_exact():
    codes = np.arange(-128, 128).astype(np.int8)
    out = np.full(258, 9, np.uint16)
    widen_codes(out, 1, np.concatenate([codes[:5], codes]), 5, 256)
    assert np.array_equal(wide(out[1:-1]), codes) and out[0] == out[-1] == 9


@compiled()
def greatest_bits(a, a0, count):
    return softmax.greatest_bits(a, a0, count)


@pytest.mark.parametrize("count", [32, 96, 128, 320])
def test_the_greatest_number_is_found_wherever_it_stands_and_whatever_its_sign(count: int):
    a = bits(numbers(count + 1))
    a[0] = 0x7F7F
    for at in range(1, count + 1):
        for sign in (0, 0x8000):
            one = a.copy()
            one[at] = 0x4680 | sign
            assert greatest_bits(one, 1, count) == 0x4680
    zeros = np.full(count + 1, 0x8000, np.uint16)
    assert greatest_bits(zeros, 1, count) == 0


@compiled()
def column_maxima(out, o, scores, s0, rows, factors, f0):
    softmax.column_maxima(out, o, scores, s0, rows, factors, f0)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 33])
def test_column_maxima(rows: int):
    x, factors = numbers(rows, COLUMNS) - 4, np.abs(numbers(rows + 2, seed=1))
    flat, out = np.concatenate([np.full(3, 9, f32), x.reshape(-1), np.full(16, 9, f32)]), np.zeros(18, f32)
    column_maxima(out, 1, flat, 3, rows, np.empty(0, f32), 0)
    assert np.array_equal(out[1:17], x.max(0)) and out[0] == out[17] == 0
    column_maxima(out, 1, flat, 3, rows, factors, 2)
    assert np.array_equal(out[1:17], (x * factors[2:, None]).max(0))


@compiled()
def multiply_rows(x, x0, rows, factors, f0):
    softmax.multiply_rows(x, x0, rows, factors, f0)


def test_multiply_rows():
    x, factors = numbers(2 + 5 * COLUMNS + 2), numbers(20, seed=1)
    wanted = x.copy()
    wanted[2:-2] = (x[2:-2].reshape(5, COLUMNS) * factors[3:19]).reshape(-1)
    multiply_rows(x, 2, 5, factors, 3)
    assert np.array_equal(x, wanted)


@compiled()
def online_softmax(scores, s0, seen, rows, scale, state, st, panel, p0):
    return softmax.online_softmax(scores, s0, seen, rows, scale, state, st, panel, p0)


@pytest.mark.parametrize("seen", [(1,), (64,), (33, 1, 64, 2), (64, 7, 32, 31)], ids=str)
@pytest.mark.parametrize("order", ["any", "falling", "rising"])
def test_steps_of_the_online_softmax_are_one_softmax(seen: tuple[int, ...], order: str):
    """Rows that do not count hold NaN; where scores fall from step to step no older sum has to change."""
    rows, scale = 64, f32(0.3 * LOG2_E)
    state = np.zeros(1 + 3 * COLUMNS, f32)
    state[1:17] = -np.inf
    taken, shares = [], np.zeros((0, COLUMNS))
    for step, count in enumerate(seen):
        scores = np.full((rows, COLUMNS), np.nan, f32)
        shift = {"any": 0, "falling": -40 * step, "rising": 40 * step}[order]
        scores[:count] = 8 * numbers(count, COLUMNS, seed=step) + shift
        panel = np.full(2 + rows // 2 * COLUMNS, 0x7FC07FC0, np.uint32)
        flat = np.concatenate([np.full(5, np.nan, f32), scores.reshape(-1)])
        changed = online_softmax(flat, 5, count, rows, scale, state, 1, panel, 2)
        older = state[1 + 2 * COLUMNS :].astype(np.float64)
        assert changed == bool((older != 1).any())
        assert changed if step == 0 or order == "rising" else order == "any" or not changed
        mine = wide(matrix_of(panel[2:]))
        assert not mine[count:].any(), "what does not count has no share"
        shares = np.concatenate([shares * older, mine[:count]])
        taken.append(scores[:count].astype(np.float64) * 0.3)
    exact = np.concatenate(taken)
    powers = np.exp(exact - exact.max(0))
    greatest, sums = state[1:17].astype(np.float64), state[17:33].astype(np.float64)
    top = np.abs(exact).max()
    # fp32's rounding of the scaled scores, of the size of the greatest, stands in the exponent.
    np.testing.assert_allclose(greatest / LOG2_E, exact.max(0), rtol=0, atol=4 * UNIT * top)
    loose = 8 * UNIT * top + 1e-6
    np.testing.assert_allclose(sums, powers.sum(0), rtol=loose)
    np.testing.assert_allclose(shares, powers, rtol=2.0**-8 + loose, atol=1e-37)


@compiled()
def softmax_gradients(
    scores, d_shares, at, seen, rows, scale, lse, delta, column, shares, d_scores, first, row, panel, p0
):
    softmax.softmax_gradients(
        scores, d_shares, at, seen, rows, scale, lse, delta, column, shares, d_scores, first, row, panel, p0
    )


@pytest.mark.parametrize("seen", [1, 2, 31, 32])
def test_softmax_gradients_are_autograds(seen: int):
    rows, row, scale = 32, 50, 0.7
    scores, d_shares = (np.full((rows, COLUMNS), np.nan, f32) for _ in range(2))
    scores[:seen], d_shares[:seen] = 3 * numbers(seen, COLUMNS), numbers(seen, COLUMNS, seed=1)
    x = torch.from_numpy(scores[:seen].astype(np.float64)).requires_grad_()
    wanted = (scale * x).softmax(0)
    cotangent = torch.from_numpy(d_shares[:seen].astype(np.float64))
    (gradient,) = torch.autograd.grad(wanted, x, cotangent)
    lse = ((scale * x.detach()).logsumexp(0) * LOG2_E).numpy().astype(f32)
    delta = (wanted.detach() * cotangent).sum(0).numpy().astype(f32)
    shares, d_scores = np.full((2, 3 + rows * row), 9, np.uint16)
    panel = np.full(1 + rows // 2 * COLUMNS, 0x7FC07FC0, np.uint32)
    flat, d_flat = (np.concatenate([np.full(2, np.nan, f32), y.reshape(-1)]) for y in (scores, d_shares))
    lanes, d_lanes = (np.concatenate([np.full(4, np.nan, f32), y]) for y in (lse, delta))
    softmax_gradients(
        flat,
        d_flat,
        2,
        seen,
        rows,
        f32(scale * LOG2_E),
        lanes,
        d_lanes,
        4,
        shares,
        d_scores,
        3,
        row,
        panel,
        1,
    )
    for got, exact in ((shares, wanted.detach()), (d_scores, gradient / scale)):
        table = got[3:].reshape(rows, row)
        assert (table[:, COLUMNS:] == 9).all() and (got[:3] == 9).all()
        # bf16's rounding, and fp32's of d_share - delta, which may cancel.
        np.testing.assert_allclose(wide(table[:seen, :COLUMNS].copy()).reshape(seen, -1), exact.numpy(),
                                   rtol=2.0**-8, atol=3e-6)  # fmt: skip
        assert not table[seen:, :COLUMNS].any()
    assert np.array_equal(matrix_of(panel[1:]), d_scores[3:].reshape(rows, row)[:, :COLUMNS])


@compiled()
def mean_of_powers(out, o, scores, s0, row, rows, columns, scale, shifts, h0):
    softmax.mean_of_powers(out, o, scores, s0, row, rows, columns, scale, shifts, h0)


@pytest.mark.parametrize("rows,columns", [(1, 16), (4, 64), (16, 32)])
def test_mean_of_powers(rows: int, columns: int):
    x, shifts = 4 * numbers(rows, columns + 3), np.abs(numbers(2 + rows, seed=1)) + 20
    out = np.full(columns + 2, 9, f32)
    flat = np.concatenate([np.full(7, np.nan, f32), x.reshape(-1)])
    mean_of_powers(out, 1, flat, 7, columns + 3, rows, columns, f32(1.3), shifts, 2)
    exact = np.exp2(float(f32(1.3)) * x[:, :columns].astype(np.float64) - shifts[2:, None]).mean(0)
    # The exponent, up to some 40, is rounded once.
    np.testing.assert_allclose(out[1:-1], exact, rtol=64 * UNIT + 3e-7)
    assert out[0] == out[-1] == 9


@compiled()
def divergence_step(teacher, t0, student, s0, seen, columns, scale, shift, factor, out, o):
    return softmax.divergence_step(teacher, t0, student, s0, seen, columns, scale, shift, factor, out, o)


@pytest.mark.parametrize("seen", [1, 16, 39, 64])
def test_divergence_step(seen: int):
    """The first half of the teacher's tokens has no mass at all; those that do not count hold NaN."""
    columns, scale, factor = 64, 0.8 * LOG2_E, 0.37
    logits, teacher = (np.full(columns + 3, np.nan, f32) for _ in range(2))
    logits[3 : 3 + seen] = 3 * numbers(seen)
    mass = np.exp(numbers(seen, seed=1))
    mass[: seen // 2] = 0
    teacher[3 : 3 + seen] = mass / mass.sum()
    p, x = (y[3 : 3 + seen].astype(np.float64) for y in (teacher, logits))
    shift = np.log2(np.exp2(scale * x).sum())
    out = np.full(columns + 2, 9, np.uint16)
    value = divergence_step(teacher, 3, logits, 3, seen, columns, f32(scale), f32(shift), f32(factor), out, 1)
    share = np.exp2(scale * x - shift)
    exact = np.where(p > 0, p * (np.log2(np.where(p > 0, p, 1)) - np.log2(share)), 0.0).sum()
    assert abs(value - exact) < 3e-6
    got = wide(out[1:-1].copy())
    np.testing.assert_allclose(got[:seen], factor * (share - p), rtol=2.0**-8, atol=1e-6)
    assert not got[seen:].any() and out[0] == out[-1] == 9


@compiled()
def add_row(state, st, scores, s0, seen, columns, scale):
    softmax.add_row(state, st, scores, s0, seen, columns, scale)


@pytest.mark.parametrize("seen", [(1,), (64, 1, 17), (16, 48, 31, 64)], ids=str)
def test_rows_added_one_by_one_are_one_softmax(seen: tuple[int, ...]):
    scale, state, taken = f32(0.9), np.array([9, -np.inf, 0, 9], f32), []
    for step, count in enumerate(seen):
        row = np.full(2 + 64, np.nan, f32)
        row[2 : 2 + count] = 6 * numbers(count, seed=step) + 10 * (-1) ** step
        add_row(state, 1, row, 2, count, (count + 15) // COLUMNS * COLUMNS, scale)
        taken.append(row[2 : 2 + count].astype(np.float64) * float(scale))
    exact = np.concatenate(taken)
    np.testing.assert_allclose(state[1] + np.log2(state[2]), np.log2(np.exp2(exact).sum()), atol=1e-5)
    np.testing.assert_allclose(state[1], exact.max(), atol=1e-5)
    assert state[0] == state[3] == 9


def over_lanes(function):
    """The IR function of sixteen lanes as out[i] = function(x[i])."""

    @vectors.intrinsic
    def one(typingctx, out, x, i):
        def codegen(context, builder, signature, args):
            out, x = (vectors.data(context, builder, signature, args, i) for i in (0, 1))
            to, of = (vectors.at_address(builder, base, args[2], vectors.FLOATS) for base in (out, x))
            builder.store(function(builder, builder.load(of, align=4)), to, align=4)
            return context.get_dummy_value()

        return types.void(out, x, types.intp), codegen

    @compiled()
    def every(out, x):
        for i in range(0, len(x), COLUMNS):
            one(out, x, i)

    return every


powers, logarithms = over_lanes(vectors.power_of_two), over_lanes(vectors.logarithm_of_two)


def test_power_of_two_is_right_to_the_last_bits_stays_small_and_hides_no_nan():
    x = -np.concatenate([np.linspace(0, 126, 16_000), np.arange(0, 128) / 2]).astype(f32)
    out = np.empty_like(x)
    powers(out, x)
    exact = np.exp2(x.astype(np.float64))
    assert float(np.max(np.abs(out - exact) / exact)) < 2e-7
    assert out[0] == 1
    x = np.array([-126, -126.5, -127, -1e4, -3e38, -np.inf, *[np.nan] * 10], f32)
    powers(out, x)
    assert (out[:6] == 2.0**-126).all() and np.isnan(out[6:16]).all()


def test_logarithm_of_two_is_right_to_the_last_bits():
    rng = np.random.default_rng(0)
    near = np.linspace(0.5, 2, 16_000)
    far = 2.0 ** rng.uniform(-126, 127, 16_000)
    x = np.concatenate([near, far, 2.0 ** np.arange(-112, 112)]).astype(f32)
    out = np.empty_like(x)
    logarithms(out, x)
    exact = np.log2(x.astype(np.float64))
    assert (np.abs(out - exact) <= 2e-7 + UNIT * np.abs(exact)).all()
    assert np.array_equal(out[-224:], np.arange(-112, 112))
