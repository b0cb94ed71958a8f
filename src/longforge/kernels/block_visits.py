"""Compiled: the selection turned round, for the numba backends: which queries chose each block."""

import numpy as np
import torch
from torch import Tensor

from longforge.kernels.numba_host import compiled

__all__ = ["block_visits", "chosen_blocks", "written"]


@compiled(error_model="numpy")
def block_visits(blocks, positions, block_size, g, begin, end, most):
    """Of queries begin..end - 1: (starts int64 [most + 1], queries int64 [starts[most]]).

    blocks int32 [N, Hkv, K], -1 for none; or with K = 0, for every block up to the query's own. most: logical
    blocks there may be. The queries that chose block b for group g are queries[starts[b]:starts[b + 1]],
    ascending: so those of one path, and of paths that share the page, are neighbours.
    """
    starts, every = np.zeros(most + 1, np.int64), blocks.shape[2] == 0
    for i in range(begin, end):
        if every:
            starts[1 : positions[i] // block_size + 2] += 1
        else:
            for b in blocks[i, g]:
                if b >= 0:
                    starts[b + 1] += 1
    for b in range(most):
        starts[b + 1] += starts[b]
    queries, filled = np.empty(starts[most], np.int64), starts[:most].copy()
    for i in range(begin, end):
        if every:
            for b in range(positions[i] // block_size + 1):
                queries[filled[b]] = i
                filled[b] += 1
        else:
            for b in blocks[i, g]:
                if b >= 0:
                    queries[filled[b]] = i
                    filled[b] += 1
    return starts, queries


def chosen_blocks(blocks: Tensor | None) -> np.ndarray:
    """int32 [N, Hkv, K] for block_visits; None stands for every block."""
    return np.empty((0, 0, 0), np.int32) if blocks is None else blocks.to(torch.int32).contiguous().numpy()


@compiled(error_model="numpy")
def written(queries, at, end, positions, paths, table, b, block_size):
    """(place after the last of queries[at:end] whose path has the page of the first of them as block b, rows
    of that page that they see); later rows may hold anything."""
    page, known = table[paths[queries[at]], b], np.int64(0)
    while at < end and table[paths[queries[at]], b] == page:
        known = max(known, positions[queries[at]] - b * block_size + 1)
        at += 1
    return at, min(known, block_size)
