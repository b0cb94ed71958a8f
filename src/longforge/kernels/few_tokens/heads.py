"""Compiled: logits of some of a step's rows, and the tokens that a pass guesses for the next one."""

import numpy as np
from numba import prange

from longforge.kernels.few_tokens.products import multiply_rows
from longforge.kernels.few_tokens.records import MODEL
from longforge.kernels.few_tokens.turns import take
from longforge.kernels.few_tokens.vectors import flat_view
from longforge.kernels.numba_host import compiled
from longforge.kernels.vector_code import largest

__all__ = ["guess_phase", "head", "head_alone", "head_phase"]

SLICE = 128
"""Rows of the vocabulary that are a unit, a multiple of eight."""
MODELS = np.empty(1, MODEL)
"""An element type for flat_view."""


@compiled(parallel=True, error_model="numpy")
def head(units, model, h, x, numbers, out):
    """out [B, V] = x [B, pad(d)] @ head.T, vocabulary rows in `units` slices of multiples of eight.

    h: an empty array of the head's element type; numbers: 0, 1, ... B - 1.
    """
    for u in prange(units):
        _head_of_rows(np.int64(u), units, model, h, x, numbers, out)


@compiled(error_model="numpy")
def head_alone(model, h, x, numbers, out):
    """The same by the calling thread."""
    _head_of_rows(np.int64(0), 1, model, h, x, numbers, out)


@compiled(error_model="numpy")
def _head_of_rows(u, units, model, h, x, numbers, out):
    m = flat_view(model, MODELS)[0]
    step = (m.vocab + 8 * units - 1) // (8 * units) * 8
    _head_slice(u * step, step, m, h, x, numbers, numbers, len(x), out.reshape(-1), 0)


@compiled(error_model="numpy")
def head_phase(turns, me, m, h, x, of, numbers, out, first):
    """out[first + j] = logits of row of[j] of x [N, pad(d)]; out [H, V]."""
    n = len(of)
    units = (m.vocab + SLICE - 1) // SLICE if n else 0
    u = take(turns, me, units)
    while u >= 0:
        _head_slice(u * SLICE, SLICE, m, h, x, of, numbers, n, out.reshape(-1), first * m.vocab)
        u = take(turns, me, units)


@compiled(error_model="numpy")
def _head_slice(first, step, m, h, x, of, to, n, out, o):
    """out[o + to[j] * V + v] for v in the slice [first, first + step)."""
    inner, rows = x.shape[1], max(0, min(step, m.vocab - first))
    multiply_rows(
        out, o + first, m.vocab, to, x.reshape(-1), inner, of, n, flat_view(m.head, h), first * inner, inner,
        rows, inner,
    )  # fmt: skip


@compiled(error_model="numpy")
def guess_phase(turns, me, logits, x, heads, begin, end, ids, hidden):
    """heads[2, j] = the token of the highest logit of head j, begin <= j < end, the lower of equals.

    heads int64 [3, H]: the row in x; the row of a later pass that goes on from there, or -1; the token. That
    row gets the token as its id, and as its hidden state what the head's row of x came to.
    """
    j = take(turns, me, end - begin)
    while j >= 0:
        row, next_row = heads[0, begin + j], heads[1, begin + j]
        token = _first_of_highest(logits[begin + j])
        heads[2, begin + j] = token
        if next_row >= 0:
            ids[next_row] = token
            for i in range(hidden.shape[1]):
                hidden[next_row, i] = x[row, i]
        j = take(turns, me, end - begin)


@compiled(error_model="numpy")
def _first_of_highest(values):
    """0 where none compares equal to the highest: broken weights."""
    peak = largest(values)
    for v in range(values.shape[0]):
        if values[v] == peak:
            return v
    return 0
