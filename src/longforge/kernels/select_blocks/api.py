"""The public doors of block selection."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.checks import (
    FLOATS,
    backend_name,
    check_layout,
    check_pages,
    check_same_kind,
    check_shape,
    check_strides,
)
from longforge.kernels.layout import PackedLayout
from longforge.kernels.select_blocks import cpu, operator, reference
from longforge.kernels.select_blocks.low_precision import CODE_DTYPES, LowPrecisionKeys
from longforge.kernels.traced import is_traced

__all__ = ["BACKENDS", "CertifiedSelection", "certified_select_blocks", "select_blocks"]


def _triton(function: str) -> Callable[..., Any]:
    """A function of triton_backend.py; Triton itself is imported with the first call."""

    def compute(*arguments: Any) -> Any:
        from longforge.kernels.select_blocks import triton_backend

        return getattr(triton_backend, function)(*arguments)

    return compute


BACKENDS: dict[str, Callable[..., Any]] = {"reference": reference.select_blocks, "cpu": cpu.select_blocks}
CODED: dict[str, Callable[..., Any]] = {"reference": reference.select_blocks, "cpu": cpu.select_blocks}
"""Backends that take keys as codes and scales."""
CERTIFIED: dict[str, Callable[..., Any]] = {
    "reference": reference.certified_select_blocks,
    "cpu": cpu.certified_select_blocks,
}
if find_spec("triton") is not None:
    BACKENDS["triton"] = CODED["triton"] = _triton("select_blocks")
    CERTIFIED["triton"] = _triton("certified_select_blocks")


class CertifiedSelection(NamedTuple):
    """What certified_select_blocks returns."""

    blocks: Tensor
    """int32 [N, Hkv, K], as select_blocks returns."""
    opened: Tensor
    """int32 [N, Hkv], how many blocks before the own one were looked at in full precision."""

    def share(self, layout: PackedLayout) -> float:
        """Opened blocks over all blocks before the queries' own. On a GPU this waits for the device."""
        before = (layout.positions // layout.block_size).sum() * self.opened.shape[1]
        return float(self.opened.sum()) / max(1, int(before))


def _run(
    backend: str,
    index_q: Tensor,
    index_k_pages: Tensor,
    index_k_scales: Tensor | None,
    layout: PackedLayout,
    top_k: int,
) -> Tensor:
    if index_k_scales is None:
        return BACKENDS[backend](index_q, index_k_pages, layout, top_k)
    return CODED[backend](index_q, index_k_pages, layout, top_k, index_k_scales)


def _run_certified(
    backend: str,
    index_q: Tensor,
    index_k_pages: Tensor,
    low: LowPrecisionKeys,
    layout: PackedLayout,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    return CERTIFIED[backend](index_q, index_k_pages, low, layout, top_k)


OPERATOR = operator.define(_run)
CERTIFIED_OPERATOR = operator.define_certified(_run_certified)


@torch.no_grad()
def select_blocks(
    index_q: Tensor,
    index_k_pages: Tensor,
    layout: PackedLayout,
    top_k: int,
    *,
    index_k_scales: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Selects, per query token and GQA group, the top_k blocks of the query's path (MSA paper 3.1, eq. 5-7).

    A block's score is the maximum over its visible tokens (position <= the query's) of index_q . index_k.
    The query's own block always takes one of the slots; the others go to the best scores, ties to the lower
    block id. 1/sqrt(Di) does not change the ranking and is left out. The rule of arithmetic is part of the
    definition: inputs are rounded to fp32, products are rounded to fp32 and added in ascending order of the
    index dimension. So the choice does not depend on how tokens are packed or chunked, and the backends
    choose the same. Only "triton" adds products of bf16, fp16 and codes in the order of the GPU's matrix
    instruction: there too the choice depends on nothing but query and keys, and it is the reference's
    wherever scores differ by more than rounding (see triton_backend.py). A sum that overflows is an infinite
    score as any other; of blocks whose score is NaN (infinities of both signs met) or -inf it is not said
    whether they are taken.

    index_q         [N, Hkv, Di]
    index_k_pages   [S, Bk, Di], one key shared by all groups; with index_k_scales codes in float8_e4m3fn or
                    int8 (see low_precision.py)
    top_k           K >= 1
    index_k_scales  fp32 [S, Bk]: a key is its codes times its scale, and a score the codes' score times the
                    scale, rounded to fp32
    Returns int32 [N, Hkv, K], logical block ids, ascending, -1 at the end where there are fewer. No gradient.
    Under torch.compile the call is the operator torch.ops.longforge.select_blocks; elsewhere it goes straight
    to the backend (see kernels/traced.py).
    Raises InputError for shapes, dtypes or devices that do not fit together, and for strides that the backend
    cannot take.
    """
    name = "select_blocks"
    check_shape(name, "index_q", index_q, (None, None, None), "[N, Hkv, Di]")
    if index_k_scales is None:
        check_same_kind(name, index_q=index_q, index_k_pages=index_k_pages)
    else:
        _check_codes(name, index_q, index_k_pages, index_k_scales)
    _check_rest(name, index_q, index_k_pages, layout, top_k)
    backends = BACKENDS if index_k_scales is None else CODED
    chosen = backend_name(name, backends, backend, index_q.device, index_q.dtype)
    check_strides(name, chosen, index_k_pages=index_k_pages)
    index_q, index_k_pages = index_q.detach(), index_k_pages.detach()
    if is_traced(index_q):
        return OPERATOR(index_q, index_k_pages, *layout.parts, top_k, chosen, index_k_scales)
    return _run(chosen, index_q, index_k_pages, index_k_scales, layout, top_k)


@torch.no_grad()
def certified_select_blocks(
    index_q: Tensor,
    index_k_pages: Tensor,
    low: LowPrecisionKeys,
    layout: PackedLayout,
    top_k: int,
    *,
    backend: str | None = None,
) -> CertifiedSelection:
    """Selects what select_blocks selects on the same backend, reading few index keys in full precision.

    Low-precision keys are scanned; their radius bounds how far a block's score can be from the one over the
    keys themselves. Only blocks whose upper bound reaches the K-1-th greatest lower bound are scored in full.
    The result is equal, not close: the bound covers quantisation and the rounding of both scores.

    index_q         [N, Hkv, Di]
    index_k_pages   [S, Bk, Di]
    low             the same pages in low precision (lower_precision); complete pages suffice
    top_k           K >= 1
    Returns (blocks int32 [N, Hkv, K], opened int32 [N, Hkv]). No gradient.
    Raises InputError as select_blocks does.
    """
    name = "certified_select_blocks"
    check_shape(name, "index_q", index_q, (None, None, None), "[N, Hkv, Di]")
    check_same_kind(name, index_q=index_q, index_k_pages=index_k_pages)
    _check_codes(name, index_q, low.codes, low.scales)
    check_shape(name, "low.codes", low.codes, tuple(index_k_pages.shape), "[S, Bk, Di]")
    check_shape(name, "low.radius", low.radius, (low.codes.shape[0],), "[S]")
    _check_rest(name, index_q, index_k_pages, layout, top_k)
    chosen = backend_name(name, CERTIFIED, backend, index_q.device, index_q.dtype)
    check_strides(name, chosen, index_k_pages=index_k_pages, codes=low.codes)
    index_q, index_k_pages = index_q.detach(), index_k_pages.detach()
    if is_traced(index_q):
        parts = low.codes, low.scales, low.radius, *layout.parts
        return CertifiedSelection(*CERTIFIED_OPERATOR(index_q, index_k_pages, *parts, top_k, chosen))
    return CertifiedSelection(*_run_certified(chosen, index_q, index_k_pages, low, layout, top_k))


def _check_codes(name: str, index_q: Tensor, codes: Tensor, scales: Tensor) -> None:
    if index_q.dtype not in FLOATS:
        raise InputError(f"{name}: index_q of a floating dtype expected, got {index_q.dtype}")
    if codes.dtype not in CODE_DTYPES:
        raise InputError(f"{name}: codes of one of {[*CODE_DTYPES]} expected, got {codes.dtype}")
    check_shape(name, "scales", scales, tuple(codes.shape[:2]), "[S, Bk]")
    if scales.dtype != torch.float32 or (scales.stride(1) != 1 and scales.shape[1] > 1):
        raise InputError(
            f"{name}: scales in float32 with stride 1 in the last dimension expected, got {scales.dtype} "
            f"with strides {list(scales.stride())}"
        )
    for given in (codes, scales):
        if given.device != index_q.device:
            raise InputError(f"{name}: codes and scales on {index_q.device} expected, got {given.device}")


def _check_rest(name: str, index_q: Tensor, index_k_pages: Tensor, layout: PackedLayout, top_k: int) -> None:
    check_layout(name, layout, index_q.shape[0], index_q.device)
    check_pages(name, "index_k_pages", index_k_pages, layout)
    check_shape(name, "index_k_pages", index_k_pages, (None, None, index_q.shape[2]), "[S, Bk, Di]")
    if top_k < 1:
        raise InputError(f"{name}: top_k of at least 1 expected (the query's own block), got {top_k}")
