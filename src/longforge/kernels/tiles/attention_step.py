"""Compiled: one block of keys and values against the queries that see it, the step of attention.py."""

import numpy as np

from longforge.kernels.numba_host import compiled
from longforge.kernels.tiles.forms import narrow, panel_of_columns, panels_of_known_rows
from longforge.kernels.tiles.product import tile_product
from longforge.kernels.tiles.softmax import multiply_rows, online_softmax
from longforge.kernels.tiles.vectors import COLUMNS, STEP
from longforge.kernels.vector_code import transpose

__all__ = ["LOG2_E", "finish", "fresh_sums", "scratch_of", "transposed_block", "visit_block"]

f32 = np.float32
LOG2_E = 1.4426950408889634


@compiled(error_model="numpy")
def fresh_sums(count, dim):
    """(sums fp32 [count, D, 16] of 0, states fp32 [count, 3, 16] for online_softmax), flat."""
    state = np.zeros(count * 3 * COLUMNS, np.float32)
    for i in range(count):
        state[i * 3 * COLUMNS : (i * 3 + 1) * COLUMNS] = -np.inf
    return np.zeros(count * dim * COLUMNS, np.float32), state


@compiled(error_model="numpy")
def scratch_of(dim, block_size):
    """What visit_block works in: two queries, their scores and shares, values transposed, and pairs."""
    size, block = block_size * COLUMNS, dim * block_size // 2
    return (
        np.empty(dim * COLUMNS, np.uint32),
        np.empty(2 * size, np.float32),
        np.empty(size, np.uint32),
        np.empty(block, np.uint32),
        np.empty(block, np.uint32),
    )


@compiled(error_model="numpy")
def visit_block(
    q, k, v, positions, b, page, g, queries, known, scale, begin, slots, slot, sums, state, scratch
):
    """Takes logical block b, in this page, into the sums and states of all queries; those of query i stand at
    place (i - begin) * slots + slot. known: rows of the page that may be read."""
    dim, block_size, groups = q.shape[3], k.shape[1], k.shape[2]
    flat_q, flat_k = q.reshape(-1).view(np.uint32), k.reshape(-1)
    heads, scores, shares, values, pairs = scratch
    panel, tile, size, mine = dim // 2 * COLUMNS, dim * COLUMNS, block_size * COLUMNS, 3 * COLUMNS
    transposed_block(values, pairs, v, page, g, known)
    key = (page * block_size * groups + g) * dim
    for at in range(0, len(queries), 2):
        both = min(2, len(queries) - at)
        i, j = queries[at], queries[at + both - 1]
        for x in range(both):
            first = (queries[at + x] * groups + g) * panel
            panel_of_columns(heads, x * panel, flat_q, first, dim // 2, dim)
        # Positions ascend inside a path, but two paths may share the page.
        furthest = max(positions[i], positions[j])
        steps = (min(block_size, furthest - b * block_size + 1) + STEP - 1) // STEP
        tile_product(
            scores, 0, COLUMNS, size, flat_k, key, groups * dim, heads, 0, panel, 2 * steps, both,
            dim // STEP, False,
        )  # fmt: skip
        place, step = (i - begin) * slots + slot, (j - i) * slots
        for x in range(both):
            seen = min(block_size, positions[queries[at + x]] - b * block_size + 1)
            own = place + x * step
            if online_softmax(
                scores, x * size, seen, steps * STEP, scale, state, own * mine, shares, x * size // 2
            ):
                multiply_rows(sums, own * tile, dim, state, own * mine + 2 * COLUMNS)
        tile_product(
            sums, place * tile, COLUMNS, step * tile, values, 0, block_size // 2, shares, 0, size // 2,
            dim // COLUMNS, both, steps, True,
        )  # fmt: skip


@compiled(error_model="numpy")
def transposed_block(out, pairs, pages, page, g, known):
    """out, bf16 [D, Bk] in uint32: pages[page, :, g] transposed, zeros from row `known` on. pairs: scratch
    of the same size."""
    _, block_size, groups, dim = pages.shape
    half, first = block_size // 2, (page * block_size * groups + g) * dim
    panels_of_known_rows(
        pairs, 0, half * COLUMNS, pages.reshape(-1), first, groups * dim, block_size, known, dim
    )
    for j in range(dim // COLUMNS):
        transpose(out, j * COLUMNS * half, half, pairs, j * half * COLUMNS, COLUMNS, half, COLUMNS)


@compiled(error_model="numpy")
def finish(sums, state, g, groups, begin, end, slots, slot, out, lse):
    """out = sums over the state's sum, heads first; lse; places as in visit_block."""
    _, heads, dim = out.shape
    per_group = heads // groups
    flat_out = out.reshape(-1)
    rows = np.empty(COLUMNS * dim, np.float32)
    for i in range(begin, end):
        place = (i - begin) * slots + slot
        mine = place * 3 * COLUMNS
        for c in range(COLUMNS):
            state[mine + 2 * COLUMNS + c] = np.float32(1) / state[mine + COLUMNS + c]
        multiply_rows(sums, place * dim * COLUMNS, dim, state, mine + 2 * COLUMNS)
        transpose(rows, 0, dim, sums, place * dim * COLUMNS, COLUMNS, dim, COLUMNS)
        for h in range(per_group):
            narrow(flat_out, (i * heads + g * per_group + h) * dim, rows, h * dim, dim)
            lse[i, g * per_group + h] = state[mine + h] / f32(LOG2_E) + np.log(state[mine + COLUMNS + h])
