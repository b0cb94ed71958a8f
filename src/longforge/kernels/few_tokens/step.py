"""One step of a few tokens through the layers, compiled as one call: the phases, and who does what."""

import numpy as np
from numba import prange

from longforge.kernels.few_tokens.experts import down_unit, down_units, gate_up_unit, gate_up_units, plan
from longforge.kernels.few_tokens.layer_attention import attend_phases, write_phase
from longforge.kernels.few_tokens.products import multiply_rows
from longforge.kernels.few_tokens.records import LAYER, MODEL
from longforge.kernels.few_tokens.rooms import borrowed_rooms
from longforge.kernels.few_tokens.rows import add_experts, add_row, angles, choose_experts, norm, read_row
from longforge.kernels.few_tokens.slices import multiply_slice, prepare_slices, slices
from longforge.kernels.few_tokens.turns import take
from longforge.kernels.few_tokens.vectors import borrowed, flat_view
from longforge.kernels.numba_host import compiled
from longforge.kernels.tiles.product import TILE_SETTINGS, begin_tiles, end_tiles

__all__ = ["PHASES_OF_LAYER", "PHASES_OF_STEP", "head", "head_alone", "step", "step_alone"]

PHASES_OF_LAYER, PHASES_OF_STEP = 11, 3
"""At most."""
MODELS, LAYERS = np.empty(1, MODEL), np.empty(1, LAYER)
"""Element types for flat_view: numba's parallel loops cannot take arrays of records."""
f32 = np.float32


@compiled(parallel=True, error_model="numpy")
def step(
    threads, module, model, layers, scales, w, c, ids, layout, hidden, r, spans, maxima, parts, turns, out
):
    """Hidden states out [N, d] of tokens ids [N], after the final norm.

    model       address of the MODEL record, layers of the LAYER records
    module      -1: the decoder; else the MTP module, from hidden [N, d]
    w, c        empty arrays: element type of weights and of the cache
    layout      (positions, paths, slots int64 [N], page_table int32 [P, M])
    spans       most spans of a prefix; maxima fp32 [N, Hkv, blocks], parts fp32 [N Hq spans (D + 2)]: scratch
    turns       zeros, see turns.py
    """
    for t in prange(threads):
        _work(
            np.int64(t), module, model, layers, scales, w, c, ids, layout, hidden, r, spans, maxima, parts,
            turns, out,
        )  # fmt: skip


@compiled(error_model="numpy")
def step_alone(module, model, layers, scales, w, c, ids, layout, hidden, r, spans, maxima, parts, turns, out):
    """The same by the calling thread: no region of threads is entered, nobody is waited for."""
    _work(
        np.int64(0), module, model, layers, scales, w, c, ids, layout, hidden, r, spans, maxima, parts, turns,
        out,
    )  # fmt: skip


@compiled(error_model="numpy")
def _work(
    t, module, model, layers_at, scales, w, c, ids, layout, hidden, rooms, spans, maxima, parts, turns, out
):
    m, layers, me = flat_view(model, MODELS)[0], flat_view(layers_at, LAYERS), np.zeros(4, np.int64)
    r, scales, ids, hidden = borrowed_rooms(rooms), borrowed(scales), borrowed(ids), borrowed(hidden)
    maxima, parts, turns, out = borrowed(maxima), borrowed(parts), borrowed(turns), borrowed(out)
    places = borrowed(layout[0]), borrowed(layout[1]), borrowed(layout[2]), borrowed(layout[3])
    me[0] = t
    if m.tiles:
        begin_tiles(TILE_SETTINGS)
    first = 0 if module < 0 else m.layers + module
    end = m.layers if module < 0 else first + 1
    if module < 0:
        _embed(turns, me, m, layers[0], scales, w, ids, places[0], r)
    else:
        _combine(turns, me, m, layers[first], scales, w, ids, places[0], hidden, r)
    for number in range(first, end):
        layer = layers[number]
        write_phase(turns, me, m, layer, scales, w, c, places, r)
        attend_phases(turns, me, m, layer, w, c, places, r, spans, maxima, parts)
        _feed_forward(turns, me, m, layer, scales, w, len(ids), r)
        if number + 1 < end:
            _finish(turns, me, m, layer, scales, layers[number + 1].input_norm, len(ids), r, r.normed)
        else:
            last = m.final_norm if module < 0 else layer.final_norm
            _finish(turns, me, m, layer, scales, last, len(ids), r, out)
    if m.tiles:
        end_tiles()


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


@compiled(parallel=True, error_model="numpy")
def head(units, model, w, x, numbers, out):
    """out [B, V] = x [B, pad(d)] @ head.T, vocabulary rows in `units` slices of multiples of eight."""
    for u in prange(units):
        _head_slice(np.int64(u), units, model, w, x, numbers, out)


@compiled(error_model="numpy")
def head_alone(model, w, x, numbers, out):
    """The same by the calling thread."""
    _head_slice(np.int64(0), 1, model, w, x, numbers, out)


@compiled(error_model="numpy")
def _head_slice(u, units, model, w, x, numbers, out):
    m, inner = flat_view(model, MODELS)[0], x.shape[1]
    step = (m.vocab + 8 * units - 1) // (8 * units) * 8
    first = u * step
    multiply_rows(
        out.reshape(-1), first, m.vocab, numbers, x.reshape(-1), inner, numbers, len(x),
        flat_view(m.head, w), first * inner, inner, min(step, m.vocab - first), inner,
    )  # fmt: skip
