"""One step of a few tokens through the layers, compiled as one call: the phases, and who does what."""

import numpy as np
from numba import prange

from longforge.kernels.few_tokens.experts import down_unit, down_units, gate_up_unit, gate_up_units, plan
from longforge.kernels.few_tokens.heads import guess_phase, head_phase
from longforge.kernels.few_tokens.layer_attention import attend_phases, write_phase
from longforge.kernels.few_tokens.orders import tables_of
from longforge.kernels.few_tokens.products import multiply_rows
from longforge.kernels.few_tokens.records import LAYER, MODEL
from longforge.kernels.few_tokens.rooms import rooms_at
from longforge.kernels.few_tokens.rows import add_experts, add_row, angles, choose_experts, norm, read_row
from longforge.kernels.few_tokens.slices import multiply_slice, prepare_slices, slices
from longforge.kernels.few_tokens.turns import clear, take
from longforge.kernels.few_tokens.vectors import borrowed, flat_view
from longforge.kernels.numba_host import compiled
from longforge.kernels.tiles.product import TILE_SETTINGS, begin_tiles, end_tiles

__all__ = ["PHASES_OF_LAYER", "PHASES_OF_PASS", "step", "step_alone"]

PHASES_OF_LAYER, PHASES_OF_PASS = 11, 5
"""At most."""
MODELS, LAYERS = np.empty(1, MODEL), np.empty(1, LAYER)
"""Element types for flat_view: numba's parallel loops cannot take arrays of records."""
f32 = np.float32


@compiled(parallel=True, error_model="numpy")
def step(
    threads, order, model, layers, scales, w, c, h, table, hidden, rooms, spans, maxima, parts, turns, out,
    logits,
):  # fmt: skip
    """Hidden states out [R, pad(d)] after the final norm, and logits [H, V] of some of them.

    order       int64, the tables of orders.py one after the other
    model       address of the MODEL record, layers of the LAYER records
    w, c, h     empty arrays: element type of weights, of the cache and of the head
    table       int32 [P, M], the page table
    hidden      fp32 [R, d], what rows of MTP modules begin with
    rooms       see places_of
    spans       most spans of a prefix; maxima fp32 [N, Hkv, blocks], parts fp32 [N Hq spans (D + 2)]: scratch
                for the N rows of the largest pass
    turns       int64 [phases, threads + 1, 8], see turns.py
    """
    clear(turns)
    for t in prange(threads):
        _work(
            np.int64(t), order, model, layers, scales, w, c, h, table, hidden, rooms, spans, maxima, parts,
            turns, out, logits,
        )  # fmt: skip


@compiled(error_model="numpy")
def step_alone(
    order, model, layers, scales, w, c, h, table, hidden, rooms, spans, maxima, parts, turns, out, logits
):
    """The same by the calling thread: no region of threads is entered, nobody is waited for."""
    clear(turns)
    _work(
        np.int64(0), order, model, layers, scales, w, c, h, table, hidden, rooms, spans, maxima, parts, turns,
        out, logits,
    )  # fmt: skip


@compiled(error_model="numpy")
def _work(
    t, order, model, layers_at, scales, w, c, h, table, hidden, rooms, spans, maxima, parts, turns, out,
    logits,
):  # fmt: skip
    m, layers, me = flat_view(model, MODELS)[0], flat_view(layers_at, LAYERS), np.zeros(4, np.int64)
    r, scales, table, hidden = rooms_at(rooms), borrowed(scales), borrowed(table), borrowed(hidden)
    maxima, parts, turns = borrowed(maxima), borrowed(parts), borrowed(turns)
    out, logits = borrowed(out), borrowed(logits)
    passes, rows, heads = tables_of(borrowed(order))
    me[0] = t
    if m.tiles:
        begin_tiles(TILE_SETTINGS)
    for p in range(len(passes)):
        a, b, of = passes[p, 2], passes[p, 3], heads[0, passes[p, 4] : passes[p, 5]]
        layout = rows[1, a:b], rows[2, a:b], rows[3, a:b], table
        _layers(
            turns, me, passes[p, 0], passes[p, 1], m, layers, scales, w, c, rows[0, a:b], layout,
            hidden[a:b], r, spans, maxima, parts, out[a:b],
        )  # fmt: skip
        head_phase(turns, me, m, h, out, of, r.numbers, logits, passes[p, 4])
        if passes[p, 0] >= m.layers:
            guess_phase(turns, me, logits, out, heads, passes[p, 4], passes[p, 5], rows[0], hidden)
    if m.tiles:
        end_tiles()


@compiled(error_model="numpy")
def _layers(
    turns, me, first, end, m, layers, scales, w, c, ids, layout, hidden, r, spans, maxima, parts, out
):
    """One pass of rows through adjacent layers."""
    if first < m.layers:
        _embed(turns, me, m, layers[first], scales, w, ids, layout[0], r)
    else:
        _combine(turns, me, m, layers[first], scales, w, ids, layout[0], hidden, r)
    for number in range(first, end):
        layer = layers[number]
        write_phase(turns, me, m, layer, scales, w, c, layout, r)
        attend_phases(turns, me, m, layer, w, c, layout, r, spans, maxima, parts)
        _feed_forward(turns, me, m, layer, scales, w, len(ids), r)
        if number + 1 < end:
            _finish(turns, me, m, layer, scales, layers[number + 1].input_norm, len(ids), r, r.normed)
        else:
            last = m.final_norm if first < m.layers else layer.final_norm
            _finish(turns, me, m, layer, scales, last, len(ids), r, out)


@compiled(error_model="numpy")
def _begin_row(i, m, layer, scales, positions, r):
    """The angles and the first norm of token i."""
    angles(positions[i], scales[m.frequencies : m.frequencies + m.half_rotary], r.cos[i], r.sin[i])
    norm(r.x[i], scales[layer.input_norm :], m.eps, r.normed[i])


@compiled(error_model="numpy")
def _embed(turns, me, m, layer, scales, w, ids, positions, r):
    table = flat_view(m.embed, w)
    i = take(turns, me, len(ids))
    while i >= 0:
        read_row(table, ids[i], r.x[i])
        _begin_row(i, m, layer, scales, positions, r)
        i = take(turns, me, len(ids))


@compiled(error_model="numpy")
def _combine(turns, me, m, layer, scales, w, ids, positions, hidden, r):
    """An MTP module's beginning: both norms, then eh_proj."""
    n, d, table, matrix = len(ids), m.hidden, flat_view(m.embed, w), flat_view(layer.eh_proj, w)
    i = take(turns, me, n)
    while i >= 0:
        read_row(table, ids[i], r.x[i])
        norm(r.x[i], scales[layer.embed_norm :], m.eps, r.pair[i])
        norm(hidden[i], scales[layer.hidden_norm :], m.eps, r.pair[i, d:])
        i = take(turns, me, n)
    units = slices(m, d, r.pair.shape[1], n)
    prepare_slices(m, me, r.pair, r, n)
    u = take(turns, me, units)
    while u >= 0:
        multiply_slice(u, m, me, r.x, 0, r.pair, r, n, matrix, d)
        u = take(turns, me, units)
    i = take(turns, me, n)
    while i >= 0:
        _begin_row(i, m, layer, scales, positions, r)
        i = take(turns, me, n)


@compiled(error_model="numpy")
def _feed_forward(turns, me, m, layer, scales, w, n, r):
    """From what attention adds to the experts' rows."""
    i = take(turns, me, n)
    while i >= 0:
        add_row(r.x[i], r.delta[i])
        norm(r.x[i], scales[layer.post_norm :], m.eps, r.normed[i])
        if layer.experts:
            _route(i, m, layer, r)
        i = take(turns, me, n)
    if layer.experts:
        u = take(turns, me, 1)
        while u >= 0:
            plan(layer, r, n, m.chosen)
            u = take(turns, me, 1)
    units = gate_up_units(m, layer, r, n)
    u = take(turns, me, units)
    while u >= 0:
        gate_up_unit(u, m, me, layer, r, n, w)
        u = take(turns, me, units)
    units = down_units(m, layer, r, n)
    u = take(turns, me, units)
    while u >= 0:
        down_unit(u, m, me, layer, r, n, w)
        u = take(turns, me, units)


@compiled(error_model="numpy")
def _route(i, m, layer, r):
    """Scores of token i's experts are summed as any other row's."""
    scores, inner = np.empty(layer.experts, f32), r.normed.shape[1]
    multiply_rows(
        scores, 0, 0, r.numbers, r.normed[i], inner, r.numbers, 1, flat_view(layer.router, scores), 0, inner,
        layer.experts, inner,
    )  # fmt: skip
    choose_experts(scores, flat_view(layer.bias, scores), m.routed_scale, r.choices[i], r.weights[i])


@compiled(error_model="numpy")
def _finish(turns, me, m, layer, scales, scale, n, r, out):
    """A layer's end: x gets the experts' rows; out = the next norm of x."""
    chosen = m.chosen if layer.experts else 0
    i = take(turns, me, n)
    while i >= 0:
        shared = r.shared_rows[i] if layer.shared_size else -1
        add_experts(r.x[i], r.expert_rows, i * (m.chosen + 1), chosen, shared, r.weights[i])
        norm(r.x[i], scales[scale:], m.eps, out[i])
        i = take(turns, me, n)
