"""The launches that are compiled ahead for GPUs that are not here: see triton_build.py.

python -m longforge.kernels.triton_build longforge.kernels.index_loss.triton_specs
"""

from dataclasses import dataclass

import torch

from longforge.kernels.index_loss import triton_kernels
from longforge.kernels.index_loss.plan import Tiles, gradient_tiles, log_sum_tiles
from longforge.kernels.triton_build import KernelSpec
from longforge.kernels.triton_pages import padded, precision_of

__all__ = ["SHAPES", "specs"]


@dataclass(frozen=True)
class Shape:
    dtype: torch.dtype
    per_group: int
    dim: int
    index_dim: int
    block_size: int


SHAPES = {
    "bf16 G16 D128 Di128 B128": Shape(torch.bfloat16, 16, 128, 128, 128),
    "bf16 G4 D64 Di64 B64": Shape(torch.bfloat16, 4, 64, 64, 64),
    "fp32 G16 D128 Di128 B128": Shape(torch.float32, 16, 128, 128, 128),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
READ = ("Entries", "Seen", "Deepest", "PieceSegment", "PieceFirst", "PieceCount")


def specs() -> list[KernelSpec]:
    """Every kernel of the operation at every shape."""
    return [spec for name, shape in SHAPES.items() for spec in _both_passes(name, shape)]


def _both_passes(name: str, shape: Shape) -> list[KernelSpec]:
    half, single = POINTERS[shape.dtype], "*fp32"
    inputs = {
        **dict.fromkeys(("IndexQ", "IndexK", "Q", "K"), half), **dict.fromkeys(READ, "*i32"),
        **dict.fromkeys(("TeacherLse", "StudentLse"), single), "scale": "fp32", "index_scale": "fp32",
        **dict.fromkeys(("top_k", "i_page", "i_row", "k_page", "k_row", "k_head"), "i32"),
    }  # fmt: skip
    gradient = {
        **inputs, **dict.fromkeys(("Weights", "Divergence", "DIndexK", "PartialK"), single),
        "PieceRoom": "*i32", "DIndexQParts": half,
    }  # fmt: skip
    tiles = log_sum_tiles(shape.dtype, shape.block_size)
    first = KernelSpec(
        f"log-sum-exps, {name}", triton_kernels.lse_by_page, inputs, _sizes(shape, tiles),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    tiles = gradient_tiles(shape.dtype, shape.block_size)
    second = [
        KernelSpec(
            f"{'gradients' if wanted else 'value alone'}, {name}", triton_kernels.gradient_by_page, gradient,
            {**_sizes(shape, tiles), "WITH_GRADIENTS": wanted}, num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        for wanted in (True, False)
    ]  # fmt: skip
    return [first, *second]


def _sizes(shape: Shape, tiles: Tiles) -> dict[str, object]:
    return {
        "HKV": 4, "G": shape.per_group, "D": shape.dim, "DIM": padded(shape.dim), "DI": shape.index_dim,
        "DIM_I": padded(shape.index_dim), "BLOCK": shape.block_size, "QUERIES": tiles.queries,
        "TILE": tiles.tokens, "PRECISION": precision_of(shape.dtype),
    }  # fmt: skip
