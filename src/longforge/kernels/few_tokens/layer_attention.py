"""Compiled: a layer's attention over a few tokens, from the normalised rows to what they get from it."""

import numpy as np

from longforge.kernels.few_tokens.attention import (
    HEADS,
    SCAN,
    attend,
    block_maxima,
    borrowed_desk,
    desk_for,
    merge_spans,
    rank,
    shares,
    spans_of,
)
from longforge.kernels.few_tokens.pages import gathered
from longforge.kernels.few_tokens.records import NORM_HEADS, SPARSE
from longforge.kernels.few_tokens.rows import heads_of_row, write_keys
from longforge.kernels.few_tokens.slices import multiply_slice, prepare_slices, slices
from longforge.kernels.few_tokens.turns import take
from longforge.kernels.few_tokens.vectors import borrowed, flat_view
from longforge.kernels.numba_host import compiled
from longforge.kernels.vector_code import round_up

__all__ = ["attend_phases", "write_phase"]

f32 = np.float32


@compiled(error_model="numpy")
def write_phase(turns, me, m, layer, scales, w, c, layout, r):
    """Projections; then norms, rotations, and the rows' keys and values into the cache."""
    n, inner, slots = len(layout[0]), r.normed.shape[1], layout[2]
    rows = (m.heads + 2 * m.kv_heads) * m.head_dim
    index_rows = (m.kv_heads + 1) * m.index_dim if layer.mixer == SPARSE else 0
    of_qkv = slices(m, rows, inner, n)
    units = of_qkv + slices(m, index_rows, inner, n)
    qkv, index = flat_view(layer.qkv, w), flat_view(layer.index, w)
    prepare_slices(m, me, r.normed, r, n)
    u = take(turns, me, units)
    while u >= 0:
        if u < of_qkv:
            multiply_slice(u, m, me, r.projected, 0, r.normed, r, n, qkv, rows)
        else:
            multiply_slice(u - of_qkv, m, me, r.projected, rows, r.normed, r, n, index, index_rows)
        u = take(turns, me, units)
    i = take(turns, me, n)
    while i >= 0:
        _heads(i, m, layer, scales, c, slots[i], r)
        if index_rows:
            _index_heads(i, m, layer, scales, c, slots[i], r)
        i = take(turns, me, n)


@compiled(error_model="numpy")
def _heads(i, m, layer, scales, c, slot, r):
    dim, row = m.head_dim, r.projected[i]
    end_q, end_k = m.heads * dim, (m.heads + m.kv_heads) * dim
    end_v = end_k + m.kv_heads * dim
    heads_of_row(row[:end_q], m.heads, dim, m.qk_norm, scales[layer.q_norm :], m.eps, r.cos[i], r.sin[i])
    heads_of_row(
        row[end_q:end_k], m.kv_heads, dim, m.qk_norm, scales[layer.k_norm :], m.eps, r.cos[i], r.sin[i]
    )
    for j in range(end_q):
        row[j] *= m.scale
    write_keys(flat_view(layer.k_cache, c), slot, row[end_q:end_k])
    write_keys(flat_view(layer.v_cache, c), slot, row[end_k:end_v])


@compiled(error_model="numpy")
def _index_heads(i, m, layer, scales, c, slot, r):
    dim, start = m.index_dim, (m.heads + 2 * m.kv_heads) * m.head_dim
    row = r.projected[i, start:]
    split, end = m.kv_heads * dim, (m.kv_heads + 1) * dim
    heads_of_row(
        row[:split], m.kv_heads, dim, NORM_HEADS, scales[layer.index_q_norm :], m.eps, r.cos[i], r.sin[i]
    )
    heads_of_row(row[split:end], 1, dim, NORM_HEADS, scales[layer.index_k_norm :], m.eps, r.cos[i], r.sin[i])
    write_keys(flat_view(layer.index_cache, c), slot, row[split:end])


@compiled(error_model="numpy")
def attend_phases(turns, me, m, layer, w, c, layout, r, spans, maxima, parts):
    """Attention of every row, then o_proj: r.delta."""
    n = len(layout[0])
    groups = _groups_of_unit(m, turns, n if layer.mixer == SPARSE else n * spans)
    desk = desk_for(groups, m.heads // m.kv_heads, m.head_dim, m.block_size, m.top_k)
    if layer.mixer == SPARSE:
        if maxima.shape[2]:
            _scan(turns, me, m, layer, c, layout, r, maxima)
        _attend_selected(turns, me, m, layer, c, layout, r, maxima, groups, desk)
    else:
        _attend_spans(turns, me, m, layer, c, layout, r, spans, parts, groups, desk)
    units = slices(m, m.hidden, r.attended.shape[1], n)
    o = flat_view(layer.o, w)
    prepare_slices(m, me, r.attended, r, n)
    u = take(turns, me, units)
    while u >= 0:
        multiply_slice(u, m, me, r.delta, 0, r.attended, r, n, o, m.hidden)
        u = take(turns, me, units)


@compiled(error_model="numpy")
def _scan(turns, me, m, layer, c, layout, r, maxima):
    """Scores of all blocks before the queries' own; a unit: a path's rows and SCAN blocks."""
    positions, paths, _, table = layout
    n, spans = len(positions), (maxima.shape[2] + SCAN - 1) // SCAN
    starts, runs = np.zeros(n + 1, np.int64), 0
    for i in range(n):
        if i == 0 or paths[i] != paths[i - 1]:
            starts[runs] = i
            runs += 1
    starts[runs] = n
    width = round_up(m.block_size)
    tile, scores = np.empty(m.index_dim * width, f32), np.empty(m.kv_heads * width, f32)
    keys, q0 = flat_view(layer.index_cache, c), (m.heads + 2 * m.kv_heads) * m.head_dim
    u = take(turns, me, runs * spans)
    while u >= 0:
        begin, end, first = starts[u // spans], starts[u // spans + 1], u % spans * SCAN
        last = min(first + SCAN, positions[end - 1] // m.block_size)
        if positions[end - 1] // m.block_size >= m.top_k:
            block_maxima(
                r.projected.reshape(-1), q0, r.projected.shape[1], m.kv_heads, m.index_dim, keys,
                m.block_size, table[paths[begin]], positions, begin, end, first, last, m.top_k, tile, scores,
                maxima,
            )  # fmt: skip
        u = take(turns, me, runs * spans)


@compiled()
def _groups_of_unit(m, turns, units):
    """How many kv heads a unit takes at once: all that fit where there are units enough for every thread,
    because they read the same pages; else one."""
    threads, per_group = turns.shape[1] - 1, m.heads // m.kv_heads
    return max(1, min(m.kv_heads, HEADS // per_group)) if units >= 4 * threads or threads == 1 else 1


@compiled(error_model="numpy")
def _attend_selected(turns, me, m, layer, c, layout, r, maxima, groups, borrowed_from):
    positions, paths, _, table = layout
    dim, per_group, row = m.head_dim, m.heads // m.kv_heads, m.kv_heads * m.head_dim
    desk, parts = borrowed_desk(borrowed_from), (m.kv_heads + groups - 1) // groups
    k, v = flat_view(layer.k_cache, c), flat_view(layer.v_cache, c)
    q, out = r.projected.reshape(-1), r.attended.reshape(-1)
    u = take(turns, me, len(positions) * parts)
    while u >= 0:
        i, g = u // parts, u % parts * groups
        count = min(groups, m.kv_heads - g)
        for j in range(g, g + count):
            rank(maxima[i, j], positions[i] // m.block_size, desk.best, r.blocks[layer.sparse_number, i, j])
        ids, head = r.blocks[layer.sparse_number, i, g : g + count], g * per_group * dim
        attend(
            q, i * r.projected.shape[1] + head, count, per_group, dim, k, v, row, g * dim, m.block_size,
            table[paths[i]], ids, 0, min(m.top_k, positions[i] // m.block_size + 1), positions[i],
            layer.window, desk,
        )  # fmt: skip
        shares(out, i * r.attended.shape[1] + head, count * per_group, dim, desk, k)
        u = take(turns, me, len(positions) * parts)


@compiled(error_model="numpy")
def _attend_spans(turns, me, m, layer, c, layout, r, spans, parts, groups, borrowed_from):
    """A unit: a row's span, and some of its groups. What is the only span of a row is done with it."""
    positions, paths, _, table = layout
    n, dim, per_group = len(positions), m.head_dim, m.heads // m.kv_heads
    sums, row = n * m.heads * spans * dim, m.kv_heads * m.head_dim
    desk, of_row = borrowed_desk(borrowed_from), (m.kv_heads + groups - 1) // groups
    every = borrowed(np.empty((0, 0), np.int32))  # nothing, and so never read
    k, v = flat_view(layer.k_cache, c), flat_view(layer.v_cache, c)
    q, out = r.projected.reshape(-1), r.attended.reshape(-1)
    u = take(turns, me, n * spans * of_row)
    while u >= 0:
        i, s, g = u // (spans * of_row), u // of_row % spans, u % of_row * groups
        first, size, held = spans_of(positions[i], layer.window, m.block_size)
        if s < held:
            begin, count = first + s * size, min(groups, m.kv_heads - g)
            end, head = min(begin + size, positions[i] // m.block_size + 1), g * per_group
            attend(
                q, i * r.projected.shape[1] + head * dim, count, per_group, dim, k, v, row, g * dim,
                m.block_size, table[paths[i]], every, begin, end - begin, positions[i], layer.window, desk,
            )  # fmt: skip
            if held == 1:
                shares(out, i * r.attended.shape[1] + head * dim, count * per_group, dim, desk, k)
            else:
                for h in range(count * per_group):
                    at = (i * m.heads + head + h) * spans + s
                    gathered(parts, at * dim, desk.sums, h * dim, dim, f32(1), k)
                    parts[sums + at * 2], parts[sums + at * 2 + 1] = desk.tops[h], desk.totals[h]
        u = take(turns, me, n * spans * of_row)
    if spans > 1:
        _merge(turns, me, m, layer, positions, r, spans, parts)


@compiled(error_model="numpy")
def _merge(turns, me, m, layer, positions, r, spans, parts):
    """A unit: the heads of a row of several spans."""
    n, dim = len(positions), m.head_dim
    i = take(turns, me, n)
    while i >= 0:
        _, _, held = spans_of(positions[i], layer.window, m.block_size)
        for head in range(m.heads if held > 1 else 0):
            first = (i * m.heads + head) * spans
            merge_spans(
                parts, first * dim, (n * spans * m.heads) * dim + 2 * first, held,
                r.attended[i, head * dim : (head + 1) * dim],
            )  # fmt: skip
        i = take(turns, me, n)
