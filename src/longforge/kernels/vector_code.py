"""The compiled building blocks of the numba backends: a small matrix product and an exponential.

Attention over a few keys is a chain of tiny matrix products whose sizes are known only at run time; a
compiler that vectorises loops by itself spends most of its time on entering them. So the inner tile is
written in vector instructions, LANES numbers wide, portable LLVM IR: rows of the result stay in registers for
the whole sum.
"""

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import overload

from longforge.kernels.numba_host import compiled

__all__ = [
    "LANES",
    "dot",
    "exponentials",
    "largest",
    "product",
    "product_in_order",
    "round_up",
    "softmax",
    "transpose",
]

intrinsic: Any = numba_intrinsic  # compiled callers leave out the typing context, which checkers cannot know

LANES = 16
ROWS = 4


def _load_row(builder, pointer, vector, half: bool, size: int):
    """IR: the vector at the pointer; bf16 bits (half) become the upper halves of fp32 numbers."""
    if not half:
        return builder.load(builder.bitcast(pointer, ir.PointerType(vector)), align=size)
    narrow = ir.VectorType(ir.IntType(16), vector.count)
    wide = ir.VectorType(ir.IntType(32), vector.count)
    bits = builder.load(builder.bitcast(pointer, ir.PointerType(narrow)), align=2)
    shifted = builder.shl(builder.zext(bits, wide), ir.Constant(wide, [16] * vector.count))
    return builder.bitcast(shifted, vector)


def _tile(rows: int, lanes: int, in_order: bool):
    """An intrinsic: out[r, l] (+)= sum over i < inner of a[r, i] * b[i, l], for r < rows and l < lanes.

    Arrays are flat, with the offset of the first element and strides: out[o + r * o_row + l], a[a0 + r *
    a_row + i * a_step], b[b0 + i * b_row + l]. in_order: each product is rounded before it is added;
    otherwise the pair may be one fused instruction. Both add in ascending order of i.
    """
    flags = () if in_order else ("contract",)

    @intrinsic
    def tile(typingctx, out, o, o_row, a, a0, a_row, a_step, b, b0, b_row, inner, add):
        n = types.intp
        sig = types.void(out, n, n, a, n, n, n, b, n, n, n, types.boolean)

        def codegen(context, builder, signature, args):
            out_v, o, o_row, a_v, a0, a_row, a_step, b_v, b0, b_row, inner, add = args
            number = context.get_value_type(signature.args[0].dtype)
            vector = ir.VectorType(number, lanes)

            def data(i, value):
                return context.make_array(signature.args[i])(context, builder, value).data

            def address(base, offset, kind):
                return builder.bitcast(builder.gep(base, [offset]), ir.PointerType(kind))

            def broadcast(value):
                one = builder.insert_element(
                    ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
                )
                zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
                return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)

            out_p, a_p, b_p = data(0, out_v), data(3, a_v), data(7, b_v)
            half = signature.args[7].dtype == types.uint16
            size = context.get_abi_sizeof(number)
            targets = [
                address(out_p, builder.add(o, builder.mul(o_row, ir.Constant(o_row.type, r))), vector)
                for r in range(rows)
            ]
            sums = [cgutils.alloca_once(builder, vector) for _ in range(rows)]
            zero = ir.Constant(vector, [ir.Constant(number, 0.0)] * lanes)
            for target, total in zip(targets, sums, strict=True):
                builder.store(zero, total)
                with builder.if_then(add):
                    builder.store(builder.load(target, align=size), total)
            with cgutils.for_range(builder, inner) as loop:
                at = builder.add(b0, builder.mul(loop.index, b_row))
                row = _load_row(builder, builder.gep(b_p, [at]), vector, half, size)
                first = builder.add(a0, builder.mul(loop.index, a_step))
                for r in range(rows):
                    where = builder.add(first, builder.mul(a_row, ir.Constant(a_row.type, r)))
                    weight = broadcast(builder.load(address(a_p, where, number)))
                    term = builder.fmul(weight, row, flags=flags)
                    builder.store(builder.fadd(builder.load(sums[r]), term, flags=flags), sums[r])
            for target, total in zip(targets, sums, strict=True):
                builder.store(builder.load(total), target, align=size)
            return context.get_dummy_value()

        return sig, codegen

    return tile


def _product(in_order: bool):
    many, two, one = (_tile(rows, LANES, in_order) for rows in (ROWS, 2, 1))
    scalar = _tile(1, 1, in_order)

    @compiled(error_model="numpy")
    def all_tiles(out, o, o_row, a, a0, a_row, a_step, b, b0, b_row, rows, inner, columns, add):
        whole = columns - columns % LANES
        for c in range(0, whole, LANES):
            r = 0
            while r + ROWS <= rows:
                to, at = o + r * o_row + c, a0 + r * a_row
                many(out, to, o_row, a, at, a_row, a_step, b, b0 + c, b_row, inner, add)
                r += ROWS
            if r + 2 <= rows:
                to, at = o + r * o_row + c, a0 + r * a_row
                two(out, to, o_row, a, at, a_row, a_step, b, b0 + c, b_row, inner, add)
                r += 2
            if r < rows:
                to, at = o + r * o_row + c, a0 + r * a_row
                one(out, to, o_row, a, at, a_row, a_step, b, b0 + c, b_row, inner, add)
        for c in range(whole, columns):
            for r in range(rows):
                to, at = o + r * o_row + c, a0 + r * a_row
                scalar(out, to, o_row, a, at, a_row, a_step, b, b0 + c, b_row, inner, add)

    @compiled(inline="always")
    def product(out, o, o_row, a, a0, a_row, a_step, b, b0, b_row, rows, inner, columns, add):
        """out [rows, columns] = (out if add else 0) + a [rows, inner] @ b [inner, columns].

        out, a, b: flat arrays; o, a0, b0 the first element; o_row, a_row, b_row the distance of rows, a_step
        of columns of a. out and b have contiguous columns. b may hold bf16 bits (uint16).
        """
        # Constants are types of their own to numba: without the casts it compiles one copy per call.
        all_tiles(
            out, np.int64(o), np.int64(o_row), a, np.int64(a0), np.int64(a_row), np.int64(a_step), b,
            np.int64(b0), np.int64(b_row), np.int64(rows), np.int64(inner), np.int64(columns), bool(add),
        )  # fmt: skip

    return product


product = _product(in_order=False)
product_in_order = _product(in_order=True)


@intrinsic
def _transpose_tile(typingctx, out, o, o_row, a, a0, a_row):
    """out[o + c * o_row + r] = a[a0 + r * a_row + c] for r, c < LANES, by four rounds of perfect shuffles."""
    sig = types.void(out, types.intp, types.intp, a, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        out_v, o, o_row, a_v, a0, a_row = args
        number = context.get_value_type(signature.args[0].dtype)
        size = context.get_abi_sizeof(number)
        vector = ir.VectorType(number, LANES)
        out_p = context.make_array(signature.args[0])(context, builder, out_v).data
        a_p = context.make_array(signature.args[3])(context, builder, a_v).data
        half = signature.args[3].dtype == types.uint16

        def at(base, first, step, i):
            return builder.gep(base, [builder.add(first, builder.mul(step, ir.Constant(step.type, i)))])

        def mask(start):
            indices = [start + i // 2 + (LANES if i % 2 else 0) for i in range(LANES)]
            return ir.Constant(ir.VectorType(ir.IntType(32), LANES), indices)

        rows = [_load_row(builder, at(a_p, a0, a_row, r), vector, half, size) for r in range(LANES)]
        for _ in range(LANES.bit_length() - 1):
            pairs = [(rows[r], rows[r + LANES // 2]) for r in range(LANES // 2)]
            rows = [builder.shuffle_vector(x, y, mask(start)) for x, y in pairs for start in (0, LANES // 2)]
        for c, row in enumerate(rows):
            target = builder.bitcast(at(out_p, o, o_row, c), ir.PointerType(vector))
            builder.store(row, target, align=size)
        return context.get_dummy_value()

    return sig, codegen


@compiled(error_model="numpy")
def transpose(out, o, o_row, a, a0, a_row, rows, columns):
    """out[o + c * o_row + r] = a[a0 + r * a_row + c] for r < rows, c < columns; flat arrays, a may hold bf16
    bits."""
    whole_rows, whole_columns = rows - rows % LANES, columns - columns % LANES
    for r in range(0, whole_rows, LANES):
        for c in range(0, whole_columns, LANES):
            _transpose_tile(out, o + c * o_row + r, o_row, a, a0 + r * a_row + c, a_row)
    for r in range(rows):
        for c in range(whole_columns if r < whole_rows else 0, columns):
            out[o + c * o_row + r] = widen(a[a0 + r * a_row + c])


@compiled()
def round_up(n):
    """The next multiple of LANES."""
    return (n + LANES - 1) // LANES * LANES


@intrinsic
def _as_bits(typingctx, x):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _as_float(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


def widen(x):
    """fp32 from bf16 bits; other numbers as they are (for compiled code)."""
    raise NotImplementedError("compiled code only")


@overload(widen, inline="always")
def _widen(x):
    if x == types.uint16:
        return lambda x: _as_float(types.int32(types.uint32(x) << types.uint32(16)))
    return lambda x: x


def exponential(x):
    """exp(x) for x <= 0 (for compiled code)."""
    raise NotImplementedError("compiled code only")


@overload(exponential)
def _exponential(x):
    return _exponential_of_single if x == types.float32 else _exponential_of_double


def _exponential_of_double(x):
    return math.exp(x)


f32 = numba.float32
# 1.5 * 2**23: adding it rounds to the nearest integer, which then stands in the low mantissa bits.
ROUND = 12582912.0


def _exponential_of_single(x):
    """2**n * exp(r) with |r| <= ln(2) / 2 by its Taylor series to r**7 (next term 5e-9); below
    exp(-87) it is 0."""
    shifted = x * f32(1.4426950408889634) + f32(ROUND)
    n = shifted - f32(ROUND)
    # ln 2 in two parts, the first short enough for n * part to be exact.
    r = (x - n * f32(0.693145751953125)) - n * f32(1.4286068203094172e-06)
    p = f32(1 / 5040)
    p = p * r + f32(1 / 720)
    p = p * r + f32(1 / 120)
    p = p * r + f32(1 / 24)
    p = p * r + f32(1 / 6)
    p = p * r + f32(0.5)
    p = p * r + f32(1)
    p = p * r + f32(1)
    power = _as_float(types.int32((_as_bits(shifted) << types.int32(23)) + types.int32(127 << 23)))
    return f32(0) if x < f32(-87) else p * power


@compiled(error_model="numpy", fastmath={"contract"})
def exponentials(x, start, count, shift):
    """x[start:start + count] = exp(itself - shift), where no value is above shift."""
    part = x[start : start + count]  # indices from 0 are what the vectoriser can prove safe
    for i in range(part.shape[0]):
        part[i] = exponential(part[i] - shift)


@compiled(error_model="numpy", fastmath={"nnan", "nsz", "reassoc"})
def largest(x):
    """The maximum of a non-empty row."""
    best = x[0]
    for i in range(x.shape[0]):
        best = max(best, x[i])
    return best


@compiled(error_model="numpy", fastmath={"nsz", "reassoc"})
def _sum(x):
    total = x.dtype.type(0)
    for i in range(x.shape[0]):
        total += x[i]
    return total


@compiled(error_model="numpy", fastmath={"nsz", "reassoc", "contract"})
def dot(x, y):
    """x . y, summed in an order of the compiler's choice, the same every time."""
    total = x.dtype.type(0)
    for i in range(x.shape[0]):
        total += x[i] * y[i]
    return total


@compiled(error_model="numpy")
def softmax(x, start, count, scale):
    """x[start:start + count] = softmax(scale * itself); returns the log-sum-exp of scale * x. scale > 0."""
    part = x[start : start + count]
    for i in range(count):
        part[i] *= scale
    top = largest(part)
    exponentials(x, start, count, top)
    total = _sum(part)
    share = x.dtype.type(1) / total
    for i in range(count):
        part[i] *= share
    return top + x.dtype.type(math.log(total))
