"""The pool of pages: keys, values, index keys and Lightning states of every layer, in the one page table."""

import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.model.config import ModelConfig

__all__ = ["KVCache"]


class KVCache:
    """Physical pages of one model. Nobody owns a page here: the caller's page tables say who uses which.

    k[l], v[l]   [pages, Bk, Hkv, D], None for Lightning layers
    index_k[l]   [pages, Bk, Di], None where the layer is not sparse
    state[l]     fp32 [pages, H, D, D], after the last token written to a page; only Lightning layers
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if pages < 1:
            raise InputError(f"pages: at least 1 is needed, got {pages}")
        self.pages = pages
        self.block_size = config.block_size
        self.k: list[Tensor | None] = []
        self.v: list[Tensor | None] = []
        self.index_k: list[Tensor | None] = []
        self.state: list[Tensor | None] = []
        rows = (pages, config.block_size)
        heads = (config.kv_heads, config.head_dim)
        square = (config.heads, config.head_dim, config.head_dim)
        for layer in config.layers:
            lightning = layer.mixer == "lightning"
            sparse = layer.mixer == "sparse"
            self.k.append(None if lightning else torch.zeros(*rows, *heads, device=device, dtype=dtype))
            self.v.append(None if lightning else torch.zeros(*rows, *heads, device=device, dtype=dtype))
            index_k = torch.zeros(*rows, config.index_dim, device=device, dtype=dtype) if sparse else None
            self.index_k.append(index_k)
            state = torch.zeros(pages, *square, device=device, dtype=torch.float32) if lightning else None
            self.state.append(state)

    @property
    def bytes(self) -> int:
        """Memory of all pages, in bytes."""
        held = [t for tensors in (self.k, self.v, self.index_k, self.state) for t in tensors if t is not None]
        return sum(t.numel() * t.element_size() for t in held)
