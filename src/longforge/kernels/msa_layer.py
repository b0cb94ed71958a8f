"""An attention layer with MSA inside, to stand where a GQA layer stood."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout
from longforge.kernels.msa import Phase, msa_attention
from longforge.kernels.rotary import Rotary, rotary_table, rotate

__all__ = ["MsaAttention"]


class MsaAttention(nn.Module):
    """Causal grouped-query attention whose tokens read top_k blocks each (MSA, arXiv 2606.13392, section 3).

    A drop-in for a GQA layer: the projections and per-head norms carry the names of released checkpoints
    (q_proj, k_proj, v_proj, o_proj, q_norm, k_norm), so such a layer's weights load with strict=False and
    only the index branch (index_q_proj, index_k_proj, index_q_norm, index_k_norm) starts from nothing. As in
    M3, the index branch has per-head RMSNorm and the same partial rotary embedding. It sees stopgrad(hidden),
    so its loss trains nothing else, and selection passes no gradient, so nothing else trains it.

    phase       "warmup": attention over the whole prefix while the index branch learns to follow it; then
                set `layer.phase = "sparse"`, for example once the selection's recall reaches 0.9
    index_loss  the loss of the last forward in training mode with gradients on, else None. Add it, summed
                over layers, to the model's loss. Activation checkpointing has to be the non-reentrant kind:
                the other runs its first pass without gradients and would leave None here
    """

    index_loss: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        *,
        head_dim: int | None = None,
        index_dim: int | None = None,
        block_size: int = 128,
        top_k: int = 16,
        rotary_dim: int | None = None,
        rope_theta: float = 5e6,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        bias: bool = False,
        backend: str | None = None,
    ) -> None:
        """Sizes in channels: head_dim defaults to hidden_size / heads, index_dim to head_dim, rotary_dim (the
        first channels of each head that rotate, split-half pairs; 0 for none) to half of head_dim. bias is
        that of the q, k and v projections. Raises InputError for sizes that do not fit together."""
        super().__init__()
        head_dim = hidden_size // heads if head_dim is None else head_dim
        index_dim = head_dim if index_dim is None else index_dim
        rotary_dim = head_dim // 4 * 2 if rotary_dim is None else rotary_dim
        if heads % kv_heads:
            raise InputError(
                f"MsaAttention: heads a multiple of the {kv_heads} kv_heads expected, got {heads}"
            )
        if rotary_dim % 2 or not 0 <= rotary_dim <= min(head_dim, index_dim):
            raise InputError(
                f"MsaAttention: an even rotary_dim of at most {min(head_dim, index_dim)} (head_dim, "
                f"index_dim) expected, got {rotary_dim}"
            )
        self.heads, self.kv_heads, self.head_dim, self.index_dim = heads, kv_heads, head_dim, index_dim
        self.block_size, self.top_k, self.backend = block_size, top_k, backend
        self.rotary_dim, self.rope_theta = rotary_dim, rope_theta
        self.phase: Phase = "sparse"
        self.index_loss = None
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.index_q_proj = nn.Linear(hidden_size, kv_heads * index_dim, bias=False)
        self.index_k_proj = nn.Linear(hidden_size, index_dim, bias=False)
        self.index_q_norm = nn.RMSNorm(index_dim, eps=norm_eps)
        self.index_k_norm = nn.RMSNorm(index_dim, eps=norm_eps)

    def forward(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor | Sequence[int] | PackedLayout | None = None,
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        """hidden [T, hidden_size] with cu_seqlens [B + 1] as in `msa_attention` (None: one sequence), or
        [B, T, hidden_size], B sequences of T tokens -> the same shape.

        Shorter sequences of a batch are padded on the right; what comes out there means nothing.
        weights [T] or [B, T], at least 0: how often a token counts in the index loss (0 for padding).
        Raises InputError for shapes that do not fit.
        """
        layout = self._layout(hidden, cu_seqlens)
        x = hidden.flatten(0, -2)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rotary = rotary_table(layout.positions, self.rotary_dim, self.rope_theta, wide)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        q = self._heads(self.q_proj(x), self.q_norm, self.heads, rotary).to(v.dtype)
        k = self._heads(self.k_proj(x), self.k_norm, self.kv_heads, rotary).to(v.dtype)
        learning = self.training and torch.is_grad_enabled()
        with torch.set_grad_enabled(learning):
            x = x.detach()
            index_q = self._heads(self.index_q_proj(x), self.index_q_norm, self.kv_heads, rotary)
            index_k = self._heads(self.index_k_proj(x), self.index_k_norm, 1, rotary)[:, 0]
        result = msa_attention(
            q, k, v, index_q.to(v.dtype), index_k.to(v.dtype), layout,
            block_size=self.block_size, top_k=self.top_k, phase=self.phase, index_loss=learning,
            weights=weights.flatten() if weights is not None and learning else None, backend=self.backend,
        )  # fmt: skip
        self.index_loss = result.index_loss
        return self.o_proj(result.out.flatten(1)).view(hidden.shape)

    def _heads(self, x: Tensor, norm: nn.Module, heads: int, rotary: Rotary) -> Tensor:
        """x [T, heads * size] -> [T, heads, size], normalised (in the weights' dtype, whatever autocast gave)
        and rotated."""
        return rotate(norm(x.unflatten(-1, (heads, -1)).to(self.q_proj.weight.dtype)), rotary)

    def _layout(
        self, hidden: Tensor, cu_seqlens: Tensor | Sequence[int] | PackedLayout | None
    ) -> PackedLayout:
        name, width = "MsaAttention", self.q_proj.in_features
        if hidden.dim() not in (2, 3) or hidden.shape[-1] != width:
            raise InputError(
                f"{name}: hidden [T, {width}] or [B, T, {width}] expected, got {list(hidden.shape)}"
            )
        if isinstance(cu_seqlens, PackedLayout):
            return cu_seqlens
        if hidden.dim() == 2:
            ends = [0, len(hidden)] if cu_seqlens is None else cu_seqlens
            return PackedLayout.from_cu_seqlens(ends, self.block_size, hidden.device)
        if cu_seqlens is not None:
            raise InputError(
                f"{name}: cu_seqlens with hidden [T, {width}] expected, got {list(hidden.shape)}"
            )
        batch, length = hidden.shape[:2]
        return PackedLayout.from_lengths([length] * batch, self.block_size, hidden.device)
