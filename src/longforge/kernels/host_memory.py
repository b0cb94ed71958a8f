"""Keep memory that large tensors free, instead of giving it back to the system and faulting it in again.

glibc maps every block above a threshold afresh, and the kernel then clears it page by page. A training step
allocates and frees the same large tensors again and again, so on a CPU the page faults can cost more than the
arithmetic. `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` in the environment do the same.
"""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# Parameters of mallopt(3).
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Raises glibc's thresholds for this process. False where the C library is another: nothing changes."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
