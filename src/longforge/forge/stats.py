"""Confidence interval of a success rate."""

import math

__all__ = ["wilson"]

_Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson(successes: int, n: int, z: float = _Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion (E. B. Wilson, 1927): honest near 0 and 1 and for small n.

    Returns (low, high), each in [0, 1]; (0, 1) when nothing was measured.
    """
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high
