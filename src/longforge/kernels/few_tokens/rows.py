"""Compiled: what happens to one token's row between the matrix products."""

import math

import numpy as np
from numba import types
from numba.extending import overload

from longforge.kernels.few_tokens.records import NORM_ALL, NORM_HEADS
from longforge.kernels.few_tokens.row_vectors import add_rows, norm_lanes, rotate_lanes
from longforge.kernels.numba_host import compiled
from longforge.kernels.vector_code import exponential, widen

__all__ = [
    "activate",
    "add_experts",
    "add_row",
    "angles",
    "choose_experts",
    "heads_of_row",
    "norm",
    "read_row",
    "write_keys",
]

f32 = np.float32


@compiled(error_model="numpy", fastmath={"nsz", "reassoc", "contract"})
def _squares(x):
    total = f32(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return total


@compiled(error_model="numpy")
def norm(x, scale, eps, out):
    """out = x / sqrt(mean(x^2) + eps) * scale; out may be x."""
    if x.shape[0] % 16 == 0:
        norm_lanes(x, 0, scale, 0, eps, out, 0, x.shape[0])
        return
    share = f32(1) / np.sqrt(_squares(x) / f32(x.shape[0]) + eps)
    for i in range(x.shape[0]):
        out[i] = x[i] * share * scale[i]


@compiled(error_model="numpy")
def read_row(matrix, row, out):
    """out = the row of a flat matrix, widened."""
    start = row * out.shape[0]
    for i in range(out.shape[0]):
        out[i] = widen(matrix[start + i])


@compiled(error_model="numpy")
def add_row(x, more):
    for i in range(x.shape[0]):
        x[i] += more[i]


@compiled(error_model="numpy")
def add_experts(x, rows, first, chosen, shared, weights):
    """x += the chosen experts' rows (first, first + 1, ...), weighted, and the row `shared` (-1: none)."""
    if x.shape[0] % 16 == 0:
        width = rows.shape[1]
        add_rows(x, rows.reshape(-1), first * width, width, chosen, shared * width, weights, x.shape[0])
        return
    for i in range(x.shape[0]):
        total = f32(0)
        for j in range(chosen):
            total += weights[j] * rows[first + j, i]
        if shared >= 0:
            total += rows[shared, i]
        x[i] += total


@compiled(error_model="numpy")
def angles(position, frequencies, cos, sin):
    """cos and sin of position * frequency, the product in fp32 as everywhere."""
    for i in range(frequencies.shape[0]):
        angle = f32(position) * frequencies[i]
        cos[i], sin[i] = math.cos(angle), math.sin(angle)


@compiled(error_model="numpy")
def _rotate(head, cos, sin):
    half = cos.shape[0]
    for i in range(half):
        a, b = head[i], head[half + i]
        head[i] = a * cos[i] - b * sin[i]
        head[half + i] = b * cos[i] + a * sin[i]


@compiled(error_model="numpy")
def heads_of_row(x, heads, dim, kind, scale, eps, cos, sin):
    """Heads side by side in x, normalised as `kind` says and rotated, in place."""
    if kind == NORM_ALL:
        norm(x[: heads * dim], scale[: heads * dim], eps, x[: heads * dim])
    half = cos.shape[0]
    if dim % 16 == 0 and half % 8 == 0:
        for at in range(0, heads * dim, dim):
            if kind == NORM_HEADS:
                norm_lanes(x, at, scale, 0, eps, x, at, dim)
            rotate_lanes(x, at, half, cos, sin)
        return
    for h in range(heads):
        head = x[h * dim : (h + 1) * dim]
        if kind == NORM_HEADS:
            norm(head, scale[:dim], eps, head)
        _rotate(head, cos, sin)


def _put(array, i, value):
    """array[i] = value, rounded to bf16 bits where the array holds those (for compiled code)."""
    raise NotImplementedError("compiled code only")


@overload(_put)
def _put_of(array, i, value):
    return _put_half if array.dtype == types.uint16 else _put_plain


def _put_plain(array, i, value):
    array[i] = value


def _put_half(array, i, value):
    bits = np.float32(value).view(np.uint32)
    # To nearest, ties to even; a NaN stays one because its payload's upper bits are set.
    array[i] = np.uint16(
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


@compiled(error_model="numpy")
def write_keys(pool, slot, x):
    """The row `slot` of a flat pool becomes x, in the pool's type."""
    start = slot * x.shape[0]
    for i in range(x.shape[0]):
        _put(pool, start + i, x[i])


@compiled(error_model="numpy", fastmath={"contract"})
def _sigmoid(x):
    e = exponential(-abs(x))
    s = f32(1) / (f32(1) + e)
    return e * s if x < f32(0) else s


@compiled(error_model="numpy", fastmath={"contract"})
def activate(gates, ups, alpha, limit, shift, out):
    """out = (up + shift) * gate * sigmoid(alpha * gate), gate clamped above, up on both sides."""
    for i in range(out.shape[0]):
        gate, up = gates[i], ups[i]
        # Comparisons that let NaN through, as torch's clamp does.
        gate = limit if gate > limit else gate
        up = limit if up > limit else (-limit if up < -limit else up)
        out[i] = gate * _sigmoid(alpha * gate) * (up + shift)


@compiled(error_model="numpy")
def choose_experts(scores, bias, routed_scale, ids, weights):
    """scores [E] come as logits. ids: the best by sigmoid + bias, the lower first of equals; weights: their
    sigmoids over their sum, times routed_scale."""
    for e in range(scores.shape[0]):
        scores[e] = _sigmoid(scores[e])
    total = f32(0)
    for j in range(ids.shape[0]):
        best, top = np.int64(-1), f32(0)
        for e in range(scores.shape[0]):
            value = scores[e] + bias[e]
            if best < 0 or value > top:
                taken = False
                for i in range(j):
                    taken |= ids[i] == e
                if not taken:
                    best, top = e, value
        ids[j] = best
        weights[j] = scores[best]
        total += scores[best]
    for j in range(ids.shape[0]):
        weights[j] = weights[j] / total * routed_scale
