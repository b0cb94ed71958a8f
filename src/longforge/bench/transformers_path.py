"""transformers' own MSA, from the tensors that its projections would give to the attention output.

Its model of MiniMax M3 selects blocks with a matrix product and a top-k, writes the selection out as a mask
over all heads, queries and keys, and runs dense attention under it: memory grows with queries times keys.
Everything here is the library's code; only tensors are handed in. Imports transformers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLAttention

from longforge.bench.inputs import Inputs

__all__ = ["TransformersMsa"]


class TransformersMsa:
    """One sparse layer of transformers, without its projections.

    What a step runs, and all that is timed:

        select  the indexer's forward: scores in fp32, causal mask, maximum of each block, top-k
        attend  the indexer's mask from the selection, then transformers' SDPA function under that mask

    The indexer projects and scores in one method. So its projections are modules that return the tensors
    that are there, its norms return what they get, no channel is rotated, and its cache has all index keys
    already. What remains of that are copies of the index queries and of one row of zeros for each. The causal
    mask is made once, outside of a step, as a model makes it once for all layers. Of "eager" and "sdpa", the
    two that take the mask, sdpa is the faster; a kernel from the hub, which transformers can use instead of
    both, is not tried.
    """

    def __init__(self, i: Inputs) -> None:
        shape, work = i.shape, i.work
        config = MiniMaxM3VLTextConfig(
            num_hidden_layers=1,
            layer_types=["minimax_m3_sparse"],
            hidden_size=shape.dim,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.groups,
            head_dim=shape.dim,
            index_n_heads=shape.groups,
            index_head_dim=shape.index_dim,
            index_block_size=shape.block_size,
            index_topk_blocks=shape.top_k,
            index_local_blocks=1,
        )
        with torch.device("meta"):
            self._layer: Any = MiniMaxM3VLAttention(config, layer_idx=0).eval()
        self._indexer: Any = self._layer.indexer
        self._indexer.q_proj = _Given(i.index_q[None])
        self._indexer.k_proj = _Given(i.index_q.new_zeros(1, work.queries, 1, shape.index_dim))
        self._indexer.q_norm = self._indexer.k_norm = nn.Identity()
        self._interface: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        self._q = i.q.transpose(0, 1)[None].contiguous()
        self._k, self._v = i.k_by_head, i.v_by_head
        self._cache = _FullCache(i.index_k_in_order)
        self._nothing = i.q.new_empty(1, work.queries, 0)
        self._positions = i.layout.positions[None]
        keys = torch.arange(work.keys, device=i.device)
        self._causal = (keys <= i.layout.positions[:, None])[None, None]

    def select(self) -> Tensor:
        """int64 [1, Hkv, n, K]: logical block ids, best first, -1 at the end where there are fewer."""
        no_rotation = (self._nothing, self._nothing)
        return self._indexer(self._nothing, no_rotation, self._cache, self._positions)

    def attend(self, blocks: Tensor) -> Tensor:
        """The attention output [n, Hq, D] over the selected blocks."""
        q = self._q
        mask = self._indexer.build_block_mask(
            blocks, self._causal, self._k.shape[2], q.dtype, q.device, self._positions
        )
        out, _ = self._interface(
            self._layer, q, self._k, self._v, mask, dropout=0.0, scaling=self._layer.scaling
        )
        return out[0]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Both."""
        return self.attend(self.select())


class _Given(nn.Module):
    """In the place of a projection: gives what is there."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self._result = result

    def forward(self, hidden: Tensor) -> Tensor:
        return self._result


class _FullCache:
    """In the place of the cache and of its one layer: all index keys are in it."""

    def __init__(self, index_k: Tensor) -> None:
        self._index_k = index_k
        self.layers = [self]

    def update_index(self, new: Tensor) -> Tensor:
        return self._index_k
