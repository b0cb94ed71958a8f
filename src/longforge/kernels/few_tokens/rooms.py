"""Where a step keeps what is between its phases: one allocation for the most tokens a step may have."""

from typing import Any, NamedTuple

import numpy as np

from longforge.kernels.few_tokens.tile_rows import scratch_for
from longforge.kernels.few_tokens.vectors import borrowed
from longforge.kernels.numba_host import compiled

__all__ = ["Rooms", "borrowed_rooms", "pad", "rooms_for"]


class Rooms(NamedTuple):
    """Arrays for up to T tokens. Rows that are multiplied are padded with zeros to whole vectors.

    The feed-forward's rows are numbered token * (chosen + 1) + choice; the last is the shared expert's.
    """

    x: Any
    """fp32 [T, d], the residual stream."""
    normed: Any
    """fp32 [T, pad(d)]."""
    pair: Any
    """fp32 [T, pad(2 d)], an MTP module's input."""
    projected: Any
    """fp32 [T, (Hq + 2 Hkv) D + (Hkv + 1) Di]: q, k, v, index q, index k."""
    attended: Any
    """fp32 [T, pad(Hq D)]."""
    delta: Any
    """fp32 [T, d], what attention adds."""
    gate_up: Any
    """fp32 [T (chosen + 1), 2 widest]."""
    active: Any
    """fp32 [T (chosen + 1), pad(widest)]."""
    expert_rows: Any
    """fp32 [T (chosen + 1), d]."""
    weights: Any
    """fp32 [T, chosen]."""
    cos: Any
    """fp32 [T, r / 2]."""
    sin: Any
    choices: Any
    """int64 [T, chosen], experts of each token."""
    numbers: Any
    """int64 [T], 0, 1, ..."""
    shared_rows: Any
    """int64 [T], the number of each token's last feed-forward row."""
    experts: Any
    """int64 [L, E + 1] for each layer: the experts that have tokens, ascending; their count at the end.
    A layer has its own, because a thread that comes late counts the units of phases that are long done."""
    starts: Any
    """int64 [L, E + 1], where each of these experts' tokens begin in the two below."""
    of: Any
    """int64 [L, T chosen], tokens by expert."""
    to: Any
    """int64 [L, T chosen], their feed-forward rows."""
    blocks: Any
    """int32 [sparse layers, T, Hkv, K], the selections."""
    halves: Any
    """uint16 [threads, ...], a thread's rows as it multiplies them on tiles, see tile_rows.py."""
    sums: Any
    """fp32 [threads, ...], and what comes of them."""


@compiled()
def borrowed_rooms(r):
    """The same without owners, see `borrowed`."""
    return Rooms(
        borrowed(r.x), borrowed(r.normed), borrowed(r.pair), borrowed(r.projected), borrowed(r.attended),
        borrowed(r.delta), borrowed(r.gate_up), borrowed(r.active), borrowed(r.expert_rows),
        borrowed(r.weights), borrowed(r.cos), borrowed(r.sin), borrowed(r.choices), borrowed(r.numbers),
        borrowed(r.shared_rows), borrowed(r.experts), borrowed(r.starts), borrowed(r.of), borrowed(r.to),
        borrowed(r.blocks), borrowed(r.halves), borrowed(r.sums),
    )  # fmt: skip


def pad(n: int) -> int:
    """The next multiple of a vector's sixteen lanes."""
    return -(-n // 16) * 16


def rooms_for(
    m: np.ndarray, tokens: int, experts: int, layers: int, sparse_layers: int, threads: int
) -> Rooms:
    """m: a MODEL record array of one element."""
    (d, heads, groups, dim, chosen, widest) = (
        int(m[name][0]) for name in ("hidden", "heads", "kv_heads", "head_dim", "chosen", "widest")
    )
    rows, index_dim = tokens * (chosen + 1), int(m["index_dim"][0])
    projected = (heads + 2 * groups) * dim + (groups + 1) * index_dim
    half = int(m["half_rotary"][0])

    inner = max(2 * d, heads * dim, widest) if m["tiles"][0] else 0
    halves, sums = scratch_for(threads, tokens, inner)

    def numbers(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def counts(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int64)

    return Rooms(
        x=numbers(tokens, d),
        normed=numbers(tokens, pad(d)),
        pair=numbers(tokens, pad(2 * d)),
        projected=numbers(tokens, projected),
        attended=numbers(tokens, pad(heads * dim)),
        delta=numbers(tokens, d),
        gate_up=numbers(rows, 2 * widest),
        active=numbers(rows, pad(widest)),
        expert_rows=numbers(rows, d),
        weights=numbers(tokens, chosen),
        cos=numbers(tokens, half),
        sin=numbers(tokens, half),
        choices=counts(tokens, chosen),
        numbers=np.arange(tokens),
        shared_rows=np.arange(tokens) * (chosen + 1) + chosen,
        experts=counts(layers, experts + 1),
        starts=counts(layers, experts + 1),
        of=counts(layers, tokens * chosen),
        to=counts(layers, tokens * chosen),
        blocks=np.full((sparse_layers, tokens, groups, max(1, int(m["top_k"][0]))), -1, np.int32),
        halves=halves,
        sums=sums,
    )
