"""Lightning attention token by token: the specification. See api.py for the contract."""

import torch
from torch import Tensor

from longforge.kernels.layout import PackedLayout

__all__ = ["lightning_attention"]


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, layout: PackedLayout, states: Tensor | None
) -> Tensor:
    """q, k, v [N, H, D], slopes [H], states [S, H, D, D] or None -> out [N, H, D]."""
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    keep = torch.exp(-slopes.to(wide))[:, None, None]
    heads, dim = q.shape[1:]
    state = q.new_zeros((heads, dim, dim), dtype=wide)
    outs, previous = [q.new_zeros((0, heads, dim))], -1
    for i, (path, position) in enumerate(zip(layout.paths.tolist(), layout.positions.tolist(), strict=True)):
        if path != previous:
            state = torch.zeros_like(state)
            if position > 0:
                assert states is not None
                state = states[layout.page_table[path, (position - 1) // layout.block_size].long()].to(wide)
        outer = k[i].to(wide)[:, :, None] * v[i].to(wide)[:, None, :]
        state = keep * state + outer
        outs.append(torch.einsum("hd,hde->he", q[i].to(wide), state)[None].to(q.dtype))
        if states is not None:
            states[int(layout.slots[i]) // layout.block_size] = state.detach().to(states.dtype)
        previous = path
    return torch.cat(outs)
