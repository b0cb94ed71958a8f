"""Compiled: products of bf16 matrices in tiles of 16 x 16.

Three forms of a bf16 matrix (uint16 bits, flat arrays):

    rows    [m, k] row-major with any row stride: the left side of a product. k a multiple of 32.
    panel   [k / 2, 16, 2]: the right side of a product, 16 columns wide; two neighbours of the inner
            dimension stand side by side, as the instructions want them.
    fp32 [m, 16] with any row stride: the result.

Products of bf16 numbers are exact in fp32 and are added in fp32, pairs first; subnormal numbers count as
zero. A column of a result depends on nothing but its own column of the panel: what is computed side by side
never changes a bit of anything.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from longforge.kernels.numba_host import compiled
from longforge.kernels.tiles.engine import TILE_ENGINE
from longforge.kernels.tiles.vectors import (
    BYTES,
    COLUMNS,
    FLOATS,
    I8,
    I32,
    PAIRS,
    STEP,
    WORDS,
    at_address,
    call,
    data,
    floats,
    intrinsic,
    number,
    splat,
    words,
)

__all__ = ["TILE_SETTINGS", "begin_tiles", "end_tiles", "tile_product"]


def _settings() -> np.ndarray:
    settings = np.zeros(64, np.uint8)
    settings[0] = 1
    settings[16:32:2] = 64
    settings[48:56] = 16
    return settings


TILE_SETTINGS = _settings()
"""uint8 [64]: what begin_tiles takes: eight registers of 16 rows of 64 bytes."""


@intrinsic
def begin_tiles(typingctx, settings):
    """Before the first product on a thread. settings: TILE_SETTINGS."""

    def codegen(context, builder, signature, args):
        if TILE_ENGINE == "amx":
            where = builder.bitcast(data(context, builder, signature, args, 0), BYTES)
            call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), where)
        return context.get_dummy_value()

    return types.void(settings), codegen


@intrinsic
def end_tiles(typingctx):
    """After the last product on a thread."""

    def codegen(context, builder, signature, args):
        if TILE_ENGINE == "amx":
            call(builder, "llvm.x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


def _amx_tiles(
    builder, codes: bool, tiles: int, c, c_row, c_panel, a, a_row, b, b_panel, panels: int, steps, add
):
    """IR: `tiles` row tiles of the results of `panels` panels; everything in bytes."""
    kind = "tdpbssd" if codes else "tdpbf16ps"
    load, store, zero, multiply = (
        f"llvm.x86.{name}" for name in ("tileloadd64", "tilestored64", "tilezero", kind)
    )
    void, register = ir.VoidType(), [ir.Constant(I8, i) for i in range(8)]
    sums = [(i, j, register[i * panels + j]) for i in range(tiles) for j in range(panels)]
    free = register[len(sums) :]

    def result(i, j):
        at = builder.add(builder.mul(c_row, number(COLUMNS * i)), builder.mul(c_panel, number(j)))
        return builder.gep(c, [at])

    with builder.if_else(add) as (then, otherwise):
        with then:
            for i, j, total in sums:
                call(builder, load, void, total, result(i, j), c_row)
        with otherwise:
            for _, _, total in sums:
                call(builder, zero, void, total)
    with cgutils.for_range(builder, steps) as loop:
        for j in range(panels):
            at = builder.add(builder.mul(loop.index, number(64 * COLUMNS)), builder.mul(b_panel, number(j)))
            call(builder, load, void, free[j], builder.gep(b, [at]), number(64))
        left = builder.gep(a, [builder.mul(loop.index, number(64))])
        for i in range(tiles):
            at = free[panels + i % (len(free) - panels)]
            tile = builder.gep(left, [builder.mul(a_row, number(COLUMNS * i))])
            call(builder, load, void, at, tile, a_row)
            for j in range(panels):
                call(builder, multiply, void, register[i * panels + j], at, free[j])
    for i, j, total in sums:
        call(builder, store, void, total, result(i, j), c_row)


def _avx512_tiles(
    builder, codes: bool, tiles: int, c, c_row, c_panel, a, a_row, b, b_panel, panels: int, steps, add
):
    """The same with vectors: a row of a tile is a register, four bytes of the left side go to all lanes."""
    places = [(r, j) for r in range(COLUMNS // panels) for j in range(panels)]
    kind, step = (WORDS, _add_quads) if codes else (FLOATS, _add_pairs)
    nothing = words(0) if codes else floats(0.0)
    with cgutils.for_range(builder, number(tiles * panels)) as part:
        row = builder.mul(part.index, number(COLUMNS // panels))
        to, of = builder.gep(c, [builder.mul(c_row, row)]), builder.gep(a, [builder.mul(a_row, row)])
        sums = [cgutils.alloca_once(builder, kind) for _ in places]
        shifts = [cgutils.alloca_once_value(builder, nothing) for _ in range(panels)]
        results = [
            at_address(
                builder, to, builder.add(builder.mul(c_row, number(r)), builder.mul(c_panel, number(j))), kind
            )
            for r, j in places
        ]
        for target, total in zip(results, sums, strict=True):
            builder.store(nothing, total)
            with builder.if_then(add):
                builder.store(builder.load(target, align=4), total)
        for shift in shifts:
            builder.store(nothing, shift)
        with cgutils.for_range(builder, builder.mul(steps, number(STEP // 2))) as loop:
            at = builder.mul(loop.index, number(64))
            rights = [
                builder.load(
                    at_address(builder, b, builder.add(at, builder.mul(b_panel, number(j))), WORDS), align=4
                )
                for j in range(panels)
            ]
            if codes:  # the left side is read as code + 128, and 128 times the right side is taken off again
                for right, shift in zip(rights, shifts, strict=True):
                    step(builder, shift, words(_BIAS), right)
            first = builder.gep(of, [builder.mul(loop.index, number(4))])
            for (r, j), total in zip(places, sums, strict=True):
                four = builder.load(at_address(builder, first, builder.mul(a_row, number(r)), I32), align=1)
                if codes:  # before it goes to all lanes: after that LLVM 22 folds it without end
                    four = builder.xor(four, ir.Constant(I32, _BIAS))
                step(builder, total, splat(builder, four, WORDS), rights[j])
        for (_, j), target, total in zip(places, results, sums, strict=True):
            value = builder.load(total)
            if codes:
                value = builder.sub(value, builder.load(shifts[j]))
            builder.store(value, target, align=4)


_BIAS = -0x7F7F7F80
"""128 in each byte of a word."""


def _add_pairs(builder, total, left, right):
    left, right = builder.bitcast(left, PAIRS), builder.bitcast(right, PAIRS)
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    builder.store(call(builder, name, FLOATS, builder.load(total), left, right), total)


def _add_quads(builder, total, left, right):
    name = "llvm.x86.avx512.vpdpbusd.512"
    builder.store(call(builder, name, WORDS, builder.load(total), left, right), total)


def _tile_product(panels: int):
    """The intrinsic for this many panels side by side."""
    tiles_of, most = (_amx_tiles, 4 // panels) if TILE_ENGINE == "amx" else (_avx512_tiles, 1)

    @intrinsic
    def product(typingctx, c, c0, c_row, c_panel, a, a0, a_row, b, b0, b_panel, row_tiles, steps, add):
        n = types.intp
        sig = types.void(c, n, n, n, a, n, n, b, n, n, n, n, types.boolean)

        def codegen(context, builder, signature, args):
            _, c0, c_row, c_panel, _, a0, a_row, _, b0, b_panel, row_tiles, steps, add = args
            codes = signature.args[0].dtype == types.int32
            bases = [(0, c0), (4, a0), (7, b0)]
            c, a, b = (
                builder.bitcast(builder.gep(data(context, builder, signature, args, i), [first]), BYTES)
                for i, first in bases
            )
            sizes = [
                context.get_abi_sizeof(context.get_value_type(signature.args[i].dtype)) for i, _ in bases
            ]
            c_row, c_panel = (builder.mul(x, number(sizes[0])) for x in (c_row, c_panel))
            a_row, b_panel = builder.mul(a_row, number(sizes[1])), builder.mul(b_panel, number(sizes[2]))
            done = cgutils.alloca_once_value(builder, number(0))
            for tiles in sorted({most, 1}, reverse=True):
                left = builder.sub(row_tiles, builder.load(done))
                with cgutils.for_range(builder, builder.sdiv(left, number(tiles))):
                    at = builder.mul(builder.load(done), number(COLUMNS))
                    tiles_of(
                        builder, codes, tiles, builder.gep(c, [builder.mul(at, c_row)]), c_row, c_panel,
                        builder.gep(a, [builder.mul(at, a_row)]), a_row, b, b_panel, panels, steps, add,
                    )  # fmt: skip
                    builder.store(builder.add(builder.load(done), number(tiles)), done)
            return context.get_dummy_value()

        return sig, codegen

    return product


_one_panel, _two_panels = _tile_product(1), _tile_product(2)


@compiled(error_model="numpy")
def tile_product(c, c0, c_row, c_panel, a, a0, a_row, b, b0, b_panel, row_tiles, panels, steps, add):
    """For each panel j: c_j [16 row_tiles, 16] = (c_j if add else 0) + a [16 row_tiles, 32 steps] @ b_j.

    c fp32, a rows (uint16, or pairs in uint32), b panels (uint16 or uint32), flat; c0, a0, b0 the first
    elements; c_row and a_row the distances of rows, c_panel and b_panel of the panels, in elements of each
    array. Where c is int32, a and b hold int8, four neighbours of the inner dimension in a word, and a step
    is 64 products. Between begin_tiles and end_tiles.
    """
    j = np.int64(0)
    while j + 2 <= panels:
        to, right = c0 + j * c_panel, b0 + j * b_panel
        _two_panels(c, to, c_row, c_panel, a, a0, a_row, b, right, b_panel, row_tiles, steps, add)
        j += 2
    if j < panels:
        to, right = c0 + j * c_panel, b0 + j * b_panel
        _one_panel(c, to, c_row, c_panel, a, a0, a_row, b, right, b_panel, row_tiles, steps, add)
