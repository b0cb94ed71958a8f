"""Compiled: products of a few rows with a bf16 matrix on a processor with matrix tiles.

The matrix lies in panels (`in_panels`): sixteen of its rows are the right side of a tile product. A row of x
is cut into two bf16 numbers, x = high + low up to 2^-17 of x, which take two rows of the left side. So
products are nearly as exact as those of fp32 rows, and up to eight tokens take no more tile
products than one does. A token's result is the same in any company: it follows from its own
two rows of the left side.
"""

import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import overload
from torch import Tensor

from longforge.kernels.numba_host import compiled
from longforge.kernels.tiles.engine import TILE_ENGINE
from longforge.kernels.tiles.product import tile_product
from longforge.kernels.tiles.vectors import (
    COLUMNS,
    FLOATS,
    HALVES,
    STEP,
    WORDS,
    at_address,
    data,
    intrinsic,
    narrowed,
    number,
    words,
)

__all__ = ["PANELS", "fits_panels", "in_panels", "multiply_halves", "scratch_for", "split_rows"]

PANELS = 2
"""Panels that are multiplied at a time."""


def fits_panels(rows: int, inner: int) -> bool:
    """Whether this machine multiplies a bf16 matrix of this shape so."""
    return TILE_ENGINE == "amx" and rows % COLUMNS == 0 and inner % STEP == 0


def in_panels(weight: Tensor) -> Tensor:
    """bf16 [..., rows, inner] -> the same numbers as [..., rows / 16, inner / 2, 16, 2]."""
    *front, rows, inner = weight.shape
    parts = weight.reshape(*front, rows // COLUMNS, COLUMNS, inner // 2, 2)
    return parts.transpose(-3, -2).contiguous()


def scratch_for(threads: int, tokens: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    """(halves uint16 [threads, ...], sums fp32 [threads, ...]) for split_rows and multiply_halves.

    They begin at cache lines, as torch's memory does: a tile whose rows lie across two takes six times
    as long to load.
    """
    rows = -(-2 * tokens // COLUMNS) * COLUMNS
    halves = torch.zeros(threads, rows * inner, dtype=torch.uint16)
    return halves.numpy(), torch.zeros(threads, PANELS * rows * COLUMNS).numpy()


@intrinsic
def _split(typingctx, halves, h, below, x, x0, count):
    """halves[h + i] = x[x0 + i] as bf16 bits, halves[h + below + i] = what that leaves; i < count, a multiple
    of 16. Nothing where there are no matrix tiles: a processor that does not know bf16 would have to call a
    function for it that is not there."""
    n = types.intp
    sig = types.void(halves, n, n, x, n, n)

    def codegen(context, builder, signature, args):
        if TILE_ENGINE != "amx":
            return context.get_dummy_value()
        halves, x = (data(context, builder, signature, args, i) for i in (0, 3))
        with cgutils.for_range(builder, builder.sdiv(args[5], number(COLUMNS))) as loop:
            at = builder.mul(loop.index, number(COLUMNS))
            value = builder.load(at_address(builder, x, builder.add(args[4], at), FLOATS), align=4)
            high = narrowed(builder, value)
            wide = builder.bitcast(builder.shl(builder.zext(high, WORDS), words(16)), FLOATS)
            low = narrowed(builder, builder.fsub(value, wide))
            to = builder.add(args[1], at)
            builder.store(high, at_address(builder, halves, to, HALVES), align=2)
            builder.store(low, at_address(builder, halves, builder.add(to, args[2]), HALVES), align=2)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def _add_two(typingctx, out, o, sums, s):
    """out[o + i] = sums[s + i] + sums[s + 16 + i], i < 16."""
    n = types.intp
    sig = types.void(out, n, sums, n)

    def codegen(context, builder, signature, args):
        out, sums = (data(context, builder, signature, args, i) for i in (0, 2))
        high = builder.load(at_address(builder, sums, args[3], FLOATS), align=4)
        low = builder.load(at_address(builder, sums, builder.add(args[3], number(COLUMNS)), FLOATS), align=4)
        builder.store(builder.fadd(high, low), at_address(builder, out, args[1], FLOATS), align=4)
        return context.get_dummy_value()

    return sig, codegen


@compiled(error_model="numpy")
def split_rows(halves, x, x_row, of, count, inner):
    """halves [2 count, inner] = x[of[j] * x_row :] for j < count, high above low; flat arrays."""
    for j in range(count):
        _split(halves, 2 * j * inner, inner, x, of[j] * x_row, inner)


def multiply_halves(out, o, o_row, to, count, halves, w, w0, rows, inner, sums):
    """out[o + to[j] * o_row + r] = row r of the panels at w0 . row j that was split; r < rows, j < count.

    Flat arrays; rows a multiple of 16, inner of 32. Between begin_tiles and end_tiles. For compiled code:
    numba takes the body from the overload below.
    """
    raise NotImplementedError("compiled code only")


@overload(multiply_halves)
def _multiply_halves_of(out, o, o_row, to, count, halves, w, w0, rows, inner, sums):
    return _with_tiles if TILE_ENGINE == "amx" and w.dtype == types.uint16 else _without_tiles


@compiled(error_model="numpy")
def _multiply(out, o, o_row, to, count, halves, w, w0, rows, inner, sums):
    row_tiles = (2 * count + COLUMNS - 1) // COLUMNS
    panel = row_tiles * COLUMNS * COLUMNS
    for first in range(0, rows, PANELS * COLUMNS):
        panels = min(PANELS, (rows - first) // COLUMNS)
        tile_product(
            sums, 0, COLUMNS, panel, halves, 0, inner, w, w0 + first * inner, COLUMNS * inner, row_tiles,
            panels, inner // STEP, False,
        )  # fmt: skip
        for j in range(count):
            place = o + to[j] * o_row + first
            for p in range(panels):
                _add_two(out, place + p * COLUMNS, sums, p * panel + 2 * j * COLUMNS)


def _with_tiles(out, o, o_row, to, count, halves, w, w0, rows, inner, sums):
    _multiply(out, o, o_row, to, count, halves, w, w0, rows, inner, sums)


def _without_tiles(out, o, o_row, to, count, halves, w, w0, rows, inner, sums):
    """Panels are only made of bf16 matrices, and only where there are tiles."""
