"""Counter-based random numbers: the draw of a position is a function of (seed, position) and nothing else.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011),
section 3, vectorised over the batch. NumPy's Philox needs one generator object per draw, which costs more
than the whole step's sampling at batch 64.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["philox4x32", "uniforms"]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10. counter: 32-bit words in uint64 [4, B]; key: [2, B]. Returns 32-bit words [4, B]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> _SHIFT) ^ c1 ^ k0,
            second & _LOW,
            (first >> _SHIFT) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One draw strictly between 0 and 1 for each (seed, position). uint64 [B] each, float64 [B] out."""
    zero = np.zeros_like(positions)
    counter = np.stack([positions & _LOW, positions >> _SHIFT, zero, zero])
    words = philox4x32(counter, np.stack([seeds & _LOW, seeds >> _SHIFT]))
    # 48 bits, centred: in float64 u * total stays below total, so no draw falls off the end of a
    # distribution.
    bits = (words[0] << np.uint64(16)) | (words[1] >> np.uint64(16))
    return (bits.astype(np.float64) + 0.5) * 2.0**-48
