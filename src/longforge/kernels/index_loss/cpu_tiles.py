"""The index loss on the CPU in bf16, on tiles: the value and its gradients by the closed form, as in cpu.py.

Key/value-outer as ../tiles/attention.py, in two passes over a segment's blocks: log-sum-exps of the
teacher's heads and of the student, then both distributions again, their divergence and the gradients. Here
keys are the columns of all products, so that the mean over the teacher's heads is a sum of rows.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from longforge.kernels.block_visits import block_visits, chosen_blocks, written
from longforge.kernels.layout import PackedLayout
from longforge.kernels.numba_host import (
    compiled,
    layout_arrays,
    parallel_region,
    path_starts,
    raw_array,
    shares_pages,
)
from longforge.kernels.tiles.attention import columns_of, pairs_per_query
from longforge.kernels.tiles.attention import fits as attention_fits
from longforge.kernels.tiles.attention_step import LOG2_E
from longforge.kernels.tiles.forms import panel_of_columns, panels_of_known_rows, panels_of_rows
from longforge.kernels.tiles.product import TILE_SETTINGS, begin_tiles, end_tiles, tile_product
from longforge.kernels.tiles.softmax import add_row, divergence_step, mean_of_powers
from longforge.kernels.tiles.vectors import COLUMNS, STEP
from longforge.kernels.vector_code import transpose

__all__ = ["divergences", "fits"]

SEGMENT = 512
"""Queries that a block is read for at once."""
BATCH = STEP
"""Queries whose index scores one product computes, and whose gradients one product adds."""


def fits(index_q: Tensor, q: Tensor, k_pages: Tensor) -> bool:
    """Whether tiles can compute it: bf16, whole steps, and heads of a group that fill some of a tile."""
    return index_q.shape[2] % STEP == 0 and attention_fits(q, k_pages)


def divergences(
    index_q: Tensor,
    index_k_pages: Tensor,
    q: Tensor,
    k_pages: Tensor,
    blocks: Tensor | None,
    layout: PackedLayout,
    scale: float,
    index_scale: float,
    weights: Tensor,
    lse: Tensor | None,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d_index_q, d_index_k) in fp32; gradients are empty unless wanted."""
    groups, (n, heads, _) = k_pages.shape[2], q.shape
    positions, paths, table = layout_arrays(layout)
    divisor = float(weights.sum(dtype=torch.float64)) * groups
    each = (weights / (divisor if divisor > 0 else 1)).numpy()
    d_index_q = np.zeros(index_q.shape if wanted else (0, 0, 0), np.float32)
    d_index_k = np.zeros((groups if wanted else 0, *index_k_pages.shape), np.float32)
    values = np.zeros((n, groups), np.float32)
    ids = chosen_blocks(blocks)
    # In base 2; none where the heads' sums have yet to be computed.
    sums = np.empty((0, 0), np.float32) if lse is None else (lse.float() * LOG2_E).contiguous().numpy()
    starts = np.array([0, len(paths)]) if shares_pages(table) else path_starts(paths)
    with parallel_region(q.numel() * pairs_per_query(blocks, layout)):
        _all_units(
            TILE_SETTINGS, raw_array(index_q), raw_array(index_k_pages), columns_of(q, groups),
            raw_array(k_pages), heads // groups, ids, positions, paths, table, np.float32(scale * LOG2_E),
            np.float32(index_scale * LOG2_E), each, sums, starts, values, d_index_q, d_index_k,
        )  # fmt: skip
    loss = (values.astype(np.float64) * each[:, None]).sum() / LOG2_E
    d_k = torch.from_numpy(d_index_k).sum(0) if wanted else torch.empty(0)
    return torch.tensor(loss, dtype=weights.dtype), torch.from_numpy(d_index_q), d_k


@compiled(parallel=True, error_model="numpy")
def _all_units(
    settings, index_q, index_k, q, k, per_group, blocks, positions, paths, table, scale, index_scale, weights,
    head_sums, starts, values, d_index_q, d_index_k,
):  # fmt: skip
    groups = k.shape[2]
    for unit in prange((len(starts) - 1) * groups):
        g, begin, end = unit % groups, starts[unit // groups], starts[unit // groups + 1]
        for first in range(begin, end, SEGMENT):
            _segment(
                settings, index_q, index_k, q, k, per_group, blocks, positions, paths, table, scale,
                index_scale, weights, head_sums, np.int64(g), np.int64(first),
                np.int64(min(end, first + SEGMENT)), values, d_index_q, d_index_k,
            )  # fmt: skip


@compiled(error_model="numpy")
def _segment(
    settings, index_q, index_k, q, k, per_group, blocks, positions, paths, table, scale, index_scale, weights,
    head_sums, g, begin, end, values, d_index_q, d_index_k,
):  # fmt: skip
    starts, queries = block_visits(blocks, positions, k.shape[1], g, begin, end, table.shape[1])
    starts, queries = _of_weight(starts, queries, weights)
    begin_tiles(settings)
    sums = _log_sums(
        index_q, index_k, q, k, per_group, starts, queries, positions, paths, table, scale, index_scale,
        head_sums, g, begin, end,
    )  # fmt: skip
    _compare(
        index_q, index_k, q, k, per_group, starts, queries, positions, paths, table, scale, index_scale,
        weights, sums, g, begin, values, d_index_q, d_index_k,
    )  # fmt: skip
    end_tiles()


@compiled(error_model="numpy")
def _of_weight(starts, queries, weights):
    """The visits without those of queries that do not count: they may hold anything."""
    kept, begins, count = np.empty_like(queries), np.zeros_like(starts), 0
    for b in range(len(starts) - 1):
        for i in queries[starts[b] : starts[b + 1]]:
            if weights[i] != 0:
                kept[count] = i
                count += 1
        begins[b + 1] = count
    return begins, kept[:count]


@compiled(error_model="numpy")
def _log_sums(
    index_q, index_k, q, k, per_group, starts, queries, positions, paths, table, scale, index_scale,
    head_sums, g, begin, end,
):  # fmt: skip
    """fp32 [queries, G + 1]: log2 of the sum of powers of each head, and of the student."""
    (_, block_size, groups, dim), index_dim, size = k.shape, index_k.shape[2], per_group + 1
    flat_k, flat_index_k = k.reshape(-1), index_k.reshape(-1)
    states = np.zeros((end - begin) * size * 2, np.float32)
    states[::2] = -np.inf
    known_heads = len(head_sums) > 0
    keys, index_keys, rows, heads, student = _scratch(k, index_k)
    for b in range(table.shape[1]):
        at = starts[b]
        while at < starts[b + 1]:
            page = np.int64(table[paths[queries[at]], b])
            same, _ = written(queries, at, starts[b + 1], positions, paths, table, b, block_size)
            first, index_first = (page * block_size * groups + g) * dim, page * block_size * index_dim
            if not known_heads:
                _key_panels(keys, flat_k, first, groups * dim, block_size, dim)
            _key_panels(index_keys, flat_index_k, index_first, index_dim, block_size, index_dim)
            while at < same:
                batch = queries[at : min(at + BATCH, same)]
                at += len(batch)
                _index_scores(rows, index_q, batch, g, index_keys, student, block_size)
                for x in range(len(batch)):
                    i = batch[x]
                    seen = min(block_size, positions[i] - b * block_size + 1)
                    columns = (seen + COLUMNS - 1) // COLUMNS * COLUMNS
                    mine = (i - begin) * size * 2
                    if not known_heads:
                        _head_scores(q, i, g, keys, seen, heads, block_size)
                        for h in range(per_group):
                            add_row(states, mine + 2 * h, heads, h * block_size, seen, columns, scale)
                    add_row(states, mine + 2 * per_group, student, x * block_size, seen, columns, index_scale)
    sums = (states[::2] + np.log2(states[1::2])).reshape(end - begin, size)
    if known_heads:
        sums[:, :per_group] = head_sums[begin:end, g * per_group : (g + 1) * per_group]
    return sums


@compiled(error_model="numpy")
def _compare(
    index_q, index_k, q, k, per_group, starts, queries, positions, paths, table, scale, index_scale, weights,
    sums, g, begin, values, d_index_q, d_index_k,
):  # fmt: skip
    """Adds to values [N, Hkv] in bits, and to the gradients where they are wanted."""
    (_, block_size, groups, dim), index_dim, wanted = k.shape, index_k.shape[2], len(d_index_k) > 0
    flat_k, flat_index_k = k.reshape(-1), index_k.reshape(-1)
    keys, index_keys, rows, heads, student = _scratch(k, index_k)
    teacher, d_logits = np.empty(block_size, np.float32), np.zeros(BATCH * block_size, np.uint16)
    tokens = np.empty(block_size // 2 * index_dim, np.uint32)
    d_keys = np.empty(index_dim * block_size, np.float32)
    factor = index_scale / np.float32(LOG2_E)
    for b in range(table.shape[1]):
        at = starts[b]
        while at < starts[b + 1]:
            page = np.int64(table[paths[queries[at]], b])
            same, known = written(queries, at, starts[b + 1], positions, paths, table, b, block_size)
            first, index_first = (page * block_size * groups + g) * dim, page * block_size * index_dim
            _key_panels(keys, flat_k, first, groups * dim, block_size, dim)
            _key_panels(index_keys, flat_index_k, index_first, index_dim, block_size, index_dim)
            panels_of_known_rows(
                tokens, 0, block_size // 2 * COLUMNS, flat_index_k, index_first, index_dim, block_size, known,
                index_dim,
            )  # fmt: skip
            d_keys[:] = 0
            while at < same:
                batch = queries[at : min(at + BATCH, same)]
                at += len(batch)
                _index_scores(rows, index_q, batch, g, index_keys, student, block_size)
                for x in range(len(batch)):
                    i = batch[x]
                    seen = min(block_size, positions[i] - b * block_size + 1)
                    columns = _head_scores(q, i, g, keys, seen, heads, block_size)
                    lse = sums[i - begin]
                    mean_of_powers(teacher, 0, heads, 0, block_size, per_group, columns, scale, lse, 0)
                    values[i, g] += divergence_step(
                        teacher, 0, student, x * block_size, seen, block_size, index_scale, lse[per_group],
                        weights[i] * factor, d_logits, x * block_size,
                    )  # fmt: skip
                if wanted:
                    _add_gradients(batch, g, rows, d_logits, tokens, block_size, d_index_q, d_keys)
            if wanted:
                _add_keys(d_keys, d_index_k[g, page], known)


@compiled(error_model="numpy")
def _scratch(k, index_k):
    """Room for panels of keys and index keys, rows of a batch, and scores of heads and of a batch."""
    block_size, dim, index_dim = k.shape[1], k.shape[3], index_k.shape[2]
    return (
        np.empty(block_size * dim // 2, np.uint32),
        np.empty(block_size * index_dim // 2, np.uint32),
        np.zeros(BATCH * index_dim, np.uint16),
        np.empty(COLUMNS * block_size, np.float32),
        np.empty(BATCH * block_size, np.float32),
    )


@compiled(error_model="numpy")
def _key_panels(out, keys, first, row, block_size, dim):
    """The panels of 16 keys each of a block: Bk rows of D channels, `row` apart, from `first` on."""
    pairs = keys.view(np.uint32)
    for j in range(block_size // COLUMNS):
        at = (first + j * COLUMNS * row) // 2
        panel_of_columns(out, j * COLUMNS * dim // 2, pairs, at, row // 2, dim)


@compiled(error_model="numpy")
def _index_scores(rows, index_q, batch, g, index_keys, student, block_size):
    """rows [BATCH, Di] = the batch's index queries; student [BATCH, Bk] = their scores."""
    dim = index_q.shape[2]
    for x in range(len(batch)):
        rows[x * dim : (x + 1) * dim] = index_q[batch[x], g]
    tile_product(
        student, 0, block_size, COLUMNS, rows, 0, dim, index_keys, 0, dim // 2 * COLUMNS, BATCH // COLUMNS,
        block_size // COLUMNS, dim // STEP, False,
    )  # fmt: skip


@compiled(error_model="numpy")
def _head_scores(q, i, g, keys, seen, heads, block_size):
    """heads [16, Bk] = scores of the query's heads of the group, for `seen` tokens, rounded up to a multiple
    of 16; which it returns."""
    dim, tiles = q.shape[3], (seen + COLUMNS - 1) // COLUMNS
    first = (i * q.shape[1] + g) * COLUMNS * dim
    tile_product(
        heads, 0, block_size, COLUMNS, q.reshape(-1), first, dim, keys, 0, dim // 2 * COLUMNS, 1, tiles,
        dim // STEP, False,
    )  # fmt: skip
    return tiles * COLUMNS


@compiled(error_model="numpy")
def _add_gradients(batch, g, rows, d_logits, tokens, block_size, d_index_q, d_keys):
    """d_index_q of the batch += d_logits @ keys; d_keys [Di, Bk] += queries^T @ d_logits."""
    dim, half = d_index_q.shape[2], BATCH // 2
    d_logits[len(batch) * block_size :] = 0
    d_rows = np.empty(BATCH * dim, np.float32)
    tile_product(
        d_rows, 0, dim, COLUMNS, d_logits, 0, block_size, tokens, 0, block_size // 2 * COLUMNS,
        BATCH // COLUMNS, dim // COLUMNS, block_size // STEP, False,
    )  # fmt: skip
    for x in range(len(batch)):
        target, source = d_index_q[batch[x], g], d_rows[x * dim : (x + 1) * dim]
        for d in range(dim):
            target[d] += source[d]
    pairs, left = np.empty(half * dim, np.uint32), np.empty(half * dim, np.uint32)
    panels_of_rows(pairs, 0, half * COLUMNS, rows, 0, dim, BATCH, dim)
    for j in range(dim // COLUMNS):
        transpose(left, j * COLUMNS * half, half, pairs, j * half * COLUMNS, COLUMNS, half, COLUMNS)
    right = np.empty(half * block_size, np.uint32)
    panels_of_rows(right, 0, half * COLUMNS, d_logits, 0, block_size, BATCH, block_size)
    tile_product(
        d_keys, 0, block_size, COLUMNS, left, 0, half, right, 0, half * COLUMNS, dim // COLUMNS,
        block_size // COLUMNS, 1, True,
    )  # fmt: skip


@compiled(error_model="numpy")
def _add_keys(d_keys, page, known):
    """page [Bk, Di] += d_keys [Di, Bk], of the tokens that are there."""
    block_size, dim = page.shape
    rows = np.empty(block_size * dim, np.float32)
    transpose(rows, 0, dim, d_keys, 0, block_size, dim, block_size)
    for t in range(known):
        for d in range(dim):
            page[t, d] += rows[t * dim + d]
