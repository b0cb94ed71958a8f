"""Compiled: bf16 matrices brought into the forms that products take (see product.py)."""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from longforge.kernels.numba_host import compiled
from longforge.kernels.tiles.vectors import (
    COLUMNS,
    FLOATS,
    HALVES,
    I8,
    WORDS,
    at_address,
    data,
    intrinsic,
    narrowed,
    number,
    pair,
    words,
)
from longforge.kernels.vector_code import transpose

__all__ = ["narrow", "panel_of_columns", "panels_of_known_rows", "panels_of_rows", "widen_codes"]


@intrinsic
def _pair_row(typingctx, out, o, a, even, odd):
    """out uint32[o:o + 16] = pairs of a[even:even + 16] and a[odd:odd + 16] (uint16)."""
    sig = types.void(out, types.intp, a, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        out, a = (data(context, builder, signature, args, i) for i in (0, 2))
        low, high = (builder.load(at_address(builder, a, args[i], HALVES), align=2) for i in (3, 4))
        builder.store(pair(builder, low, high), at_address(builder, out, args[1], WORDS), align=4)
        return context.get_dummy_value()

    return sig, codegen


@compiled(error_model="numpy")
def panels_of_rows(out, o, panel, a, a0, a_row, rows, columns):
    """Panels of the matrix a [rows, columns], with rows as the inner dimension.

    out uint32: the panel of columns 16 j.. begins at o + j * panel; rows even, columns a multiple of 16.
    """
    for p in range(rows // 2):
        even = a0 + 2 * p * a_row
        for j in range(columns // COLUMNS):
            at = even + COLUMNS * j
            _pair_row(out, o + j * panel + p * COLUMNS, a, at, at + a_row)


@compiled(error_model="numpy")
def panels_of_known_rows(out, o, panel, a, a0, a_row, rows, known, columns):
    """The same where rows from `known` on count as zeros: they may hold anything."""
    panels_of_rows(out, o, panel, a, a0, a_row, known // 2 * 2, columns)
    for j in range(columns // COLUMNS):
        first = o + j * panel
        out[first + known // 2 * COLUMNS : first + rows // 2 * COLUMNS] = 0
        if known % 2:
            last = a0 + (known - 1) * a_row + j * COLUMNS
            for c in range(COLUMNS):
                out[first + known // 2 * COLUMNS + c] = a[last + c]


@compiled(error_model="numpy")
def panel_of_columns(out, o, a, a0, a_row, inner):
    """The panel [inner / 2, 16, 2] whose columns are the 16 rows of a [16, inner] (uint32: pairs of bf16).

    out uint32 from o on; a0 and a_row in pairs; inner a multiple of 32.
    """
    transpose(out, o, COLUMNS, a, a0, a_row, COLUMNS, inner // 2)


@intrinsic
def narrow(typingctx, out, o, x, x0, count):
    """out[o:o + count] = bf16 bits of x[x0:x0 + count], to nearest even, subnormal numbers as zeros; count a
    multiple of 16."""
    n = types.intp
    sig = types.void(out, n, x, n, n)

    def codegen(context, builder, signature, args):
        out, x = (data(context, builder, signature, args, i) for i in (0, 2))
        with cgutils.for_range(builder, builder.sdiv(args[4], number(COLUMNS))) as loop:
            at = builder.mul(loop.index, number(COLUMNS))
            value = builder.load(at_address(builder, x, builder.add(args[3], at), FLOATS), align=4)
            builder.store(
                narrowed(builder, value), at_address(builder, out, builder.add(args[1], at), HALVES), align=2
            )
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def widen_codes(typingctx, out, o, a, a0, count):
    """out[o:o + count] = bf16 bits of the int8 codes a[a0:a0 + count], exact; count a multiple of 16."""
    n = types.intp
    sig = types.void(out, n, a, n, n)

    def codegen(context, builder, signature, args):
        out, a = (data(context, builder, signature, args, i) for i in (0, 2))
        codes = ir.VectorType(I8, COLUMNS)
        with cgutils.for_range(builder, builder.sdiv(args[4], number(COLUMNS))) as loop:
            at = builder.mul(loop.index, number(COLUMNS))
            code = builder.load(at_address(builder, a, builder.add(args[3], at), codes), align=1)
            bits = builder.bitcast(builder.sitofp(builder.sext(code, WORDS), FLOATS), WORDS)
            half = builder.trunc(builder.lshr(bits, words(16)), HALVES)
            builder.store(half, at_address(builder, out, builder.add(args[1], at), HALVES), align=2)
        return context.get_dummy_value()

    return sig, codegen
