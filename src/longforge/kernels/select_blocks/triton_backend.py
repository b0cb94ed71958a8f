"""Block selection on the GPU: which kernels run for a shape, and the rule of their arithmetic.

A tile is some packed tokens times all groups: rows of queries. A program holds a tile, walks over one split
of the blocks before the queries' own, computes scores on tensor cores, takes each block's maximum and keeps
the best few per row in registers. A second kernel merges the splits' candidates, adds the own block and
sorts. Prefill is one split of large tiles, decode many splits of a small tile; there is one kernel for
both.

The rule of arithmetic. Products of bf16 and fp16 are added on tensor cores, so not in the reference's
order. All paths compute a score with the same function (`triton_kernels.block_maxima`), on tiles of the
same width and of at least as many rows as the matrix instruction has (decode pads its rows): the same
instruction, over the same columns in the same order. Hence a query's scores, and with them its blocks, do
not depend on whether it is asked for in prefill, in a chunk, alone or among drafts. The order of blocks and
the number of splits matter even less: candidates have a strict total order. fp32 takes no tensor cores: one
fused multiply-add per product, in ascending order of the index dimension, so it differs from the
reference's rule only in not rounding the products. Where scores differ by more than the rounding of an fp32
sum the choice is the reference's in every dtype, and where the sums are exact it is the reference's
altogether.

Workspace. The matrix of scores is never held, only 8 bytes per row, split and kept candidate. That is at most
8 * slots * max(N Hkv, 2 * multiprocessors * rows of a tile) bytes, and again 1/fan of it where splits are
merged in two stages. With K <= 17 on an H200: 4.3 MB up to N Hkv = 33,792 rows, then 128 bytes a row, however
long the sequence. Certified selection also holds a block maximum (4 bytes) per row and block, for at most
`SCANNED` bytes at a time; more rows go through it in slabs.

No function here waits for the device. Sizes of grids and workspaces depend on shapes alone.
"""

# Triton's decorators are typed for compiled code, not for launching it.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

# pyright: reportMissingImports=false, reportIndexIssue=false
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout
from longforge.kernels.select_blocks.low_precision import LowPrecisionKeys
from longforge.kernels.select_blocks.triton_kernels import merge_candidates, open_blocks, scan_blocks
from longforge.kernels.select_blocks.triton_plan import Device, Plan, make_plan

__all__ = ["certified_select_blocks", "merge_constants", "scan_constants", "select_blocks"]

SCANNED = 1 << 26
"""Most bytes of block maxima that certified selection holds at once, unless one token has more."""

KEYS_AS_THEY_ARE, FP8, FP8_BY_HAND, INT8 = range(4)
"""How codes are read, as in triton_kernels.py."""


def select_blocks(
    index_q: Tensor,
    index_k_pages: Tensor,
    layout: PackedLayout,
    top_k: int,
    index_k_scales: Tensor | None = None,
    *,
    splits: int | None = None,
) -> Tensor:
    """index_q [N, Hkv, Di], index_k_pages [S, Bk, Di] -> int32 [N, Hkv, K]. See api.py.

    splits: None fills the device. The result does not depend on it.
    """
    n, groups, _ = index_q.shape
    if n == 0 or top_k == 1:
        return _own_blocks(index_q, layout, top_k)
    index_q = _dense(index_q)
    device = _device(index_q.device)
    plan = _plan(index_q, layout, top_k, device, index_k_scales is not None, splits)
    best = index_q.new_empty((plan.splits, n * groups, plan.slots), dtype=torch.int64)
    with _on(index_q.device):
        _scan(index_q, index_k_pages, index_k_scales, None, None, layout, plan, device, best)
        return _finish(best, index_q, layout, top_k, plan)


def certified_select_blocks(
    index_q: Tensor,
    index_k_pages: Tensor,
    low: LowPrecisionKeys,
    layout: PackedLayout,
    top_k: int,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """index_q [N, Hkv, Di], index_k_pages [S, Bk, Di] -> int32 [N, Hkv, K], int32 [N, Hkv]. See api.py."""
    n, groups, _ = index_q.shape
    opened = index_q.new_zeros((n, groups), dtype=torch.int32)
    if n == 0 or top_k == 1:
        return _own_blocks(index_q, layout, top_k), opened
    index_q = _dense(index_q)
    device = _device(index_q.device)
    chosen = index_q.new_empty((n, groups, top_k), dtype=torch.int32)
    slab = max(1, SCANNED // (4 * groups * max(1, layout.page_table.shape[1])))
    with _on(index_q.device):
        for first in range(0, n, slab):
            rows = slice(first, first + slab)
            part = PackedLayout(
                *(layout.positions[rows], layout.paths[rows], layout.slots[rows]),
                layout.page_table,
                layout.block_size,
            )
            plan = _plan(index_q[rows], part, top_k, device, True, splits)
            chosen[rows], opened[rows] = _certified_slab(
                index_q[rows], index_k_pages, low, part, top_k, plan, device
            )
    return chosen, opened


def _certified_slab(
    index_q: Tensor,
    index_k_pages: Tensor,
    low: LowPrecisionKeys,
    layout: PackedLayout,
    top_k: int,
    plan: Plan,
    device: Device,
) -> tuple[Tensor, Tensor]:
    """Scan low-precision keys; merge their lower bounds; open what reaches the K-1-th; merge true scores."""
    n, groups, _ = index_q.shape
    rows = n * groups
    maxima = index_q.new_empty((layout.page_table.shape[1], rows), dtype=torch.float32)
    best = index_q.new_empty((plan.splits, rows, plan.slots), dtype=torch.int64)
    opened = index_q.new_empty((plan.splits, n, groups), dtype=torch.int32)
    _scan(index_q, low.codes, low.scales, low.radius, maxima, layout, plan, device, best)
    lower = _merge_stage(best, layout, top_k, plan)
    while lower.shape[0] > 1:
        lower = _merge_stage(lower, layout, top_k, plan)
    constants = scan_constants(plan, index_q, layout.block_size, device)
    open_blocks[(triton.cdiv(n, plan.tile_tokens), plan.splits)](
        index_q, index_k_pages, low.radius, layout.positions, layout.paths, layout.page_table, maxima, lower,
        best, opened, n, plan.tile_tokens, *index_q.stride()[:2], index_k_pages.stride(0),
        layout.page_table.stride(0), K_ROW=index_k_pages.stride(1), WANTED=top_k - 1, **constants,
        **_launch(plan),
    )  # fmt: skip
    return _finish(best, index_q, layout, top_k, plan), opened.sum(0, dtype=torch.int32)


def _scan(
    index_q: Tensor,
    keys: Tensor,
    scales: Tensor | None,
    radius: Tensor | None,
    maxima: Tensor | None,
    layout: PackedLayout,
    plan: Plan,
    device: Device,
    best: Tensor,
) -> None:
    """best int64 [splits, N * Hkv, slots]: each split's candidates; with radius, maxima [M, N * Hkv] too."""
    n = index_q.shape[0]
    codes = _codes(keys, device)
    if keys.dtype == torch.float8_e4m3fn:
        keys = keys.view(torch.uint8)
    scan_blocks[(triton.cdiv(n, plan.tile_tokens), plan.splits)](
        index_q, keys, best if scales is None else scales, best if radius is None else radius,
        layout.positions, layout.paths, layout.page_table, best if maxima is None else maxima, best,
        n, plan.tile_tokens, *index_q.stride()[:2], keys.stride(0),
        0 if scales is None else scales.stride(0), layout.page_table.stride(0),
        K_ROW=keys.stride(1), CODES=codes, BOUNDS=radius is not None,
        **scan_constants(plan, index_q, layout.block_size, device),
        **_launch(plan),
    )  # fmt: skip


def scan_constants(plan: Plan, index_q: Tensor, block_size: int, device: Device) -> dict[str, Any]:
    """What both kernels that score blocks are compiled for."""
    return {
        "HKV": index_q.shape[1],
        "GROUPS": plan.groups,
        "DIM": index_q.shape[2],
        "DIMS": plan.dims,
        "BLOCK": block_size,
        "ROWS": plan.rows,
        "KEYS": plan.keys,
        "CHUNK": plan.chunk,
        "SLOTS": plan.slots,
        "INTERPRETED": device.capability == 0,
    }


def _launch(plan: Plan) -> dict[str, int]:
    return {"num_warps": plan.warps, "num_stages": plan.stages}


def _merge_stage(lists: Tensor, layout: PackedLayout, top_k: int, plan: Plan) -> Tensor:
    """int64 [lists, rows, slots] -> int64 [lists / fan, rows, slots], each best first."""
    count, rows, slots = lists.shape
    out = lists.new_empty((triton.cdiv(count, plan.fan), rows, slots))
    _merge(lists, layout, out, top_k, plan, groups=1, final=False)
    return out


def _finish(best: Tensor, index_q: Tensor, layout: PackedLayout, top_k: int, plan: Plan) -> Tensor:
    """int64 [splits, N * Hkv, slots] -> int32 [N, Hkv, K]: the own block and the K - 1 best, ascending."""
    while best.shape[0] > plan.fan:
        best = _merge_stage(best, layout, top_k, plan)
    n, groups, _ = index_q.shape
    chosen = index_q.new_empty((n, groups, top_k), dtype=torch.int32)
    _merge(best, layout, chosen, top_k, plan, groups=groups, final=True)
    return chosen


def _merge(
    lists: Tensor, layout: PackedLayout, out: Tensor, top_k: int, plan: Plan, groups: int, final: bool
) -> None:
    count, rows = lists.shape[:2]
    constants = {**merge_constants(plan, top_k), "HKV": groups, "BLOCK": layout.block_size, "FINAL": final}
    merge_candidates[(triton.cdiv(rows, constants["ROWS"]), triton.cdiv(count, plan.fan))](
        lists, layout.positions, out, rows, count, **constants, num_warps=4
    )  # fmt: skip


def merge_constants(plan: Plan, top_k: int) -> dict[str, int]:
    """What the kernel that merges candidates is compiled for."""
    chosen = triton.next_power_of_2(top_k)
    rows = max(1, min(16, 4096 // max(plan.fan * plan.slots, chosen * chosen)))
    return {"ROWS": rows, "FAN": plan.fan, "SLOTS": plan.slots, "WANTED": top_k - 1, "CHOSEN": chosen}


def _own_blocks(index_q: Tensor, layout: PackedLayout, top_k: int) -> Tensor:
    """Int32 [N, Hkv, K] where nothing is ranked: no tokens, or the own block alone."""
    own = (layout.positions // layout.block_size).int()
    return own[:, None, None].expand(*index_q.shape[:2], top_k).contiguous()


def _dense(index_q: Tensor) -> Tensor:
    return index_q if index_q.stride(2) == 1 else index_q.contiguous()


def _plan(
    index_q: Tensor, layout: PackedLayout, top_k: int, device: Device, coded: bool, splits: int | None
) -> Plan:
    paths, blocks = layout.page_table.shape
    return make_plan(
        *(index_q.shape[0], paths, blocks),
        *(index_q.shape[1], index_q.shape[2], layout.block_size, top_k),
        *(index_q.dtype, device, coded, splits),
    )


def _codes(keys: Tensor, device: Device) -> int:
    if keys.dtype == torch.int8:
        return INT8
    if keys.dtype != torch.float8_e4m3fn:
        return KEYS_AS_THEY_ARE
    # Conversions of e4m3 exist from capability 8.9 on.
    return FP8 if device.capability >= 89 else FP8_BY_HAND


@cache
def _device(device: torch.device) -> Device:
    if triton.knobs.runtime.interpret:
        return Device(capability=0, processors=2)
    if device.type != "cuda":
        raise InputError(f"select_blocks backend 'triton': CUDA tensors expected, got {device}")
    found = torch.cuda.get_device_properties(device)
    if found.major < 8:
        raise InputError(
            "select_blocks backend 'triton': a GPU of compute capability 8.0 or later expected, got "
            f"{found.major}.{found.minor}; say backend='reference'"
        )
    return Device(10 * found.major + found.minor, found.multi_processor_count)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
