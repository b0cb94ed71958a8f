"""The launches of block selection that are compiled ahead and counted. See ../triton_build.py.

python -m longforge.kernels.triton_build longforge.kernels.select_blocks.triton_specs
"""

from collections.abc import Iterator
from typing import Any

import torch

from longforge.kernels.select_blocks.triton_backend import (
    FP8,
    FP8_BY_HAND,
    INT8,
    KEYS_AS_THEY_ARE,
    merge_constants,
    scan_constants,
)
from longforge.kernels.select_blocks.triton_kernels import merge_candidates, open_blocks, scan_blocks
from longforge.kernels.select_blocks.triton_plan import Device, Plan, make_plan
from longforge.kernels.triton_build import KernelSpec

__all__ = ["specs"]

DEVICES = (Device(80, 108), Device(90, 132), Device(100, 148))
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
CODES = {KEYS_AS_THEY_ARE: None, FP8: "*u8", FP8_BY_HAND: "*u8", INT8: "*i8"}
EXCUSES = {(100, torch.float32): "some bytes of loop-invariant addresses; fp32 keys are for checking"}
MILLION = 8192
"""Blocks of 128 tokens."""


def specs() -> Iterator[KernelSpec]:
    """M3's layer (4 groups, index dim 128, blocks of 128, k 16) unless the name says otherwise."""
    for device in DEVICES:
        fp8 = FP8 if device.capability >= 89 else FP8_BY_HAND
        yield _scan("prefill bf16", device, tokens=8192)
        yield _scan("prefill fp32", device, tokens=8192, dtype=torch.float32)
        yield _scan("prefill bf16 k64", device, tokens=8192, top_k=64)
        yield _scan("prefill fp8", device, tokens=8192, codes=fp8)
        yield _scan("decode bf16", device)
        yield _scan("decode fp32", device, dtype=torch.float32)
        yield _scan("decode fp8", device, codes=fp8)
        yield _scan("decode int8", device, codes=INT8)
        yield _scan("verify 8 bf16", device, tokens=8)
        yield _scan("decode fp16 8x64x64", device, groups=8, dim=64, block_size=64, dtype=torch.float16)
        yield _scan("decode bf16 4x32x16", device, dim=32, block_size=16)
        yield _scan("certified scan fp8", device, codes=fp8, bounds=True)
        yield _open("certified open bf16", device, coded=True)
        yield _merge("merge 256 x 16", device, final=True)
        yield _merge("merge 64 x 64", device, final=False, top_k=64)
        yield _merge("merge 1 x 16", device, final=True, tokens=8192)


def _plan(device: Device, shape: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
    sizes = {
        **{"tokens": 1, "paths": 1, "blocks": MILLION, "groups": 4, "dim": 128},
        **{"block_size": 128, "top_k": 16, "dtype": torch.bfloat16, **shape},
    }
    plan = make_plan(**sizes, device=device)
    queries = torch.empty((1, sizes["groups"], sizes["dim"]), device="meta")
    return plan, {
        **scan_constants(plan, queries, sizes["block_size"], device),
        **{"K_ROW": sizes["dim"], **sizes},
    }


def _spec(
    name: str, kernel: Any, types: dict[str, str], values: dict[str, Any], device: Device, **launch: Any
):
    constants = {n: values[n] for n in kernel.arg_names if n.isupper() and n not in types}
    arguments = {n: types.get(n, "i32") for n in kernel.arg_names if n not in constants}
    return KernelSpec(
        name, kernel, arguments, constants, unaligned=frozenset({"tokens", "tile_tokens", "rows", "lists"}),
        targets=(device.capability,), **launch,
    )  # fmt: skip


def _pointers(dtype: torch.dtype) -> dict[str, str]:
    return {
        **{"Q": TYPES[dtype], "Keys": TYPES[dtype], "Radius": "*fp32", "Scales": "*fp32", "Maxima": "*fp32"},
        **{"Positions": "*i64", "Paths": "*i64", "Table": "*i32", "Best": "*i64", "Lower": "*i64"},
        **{"Opened": "*i32", "Lists": "*i64"},
    }


def _scan(
    name: str, device: Device, codes: int = KEYS_AS_THEY_ARE, bounds: bool = False, **shape: Any
) -> KernelSpec:
    plan, values = _plan(device, {"coded": codes != KEYS_AS_THEY_ARE, **shape})
    types = _pointers(values["dtype"])
    types["Keys"] = CODES[codes] or types["Keys"]
    return _spec(
        name, scan_blocks, types, {**values, "CODES": codes, "BOUNDS": bounds}, device,
        num_warps=plan.warps, num_stages=plan.stages,
        excused=EXCUSES.get((device.capability, values["dtype"]), ""),
    )  # fmt: skip


def _open(name: str, device: Device, **shape: Any) -> KernelSpec:
    plan, values = _plan(device, shape)
    return _spec(
        name, open_blocks, _pointers(values["dtype"]), {**values, "WANTED": values["top_k"] - 1}, device,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip


def _merge(name: str, device: Device, final: bool, **shape: Any) -> KernelSpec:
    plan, values = _plan(device, shape)
    constants = {**merge_constants(plan, values["top_k"]), "FINAL": final}
    types = {**_pointers(values["dtype"]), "Out": "*i32" if final else "*i64"}
    return _spec(
        name, merge_candidates, types, {**values, **constants}, device,
    )  # fmt: skip
