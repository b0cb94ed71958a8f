"""Grouped experts on the GPU: launches the kernels beside this as plan.py says.

With a = act(h), h = gate_up_e x and d the gradient of the output, all grouped alike:

    da_t = down_e^T d_t        dw_t = da_t . a_t        dh_t = w_t act'(h_t) da_t
    dx_t = gate_up_e^T dh_t    ddown_e = sum_t d_t (w_t a_t)^T    dgate_up_e = sum_t dh_t x_t^T

The forward keeps h alone; a is computed once more. Every sum has one order: results are deterministic.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.grouped_experts import plan
from longforge.kernels.grouped_experts.order import Order, Tiles, product_dtype, sorted_by_expert, tiles
from longforge.kernels.grouped_experts.plan import Tile
from longforge.kernels.grouped_experts.triton_kernels import (
    activate_backward,
    gate_up_rows,
    multiply_rows,
    rank_pairs,
    sum_outer_products,
)
from longforge.kernels.triton_pages import padded, precision_of

__all__ = ["grouped_experts"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    """x [N, d], gate_up [E, 2I, d], down [E, d, I], expert_ids and weights [N, k] -> [N, d]. See api.py.

    Raises InputError for float64. Ids outside 0..E-1 are not looked for: such rows hold anything, and nothing
    outside the inputs is read.
    """
    dtype = product_dtype(gate_up)
    if dtype not in DTYPES:
        raise InputError(
            f"grouped_experts backend 'triton': float32, bfloat16 or float16 expected, got {dtype}"
        )
    inputs = x, gate_up, down, weights
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    pairs, experts = expert_ids.numel(), gate_up.shape[0]
    work = _Work(
        expert_ids.shape[1], "oai" in activation, alpha if "oai" in activation else 1.0, limit, dtype,
        plan.rows_of_tile(pairs, experts, dtype),
    )  # fmt: skip
    if trained:
        order = sorted_by_expert(expert_ids, experts)
        apply: Any = _GroupedExperts.apply
        return apply(*inputs, order, tiles(order, work.rows), work)
    if not pairs:
        return torch.zeros_like(x)
    if pairs <= plan.FEW_PAIRS:
        pair, cut = _ranked(expert_ids, experts, work.rows)
    else:
        order = sorted_by_expert(expert_ids, experts)
        pair, cut = order.pair, tiles(order, work.rows)
    return _forward(*inputs, pair, cut, work, keep=False)[0]


@dataclass(frozen=True)
class _Work:
    """What all launches of a call have in common."""

    choices: int
    oai: bool
    alpha: float
    limit: float
    dtype: torch.dtype
    rows: int

    def cast(self, x: Tensor) -> Tensor:
        return x.detach().to(self.dtype).contiguous()

    def sizes(self, tile: Tile) -> dict[str, Any]:
        return {
            "CHOICES": self.choices, "ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.step,
            "PRECISION": precision_of(self.dtype), "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up, down, weights, order, cut, work):
        out, hidden = torch.zeros_like(x), None
        if len(order.pair):
            out, hidden = _forward(x, gate_up, down, weights, order.pair, cut, work, keep=True)
        ctx.save_for_backward(x, gate_up, down, weights, hidden, *order, *cut)
        ctx.work = work
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        x, gate_up, down, weights, hidden, pair, starts, *cut = ctx.saved_tensors
        inputs = x, gate_up, down, weights
        if hidden is None:
            return *(torch.zeros_like(t) for t in inputs), *[None] * 3
        grads = _backward(
            inputs, hidden, d_out, Order(pair, starts), Tiles(*cut), ctx.work, ctx.needs_input_grad
        )
        return *grads, *[None] * 3


def _ranked(expert_ids: Tensor, experts: int, rows: int) -> tuple[Tensor, Tiles]:
    """The order of few pairs, and a tile for each row that begins one."""
    ids = expert_ids.contiguous()
    pairs, own, step = ids.numel(), 32, 64
    pair = torch.empty(pairs, dtype=torch.int64, device=ids.device)
    # Rows of multiples of 16 bytes: one alignment of the pointers, so one compilation for all sizes.
    room = torch.empty((3, -(-pairs // 4) * 4), dtype=torch.int32, device=ids.device)
    expert, first, count = room[:, :pairs]
    rank_pairs[(-(-pairs // own),)](
        ids, pair, expert, first, count, pairs, experts, ROWS=rows, OWN=own, STEP=step, num_warps=4
    )
    return pair, Tiles(expert, first, count)


def _forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    pair: Tensor,
    cut: Tiles,
    work: _Work,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(out [N, d], the rows of gate and up [T, 2I] if they are kept)."""
    n, width = x.shape
    pairs, inner = len(pair), down.shape[2]
    rows = work.cast(x)
    active = rows.new_empty(pairs, inner)
    hidden = rows.new_empty(pairs, 2 * inner) if keep else active
    tile = plan.for_rows(work.rows, 2, width, inner, work.dtype)
    gate_up_rows[(len(cut.count), -(-inner // tile.columns))](
        rows, work.cast(gate_up), pair, *cut, hidden, active, work.alpha, work.limit, width,
        D=width, INNER=inner, OAI=work.oai, KEEP=keep, **work.sizes(tile),
    )  # fmt: skip
    parts = rows.new_empty(pairs, width)
    _multiply(active, work.cast(down), pair, cut, weights, parts, work, transposed=True)
    return _added(parts, n, x.dtype), hidden


def _multiply(
    rows: Tensor,
    weight: Tensor,
    pair: Tensor,
    cut: Tiles,
    scales: Tensor | None,
    out: Tensor,
    work: _Work,
    *,
    transposed: bool = False,
    by_token: bool = False,
    to_pairs: bool = True,
) -> None:
    """out [T, B] = each row [T or N, A] times its expert's weight [E, A, B], or [E, B, A] if transposed."""
    summed, width = rows.shape[1], out.shape[1]
    tile = plan.for_rows(work.rows, 1, summed, width, work.dtype)
    multiply_rows[(len(cut.count), -(-width // tile.columns))](
        rows, weight, pair, *cut, rows if scales is None else scales.contiguous(), out, summed,
        A=summed, B=width, TRANSPOSED=transposed, BY_TOKEN=by_token, TO_PAIRS=to_pairs,
        SCALED=scales is not None, **work.sizes(tile),
    )  # fmt: skip


def _added(parts: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """[N, d]: the k rows of each token, added in fp32."""
    return parts.view(tokens, -1, parts.shape[1]).sum(1, dtype=torch.float32).to(dtype)


def _backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    hidden: Tensor,
    d_out: Tensor,
    order: Order,
    cut: Tiles,
    work: _Work,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gate_up, down, weights; of the first three only those that are wanted."""
    x, gate_up, down, weights = inputs
    pairs, inner, pair = len(hidden), down.shape[2], order.pair
    d_rows = work.cast(d_out)
    active = hidden.new_empty(pairs, inner)
    _multiply(d_rows, work.cast(down), pair, cut, None, active, work, by_token=True, to_pairs=False)
    d_hidden = torch.empty_like(hidden)
    d_weights = torch.empty(weights.shape, dtype=torch.float32, device=x.device)
    rows = 4
    activate_backward[(-(-pairs // rows),)](
        hidden, active, weights.contiguous(), pair, d_hidden, d_weights, work.alpha, work.limit, pairs,
        INNER=inner, OAI=work.oai, ROWS=rows, STEP=min(128, padded(inner)), num_warps=4,
    )  # fmt: skip
    d_x = d_gate_up = d_down = None
    if wanted[2]:
        d_down = _outer(d_rows, active, order, down, work, left_by_token=True)
    if wanted[1]:
        d_gate_up = _outer(d_hidden, work.cast(x), order, gate_up, work, right_by_token=True)
    if wanted[0]:
        parts = hidden.new_empty(pairs, x.shape[1])
        _multiply(d_hidden, work.cast(gate_up), pair, cut, None, parts, work)
        d_x = _added(parts, len(x), x.dtype)
    return d_x, d_gate_up, d_down, d_weights.to(weights.dtype)


def _outer(
    left: Tensor,
    right: Tensor,
    order: Order,
    like: Tensor,
    work: _Work,
    left_by_token: bool = False,
    right_by_token: bool = False,
) -> Tensor:
    """[E, A, B] in the dtype of `like`: the sum over each expert's rows of left [., A] outer right [., B]."""
    height, width = left.shape[1], right.shape[1]
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    tile = plan.for_outer_products(height, width, work.dtype)
    sum_outer_products[(like.shape[0] * -(-height // tile.rows), -(-width // tile.columns))](
        left, right, *order, out, height, width, A=height, B=width, LEFT_BY_TOKEN=left_by_token,
        RIGHT_BY_TOKEN=right_by_token, **work.sizes(tile),
    )  # fmt: skip
    return out
