"""The draws of `draws`, one at a time, for compiled loops."""

import numpy as np

from longforge.kernels.numba_host import compiled

__all__ = ["uniform"]

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


@compiled()
def uniform(seed, position):
    """`draws.uniforms` of one uint64 seed and one uint64 position."""
    c0, c1, c2, c3 = position & _LOW, position >> _SHIFT, np.uint64(0), np.uint64(0)
    k0, k1 = seed & _LOW, seed >> _SHIFT
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (second >> _SHIFT) ^ c1 ^ k0,
            second & _LOW,
            (first >> _SHIFT) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    bits = (c0 << np.uint64(16)) | (c1 >> np.uint64(16))
    return (np.float64(bits) + 0.5) * 2.0**-48
