"""What the Triton backends over pages share: guarded loads, products, and sums of partial results.

Kernels are written for tiles whose sides are powers of two; other head dims and block sizes are padded with
masked lanes. PRECISION is how a product of two tiles is computed: see `precision_of`.
"""

# Triton's decorators are typed for compiled code, not for launching it.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

# pyright: reportMissingImports=false, reportIndexIssue=false
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.page_readers import Pieces

__all__ = [
    "LN2",
    "LOG2E",
    "add_parts",
    "add_parts_kernel",
    "add_pieces",
    "add_pieces_kernel",
    "add_rows",
    "check_sizes",
    "dot",
    "jit",
    "load_rows",
    "padded",
    "precision_of",
    "store_rows",
]

jit: Any = triton.jit
"""Typed so that checkers without Triton let a kernel be launched."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_DIM = MOST_BLOCK = 128
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


@jit
def dot(a, b, PRECISION: tl.constexpr):
    """a [m, n] @ b [n, o] in fp32."""
    if PRECISION == "interpreted":
        # Triton's interpreter multiplies the bit patterns of bf16 tiles.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@jit
def load_rows(base, offsets, live, D: tl.constexpr, DIM: tl.constexpr):
    """[rows, DIM]: the rows that begin at base + offsets; 0 where not live, and from column D on."""
    d = tl.arange(0, DIM)
    mask = live[:, None]
    if D < DIM:
        mask = mask & (d < D)[None, :]
    return tl.load(base + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@jit
def store_rows(base, offsets, value, live, D: tl.constexpr, DIM: tl.constexpr):
    """Writes the first D columns of value [rows, DIM] where live, in the dtype of base."""
    d = tl.arange(0, DIM)
    mask = live[:, None]
    if D < DIM:
        mask = mask & (d < D)[None, :]
    tl.store(base + offsets[:, None] + d[None, :], value.to(base.dtype.element_ty), mask=mask)


@jit
def add_rows(base, offsets, value, live, D: tl.constexpr, DIM: tl.constexpr):
    """Adds the first D columns of value [rows, DIM] where live, fp32.

    For a program that alone adds to these rows in its launch, so the order of additions is fixed. The
    addition is one instruction in memory: loading the rows first takes registers that the kernel lacks.
    """
    d = tl.arange(0, DIM)
    mask = live[:, None]
    if D < DIM:
        mask = mask & (d < D)[None, :]
    tl.atomic_add(base + offsets[:, None] + d[None, :], value, mask=mask, sem="relaxed")


@jit
def add_parts_kernel(
    Parts,  # [U, K * SUBS, G, D]
    Shown,  # int32 [U, K]
    Out,  # [U, G, D]
    top_k,
    factor,
    SUBS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    STEP: tl.constexpr,
):
    """Out = factor * the sum over the parts that were written, in order. One program: one row of Out."""
    row = tl.program_id(0).to(tl.int64)
    unit = row // G
    total = tl.zeros([DIM], tl.float32)
    for at in range(0, top_k * SUBS, STEP):
        part = at + tl.arange(0, STEP)
        inside = part < top_k * SUBS
        live = tl.load(Shown + unit * top_k + part // SUBS, mask=inside, other=0) > 0
        offsets = ((unit * top_k * SUBS + part) * G + row % G) * D
        total += tl.sum(load_rows(Parts, offsets, live, D, DIM).to(tl.float32), 0)
    d = tl.arange(0, DIM)
    tl.store(Out + row * D + d, (total * factor).to(Out.dtype.element_ty), mask=d < D)


def add_parts(parts: Tensor, shown: Tensor, out: Tensor, factor: float) -> None:
    """out [N, Hkv, G, D] = factor * parts [N, Hkv, K, SUBS, G, D] summed over K and SUBS where shown [N, Hkv,
    K] > 0."""
    n, groups, top_k, subs, per_group, dim = parts.shape
    add_parts_kernel[(n * groups * per_group,)](
        parts, shown, out, top_k, factor,
        SUBS=subs, G=per_group, D=dim, DIM=padded(dim), STEP=16, num_warps=4,
    )  # fmt: skip


@jit
def add_pieces_kernel(
    Partial,  # fp32 [rooms, BLOCK, D]
    SegmentRoom,
    SegmentPieces,
    Out,  # fp32 [S, BLOCK, groups, D]
    groups,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds the partial results of segments of several pieces, in order. One program: ROWS rows of a page."""
    segment = tl.program_id(0)
    pieces = tl.load(SegmentPieces + segment)
    if pieces > 1:
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        live = row < BLOCK
        room = tl.load(SegmentRoom + segment).to(tl.int64)
        page = (segment // groups).to(tl.int64)
        where = ((page * BLOCK + row) * groups + segment % groups) * D
        total = load_rows(Out, where, live, D, DIM)
        for piece in range(pieces):
            total += load_rows(Partial, ((room + piece) * BLOCK + row) * D, live, D, DIM)
        store_rows(Out, where, total, live, D, DIM)


def add_pieces(partial: Tensor, pieces: Pieces, out: Tensor) -> None:
    """out fp32 [S, Bk, Hkv, D] += partial fp32 [rooms, Bk, D], each segment's own."""
    if pieces.rooms == 0:
        return
    _, block_size, groups, dim = out.shape
    rows = 16
    add_pieces_kernel[(pieces.segment_room.shape[0], triton.cdiv(block_size, rows))](
        partial, pieces.segment_room, pieces.segment_pieces, out, groups,
        BLOCK=block_size, D=dim, DIM=padded(dim), ROWS=rows, num_warps=4,
    )  # fmt: skip


def padded(n: int) -> int:
    """The power of two that a tile has for n lanes; products want at least 16."""
    return max(16, triton.next_power_of_2(n))


def precision_of(dtype: torch.dtype) -> str:
    """How products of tiles of this dtype are computed.

    fp32 takes three tf32 products, which are about as exact as fp32 ones and run on the matrix units; a
    single one has an error near 3e-4.
    """
    if triton.knobs.runtime.interpret:
        return "interpreted"
    return "tf32x3" if dtype == torch.float32 else "ieee"


def check_sizes(operation: str, q: Tensor, block_size: int, *dims: int) -> None:
    """Raises InputError for a dtype or size that the Triton kernels have no tiles for."""
    name = f"{operation} backend 'triton'"
    if q.dtype not in DTYPES:
        raise InputError(f"{name}: float32, bfloat16 or float16 expected, got {q.dtype}")
    if max(dims) > MOST_DIM or block_size > MOST_BLOCK:
        raise InputError(
            f"{name}: dims and blocks of at most {MOST_DIM} expected, got dims {list(dims)} and blocks of "
            f"{block_size}"
        )
