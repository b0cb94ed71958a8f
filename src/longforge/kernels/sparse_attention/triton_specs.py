"""The launches that are compiled ahead for GPUs that are not here: see triton_build.py.

python -m longforge.kernels.triton_build longforge.kernels.sparse_attention.triton_specs
"""

from dataclasses import replace
from typing import Any

import torch

from longforge.kernels.sparse_attention import plan, triton_backward, triton_forward
from longforge.kernels.sparse_attention.plan import Shape
from longforge.kernels.triton_build import KernelSpec
from longforge.kernels.triton_pages import add_parts_kernel, add_pieces_kernel, padded, precision_of

__all__ = ["SHAPES", "specs"]

SHAPES = {
    "bf16 G16 D128 B128": Shape(torch.bfloat16, 8192, 4, 16, 128, 128, 16),
    "bf16 G4 D64 B64": Shape(torch.bfloat16, 8192, 4, 4, 64, 64, 16),
    "fp32 G16 D128 B128": Shape(torch.float32, 8192, 4, 16, 128, 128, 16),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
STRIDES = dict.fromkeys(("k_page", "k_row", "k_head", "v_page", "v_row", "v_head"), "i32")
PIECES = ("Entries", "Seen", "Deepest", "PieceSegment", "PieceFirst", "PieceCount")

FEW_BYTES = (
    "at most five values from before the loop wait in local memory (sm_80: 1 load among a step's 1,000 "
    "instructions; sm_90 with Triton 3.6: 5 among 930; sm_100 with 3.6: 12 bytes)"
)


def specs() -> list[KernelSpec]:
    """Every kernel of the operation at every shape."""
    return [
        spec for name, shape in SHAPES.items() for spec in [*_forward(name, shape), *_backward(name, shape)]
    ]


def _sizes(shape: Shape, tiles: plan.Tiles) -> dict[str, object]:
    return {
        "HKV": shape.groups, "G": shape.per_group, "D": shape.dim, "BLOCK": shape.block_size,
        "ROWS": tiles.rows, "DIM": padded(shape.dim), "TILE": tiles.tokens,
        "PRECISION": precision_of(shape.dtype),
    }  # fmt: skip


def _forward(name: str, shape: Shape) -> list[KernelSpec]:
    half, single = POINTERS[shape.dtype], "*fp32"
    layout = {"Blocks": "*i32", "Positions": "*i64", "Paths": "*i64", "Table": "*i32", "table_row": "i32"}
    inputs = {"Q": half, "K": half, "V": half, **STRIDES}
    tiles, pages = plan.by_query_tiles(shape), plan.forward_by_page_tiles(shape)
    by_query = {**inputs, **layout, "Lse": single, "scale_log2": "fp32", "to_lse": "fp32"}
    constants = {**_sizes(shape, tiles), "TOP_K": shape.top_k}
    options: dict[str, Any] = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    by_page = {**inputs, **dict.fromkeys(PIECES, "*i32"), "Parts": half, "PartLse": single}
    kernel = triton_forward.forward_by_query
    whole = KernelSpec(
        f"forward by query, {name}", kernel, {**by_query, "Out": half},
        {**constants, "SLOTS": shape.top_k}, **options,
    )  # fmt: skip
    split = KernelSpec(
        f"forward split, {name}", kernel, {**by_query, "Out": single}, {**constants, "SLOTS": 1}, **options
    )
    paged = KernelSpec(
        f"forward by page, {name}", triton_forward.forward_by_page,
        {**by_page, "scale_log2": "fp32", "top_k": "i32"}, _sizes(shape, pages),
        num_warps=pages.warps, num_stages=pages.stages,
    )  # fmt: skip
    combined = KernelSpec(
        f"combine, {name}", triton_forward.combine,
        {"Parts": half, "PartLse": single, "Out": half, "Lse": single, "parts": "i32"},
        {"G": shape.per_group, "D": shape.dim, "DIM": padded(shape.dim), "STEP": 16},
    )  # fmt: skip
    return [whole, split, paged, combined]


def _backward(name: str, shape: Shape) -> list[KernelSpec]:
    half, single = POINTERS[shape.dtype], "*fp32"
    inputs = {"Q": half, "K": half, "V": half, "DOut": half, "Lse": single, "Delta": single, **STRIDES}
    layout = {"Blocks": "*i32", "Positions": "*i64", "Paths": "*i64", "Table": "*i32", "table_row": "i32"}
    queries = plan.by_query_tiles(shape)
    numbers = {"scale": "fp32", "top_k": "i32"}
    paged = {
        **inputs, **dict.fromkeys((*PIECES, "PieceRoom"), "*i32"), **numbers,
        **dict.fromkeys(("DK", "DV", "PartialK", "PartialV"), single), "DQParts": half,
    }  # fmt: skip
    padding = {"D": shape.dim, "DIM": padded(shape.dim)}
    kernels = [
        _gradients(name, replace(shape, capability=max(targets)), paged, with_dq, targets)
        for with_dq in (False, True)
        for targets in ((80, 90), (100,))
    ]
    d_q = KernelSpec(
        f"dq by query, {name}", triton_backward.d_q_by_query,
        {**inputs, **layout, "DQ": half, "scale": "fp32"},
        {**_sizes(shape, queries), "TOP_K": shape.top_k}, num_warps=queries.warps, num_stages=2,
    )  # fmt: skip
    products = KernelSpec(
        f"output products, {name}", triton_backward.output_products,
        {"Out": half, "DOut": half, "Delta": single, "rows": "i32"}, {**padding, "ROWS": 16},
    )  # fmt: skip
    parts = KernelSpec(
        f"sum of parts, {name}", add_parts_kernel,
        {"Parts": half, "Shown": "*i32", "Out": half, "top_k": "i32", "factor": "fp32"},
        {**padding, "SUBS": 1, "G": shape.per_group, "STEP": 16},
    )  # fmt: skip
    pieces = KernelSpec(
        f"sum of pieces, {name}", add_pieces_kernel,
        {"Partial": single, "SegmentRoom": "*i32", "SegmentPieces": "*i32", "Out": single, "groups": "i32"},
        {**padding, "BLOCK": shape.block_size, "ROWS": 16},
    )  # fmt: skip
    return [*kernels, d_q, products, parts, pieces]


def _gradients(
    name: str, shape: Shape, arguments: dict[str, str], with_dq: bool, targets: tuple[int, ...]
) -> KernelSpec:
    tiles = plan.backward_by_page_tiles(shape)
    return KernelSpec(
        f"backward by page{', with dq' * with_dq}, {name}", triton_backward.backward_by_page, arguments,
        {**_sizes(shape, tiles), "WITH_DQ": with_dq}, num_warps=tiles.warps, num_stages=tiles.stages,
        excused=FEW_BYTES * (shape.dtype == torch.bfloat16 and shape.dim == 128),
        targets=targets,
    )  # fmt: skip
