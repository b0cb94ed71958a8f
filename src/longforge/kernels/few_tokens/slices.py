"""Compiled: a matrix cut into slices of rows, the units of a product's phase."""

from longforge.kernels.few_tokens.products import multiply_rows
from longforge.kernels.numba_host import compiled

__all__ = ["multiply_slice", "slice_rows", "slices"]

UNIT = 65536
"""Multiply-adds of a unit, about: long against taking it, short against a phase."""


@compiled()
def slice_rows(inner, tokens):
    """Rows of a slice, a multiple of eight."""
    return max(8, UNIT // (inner * tokens) // 8 * 8)


@compiled()
def slices(rows, inner, tokens):
    """Number of slices."""
    step = slice_rows(inner, tokens)
    return (rows + step - 1) // step


@compiled(error_model="numpy")
def multiply_slice(slice, out, column, x, r, n, matrix, rows):
    """out[i, column : column + rows] = matrix [rows, inner] @ x[i, :inner], the rows of one slice; i < n."""
    inner = x.shape[1]
    step = slice_rows(inner, n)
    first = slice * step
    count = min(step, rows - first)
    multiply_rows(
        out.reshape(-1), column + first, out.shape[1], r.numbers, x.reshape(-1), inner, r.numbers, n,
        matrix, first * inner, inner, count, inner,
    )  # fmt: skip
