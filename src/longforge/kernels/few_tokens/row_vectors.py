"""What happens to one row between the matrix products, sixteen lanes at a time, as LLVM IR.

The compiler checks loops over slices of a row for overlaps and cuts them into prologues; heads of 32 numbers
spend ten times longer there than in their arithmetic. Counts are multiples of sixteen here; other lengths
go through the plain loops of rows.py.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from longforge.kernels.few_tokens.vectors import F32, FLOATS, I32, I64, LANES, data_of, fma, load, splat

__all__ = ["add_rows", "norm_lanes", "rotate_lanes"]

intrinsic: Any = numba_intrinsic  # compiled callers leave out the typing context, which checkers cannot know

EIGHT = ir.VectorType(F32, 8)
ZEROS = ir.Constant(FLOATS, [ir.Constant(F32, 0.0)] * LANES)


def _place(builder, base, at, kind=FLOATS):
    return builder.bitcast(builder.gep(base, [at]), ir.PointerType(kind))


def _load(builder, base, at):
    return load(builder, base, at, half=False)


def _load_eight(builder, base, at):
    return builder.load(_place(builder, base, at, EIGHT), align=4)


def _root(builder, x):
    kind, name = ir.FunctionType(F32, [F32]), "llvm.sqrt.f32"
    return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), [x])


def _sum_of_lanes(builder, vector):
    """The lanes of a vector added by halves, as a number."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = (
            builder.shuffle_vector(
                vector, vector, ir.Constant(ir.VectorType(I32, width), list(range(first, first + width)))
            )
            for first in (0, width)
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, I32(0))


@intrinsic
def norm_lanes(typingctx, x, x0, scale, s0, eps, out, o0, count):
    """out[o0 + i] = x[x0 + i] / sqrt(mean of squares + eps) * scale[s0 + i], i < count; out may be x."""
    n = types.intp
    sig = types.void(x, n, scale, n, types.float32, out, n, n)

    def codegen(context, builder, signature, args):
        x, scale, out = (data_of(context, builder, signature, args, i) for i in (0, 2, 5))
        _, x0, _, s0, eps, _, o0, count = args
        steps = builder.sdiv(count, I64(LANES))
        squares = cgutils.alloca_once_value(builder, ZEROS)
        with cgutils.for_range(builder, steps) as loop:
            value = _load(builder, x, builder.add(x0, builder.mul(loop.index, I64(LANES))))
            total = fma(builder, value, value, builder.load(squares))
            builder.store(total, squares)
        mean = builder.fdiv(_sum_of_lanes(builder, builder.load(squares)), builder.sitofp(count, F32))
        root = _root(builder, builder.fadd(mean, eps))
        share = splat(builder, builder.fdiv(ir.Constant(F32, 1.0), root))
        with cgutils.for_range(builder, steps) as loop:
            at = builder.mul(loop.index, I64(LANES))
            value = builder.fmul(_load(builder, x, builder.add(x0, at)), share)
            value = builder.fmul(value, _load(builder, scale, builder.add(s0, at)))
            builder.store(value, _place(builder, out, builder.add(o0, at)), align=4)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def rotate_lanes(typingctx, x, x0, half, cos, sin):
    """Rotates the pairs (x[x0 + i], x[x0 + half + i]) by cos[i], sin[i], i < half, a multiple of eight."""
    n = types.intp
    sig = types.void(x, n, n, cos, sin)

    def codegen(context, builder, signature, args):
        x, cos, sin = (data_of(context, builder, signature, args, i) for i in (0, 3, 4))
        _, x0, half, _, _ = args
        with cgutils.for_range(builder, builder.sdiv(half, I64(8))) as loop:
            at = builder.mul(loop.index, I64(8))
            first = builder.add(x0, at)
            second = builder.add(first, half)
            a, b = _load_eight(builder, x, first), _load_eight(builder, x, second)
            c, s = _load_eight(builder, cos, at), _load_eight(builder, sin, at)
            turned = builder.fsub(builder.fmul(a, c), builder.fmul(b, s))
            builder.store(turned, _place(builder, x, first, EIGHT), align=4)
            turned = builder.fadd(builder.fmul(b, c), builder.fmul(a, s))
            builder.store(turned, _place(builder, x, second, EIGHT), align=4)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def add_rows(typingctx, x, rows, r0, row, chosen, shared, weights, count):
    """x[i] += sum over j < chosen of weights[j] * rows[r0 + j * row + i], plus rows[shared + i] where shared
    is not negative; i < count."""
    n = types.intp
    sig = types.void(x, rows, n, n, n, n, weights, n)

    def codegen(context, builder, signature, args):
        x, rows, weights = (data_of(context, builder, signature, args, i) for i in (0, 1, 6))
        _, _, r0, row, chosen, shared, _, count = args
        total = cgutils.alloca_once(builder, FLOATS)
        with cgutils.for_range(builder, builder.sdiv(count, I64(LANES))) as loop:
            at = builder.mul(loop.index, I64(LANES))
            builder.store(ZEROS, total)
            with cgutils.for_range(builder, chosen) as choice:
                place = builder.add(builder.add(r0, builder.mul(choice.index, row)), at)
                weight = splat(builder, builder.load(builder.gep(weights, [choice.index])))
                value = builder.fmul(weight, _load(builder, rows, place))
                builder.store(builder.fadd(builder.load(total), value), total)
            with builder.if_then(builder.icmp_signed(">=", shared, I64(0))):
                value = _load(builder, rows, builder.add(shared, at))
                builder.store(builder.fadd(builder.load(total), value), total)
            value = builder.fadd(_load(builder, x, at), builder.load(total))
            builder.store(value, _place(builder, x, at), align=4)
        return context.get_dummy_value()

    return sig, codegen
