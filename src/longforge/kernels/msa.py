"""The whole of MSA on tensors of one's own: selection, attention over the selected blocks, index loss."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.checks import check_same_kind, check_shape
from longforge.kernels.dense_attention import dense_attention
from longforge.kernels.index_loss import index_loss as loss_of_index
from longforge.kernels.layout import PackedLayout, as_pages
from longforge.kernels.select_blocks import select_blocks
from longforge.kernels.sparse_attention import sparse_attention

__all__ = ["MsaOutput", "Phase", "msa_attention"]

Phase = Literal["sparse", "warmup"]


class MsaOutput(NamedTuple):
    """What `msa_attention` gives."""

    out: Tensor
    """[T, Hq, D] in q's dtype."""
    lse: Tensor
    """fp32 [T, Hq]: natural log of the sum of exp(scale q.k) over the attended tokens. No gradient."""
    blocks: Tensor | None
    """int32 [T, Hkv, K]: selected blocks of the token's sequence, ascending, -1 at the end where there are
    fewer; None in the warm-up."""
    index_loss: Tensor | None
    """Scalar, fp32 (fp64 for fp64 inputs); None unless asked for."""


def msa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    cu_seqlens: Tensor | Sequence[int] | PackedLayout | None = None,
    *,
    block_size: int = 128,
    top_k: int = 16,
    scale: float | None = None,
    index_scale: float | None = None,
    phase: Phase = "sparse",
    index_loss: bool = False,
    weights: Tensor | None = None,
    backend: str | None = None,
) -> MsaOutput:
    """Causal MiniMax Sparse Attention over sequences side by side (MSA, arXiv 2606.13392, section 3).

    Each token and GQA group scores the index keys before it, keeps the top_k blocks of block_size positions
    with the best maxima, its own block always among them (section 3.1), and attends to those blocks' tokens
    exactly (eq. 8). Blocks are counted from the start of each sequence; a partial last block is padded here.

    q           [T, Hq, D], normalised and rotated as the model wants it; Hq a multiple of Hkv; query heads
                g * G .. g * G + G - 1 share kv head (group) g
    k, v        [T, Hkv, D]
    index_q     [T, Hkv, Di], one index query per group; index_k [T, Di], one index key for all groups.
                Compute both from stopgrad(hidden): the index loss then trains nothing but the index branch
    cu_seqlens  integers [B + 1]: sequence i is rows cu_seqlens[i] .. cu_seqlens[i + 1] - 1; 0 first, T last.
                None: one sequence. On a GPU its values are read, which waits for the device; a layout made
                once, `PackedLayout.from_cu_seqlens(cu_seqlens, block_size, device)`, serves all layers, and
                torch.compile needs it
    block_size  positions of a block; top_k blocks per token and group, at least 1
    scale       of the attention scores, default D ** -0.5; index_scale of the index loss's, Di ** -0.5
    phase       "sparse"; or "warmup": attention over the whole prefix, index loss over the whole prefix
                (section 3.2), for the first steps of training or conversion
    index_loss  True: also the KL of the index branch to the attention's own distribution (eq. 9-11), to be
                added to the model's loss, summed over layers
    weights     [T], at least 0: how often each token counts in the index loss; default 1
    backend     "triton", "cpu" or "reference"; None: the fast one of the tensors' device

    All tensors are of one floating dtype on one device; any strides. Gradients of `out` reach q, k and v, and
    nothing else; those of `index_loss` reach index_q and index_k, and nothing else. torch.autocast changes
    nothing here. Raises InputError for what does not fit: the name, the expected, the given.
    """
    name = "msa_attention"
    tokens, dim = _check(name, q, k, v, index_q, index_k, top_k, phase)
    layout = _layout(name, cu_seqlens, tokens, block_size, q)
    if weights is not None and not index_loss:
        raise InputError(f"{name}: no weights expected without index_loss=True, got {list(weights.shape)}")
    k_pages, v_pages = as_pages(k, layout), as_pages(v, layout)
    index_k_pages = as_pages(index_k, layout)
    scale = dim**-0.5 if scale is None else scale
    blocks = None
    if phase == "warmup":
        out, lse = dense_attention(q, k_pages, v_pages, layout, scale=scale, backend=backend)
    else:
        blocks = select_blocks(index_q, index_k_pages, layout, top_k, backend=backend)
        out, lse = sparse_attention(q, k_pages, v_pages, blocks, layout, scale=scale, backend=backend)
    loss = None
    if index_loss:
        loss = loss_of_index(
            index_q, index_k_pages, q, k_pages, blocks, layout,
            scale=scale, index_scale=index_scale, weights=weights, lse=lse, backend=backend,
        )  # fmt: skip
    return MsaOutput(out, lse, blocks, loss)


def _check(
    name: str, q: Tensor, k: Tensor, v: Tensor, index_q: Tensor, index_k: Tensor, top_k: int, phase: str
) -> tuple[int, int]:
    """(T, D) of tensors that fit together."""
    check_shape(name, "q", q, (None, None, None), "[T, Hq, D]")
    tokens, heads, dim = q.shape
    check_shape(name, "k", k, (tokens, None, dim), "[T, Hkv, D]")
    check_shape(name, "v", v, tuple(k.shape), "[T, Hkv, D] like k")
    groups = k.shape[1]
    if groups == 0 or heads % groups:
        raise InputError(f"{name}: query heads a multiple of k's {groups} expected, got {heads}")
    check_shape(name, "index_q", index_q, (tokens, groups, None), "[T, Hkv, Di]")
    check_shape(name, "index_k", index_k, (tokens, index_q.shape[2]), "[T, Di]")
    check_same_kind(name, q=q, k=k, v=v, index_q=index_q, index_k=index_k)
    if top_k < 1:
        raise InputError(f"{name}: top_k of at least 1 expected (the token's own block), got {top_k}")
    if phase not in ("sparse", "warmup"):
        raise InputError(f"{name}: phase 'sparse' or 'warmup' expected, got {phase!r}")
    return tokens, dim


def _layout(
    name: str,
    cu_seqlens: Tensor | Sequence[int] | PackedLayout | None,
    tokens: int,
    block_size: int,
    q: Tensor,
) -> PackedLayout:
    if block_size < 1:
        raise InputError(f"{name}: block_size of at least 1 expected, got {block_size}")
    if isinstance(cu_seqlens, PackedLayout):
        layout = cu_seqlens
        if layout.block_size != block_size:
            raise InputError(
                f"{name}: block_size {layout.block_size} like the layout's expected, got {block_size}"
            )
    else:
        ends = [0, tokens] if cu_seqlens is None else cu_seqlens
        layout = PackedLayout.from_cu_seqlens(ends, block_size, q.device)
    if layout.positions.shape[0] != tokens:
        raise InputError(
            f"{name}: cu_seqlens that ends with q's {tokens} tokens expected, got {layout.positions.shape[0]}"
        )
    return layout
