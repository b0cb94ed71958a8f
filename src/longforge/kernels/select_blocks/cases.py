"""The shapes that tests and benchmarks of block selection use."""

from longforge.kernels.msa_cases import Case, Inputs, make_inputs, take

__all__ = ["CASES", "GPU_CASES", "SPEED_CASES", "Case", "Inputs", "make_inputs", "take"]

CASES = (
    Case((1,), 1, 1, 3, 3, 1, 1),
    Case((37, 5, 18), 6, 3, 7, 5, 4, 3),
    Case((150, 16, 1, 33), 4, 2, 8, 16, 16, 2),
    Case((203,), 5, 5, 4, 17, 5, 7),
    Case((413, 260), 4, 2, 8, 8, 3, 6, tail=3),  # more blocks than one unit of parallel work
    Case((700, 33, 161), 6, 3, 8, 32, 16, 5),
    Case((1100, 90), 4, 2, 8, 64, 16, 4, tail=9),
)
GPU_CASES = (
    Case((3001, 700, 129), 8, 4, 32, 128, 128, 16),
    Case((9001, 4097, 130), 8, 4, 32, 128, 128, 16, tail=8),
    Case((5003,), 8, 8, 16, 64, 64, 32, tail=700),
    Case((2111, 999), 4, 2, 16, 32, 16, 64, tail=100),
)
"""Sizes of real models, which only a GPU gets through in a test."""
SPEED_CASES = {
    "training": Case((300, 600, 450, 380, 520, 410, 333, 577, 500, 26), 8, 4, 32, 32, 16, 8),
    "decode 64 x 1K": Case((1021,) * 64, 8, 4, 32, 32, 16, 8, tail=1),
    "decode 16 x 4K": Case((4093,) * 16, 8, 4, 128, 128, 128, 16, tail=1),
}
