"""The public door of lightning attention."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.checks import (
    backend_name,
    check_layout,
    check_same_kind,
    check_shape,
    without_autocast,
)
from longforge.kernels.layout import PackedLayout
from longforge.kernels.lightning_attention import cpu, operator, reference
from longforge.kernels.traced import is_traced

__all__ = ["BACKENDS", "lightning_attention"]


def _triton(*arguments: Any) -> Any:
    """Triton is imported with the first call."""
    from longforge.kernels.lightning_attention import triton_backend

    return triton_backend.lightning_attention(*arguments)


BACKENDS: dict[str, Callable[..., Any]] = {
    "cpu": cpu.lightning_attention,
    "reference": reference.lightning_attention,
}
if find_spec("triton") is not None:
    BACKENDS["triton"] = _triton


def _run(
    backend: str, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, layout: PackedLayout, states: Tensor | None
) -> Tensor:
    # On a GPU the check would wait for the device at every step.
    if layout.positions.device.type == "cpu":
        _check_runs(layout, states is not None)
    # A state is summed over a whole path: autocast may not lower its precision.
    with without_autocast(q.device):
        return BACKENDS[backend](q, k, v, slopes, layout, states)


OPERATORS = operator.define(_run)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay_slopes: Tensor,
    layout: PackedLayout,
    *,
    states: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear attention with a fixed decay: S_t = exp(-s) S_(t-1) + k_t v_t^T, o_t = q_t S_t.

    The Lightning layers of MiniMax-01 (arXiv 2501.08313, section 2.2).

    q, k, v       [N, H, D]; no scale and no normaliser are applied
    decay_slopes  [H], the s of each head, all >= 0 (see `decay_slopes`)
    states        fp32 [S, H, D, D] (key dimension first), one row per physical page: the state after the last
                  token written to that page. A path whose first token here stands at position p > 0 starts
                  from the row of the page that holds p - 1; one at position 0 starts from zero. Every page
                  that gets a token has its row overwritten in place; no gradient flows through states
    Returns out [N, H, D] in q's dtype. Gradients reach q, k and v.
    Under torch.compile the call is an operator, torch.ops.longforge.lightning_attention, or with states
    .lightning_attention_step, which has no gradient; elsewhere it goes straight to the backend (see
    kernels/traced.py).
    Raises InputError for shapes, dtypes or devices that do not fit together, for positions of a path that are
    not consecutive, for a path that starts after position 0 when there are no states (both looked for on the
    CPU alone), and under torch.compile for states together with gradients.
    """
    name = "lightning_attention"
    check_shape(name, "q", q, (None, None, None), "[N, H, D]")
    check_same_kind(name, q=q, k=k, v=v)
    check_shape(name, "k", k, tuple(q.shape), "like q")
    check_shape(name, "v", v, tuple(q.shape), "like q")
    check_shape(name, "decay_slopes", decay_slopes, (q.shape[1],), "[H]")
    chosen = backend_name(name, BACKENDS, backend, q.device, q.dtype)
    check_layout(name, layout, q.shape[0], q.device)
    if states is not None:
        check_shape(name, "states", states, (None, q.shape[1], q.shape[2], q.shape[2]), "[S, H, D, D]")
        if states.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{name}: states in fp32 expected (they are summed over a path), got {states.dtype}"
            )
    if not is_traced(q):
        return _run(chosen, q, k, v, decay_slopes, layout, states)
    if states is None:
        return OPERATORS.whole(q, k, v, decay_slopes, *layout.parts, chosen)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise InputError(
            f"{name}: no gradients expected where states are given under torch.compile, got inputs that "
            "require them; use torch.no_grad()"
        )
    return OPERATORS.step(q, k, v, decay_slopes, states, *layout.parts, chosen)


def _check_runs(layout: PackedLayout, has_states: bool) -> None:
    """The recurrence needs every token between the state it starts from and the last one."""
    same = layout.paths[1:] == layout.paths[:-1]
    if bool((same & (layout.positions[1:] != layout.positions[:-1] + 1)).any()):
        raise InputError("lightning_attention: consecutive positions within each path expected, got a gap")
    starts = torch.cat([layout.positions[:1], layout.positions[1:][~same]])
    if not has_states and bool((starts != 0).any()):
        raise InputError(
            f"lightning_attention: paths from position 0 expected where no states are given, got a start at "
            f"{int(starts.max())}; pass states"
        )
