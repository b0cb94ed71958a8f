"""Compiled: the feed-forward of a few tokens, by expert, so that each weight that is needed is read once.

Two phases: gate and up rows with the activation, then the down rows. Units are slices of one expert's rows;
those of the shared expert (a dense feed-forward is one without others) come last.
"""

from longforge.kernels.few_tokens.products import multiply_rows
from longforge.kernels.few_tokens.rows import activate
from longforge.kernels.few_tokens.slices import slice_rows, slices
from longforge.kernels.few_tokens.tile_rows import multiply_halves, split_rows
from longforge.kernels.few_tokens.vectors import flat_view
from longforge.kernels.numba_host import compiled
from longforge.kernels.vector_code import round_up

__all__ = ["down_unit", "down_units", "gate_up_unit", "gate_up_units", "plan"]


@compiled(error_model="numpy")
def plan(layer, r, n, chosen):
    """Sorts the tokens' choices by expert: experts, starts, of and to of this layer."""
    experts, starts = r.experts[layer.number], r.starts[layer.number]
    of, to = r.of[layer.number], r.to[layer.number]
    count, at = 0, 0
    for e in range(layer.experts):
        before = at
        for i in range(n):
            for j in range(chosen):
                if r.choices[i, j] == e:
                    of[at], to[at] = i, i * (chosen + 1) + j
                    at += 1
        if at > before:
            experts[count], starts[count] = e, before
            count += 1
    starts[count] = at
    experts[len(experts) - 1] = count


@compiled(error_model="numpy")
def _routed(m, layer, r, n):
    """(experts with tokens, tokens of one on average)."""
    active = r.experts[layer.number, -1] if layer.experts else 0
    return active, max(1, n * m.chosen // max(1, active))


@compiled(error_model="numpy")
def gate_up_units(m, layer, r, n):
    """Units of the first phase."""
    active, tokens = _routed(m, layer, r, n)
    inner = 2 * r.normed.shape[1]
    return active * slices(m, m.expert_size, inner, tokens) + slices(m, layer.shared_size, inner, n)


@compiled(error_model="numpy")
def gate_up_unit(unit, m, me, layer, r, n, w):
    active, tokens = _routed(m, layer, r, n)
    inner = 2 * r.normed.shape[1]
    each = slices(m, m.expert_size, inner, tokens)
    if unit < active * each:
        a, part = unit // each, unit % each
        begin, end = r.starts[layer.number, a], r.starts[layer.number, a + 1]
        size = m.expert_size
        step = slice_rows(m, size, inner, tokens)
        first = part * step
        matrix, start = flat_view(layer.gate_up, w), r.experts[layer.number, a] * 2 * size
        _gate_up(
            m, me, r, r.to[layer.number, begin:], r.of[layer.number, begin:], end - begin, matrix, start,
            size, first, min(size, first + step),
        )  # fmt: skip
    else:
        size = layer.shared_size
        step = slice_rows(m, size, inner, n)
        first = (unit - active * each) * step
        matrix = flat_view(layer.shared_gate_up, w)
        end = min(size, first + step)
        _gate_up(m, me, r, r.shared_rows, r.numbers, n, matrix, 0, size, first, end)


@compiled(error_model="numpy")
def _gate_up(m, me, r, to, of, count, matrix, start, size, first, end):
    """active[to[j], first:end] for tokens of[j]; start: the expert's first row in the matrix."""
    x, inner = r.normed.reshape(-1), r.normed.shape[1]
    out, width = r.gate_up.reshape(-1), r.gate_up.shape[1]
    if m.tiles:
        split_rows(r.halves[me[0]], x, inner, of, count, inner)
    for column in (first, size + first):
        place, rows = (start + column) * inner, end - first
        if m.tiles:
            multiply_halves(
                out, column, width, to, count, r.halves[me[0]], matrix, place, rows, inner, r.sums[me[0]]
            )
        else:
            multiply_rows(
                out, column, width, to, x, inner, of, count, matrix, place, inner, rows, inner
            )  # fmt: skip
    for j in range(count):
        row, result = r.gate_up[to[j]], r.active[to[j]]
        activate(row[first:end], row[size + first : size + end], m.alpha, m.limit, m.shift, result[first:end])
        if end == size:
            result[size : round_up(size)] = 0


@compiled(error_model="numpy")
def down_units(m, layer, r, n):
    """Units of the second phase."""
    active, tokens = _routed(m, layer, r, n)
    shared = slices(m, m.hidden, round_up(layer.shared_size), n) if layer.shared_size else 0
    return active * slices(m, m.hidden, round_up(max(1, m.expert_size)), tokens) + shared


@compiled(error_model="numpy")
def down_unit(unit, m, me, layer, r, n, w):
    active, tokens = _routed(m, layer, r, n)
    inner = round_up(max(1, m.expert_size))
    each = slices(m, m.hidden, inner, tokens)
    if unit < active * each:
        a, step = unit // each, slice_rows(m, m.hidden, inner, tokens)
        first = unit % each * step
        begin, end = r.starts[layer.number, a], r.starts[layer.number, a + 1]
        matrix, start = flat_view(layer.down, w), r.experts[layer.number, a] * m.hidden
        rows = min(step, m.hidden - first)
        _down(m, me, r, r.to[layer.number, begin:], end - begin, matrix, start + first, inner, first, rows)
    else:
        inner = round_up(layer.shared_size)
        step = slice_rows(m, m.hidden, inner, n)
        first = (unit - active * each) * step
        matrix = flat_view(layer.shared_down, w)
        _down(m, me, r, r.shared_rows, n, matrix, first, inner, first, min(step, m.hidden - first))


@compiled(error_model="numpy")
def _down(m, me, r, to, count, matrix, start, inner, first, rows):
    out, width, x, x_row = r.expert_rows.reshape(-1), r.expert_rows.shape[1], r.active, r.active.shape[1]
    if m.tiles:
        split_rows(r.halves[me[0]], x.reshape(-1), x_row, to, count, inner)
        multiply_halves(
            out, first, width, to, count, r.halves[me[0]], matrix, start * inner, rows, inner, r.sums[me[0]]
        )
    else:
        multiply_rows(
            out, first, width, to, x.reshape(-1), x_row, to, count, matrix, start * inner, inner, rows, inner
        )
