"""Compiled: a matrix cut into slices of rows, the units of a product's phase."""

from longforge.kernels.few_tokens.products import multiply_rows
from longforge.kernels.few_tokens.tile_rows import multiply_halves, split_rows
from longforge.kernels.numba_host import compiled

__all__ = ["multiply_slice", "prepare_slices", "slice_rows", "slices"]

UNIT = 65536
"""Multiply-adds of a unit, about: long against taking it, short against a phase."""
TILES_UNIT = 36864
"""Weights of a unit on tiles, about. What counts there is how fast they come from the third cache: the
processor fetches ahead only once it has seen some lines of a page side by side."""


@compiled()
def slice_rows(m, rows, inner, tokens):
    """Rows of a slice of a matrix, a multiple of eight, of sixteen for tiles; rows: at least one."""
    if m.tiles:
        # An even number of slices of one size: there is often no more than one for each of two threads.
        count = 2 * max(1, rows * inner // (2 * TILES_UNIT))
        return (rows + 16 * count - 1) // (16 * count) * 16
    return max(8, UNIT // (inner * tokens) // 8 * 8)


@compiled()
def slices(m, rows, inner, tokens):
    """Number of slices; none of a matrix that the layer does not have (rows 0)."""
    if rows == 0:
        return 0
    step = slice_rows(m, rows, inner, tokens)
    return (rows + step - 1) // step


@compiled(error_model="numpy")
def prepare_slices(m, me, x, r, n):
    """What a thread does before its first slice of a product of x [:n]."""
    if m.tiles:
        split_rows(r.halves[me[0]], x.reshape(-1), x.shape[1], r.numbers, n, x.shape[1])


@compiled(error_model="numpy")
def multiply_slice(slice, m, me, out, column, x, r, n, matrix, rows):
    """out[i, column : column + rows] = matrix [rows, inner] @ x[i, :inner], the rows of one slice; i < n."""
    inner = x.shape[1]
    step = slice_rows(m, rows, inner, n)
    first = slice * step
    count = min(step, rows - first)
    if m.tiles:
        multiply_halves(
            out.reshape(-1), column + first, out.shape[1], r.numbers, n, r.halves[me[0]], matrix,
            first * inner, count, inner, r.sums[me[0]],
        )  # fmt: skip
    else:
        multiply_rows(
            out.reshape(-1), column + first, out.shape[1], r.numbers, x.reshape(-1), inner, r.numbers, n,
            matrix, first * inner, inner, count, inner,
        )  # fmt: skip
