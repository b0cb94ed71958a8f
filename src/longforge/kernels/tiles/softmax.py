"""Compiled: what stands between two products: softmax, its gradients, divergences, maxima."""

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils

from longforge.kernels.tiles.vectors import (
    COLUMNS,
    FLOATS,
    HALVES,
    I16,
    I64,
    WORDS,
    at_address,
    call,
    data,
    floats,
    fma,
    greatest_row,
    intrinsic,
    larger,
    logarithm_of_two,
    narrowed,
    number,
    pair,
    power_of_two,
    splat,
    words,
)

__all__ = [
    "add_row",
    "code_maxima",
    "column_maxima",
    "divergence_step",
    "greatest_bits",
    "mean_of_powers",
    "multiply_rows",
    "online_softmax",
    "softmax_gradients",
]


@intrinsic
def code_maxima(typingctx, out, o, high, low, s0, rows, factors, f0, ranges, r0):
    """out[o + c] = ranges[r0 + c] times the greatest of factors[f0 + r] * (128 high + low)[s0 + 16 r + c]
    over r < rows, at least 1; high and low int32, the rest fp32, ranges above 0."""
    n = types.intp
    sig = types.void(out, n, high, low, n, n, factors, n, ranges, n)

    def codegen(context, builder, signature, args):
        out, high, low, factors, ranges = (
            data(context, builder, signature, args, i) for i in (0, 2, 3, 6, 8)
        )

        def scaled(row):
            at = builder.add(args[4], builder.mul(row, number(COLUMNS)))
            upper, lower = (builder.load(at_address(builder, x, at, WORDS), align=4) for x in (high, low))
            score = builder.sitofp(builder.add(builder.shl(upper, words(7)), lower), FLOATS)
            factor = builder.load(builder.gep(factors, [builder.add(args[7], row)]))
            return builder.fmul(score, splat(builder, factor, FLOATS))

        greatest = greatest_row(builder, scaled, args[5])
        scale = builder.load(at_address(builder, ranges, args[9], FLOATS), align=4)
        builder.store(builder.fmul(greatest, scale), at_address(builder, out, args[1], FLOATS), align=4)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def multiply_rows(typingctx, x, x0, rows, factors, f0):
    """x[x0 + 16 r + c] *= factors[f0 + c] for r < rows; fp32."""
    n = types.intp
    sig = types.void(x, n, n, factors, n)

    def codegen(context, builder, signature, args):
        _, x0, rows, _, f0 = args
        x, factors = (data(context, builder, signature, args, i) for i in (0, 3))
        factor = builder.load(at_address(builder, factors, f0, FLOATS), align=4)
        with cgutils.for_range(builder, rows) as loop:
            where = at_address(builder, x, builder.add(x0, builder.mul(loop.index, number(COLUMNS))), FLOATS)
            builder.store(builder.fmul(builder.load(where, align=4), factor), where, align=4)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def greatest_bits(typingctx, a, a0, count):
    """The greatest |number| among bf16 bits a[a0:a0 + count], as bits (uint16); count a multiple of 32."""
    n = types.intp

    def codegen(context, builder, signature, args):
        a = data(context, builder, signature, args, 0)
        halves = ir.VectorType(I16, 2 * COLUMNS)
        mask = ir.Constant(halves, [0x7FFF] * 2 * COLUMNS)
        tops = [cgutils.alloca_once_value(builder, ir.Constant(halves, [0] * 2 * COLUMNS)) for _ in range(4)]

        def take(index, top):
            at = builder.add(args[1], builder.mul(index, number(2 * COLUMNS)))
            bits = builder.and_(builder.load(at_address(builder, a, at, halves), align=2), mask)
            larger = call(builder, "llvm.umax.v32i16", halves, bits, builder.load(top))
            builder.store(larger, top)

        vectors = builder.sdiv(args[2], number(2 * COLUMNS))
        fours = builder.sdiv(vectors, number(4))
        with cgutils.for_range(builder, fours) as loop:
            for i, top in enumerate(tops):
                take(builder.add(builder.mul(loop.index, number(4)), number(i)), top)
        with cgutils.for_range(builder, vectors, start=builder.mul(fours, number(4))) as loop:
            take(loop.index, tops[0])
        for top in tops[1:]:
            larger = call(builder, "llvm.umax.v32i16", halves, builder.load(top), builder.load(tops[0]))
            builder.store(larger, tops[0])
        return call(builder, "llvm.vector.reduce.umax.v32i16", I16, builder.load(tops[0]))

    return types.uint16(a, n, n), codegen


@intrinsic
def column_maxima(typingctx, out, o, scores, s0, rows, factors, f0):
    """out[o + c] = the greatest of scores[s0 + 16 r + c] * factors[f0 + r] over r < rows; fp32; rows at least
    1. Without factors where that array is empty."""
    n = types.intp
    sig = types.void(out, n, scores, n, n, factors, n)

    def codegen(context, builder, signature, args):
        out, scores, factors = (data(context, builder, signature, args, i) for i in (0, 2, 5))
        length = context.make_array(signature.args[5])(context, builder, args[5]).nitems

        def score(row):
            at = builder.add(args[3], builder.mul(row, number(COLUMNS)))
            return builder.load(at_address(builder, scores, at, FLOATS), align=4)

        def scaled(row):
            factor = builder.load(builder.gep(factors, [builder.add(args[6], row)]))
            return builder.fmul(score(row), splat(builder, factor, FLOATS))

        where = at_address(builder, out, args[1], FLOATS)
        with builder.if_else(builder.icmp_signed(">", length, number(0))) as (coded, plain):
            with coded:
                builder.store(greatest_row(builder, scaled, args[4]), where, align=4)
            with plain:
                builder.store(greatest_row(builder, score, args[4]), where, align=4)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def online_softmax(typingctx, scores, s0, seen, rows, scale, state, st, panel, p0):
    """One step of a softmax over rows, for 16 columns (Milakov and Gimelshein 2018, algorithm 3), in base 2.

    scores fp32 [rows, 16] from s0 on, of which the first `seen` (at least 1) count; rows even.
    scale  > 0, of the scores, times log2(e) for the natural softmax
    state  fp32 [3, 16] from st on: the greatest scaled score so far (-inf at first), the sum of powers above
           it, and, written here, the factor that makes older sums comparable with newer ones
    panel  uint32 [rows / 2, 16] from p0 on: 2**(scale * score - greatest) in bf16, 0 where it does not count
    Returns whether any of the factors is not 1.
    """
    n = types.intp
    sig = types.boolean(scores, n, n, n, types.float32, state, n, panel, n)

    def codegen(context, builder, signature, args):
        _, s0, seen, rows, scale, _, st, _, p0 = args
        scores, state, panel = (data(context, builder, signature, args, i) for i in (0, 5, 7))

        def score(row):
            at = builder.add(s0, builder.mul(row, number(COLUMNS)))
            return builder.load(at_address(builder, scores, at, FLOATS), align=4)

        def part(i):
            return at_address(builder, state, builder.add(st, number(COLUMNS * i)), FLOATS)

        factor = splat(builder, scale, FLOATS)
        before = builder.load(part(0), align=4)
        top = builder.fmul(greatest_row(builder, score, seen), factor)
        greatest = larger(builder, top, before)
        shift = builder.fsub(floats(-0.0), greatest)
        totals = [cgutils.alloca_once_value(builder, floats(0.0)) for _ in range(2)]

        def pairs(first, end, value_of):
            with cgutils.for_range(builder, end, start=first) as loop:
                both = []
                for i, total in enumerate(totals):
                    value = value_of(builder.add(builder.mul(loop.index, number(2)), number(i)))
                    builder.store(builder.fadd(builder.load(total), value), total)
                    both.append(narrowed(builder, value))
                where = builder.add(p0, builder.mul(loop.index, number(COLUMNS)))
                builder.store(pair(builder, *both), at_address(builder, panel, where, WORDS), align=4)

        def share(row):
            return power_of_two(builder, fma(builder, score(row), factor, shift))

        def share_or_nothing(row):
            # Rows that do not count may hold anything: they are replaced, not multiplied by 0.
            counts = builder.icmp_signed("<", row, seen)
            row = builder.select(counts, row, number(0))
            return builder.select(counts, share(row), floats(0.0))

        whole = builder.sdiv(seen, number(2))
        pairs(number(0), whole, share)
        pairs(whole, builder.sdiv(rows, number(2)), share_or_nothing)
        older = power_of_two(builder, builder.fadd(before, shift))
        total = builder.fadd(*(builder.load(total) for total in totals))
        sums = fma(builder, builder.load(part(1), align=4), older, total)
        for i, value in enumerate((greatest, sums, older)):
            builder.store(value, part(i), align=4)
        changed = builder.fcmp_unordered("!=", older, floats(1.0))
        return builder.icmp_unsigned("!=", builder.bitcast(changed, I16), ir.Constant(I16, 0))

    return sig, codegen


@intrinsic
def softmax_gradients(
    typingctx,
    scores,
    d_shares,
    at,
    seen,
    rows,
    scale,
    lse,
    delta,
    column,
    shares,
    d_scores,
    first,
    row,
    panel,
    p0,
):
    """Shares of a softmax over rows, and the gradients of its scores, for 16 columns (Dao et al. 2022,
    algorithm 4), with base 2 inside.

    scores, d_shares   fp32 [rows, 16] from `at` on: scores, and gradients of the shares; `seen` rows count
    scale              of the scores, times log2(e); the gradients come out without it
    lse, delta         fp32 [16] from `column` on: log2 of the sum of powers; sum of shares times d_shares
    shares, d_scores   uint16, bf16 [rows, 16] with rows `row` apart from `first` on; 0 where none counts
    panel              uint32 [rows / 2, 16] from p0 on: d_scores once more
    """
    n = types.intp
    sig = types.void(
        scores, d_shares, n, n, n, types.float32, lse, delta, n, shares, d_scores, n, n, panel, n
    )

    def codegen(context, builder, signature, args):
        _, _, at, seen, rows, scale, _, _, column, _, _, first, row, _, p0 = args
        scores, d_shares, lse, delta, shares, d_scores, panel = (
            data(context, builder, signature, args, i) for i in (0, 1, 6, 7, 9, 10, 13)
        )
        factor = splat(builder, scale, FLOATS)
        shift = builder.fsub(floats(-0.0), builder.load(at_address(builder, lse, column, FLOATS), align=4))
        mean = builder.load(at_address(builder, delta, column, FLOATS), align=4)

        def both(r):
            where = builder.add(at, builder.mul(r, number(COLUMNS)))
            score, gradient = (
                builder.load(at_address(builder, x, where, FLOATS), align=4) for x in (scores, d_shares)
            )
            share = power_of_two(builder, fma(builder, score, factor, shift))
            return share, builder.fmul(share, builder.fsub(gradient, mean))

        def both_or_nothing(r):
            counts = builder.icmp_signed("<", r, seen)
            values = both(builder.select(counts, r, number(0)))
            return tuple(builder.select(counts, value, floats(0.0)) for value in values)

        def pairs(begin, end, values_of):
            with cgutils.for_range(builder, end, start=begin) as loop:
                halves = []
                for i in range(2):
                    r = builder.add(builder.mul(loop.index, number(2)), number(i))
                    share, gradient = (narrowed(builder, value) for value in values_of(r))
                    where = builder.add(first, builder.mul(r, row))
                    builder.store(share, at_address(builder, shares, where, HALVES), align=2)
                    builder.store(gradient, at_address(builder, d_scores, where, HALVES), align=2)
                    halves.append(gradient)
                where = builder.add(p0, builder.mul(loop.index, number(COLUMNS)))
                builder.store(pair(builder, *halves), at_address(builder, panel, where, WORDS), align=4)

        whole = builder.sdiv(seen, number(2))
        pairs(number(0), whole, both)
        pairs(whole, builder.sdiv(rows, number(2)), both_or_nothing)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def mean_of_powers(typingctx, out, o, scores, s0, row, rows, columns, scale, shifts, h0):
    """out[o + t] = the mean over r < rows of 2**(scale * scores[s0 + r * row + t] - shifts[h0 + r]), for
    t < columns, a multiple of 16; fp32."""
    n = types.intp
    sig = types.void(out, n, scores, n, n, n, n, types.float32, shifts, n)

    def codegen(context, builder, signature, args):
        _, o, _, s0, row, rows, columns, scale, _, h0 = args
        out, scores, shifts = (data(context, builder, signature, args, i) for i in (0, 2, 8))
        factor = splat(builder, scale, FLOATS)
        one = ir.Constant(ir.FloatType(), 1.0)
        share = splat(builder, builder.fdiv(one, builder.sitofp(rows, ir.FloatType())), FLOATS)
        with cgutils.for_range(builder, builder.sdiv(columns, number(COLUMNS))) as part:
            column = builder.mul(part.index, number(COLUMNS))
            total = cgutils.alloca_once_value(builder, floats(0.0))
            builder.store(floats(0.0), total)
            with cgutils.for_range(builder, rows) as loop:
                at = builder.add(builder.add(s0, column), builder.mul(loop.index, row))
                score = builder.load(at_address(builder, scores, at, FLOATS), align=4)
                shift = builder.load(builder.gep(shifts, [builder.add(h0, loop.index)]))
                shift = splat(builder, builder.fneg(shift), FLOATS)
                power = power_of_two(builder, fma(builder, score, factor, shift))
                builder.store(builder.fadd(builder.load(total), power), total)
            mean = builder.fmul(builder.load(total), share)
            builder.store(mean, at_address(builder, out, builder.add(o, column), FLOATS), align=4)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def divergence_step(typingctx, teacher, t0, student, s0, seen, columns, scale, shift, factor, out, o):
    """Of one row: the sum over t < seen of teacher * (log2(teacher) - log2(share)), where share is
    2**(scale * student - shift); and out[o + t] = factor * (share - teacher) in bf16, 0 from `seen` on.

    teacher, student fp32 from t0 and s0 on; columns a multiple of 16; out uint16. The sum in fp32.
    """
    n, f = types.intp, types.float32
    sig = types.float32(teacher, n, student, n, n, n, f, f, f, out, n)

    def codegen(context, builder, signature, args):
        _, t0, _, s0, seen, columns, scale, shift, factor, _, o = args
        teacher, student, out = (data(context, builder, signature, args, i) for i in (0, 2, 9))
        scale, shift, factor = (splat(builder, x, FLOATS) for x in (scale, builder.fneg(shift), factor))
        total = cgutils.alloca_once_value(builder, floats(0.0))
        lanes = ir.Constant(ir.VectorType(I64, COLUMNS), list(range(COLUMNS)))
        limit = splat(builder, seen, ir.VectorType(I64, COLUMNS))
        with cgutils.for_range(builder, builder.sdiv(columns, number(COLUMNS))) as loop:
            column = builder.mul(loop.index, number(COLUMNS))
            places = builder.add(splat(builder, column, ir.VectorType(I64, COLUMNS)), lanes)
            counts = builder.icmp_signed("<", places, limit)
            p, x = (
                builder.load(at_address(builder, base, builder.add(first, column), FLOATS), align=4)
                for base, first in ((teacher, t0), (student, s0))
            )
            logit = fma(builder, x, scale, shift)
            # 0 log 0 is 0: what is below the smallest normal number counts as that.
            log = logarithm_of_two(builder, larger(builder, p, floats(2.0**-126)))
            term = builder.fmul(p, builder.fsub(log, logit))
            term = builder.select(counts, term, floats(0.0))
            builder.store(builder.fadd(builder.load(total), term), total)
            gradient = builder.fmul(factor, builder.fsub(power_of_two(builder, logit), p))
            gradient = builder.select(counts, gradient, floats(0.0))
            where = at_address(builder, out, builder.add(o, column), HALVES)
            builder.store(narrowed(builder, gradient), where, align=2)
        zero = ir.Constant(ir.FloatType(), 0.0)
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), FLOATS])
        name = "llvm.vector.reduce.fadd.v16f32"
        add = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return builder.call(add, (zero, builder.load(total)), fastmath=("reassoc",))

    return sig, codegen


@intrinsic
def add_row(typingctx, state, st, scores, s0, seen, columns, scale):
    """One step of a softmax along a row, in base 2: state fp32 [2] from st on, the greatest scaled score and
    the sum of powers above it, takes in scores[s0:s0 + seen], seen at least 1."""
    n = types.intp
    sig = types.void(state, n, scores, n, n, n, types.float32)

    def codegen(context, builder, signature, args):
        _, st, _, s0, seen, columns, scale = args
        state, scores = (data(context, builder, signature, args, i) for i in (0, 2))
        factor = splat(builder, scale, FLOATS)
        wide = ir.VectorType(I64, COLUMNS)
        lanes, limit = ir.Constant(wide, list(range(COLUMNS))), splat(builder, seen, wide)
        parts = builder.sdiv(columns, number(COLUMNS))

        def row(index, otherwise):
            column = builder.mul(index, number(COLUMNS))
            score = builder.load(at_address(builder, scores, builder.add(s0, column), FLOATS), align=4)
            counts = builder.icmp_signed("<", builder.add(splat(builder, column, wide), lanes), limit)
            return builder.select(counts, builder.fmul(score, factor), floats(otherwise))

        tops = cgutils.alloca_once_value(builder, floats(-math.inf))
        builder.store(floats(-math.inf), tops)
        with cgutils.for_range(builder, parts) as loop:
            builder.store(larger(builder, row(loop.index, -math.inf), builder.load(tops)), tops)
        top = call(builder, "llvm.vector.reduce.fmax.v16f32", ir.FloatType(), builder.load(tops))
        greatest_at, sum_at = (builder.gep(state, [builder.add(st, number(i))]) for i in range(2))
        before = builder.load(greatest_at)
        greatest = builder.select(builder.fcmp_ordered(">", top, before), top, before)
        shift = splat(builder, builder.fneg(greatest), FLOATS)
        total = cgutils.alloca_once_value(builder, floats(0.0))
        older = power_of_two(builder, builder.fadd(splat(builder, before, FLOATS), shift))
        first = ir.Constant(FLOATS, [ir.Constant(ir.FloatType(), float(i == 0)) for i in range(COLUMNS)])
        older = builder.fmul(builder.fmul(older, splat(builder, builder.load(sum_at), FLOATS)), first)
        builder.store(older, total)
        with cgutils.for_range(builder, parts) as loop:
            power = power_of_two(builder, builder.fadd(row(loop.index, -math.inf), shift))
            builder.store(builder.fadd(builder.load(total), power), total)
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), FLOATS])
        name = "llvm.vector.reduce.fadd.v16f32"
        add = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        zero = ir.Constant(ir.FloatType(), 0.0)
        builder.store(builder.call(add, (zero, builder.load(total)), fastmath=("reassoc",)), sum_at)
        builder.store(greatest, greatest_at)
        return context.get_dummy_value()

    return sig, codegen
