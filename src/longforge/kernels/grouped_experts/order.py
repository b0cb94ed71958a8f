"""What the backends on a GPU share: the pairs (token, choice) sorted by expert, without asking the device.

T = N * k pairs; pair p is choice p % k of token p // k. Every size below follows from shapes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Order", "Tiles", "most_tiles", "product_dtype", "sorted_by_expert", "tiles"]


class Order(NamedTuple):
    """Rows sorted by expert, by pair inside an expert."""

    pair: Tensor
    """int64 [T], the pair of each row."""
    starts: Tensor
    """int32 [E + 1], where each expert's rows begin."""


class Tiles(NamedTuple):
    """Rows cut into tiles of one expert. There is room for the worst case; tiles that are not there have
    count 0."""

    expert: Tensor
    """int32."""
    first: Tensor
    """int32, first row."""
    count: Tensor
    """int32, number of rows."""


def product_dtype(gate_up: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on."""
    device = gate_up.device.type
    if torch.is_autocast_enabled(device) and gate_up.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return gate_up.dtype


def sorted_by_expert(expert_ids: Tensor, experts: int) -> Order:
    """expert_ids int64 [N, k]. The sort is stable, so results do not depend on chance."""
    ordered, pair = torch.sort(expert_ids.flatten(), stable=True)
    bounds = torch.arange(experts + 1, device=ordered.device)
    return Order(pair, torch.searchsorted(ordered, bounds, out_int32=True))


def most_tiles(pairs: int, experts: int, size: int) -> int:
    """Tiles of `size` rows that there can be: the full ones, and one that is not full for each expert that
    can have rows. So few pairs never mean a tile for each of many experts."""
    return pairs // size + min(experts, pairs)


def tiles(order: Order, size: int) -> Tiles:
    """Tiles of at most `size` rows."""
    starts = order.starts
    experts = starts.shape[0] - 1
    each = (starts.diff() + size - 1) // size
    ends = each.cumsum(0)
    t = torch.arange(most_tiles(order.pair.shape[0], experts, size), device=starts.device)
    expert = torch.searchsorted(ends, t, right=True)
    there = expert < experts
    expert = expert.clamp(max=experts - 1)
    first = starts[expert] + (t - (ends - each)[expert]) * size
    count = torch.where(there, (starts[expert + 1] - first).clamp(max=size), 0)
    return Tiles(expert.int(), first.int(), count.int())
