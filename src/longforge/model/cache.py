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
    tail         [pages, d], hidden state (after the final norm) of a page's last token; with drafts alone

    With drafts, the layers behind the model's own are those of its MTP modules. A module's keys for the pair
    (hidden state of position t-1, token t) stand at position t: so a page's draft keys depend on nothing
    behind the page, and the pair at a page's first position finds its hidden state in the tail of the page
    before. (Kept at t-1, where training puts them, a page's last draft key would depend on the next page.)
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        drafts: bool = False,
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
        modules = config.mtp_modules if drafts else 0
        for layer in (*config.layers, *[config.mtp_spec] * modules):
            lightning = layer.mixer == "lightning"
            sparse = layer.mixer == "sparse"
            self.k.append(None if lightning else torch.zeros(*rows, *heads, device=device, dtype=dtype))
            self.v.append(None if lightning else torch.zeros(*rows, *heads, device=device, dtype=dtype))
            index_k = torch.zeros(*rows, config.index_dim, device=device, dtype=dtype) if sparse else None
            self.index_k.append(index_k)
            state = torch.zeros(pages, *square, device=device, dtype=torch.float32) if lightning else None
            self.state.append(state)
        self.tail = torch.zeros(pages, config.hidden_size, device=device, dtype=dtype) if modules else None

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that holds a part of a page, [pages, ...] each, in an order that only the
        configuration decides. Whoever copies a page copies all of them."""
        lists = (self.k, self.v, self.index_k, self.state, [self.tail])
        return [tensor for tensors in lists for tensor in tensors if tensor is not None]

    @property
    def bytes(self) -> int:
        """Memory of all pages, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)
