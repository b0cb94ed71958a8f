"""Softmax attention over the selected blocks of each query token and group (the Main Branch of MSA)."""

from longforge.kernels.sparse_attention.api import sparse_attention

__all__ = ["sparse_attention"]
