"""How block selection is cut into programs of the GPU: tiles of queries, splits of the sequence.

Only padded sizes decide (tokens, paths, width of the page table), never what the tensors hold, so a decode
step can be captured in a CUDA graph. No choice made here changes a result: see triton_backend.py.
"""

from dataclasses import dataclass

import torch

from longforge.errors import InputError

__all__ = ["Device", "Plan", "make_plan"]

MOST_BLOCK = MOST_DIM = 128
MOST_TOP_K = 64
MOST_GROUPS = 64
MOST_SPLITS = 256
FEWEST_BLOCKS = 4
"""A split is not made shorter than this many blocks."""
MERGED = 4096
"""Most candidates that one program merges."""


@dataclass(frozen=True)
class Device:
    """What of a device matters here."""

    capability: int
    """10 * major + minor; 0 for Triton's interpreter."""
    processors: int


@dataclass(frozen=True)
class Plan:
    """Sizes of one launch. Powers of two, but for tile_tokens, splits and fan."""

    tile_tokens: int
    """Packed query tokens of a tile."""
    groups: int
    """Hkv, padded: a tile's rows are (token, group) pairs, so one read of a key serves all groups."""
    rows: int
    splits: int
    """Programs that share a tile's blocks."""
    slots: int
    """Candidates that a program keeps per row."""
    fan: int
    """Splits that one program merges."""
    dims: int
    keys: int
    chunk: int
    """Columns of one product of tiles: all of dims on tensor cores, few at a time in fp32."""
    warps: int
    stages: int


def make_plan(
    tokens: int,
    paths: int,
    blocks: int,
    groups: int,
    dim: int,
    block_size: int,
    top_k: int,
    dtype: torch.dtype,
    device: Device,
    coded: bool = False,
    splits: int | None = None,
) -> Plan:
    """The plan for N, P, M, Hkv, Di, Bk, K and the dtype of the queries.

    coded: keys are codes, which take registers to read. splits: None fills the device.
    Raises InputError for what the kernels have no tiles for.
    """
    _check(groups, dim, block_size, top_k, dtype)
    exact = dtype == torch.float32
    slots = max(4, _power_of_two(top_k - 1))
    least_rows = _product_rows(exact, device.capability)
    # More rows share a read of a key, until scores, candidates and what it takes to read a key fill the
    # registers.
    wide = not exact and not coded and slots <= 16 and device.capability >= 90
    most_rows = max(least_rows, 128 if wide else 16 if exact and device.capability else 64)
    padded_groups = _power_of_two(groups)
    tile_tokens = max(1, min(-(-tokens // max(1, paths)), most_rows // padded_groups))
    if splits is None:
        splits = 2 * device.processors // -(-tokens // tile_tokens)
    splits = max(1, min(splits, MOST_SPLITS, -(-blocks // FEWEST_BLOCKS)))
    rows = max(least_rows, _power_of_two(tile_tokens * padded_groups))
    dims = max(16, _power_of_two(dim))
    return Plan(
        tile_tokens=tile_tokens,
        groups=padded_groups,
        rows=rows,
        splits=splits,
        slots=slots,
        fan=min(_power_of_two(splits), MERGED // slots),
        dims=dims,
        keys=max(16, _power_of_two(block_size)),
        chunk=16 if exact else dims,
        warps=8 if _many_warps(exact, wide, rows, slots, device.capability) else 4,
        stages=2 if exact else 3,
    )


def _product_rows(exact: bool, capability: int) -> int:
    """Rows of a tile's product that the machine's matrix instruction has, and so the fewest of a tile.

    Decode pads its few rows to it: then prefill and decode run the same instruction. Products in fp32 are
    plain chains of fused multiply-adds, whatever the tile.
    """
    if exact or capability == 0:
        return 16
    return 128 if capability >= 100 else 64


def _many_warps(exact: bool, wide: bool, rows: int, slots: int, capability: int) -> bool:
    """Where 4 warps do not have the registers; found by compiling (the table of NOTES.md)."""
    return rows * slots > 128 * 16 or (rows == 128 and not wide) or (exact and capability < 100)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _check(groups: int, dim: int, block_size: int, top_k: int, dtype: torch.dtype) -> None:
    name = "select_blocks backend 'triton'"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"{name}: float32, bfloat16 or float16 expected, got {dtype}")
    limits = {
        "index_q's Di": (dim, MOST_DIM),
        "block_size": (block_size, MOST_BLOCK),
        "top_k": (top_k, MOST_TOP_K),
        "index_q's Hkv": (groups, MOST_GROUPS),
    }
    for what, (given, most) in limits.items():
        if given > most:
            raise InputError(
                f"{name}: {what} of at most {most} expected, got {given}; say backend='reference'"
            )
