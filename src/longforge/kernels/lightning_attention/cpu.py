"""Lightning attention on the CPU, in chunks (Qin et al. 2024, Lightning Attention-2, algorithm 1).

A chunk is a run of n <= C tokens of one path; with the state S before it and in-chunk positions i, j from 0:

    o_i = sum over j <= i of exp(-s (i - j)) (q_i . k_j) v_j  +  exp(-s (i + 1)) q_i S
    S'  = exp(-s n) S  +  sum over j of exp(-s (n - 1 - j)) k_j v_j^T

All products over all chunks are batched; only the carry of S from chunk to chunk is a loop, over the chunks
of the longest path, all paths side by side. Exponents are never positive, so nothing overflows at any length.
Everything is torch, so autograd differentiates it. With `states`, chunks end where pages end.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout

__all__ = ["lightning_attention"]

CHUNK = 64
"""Tokens of a chunk, about: the work per token and head is about C * D + 2 * D * D."""


class _Chunks(NamedTuple):
    """Chunks ordered by their index inside their path, then the path with most chunks first: so the chunks of
    one index carry their states into the first ones of the next.
    """

    runs: Tensor
    """int64 [R], first packed token of each path, the path with most chunks first."""
    tokens: Tensor
    """int64 [c, C]: packed token of each place, N for an empty place."""
    places: Tensor
    """int64 [N]: place of each token among the c * C."""
    lengths: Tensor
    """int64 [c]."""
    steps: list[int]
    """Chunks at each index inside a path; never increasing."""


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, layout: PackedLayout, states: Tensor | None
) -> Tensor:
    """q, k, v [N, H, D], slopes [H], states [S, H, D, D] or None -> out [N, H, D]. See api.py."""
    if not len(q):
        return torch.zeros_like(q)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    first = torch.diff(layout.paths, prepend=layout.paths.new_tensor([-1])) != 0
    runs = torch.nonzero(first).flatten()
    inputs = q.to(wide), k.to(wide), v.to(wide), slopes.to(wide)
    if len(runs) == len(q):
        out = _one_token_each(*inputs, layout, states)
    else:
        size = CHUNK if states is None else _part_of_page(layout.block_size)
        chunks = _cut(layout, first, runs, size)
        out, ends = _chunked(*inputs, chunks, _starts(layout, chunks.runs, states, inputs[0]))
        if states is not None:
            _store(states, ends.detach(), layout, chunks)
    return out.to(q.dtype)


def _one_token_each(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, layout: PackedLayout, states: Tensor | None
) -> Tensor:
    """The recurrence itself: decode."""
    before = _starts(layout, torch.arange(len(q)), states, q)
    after = torch.exp(-slopes)[:, None, None] * before + k[:, :, :, None] * v[:, :, None, :]
    if states is not None:
        states[layout.slots // layout.block_size] = after.detach().to(states.dtype)
    return (q[:, :, None, :] @ after).squeeze(2)


def _starts(layout: PackedLayout, runs: Tensor, states: Tensor | None, like: Tensor) -> Tensor:
    """[R, H, D, D]: the state before each run's first token."""
    heads, dim = like.shape[1:]
    if states is None:
        return like.new_zeros(len(runs), heads, dim, dim)
    before = layout.positions[runs] - 1
    pages = layout.page_table[layout.paths[runs], before.clamp(min=0) // layout.block_size].long()
    # Selected, not multiplied: the row of a page that was never written may hold anything.
    return torch.where(before[:, None, None, None] >= 0, states.detach()[pages].to(like.dtype), 0)


def _part_of_page(block_size: int) -> int:
    """The chunk size: the page, halved while it is long and even."""
    while block_size > 2 * CHUNK and block_size % 2 == 0:
        block_size //= 2
    return block_size


def _cut(layout: PackedLayout, first: Tensor, runs: Tensor, size: int) -> _Chunks:
    """Cuts each run at absolute positions that are multiples of size."""
    n = len(layout.positions)
    run = torch.cumsum(first, 0) - 1
    index = layout.positions // size - (layout.positions[runs] // size)[run]
    count = index[torch.cat([runs[1:] - 1, runs.new_tensor([n - 1])])] + 1
    order = torch.argsort(count, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    steps = (count[:, None] > torch.arange(int(count.max()))).sum(0)
    chunk = (torch.cumsum(steps, 0) - steps)[index] + rank[run]
    place = torch.minimum(layout.positions % size, torch.arange(n) - runs[run])
    lengths = torch.bincount(chunk)
    width = int(lengths.max())
    places = chunk * width + place
    tokens = torch.full((len(lengths) * width,), n)
    tokens[places] = torch.arange(n)
    return _Chunks(runs[order], tokens.view(-1, width), places, lengths, steps.tolist())


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, chunks: _Chunks, state: Tensor
) -> tuple[Tensor, Tensor]:
    """out [N, H, D] and the state after each chunk [c, H, D, D]; state [R, H, D, D] before the runs."""

    def laid_out(x: Tensor) -> Tensor:
        padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        return padded[chunks.tokens].transpose(1, 2)  # [c, H, C, D]

    q, k, v = laid_out(q), laid_out(k), laid_out(v)
    i = torch.arange(chunks.tokens.shape[1])
    slopes = slopes[:, None]
    inside = torch.exp(-slopes[:, :, None] * (i[:, None] - i).clamp(min=0)).tril()  # [H, C, C]
    left = (chunks.lengths[:, None, None] - 1 - i).clamp(min=0)  # [c, 1, C]
    added = (k * torch.exp(-slopes * left)[..., None]).transpose(2, 3) @ v
    kept = torch.exp(-slopes * chunks.lengths[:, None, None])[..., None]  # [c, H, 1, 1]
    befores, afters, at = [], [], 0
    for count in chunks.steps:
        befores.append(state[:count])
        state = kept[at : at + count] * befores[-1] + added[at : at + count]
        afters.append(state)
        at += count
    out = ((q @ k.transpose(2, 3)) * inside) @ v
    out = out + (q * torch.exp(-slopes * (i + 1))[..., None]) @ torch.cat(befores)
    return out.transpose(1, 2).flatten(0, 1)[chunks.places], torch.cat(afters)


def _store(states: Tensor, ends: Tensor, layout: PackedLayout, chunks: _Chunks) -> None:
    """Writes the state after the last token of each page."""
    last = chunks.tokens.gather(1, chunks.lengths[:, None] - 1).flatten()
    pages = layout.slots // layout.block_size
    following = torch.cat([pages[1:], pages.new_tensor([-1])])
    is_last = pages[last] != following[last]
    states[pages[last[is_last]]] = ends[is_last].to(states.dtype)
