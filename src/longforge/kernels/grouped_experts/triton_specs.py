"""The launches that are compiled ahead for GPUs that are not here: see triton_build.py.

python -m longforge.kernels.triton_build longforge.kernels.grouped_experts.triton_specs
"""

from dataclasses import dataclass
from typing import Any

import torch

from longforge.kernels.grouped_experts import plan, triton_kernels
from longforge.kernels.grouped_experts.plan import Tile
from longforge.kernels.triton_build import KernelSpec
from longforge.kernels.triton_pages import padded, precision_of

__all__ = ["SHAPES", "specs"]


@dataclass(frozen=True)
class Shape:
    dtype: torch.dtype
    rows: int
    width: int
    inner: int
    trained: bool


SHAPES = {
    "bf16 rows 128": Shape(torch.bfloat16, 128, 3072, 1536, True),
    "bf16 rows 64": Shape(torch.bfloat16, 64, 3072, 1536, True),
    "bf16 rows 16": Shape(torch.bfloat16, 16, 3072, 1536, False),
    "bf16 rows 32, d 200, I 72": Shape(torch.bfloat16, 32, 200, 72, True),
    "fp32 rows 64": Shape(torch.float32, 64, 3072, 1536, True),
    "fp32 rows 16": Shape(torch.float32, 16, 3072, 1536, False),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
INDEX = {
    **dict.fromkeys(("TileExpert", "TileFirst", "TileCount", "Starts"), "*i32"),
    **dict.fromkeys(("Ids", "Pair"), "*i64"), "DScales": "*fp32", "alpha": "fp32", "limit": "fp32",
    **dict.fromkeys(("pairs", "experts", "x_row", "rows_row", "left_row", "right_row"), "i32"),
}  # fmt: skip


def specs() -> list[KernelSpec]:
    """Every kernel of the operation at every shape."""
    rank = _spec("order of few pairs", triton_kernels.rank_pairs, torch.bfloat16, ROWS=16, OWN=32, STEP=64)
    return [rank, *(spec for name, shape in SHAPES.items() for spec in _all(name, shape))]


def _all(name: str, shape: Shape) -> list[KernelSpec]:
    d, inner, dtype = shape.width, shape.inner, shape.dtype
    products = [
        _spec(
            f"gate and up{', kept' if shape.trained else ''}, {name}", triton_kernels.gate_up_rows, dtype,
            plan.for_rows(shape.rows, 2, d, inner, dtype), D=d, INNER=inner, OAI=True, KEEP=shape.trained,
        ),
        _multiply(f"down, {name}", shape, A=inner, B=d, TRANSPOSED=True, TO_PAIRS=True, SCALED=True),
    ]  # fmt: skip
    if not shape.trained:
        return products
    outer = [
        _spec(
            f"gradient of {what}, {name}", triton_kernels.sum_outer_products, dtype,
            plan.for_outer_products(height, width, dtype), A=height, B=width, LEFT_BY_TOKEN=left,
            RIGHT_BY_TOKEN=not left,
        )
        for what, height, width, left in (("down", d, inner, True), ("gate and up", 2 * inner, d, False))
    ]  # fmt: skip
    activation = _spec(
        f"gradient of the activation, {name}", triton_kernels.activate_backward, dtype,
        INNER=inner, OAI=True, ROWS=4, STEP=min(128, padded(inner)),
    )  # fmt: skip
    return [
        *products,
        _multiply(f"gradient of activations, {name}", shape, A=d, B=inner, BY_TOKEN=True),
        _multiply(f"gradient of x, {name}", shape, A=2 * inner, B=d, TO_PAIRS=True),
        activation,
        *outer,
    ]


def _multiply(name: str, shape: Shape, A: int, B: int, **flags: bool) -> KernelSpec:
    flags = {"TRANSPOSED": False, "BY_TOKEN": False, "TO_PAIRS": False, "SCALED": False, **flags}
    tile = plan.for_rows(shape.rows, 1, A, B, shape.dtype)
    return _spec(name, triton_kernels.multiply_rows, shape.dtype, tile, A=A, B=B, **flags)


def _spec(name: str, kernel: Any, dtype: torch.dtype, tile: Tile | None = None, **given: Any) -> KernelSpec:
    """What the kernel takes and nobody fixed is an index or a pointer to the inputs' dtype."""
    sizes: dict[str, Any] = {"CHOICES": 8, "PRECISION": precision_of(dtype), **given}
    launch: dict[str, Any] = {}
    if tile is not None:
        sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.step, **sizes}
        launch = {"num_warps": tile.warps, "num_stages": tile.stages}
    fixed = {n: sizes[n] for n in kernel.arg_names if n in sizes}
    rest = {n: INDEX.get(n, POINTERS[dtype]) for n in kernel.arg_names if n not in fixed}
    return KernelSpec(name, kernel, rest, fixed, unaligned=frozenset({"pairs", "experts"}), **launch)
