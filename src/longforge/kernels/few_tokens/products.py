"""Compiled: products of a few rows with a matrix, attention scores and attention sums, made of tiles."""

from longforge.kernels.few_tokens.vectors import dots_of_keys, dots_of_rows, weighted_sums
from longforge.kernels.numba_host import compiled
from longforge.kernels.vector_code import widen

__all__ = ["add_weighted", "multiply_rows", "score_keys"]

_rows_by_4, _rows_by_3, _rows_by_2 = (dots_of_rows(4, tokens) for tokens in (4, 3, 2))
_rows_by_1, _row_by_1 = dots_of_rows(8, 1), dots_of_rows(1, 1)
_keys_by_4, _keys_by_2, _keys_by_1 = (dots_of_keys(4, heads) for heads in (4, 2, 1))
_key_by_1 = dots_of_keys(1, 1)
_sums_4, _sums_2, _sums_1 = (weighted_sums(heads, 2) for heads in (4, 2, 1))
_sum_1 = weighted_sums(1, 1)


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
def score_keys(out, o, o_row, q, q0, heads, dim, keys, at, count):
    """out[o + h * o_row + j] = q[q0 + h * dim :] . keys[at[j] :], dim long, for h < heads and j < count."""
    inner = dim - dim % 16
    for j in range(0, count - count % 4, 4):
        h = 0
        while h + 4 <= heads:
            _keys_by_4(out, o + h * o_row + j, o_row, q, q0 + h * dim, dim, keys, at, j, inner)
            h += 4
        if h + 2 <= heads:
            _keys_by_2(out, o + h * o_row + j, o_row, q, q0 + h * dim, dim, keys, at, j, inner)
            h += 2
        if h < heads:
            _keys_by_1(out, o + h * o_row + j, o_row, q, q0 + h * dim, dim, keys, at, j, inner)
    for j in range(count - count % 4, count):
        for h in range(heads):
            _key_by_1(out, o + h * o_row + j, o_row, q, q0 + h * dim, dim, keys, at, j, inner)
    if inner < dim:
        for h in range(heads):
            for j in range(count):
                for d in range(inner, dim):
                    out[o + h * o_row + j] += q[q0 + h * dim + d] * widen(keys[at[j] + d])


@compiled(error_model="numpy")
def add_weighted(out, o, heads, dim, p, p0, p_row, values, at, count):
    """out[o + h * dim + d] += sum over j < count of p[p0 + h * p_row + j] * values[at[j] + d]."""
    h, whole = 0, dim - dim % 32
    while h < heads:
        place, share = o + h * dim, p0 + h * p_row
        rows = 4 if h + 4 <= heads else (2 if h + 2 <= heads else 1)
        for c in range(0, whole, 32):
            if rows == 4:
                _sums_4(out, place + c, dim, p, share, p_row, values, at, c, count)
            elif rows == 2:
                _sums_2(out, place + c, dim, p, share, p_row, values, at, c, count)
            else:
                _sums_1(out, place + c, dim, p, share, p_row, values, at, c, count)
        h += rows
    for h in range(heads):
        for c in range(whole, dim - dim % 16, 16):
            _sum_1(out, o + h * dim + c, dim, p, p0 + h * p_row, p_row, values, at, c, count)
        for d in range(dim - dim % 16, dim):
            total = out[o + h * dim + d]
            for j in range(count):
                total += p[p0 + h * p_row + j] * widen(values[at[j] + d])
            out[o + h * dim + d] = total
