"""Lightning attention on the GPU: launches the kernels beside this as plan.py says.

With LA(q, k, v) for the operation and d for the gradient of its output, the gradients are three more calls of
the same recurrence, two of them from the end of each path to its start:

    d_q = LA(d, v, k)        d_k = reversed LA(v, d, q)        d_v = reversed LA(k, q, d)
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout
from longforge.kernels.lightning_attention import plan
from longforge.kernels.lightning_attention.plan import Spans
from longforge.kernels.lightning_attention.triton_kernels import (
    carry_spans,
    span_outputs,
    span_sums,
    steps,
)
from longforge.kernels.triton_pages import check_sizes, padded, precision_of

__all__ = ["Order", "lightning_attention"]

Order = Literal["steps", "spans"]
CARRY_WIDTH = 1024
"""Numbers of a state that one program carries from span to span."""
STEP_COLUMNS = 32
"""Columns of a state that one program of `steps` holds: rows of 128 bytes."""
STEP_WARPS = 8
SEARCH = 256
"""Tokens that `steps` looks at in one go for those of its path; one size, so that no batch compiles anew."""


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    layout: PackedLayout,
    states: Tensor | None,
    order: Order | None = None,
) -> Tensor:
    """q, k, v [N, H, D], slopes [H], states fp32 [S, H, D, D] or None -> out [N, H, D]. See api.py.

    order: "steps" goes token by token, "spans" in chunks; None chooses by shape. Gradients always take spans.
    Raises InputError for float64, D above 128, and states that are not fp32 with contiguous heads.
    """
    check_sizes("lightning_attention", q, 1, q.shape[2])
    if states is not None:
        _check_states(states)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    slopes, layout = slopes.contiguous(), _contiguous(layout)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        apply: Any = _LightningAttention.apply
        return apply(q, k, v, slopes, layout, states)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not q.numel():
        return out
    alone = plan.steps_alone(q.shape[0], layout.page_table.shape[0])
    if (order or ("steps" if alone else "spans")) == "steps":
        _steps(q, k, v, slopes, layout, states, out)
        return out
    starts = None if states is None else (states, _start_rows(layout))
    spans, chunk = _spans(q, layout, states is not None)
    before = _before(k, v, slopes, layout, spans, starts)
    _outputs(q, k, v, slopes, layout, spans, before, out, states=states, chunk=chunk)
    return out


def _check_states(states: Tensor) -> None:
    if states.dtype != torch.float32 or (states.stride(3), states.stride(2)) != (1, states.shape[3]):
        raise InputError(
            "lightning_attention backend 'triton': fp32 states with contiguous [D, D] expected, got "
            f"{states.dtype} with strides {list(states.stride())}; allocate them as fp32 [S, H, D, D]"
        )


class _LightningAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, slopes, layout, states):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        starts = None
        if states is not None:
            # The pages are overwritten long before the backward pass asks where their paths began.
            rows = _start_rows(layout)
            kept = states[rows.clamp(min=0)]
            own = torch.arange(len(rows), device=rows.device)
            starts = kept, torch.where(rows < 0, -1, own)
        if q.numel():
            spans, chunk = _spans(q, layout, states is not None)
            before = _before(k, v, slopes, layout, spans, starts)
            _outputs(q, k, v, slopes, layout, spans, before, out, states=states, chunk=chunk)
        ctx.save_for_backward(q, k, v, slopes, *(starts or ()))
        ctx.layout = layout
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, k, v, slopes, *starts = ctx.saved_tensors
        layout = ctx.layout
        d_out = d_out if d_out.stride(2) == 1 else d_out.contiguous()
        d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        if q.numel():
            spans, chunk = _spans(q, layout, False)
            before = _before(v, k, slopes, layout, spans, tuple(starts) or None, transposed=True)
            _outputs(d_out, v, k, slopes, layout, spans, before, d_q, chunk=chunk)
            for a, b, c, out in ((v, d_out, q, d_k), (k, q, d_out, d_v)):
                before = _before(b, c, slopes, layout, spans, reverse=True)
                _outputs(a, b, c, slopes, layout, spans, before, out, reverse=True, chunk=chunk)
        return d_q, d_k, d_v, None, None, None


def _contiguous(layout: PackedLayout) -> PackedLayout:
    """The layout with rows that kernels can count through."""
    if layout.positions.is_contiguous() and layout.paths.is_contiguous() and layout.slots.is_contiguous():
        return layout
    return replace(
        layout,
        positions=layout.positions.contiguous(),
        paths=layout.paths.contiguous(),
        slots=layout.slots.contiguous(),
    )


def _start_rows(layout: PackedLayout) -> Tensor:
    """int64 [P]: the page whose state a path starts from, -1 for a path from position 0 or without tokens."""
    table = layout.page_table
    paths = torch.arange(table.shape[0], device=table.device)
    row = torch.searchsorted(layout.paths, paths).clamp(max=len(layout.paths) - 1)
    before = torch.where(layout.paths[row] == paths, layout.positions[row] - 1, -1)
    page = table.gather(1, before.clamp(min=0)[:, None] // layout.block_size).flatten().long()
    return torch.where(before >= 0, page, -1)


def _spans(q: Tensor, layout: PackedLayout, with_states: bool) -> tuple[Spans, int]:
    """How the paths are cut, and the chunk size."""
    chunk = plan.tiles_of(q.dtype, q.shape[2]).tokens
    if with_states:
        chunk = plan.chunk_of_page(layout.block_size, chunk)
    return plan.cut(layout, plan.span_size(q.shape[0], q.shape[1], chunk)), chunk


def _sizes(x: Tensor) -> dict[str, Any]:
    tiles = plan.tiles_of(x.dtype, x.shape[2])
    return {
        "H": x.shape[1], "D": x.shape[2], "DIM": padded(x.shape[2]), "COLUMNS": tiles.columns,
        "PRECISION": precision_of(x.dtype), "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


def _before(
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    layout: PackedLayout,
    spans: Spans,
    starts: tuple[Tensor, ...] | None = None,
    reverse: bool = False,
    transposed: bool = False,
) -> Tensor:
    """fp32 [T, H, D, D], the state before each span.

    starts: states [rows, H, D, D] and the row of each path [P], -1 for zeros; transposed: value dimension
    first. reverse: paths are read from their end.
    """
    _, heads, dim = k.shape
    count, sizes, tokens = spans.first.shape[0], _sizes(k), plan.tiles_of(k.dtype, dim).tokens
    sums = torch.empty((count, heads, dim, dim), dtype=torch.float32, device=k.device)
    span_sums[(count * heads, sizes["DIM"] // sizes["COLUMNS"])](
        k, v, slopes, layout.paths, spans.first, spans.count, spans.path_span, sums,
        *k.stride()[:2], *v.stride()[:2], TOKENS=tokens, REVERSED=reverse, **sizes,
    )  # fmt: skip
    given, rows = starts or (sums, spans.path_span)
    width = min(CARRY_WIDTH, padded(dim * dim))
    carry_spans[(layout.page_table.shape[0] * heads, -(-dim * dim // width))](
        sums, given, rows, slopes, spans.count, spans.path_span, *given.stride()[:2],
        H=heads, D=dim, WIDTH=width, REVERSED=reverse, WITH_STARTS=starts is not None, TRANSPOSED=transposed,
    )  # fmt: skip
    return sums


def _outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    layout: PackedLayout,
    spans: Spans,
    before: Tensor,
    out: Tensor,
    *,
    reverse: bool = False,
    states: Tensor | None = None,
    chunk: int,
) -> None:
    """Writes out [N, H, D], contiguous, and with states those after the last token of each page."""
    sizes, piece = _sizes(q), plan.tiles_of(q.dtype, q.shape[2]).piece
    target = before if states is None else states
    span_outputs[(before.shape[0] * q.shape[1], sizes["DIM"] // sizes["COLUMNS"])](
        q, k, v, slopes, layout.positions, layout.slots, spans.first, spans.count, before, out, target,
        q.shape[0], layout.block_size, chunk,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *target.stride()[:2],
        TOKENS=padded(chunk), PIECE=piece, REVERSED=reverse, WITH_STATES=states is not None, **sizes,
    )  # fmt: skip


def _steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    layout: PackedLayout,
    states: Tensor | None,
    out: Tensor,
) -> None:
    tokens, heads, dim = q.shape
    table = layout.page_table if layout.page_table.stride(1) == 1 else layout.page_table.contiguous()
    target = out if states is None else states
    columns = min(padded(dim), STEP_COLUMNS)
    steps[(table.shape[0] * heads, padded(dim) // columns)](
        q, k, v, slopes, layout.positions, layout.paths, layout.slots, table, out, target,
        tokens, layout.block_size, table.stride(0),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *target.stride()[:2],
        H=heads, D=dim, DIM=padded(dim), COLUMNS=columns, SEARCH=SEARCH,
        WITH_STATES=states is not None, num_warps=STEP_WARPS,
    )  # fmt: skip
