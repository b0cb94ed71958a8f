"""Kernels of lightning attention.

A span is a run of tokens of one path. `span_sums` gives what each span adds to the state, `carry_spans` turns
these sums into the states before the spans, `span_outputs` walks each span from there, chunk by chunk.
`steps` is the recurrence token by token. With tokens u, w counted inside a chunk of n and S the state before:

    o_u = sum over w <= u of exp(-s (u - w)) (q_u . k_w) v_w  +  exp(-s (u + 1)) q_u S
    S'  = exp(-s n) S  +  sum over w of exp(-s (n - 1 - w)) k_w v_w^T

(Qin et al. 2024, Lightning Attention-2, algorithm 1.) REVERSED reads every path from its end: the same
recurrence on tokens in the other order, which is what the gradients of k and v are. Exponents are never
positive. A program holds COLUMNS columns of a head's state [D, D].
"""

# pyright: reportMissingImports=false
import triton.language as tl

from longforge.kernels.triton_pages import LOG2E, dot, jit, load_rows

__all__ = ["carry_spans", "span_outputs", "span_sums", "steps"]

_LOG2E = tl.constexpr(LOG2E)


@jit
def _decay(rate, tokens):
    """exp(-s * tokens) for rate = s * log2(e); 1 for negative ages, which masks take away."""
    return tl.exp2(-rate * tl.maximum(tokens, 0))


@jit
def _load_columns(base, offsets, live, columns, D: tl.constexpr, DIM: tl.constexpr):
    """[rows, COLUMNS]: these columns of the rows at base + offsets, 0 where not live and from D on."""
    mask = live[:, None]
    if D < DIM:
        mask = mask & (columns < D)[None, :]
    return tl.load(base + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@jit
def _store_columns(base, offsets, value, live, columns, D: tl.constexpr, DIM: tl.constexpr):
    mask = live[:, None]
    if D < DIM:
        mask = mask & (columns < D)[None, :]
    tl.store(base + offsets[:, None] + columns[None, :], value.to(base.dtype.element_ty), mask=mask)


@jit
def _through_state(q, state, PRECISION: tl.constexpr):
    """q [rows, DIM] @ state [DIM, COLUMNS] in fp32."""
    if q.dtype == tl.float16 and PRECISION != "interpreted":
        # A state is a sum over the whole path: half precision's range is too small for it.
        return tl.dot(q.to(tl.float32), state, input_precision="tf32")
    elif q.dtype == tl.float16:
        return dot(q.to(tl.float32), state, PRECISION)
    else:
        return dot(q, state.to(q.dtype), PRECISION)


@jit
def _add_chunk(state, k, v, rate, n, lane, PRECISION: tl.constexpr):
    """The state after a chunk of n tokens; lane is their number."""
    v = (v.to(tl.float32) * _decay(rate, n - 1 - lane)[:, None]).to(v.dtype)
    return state * _decay(rate, n) + dot(tl.trans(k), v, PRECISION)


@jit
def span_sums(
    K,  # [N, H, D] by its strides
    V,
    Slopes,  # [H]
    Paths,  # int64 [N]
    SpanFirst,  # int32 [T]
    SpanCount,
    PathSpan,  # int32 [P + 1]
    Sums,  # fp32 [T, H, D, D]
    k_row, k_head, v_row, v_head,
    H: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REVERSED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What a span adds to the state. Grid (T * H, DIM / COLUMNS). The last span of a path is left out."""
    span = tl.program_id(0) // H
    h = tl.program_id(0) % H
    count = tl.load(SpanCount + span)
    if count > 0:
        first = tl.load(SpanFirst + span)
        path = tl.load(Paths + first)
        if REVERSED:
            last = tl.load(PathSpan + path)
        else:
            last = tl.load(PathSpan + path + 1) - 1
        if span != last:
            rate = tl.load(Slopes + h).to(tl.float32) * _LOG2E
            lane = tl.arange(0, TOKENS)
            columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            total = tl.zeros([DIM, COLUMNS], tl.float32)
            for at in range(0, count, TOKENS):
                n = tl.minimum(count - at, TOKENS)
                if REVERSED:
                    row = (first + count - 1 - at - lane).to(tl.int64)
                else:
                    row = (first + at + lane).to(tl.int64)
                k = load_rows(K + h * k_head, row * k_row, lane < n, D, DIM)
                v = _load_columns(V + h * v_head, row * v_row, lane < n, columns, D, DIM)
                total = _add_chunk(total, k, v, rate, n, lane, PRECISION)
            key = tl.arange(0, DIM)
            base = Sums + (span * H + h).to(tl.int64) * D * D
            _store_columns(base, key * D, total, key < D, columns, D, DIM)


@jit
def carry_spans(
    Sums,  # fp32 [T, H, D, D]
    Starts,  # fp32 [rows, H, D, D] by its strides
    StartRow,  # int64 [P], a row of Starts, -1 for a state of zeros
    Slopes,
    SpanCount,
    PathSpan,
    start_row, start_head,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    REVERSED: tl.constexpr,
    WITH_STARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # Starts hold the value dimension first
):  # fmt: skip
    """Puts the state before each span in place of its sum. Grid (P * H, D * D / WIDTH)."""
    path = tl.program_id(0) // H
    h = tl.program_id(0) % H
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = at < D * D
    rate = tl.load(Slopes + h).to(tl.float32) * _LOG2E
    first = tl.load(PathSpan + path)
    end = tl.load(PathSpan + path + 1)
    carry = tl.zeros([WIDTH], tl.float32)
    if WITH_STARTS:
        source = tl.load(StartRow + path)
        place = at % D * D + at // D if TRANSPOSED else at
        known = at < tl.where(source >= 0, D * D, 0)
        carry = tl.load(Starts + source * start_row + h * start_head + place, mask=known, other=0.0)
    for i in range(first, end):
        span = first + end - 1 - i if REVERSED else i
        where = (span * H + h).to(tl.int64) * D * D + at
        # The sum of a path's last span was never written.
        added = tl.load(Sums + where, mask=at < tl.where(i + 1 < end, D * D, 0), other=0.0)
        tl.store(Sums + where, carry, mask=inside)
        carry = carry * _decay(rate, tl.load(SpanCount + span)) + added


@jit
def span_outputs(
    Q,  # [N, H, D] by its strides
    K,
    V,
    Slopes,
    Positions,  # int64 [N]
    Slots,
    SpanFirst,
    SpanCount,
    Before,  # fp32 [T, H, D, D]
    Out,  # [N, H, D]
    States,  # fp32 [S, H, D, D] by its strides
    tokens,
    page_size,
    chunk,  # tokens of a chunk where states are written, at most TOKENS
    q_row, q_head, k_row, k_head, v_row, v_head, state_row, state_head,
    H: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,  # columns of q and k that are multiplied in one go; DIM or a part of it
    REVERSED: tl.constexpr,
    WITH_STATES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (T * H, DIM / COLUMNS)."""
    span = tl.program_id(0) // H
    h = tl.program_id(0) % H
    count = tl.load(SpanCount + span)
    if count > 0:
        first = tl.load(SpanFirst + span)
        rate = tl.load(Slopes + h).to(tl.float32) * _LOG2E
        lane = tl.arange(0, TOKENS)
        key = tl.arange(0, DIM)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        base = Before + (span * H + h).to(tl.int64) * D * D
        state = _load_columns(base, key * D, key < D, columns, D, DIM)
        step = chunk if WITH_STATES else TOKENS
        # Where states are written the chunks are cut at multiples of positions, so the first may be short.
        begin = 0 - (tl.load(Positions + first) % chunk).to(tl.int32) if WITH_STATES else 0
        for aligned in range(begin, count, step):
            at = tl.maximum(aligned, 0)
            n = tl.minimum(aligned + step, count) - at
            if REVERSED:
                row = (first + count - 1 - at - lane).to(tl.int64)
            else:
                row = (first + at + lane).to(tl.int64)
            live = lane < n
            scores = tl.zeros([TOKENS, TOKENS], tl.float32)
            if PIECE < DIM:
                for d in range(0, DIM, PIECE):
                    piece = d + tl.arange(0, PIECE)
                    q = _load_columns(Q + h * q_head, row * q_row, live, piece, D, DIM)
                    k = _load_columns(K + h * k_head, row * k_row, live, piece, D, DIM)
                    scores += dot(q, tl.trans(k), PRECISION)
            q = load_rows(Q + h * q_head, row * q_row, live, D, DIM)
            k = load_rows(K + h * k_head, row * k_row, live, D, DIM)
            if PIECE == DIM:
                scores = dot(q, tl.trans(k), PRECISION)
            v = _load_columns(V + h * v_head, row * v_row, live, columns, D, DIM)
            age = lane[:, None] - lane[None, :]
            # n is never 0: a rate that depends on it keeps the decays of a chunk from waiting in registers.
            here = tl.where(n > 0, rate, 0.0)
            weights = tl.where(age >= 0, scores * _decay(here, age), 0.0)
            out = _through_state(q, state, PRECISION) * _decay(rate, lane + 1)[:, None]
            out += dot(weights.to(v.dtype), v, PRECISION)
            _store_columns(Out, (row * H + h) * D, out, live, columns, D, DIM)
            state = _add_chunk(state, k, v, rate, n, lane, PRECISION)
            if WITH_STATES:
                last = first + at + n - 1
                page = tl.load(Slots + last) // page_size
                after = tl.load(Slots + last + 1, mask=last + 1 < tokens, other=0) // page_size
                if (last + 1 == tokens) | (page != after):
                    target = States + page * state_row + h * state_head
                    _store_columns(target, key * D, state, key < D, columns, D, DIM)


@jit
def steps(
    Q,  # [N, H, D] by its strides
    K,
    V,
    Slopes,
    Positions,  # int64 [N]
    Paths,
    Slots,
    Table,  # int32 [P, M], rows table_row apart
    Out,  # [N, H, D]
    States,  # fp32 [S, H, D, D] by its strides
    tokens,
    page_size,
    table_row, q_row, q_head, k_row, k_head, v_row, v_head, state_row, state_head,
    H: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEARCH: tl.constexpr,  # tokens looked at in one go when a path looks for its own
    WITH_STATES: tl.constexpr,
):  # fmt: skip
    """The tokens of a path one after the other, in fp32. Grid (P * H, DIM / COLUMNS)."""
    path = tl.program_id(0) // H
    h = tl.program_id(0) % H
    first = tl.zeros([], tl.int32)
    end = tl.zeros([], tl.int32)
    for at in range(0, tokens, SEARCH):
        place = at + tl.arange(0, SEARCH)
        other = tl.load(Paths + place, mask=place < tokens, other=2**31 - 1)
        first += tl.sum((other < path).to(tl.int32), 0)
        end += tl.sum((other <= path).to(tl.int32), 0)
    if first < end:
        keep = _decay(tl.load(Slopes + h).to(tl.float32) * _LOG2E, 1)
        key = tl.arange(0, DIM)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        state = tl.zeros([DIM, COLUMNS], tl.float32)
        if WITH_STATES:
            position = tl.load(Positions + first)
            if position > 0:
                page = tl.load(Table + path * table_row + (position - 1) // page_size).to(tl.int64)
                source = States + page * state_row + h * state_head
                state = _load_columns(source, key * D, key < D, columns, D, DIM)
        for done in range(0, end - first):
            row = (first + done).to(tl.int64)
            q = tl.load(Q + row * q_row + h * q_head + key, mask=key < D, other=0.0).to(tl.float32)
            k = tl.load(K + row * k_row + h * k_head + key, mask=key < D, other=0.0).to(tl.float32)
            inside = columns < D
            v = tl.load(V + row * v_row + h * v_head + columns, mask=inside, other=0.0).to(tl.float32)
            state = state * keep + k[:, None] * v[None, :]
            out = tl.sum(state * q[:, None], 0)
            tl.store(Out + (row * H + h) * D + columns, out.to(Out.dtype.element_ty), mask=inside)
            if WITH_STATES:
                page = tl.load(Slots + row) // page_size
                after = tl.load(Slots + row + 1, mask=row + 1 < tokens, other=0) // page_size
                if (row + 1 == tokens) | (page != after):
                    target = States + page * state_row + h * state_head
                    _store_columns(target, key * D, state, key < D, columns, D, DIM)
