"""Which blocks of its path each query token attends to (the Index Branch of MSA)."""

from longforge.kernels.select_blocks.api import select_blocks

__all__ = ["select_blocks"]
