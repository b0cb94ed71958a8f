"""Compiled scores of one query against the keys of its blocks, shared by the numba backends.

Keys are the vector lanes of scores, so they are read transposed: all pages of the table at once where many
queries will read them (training, prefill), a block at a time where few do (decode). Both give the same
numbers.
"""

import numpy as np
from numba import prange

from longforge.kernels.numba_host import compiled
from longforge.kernels.vector_code import LANES, product, round_up, transpose

__all__ = ["KeyTiles", "score_blocks", "transposed", "visible"]

KeyTiles = tuple[np.ndarray, np.ndarray]
"""(tiles flat [U * Hkv * D * round_up(Bk)], tile_of int32 [S]): the transposed pages, and which of them a
physical page is. Both are empty where blocks are to be transposed as they are read."""


def transposed(pages: np.ndarray, table: np.ndarray, dtype: np.dtype, reads: int | None = None) -> KeyTiles:
    """The pages [S, Bk, Hkv, D] that stand in the table, transposed, or none where `reads` blocks are too
    few."""
    slots, block_size, groups, dim = pages.shape
    width = (block_size + LANES - 1) // LANES * LANES
    # A path's pages differ from each other, so the first row alone may show that there are too many.
    if reads is not None and reads < 2 * np.count_nonzero(table[:1] >= 0):
        return np.empty(0, dtype), np.empty(0, np.int32)
    used = np.unique(table)
    used = used[used >= 0]
    if reads is not None and reads < 2 * len(used):
        return np.empty(0, dtype), np.empty(0, np.int32)
    tiles = np.zeros(len(used) * groups * dim * width, dtype)
    tile_of = np.full(slots, -1, np.int32)
    tile_of[used] = np.arange(len(used), dtype=np.int32)
    _transpose(pages, used, tiles)
    return tiles, tile_of


@compiled(parallel=True, error_model="numpy")
def _transpose(pages, used, tiles):
    _, block_size, groups, dim = pages.shape
    size = dim * round_up(block_size)
    for unit in prange(len(used) * groups):
        _transpose_block(pages, np.int64(used[unit // groups]), np.int64(unit % groups), tiles, unit * size)


@compiled(error_model="numpy")
def _transpose_block(pages, page, g, tiles, tile):
    """tiles[tile + d * round_up(Bk) + j] = pages[page, j, g, d]."""
    _, block_size, groups, dim = pages.shape
    first = (page * block_size * groups + g) * dim
    transpose(tiles, tile, round_up(block_size), pages.reshape(-1), first, groups * dim, block_size, dim)


@compiled(error_model="numpy")
def visible(block, position, block_size):
    """How many tokens of the block a query at this position may see; 0 for no block (-1)."""
    if block < 0:
        return np.int64(0)
    return max(np.int64(0), min(np.int64(block_size), position - np.int64(block) * block_size + 1))


@compiled(error_model="numpy")
def score_blocks(q, first, rows, k, g, tiles, tile_of, ids, position, pages, scores, room):
    """scores[h * room + t] = q[h] . k[t] for the visible tokens t of the query's blocks, side by side.

    q flat, `rows` heads from `first` on; k [S, Bk, Hkv, D]; tiles flat, as `transposed` makes them, or
    scratch space for one where tile_of is empty; ids the blocks; pages this path's row of the page table. A
    whole tile is scored even where only its first tokens are visible, so `room` is at least round_up(Bk) more
    than the visible tokens. Returns how many those are.
    """
    _, block_size, groups, dim = k.shape
    width = round_up(block_size)
    at = 0
    for slot in range(len(ids)):
        seen = visible(ids[slot], position, block_size)
        if seen == 0:
            continue
        page = np.int64(pages[ids[slot]])
        tile = np.int64(0)
        if len(tile_of):
            tile = (np.int64(tile_of[page]) * groups + g) * dim * width
        else:
            _transpose_block(k, page, g, tiles, tile)
        product(scores, at, room, q, first, dim, 1, tiles, tile, width, rows, dim, width, False)
        at += seen
    return at
