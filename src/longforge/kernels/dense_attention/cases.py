"""The shapes that tests and benchmarks of dense attention use."""

from longforge.kernels.msa_cases import Case, Inputs, make_inputs, take

__all__ = ["CASES", "SPEED_CASES", "WINDOWS", "Case", "Inputs", "make_inputs", "take"]


def _case(
    lengths: tuple[int, ...], heads: int, groups: int, dim: int, block_size: int, tail: int = 0
) -> Case:
    """The index branch does not exist here; its sizes stand at 1."""
    return Case(lengths, heads, groups, dim, 1, block_size, 1, tail)


CASES = (
    _case((1,), 1, 1, 3, 1),
    _case((37, 5, 18), 6, 3, 7, 4),
    _case((130, 16, 1, 33), 4, 2, 16, 16),
    _case((150,), 5, 1, 33, 128),  # more keys than a tile; five heads share one group
    _case((70, 41), 4, 2, 16, 16, tail=3),
    _case((300, 33, 1, 64), 10, 2, 64, 32),
    _case((200, 261), 16, 1, 32, 64, tail=9),
)
WINDOWS = (None, 1, 6, 16, 129)
SPEED_CASES = {
    "training": _case((300, 600, 450, 380, 520, 410, 333, 577, 500, 26), 8, 4, 32, 16),
    "decode 32 x 600": _case((600,) * 32, 8, 4, 32, 16, tail=1),
    "decode 1 x 16K": _case((16381,), 64, 4, 128, 128, tail=1),
}
