"""Which of this processor's instructions multiply bf16 and int8 matrices.

"amx"     Intel's matrix tiles (Sapphire Rapids and later): 16 x 16 results, 32 products each, an instruction
"avx512"  vectors of bf16 pairs and int8 quads (AVX512-BF16 and VNNI: Cooper Lake, Zen 4 and later)
None      neither, or a numba that was told to compile for another processor: bf16 is widened to fp32
"""

import ctypes
import os
import platform
import sys
from typing import Any

import numba
from llvmlite import binding

from longforge.errors import InputError

__all__ = ["TILE_ENGINE"]

CHOICE = "LONGFORGE_CPU_TILES"
"""Environment variable: amx, avx512 or none instead of the best there is, to compare or to rule out."""
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def _best() -> str | None:
    config: Any = numba.config
    if sys.platform != "linux" or platform.machine() != "x86_64" or config.CPU_NAME or config.CPU_FEATURES:
        return None
    has = binding.get_host_cpu_features()
    if not all(has.get(f"avx512{part}") for part in ("bf16", "bw", "vl", "vnni")):
        return None
    tiles = all(has.get(f"amx-{part}") for part in ("tile", "bf16", "int8"))
    return "amx" if tiles and _may_use_tiles() else "avx512"


def _may_use_tiles() -> bool:
    """Linux hands out the 8 KiB of tile registers only to processes that ask for them."""
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def _chosen() -> str | None:
    best, wish = _best(), os.environ.get(CHOICE, "")
    if wish not in ("", "amx", "avx512", "none"):
        raise InputError(f"{CHOICE}: amx, avx512 or none expected, got {wish!r}")
    if wish == "none":
        return None
    if wish and (best is None or (wish, best) == ("amx", "avx512")):
        raise InputError(f"{CHOICE}: {best or 'none'}, what this processor has, expected, got {wish!r}")
    return wish or best


TILE_ENGINE = _chosen()
