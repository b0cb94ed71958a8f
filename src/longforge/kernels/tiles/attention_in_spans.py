"""Attention of few queries over their whole prefix, as in decode: bound by reading keys and values once.

A unit of work is (a few queries of one path, SPAN blocks) with all groups, so that memory is read in order
and one query over a long path fills all threads. The units' sums are merged in the order of the blocks, by
their greatest scores (Milakov and Gimelshein 2018, section 3.1).
"""

import numpy as np
from numba import prange

from longforge.kernels.numba_host import compiled, path_starts
from longforge.kernels.tiles.attention_step import finish, fresh_sums, scratch_of, visit_block
from longforge.kernels.tiles.product import begin_tiles, end_tiles
from longforge.kernels.tiles.vectors import COLUMNS

__all__ = ["attend_in_spans", "of_few_queries"]

FEW = 8
"""Most queries of a path."""
SPAN = 32
"""Blocks of a unit."""
ROOM = 1 << 26
"""Numbers of partial sums held at once (256 MiB), or those of one path if they are more."""


def of_few_queries(paths: np.ndarray) -> np.ndarray:
    """bool [N]: whether the query's path has at most FEW of them; paths ascending."""
    counts = np.diff(path_starts(paths))
    return np.repeat(counts <= FEW, counts)


def attend_in_spans(settings, q, k, v, positions, paths, table, scale, out, lse) -> None:
    """q uint16 [N, Hkv, 16, D], k and v uint16 [S, Bk, Hkv, D] -> out uint16 [N, Hq, D], lse fp32 [N, Hq]."""
    starts = path_starts(paths)
    begins, ends = starts[:-1], starts[1:]
    spans = positions[ends - 1] // k.shape[1] // SPAN + 1
    held = np.cumsum(spans * (ends - begins) * (q.size // len(q)))
    first = 0
    while first < len(begins):
        before = held[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(held, before + ROOM, side="right")))
        units = _units(begins[first:last], ends[first:last], spans[first:last])
        firsts = np.concatenate(([0], np.cumsum(spans[first:last])))
        places = int(units[-1, 3] + units[-1, 1] - units[-1, 0])
        _spans(settings, q, k, v, positions, paths, table, scale, units, firsts, places, out, lse)
        first = last


def _units(begins: np.ndarray, ends: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """int64 [units, 4]: first query, end, first block, place of its results."""
    units = np.empty((int(spans.sum()), 4), np.int64)
    units[:, 0], units[:, 1] = np.repeat(begins, spans), np.repeat(ends, spans)
    units[:, 2] = SPAN * (np.arange(len(units)) - np.repeat(np.cumsum(spans) - spans, spans))
    counts = units[:, 1] - units[:, 0]
    units[:, 3] = np.cumsum(counts) - counts
    return units


@compiled(parallel=True, error_model="numpy")
def _spans(settings, q, k, v, positions, paths, table, scale, units, firsts, places, out, lse):
    groups, dim = k.shape[2], q.shape[3]
    sums, state = fresh_sums(places * groups, dim)
    for u in prange(len(units)):
        _unit(settings, q, k, v, positions, paths, table, scale, units[u], sums, state)
    for r in prange(len(firsts) - 1):
        _merge(units[firsts[r] : firsts[r + 1]], groups, dim, sums, state, out, lse)


@compiled(error_model="numpy")
def _unit(settings, q, k, v, positions, paths, table, scale, unit, sums, state):
    begin, end, first, place = unit
    block_size, groups, tile = k.shape[1], k.shape[2], q.shape[3] * COLUMNS
    scratch, queries = scratch_of(q.shape[3], block_size), np.arange(begin, end)
    mine = sums[place * groups * tile :]
    states = state[place * groups * 3 * COLUMNS :]
    begin_tiles(settings)
    for b in range(first, min(first + SPAN, positions[end - 1] // block_size + 1)):
        page = np.int64(table[paths[begin], b])
        known = min(block_size, positions[end - 1] - b * block_size + 1)
        at = 0  # positions ascend: the later queries see the block
        while positions[begin + at] // block_size < b:
            at += 1
        for g in range(groups):
            visit_block(
                q, k, v, positions, np.int64(b), page, np.int64(g), queries[at:], known, scale, begin, groups,
                np.int64(g), mine, states, scratch,
            )  # fmt: skip
    end_tiles()


@compiled(error_model="numpy")
def _merge(units, groups, dim, sums, state, out, lse):
    """The first unit's sums and states become those of all units of a run; then the outputs."""
    begin, end, place = units[0, 0], units[0, 1], units[0, 3]
    count, size = (end - begin) * groups, 3 * COLUMNS
    for s in range(count):
        to, total = (place * groups + s) * size, (place * groups + s) * dim * COLUMNS
        for u in range(1, len(units)):
            of, other = (units[u, 3] * groups + s) * size, (units[u, 3] * groups + s) * dim * COLUMNS
            for c in range(COLUMNS):
                greatest = max(state[to + c], state[of + c])
                mine, theirs = np.exp2(state[to + c] - greatest), np.exp2(state[of + c] - greatest)
                state[to + c] = greatest
                state[to + COLUMNS + c] = state[to + COLUMNS + c] * mine + state[of + COLUMNS + c] * theirs
                state[to + 2 * COLUMNS + c], state[of + 2 * COLUMNS + c] = mine, theirs
            for d in range(dim):
                for c in range(COLUMNS):
                    at = d * COLUMNS + c
                    older = sums[total + at] * state[to + 2 * COLUMNS + c]
                    sums[total + at] = older + sums[other + at] * state[of + 2 * COLUMNS + c]
    mine, states = sums[place * groups * dim * COLUMNS :], state[place * groups * size :]
    for g in range(groups):
        finish(mine, states, np.int64(g), groups, begin, end, groups, np.int64(g), out, lse)
