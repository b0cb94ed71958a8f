"""The launches that are compiled ahead for GPUs that are not here: see triton_build.py.

python -m longforge.kernels.triton_build longforge.kernels.lightning_attention.triton_specs
"""

from dataclasses import dataclass
from typing import Any

import torch

from longforge.kernels.lightning_attention import plan, triton_kernels
from longforge.kernels.lightning_attention.triton_backend import CARRY_WIDTH, SEARCH, STEP_COLUMNS, STEP_WARPS
from longforge.kernels.triton_build import KernelSpec
from longforge.kernels.triton_pages import padded, precision_of

__all__ = ["SHAPES", "specs"]


@dataclass(frozen=True)
class Shape:
    dtype: torch.dtype
    heads: int
    dim: int


SHAPES = {
    "bf16 D128": Shape(torch.bfloat16, 64, 128),
    "bf16 D64": Shape(torch.bfloat16, 16, 64),
    "fp16 D128": Shape(torch.float16, 64, 128),
    "fp32 D128": Shape(torch.float32, 64, 128),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
INDEX = {
    **dict.fromkeys(("SpanFirst", "SpanCount", "PathSpan", "Table"), "*i32"),
    **dict.fromkeys(("Positions", "Paths", "Slots", "StartRow"), "*i64"),
    **dict.fromkeys(("Slopes", "Sums", "Starts", "Before", "States"), "*fp32"),
}


def specs() -> list[KernelSpec]:
    """Every kernel at the first shape; at the others those that multiply tiles, whose registers follow dtype
    and width."""
    first, *others = SHAPES.items()
    return [*_all(*first), *(spec for name, shape in others for spec in _products(name, shape))]


def _all(name: str, shape: Shape) -> list[KernelSpec]:
    return [
        *_products(name, shape),
        _spec(
            f"carry, {name}", triton_kernels.carry_spans, shape,
            {"WIDTH": CARRY_WIDTH, "REVERSED": False, "WITH_STARTS": True, "TRANSPOSED": True}, {},
        ),
        _spec(
            f"steps, {name}", triton_kernels.steps, shape,
            {"COLUMNS": STEP_COLUMNS, "SEARCH": SEARCH, "WITH_STATES": True},
            {"num_warps": STEP_WARPS},
        ),
    ]  # fmt: skip


def _products(name: str, shape: Shape) -> list[KernelSpec]:
    tiles = plan.tiles_of(shape.dtype, shape.dim)
    tiled = {
        "COLUMNS": tiles.columns, "TOKENS": tiles.tokens, "PIECE": tiles.piece, "REVERSED": False,
        "PRECISION": precision_of(shape.dtype),
    }  # fmt: skip
    launch = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    outputs = {
        "outputs": {**tiled, "WITH_STATES": False},
        "outputs and states": {**tiled, "WITH_STATES": True},
    }
    if shape.dim == 128 and shape.dtype == torch.bfloat16:
        outputs["outputs from the end"] = {**tiled, "WITH_STATES": False, "REVERSED": True}
        outputs["outputs and states, Bk16"] = {**tiled, "WITH_STATES": True, "TOKENS": 16}
    return [
        _spec(f"sums, {name}", triton_kernels.span_sums, shape, tiled, launch),
        *(
            _spec(f"{what}, {name}", triton_kernels.span_outputs, shape, how, launch)
            for what, how in outputs.items()
        ),
    ]


def _spec(name: str, kernel: Any, shape: Shape, constants: dict[str, Any], launch: dict[str, Any]):
    """Sizes that the kernel takes are filled in; what is left is a pointer or a 32-bit integer."""
    sizes = {"H": shape.heads, "D": shape.dim, "DIM": padded(shape.dim), **constants}
    fixed = {n: sizes[n] for n in kernel.arg_names if n in sizes}
    types = {**INDEX, **dict.fromkeys(("Q", "K", "V", "Out"), POINTERS[shape.dtype])}
    return KernelSpec(
        name, kernel, {n: types.get(n, "i32") for n in kernel.arg_names if n not in fixed}, fixed,
        unaligned=frozenset({"tokens"}), **launch,
    )  # fmt: skip
