"""How grouped experts are cut for a GPU: tiles by shape alone. NOTES.md beside this has the counts."""

from dataclasses import dataclass

import torch

from longforge.kernels.triton_pages import padded

__all__ = ["FEW_PAIRS", "Tile", "for_outer_products", "for_rows", "rows_of_tile"]

FEW_PAIRS = 512
"""Up to this many pairs the order is counted in one launch instead of sorted in a dozen."""


@dataclass(frozen=True)
class Tile:
    """One program: rows by columns of its result, `step` of the dimension that is summed over at a time."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


def rows_of_tile(pairs: int, experts: int, dtype: torch.dtype) -> int:
    """About the rows that an expert has, as tiles allow."""
    most = 64 if dtype == torch.float32 else 128
    return min(most, padded(-(-pairs // max(1, min(experts, pairs)))))


def for_rows(rows: int, results: int, summed: int, width: int, dtype: torch.dtype) -> Tile:
    """Tiles of rows times a weight [summed, width]; results: how many products a program has (gate and up:
    2)."""
    step = 16 if dtype == torch.float32 else 64
    if rows == 16:
        # Decode reads weights and little else: narrow tiles, so that a few experts are many programs.
        return Tile(rows, min(64 // results, padded(width)), min(2 * step, padded(summed)), 4, stages=3)
    columns = 64 if dtype == torch.float32 or (results == 2 and rows == 128) else 128
    warps = 8 if rows * columns * results >= 128 * 128 else 4
    return Tile(rows, min(columns, padded(width)), min(step, padded(summed)), warps, stages=3)


def for_outer_products(height: int, width: int, dtype: torch.dtype) -> Tile:
    """Tiles of a weight's gradient [height, width], summed over rows."""
    side, step = (64, 16) if dtype == torch.float32 else (128, 64)
    return Tile(min(side, padded(height)), min(side, padded(width)), step, 4 if side == 64 else 8, stages=3)
