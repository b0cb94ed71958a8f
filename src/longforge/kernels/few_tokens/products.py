"""Compiled: products of a few rows with a matrix, attention scores and attention sums, made of tiles."""

import numpy as np

from longforge.kernels.few_tokens.pages import PAIR, dots_of_page, sums_of_page
from longforge.kernels.few_tokens.vectors import dots_of_rows
from longforge.kernels.numba_host import compiled
from longforge.kernels.vector_code import widen

f32 = np.float32
__all__ = ["add_page", "multiply_rows", "score_page"]

_rows_by_4, _rows_by_3, _rows_by_2 = (dots_of_rows(4, tokens) for tokens in (4, 3, 2))
_rows_by_1, _row_by_1 = dots_of_rows(8, 1), dots_of_rows(1, 1)
_many_keys_by_2, _keys_by_2, _keys_by_1 = dots_of_page(8, 2), dots_of_page(4, 2), dots_of_page(4, 1)
_key_by_1 = dots_of_page(1, 1)
_sums_4, _sums_2, _sums_1 = (sums_of_page(heads, PAIR) for heads in (4, 2, 1))
_sum_1 = sums_of_page(1, 16)


@compiled(error_model="numpy")
def multiply_rows(out, o, o_row, to, x, x_row, of, count, w, w0, w_row, rows, inner):
    """out[o + to[j] * o_row + r] = w[w0 + r * w_row :] . x[of[j] * x_row :] for j < count and r < rows.

    Flat arrays; to and of int64: where each token's row is written and read. inner: a multiple of 16.
    """
    whole = rows - rows % 4 if count > 1 else rows - rows % 8
    step = 4 if count > 1 else 8
    for r in range(0, whole, step):
        at, place, j = w0 + r * w_row, o + r, 0
        while j + 4 <= count:
            _rows_by_4(out, place, o_row, to, x, x_row, of, j, w, at, w_row, inner)
            j += 4
        if count - j == 3:
            _rows_by_3(out, place, o_row, to, x, x_row, of, j, w, at, w_row, inner)
        elif count - j == 2:
            _rows_by_2(out, place, o_row, to, x, x_row, of, j, w, at, w_row, inner)
        elif count == 1:
            _rows_by_1(out, place, o_row, to, x, x_row, of, j, w, at, w_row, inner)
        elif j < count:
            for k in range(4):
                _row_by_1(out, place + k, o_row, to, x, x_row, of, j, w, at + k * w_row, w_row, inner)
    for r in range(whole, rows):
        for j in range(count):
            _row_by_1(out, o + r, o_row, to, x, x_row, of, j, w, w0 + r * w_row, w_row, inner)


@compiled(error_model="numpy")
def score_page(out, o, o_row, q, q0, heads, dim, keys, at, key_row, first, end, block_size):
    """out[o + h * o_row + t] = q[q0 + h * dim :] . keys[at + t * key_row :], dim long, for h < heads and
    t < block_size; -inf but for first <= t < end. q is spread."""
    inner, t = dim - dim % 16, first - first % 8
    while t < end:
        step = 8 if t + 8 <= block_size else (4 if t + 4 <= block_size else 1)
        key, h = at + t * key_row, 0
        while h < heads:
            to, of = o + h * o_row + t, q0 + h * dim
            if step == 1:
                _key_by_1(out, to, o_row, q, of, dim, keys, key, key_row, inner)
                h += 1
            elif h + 2 > heads:
                _keys_by_1(out, to, o_row, q, of, dim, keys, key, key_row, inner)
                if step == 8:
                    _keys_by_1(out, to + 4, o_row, q, of, dim, keys, key + 4 * key_row, key_row, inner)
                h += 1
            elif step == 4:
                _keys_by_2(out, to, o_row, q, of, dim, keys, key, key_row, inner)
                h += 2
            else:
                _many_keys_by_2(out, to, o_row, q, of, dim, keys, key, key_row, inner)
                h += 2
        t += step
    for h in range(heads):
        to = o + h * o_row
        for t in range(first, end):
            for d in range(inner, dim):
                out[to + t] += q[q0 + h * dim + d] * widen(keys[at + t * key_row + d])
        for t in range(first):
            out[to + t] = f32(-np.inf)
        for t in range(end, block_size):
            out[to + t] = f32(-np.inf)


@compiled(error_model="numpy")
def add_page(out, o, heads, dim, p, p0, p_row, values, at, value_row, first, end):
    """out[o + h * dim + d] += sum over first <= t < end of p[p0 + h * p_row + t] * values[at + t * value_row
    + d]; out is spread."""
    h, whole = 0, dim - dim % PAIR
    while h < heads:
        place, share = o + h * dim, p0 + h * p_row
        rows = 4 if h + 4 <= heads else (2 if h + 2 <= heads else 1)
        for c in range(0, whole, PAIR):
            if rows == 4:
                _sums_4(out, place + c, dim, p, share, p_row, values, at + c, value_row, first, end)
            elif rows == 2:
                _sums_2(out, place + c, dim, p, share, p_row, values, at + c, value_row, first, end)
            else:
                _sums_1(out, place + c, dim, p, share, p_row, values, at + c, value_row, first, end)
        h += rows
    if whole == dim:
        return
    for h in range(heads):
        place, share = o + h * dim, p0 + h * p_row
        for c in range(whole, dim - dim % 16, 16):
            _sum_1(out, place + c, dim, p, share, p_row, values, at + c, value_row, first, end)
        for d in range(dim - dim % 16, dim):
            for t in range(first, end):
                out[place + d] += p[share + t] * widen(values[at + t * value_row + d])
