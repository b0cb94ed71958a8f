"""Forward kernels of block-sparse attention.

Two orders of the same work. By query: one program holds a query's G heads and reads its blocks one after the
other, or one block each where queries are few (decode), which a second kernel combines. By page: one program
holds a block's keys and values and lets the queries that selected it pass by, so that 128 rows fill a matrix
instruction; each query gets one partial result per slot, combined the same way.

Scores are kept in base 2: exp2(scale * log2(e) * q.k). Log-sum-exps of parts are in base 2 too.
"""

# pyright: reportMissingImports=false
import triton.language as tl

from longforge.kernels.triton_pages import LN2, dot, jit, load_rows, store_rows

__all__ = ["combine", "forward_by_page", "forward_by_query"]

_LN2 = tl.constexpr(LN2)


@jit
def forward_by_query(
    Q,  # [N, Hq, D]
    K,  # [S, BLOCK, HKV, D] by its strides
    V,
    Blocks,  # int32 [N, HKV, TOP_K]
    Positions,  # int64 [N]
    Paths,
    Table,  # int32 [P, M], rows table_row apart
    table_row,
    Out,  # [N, HKV, splits, G, D]
    Lse,  # fp32 [N, HKV, splits, G]
    scale_log2,
    to_lse,  # 1 for an Lse in base 2, ln(2) for the natural one
    k_page, k_row, k_head, v_page, v_row, v_head,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,  # slots of one program; TOP_K / SLOTS = splits
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (N, HKV, splits)."""
    SUBS: tl.constexpr = (BLOCK + TILE - 1) // TILE
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    split = tl.program_id(2)
    unit = n * HKV + g
    position = tl.load(Positions + n)
    pages = Table + tl.load(Paths + n) * table_row
    head = tl.arange(0, ROWS)
    q = load_rows(Q, (unit * G + head) * D, head < G, D, DIM)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32)
    for step in range(SLOTS * SUBS):
        block = tl.load(Blocks + unit * TOP_K + split * SLOTS + step // SUBS)
        # No branch for a slot without a block: its loads are masked, and the loop keeps its pipeline.
        seen = tl.where(block < 0, 0, tl.minimum(position - block * BLOCK + 1, BLOCK))
        page = tl.load(pages + tl.maximum(block, 0)).to(tl.int64)
        row = step % SUBS * TILE + tl.arange(0, TILE)
        live = row < seen
        k = load_rows(K, page * k_page + row * k_row + g * k_head, live, D, DIM)
        v = load_rows(V, page * v_page + row * v_row + g * v_head, live, D, DIM)
        scores = tl.where(live[None, :], dot(q, tl.trans(k), PRECISION) * scale_log2, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None] + dot(p.to(v.dtype), v, PRECISION)
        top = higher
    rows = (unit * tl.num_programs(2) + split) * G + head
    out = out * tl.where(total > 0, 1.0 / total, 0.0)[:, None]
    store_rows(Out, rows * D, out, head < G, D, DIM)
    tl.store(Lse + rows, (top + tl.log2(total)) * to_lse, mask=head < G)


@jit
def forward_by_page(
    Q,  # [N, Hq, D]
    K,  # [S, BLOCK, HKV, D] by its strides
    V,
    Entries,
    Seen,
    Deepest,
    PieceSegment,
    PieceFirst,
    PieceCount,
    Parts,  # [N, HKV, top_k, SUBS, G, D]
    PartLse,  # fp32 [N, HKV, top_k, SUBS, G], base 2
    scale_log2,
    top_k,
    k_page, k_row, k_head, v_page, v_row, v_head,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (pieces * SUBS,): TILE tokens of a page stay, the queries of one piece pass by, ROWS // G at a
    time with all their heads."""
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
    which = tl.arange(0, ROWS) // G
    head = tl.arange(0, ROWS) % G
    for at in range(0, count, QUERIES):
        live = (which < QUERIES) & (at + which < count)
        entry = tl.load(Entries + first + at + which, mask=live, other=0).to(tl.int64)
        seen = tl.load(Seen + first + at + which, mask=live, other=0)
        q = load_rows(Q, (entry // top_k * G + head) * D, live, D, DIM)
        scores = dot(q, tl.trans(k), PRECISION) * scale_log2
        scores = tl.where(row[None, :] < seen[:, None], scores, float("-inf"))
        top = tl.max(scores, 1)
        p = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
        total = tl.sum(p, 1)
        out = dot(p.to(v.dtype), v, PRECISION) * tl.where(total > 0, 1.0 / total, 0.0)[:, None]
        rows = (entry * SUBS + sub) * G + head
        store_rows(Parts, rows * D, out, live, D, DIM)
        tl.store(PartLse + rows, top + tl.log2(total), mask=live)


@jit
def combine(
    Parts,  # [N * HKV, parts, G, D]
    PartLse,  # fp32 [N * HKV, parts, G], base 2, -inf where nothing was written
    Out,  # [N * HKV, G, D]
    Lse,  # fp32 [N * HKV, G], natural
    parts,
    G: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    STEP: tl.constexpr,
):
    """The softmax of the whole from the softmaxes of its parts. Grid (N * HKV * G,): a head of a query."""
    row = tl.program_id(0).to(tl.int64)
    first = row // G * parts * G + row % G
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    out = tl.zeros([DIM], tl.float32)
    for at in range(0, parts, STEP):
        part = at + tl.arange(0, STEP)
        rows = first + part * G
        lse = tl.load(PartLse + rows, mask=part < parts, other=float("-inf"))
        higher = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(lse - base)
        shrink = tl.exp2(top - base)
        values = load_rows(Parts, rows * D, lse > float("-inf"), D, DIM).to(tl.float32)
        total = total * shrink + tl.sum(weight, 0)
        out = out * shrink + tl.sum(values * weight[:, None], 0)
        top = higher
    d = tl.arange(0, DIM)
    out = out * tl.where(total > 0, 1.0 / total, 0.0)
    tl.store(Out + row * D + d, out.to(Out.dtype.element_ty), mask=d < D)
    tl.store(Lse + row, (top + tl.log2(total)) * _LN2)
