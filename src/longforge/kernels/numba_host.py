"""What the numba backends need on the Python side: the decorator, the threads, arrays over tensors.

Threads. numba's `omp` layer (in the Linux wheels) is taken where it loads: it may be entered by two Python
threads at once, an engine and a trainer in one process for example. `workqueue`, numba's last resort, may
not, so under it calls wait for each other. Both use as many threads as torch does.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout
from longforge.kernels.tiles.engine import TILE_ENGINE

__all__ = [
    "SMALL",
    "compiled",
    "layout_arrays",
    "parallel_region",
    "path_starts",
    "raw_array",
    "shares_pages",
    "wide_array",
]

CONFIG: Any = numba.config  # its attributes come from the environment, unseen by type checkers
_ONE_AT_A_TIME = threading.Lock()
CALLED_ROOMS = ("select_blocks", "tiles")
"""Rooms whose compiled functions those of other rooms call."""


def _cache_folder(room: Path) -> str:
    """Where this version of a room's kernels keeps its machine code.

    numba's cache of a function knows when the function's own file changes, not when a file it calls into
    does. Those are the files of its room, the ones beside this file and those of CALLED_ROOMS: their hash in
    the folder's name makes a stale cache impossible.
    """
    sources = hashlib.sha256(str(TILE_ENGINE).encode())  # which is compiled into the code, unseen by numba
    here = Path(__file__).parent
    for folder in sorted({here, *(here / name for name in CALLED_ROOMS), room}):
        for file in sorted(folder.glob("*.py")):
            sources.update(file.read_bytes())
    base = CONFIG.CACHE_DIR or str(
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "longforge" / "numba"
    )
    return str(Path(base) / sources.hexdigest()[:16])


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(cache=True, **options)`, cached in this version's folder; numba's own setting stays as it
    was."""

    def decorate(function: Callable[..., Any]) -> Any:
        before = CONFIG.CACHE_DIR
        CONFIG.CACHE_DIR = _cache_folder(Path(function.__code__.co_filename).parent)
        try:
            return numba.njit(cache=True, **options)(function)
        finally:
            CONFIG.CACHE_DIR = before

    return decorate


SMALL = 1 << 20
"""Multiply-adds below which waking a second thread takes longer than the work."""


@contextmanager
def parallel_region(work: int) -> Iterator[None]:
    """Around every call of a parallel kernel: torch's number of threads (one where the work, in
    multiply-adds, is small), and one caller at a time where needed."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, CONFIG.NUMBA_NUM_THREADS) if work > SMALL else 1)
    # The first call above starts numba's threads, and where both use one OpenMP runtime that changes torch's
    # number.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if numba.threading_layer() == "workqueue":
        with _ONE_AT_A_TIME:
            yield
    else:
        yield


def wide_array(x: Tensor) -> np.ndarray:
    """Contiguous fp32 (fp64 for fp64) array; no copy where the tensor is one already."""
    x = x.detach()
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous().numpy()


def raw_array(x: Tensor) -> np.ndarray:
    """Like wide_array, but bf16 comes as its bits (uint16), which kernels widen as they read: a pool of keys
    is much larger than what one step reads of it."""
    x = x.detach()
    return x.contiguous().view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else wide_array(x)


def layout_arrays(layout: PackedLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions int64 [N], paths int64 [N], page_table int32 [P, M])."""
    return layout.positions.numpy(), layout.paths.numpy(), layout.page_table.contiguous().numpy()


def path_starts(paths: np.ndarray) -> np.ndarray:
    """int64 [paths with tokens + 1]: where each path's tokens start among the packed ones, and N."""
    if len(paths) == 1:  # one token, as in decode: not worth four calls of numpy
        return np.array([0, 1])
    inner = np.flatnonzero(np.diff(paths)) + 1
    return np.concatenate(([0], inner, [len(paths)])).astype(np.int64)


def shares_pages(page_table: np.ndarray) -> bool:
    """Whether a physical page stands in the table more than once."""
    pages = page_table[page_table >= 0]
    return len(np.unique(pages)) < len(pages)
