"""Kernels of grouped experts: a program multiplies a tile of one expert's rows by a part of its weights.

Rows are pairs sorted by expert (order.py). Rows of x and of the output's gradient are gathered by token, and
rows that go back to tokens are written in the order of pairs, so that a token's k rows lie side by side and
are added in the order of its choices.
"""

# pyright: reportMissingImports=false
import triton.language as tl

from longforge.kernels.triton_pages import dot, jit

__all__ = [
    "activate_backward",
    "gate_up_rows",
    "multiply_rows",
    "rank_pairs",
    "sum_outer_products",
]


@jit
def _load(base, rows, columns, live, WIDTH: tl.constexpr, PART: tl.constexpr):
    """[rows, columns] of base + rows + columns, 0 where not live; PART: whether columns may reach WIDTH."""
    mask = live[:, None]
    if PART:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] + columns[None, :], mask=mask, other=0.0)


@jit
def _load_weight(base, a, b, A: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
                 TRANSPOSED: tl.constexpr):  # fmt: skip
    """[STEP, COLUMNS] of a weight [A, B], or of one stored as [B, A]; 0 outside."""
    if TRANSPOSED:
        where = base + b[None, :] * A + a[:, None]
    else:
        where = base + a[:, None] * B + b[None, :]
    if (A % STEP == 0) and (B % COLUMNS == 0):
        return tl.load(where)
    else:
        return tl.load(where, mask=(a < A)[:, None] & (b < B)[None, :], other=0.0)


@jit
def _store(base, rows, columns, value, live, WIDTH: tl.constexpr):
    mask = live[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] + columns[None, :], value.to(base.dtype.element_ty), mask=mask)


@jit
def rank_pairs(
    Ids,  # int64 [T]
    Pair,  # int64 [T]
    TileExpert,  # int32 [T]
    TileFirst,
    TileCount,
    pairs,
    experts,
    ROWS: tl.constexpr,  # most rows of a tile
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """Order and tiles of few pairs in one launch: the row of a pair is the number of pairs before it. A tile
    has the number of its first row; other rows have none. Grid (T / OWN,)."""
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    live = own < pairs
    expert = tl.load(Ids + own, mask=live, other=0)
    before = tl.zeros([OWN], tl.int32)
    same = tl.zeros([OWN], tl.int32)
    earlier = tl.zeros([OWN], tl.int32)
    for at in range(0, pairs, STEP):
        other = at + tl.arange(0, STEP)
        there = (other < pairs)[None, :]
        ids = tl.load(Ids + other, mask=other < pairs, other=0)[None, :]
        equal = there & (ids == expert[:, None])
        before += tl.sum((there & (ids < expert[:, None])).to(tl.int32), 1)
        same += tl.sum(equal.to(tl.int32), 1)
        earlier += tl.sum((equal & (other[None, :] < own[:, None])).to(tl.int32), 1)
    row = before + earlier
    head = (earlier % ROWS == 0) & (expert >= 0) & (expert < experts)
    tl.store(Pair + row, own.to(tl.int64), mask=live)
    tl.store(TileExpert + row, expert.to(tl.int32), mask=live)
    tl.store(TileFirst + row, row, mask=live)
    tl.store(TileCount + row, tl.where(head, tl.minimum(same - earlier, ROWS), 0), mask=live)


@jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@jit
def _clamped(gate, up, limit, OAI: tl.constexpr):
    """Comparisons let NaN through, as torch's clamp does."""
    if OAI:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
    return gate, up


@jit
def gate_up_rows(
    X,  # [N, D], rows x_row apart
    GateUp,  # [E, 2 * INNER, D]
    Pair,  # int64 [T]
    TileExpert,
    TileFirst,
    TileCount,
    Hidden,  # [T, 2 * INNER], what the backward pass needs
    Active,  # [T, INNER]
    alpha,
    limit,
    x_row,
    CHOICES: tl.constexpr,
    D: tl.constexpr,
    INNER: tl.constexpr,
    OAI: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The activation of gate and up of each row. Grid (tiles, INNER / COLUMNS)."""
    tile = tl.program_id(0)
    count = tl.load(TileCount + tile)
    if count > 0:
        lane = tl.arange(0, ROWS)
        live = lane < count
        row = (tl.load(TileFirst + tile) + lane).to(tl.int64)
        token = tl.load(Pair + row, mask=live, other=0) // CHOICES
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        weight = GateUp + tl.load(TileExpert + tile).to(tl.int64) * (2 * INNER * D)
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for at in range(0, D, STEP):
            d = at + tl.arange(0, STEP)
            x = _load(X, token * x_row, d, live, D, D % STEP > 0)
            gate += dot(x, _load_weight(weight, d, column, D, INNER, STEP, COLUMNS, True), PRECISION)
            other = _load_weight(weight + INNER * D, d, column, D, INNER, STEP, COLUMNS, True)
            up += dot(x, other, PRECISION)
        if KEEP:
            _store(Hidden, row * (2 * INNER), column, gate, live, INNER)
            _store(Hidden + INNER, row * (2 * INNER), column, up, live, INNER)
        gate, up = _clamped(gate, up, limit, OAI)
        active = gate * _sigmoid(alpha * gate) * up
        _store(Active, row * INNER, column, active, live, INNER)


@jit
def multiply_rows(
    Rows,  # [T or N, A], rows rows_row apart
    Weight,  # [E, A, B], or [E, B, A] if TRANSPOSED
    Pair,  # int64 [T]
    TileExpert,
    TileFirst,
    TileCount,
    Scales,  # [T] in the order of pairs
    Out,  # [T, B]
    rows_row,
    CHOICES: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BY_TOKEN: tl.constexpr,  # Rows are those of tokens, gathered here
    TO_PAIRS: tl.constexpr,  # Out is in the order of pairs
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each row times its expert's weight. Grid (tiles, B / COLUMNS)."""
    tile = tl.program_id(0)
    count = tl.load(TileCount + tile)
    if count > 0:
        lane = tl.arange(0, ROWS)
        live = lane < count
        row = (tl.load(TileFirst + tile) + lane).to(tl.int64)
        pair = tl.load(Pair + row, mask=live, other=0)
        source = pair // CHOICES if BY_TOKEN else row
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        weight = Weight + tl.load(TileExpert + tile).to(tl.int64) * (A * B)
        out = tl.zeros([ROWS, COLUMNS], tl.float32)
        for at in range(0, A, STEP):
            a = at + tl.arange(0, STEP)
            rows = _load(Rows, source * rows_row, a, live, A, A % STEP > 0)
            out += dot(rows, _load_weight(weight, a, column, A, B, STEP, COLUMNS, TRANSPOSED), PRECISION)
        if SCALED:
            out *= tl.load(Scales + pair, mask=live, other=0.0).to(tl.float32)[:, None]
        target = pair if TO_PAIRS else row
        _store(Out, target * B, column, out, live, B)


@jit
def activate_backward(
    Hidden,  # [T, 2 * INNER]
    DActive,  # [T, INNER]; leaves as weight * active
    Scales,  # [T] in the order of pairs
    Pair,  # int64 [T]
    DHidden,  # [T, 2 * INNER]
    DScales,  # fp32 [T] in the order of pairs
    alpha,
    limit,
    pairs,
    INNER: tl.constexpr,
    OAI: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Grid (T / ROWS,)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = row < pairs
    pair = tl.load(Pair + row, mask=live, other=0)
    scale = tl.load(Scales + pair, mask=live, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for at in range(0, INNER, STEP):
        i = at + tl.arange(0, STEP)
        raw_gate = _load(Hidden, row * (2 * INNER), i, live, INNER, True).to(tl.float32)
        raw_up = _load(Hidden + INNER, row * (2 * INNER), i, live, INNER, True).to(tl.float32)
        d = _load(DActive, row * INNER, i, live, INNER, True).to(tl.float32)
        gate, up = _clamped(raw_gate, raw_up, limit, OAI)
        s = _sigmoid(alpha * gate)
        slope = gate * s
        total += tl.sum(d * slope * up, 1)
        d = d * scale
        # d(g sigmoid(alpha g)) / dg = sigmoid + alpha g sigmoid (1 - sigmoid)
        d_gate = (s + alpha * slope * (1.0 - s)) * up * d
        d_up = slope * d
        if OAI:
            # A value on the limit passes the gradient, as in torch.
            d_gate = tl.where(raw_gate > limit, 0.0, d_gate)
            d_up = tl.where(tl.abs(raw_up) > limit, 0.0, d_up)
        _store(DHidden, row * (2 * INNER), i, d_gate, live, INNER)
        _store(DHidden + INNER, row * (2 * INNER), i, d_up, live, INNER)
        _store(DActive, row * INNER, i, scale * slope * up, live, INNER)
    tl.store(DScales + pair, total, mask=live)


@jit
def sum_outer_products(
    Left,  # [T or N, A], rows left_row apart
    Right,  # [T or N, B]
    Pair,  # int64 [T]
    Starts,  # int32 [E + 1]
    Out,  # [E, A, B]
    left_row,
    right_row,
    CHOICES: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
    RIGHT_BY_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Out_e = the sum over an expert's rows of left outer right; zeros for no rows. Grid (E * A / ROWS,
    B / COLUMNS)."""
    PARTS: tl.constexpr = (A + ROWS - 1) // ROWS
    expert = tl.program_id(0) // PARTS
    a = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(Starts + expert + 1)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(tl.load(Starts + expert), end, STEP):
        row = (at + tl.arange(0, STEP)).to(tl.int64)
        live = row < end
        token = tl.load(Pair + row, mask=live, other=0) // CHOICES
        left_at = token if LEFT_BY_TOKEN else row
        right_at = token if RIGHT_BY_TOKEN else row
        left = _load(Left, left_at * left_row, a, live, A, A % ROWS > 0)
        right = _load(Right, right_at * right_row, b, live, B, B % COLUMNS > 0)
        total += dot(tl.trans(left), right, PRECISION)
    _store(Out + expert.to(tl.int64) * (A * B), a.to(tl.int64) * B, b, total, a < A, B)
