"""The kernels of block selection on the GPU. triton_backend.py launches them and says what they compute.

A candidate is one int64: the score's bits in an order-preserving form above, the block id with its bits
turned round below. So "better" is "greater", ties go to the lower block, and no two candidates of a row are
equal. EMPTY + slot marks a slot without one.
"""

# Triton's decorators are typed for compiled code, not for launching it.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

# pyright: reportMissingImports=false
import triton
import triton.language as tl

__all__ = ["merge_candidates", "open_blocks", "scan_blocks"]

EMPTY = tl.constexpr(-(2**63))
LAST_ID = tl.constexpr(2**31 - 1)
KEYS_AS_THEY_ARE = tl.constexpr(0)
FP8 = tl.constexpr(1)
FP8_BY_HAND = tl.constexpr(2)
INT8 = tl.constexpr(3)
STRIP = tl.constexpr(32)
"""Blocks whose bounds are looked at together."""


@triton.jit
def tile_rows(Positions, Paths, tile, tile_tokens, tokens, HKV: tl.constexpr, GROUPS: tl.constexpr,
              ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Of each row of a tile: its packed token, group, whether it exists, the query's own block, its path."""
    row = tl.arange(0, ROWS)
    token = tile * tile_tokens + row // GROUPS
    group = row % GROUPS
    real = (row // GROUPS < tile_tokens) & (token < tokens) & (group < HKV)
    own = tl.load(Positions + token, mask=real, other=0).to(tl.int32) // BLOCK
    path = tl.load(Paths + token, mask=real, other=-1).to(tl.int32)
    return token, group, real, own, path


@triton.jit
def columns(rows, real, first, DIM: tl.constexpr, WIDTH: tl.constexpr, GAPS: tl.constexpr):
    """[rows, WIDTH]: columns from `first` on of the rows at these pointers; 0 where nothing is."""
    d = first + tl.arange(0, WIDTH)
    if GAPS:
        return tl.load(rows[:, None] + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0)
    else:
        return tl.load(rows[:, None] + d[None, :])


@triton.jit
def decoded(codes, dtype: tl.constexpr, CODES: tl.constexpr):
    """Codes as numbers of the queries' dtype: all are exact in it."""
    if CODES == KEYS_AS_THEY_ARE:
        return codes
    elif CODES == FP8:
        return codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif CODES == FP8_BY_HAND:
        # Sign, exponent and mantissa moved to where fp16 has them; its exponent bias is greater by 8.
        bits = codes.to(tl.int16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return (bits.to(tl.float16, bitcast=True) * 256.0).to(dtype)
    else:
        # By way of fp32: the interpreter has no other way from integers to bf16.
        return codes.to(tl.float32).to(dtype)


@triton.jit
def product(q, k, scores, CHUNKED: tl.constexpr, INTERPRETED: tl.constexpr):
    """q [rows, d] @ k [keys, d]^T in fp32, added to scores."""
    if INTERPRETED:
        # Triton's interpreter multiplies the bit patterns of bf16 tiles.
        return tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), scores, input_precision="ieee")
    elif CHUNKED:
        return tl.dot(q, tl.trans(k), scores, input_precision="ieee")
    else:
        return tl.dot(q, tl.trans(k))


@triton.jit
def block_maxima(q, q_rows, real, Keys, Scales, page, k_page, s_page, K_ROW: tl.constexpr,
                 DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
                 KEYS: tl.constexpr, CHUNK: tl.constexpr, CODES: tl.constexpr,
                 INTERPRETED: tl.constexpr):  # fmt: skip
    """fp32 [ROWS]: each row's greatest score over the keys of a page.

    This is the only place where scores are computed, so they are the same for whoever asks. q [ROWS, DIMS] is
    used where one product covers all columns, the pointers q_rows [ROWS] where it takes several.
    """
    key = tl.arange(0, KEYS)
    k_rows = Keys + page.to(tl.int64) * k_page + key * K_ROW
    scores = tl.zeros([ROWS, KEYS], tl.float32)
    gaps: tl.constexpr = DIM < DIMS or BLOCK < KEYS
    if CHUNK == DIMS:
        k = decoded(columns(k_rows, key < BLOCK, 0, DIM, DIMS, gaps), q.dtype, CODES)
        scores = product(q, k, scores, False, INTERPRETED)
    else:
        for first in tl.static_range(0, DIMS, CHUNK):
            part = columns(q_rows, real, first, DIM, CHUNK, True)
            k = decoded(columns(k_rows, key < BLOCK, first, DIM, CHUNK, gaps), part.dtype, CODES)
            scores = product(part, k, scores, True, INTERPRETED)
    if CODES != KEYS_AS_THEY_ARE:
        scale = tl.load(Scales + page.to(tl.int64) * s_page + key, mask=key < BLOCK, other=0.0)
        scores = scores * scale[None, :]
    if BLOCK < KEYS:
        scores = tl.where((key < BLOCK)[None, :], scores, float("-inf"))
    return tl.max(scores, axis=1)


@triton.jit
def candidate(score, block):
    """score fp32 [ROWS], block id -> int64 [ROWS]; EMPTY where the score is -inf."""
    score = tl.where(score == 0.0, 0.0, score)  # 0 and -0 tie
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = (ordered.to(tl.int64) << 32) | (block ^ LAST_ID).to(tl.int64)
    return tl.where(score > float("-inf"), packed, EMPTY)


@triton.jit
def score_of(packed):
    """The score of a candidate; -inf for EMPTY."""
    ordered = (packed >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return tl.where(ordered == -(2**31), float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def no_candidates(ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """int64 [ROWS, SLOTS], all different."""
    return tl.zeros([ROWS, SLOTS], tl.int64) + (tl.arange(0, SLOTS).to(tl.int64) + EMPTY)[None, :]


@triton.jit
def keep(best, least, score, block):
    """A better candidate takes the place of the least: best [ROWS, SLOTS], least = its row minimum."""
    packed = candidate(score, block)
    if tl.max((packed > least).to(tl.int32), axis=0) > 0:
        taken = (best == least[:, None]) & (packed > least)[:, None]
        best = tl.where(taken, packed[:, None], best)
        least = tl.min(best, axis=1)
    return best, least


@triton.jit
def norms(q):
    """q [ROWS, DIMS] -> fp32 [ROWS]."""
    x = q.to(tl.float32)
    return tl.sqrt(tl.sum(x * x, axis=1))


@triton.jit(do_not_specialize=["tokens", "tile_tokens"])
def scan_blocks(
    Q,  # [N, Hkv, Di]
    Keys,  # [S, Bk, Di]
    Scales,  # fp32 [S, Bk], with codes
    Radius,  # fp32 [S], with BOUNDS
    Positions,  # int64 [N]
    Paths,  # int64 [N]
    Table,  # int32 [P, M]
    Maxima,  # out with BOUNDS: fp32 [M, N * Hkv]
    Best,  # out: int64 [splits, N * Hkv, SLOTS]
    tokens,
    tile_tokens,
    q_token,
    q_group,
    k_page,
    s_page,
    table_row,
    K_ROW: tl.constexpr,
    HKV: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    CODES: tl.constexpr,
    BOUNDS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The best candidates of one tile of queries among one split of the blocks before their own.

    With BOUNDS candidates are ranked by the lower bounds of their scores, and the maxima are kept.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # later tokens have more blocks: longest first
    token, group, real, own, path = tile_rows(
        Positions, Paths, tile, tile_tokens, tokens, HKV, GROUPS, ROWS, BLOCK
    )
    q_rows = Q + token.to(tl.int64) * q_token + group * q_group
    q = columns(q_rows, real, 0, DIM, DIMS, True)
    if BOUNDS:
        norm = norms(q)
    out = token.to(tl.int64) * HKV + group
    best = no_candidates(ROWS, SLOTS)
    least = tl.min(best, axis=1)
    # A candidate is kept one step after it was found: in the same step the compilers for sm_100 (Triton 3.6
    # and 3.7) fail on a condition that comes from a product's maximum.
    last_score = tl.full([ROWS], float("-inf"), tl.float32)
    last_block = 0
    at = tile * tile_tokens
    end = tl.minimum(at + tile_tokens, tokens)
    while at < end:  # a tile may hold tokens of several paths
        this = tl.load(Paths + at).to(tl.int32)
        mine = real & (path == this)
        before = tl.where(mine, own, 0)
        blocks = tl.max(before, axis=0)
        share = tl.cdiv(blocks, tl.num_programs(1))
        first = tl.program_id(1) * share
        for step in range(tl.minimum(share, blocks - first)):
            block = first + step
            best, least = keep(best, least, last_score, last_block)
            page = tl.load(Table + this.to(tl.int64) * table_row + block)
            score = block_maxima(q, q_rows, real, Keys, Scales, page, k_page, s_page,
                                 K_ROW, DIM, DIMS, BLOCK, ROWS, KEYS, CHUNK, CODES, INTERPRETED)  # fmt: skip
            visible = block < before  # such blocks are wholly visible
            if BOUNDS:
                tl.store(Maxima + block.to(tl.int64) * (tokens * HKV) + out, score, mask=visible)
                score = score - tl.load(Radius + page) * norm
            last_score = tl.where(visible, score, float("-inf"))
            last_block = block
        at += tl.sum((mine & (group == 0)).to(tl.int32), axis=0)
    best, least = keep(best, least, last_score, last_block)
    place = (tl.program_id(1).to(tl.int64) * tokens * HKV + out) * SLOTS
    tl.store(Best + place[:, None] + tl.arange(0, SLOTS)[None, :], best, mask=real[:, None])


@triton.jit(do_not_specialize=["tokens", "tile_tokens"])
def open_blocks(
    Q,  # [N, Hkv, Di]
    Keys,  # [S, Bk, Di], full precision
    Radius,  # fp32 [S]
    Positions,  # int64 [N]
    Paths,  # int64 [N]
    Table,  # int32 [P, M]
    Maxima,  # fp32 [M, N * Hkv], over low-precision keys
    Lower,  # int64 [N * Hkv, SLOTS]: candidates by lower bound, best first
    Best,  # out: int64 [splits, N * Hkv, SLOTS]
    Opened,  # out: int32 [splits, N * Hkv]
    tokens,
    tile_tokens,
    q_token,
    q_group,
    k_page,
    table_row,
    WANTED: tl.constexpr,
    K_ROW: tl.constexpr,
    HKV: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """As scan_blocks, over the keys themselves, reading only blocks that can be among the WANTED best.

    A block is opened where its upper bound reaches the WANTED-th greatest lower bound of a row.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    token, group, real, own, path = tile_rows(
        Positions, Paths, tile, tile_tokens, tokens, HKV, GROUPS, ROWS, BLOCK
    )
    q_rows = Q + token.to(tl.int64) * q_token + group * q_group
    q = columns(q_rows, real, 0, DIM, DIMS, True)
    norm = norms(q)
    out = token.to(tl.int64) * HKV + group
    bar = score_of(tl.load(Lower + out * SLOTS + (WANTED - 1), mask=real, other=0))
    best = no_candidates(ROWS, SLOTS)
    least = tl.min(best, axis=1)
    # A candidate is kept one step after it was found: in the same step the compilers for sm_100 (Triton 3.6
    # and 3.7) fail on a condition that comes from a product's maximum.
    last_score = tl.full([ROWS], float("-inf"), tl.float32)
    last_block = 0
    opened = tl.zeros([ROWS], tl.int32)
    at = tile * tile_tokens
    end = tl.minimum(at + tile_tokens, tokens)
    while at < end:
        this = tl.load(Paths + at).to(tl.int32)
        mine = real & (path == this)
        before = tl.where(mine, own, 0)
        blocks = tl.max(before, axis=0)
        share = tl.cdiv(blocks, tl.num_programs(1))
        first = tl.program_id(1) * share
        stop = tl.minimum(first + share, blocks)
        row_of_table = Table + this.to(tl.int64) * table_row
        for strip in range(first, stop, STRIP):
            block = strip + tl.arange(0, STRIP)
            page = tl.load(row_of_table + block, mask=block < stop, other=0)
            radius = tl.load(Radius + page, mask=block < stop, other=0.0)
            visible = (block[None, :] < before[:, None]) & (block < stop)[None, :]
            place = block.to(tl.int64)[None, :] * (tokens * HKV) + out[:, None]
            upper = (
                tl.load(Maxima + place, mask=visible, other=float("-inf")) + norm[:, None] * radius[None, :]
            )
            reaches = visible & (upper >= bar[:, None])
            opened += tl.sum(reaches.to(tl.int32), axis=1)
            wanted = tl.max(reaches.to(tl.int32), axis=0) > 0
            current = tl.min(tl.where(wanted, block, LAST_ID), axis=0)
            while current < stop:
                best, least = keep(best, least, last_score, last_block)
                score = block_maxima(q, q_rows, real, Keys, Keys, tl.load(row_of_table + current),
                                     k_page, 0, K_ROW, DIM, DIMS, BLOCK, ROWS, KEYS, CHUNK,
                                     KEYS_AS_THEY_ARE, INTERPRETED)  # fmt: skip
                last_score = tl.where(current < before, score, float("-inf"))
                last_block = current
                current = tl.min(tl.where(wanted & (block > current), block, LAST_ID), axis=0)
        at += tl.sum((mine & (group == 0)).to(tl.int32), axis=0)
    best, least = keep(best, least, last_score, last_block)
    place = tl.program_id(1).to(tl.int64) * tokens * HKV + out
    tl.store(Best + place[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :], best, mask=real[:, None])
    tl.store(Opened + place, opened, mask=real)


@triton.jit(do_not_specialize=["rows", "lists"])
def merge_candidates(
    Lists,  # int64 [lists, rows, SLOTS]
    Positions,  # int64 [N], if FINAL
    Out,  # if FINAL int32 [rows, K], else int64 [programs, rows, SLOTS]
    rows,
    lists,
    HKV: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FAN: tl.constexpr,
    SLOTS: tl.constexpr,
    WANTED: tl.constexpr,
    CHOSEN: tl.constexpr,
    FINAL: tl.constexpr,
):
    """Per row the WANTED best of FAN lists, best first; FINAL: with the own block, ids ascending, then -1.

    One program: ROWS rows. WANTED = K - 1; CHOSEN is K padded to a power of two.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    at = tl.arange(0, FAN * SLOTS)
    member = tl.program_id(1) * FAN + at // SLOTS
    place = (member.to(tl.int64)[None, :] * rows + row[:, None]) * SLOTS + (at % SLOTS)[None, :]
    left = tl.load(Lists + place, mask=real[:, None] & (member < lists)[None, :], other=EMPTY)
    slot = tl.arange(0, CHOSEN)
    chosen = tl.full([ROWS, CHOSEN], LAST_ID, tl.int32)
    out = (tl.program_id(1).to(tl.int64) * rows + row) * SLOTS
    for rank in range(WANTED):
        top = tl.max(left, axis=1)
        left = tl.where(left == top[:, None], EMPTY, left)
        if FINAL:
            found = tl.where((top >> 32) == -(2**31), LAST_ID, (top & LAST_ID).to(tl.int32) ^ LAST_ID)
            chosen = tl.where((slot == rank)[None, :], found[:, None], chosen)
        else:
            tl.store(Out + out + rank, top, mask=real)
    if FINAL:
        own = tl.load(Positions + row // HKV, mask=real, other=0).to(tl.int32) // BLOCK
        chosen = tl.where((slot == WANTED)[None, :], own[:, None], chosen)
        before = tl.sum((chosen[:, None, :] < chosen[:, :, None]).to(tl.int32), axis=2)
        count = tl.sum((chosen < LAST_ID).to(tl.int32), axis=1)
        base = Out + row[:, None] * (WANTED + 1)
        tl.store(base + before, chosen, mask=real[:, None] & (chosen < LAST_ID))
        none = real[:, None] & (slot[None, :] >= count[:, None]) & (slot <= WANTED)[None, :]
        tl.store(base + slot[None, :], tl.full([ROWS, CHOSEN], -1, tl.int32), mask=none)
    else:
        rest = tl.arange(0, SLOTS)
        none = real[:, None] & (rest >= WANTED)[None, :]
        tl.store(Out + out[:, None] + rest[None, :], tl.full([ROWS, SLOTS], EMPTY, tl.int64), mask=none)
