"""Dense attention on the CPU. No scores beyond a tile are ever held, and no key outside the window is read.

In bf16, without a window, ../tiles/ computes it where the processor multiplies bf16. For the rest there are
two ways to compute the forward, chosen path by path:

- direct, where few queries read each key, as in decode: one unit of work is (query, SPAN keys), keys are read
  in their pages, through the page table; the units of a query are merged by their log-sum-exp.
- tiled, from QUERIES_OF_TILED queries on, and for all paths where gradients are wanted: the path's keys and
  values are gathered once, keys transposed so that they are the vector lanes of scores; then online softmax
  over tiles (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1), and a backward that recomputes the
  probabilities from the log-sum-exp (Dao et al. 2022, algorithm 4).

Units and tiles are of constant size: a result depends neither on the number of threads nor on other paths.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from longforge.kernels.layout import PackedLayout
from longforge.kernels.numba_host import compiled, parallel_region, path_starts, raw_array
from longforge.kernels.tiles import attention, attention_backward
from longforge.kernels.vector_code import (
    LANES,
    exponential,
    exponentials,
    largest,
    product,
    round_up,
    softmax,
    transpose,
)

__all__ = ["dense_attention"]

QUERIES_OF_TILED = 8
"""A path with fewer queries reads its keys directly: gathering them would cost more."""
SPAN = 256
"""Keys of one direct unit."""
ROWS = 64
"""Query rows (tokens times G) of one tile, about."""
KEYS = 128
"""Keys of one tile."""


class _Plan(NamedTuple):
    """What the tiled kernels know of the layout; columns number the gathered keys of all tiled paths."""

    tiles: np.ndarray
    """int64 [C, 3]: first token, end token, run of each tile of queries."""
    runs: np.ndarray
    """int64 [U, 4]: first tile, end tile, first column, lowest position, of each tiled path."""
    key_rows: Tensor
    """int64 [columns]: row page * Bk + offset of each gathered key."""


def dense_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    layout: PackedLayout,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [N, Hq, D], k_pages and v_pages [S, Bk, Hkv, D] -> out [N, Hq, D], lse [N, Hq]. See api.py."""
    span = window or np.iinfo(np.int64).max
    if torch.is_grad_enabled() and (q.requires_grad or k_pages.requires_grad or v_pages.requires_grad):
        out, lse = _DenseAttention.apply(q, k_pages, v_pages, layout, span, scale)  # pyright: ignore
    else:
        out, lse = _attend(q, k_pages, v_pages, layout, span, scale, QUERIES_OF_TILED)
    return out, lse.float()


class _DenseAttention(torch.autograd.Function):
    """Gradients to q, k_pages and v_pages."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k_pages: Tensor, v_pages: Tensor, layout: PackedLayout, span: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = _attend(q, k_pages, v_pages, layout, span, scale, 0)
        ctx.save_for_backward(q, k_pages, v_pages, out, lse)
        ctx.layout, ctx.span, ctx.scale = layout, span, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k_pages, v_pages, out, lse = ctx.saved_tensors
        if _on_tiles(q, k_pages, ctx.span):
            grads = attention_backward.gradients(
                q, k_pages, v_pages, None, ctx.layout, ctx.scale, out, lse, d_out
            )
            return *(grad.to(q.dtype) for grad in grads), None, None, None
        plan = _plan(ctx.layout, ctx.span, _tokens_of_tile(q, k_pages), _every_run(ctx.layout))
        heads = k_pages.shape[2]
        rows = _by_group(q, heads).mul_(ctx.scale)
        d_rows = _by_group(d_out, heads)
        delta = (_wide(d_out) * _wide(out)).sum(-1)
        keys, values = _gathered(k_pages, plan.key_rows), _gathered(v_pages, plan.key_rows)
        d_q, d_k, d_v = torch.zeros_like(rows), torch.zeros_like(keys), torch.zeros_like(keys)
        with parallel_region(5 * _work(q, ctx.layout, ctx.span) // 2):
            _backward(
                rows.numpy(), d_rows.numpy(), keys.numpy(), _transposed(keys), _transposed(values),
                lse.numpy(), delta.numpy(), ctx.layout.positions.numpy(), plan.tiles, plan.runs, ctx.span,
                d_q.numpy(), d_k.numpy(), d_v.numpy(),
            )  # fmt: skip
        d_q = d_q.mul_(ctx.scale).transpose(0, 1).flatten(1, 2).to(q.dtype)
        return d_q, _scattered(d_k, plan, k_pages), _scattered(d_v, plan, v_pages), None, None, None


def _attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    layout: PackedLayout,
    span: int,
    scale: float,
    tiled_from: int,
) -> tuple[Tensor, Tensor]:
    """out in q's dtype, lse in the dtype of the computation; paths from tiled_from queries on go tiled."""
    if _on_tiles(q, k_pages, span):
        return attention.attend(q, k_pages, v_pages, None, layout, scale)
    n, heads, _ = q.shape
    wide = _wide(q)
    out, lse = torch.empty(q.shape, dtype=wide.dtype), torch.empty(n, heads, dtype=wide.dtype)
    runs = _every_run(layout)
    is_tiled = runs[:, 1] - runs[:, 0] >= tiled_from
    with parallel_region(_work(q, layout, span)):
        if is_tiled.any():
            _attend_tiled(wide, k_pages, v_pages, layout, span, scale, runs[is_tiled], out, lse)
        if not is_tiled.all():
            _attend_directly(wide, k_pages, v_pages, layout, span, scale, runs[~is_tiled], out, lse)
    return out.to(q.dtype), lse


def _on_tiles(q: Tensor, k_pages: Tensor, span: int) -> bool:
    """Whether ../tiles/ computes it, which knows no window: bf16 where the processor multiplies bf16."""
    return span == np.iinfo(np.int64).max and attention.fits(q, k_pages)


def _attend_tiled(q, k_pages, v_pages, layout, span, scale, runs, out, lse) -> None:
    plan = _plan(layout, span, _tokens_of_tile(q, k_pages), runs)
    rows = _by_group(q, k_pages.shape[2]).mul_(scale)
    keys, values = _gathered(k_pages, plan.key_rows), _gathered(v_pages, plan.key_rows)
    _forward(
        rows.numpy(), _transposed(keys), values.numpy(), layout.positions.numpy(), plan.tiles, plan.runs,
        span, out.numpy(), lse.numpy(),
    )  # fmt: skip


def _attend_directly(q, k_pages, v_pages, layout, span, scale, runs, out, lse) -> None:
    positions, block = layout.positions.numpy(), layout.block_size
    tokens = np.concatenate([np.arange(begin, end) for begin, end in runs])
    first = np.maximum(0, positions[tokens] - (span - 1)) // block
    last = positions[tokens] // block
    size = max(1, SPAN // block)
    parts = (last - first) // size + 1
    first_part = np.cumsum(parts) - parts
    units = np.empty((int(parts.sum()), 3), dtype=np.int64)  # token, first block, end block
    units[:, 0] = np.repeat(tokens, parts)
    units[:, 1] = np.repeat(first, parts) + size * (np.arange(len(units)) - np.repeat(first_part, parts))
    units[:, 2] = np.minimum(units[:, 1] + size, np.repeat(last, parts) + 1)
    part_out = np.empty((len(units), *q.shape[1:]), out.numpy().dtype)
    part_lse = np.empty((len(units), q.shape[1]), out.numpy().dtype)
    _forward_direct(
        (q * scale).contiguous().numpy(), raw_array(k_pages), raw_array(v_pages), units, positions,
        layout.paths.numpy(), layout.page_table.contiguous().numpy(), span, part_out, part_lse,
    )  # fmt: skip
    _merge(part_out, part_lse, tokens, first_part, parts, out.numpy(), lse.numpy())


def _work(q: Tensor, layout: PackedLayout, span: int) -> int:
    """Multiply-adds of a forward."""
    return int(np.minimum(layout.positions.numpy() + 1, span).sum()) * q.shape[1] * q.shape[2] * 2


def _every_run(layout: PackedLayout) -> np.ndarray:
    """int64 [paths with tokens, 2]: first and end token of each."""
    starts = path_starts(layout.paths.numpy())
    return np.stack([starts[:-1], starts[1:]], axis=1)[: len(layout.paths)]


def _tokens_of_tile(q: Tensor, k_pages: Tensor) -> int:
    return max(1, ROWS * k_pages.shape[2] // q.shape[1])


def _plan(layout: PackedLayout, span: int, tokens_of_tile: int, runs: np.ndarray) -> _Plan:
    positions, paths = layout.positions.numpy(), layout.paths.numpy()
    tiles, out_runs, key_rows, columns = [], [], [], 0
    block = layout.block_size
    table = layout.page_table.numpy()
    for u, (begin, end) in enumerate(runs.tolist()):
        lowest = max(0, int(positions[begin]) - (span - 1))
        t = np.arange(lowest, int(positions[end - 1]) + 1)
        key_rows.append(table[paths[begin], t // block].astype(np.int64) * block + t % block)
        starts = range(begin, end, tokens_of_tile)
        out_runs.append((len(tiles), len(tiles) + len(starts), columns, lowest))
        tiles.extend((at, min(end, at + tokens_of_tile), u) for at in starts)
        columns += len(t)
    return _Plan(
        np.array(tiles, dtype=np.int64).reshape(-1, 3),
        np.array(out_runs, dtype=np.int64).reshape(-1, 4),
        torch.from_numpy(np.concatenate([np.empty(0, np.int64), *key_rows])),
    )


def _wide(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.dtype == torch.float64 else x.float()


def _by_group(x: Tensor, groups: int) -> Tensor:
    """A new tensor [Hkv, N, G, D] of x [N, Hq, D]."""
    grouped = _wide(x).unflatten(1, (groups, -1)).transpose(0, 1)
    return grouped.clone(memory_format=torch.contiguous_format)


def _gathered(pages: Tensor, key_rows: Tensor) -> Tensor:
    """[Hkv, columns, D] of pages [S, Bk, Hkv, D]."""
    return _wide(pages.detach().flatten(0, 1).index_select(0, key_rows)).transpose(0, 1).contiguous()


def _transposed(keys: Tensor) -> np.ndarray:
    """[Hkv, D, stride] of keys [Hkv, columns, D], zeros after the columns.

    A tile reads up to a vector's width past the last column. The stride is an odd number of cache lines: with
    a power of two, all rows of a tile would compete for the same few places in the cache.
    """
    heads, columns, dim = keys.shape
    stride = ((columns + 2 * LANES) // LANES | 1) * LANES
    out = keys.new_zeros(heads, dim, stride)
    out[:, :, :columns] = keys.transpose(1, 2)
    return out.numpy()


def _scattered(d_keys: Tensor, plan: _Plan, pages: Tensor) -> Tensor:
    """Gradient of pages [S, Bk, Hkv, D] from that of the gathered keys; shared pages get the sum."""
    flat = torch.zeros(pages.shape[0] * pages.shape[1], *pages.shape[2:], dtype=d_keys.dtype)
    flat.index_add_(0, plan.key_rows, d_keys.transpose(0, 1).contiguous())
    return flat.view(pages.shape).to(pages.dtype)


@compiled(inline="always")
def _seen(position, span, first, width):
    """The columns [from, to) of a tile of keys, positions first..first + width - 1, that a query sees."""
    return max(0, position - span + 1 - first), min(width, position - first + 1)


@compiled(parallel=True, error_model="numpy")
def _forward(q, kt, v, positions, tiles, runs, span, out, lse):
    """q [Hkv, N, G, D] scaled, kt [Hkv, D, stride], v [Hkv, columns, D] -> out [N, Hq, D], lse [N, Hq]."""
    for unit in prange(len(tiles) * q.shape[0]):
        # A thread gets a range of units; tiles are taken from both ends in turn, since later ones are longer.
        g, at = unit // len(tiles), unit % len(tiles)
        tile = at // 2 if at % 2 == 0 else len(tiles) - 1 - at // 2
        _forward_tile(np.int64(g), tiles[tile], q, kt, v, positions, runs, span, out, lse)


@compiled(error_model="numpy")
def _forward_tile(g, tile, q, kt, v, positions, runs, span, out, lse):
    _, n, per_group, dim = q.shape
    stride = kt.shape[2]
    flat_q, flat_k, flat_v = q.reshape(-1), kt.reshape(-1), v.reshape(-1)
    begin, end, run = tile
    rows = (end - begin) * per_group
    first_row = (g * n + begin) * per_group * dim
    scores = np.empty(rows * KEYS, q.dtype)
    acc = np.zeros(rows * dim, q.dtype)
    top = np.full(rows, -np.inf, q.dtype)
    total = np.zeros(rows, q.dtype)
    base = runs[run, 2] - runs[run, 3]
    last = positions[end - 1]
    for first in range(max(runs[run, 3], positions[begin] - span + 1), last + 1, KEYS):
        width = min(KEYS, last + 1 - first)
        product(
            scores, 0, KEYS, flat_q, first_row, dim, 1, flat_k, g * dim * stride + base + first, stride,
            rows, dim, round_up(width), False,
        )  # fmt: skip
        for row in range(rows):
            lo, hi = _seen(positions[begin + row // per_group], span, first, width)
            _online(scores[row * KEYS : row * KEYS + width], lo, hi, row, top, total, acc, dim)
        product(
            acc, 0, dim, scores, 0, KEYS, 1, flat_v, (g * v.shape[1] + base + first) * dim, dim,
            rows, width, dim, True,
        )  # fmt: skip
    for row in range(rows):
        token, head = begin + row // per_group, g * per_group + row % per_group
        lse[token, head] = top[row] + np.log(total[row])
        for d in range(dim):
            out[token, head, d] = acc[row * dim + d] / total[row]


@compiled(error_model="numpy")
def _online(part, lo, hi, row, top, total, acc, dim):
    """One row's step of the online softmax: part becomes exp(scores - top), 0 where nothing is seen."""
    if hi <= lo:
        part[:] = 0
        return
    part[:lo] = 0
    part[hi:] = 0
    best = max(top[row], largest(part[lo:hi]))
    if best > top[row]:
        shrink = exponential(top[row] - best)
        top[row] = best
        total[row] *= shrink
        for d in range(row * dim, (row + 1) * dim):
            acc[d] *= shrink
    exponentials(part, lo, hi - lo, best)
    total[row] += _sum(part[lo:hi])


@compiled(error_model="numpy", fastmath={"nsz", "reassoc"})
def _sum(x):
    total = x.dtype.type(0)
    for i in range(x.shape[0]):
        total += x[i]
    return total


@compiled(parallel=True, error_model="numpy")
def _backward(q, d_out, k, kt, vt, lse, delta, positions, tiles, runs, span, d_q, d_k, d_v):
    """q (scaled), d_out, d_q [Hkv, N, G, D]; k, d_k, d_v [Hkv, columns, D]; kt, vt [Hkv, D, stride]."""
    for unit in prange(len(runs) * q.shape[0]):
        _backward_run(
            np.int64(unit // len(runs)), runs[unit % len(runs)], q, d_out, k, kt, vt, lse, delta, positions,
            tiles, span, d_q, d_k, d_v,
        )  # fmt: skip


@compiled(error_model="numpy")
def _backward_run(g, run, q, d_out, k, kt, vt, lse, delta, positions, tiles, span, d_q, d_k, d_v):
    """One path and group: the unit that owns what it adds to."""
    first_tile, end_tile, column, lowest = run
    highest = positions[tiles[end_tile - 1, 1] - 1]
    room = (tiles[first_tile, 1] - tiles[first_tile, 0]) * q.shape[2] * KEYS  # the first tile is a largest
    p, d_p = np.empty(room, q.dtype), np.empty(room, q.dtype)
    for first in range(lowest, highest + 1, KEYS):
        width = min(KEYS, highest + 1 - first)
        for c in range(first_tile, end_tile):
            begin, end = tiles[c, 0], tiles[c, 1]
            if first <= positions[end - 1] and positions[begin] - span + 1 < first + width:
                _backward_tile(
                    q, d_out, k, kt, vt, lse, delta, positions, g, begin, end, first, width,
                    column - lowest + first, span, p, d_p, d_q, d_k, d_v,
                )  # fmt: skip


@compiled(error_model="numpy")
def _backward_tile(
    q, d_out, k, kt, vt, lse, delta, positions, g, begin, end, first, width, column, span, p, d_p,
    d_q, d_k, d_v,
):  # fmt: skip
    """Adds the part of one tile: dv += p^T d_out, ds = p (d_out v^T - delta), dq += ds k, dk += ds^T q."""
    _, n, per_group, dim = q.shape
    stride = kt.shape[2]
    rows = (end - begin) * per_group
    row = (g * n + begin) * per_group * dim
    key = (g * k.shape[1] + column) * dim
    tile = g * dim * stride + column
    wide = round_up(width)
    flat_q, flat_d_out = q.reshape(-1), d_out.reshape(-1)
    product(p, 0, KEYS, flat_q, row, dim, 1, kt.reshape(-1), tile, stride, rows, dim, wide, False)
    product(d_p, 0, KEYS, flat_d_out, row, dim, 1, vt.reshape(-1), tile, stride, rows, dim, wide, False)
    for r in range(rows):
        token, head = begin + r // per_group, g * per_group + r % per_group
        lo, hi = _seen(positions[token], span, first, width)
        lo, hi = min(lo, width), max(hi, 0)
        part, d_part = p[r * KEYS : (r + 1) * KEYS], d_p[r * KEYS : (r + 1) * KEYS]
        part[:lo] = 0
        d_part[:lo] = 0
        part[hi:width] = 0
        d_part[hi:width] = 0
        _probabilities_and_gradients(part[lo:hi], d_part[lo:hi], lse[token, head], delta[token, head])
    product(d_v.reshape(-1), key, dim, p, 0, 1, KEYS, flat_d_out, row, dim, width, rows, dim, True)
    product(d_k.reshape(-1), key, dim, d_p, 0, 1, KEYS, flat_q, row, dim, width, rows, dim, True)
    product(d_q.reshape(-1), row, dim, d_p, 0, KEYS, 1, k.reshape(-1), key, dim, rows, width, dim, True)


@compiled(parallel=True, error_model="numpy")
def _forward_direct(q, k, v, units, positions, paths, table, span, out, lse):
    """For each unit (token, first block, end block): out [units, Hq, D], lse [units, Hq] over these keys."""
    for unit in prange(len(units)):
        _direct_unit(np.int64(unit), q, k, v, units, positions, paths, table, span, out, lse)


@compiled(error_model="numpy")
def _direct_unit(u, q, k, v, units, positions, paths, table, span, out, lse):
    """All groups of a block before the next block: pages are read from their first byte to their last."""
    _, heads, dim = q.shape
    _, block_size, groups, _ = k.shape
    per_group = heads // groups
    token, first_block, end_block = units[u]
    pages = table[paths[token]]
    # Whole pages are scored, also past the query: what stands there reaches only scores nobody looks at.
    width = round_up(block_size)
    room = (end_block - first_block) * block_size + width
    scores, tile = np.empty(heads * room, q.dtype), np.empty(dim * width, q.dtype)
    flat_q, flat_k, flat_v, flat_out = q.reshape(-1), k.reshape(-1), v.reshape(-1), out.reshape(-1)
    for b in range(first_block, end_block):
        page = np.int64(pages[b]) * block_size * groups
        for g in range(groups):
            transpose(tile, 0, width, flat_k, (page + g) * dim, groups * dim, block_size, dim)
            product(
                scores, g * per_group * room + (b - first_block) * block_size, room,
                flat_q, (token * heads + g * per_group) * dim, dim, 1, tile, 0, width,
                per_group, dim, width, False,
            )  # fmt: skip
    start = first_block * block_size
    low = max(start, positions[token] - span + 1)
    high = min(end_block * block_size, positions[token] + 1)
    for h in range(heads):
        lse[u, h] = softmax(scores, h * room + low - start, high - low, q.dtype.type(1))
    for b in range(first_block, end_block):
        at, upto = max(low, b * block_size), min(high, (b + 1) * block_size)
        row = (np.int64(pages[b]) * block_size + at - b * block_size) * groups
        for g in range(groups):
            product(
                flat_out, (u * heads + g * per_group) * dim, dim,
                scores, g * per_group * room + at - start, room, 1,
                flat_v, (row + g) * dim, groups * dim, per_group, upto - at, dim, b > first_block,
            )  # fmt: skip


@compiled(error_model="numpy")
def _merge(part_out, part_lse, tokens, first_part, parts, out, lse):
    """Softmax over a query's keys from those over its parts: weights exp(lse of the part - lse of all)."""
    for i in range(len(tokens)):
        first, token = first_part[i], tokens[i]
        for h in range(out.shape[1]):
            top = part_lse[first, h]
            for u in range(first, first + parts[i]):
                top = max(top, part_lse[u, h])
            total = part_lse.dtype.type(0)
            for u in range(first, first + parts[i]):
                total += exponential(part_lse[u, h] - top)
            lse[token, h] = top + np.log(total)
            out[token, h] = 0
            for u in range(first, first + parts[i]):
                weight = exponential(part_lse[u, h] - top) / total
                for d in range(out.shape[2]):
                    out[token, h, d] += weight * part_out[u, h, d]


@compiled(error_model="numpy", fastmath={"contract"})
def _probabilities_and_gradients(p, d_p, lse, delta):
    """p: scores become probabilities; d_p: their gradients become those of the scores."""
    for i in range(p.shape[0]):
        p[i] = exponential(p[i] - lse)
        d_p[i] = p[i] * (d_p[i] - delta)
