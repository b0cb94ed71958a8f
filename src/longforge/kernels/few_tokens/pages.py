"""Attention over a page of keys as LLVM IR: scores, weights, weighted sums.

Two bf16 numbers beside each other are one 32-bit word, and a shift and a mask widen both. So numbers of such
keys come in another order, thirty-two by thirty-two: first those at even places, then those at odd ones.
`spread` brings a query into this order, `gathered` brings sums back. Numbers of fp32 keys stay as they are.

What a key or a value gets does not depend on the tile that holds it: every score is summed in sixteen lanes
which are then added by halves, and every weighted sum takes the first, third, ... of a page's seen keys one
after the other, the second, fourth, ... likewise, and adds the two.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from longforge.kernels.few_tokens.vectors import (
    F32,
    FLOATS,
    I32,
    I64,
    LANES,
    WORDS,
    data_of,
    fma,
    load,
    splat,
)
from longforge.kernels.numba_host import compiled

__all__ = [
    "PAIR",
    "dots_of_page",
    "exponentials_and_sum",
    "gathered",
    "greatest",
    "prefetch",
    "spread",
    "sums_of_page",
]

intrinsic: Any = numba_intrinsic  # compiled callers leave out the typing context, which checkers cannot know
PAIR = 2 * LANES
"""Numbers that are widened together."""
ZEROS = ir.Constant(FLOATS, [ir.Constant(F32, 0.0)] * LANES)


def _shuffled(builder, a, b, lanes: list[int]):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _load_pair(builder, base, at, half: bool):
    """Thirty-two numbers from element `at` on, as two vectors: of bf16 bits the even and the odd ones."""
    if not half:
        return [load(builder, base, builder.add(at, I64(LANES * i)), False) for i in range(2)]
    pointer = builder.bitcast(builder.gep(base, [at]), ir.PointerType(WORDS))
    words = builder.load(pointer, align=2)
    even = builder.shl(words, ir.Constant(WORDS, [16] * LANES))
    odd = builder.and_(words, ir.Constant(WORDS, [0xFFFF0000] * LANES))
    return [builder.bitcast(part, FLOATS) for part in (even, odd)]


def _store(builder, base, at, vector):
    builder.store(vector, builder.bitcast(builder.gep(base, [at]), ir.PointerType(vector.type)), align=4)


def _lane_sums(builder, vectors):
    """One vector: lane i * (16 / count) is the sum of vector i's lanes, added by halves. 1, 2, 4, 8 or 16.

    At each level a lane chooses by one of its bits which vector of a pair it goes on with, so that one of the
    two shuffles is a mere selection.
    """
    half = LANES // 2
    while half:
        if len(vectors) > 1:
            middle = len(vectors) // 2
            pairs = list(zip(vectors[:middle], vectors[middle:], strict=True))
        else:
            pairs = [(vectors[0], vectors[0])]
        kept = [i + (LANES if i & half else 0) for i in range(LANES)]
        moved = [i + half if not i & half else i - half + LANES for i in range(LANES)]
        vectors = [
            builder.fadd(_shuffled(builder, a, b, kept), _shuffled(builder, a, b, moved)) for a, b in pairs
        ]
        half //= 2
    return vectors[0]


def dots_of_page(keys: int, heads: int):
    """An intrinsic: out[o + h * o_row + r] = x[x0 + h * x_row :] . w[w0 + r * w_row :], inner long (a
    multiple of 16), for r < keys and h < heads. Flat arrays; x is spread, w may hold bf16 bits."""

    @intrinsic
    def tile(typingctx, out, o, o_row, x, x0, x_row, w, w0, w_row, inner):
        n = types.int64
        sig = types.void(out, n, n, x, n, n, w, n, n, n)

        def codegen(context, builder, signature, args):
            _, o, o_row, _, x0, x_row, _, w0, w_row, inner = args
            out_p, x_p, w_p = (data_of(context, builder, signature, args, i) for i in (0, 3, 6))
            half = signature.args[6].dtype == types.uint16
            x_at = [builder.add(x0, builder.mul(x_row, I64(h))) for h in range(heads)]
            w_at = [builder.add(w0, builder.mul(w_row, I64(r))) for r in range(keys)]
            sums = [cgutils.alloca_once_value(builder, ZEROS) for _ in range(keys * heads)]

            def add(rows, tokens):
                for h, token in enumerate(tokens):
                    for r, row in enumerate(rows):
                        total = sums[h * keys + r]
                        builder.store(fma(builder, token, row, builder.load(total)), total)

            with cgutils.for_range(builder, builder.sdiv(inner, I64(PAIR))) as loop:
                i = builder.mul(loop.index, I64(PAIR))
                tokens = [_load_pair(builder, x_p, builder.add(at, i), False) for at in x_at]
                rows = [_load_pair(builder, w_p, builder.add(at, i), half) for at in w_at]
                for part in range(2):
                    add([row[part] for row in rows], [token[part] for token in tokens])
            rest = builder.and_(inner, I64(LANES))
            with builder.if_then(builder.icmp_signed("!=", rest, I64(0)), likely=False):
                i = builder.sub(inner, I64(LANES))
                add(
                    [load(builder, w_p, builder.add(at, i), half) for at in w_at],
                    [load(builder, x_p, builder.add(at, i), False) for at in x_at],
                )
            vectors = [builder.load(total) for total in sums]
            while len(vectors) & (len(vectors) - 1):
                vectors.append(vectors[-1])
            totals, step = _lane_sums(builder, vectors), LANES // len(vectors)
            for h in range(heads):
                lanes = [(h * keys + r) * step for r in range(keys)]
                part = _shuffled(builder, totals, totals, lanes)
                _store(builder, out_p, builder.add(o, builder.mul(o_row, I64(h))), part)
            return context.get_dummy_value()

        return sig, codegen

    return tile


def sums_of_page(heads: int, columns: int):
    """An intrinsic: out[o + h * o_row + c] += sum over first <= t < end of p[p0 + h * p_row + t] *
    v[v0 + t * v_row + c], for h < heads and c < columns, 16 or 32. Flat arrays; out is spread, v may hold
    bf16 bits."""
    parts = columns // LANES

    @intrinsic
    def tile(typingctx, out, o, o_row, p, p0, p_row, v, v0, v_row, first, end):
        n = types.int64
        sig = types.void(out, n, n, p, n, n, v, n, n, n, n)

        def codegen(context, builder, signature, args):
            _, o, o_row, _, p0, p_row, _, v0, v_row, first, end = args
            out_p, p_p, v_p = (data_of(context, builder, signature, args, i) for i in (0, 3, 6))
            half = signature.args[6].dtype == types.uint16
            cells = [(h, c) for h in range(heads) for c in range(parts)]

            def place(h, c):
                return builder.add(builder.add(o, I64(LANES * c)), builder.mul(o_row, I64(h)))

            chains = [
                [
                    cgutils.alloca_once_value(builder, load(builder, out_p, place(h, c), False))
                    for h, c in cells
                ],
                [cgutils.alloca_once_value(builder, ZEROS) for _ in cells],
            ]

            def add(t, chain):
                row = builder.add(v0, builder.mul(t, v_row))
                if parts == 2:
                    values = _load_pair(builder, v_p, row, half)
                else:
                    values = [load(builder, v_p, row, half)]
                for h in range(heads):
                    share = builder.add(builder.add(p0, builder.mul(p_row, I64(h))), t)
                    weight = splat(builder, builder.load(builder.gep(p_p, [share])))
                    for c, value in enumerate(values):
                        total = chain[h * parts + c]
                        builder.store(fma(builder, weight, value, builder.load(total)), total)

            count = builder.sub(end, first)
            with cgutils.for_range(builder, builder.sdiv(count, I64(2))) as loop:
                t = builder.add(first, builder.mul(loop.index, I64(2)))
                add(t, chains[0])
                add(builder.add(t, I64(1)), chains[1])
            odd = builder.icmp_signed("!=", builder.and_(count, I64(1)), I64(0))
            with builder.if_then(odd, likely=False):
                add(builder.sub(end, I64(1)), chains[0])
            for (h, c), a, b in zip(cells, *chains, strict=True):
                _store(builder, out_p, place(h, c), builder.fadd(builder.load(a), builder.load(b)))
            return context.get_dummy_value()

        return sig, codegen

    return tile


@intrinsic
def _spread_pair(typingctx, out, o, x, x0):
    """out[o : o + 32] = x[x0 : x0 + 32], first those at even places."""
    sig = types.void(out, types.int64, x, types.int64)

    def codegen(context, builder, signature, args):
        out_p, x_p = (data_of(context, builder, signature, args, i) for i in (0, 2))
        low, high = _load_pair(builder, x_p, args[3], False)
        for i in range(2):
            part = _shuffled(builder, low, high, list(range(i, PAIR, 2)))
            _store(builder, out_p, builder.add(args[1], I64(LANES * i)), part)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def _gather_pair(typingctx, out, o, x, x0, factor):
    """out[o : o + 32] = factor * x[x0 : x0 + 32], which has those at even places first."""
    sig = types.void(out, types.int64, x, types.int64, types.float32)

    def codegen(context, builder, signature, args):
        out_p, x_p = (data_of(context, builder, signature, args, i) for i in (0, 2))
        weight = splat(builder, args[4])
        even, odd = (builder.fmul(weight, part) for part in _load_pair(builder, x_p, args[3], False))
        for i in range(2):
            lanes = [
                first + j // 2 + (LANES if j % 2 else 0) for first in (LANES // 2 * i,) for j in range(LANES)
            ]
            part = _shuffled(builder, even, odd, lanes)
            _store(builder, out_p, builder.add(args[1], I64(LANES * i)), part)
        return context.get_dummy_value()

    return sig, codegen


@compiled(error_model="numpy")
def spread(out, o, x, x0, dim, keys):
    """out[o : o + dim] = x[x0 : x0 + dim] in the order in which these keys are read."""
    first = 0
    if keys.itemsize == 2:
        first = dim - dim % PAIR
        for d in range(0, first, PAIR):
            _spread_pair(out, o + d, x, x0 + d)
    for d in range(first, dim):
        out[o + d] = x[x0 + d]


@compiled(error_model="numpy")
def gathered(out, o, x, x0, dim, factor, keys):
    """out[o : o + dim] = factor * x[x0 : x0 + dim] in the order of numbers, x in that of these values."""
    first = 0
    if keys.itemsize == 2:
        first = dim - dim % PAIR
        for d in range(0, first, PAIR):
            _gather_pair(out, o + d, x, x0 + d, factor)
    for d in range(first, dim):
        out[o + d] = factor * x[x0 + d]


@intrinsic
def greatest(typingctx, x, first, count):
    """The maximum of x[first : first + count], count a positive multiple of 16."""
    sig = types.float32(x, types.int64, types.int64)

    def codegen(context, builder, signature, args):
        base = data_of(context, builder, signature, args, 0)
        best = cgutils.alloca_once_value(builder, load(builder, base, args[1], False))

        def greater(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        with cgutils.for_range(builder, builder.sdiv(args[2], I64(LANES))) as loop:
            at = builder.add(args[1], builder.mul(loop.index, I64(LANES)))
            builder.store(greater(load(builder, base, at, False), builder.load(best)), best)
        lanes, half = builder.load(best), LANES // 2
        while half:
            lanes = greater(lanes, _shuffled(builder, lanes, lanes, [i ^ half for i in range(LANES)]))
            half //= 2
        return builder.extract_element(lanes, I32(0))

    return sig, codegen


@intrinsic
def exponentials_and_sum(typingctx, x, first, count, top):
    """x[first : first + count] = exp(itself - top), where no value is above top; their sum. count: a multiple
    of 16."""
    sig = types.float32(x, types.int64, types.int64, types.float32)

    def codegen(context, builder, signature, args):
        base = data_of(context, builder, signature, args, 0)
        total = cgutils.alloca_once_value(builder, ZEROS)
        top = splat(builder, args[3])
        with cgutils.for_range(builder, builder.sdiv(args[2], I64(LANES))) as loop:
            at = builder.add(args[1], builder.mul(loop.index, I64(LANES)))
            power = _exponential(builder, builder.fsub(load(builder, base, at, False), top))
            _store(builder, base, at, power)
            builder.store(builder.fadd(builder.load(total), power), total)
        return builder.extract_element(_lane_sums(builder, [builder.load(total)]), I32(0))

    return sig, codegen


def _exponential(builder, x):
    """exp of a vector of numbers not above 0, as in `vector_code.exponential`."""

    def same(number):
        return ir.Constant(FLOATS, [ir.Constant(F32, number)] * LANES)

    round_to = same(12582912.0)
    shifted = fma(builder, x, same(1.4426950408889634), round_to)
    n = builder.fsub(shifted, round_to)
    r = fma(builder, n, same(-0.693145751953125), x)
    r = fma(builder, n, same(-1.4286068203094172e-06), r)
    p = same(1 / 5040)
    for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = fma(builder, p, r, same(term))
    bits = builder.shl(builder.bitcast(shifted, WORDS), ir.Constant(WORDS, [23] * LANES))
    power = builder.bitcast(builder.add(bits, ir.Constant(WORDS, [127 << 23] * LANES)), FLOATS)
    tiny = builder.fcmp_ordered("<", x, same(-87.0))
    return builder.select(tiny, ZEROS, builder.fmul(p, power))


@intrinsic
def prefetch(typingctx, array, at, row, rows, dim):
    """Asks for the cache lines of array[at + r * row : at + r * row + dim], r < rows, which are soon read."""
    n = types.int64
    sig = types.void(array, n, n, n, n)

    def codegen(context, builder, signature, args):
        _, at, row, rows, dim = args
        base = data_of(context, builder, signature, args, 0)
        line = I64(64 // context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype)))
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        lines = builder.sdiv(builder.add(dim, builder.sub(line, I64(1))), line)
        with cgutils.for_range(builder, lines) as part, cgutils.for_range(builder, rows) as loop:
            place = builder.add(at, builder.add(builder.mul(loop.index, row), builder.mul(part.index, line)))
            pointer = builder.bitcast(builder.gep(base, [place]), byte)
            builder.call(ask, [pointer, I32(0), I32(3), I32(1)])  # to read; into the first cache; data
        return context.get_dummy_value()

    return sig, codegen
