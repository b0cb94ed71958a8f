"""Kernels of the index loss: a program holds a page's keys and index keys, its readers pass by.

The teacher is the mean of G probabilities, so both passes need the heads' log-sum-exps over the whole
support first: `lse_by_page` writes one part per slot, which the host merges, and `gradient_by_page`
recomputes the probabilities from them. A step takes QUERIES queries, and one head of theirs after the other:
the mean over heads is then a sum of tiles of one shape.
"""

# pyright: reportMissingImports=false
import triton.language as tl

from longforge.kernels.triton_pages import LN2, LOG2E, add_rows, dot, jit, load_rows, store_rows

__all__ = ["GAIN", "gradient_by_page", "lse_by_page"]

GAIN = 512.0
"""What differences of probabilities are multiplied by while they are half-precision numbers, so that those of
fp16 do not vanish."""
_GAIN = tl.constexpr(GAIN)
_LOG2E = tl.constexpr(LOG2E)
_LN2 = tl.constexpr(LN2)


@jit
def _log_sum(scores, visible):
    """Natural log-sum-exp of each row of base-2 scores [rows, tokens] over its visible tokens."""
    scores = tl.where(visible, scores, float("-inf"))
    top = tl.max(scores, 1)
    base = tl.where(top == float("-inf"), 0.0, top)
    return (top + tl.log2(tl.sum(tl.exp2(scores - base[:, None]), 1))) * _LN2


@jit
def lse_by_page(
    IndexQ,  # [N, HKV, DI]
    IndexK,  # [S, BLOCK, DI] by its strides
    Q,  # [N, Hq, D]
    K,  # [S, BLOCK, HKV, D] by its strides
    Entries,
    Seen,
    Deepest,
    PieceSegment,
    PieceFirst,
    PieceCount,
    TeacherLse,  # fp32 [N, HKV, top_k, SUBS, G]
    StudentLse,  # fp32 [N, HKV, top_k, SUBS]
    scale,
    index_scale,
    top_k,
    i_page, i_row, k_page, k_row, k_head,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    DI: tl.constexpr,
    DIM_I: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (pieces * SUBS,)."""
    SUBS: tl.constexpr = (BLOCK + TILE - 1) // TILE
    piece = tl.program_id(0) // SUBS
    sub = tl.program_id(0) % SUBS
    segment = tl.load(PieceSegment + piece)
    first = tl.load(PieceFirst + piece)
    count = tl.load(PieceCount + piece)
    page = (segment // HKV).to(tl.int64)
    g = segment % HKV
    row = sub * TILE + tl.arange(0, TILE)
    held = (row < tl.load(Deepest + segment)) & (count > 0)
    k = load_rows(K, page * k_page + row * k_row + g * k_head, held, D, DIM)
    index_k = load_rows(IndexK, page * i_page + row * i_row, held, DI, DIM_I)
    for at in range(0, count, QUERIES):
        place = at + tl.arange(0, QUERIES)
        live = place < count
        entry = tl.load(Entries + first + place, mask=live, other=0).to(tl.int64)
        seen = tl.load(Seen + first + place, mask=live, other=0)
        visible = row[None, :] < seen[:, None]
        unit = entry // top_k
        part = entry * SUBS + sub
        index_q = load_rows(IndexQ, unit * DI, live, DI, DIM_I)
        logits = dot(index_q, tl.trans(index_k), PRECISION) * (index_scale * _LOG2E)
        tl.store(StudentLse + part, _log_sum(logits, visible), mask=live)
        for h in range(G):
            q = load_rows(Q, (unit * G + h) * D, live, D, DIM)
            scores = dot(q, tl.trans(k), PRECISION) * (scale * _LOG2E)
            tl.store(TeacherLse + part * G + h, _log_sum(scores, visible), mask=live)


@jit
def gradient_by_page(
    IndexQ,  # [N, HKV, DI]
    IndexK,  # [S, BLOCK, DI] by its strides
    Q,  # [N, Hq, D]
    K,  # [S, BLOCK, HKV, D] by its strides
    Weights,  # fp32 [N], at most 1
    TeacherLse,  # fp32 [N, HKV, G]
    StudentLse,  # fp32 [N, HKV]
    Entries,
    Seen,
    Deepest,
    PieceSegment,
    PieceFirst,
    PieceCount,
    PieceRoom,
    Divergence,  # fp32 [N, HKV, top_k, SUBS]: this part of the sum over tokens
    DIndexQParts,  # [N, HKV, top_k, SUBS, 1, DI], times GAIN, without weights and index_scale
    DIndexK,  # fp32 [S, BLOCK, HKV, DI], times GAIN, without index_scale
    PartialK,  # fp32 [rooms, BLOCK, DI]
    scale,
    index_scale,
    top_k,
    i_page, i_row, k_page, k_row, k_head,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    DI: tl.constexpr,
    DIM_I: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (pieces * SUBS,)."""
    SUBS: tl.constexpr = (BLOCK + TILE - 1) // TILE
    piece = tl.program_id(0) // SUBS
    sub = tl.program_id(0) % SUBS
    segment = tl.load(PieceSegment + piece)
    first = tl.load(PieceFirst + piece)
    count = tl.load(PieceCount + piece)
    page = (segment // HKV).to(tl.int64)
    g = segment % HKV
    row = sub * TILE + tl.arange(0, TILE)
    held = (row < tl.load(Deepest + segment)) & (count > 0)
    k = load_rows(K, page * k_page + row * k_row + g * k_head, held, D, DIM)
    index_k = load_rows(IndexK, page * i_page + row * i_row, held, DI, DIM_I)
    d_index_k = tl.zeros([TILE, DIM_I], tl.float32)
    for at in range(0, count, QUERIES):
        place = at + tl.arange(0, QUERIES)
        live = place < count
        entry = tl.load(Entries + first + place, mask=live, other=0).to(tl.int64)
        seen = tl.load(Seen + first + place, mask=live, other=0)
        visible = row[None, :] < seen[:, None]
        unit = entry // top_k
        part = entry * SUBS + sub
        teacher = tl.zeros([QUERIES, TILE], tl.float32)
        for h in range(G):
            q = load_rows(Q, (unit * G + h) * D, live, D, DIM)
            lse = tl.load(TeacherLse + unit * G + h, mask=live, other=0.0)
            teacher += tl.exp2(dot(q, tl.trans(k), PRECISION) * (scale * _LOG2E) - lse[:, None] * _LOG2E)
        teacher = tl.where(visible, teacher / G, 0.0)
        index_q = load_rows(IndexQ, unit * DI, live, DI, DIM_I)
        lse = tl.load(StudentLse + unit, mask=live, other=0.0)
        log_student = dot(index_q, tl.trans(index_k), PRECISION) * index_scale - lse[:, None]
        terms = tl.where(teacher > 0, teacher * (tl.log(teacher) - log_student), 0.0)
        tl.store(Divergence + part, tl.sum(terms, 1), mask=live)
        if WITH_GRADIENTS:
            student = tl.where(visible, tl.exp2(log_student * _LOG2E), 0.0)
            gap = ((student - teacher) * _GAIN).to(index_q.dtype)
            d_index_q = dot(gap, index_k, PRECISION)
            store_rows(DIndexQParts, part * DI, d_index_q, live, DI, DIM_I)
            weight = tl.load(Weights + unit // HKV, mask=live, other=0.0)
            weighted = (index_q.to(tl.float32) * weight[:, None]).to(index_q.dtype)
            d_index_k += dot(tl.trans(gap), weighted, PRECISION)
    if WITH_GRADIENTS:
        inside = (row < BLOCK) & (count > 0)
        room = tl.load(PieceRoom + piece).to(tl.int64)
        if room < 0:
            where = ((page * BLOCK + row) * HKV + g) * DI
            add_rows(DIndexK, where, d_index_k, inside, DI, DIM_I)
        else:
            store_rows(PartialK, (room * BLOCK + row) * DI, d_index_k, inside, DI, DIM_I)
