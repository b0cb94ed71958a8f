"""What every layer of one forward pass shares: layout, angles, cache, and what is asked for on the side."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from longforge.kernels.layout import PackedLayout, as_pages
from longforge.kernels.rotary import Rotary
from longforge.model.cache import KVCache

__all__ = ["Phase", "Step"]

Phase = Literal["sparse", "warmup"]


@dataclass
class Step:
    """One pass of packed tokens through the layers."""

    layout: PackedLayout
    rotary: Rotary
    cache: KVCache | None = None
    phase: Phase = "sparse"
    """warmup: sparse layers attend to the whole prefix, and the index loss is taken over it."""
    index_loss: bool = False
    index_weights: Tensor | None = None
    """Weight of each token in the index loss [N]; None = all one."""
    count_loads: bool = True
    measure_recall: bool = False
    backend: str | None = None
    """Backend of every kernel; None = the fastest for the device."""
    index_losses: list[Tensor] = field(default_factory=list)
    """One scalar per sparse layer passed."""
    expert_loads: list[Tensor] = field(default_factory=list)
    """int64 [E] per expert layer passed."""
    blocks: list[Tensor] | None = None
    """Where to put the blocks that each sparse layer selects, [N, Hkv, K]; None: nowhere."""
    recalls: list[float] = field(default_factory=list)
    """Attention mass inside the selected blocks, one per sparse layer passed."""

    def pages(self, stored: list[Tensor | None] | None, layer: int, fresh: Tensor) -> Tensor:
        """Rows [N, ...] as pages [S, Bk, ...]: written into the cache's tensor of this layer, or laid out."""
        if stored is None:
            return as_pages(fresh, self.layout)
        pool = stored[layer]
        assert pool is not None, "the cache holds this kind of key for this layer"
        pool.view(-1, *pool.shape[2:]).index_copy_(0, self.layout.slots, fresh.to(pool.dtype))
        return pool
