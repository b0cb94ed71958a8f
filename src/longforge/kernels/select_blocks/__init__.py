"""Which blocks of its path each query token attends to (the Index Branch of MSA)."""

from longforge.kernels.select_blocks.api import CertifiedSelection, certified_select_blocks, select_blocks
from longforge.kernels.select_blocks.low_precision import LowPrecisionKeys, lower_precision

__all__ = [
    "CertifiedSelection",
    "LowPrecisionKeys",
    "certified_select_blocks",
    "lower_precision",
    "select_blocks",
]
