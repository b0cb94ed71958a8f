"""Softmax attention over the whole prefix of each query, or over a sliding window of it."""

from longforge.kernels.dense_attention.api import dense_attention

__all__ = ["dense_attention"]
