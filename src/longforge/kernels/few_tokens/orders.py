"""What a step is asked to do: three tables of whole numbers, one after the other in one array.

    passes  [passes, 6]: each one's first and end layer, row and head. Layers behind the decoder's are those
            of MTP modules, which begin with hidden states
    rows    [4, R]: ids, positions, paths, slots
    heads   [3, H]: the row whose logits are wanted; where a module guesses, the row of a later pass that goes
            on from there (-1: none), and the token that it guessed

One array, because each one that Python makes and hands over costs a step of some 100 us half a microsecond.
"""

from collections.abc import Sequence

import numpy as np

from longforge.kernels.numba_host import compiled

__all__ = ["Pass", "order_of", "tables_of"]

Pass = tuple[int, int, int, int, int, int]


def order_of(
    passes: Sequence[Pass], rows: Sequence[Sequence[int]], heads: Sequence[tuple[int, int]]
) -> np.ndarray:
    """int64: the lengths of the tables, then these. heads: (row, later row)."""
    flat = [len(passes), len(rows[0]), len(heads)]
    for one in passes:
        flat += one
    for row in rows:
        flat += row
    for part in zip(*heads, strict=True):
        flat += part
    flat += [0] * len(heads)
    return np.array(flat, np.int64)


@compiled()
def tables_of(order):
    """(passes, rows, heads), views."""
    begin, end = 3, 3 + 6 * order[0]
    rows_end = end + 4 * order[1]
    heads_end = rows_end + 3 * order[2]
    return (
        order[begin:end].reshape(order[0], 6),
        order[end:rows_end].reshape(4, order[1]),
        order[rows_end:heads_end].reshape(3, order[2]),
    )
