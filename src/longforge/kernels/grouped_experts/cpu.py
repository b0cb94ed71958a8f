"""Grouped experts on the CPU: (token, choice) pairs sorted by expert, one matrix product per expert.

T = N * k pairs, each a row of the sorted order. The forward keeps x, the pre-activations h [T, 2I] and the
order. The backward, grouped alike, needs nothing else: with a = act(h),

    da_t = down_e^T dout_t     dw_t = da_t . a_t
    dh_t = w_t act'(h_t) da_t  ddown_e = sum_t dout_t (w_t a_t)^T

so the rows y_t = down_e a_t, d wide for each pair, are never kept. Every sum has one order: deterministic.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["grouped_experts"]


class _Order(NamedTuple):
    """The pairs sorted by expert (stable: by token inside an expert)."""

    token: Tensor
    """int64 [T], the token of each sorted row."""
    rank: Tensor
    """int64 [N, k], the sorted row of each pair."""
    counts: list[int]
    """Rows of each expert."""


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
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast and x.dtype != torch.float64 else gate_up.dtype
    with torch.autocast("cpu", enabled=False):
        order = _sort(expert_ids, gate_up.shape[0])
        act = (activation, alpha, limit)
        return _GroupedExperts.apply(x, gate_up, down, weights, order, act, dtype)


def _sort(expert_ids: Tensor, experts: int) -> _Order:
    flat = expert_ids.flatten()
    order = torch.argsort(flat, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    counts = torch.bincount(flat, minlength=experts).tolist()
    return _Order(order // expert_ids.shape[1], rank.view(expert_ids.shape), counts)


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
        act: tuple[str, float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        rows = x.to(dtype).index_select(0, order.token)
        hidden = rows.new_empty(len(rows), gate_up.shape[1])
        _per_expert(rows, gate_up.to(dtype).transpose(1, 2), order.counts, hidden)
        y = torch.empty_like(rows)
        _per_expert(_activated(hidden, *act), down.to(dtype).transpose(1, 2), order.counts, y)
        ctx.save_for_backward(x, gate_up, down, weights, order.token, order.rank, hidden)
        ctx.counts, ctx.act, ctx.dtype = order.counts, act, dtype
        by_choice = y.index_select(0, order.rank.flatten()).view(*order.rank.shape, y.shape[1])
        wide = _wide(dtype)
        return (by_choice * weights.to(wide)[:, :, None]).sum(1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, weights, token, rank, hidden = ctx.saved_tensors
        counts, dtype = ctx.counts, ctx.dtype
        wide = _wide(dtype)
        row_weight = torch.empty(len(token), 1, dtype=wide)
        row_weight[rank.flatten()] = weights.reshape(-1, 1).to(wide)
        d_rows = d_out.to(dtype).index_select(0, token)
        d_active = d_rows.new_empty(len(token), down.shape[2])
        _per_expert(d_rows, down.to(dtype), counts, d_active)
        active, d_hidden, d_row_weight = _activation_backward(hidden, d_active, row_weight, *ctx.act)
        d_x = d_gate_up = d_down = d_weights = None
        if ctx.needs_input_grad[0]:
            d_x_rows = d_rows.new_empty(d_rows.shape)
            _per_expert(d_hidden, gate_up.to(dtype), counts, d_x_rows)
            d_x = d_x_rows.index_select(0, rank.flatten()).view(*rank.shape, x.shape[1]).sum(1).to(x.dtype)
        if ctx.needs_input_grad[1]:
            d_gate_up = _per_weight(d_hidden, x.to(dtype).index_select(0, token), counts).to(gate_up.dtype)
        if ctx.needs_input_grad[2]:
            d_down = _per_weight(d_rows, active, counts).to(down.dtype)
        if ctx.needs_input_grad[3]:
            d_weights = d_row_weight.index_select(0, rank.flatten()).view(rank.shape).to(weights.dtype)
        return d_x, d_gate_up, d_down, d_weights, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed between the matrix products: at least fp32."""
    return dtype if dtype == torch.float64 else torch.float32


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


def _activated(hidden: Tensor, activation: str, alpha: float, limit: float) -> Tensor:
    """hidden [T, 2I] -> [T, I] in hidden's dtype."""
    gate, up = hidden.to(_wide(hidden.dtype)).chunk(2, dim=-1)
    if activation == "silu":
        return torch.nn.functional.silu(gate).mul_(up).to(hidden.dtype)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return torch.sigmoid(gate * alpha).mul_(gate).mul_(up.add_(1)).to(hidden.dtype)


def _activation_backward(
    hidden: Tensor, d_active: Tensor, row_weight: Tensor, activation: str, alpha: float, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, 2I], d_active [T, I] (without the row's weight), row_weight [T, 1] ->
    (row_weight * a [T, I], gradient of hidden [T, 2I], gradient of row_weight [T]).
    """
    wide = row_weight.dtype
    raw_gate, raw_up = hidden.to(wide).chunk(2, dim=-1)
    d_active = d_active.to(wide)
    if activation == "silu":
        gate, up, alpha = raw_gate, raw_up, 1.0
    else:
        gate, up = raw_gate.clamp(max=limit), raw_up.clamp(-limit, limit).add_(1)
    gate_sigmoid = torch.sigmoid(gate * alpha)
    slope = gate * gate_sigmoid  # of the output in `up`
    active = slope * up
    d_row_weight = (d_active * active).sum(1)
    d_scaled = d_active * row_weight
    d_hidden = torch.empty_like(hidden)
    d_gate, d_up = d_hidden.chunk(2, dim=-1)
    # d(g * sigmoid(alpha g)) / dg = sigmoid + alpha * (g * sigmoid) * (1 - sigmoid)
    d_gate.copy_((1 - gate_sigmoid).mul_(slope).mul_(alpha).add_(gate_sigmoid).mul_(up).mul_(d_scaled))
    d_up.copy_(slope.mul_(d_scaled))
    if activation != "silu":
        # As torch's clamp: a value on the limit still passes the gradient.
        d_gate.masked_fill_(raw_gate > limit, 0)
        d_up.masked_fill_(raw_up.abs() > limit, 0)
    return active.mul_(row_weight).to(hidden.dtype), d_hidden, d_row_weight
