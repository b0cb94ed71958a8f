"""Grouped experts on the CPU: (token, choice) pairs sorted by expert, one matrix product per expert.

T = N * k pairs, each a row of the sorted order. The forward keeps x, the pre-activations h [T, 2I] and the
order. The backward, grouped alike, needs nothing else: with a = act(h),

    da_t = down_e^T dout_t     dw_t = da_t . a_t
    dh_t = w_t act'(h_t) da_t  ddown_e = sum_t dout_t (w_t a_t)^T

so the rows y_t = down_e a_t, d wide for each pair, are never kept. torch does the matrix products, in bf16
where the weights or autocast are; between them numbers are fp32 (fp64 for fp64), one compiled pass over the
rows each. Every sum has one order: results are deterministic.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import prange, types
from numba.extending import overload
from torch import Tensor
from torch.autograd.function import once_differentiable

from longforge.kernels.numba_host import compiled, parallel_region
from longforge.kernels.vector_code import exponential, widen

__all__ = ["grouped_experts"]

PER_NUMBER = 16
"""Multiply-adds that an activation costs, about."""


class _Order(NamedTuple):
    """The pairs sorted by expert, by token inside an expert; pair p is choice p % k of token p // k."""

    token: Tensor
    """int64 [T], the token of each row."""
    pair: np.ndarray
    """int64 [T], the pair of each row."""
    rank: np.ndarray
    """int64 [T], the row of each pair."""
    counts: list[int]
    """Rows of each expert."""


class _Activation(NamedTuple):
    """(up + shift) * gate * sigmoid(alpha * gate), gate and up clamped at limit; silu: shift 0, no limit.

    The numbers are of the type that is computed in.
    """

    alpha: np.floating
    limit: np.floating
    shift: np.floating
    one: np.floating

    @staticmethod
    def of(name: str, alpha: float, limit: float, dtype: torch.dtype) -> "_Activation":
        kind = np.float64 if dtype == torch.float64 else np.float32
        alpha, limit, shift = (alpha, limit, 1.0) if name == "swiglu_oai" else (1.0, np.inf, 0.0)
        return _Activation(kind(alpha), kind(limit), kind(shift), kind(1))


def grouped_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    activation: str,
    alpha: float,
    limit: float,
) -> Tensor:
    """x [N, d], gate_up [E, 2I, d], down [E, d, I], expert_ids and weights [N, k] -> [N, d]. See api.py."""
    dtype = gate_up.dtype
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    if dtype == torch.float16:  # its products are hundreds of times slower than fp32's on a CPU
        dtype = torch.float32
    order = _sorted(expert_ids, gate_up.shape[0])
    act = _Activation.of(activation, alpha, limit, dtype)
    with torch.autocast("cpu", enabled=False):
        return _GroupedExperts.apply(x, gate_up, down, weights, order, act, dtype)  # pyright: ignore


class _GroupedExperts(torch.autograd.Function):
    """Gradients to x, gate_up, down and weights."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        order: _Order,
        act: _Activation,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = x.to(dtype).index_select(0, order.token)
        hidden = rows.new_empty(len(rows), gate_up.shape[1])
        active = rows.new_empty(len(rows), down.shape[2])
        _per_expert(rows, gate_up.to(dtype).transpose(1, 2), order.counts, hidden)
        with parallel_region(PER_NUMBER * active.numel()):
            _activate(_raw(hidden), *act, _raw(active))
        _per_expert(active, down.to(dtype).transpose(1, 2), order.counts, rows)
        ctx.save_for_backward(x, gate_up, down, weights, hidden)
        ctx.order, ctx.act = order, act
        return _combined(rows, _wide(weights, dtype), order.rank, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, weights, hidden = ctx.saved_tensors
        token, pair, rank, counts = ctx.order
        dtype = hidden.dtype
        d_rows = d_out.to(dtype).index_select(0, token)
        active = hidden.new_empty(len(hidden), down.shape[2])
        _per_expert(d_rows, down.to(dtype), counts, active)
        d_hidden = torch.empty_like(hidden)
        wide_weights = _wide(weights, dtype)
        d_weights = np.empty_like(wide_weights)
        with parallel_region(2 * PER_NUMBER * active.numel()):
            _activate_backward(
                _raw(hidden), *ctx.act, wide_weights.reshape(-1), pair, _raw(active), _raw(d_hidden),
                d_weights.reshape(-1),
            )  # fmt: skip
        d_x = d_gate_up = d_down = None
        if ctx.needs_input_grad[2]:
            d_down = _per_weight(d_rows, active, counts).to(down.dtype)
        if ctx.needs_input_grad[1]:
            rows = x.to(dtype).index_select(0, token)
            d_gate_up = _per_weight(d_hidden, rows, counts).to(gate_up.dtype)
        if ctx.needs_input_grad[0]:
            _per_expert(d_hidden, gate_up.to(dtype), counts, d_rows)
            d_x = _combined(d_rows, np.ones_like(wide_weights), rank, x.dtype)
        return d_x, d_gate_up, d_down, torch.from_numpy(d_weights).to(weights.dtype), None, None, None


def _sorted(expert_ids: Tensor, experts: int) -> _Order:
    token, pair, rank, counts = _sort(expert_ids.contiguous().numpy(), experts)
    return _Order(torch.from_numpy(token), pair, rank, counts.tolist())


def _per_expert(rows: Tensor, weight: Tensor, counts: list[int], out: Tensor) -> None:
    """out [T, b] = rows [T, a] @ weight [E, a, b] of each row's expert; counts: rows of each expert."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            torch.mm(rows[start : start + count], weight[expert], out=out[start : start + count])
            start += count


def _per_weight(left: Tensor, right: Tensor, counts: list[int]) -> Tensor:
    """[E, a, b]: sum over each expert's rows of left [T, a] outer right [T, b]; zeros for no rows."""
    out = left.new_empty(len(counts), left.shape[1], right.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            torch.mm(left[start : start + count].t(), right[start : start + count], out=out[expert])
            start += count
        else:
            out[expert].zero_()
    return out


def _combined(rows: Tensor, weights: np.ndarray, rank: np.ndarray, dtype: torch.dtype) -> Tensor:
    """[N, d]: each token's rows [T, d], weighted and added in the order of its choices."""
    out = np.empty((len(weights), rows.shape[1]), weights.dtype)
    with parallel_region(2 * rows.numel()):
        _combine(_raw(rows), weights, rank, out)
    return torch.from_numpy(out).to(dtype)


def _wide(weights: Tensor, dtype: torch.dtype) -> np.ndarray:
    return (
        weights.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).contiguous().numpy()
    )


def _raw(x: Tensor) -> np.ndarray:
    """The same memory as an array; bf16 as its bits."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _put(array, i, value):
    """array[i] = value, rounded to bf16 bits where the array holds those (for compiled code)."""
    raise NotImplementedError("compiled code only")


@overload(_put)
def _put_of(array, i, value):
    if array.dtype == types.uint16:
        return _put_half
    return _put_plain


def _put_plain(array, i, value):
    array[i] = value


def _put_half(array, i, value):
    bits = np.float32(value).view(np.uint32)
    # To nearest, ties to even; a NaN stays one because its payload's upper bits are set.
    array[i] = np.uint16(
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


@compiled()
def _sort(expert_ids, experts):
    """token, pair, rank [T] and counts [E] of _Order, by counting."""
    flat, choices = expert_ids.reshape(-1), expert_ids.shape[1]
    counts = np.zeros(experts, np.int64)
    for expert in flat:
        counts[expert] += 1
    free = np.cumsum(counts) - counts
    token, pair, rank = np.empty_like(flat), np.empty_like(flat), np.empty_like(flat)
    for p in range(len(flat)):
        row = free[flat[p]]
        free[flat[p]] += 1
        token[row], pair[row], rank[p] = p // choices, p, row
    return token, pair, rank, counts


@compiled(parallel=True, error_model="numpy")
def _activate(hidden, alpha, limit, shift, one, active):
    """hidden [T, 2I] -> active [T, I]."""
    inner = active.shape[1]
    for t in prange(len(hidden)):
        _activate_row(hidden[t, :inner], hidden[t, inner:], alpha, limit, shift, one, active[t])


@compiled(error_model="numpy", fastmath={"contract"})
def _activate_row(gates, ups, alpha, limit, shift, one, active):
    for i in range(active.shape[0]):
        gate, up = widen(gates[i]), widen(ups[i])
        # Comparisons that let NaN through, as torch's clamp does.
        gate = limit if gate > limit else gate
        up = limit if up > limit else (-limit if up < -limit else up)
        _put(active, i, gate * _sigmoid(alpha * gate, one) * (up + shift))


@compiled(error_model="numpy", fastmath={"contract"})
def _sigmoid(x, one):
    e = exponential(-abs(x))
    s = one / (one + e)
    return e * s if x < 0 else s


@compiled(parallel=True, error_model="numpy")
def _activate_backward(hidden, alpha, limit, shift, one, weights, pair, active, d_hidden, d_weights):
    """active comes as da [T, I] without the row's weight and leaves as weight * a; writes d_hidden [T, 2I]
    and the gradients of the weights [T], which are in the order of pairs."""
    inner = active.shape[1]
    for t in prange(len(hidden)):
        terms = np.empty(inner, weights.dtype)
        _activate_backward_row(
            hidden[t, :inner], hidden[t, inner:], alpha, limit, shift, one, weights[pair[t]], active[t],
            d_hidden[t, :inner], d_hidden[t, inner:], terms,
        )  # fmt: skip
        d_weights[pair[t]] = _sum(terms)


@compiled(error_model="numpy", fastmath={"contract"})
def _activate_backward_row(gates, ups, alpha, limit, shift, one, weight, active, d_gates, d_ups, terms):
    zero = one - one
    for i in range(terms.shape[0]):
        raw_gate, raw_up, d = widen(gates[i]), widen(ups[i]), widen(active[i])
        gate = limit if raw_gate > limit else raw_gate
        up = limit if raw_up > limit else (-limit if raw_up < -limit else raw_up)
        s = _sigmoid(alpha * gate, one)
        slope = gate * s
        up += shift
        terms[i] = d * slope * up
        d *= weight
        # d(g sigmoid(alpha g)) / dg = sigmoid + alpha g sigmoid (1 - sigmoid)
        d_gate = (s + alpha * slope * (one - s)) * up * d
        # A value on the limit passes the gradient, as in torch.
        _put(d_gates, i, zero if raw_gate > limit else d_gate)
        _put(d_ups, i, zero if abs(raw_up) > limit else slope * d)
        _put(active, i, weight * slope * up)


@compiled(error_model="numpy", fastmath={"nsz", "reassoc"})
def _sum(x):
    total = x.dtype.type(0)
    for i in range(x.shape[0]):
        total += x[i]
    return total


@compiled(parallel=True, error_model="numpy")
def _combine(rows, weights, rank, out):
    """out[n] = sum over choices j of weights[n, j] * rows[rank[n * k + j]]."""
    n, choices = weights.shape
    for i in prange(n):
        out[i] = 0
        for j in range(choices):
            _add_scaled(out[i], rows[rank[i * choices + j]], weights[i, j])


@compiled(error_model="numpy", fastmath={"contract"})
def _add_scaled(out, row, weight):
    for d in range(out.shape[0]):
        out[d] += weight * widen(row[d])
