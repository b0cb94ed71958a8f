"""Backward kernels of block-sparse attention.

With p = exp(scale q.k - lse) and delta = d_out.out, the score's gradient is ds = p (d_out.v - delta); then
dv = p^T d_out, dk = scale ds^T q, dq = scale ds k. Keys and values get theirs by page: one program owns a
page and group, sums over all queries that read it, of whatever path, and nobody else adds to it, so there are
no atomics and the result is the same every time. Queries get theirs either in the same pass, as one partial
result per slot, or by query.
"""

# pyright: reportMissingImports=false
import triton.language as tl

from longforge.kernels.triton_pages import LOG2E, add_rows, dot, jit, load_rows, store_rows

__all__ = ["backward_by_page", "d_q_by_query", "output_products"]

_LOG2E = tl.constexpr(LOG2E)


@jit
def output_products(
    Out,  # [rows, D]
    DOut,
    Delta,  # fp32 [rows]
    rows,
    D: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Delta = the sum over D of Out * DOut. Grid (rows / ROWS,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    out = load_rows(Out, row * D, live, D, DIM).to(tl.float32)
    d_out = load_rows(DOut, row * D, live, D, DIM).to(tl.float32)
    tl.store(Delta + row, tl.sum(out * d_out, 1), mask=live)


@jit
def d_q_by_query(
    Q,  # [N, Hq, D]
    K,  # [S, BLOCK, HKV, D] by its strides
    V,
    DOut,  # [N, Hq, D]
    Lse,  # fp32 [N, Hq], natural
    Delta,  # fp32 [N, Hq]
    Blocks,  # int32 [N, HKV, TOP_K]
    Positions,
    Paths,
    Table,  # int32 [P, M], rows table_row apart
    table_row,
    DQ,  # [N, Hq, D]
    scale,
    k_page, k_row, k_head, v_page, v_row, v_head,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (N, HKV)."""
    SUBS: tl.constexpr = (BLOCK + TILE - 1) // TILE
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    unit = n * HKV + g
    position = tl.load(Positions + n)
    pages = Table + tl.load(Paths + n) * table_row
    head = tl.arange(0, ROWS)
    rows = unit * G + head
    q = load_rows(Q, rows * D, head < G, D, DIM)
    d_out = load_rows(DOut, rows * D, head < G, D, DIM)
    lse = tl.load(Lse + rows, mask=head < G, other=0.0) * _LOG2E
    delta = tl.load(Delta + rows, mask=head < G, other=0.0)
    d_q = tl.zeros([ROWS, DIM], tl.float32)
    for step in range(TOP_K * SUBS):
        block = tl.load(Blocks + unit * TOP_K + step // SUBS)
        seen = tl.where(block < 0, 0, tl.minimum(position - block * BLOCK + 1, BLOCK))
        page = tl.load(pages + tl.maximum(block, 0)).to(tl.int64)
        row = step % SUBS * TILE + tl.arange(0, TILE)
        live = row < seen
        k = load_rows(K, page * k_page + row * k_row + g * k_head, live, D, DIM)
        v = load_rows(V, page * v_page + row * v_row + g * v_head, live, D, DIM)
        scores = dot(q, tl.trans(k), PRECISION) * (scale * _LOG2E)
        p = tl.exp2(tl.where(live[None, :], scores - lse[:, None], float("-inf")))
        d_scores = p * (dot(d_out, tl.trans(v), PRECISION) - delta[:, None])
        d_q += dot(d_scores.to(k.dtype), k, PRECISION)
    store_rows(DQ, rows * D, d_q * scale, head < G, D, DIM)


@jit
def backward_by_page(
    Q,  # [N, Hq, D]
    K,  # [S, BLOCK, HKV, D] by its strides
    V,
    DOut,  # [N, Hq, D]
    Lse,  # fp32 [N, Hq], natural
    Delta,  # fp32 [N, Hq]
    Entries,
    Seen,
    Deepest,
    PieceSegment,
    PieceFirst,
    PieceCount,
    PieceRoom,
    DK,  # fp32 [S, BLOCK, HKV, D]
    DV,
    PartialK,  # fp32 [rooms, BLOCK, D]
    PartialV,
    DQParts,  # [N, HKV, top_k, SUBS, G, D]; read only with WITH_DQ
    scale,
    top_k,
    k_page, k_row, k_head, v_page, v_row, v_head,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    WITH_DQ: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (pieces * SUBS,): TILE tokens of a page stay, the queries of one piece pass by."""
    QUERIES: tl.constexpr = ROWS // G
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
    v = load_rows(V, page * v_page + row * v_row + g * v_head, held, D, DIM)
    d_k = tl.zeros([TILE, DIM], tl.float32)
    d_v = tl.zeros([TILE, DIM], tl.float32)
    which = tl.arange(0, ROWS) // G
    head = tl.arange(0, ROWS) % G
    for at in range(0, count, QUERIES):
        live = (which < QUERIES) & (at + which < count)
        entry = tl.load(Entries + first + at + which, mask=live, other=0).to(tl.int64)
        seen = tl.load(Seen + first + at + which, mask=live, other=0)
        rows = entry // top_k * G + head
        q = load_rows(Q, rows * D, live, D, DIM)
        d_out = load_rows(DOut, rows * D, live, D, DIM)
        lse = tl.load(Lse + rows, mask=live, other=0.0) * _LOG2E
        delta = tl.load(Delta + rows, mask=live, other=0.0)
        scores = dot(k, tl.trans(q), PRECISION) * (scale * _LOG2E) - lse[None, :]
        p = tl.exp2(tl.where(row[:, None] < seen[None, :], scores, float("-inf")))
        d_v += dot(p.to(d_out.dtype), d_out, PRECISION)
        d_scores = (p * (dot(v, tl.trans(d_out), PRECISION) - delta[None, :])).to(q.dtype)
        d_k += dot(d_scores, q, PRECISION)
        if WITH_DQ:
            d_q = dot(tl.trans(d_scores), k, PRECISION) * scale
            store_rows(DQParts, ((entry * SUBS + sub) * G + head) * D, d_q, live, D, DIM)
    inside = (row < BLOCK) & (count > 0)
    room = tl.load(PieceRoom + piece).to(tl.int64)
    if room < 0:
        where = ((page * BLOCK + row) * HKV + g) * D
        add_rows(DK, where, d_k * scale, inside, D, DIM)
        add_rows(DV, where, d_v, inside, D, DIM)
    else:
        where = (room * BLOCK + row) * D
        store_rows(PartialK, where, d_k * scale, inside, D, DIM)
        store_rows(PartialV, where, d_v, inside, D, DIM)
