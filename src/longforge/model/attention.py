"""The mixers: full, sliding and sparse softmax attention, and Lightning attention.

Shapes as in `kernels.layout`; x is [N, d].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longforge.kernels.dense_attention import dense_attention
from longforge.kernels.index_loss import index_loss, selection_recall
from longforge.kernels.layout import PackedLayout
from longforge.kernels.lightning_attention import decay_slopes, lightning_attention
from longforge.kernels.rotary import rotate
from longforge.kernels.select_blocks import select_blocks
from longforge.kernels.sparse_attention import sparse_attention
from longforge.kernels.traced import is_traced
from longforge.model.config import ModelConfig
from longforge.model.norms import RMSNorm
from longforge.model.step import Step

__all__ = ["DenseAttention", "LightningAttention", "SparseAttention", "mixer"]

SHORT_PROMPT = 8
"""Tokens of a path, on average, from which on a batch counts as prompts and not as decoding."""


class DenseAttention(nn.Module):
    """Grouped-query softmax attention over the whole prefix, or over the last `window` positions."""

    def __init__(self, config: ModelConfig, layer: int, window: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.window = window
        self.sizes = [config.heads * config.head_dim] + [config.kv_heads * config.head_dim] * 2
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.o_proj = nn.Linear(self.sizes[0], config.hidden_size, bias=False)
        if config.qk_norm is not None:
            wide = config.qk_norm == "per_layer"
            self.q_norm = RMSNorm(self.sizes[0] if wide else config.head_dim, config)
            self.k_norm = RMSNorm(self.sizes[1] if wide else config.head_dim, config)

    def project(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, Hq, D] and k [N, Hkv, D], normalised then rotated, and v [N, Hkv, D]."""
        c = self.config
        q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        if c.qk_norm == "per_layer":
            q, k = self.q_norm(q), self.k_norm(k)
        qk = torch.cat([q, k], dim=-1).view(len(x), c.heads + c.kv_heads, c.head_dim)
        if c.qk_norm == "per_head":
            qk = _norm_heads(qk, self.q_norm, c.heads, self.k_norm, c.kv_heads)
        q, k = rotate(qk, step.rotary).split([c.heads, c.kv_heads], dim=1)
        # Under autocast v comes in its dtype while the rotation has widened q and k.
        return q, k, v.view(len(x), c.kv_heads, c.head_dim).to(q.dtype)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [N, d] -> [N, d]."""
        q, k, v = self.project(x, step)
        k_pages = step.pages(step.cache and step.cache.k, self.layer, k)
        v_pages = step.pages(step.cache and step.cache.v, self.layer, v)
        out, _ = dense_attention(q, k_pages, v_pages, step.layout, window=self.window, backend=step.backend)
        return self.o_proj(out.flatten(1))


class SparseAttention(DenseAttention):
    """MSA: an index branch selects blocks per token and group, softmax attention runs over them exactly.

    Formulas: arXiv 2606.13392, section 3.1 (selection) and 3.2 (index loss, warm-up). The index branch sees
    stopgrad(x), so its loss reaches nothing else; selection passes no gradient, so nothing else reaches it.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.index_proj = nn.Linear(
            config.hidden_size, (config.index_heads + 1) * config.index_dim, bias=False
        )
        self.index_q_norm = RMSNorm(config.index_dim, config)
        self.index_k_norm = RMSNorm(config.index_dim, config)

    def project_index(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """index q [N, Hkv, Di] and the one index key of all groups [N, Di], normalised then rotated."""
        c = self.config
        with torch.set_grad_enabled(step.index_loss and torch.is_grad_enabled()):
            both = self.index_proj(x.detach()).view(len(x), c.index_heads + 1, c.index_dim)
            both = _norm_heads(both, self.index_q_norm, c.index_heads, self.index_k_norm, 1)
            both = rotate(both, step.rotary)
            return both[:, :-1], both[:, -1]

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [N, d] -> [N, d]; tells the step the index loss and the selection's recall where asked."""
        cache, layout, backend = step.cache, step.layout, step.backend
        q, k, v = self.project(x, step)
        k_pages = step.pages(cache and cache.k, self.layer, k)
        v_pages = step.pages(cache and cache.v, self.layer, v)
        index_q, index_k = self.project_index(x, step)
        index_k_pages = step.pages(cache and cache.index_k, self.layer, index_k)
        blocks = None
        if step.phase == "sparse" or step.measure_recall:
            with torch.no_grad():
                blocks = select_blocks(
                    index_q, index_k_pages, layout, self.config.top_k_blocks, backend=backend
                )
        if step.blocks is not None and blocks is not None:
            step.blocks.append(blocks)
        if step.measure_recall:
            assert blocks is not None
            step.recalls.append(float(selection_recall(q, k_pages, blocks, layout)))
        if step.phase == "warmup":
            blocks = None
            out, lse = dense_attention(q, k_pages, v_pages, layout, backend=backend)
        elif backend in (None, "cpu") and self._all_selected(layout):
            out, lse = dense_attention(q, k_pages, v_pages, layout, backend=backend)
        else:
            assert blocks is not None
            out, lse = sparse_attention(q, k_pages, v_pages, blocks, layout, backend=backend)
        if step.index_loss:
            loss = index_loss(
                index_q,
                index_k_pages,
                q,
                k_pages,
                blocks,
                layout,
                weights=step.index_weights,
                lse=lse,
                backend=backend,
            )
            step.index_losses.append(loss)
        return self.o_proj(out.flatten(1))

    def _all_selected(self, layout: PackedLayout) -> bool:
        """Whether these are prompts so short that each token selects all its blocks: dense attention says the
        same faster. On a CPU alone and outside a compiler: elsewhere the question would wait for the device,
        or break the graph."""
        positions = layout.positions
        if positions.device.type != "cpu" or is_traced(positions):
            return False
        if len(positions) < SHORT_PROMPT * len(layout.page_table):
            return False
        return int(positions.max()) < self.config.top_k_blocks * layout.block_size


class LightningAttention(nn.Module):
    """Linear attention with a fixed decay per head (MiniMax-01, arXiv 2501.08313), a comparison mixer.

    SiLU on q, k and v; no rotation, no scale; RMSNorm over all heads, a sigmoid gate, the output projection.
    The norm is of the model's kind (plain or Gemma), which is our choice.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        width = config.heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.output_gate = nn.Linear(config.hidden_size, width, bias=False)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.norm = RMSNorm(width, config)
        # An MTP module's block forgets like the last layer.
        self.depth = min(layer, len(config.layers) - 1)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [N, d] -> [N, d]."""
        c = self.config
        heads = F.silu(self.qkv_proj(x)).view(len(x), c.heads, 3 * c.head_dim)
        q, k, v = heads.split(c.head_dim, dim=-1)
        states = None if step.cache is None else step.cache.state[self.layer]
        slopes = decay_slopes(c.heads, self.depth, len(c.layers), x.device)
        out = lightning_attention(q, k, v, slopes, step.layout, states=states, backend=step.backend)
        gate = torch.sigmoid(self.output_gate(x))
        return self.out_proj(gate * self.norm(out.flatten(1)))


def mixer(config: ModelConfig, kind: str, layer: int) -> nn.Module:
    """The mixer of one layer."""
    match kind:
        case "full":
            return DenseAttention(config, layer)
        case "sliding":
            return DenseAttention(config, layer, config.window)
        case "lightning":
            return LightningAttention(config, layer)
        case _:
            return SparseAttention(config, layer)


def _norm_heads(x: Tensor, first: RMSNorm, first_heads: int, second: RMSNorm, second_heads: int) -> Tensor:
    """Two per-head RMSNorms in one go: the first heads of x [N, H, D] by `first`, the others by `second`."""
    a, b = first.scale(), second.scale()
    size = x.shape[-1]
    scale = torch.cat([a.expand(first_heads, size), b.expand(second_heads, size)])
    return (F.rms_norm(x.to(scale.dtype), (size,), None, first.eps) * scale).to(x.dtype)
