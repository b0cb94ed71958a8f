"""Dot products of a few rows as LLVM IR, where the number of rows changes no bit, and parts of such code.

Every dot product is summed in sixteen lanes (lane l takes elements l, l + 16, ...), one fused multiply-add
after the other, and the lanes are added by halves: l with l + 8, then with l + 4, l + 2, l + 1. So tiles of
different sizes, which share their loads among more results, give the same numbers.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

__all__ = [
    "F32",
    "FLOATS",
    "I32",
    "I64",
    "LANES",
    "WORDS",
    "borrowed",
    "data_of",
    "dots_of_rows",
    "flat_view",
    "fma",
    "load",
    "splat",
]

intrinsic: Any = numba_intrinsic  # compiled callers leave out the typing context, which checkers cannot know

LANES = 16
F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, WORDS, HALVES = (ir.VectorType(kind, LANES) for kind in (F32, I32, I16))


@intrinsic
def flat_view(typingctx, address, kind):
    """The memory from this address (int64) on, as a flat array of kind's (an array's) element type. Nobody
    checks its bounds, and it keeps nothing alive."""
    result = types.Array(kind.dtype, 1, "C")

    def codegen(context, builder, signature, args):
        array = context.make_array(result)(context, builder)
        element = context.get_data_type(result.dtype)
        size = context.get_constant(types.intp, context.get_abi_sizeof(element))
        count = context.get_constant(types.intp, 1 << 40)
        context.populate_array(
            array,
            data=builder.inttoptr(args[0], ir.PointerType(element)),
            shape=[count],
            strides=[size],
            itemsize=size,
            meminfo=None,
        )
        return array._getvalue()

    return result(types.int64, kind), codegen


@intrinsic
def borrowed(typingctx, array):
    """The same array without its owner: passing it about counts no references, which threads would fight
    over. The caller keeps the owner alive."""

    def codegen(context, builder, signature, args):
        given = context.make_array(array)(context, builder, args[0])
        given.meminfo = context.get_constant_null(types.MemInfoPointer(types.voidptr))
        given.parent = context.get_constant_null(types.pyobject)
        return given._getvalue()

    return array(array), codegen


def data_of(context, builder, signature, args, i):
    return context.make_array(signature.args[i])(context, builder, args[i]).data


def load(builder, base, at, half: bool):
    """Sixteen numbers from element `at` on; bf16 bits (half) become the upper halves of fp32 numbers."""
    pointer = builder.gep(base, [at])
    if not half:
        return builder.load(builder.bitcast(pointer, ir.PointerType(FLOATS)), align=4)
    bits = builder.load(builder.bitcast(pointer, ir.PointerType(HALVES)), align=2)
    wide = builder.shl(builder.zext(bits, WORDS), ir.Constant(WORDS, [16] * LANES))
    return builder.bitcast(wide, FLOATS)


def fma(builder, x, y, z):
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    name = "llvm.fma.v16f32"
    found = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(found, [x, y, z])


def _shuffled(builder, a, b, lanes: list[int]):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _lane_sums(builder, vectors):
    """One vector with the sum of each vector's lanes in order, added by halves. 1, 2, 4, 8 or 16 vectors."""
    half = LANES // 2
    while half:
        if len(vectors) > 1:
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
        else:
            pairs = [(vectors[0], vectors[0])]
        starts = range(0, LANES, 2 * half)
        low = [v + s + i for v in (0, LANES) for s in starts for i in range(half)]
        high = [i + half for i in low]
        vectors = [
            builder.fadd(_shuffled(builder, a, b, low), _shuffled(builder, a, b, high)) for a, b in pairs
        ]
        half //= 2
    return vectors[0]


def _dots(builder, x, x_at, w, w_at, inner, half):
    """The sums of x[x_at[t] + i] * w[w_at[r] + i], i < inner, as lanes t * len(w_at) + r of one vector."""
    count = len(x_at) * len(w_at)
    sums = [
        cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [ir.Constant(F32, 0.0)] * LANES))
        for _ in range(count)
    ]
    with cgutils.for_range(builder, builder.sdiv(inner, I64(LANES))) as loop:
        i = builder.mul(loop.index, I64(LANES))
        rows = [load(builder, w, builder.add(at, i), half) for at in w_at]
        for t, at in enumerate(x_at):
            token = load(builder, x, builder.add(at, i), half=False)
            for r, row in enumerate(rows):
                total = sums[t * len(w_at) + r]
                builder.store(fma(builder, token, row, builder.load(total)), total)
    vectors = [builder.load(total) for total in sums]
    while len(vectors) & (len(vectors) - 1):
        vectors.append(vectors[-1])
    return _lane_sums(builder, vectors)


def _store_lanes(builder, out, at, sums, first, count):
    """out[at + r] = lane first + r of the sums."""
    part = _shuffled(builder, sums, sums, list(range(first, first + count)))
    target = builder.bitcast(builder.gep(out, [at]), ir.PointerType(part.type))
    builder.store(part, target, align=4)


def dots_of_rows(rows: int, tokens: int):
    """An intrinsic: out[o + to[j + t] * o_row + r] = w[w0 + r * w_row :] . x[of[j + t] * x_row :], inner long
    (a multiple of 16), for r < rows and t < tokens. Arrays are flat; w may hold bf16 bits."""

    @intrinsic
    def tile(typingctx, out, o, o_row, to, x, x_row, of, j, w, w0, w_row, inner):
        n = types.int64
        sig = types.void(out, n, n, to, x, n, of, n, w, n, n, n)

        def codegen(context, builder, signature, args):
            _, o, o_row, _, _, x_row, _, j, _, w0, w_row, inner = args
            out_p, to_p, x_p, of_p, w_p = (
                data_of(context, builder, signature, args, i) for i in (0, 3, 4, 6, 8)
            )
            js = [builder.add(j, I64(t)) for t in range(tokens)]
            x_at = [builder.mul(builder.load(builder.gep(of_p, [at])), x_row) for at in js]
            w_at = [builder.add(w0, builder.mul(w_row, I64(r))) for r in range(rows)]
            half = signature.args[8].dtype == types.uint16
            sums = _dots(builder, x_p, x_at, w_p, w_at, inner, half)
            for t, at in enumerate(js):
                row = builder.mul(builder.load(builder.gep(to_p, [at])), o_row)
                _store_lanes(builder, out_p, builder.add(o, row), sums, t * rows, rows)
            return context.get_dummy_value()

        return sig, codegen

    return tile


def splat(builder, value):
    undefined = ir.Constant(FLOATS, ir.Undefined)
    return _shuffled(builder, builder.insert_element(undefined, value, I32(0)), undefined, [0] * LANES)
