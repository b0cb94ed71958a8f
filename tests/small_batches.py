"""Packed batches as the engine makes them: decoding, verification, short ends of prompts."""

import numpy as np
import torch

from longforge.engine.graphs import Batch
from longforge.kernels.layout import PackedLayout

__all__ = ["BATCHES", "BLOCK", "DRAFTS", "PAGES", "batch_of", "layout_of", "rows_of"]

PAGES = 60
BLOCK = 4
DRAFTS = 3
BATCHES = [
    [(9, 1)],
    [(1, 1)],
    [(30, 4)],
    [(5, 1), (13, 1), (2, 1)],
    [(8, 2), (17, 4), (4, 4), (12, 1), (3, 3)],
    [(6, 1)] * 9,
    [(40, 3), (4, 1)],
]
"""Of each path: its tokens, and how many of them are computed now."""


def batch_of(sizes: list[tuple[int, int]], seed: int) -> Batch:
    """Paths on shuffled pages; the pages differ from batch to batch."""
    rng = np.random.default_rng(seed)
    pages = iter(rng.permutation(PAGES).tolist())
    width = max(-(-total // BLOCK) for total, _ in sizes)
    table = np.full((len(sizes), width), -1, dtype=np.int32)
    for path, (total, _) in enumerate(sizes):
        table[path, : -(-total // BLOCK)] = [next(pages) for _ in range(-(-total // BLOCK))]
    return rows_of(table, [(0, total) for total, _ in sizes], rng.integers(0, 280, 4096))


def rows_of(table: np.ndarray, spans: list[tuple[int, int]], ids: np.ndarray) -> Batch:
    """These positions of each path; ids: where the paths' tokens are taken from."""
    positions = np.concatenate([np.arange(start, end) for start, end in spans])
    paths = np.repeat(np.arange(len(spans)), [end - start for start, end in spans])
    slots = table[paths, positions // BLOCK] * np.int64(BLOCK) + positions % BLOCK
    return Batch(ids[positions + 100 * paths], positions, paths, slots, table)


def layout_of(batch: Batch, device: str = "cpu") -> PackedLayout:
    _, positions, paths, slots, table = (torch.from_numpy(part).to(device) for part in batch)
    return PackedLayout(positions, paths, slots, table, BLOCK)
