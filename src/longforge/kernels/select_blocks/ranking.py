"""Compiled: cutting queries into chunks, and a small insertion top-k."""

import numpy as np

from longforge.kernels.numba_host import compiled

__all__ = ["chunks_of", "insert_best", "sort_ids"]


@compiled()
def chunks_of(starts, first, last, size):
    """int64 [C, 2]: [from, to) of runs of at most `size` tokens of one path that cover first..last."""
    out = np.empty((last - first, 2), dtype=np.int64)
    count = 0
    for p in range(len(starts) - 1):
        end = min(last, starts[p + 1])
        at = max(first, starts[p])
        while at < end:
            out[count, 0] = at
            at = min(end, at + size)
            out[count, 1] = at
            count += 1
    return out[:count]


@compiled()
def insert_best(scores, values, ids):
    """The len(ids) best of the scores and where they stand, best first; of equal scores the earlier first."""
    room, count = len(ids), len(scores)
    filled = 0
    for b in range(count):
        score = scores[b]
        if filled == room and (room == 0 or not score > values[room - 1]):
            continue
        at = min(filled, room - 1)
        while at > 0 and score > values[at - 1]:
            values[at] = values[at - 1]
            ids[at] = ids[at - 1]
            at -= 1
        values[at] = score
        ids[at] = b
        filled = min(filled + 1, room)


@compiled()
def sort_ids(ids, count):
    for i in range(1, count):
        moved, at = ids[i], i
        while at > 0 and ids[at - 1] > moved:
            ids[at] = ids[at - 1]
            at -= 1
        ids[at] = moved
