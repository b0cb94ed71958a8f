"""Compiled: a layer's attention over a few tokens, from the normalised rows to what they get from it."""

import numpy as np

from longforge.kernels.few_tokens.attention import (
    CHUNK,
    SCAN,
    attend,
    block_maxima,
    merge_spans,
    rank,
    spans_of,
)
from longforge.kernels.few_tokens.records import NORM_HEADS, SPARSE
from longforge.kernels.few_tokens.rows import heads_of_row, write_keys
from longforge.kernels.few_tokens.slices import multiply_slice, prepare_slices, slices
from longforge.kernels.few_tokens.turns import take
from longforge.kernels.few_tokens.vectors import flat_view
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
    if layer.mixer == SPARSE:
        if maxima.shape[2]:
            _scan(turns, me, m, layer, c, layout, r, maxima)
        _attend_selected(turns, me, m, layer, c, layout, r, maxima)
    else:
        _attend_spans(turns, me, m, layer, c, layout, r, spans, parts)
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


@compiled(error_model="numpy")
def _attend_selected(turns, me, m, layer, c, layout, r, maxima):
    positions, paths, _, table = layout
    n, groups, dim = len(positions), m.kv_heads, m.head_dim
    per_group = m.heads // groups
    at, scores = np.empty(CHUNK, np.int64), np.empty(per_group * CHUNK, f32)
    state, values = np.empty((2, per_group), f32), np.empty(m.top_k, f32)
    k, v = flat_view(layer.k_cache, c), flat_view(layer.v_cache, c)
    u = take(turns, me, n * groups)
    while u >= 0:
        i, g = u // groups, u % groups
        ids = r.blocks[layer.sparse_number, i, g]
        rank(maxima[i, g], positions[i] // m.block_size, values, ids)
        o = i * r.attended.shape[1] + g * per_group * dim
        attend(
            r.projected.reshape(-1), i * r.projected.shape[1] + g * per_group * dim, per_group, dim, k, v,
            groups * dim, g * dim, m.block_size, table[paths[i]], ids, 0, len(ids), positions[i],
            layer.window, at, scores, state, r.attended.reshape(-1), o,
        )  # fmt: skip
        for h in range(per_group):
            for d in range(dim):
                r.attended[i, (g * per_group + h) * dim + d] /= state[1, h]
        u = take(turns, me, n * groups)


@compiled(error_model="numpy")
def _attend_spans(turns, me, m, layer, c, layout, r, spans, parts):
    positions, paths, _, table = layout
    n, groups, dim = len(positions), m.kv_heads, m.head_dim
    per_group, sums = m.heads // groups, n * m.heads * spans * dim
    at, scores = np.empty(CHUNK, np.int64), np.empty(per_group * CHUNK, f32)
    state, every = np.empty((2, per_group), f32), np.empty(0, np.int32)
    k, v = flat_view(layer.k_cache, c), flat_view(layer.v_cache, c)
    u = take(turns, me, n * spans)
    while u >= 0:
        i, s = u // spans, u % spans
        first, size, count = spans_of(positions[i], layer.window, m.block_size)
        if s < count:
            begin = first + s * size
            end = min(begin + size, positions[i] // m.block_size + 1)
            # Groups one after the other: what the first reads has brought the others' keys nearer.
            for g in range(groups):
                head = (i * groups + g) * spans + s
                attend(
                    r.projected.reshape(-1), i * r.projected.shape[1] + g * per_group * dim, per_group, dim,
                    k, v, groups * dim, g * dim, m.block_size, table[paths[i]], every, begin, end - begin,
                    positions[i], layer.window, at, scores, state, parts, head * per_group * dim,
                )  # fmt: skip
                for h in range(per_group):
                    parts[sums + (head * per_group + h) * 2] = state[0, h]
                    parts[sums + (head * per_group + h) * 2 + 1] = state[1, h]
        u = take(turns, me, n * spans)
    _merge(turns, me, m, layer, positions, r, spans, parts)


@compiled(error_model="numpy")
def _merge(turns, me, m, layer, positions, r, spans, parts):
    """A unit: the heads of a row."""
    n, groups, dim = len(positions), m.kv_heads, m.head_dim
    per_group, sums = m.heads // groups, n * m.heads * spans * dim
    i = take(turns, me, n)
    while i >= 0:
        _, _, count = spans_of(positions[i], layer.window, m.block_size)
        for head in range(m.heads):
            g, h = head // per_group, head % per_group
            first = ((i * groups + g) * spans) * per_group + h
            merge_spans(
                parts, first * dim, sums + 2 * first, per_group, count,
                r.attended[i, head * dim : (head + 1) * dim],
            )  # fmt: skip
        i = take(turns, me, n)
