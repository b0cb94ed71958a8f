"""The shapes that tests and benchmarks of block-sparse attention use."""

from longforge.kernels.msa_cases import Case, Inputs, make_inputs, take

__all__ = ["CASES", "GPU_CASES", "SMALL_CASES", "SPEED_CASES", "Case", "Inputs", "make_inputs", "take"]

CASES = (
    Case((1,), 1, 1, 3, 3, 1, 1),
    Case((37, 5, 18), 6, 3, 7, 5, 4, 3),
    Case((130, 16, 1, 33), 4, 2, 16, 8, 16, 4),
    Case((61,), 7, 1, 33, 4, 5, 4),  # seven heads share one group; longer than the blocks read
    Case((90, 41), 4, 2, 16, 8, 16, 3, tail=2),
    Case((150, 33, 1, 64), 10, 2, 64, 32, 32, 3),  # five heads of a group in a tile of sixteen
    Case((200, 261), 16, 1, 32, 32, 64, 2, tail=9),
)
SMALL_CASES = (
    Case((1,), 1, 1, 16, 16, 16, 1),
    Case((14, 1, 5), 4, 2, 16, 16, 4, 3),
    Case((19,), 16, 1, 64, 16, 16, 2, tail=5),
    Case((13,), 7, 1, 33, 5, 5, 4),
    Case((40, 37), 2, 2, 128, 64, 16, 2, tail=2),
)
"""Few programs: Triton's interpreter takes milliseconds for each."""
GPU_CASES = (
    Case((700, 1, 1027), 64, 4, 128, 128, 128, 6),
    Case((515, 300), 8, 2, 64, 64, 64, 5),
    Case((333, 90), 2, 2, 128, 64, 32, 8),
    Case((260,), 16, 1, 96, 96, 48, 3),
    Case((2100, 1500), 64, 4, 128, 128, 128, 16, tail=8),
)
SPEED_CASES = {
    "training": Case((300, 600, 450, 380, 520, 410, 333, 577, 500, 26), 8, 4, 32, 32, 16, 8),
    "decode 64 x 1K": Case((1021,) * 64, 8, 4, 32, 32, 16, 8, tail=1),
    "decode 16 x 4K": Case((4093,) * 16, 8, 4, 128, 128, 128, 16, tail=1),
}
