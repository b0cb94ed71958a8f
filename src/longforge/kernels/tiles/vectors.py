"""Vectors of sixteen fp32 lanes as LLVM IR: what the other files of this folder are made of."""

import math
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

__all__ = [
    "BYTES",
    "COLUMNS",
    "FLOATS",
    "HALVES",
    "I8",
    "I16",
    "I32",
    "I64",
    "PAIRS",
    "STEP",
    "WORDS",
    "at_address",
    "call",
    "data",
    "floats",
    "fma",
    "greatest_row",
    "intrinsic",
    "larger",
    "logarithm_of_two",
    "narrowed",
    "number",
    "pair",
    "power_of_two",
    "splat",
    "words",
]

intrinsic: Any = numba_intrinsic  # compiled callers leave out the typing context, which checkers cannot know

COLUMNS = 16
"""Columns of a panel, rows of a tile, and lanes of a vector."""
STEP = 32
"""Products that are summed in one step: inner dimensions are multiples of it."""


class _BFloat(ir.Type):
    """llvmlite has no bf16 of its own."""

    def _to_string(self) -> str:
        return "bfloat"


I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
BYTES = ir.PointerType(I8)
FLOATS = ir.VectorType(ir.FloatType(), COLUMNS)
WORDS = ir.VectorType(I32, COLUMNS)
HALVES = ir.VectorType(I16, COLUMNS)
PAIRS = ir.VectorType(_BFloat(), 2 * COLUMNS)
BF16S = ir.VectorType(_BFloat(), COLUMNS)


def call(builder, name: str, result, *arguments):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    found = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(found, arguments)


def data(context, builder, signature, args, i):
    return context.make_array(signature.args[i])(context, builder, args[i]).data


def at_address(builder, base, index, kind):
    return builder.bitcast(builder.gep(base, [index]), ir.PointerType(kind))


def number(value: int):
    return ir.Constant(I64, value)


def floats(value: float):
    return ir.Constant(FLOATS, [ir.Constant(ir.FloatType(), value)] * COLUMNS)


def words(value: int):
    return ir.Constant(WORDS, [value] * COLUMNS)


def splat(builder, value, kind):
    undefined = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, COLUMNS), [0] * COLUMNS))


def fma(builder, x, y, z):
    return call(builder, "llvm.fma.v16f32", FLOATS, x, y, z)


def larger(builder, x, y):
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


_POWER = (0.0013264728768850862, 0.009671513183108781, 0.055507337444782916, 0.24022242077091338,
          0.6931469775951136, 1.0)  # fmt: skip
"""2**r on [-1/2, 1/2] from r**5 down: least relative error (9.2e-8) of those that are exact at 0."""


def power_of_two(builder, x):
    """2**x for x <= 0, relative error below 2e-7; below 2**-126 it stays there. NaN stays NaN."""
    # In this order: what is not above -126 is x, so NaN too.
    x = larger(builder, floats(-126.0), x)
    # 1.5 * 2**23: adding it rounds to the nearest integer, which then stands in the low mantissa bits.
    shifted = builder.fadd(x, floats(12582912.0))
    r = builder.fsub(x, builder.fsub(shifted, floats(12582912.0)))
    p = floats(_POWER[0])
    for term in _POWER[1:]:
        p = fma(builder, p, r, floats(term))
    n = builder.shl(builder.bitcast(shifted, WORDS), words(23))
    return builder.bitcast(builder.add(builder.bitcast(p, WORDS), n), FLOATS)


def narrowed(builder, x):
    """bf16 bits <16 x i16> of <16 x float>, to nearest even."""
    return builder.bitcast(builder.fptrunc(x, BF16S), HALVES)


def pair(builder, even, odd):
    """<16 x i32> with the bits of even in the lower and of odd in the upper halves; both <16 x i16>."""
    low, high = builder.zext(even, WORDS), builder.zext(odd, WORDS)
    return builder.or_(low, builder.shl(high, words(16)))


def logarithm_of_two(builder, x):
    """log2(x) of normal x > 0, absolute error below 2e-7 before it is rounded; the part within [sqrt(1/2),
    sqrt(2)) goes through the series of the inverse hyperbolic tangent."""
    bits = builder.bitcast(x, WORDS)
    # sqrt(1/2) as bits: subtracting it makes the exponent step where the part would leave that interval.
    offset = builder.sub(bits, words(0x3F3504F3))
    exponent = builder.ashr(offset, words(23))
    part = builder.bitcast(builder.sub(bits, builder.shl(exponent, words(23))), FLOATS)
    t = builder.fdiv(builder.fsub(part, floats(1.0)), builder.fadd(part, floats(1.0)))
    square = builder.fmul(t, t)
    p = floats(2 / 9 / math.log(2))
    for term in (7, 5, 3, 1):
        p = fma(builder, p, square, floats(2 / term / math.log(2)))
    return fma(builder, p, t, builder.sitofp(exponent, FLOATS))


def greatest_row(builder, row, count):
    """IR: the maximum over row(0) .. row(count - 1), four at a time: one chain would wait for itself."""
    tops = [cgutils.alloca_once_value(builder, row(number(0))) for _ in range(4)]
    fours = builder.sdiv(count, number(4))
    with cgutils.for_range(builder, fours) as loop:
        for i, top in enumerate(tops):
            at = builder.add(builder.mul(loop.index, number(4)), number(i))
            builder.store(larger(builder, row(at), builder.load(top)), top)
    with cgutils.for_range(builder, count, start=builder.mul(fours, number(4))) as loop:
        builder.store(larger(builder, row(loop.index), builder.load(tops[0])), tops[0])
    a, b, c, d = (builder.load(top) for top in tops)
    return larger(builder, larger(builder, a, b), larger(builder, c, d))
