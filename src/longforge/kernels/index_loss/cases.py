"""The shapes that tests and benchmarks of the index loss use."""

from longforge.kernels.msa_cases import Case, Inputs, make_inputs, take

__all__ = ["CASES", "SPEED_CASES", "Case", "Inputs", "make_inputs", "take"]

CASES = (
    Case((1,), 1, 1, 3, 3, 1, 1),
    Case((37, 5, 18), 6, 3, 7, 5, 4, 3),
    Case((70, 16, 1, 33), 4, 2, 16, 16, 16, 2),
    Case((61,), 5, 1, 4, 33, 5, 4),
)
SPEED_CASES = {
    "training": Case((300, 600, 450, 380, 520, 410, 333, 577, 500, 26), 8, 4, 32, 32, 16, 8),
}
