"""Where a step keeps what is between its phases: allocated once, for the most tokens that a pass may have."""

from typing import Any, NamedTuple

import numpy as np

from longforge.kernels.few_tokens.tile_rows import scratch_for
from longforge.kernels.few_tokens.vectors import flat_view
from longforge.kernels.numba_host import compiled

__all__ = ["Rooms", "pad", "places_of", "rooms_at", "rooms_for"]

F32, I64 = np.empty(0, np.float32), np.empty(0, np.int64)
I32, U16 = np.empty(0, np.int32), np.empty(0, np.uint16)
"""Element types for flat_view."""


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


def places_of(rooms: Rooms) -> np.ndarray:
    """int64 [fields, 5] for `rooms_at`: where each array is, and its sizes. Twenty arrays as arguments would
    cost a step more than all its others."""
    return np.array([[x.ctypes.data, *x.shape, *[1] * (4 - x.ndim)] for x in rooms])


@compiled()
def rooms_at(p):
    """The rooms of these places, without owners (see `borrowed`): the caller keeps them alive."""
    return Rooms(
        _table(p, 0, F32), _table(p, 1, F32), _table(p, 2, F32), _table(p, 3, F32), _table(p, 4, F32),
        _table(p, 5, F32), _table(p, 6, F32), _table(p, 7, F32), _table(p, 8, F32), _table(p, 9, F32),
        _table(p, 10, F32), _table(p, 11, F32), _table(p, 12, I64), _line(p, 13), _line(p, 14),
        _table(p, 15, I64), _table(p, 16, I64), _table(p, 17, I64), _table(p, 18, I64),
        flat_view(p[19, 0], I32)[: p[19, 1] * p[19, 2] * p[19, 3] * p[19, 4]].reshape(
            p[19, 1], p[19, 2], p[19, 3], p[19, 4]
        ),
        _table(p, 20, U16), _table(p, 21, F32),
    )  # fmt: skip


@compiled()
def _table(p, i, kind):
    return flat_view(p[i, 0], kind)[: p[i, 1] * p[i, 2]].reshape(p[i, 1], p[i, 2])


@compiled()
def _line(p, i):
    return flat_view(p[i, 0], I64)[: p[i, 1]]


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
