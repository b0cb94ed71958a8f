"""Which tensors of a checkpoint make up each of our parameters.

We hold some weights stacked or fused (experts; q, k and v; gate and up); the released files hold them apart.

M2 (and the layers of M3 under `language_model.`):
    model.embed_tokens, model.layers.{i}.input_layernorm, .post_attention_layernorm, model.norm, lm_head
    .self_attn.{q,k,v,o}_proj, .{q,k}_norm, .index_{q,k}_proj, .index_{q,k}_norm
    .mlp.{gate,up,down}_proj                                                   dense layers
    .block_sparse_moe.gate, .e_score_correction_bias, .experts.{e}.{w1,w2,w3}  w1 = gate, w3 = up, w2 = down
    .block_sparse_moe.shared_experts.{gate,up,down}_proj
    model.mtp.layers.{i}.enorm, .hnorm, .eh_proj, .transformer_layer.*, .final_layernorm

The MTP names are those that NeMo and rtp-llm read for M3; no public M2 checkpoint has MTP tensors, so using
the same ones there is our choice. Lightning layers keep MiniMax-01's (qkv_proj, output_gate, norm, out_proj).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from longforge.model.config import LayerSpec, ModelConfig

__all__ = ["Names", "Piece", "parameter_pieces", "style_of"]

Names = Literal["released", "transformers"]
"""transformers: the fused module names that its text-only M3 class writes."""

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Piece:
    """One tensor of a file: it fills `parameter[index]` of our parameter with key `key`."""

    key: str
    index: Index
    name: str


def style_of(names: set[str]) -> Names:
    """How a checkpoint with these tensor names calls its parameters."""
    fused = (".mlp.experts.gate_up_proj", ".mlp.gate_up_proj.weight", ".self_attn.indexer.q_proj.weight")
    return "transformers" if any(name.endswith(fused) for name in names) else "released"


def parameter_pieces(config: ModelConfig, style: Names = "released") -> Iterator[Piece]:
    """Every tensor of a checkpoint of this model, in file order."""
    root = "language_model." if config.family == "m3" and style == "released" else ""
    whole: Index = ()
    yield Piece("model.embed_tokens.weight", whole, f"{root}model.embed_tokens.weight")
    for i, spec in enumerate(config.layers):
        yield from _layer(config, spec, style, f"model.layers.{i}.", f"{root}model.layers.{i}.")
    yield Piece("model.norm.weight", whole, f"{root}model.norm.weight")
    for i in range(config.mtp_modules):
        ours, theirs = f"mtp.{i}.", f"{root}model.mtp.layers.{i}."
        for name in ("enorm", "hnorm", "eh_proj"):
            yield Piece(f"{ours}{name}.weight", whole, f"{theirs}{name}.weight")
        layer = "transformer_layer."
        yield from _layer(config, config.mtp_spec, style, ours + layer, theirs + layer)
        yield Piece(f"{ours}final_layernorm.weight", whole, f"{theirs}final_layernorm.weight")
    if not config.tie_embeddings:
        yield Piece("lm_head.weight", whole, f"{root}lm_head.weight")


def _layer(config: ModelConfig, spec: LayerSpec, style: Names, ours: str, theirs: str) -> Iterator[Piece]:
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        yield Piece(ours + norm, (), theirs + norm)
    if spec.mixer == "lightning":
        for name in ("qkv_proj", "output_gate", "out_proj", "norm"):
            yield Piece(f"{ours}self_attn.{name}.weight", (), f"{theirs}self_attn.{name}.weight")
    else:
        yield from _attention(config, spec, style, f"{ours}self_attn.", f"{theirs}self_attn.")
    if spec.feed_forward == "dense":
        yield from _gated(config.dense_size, style, f"{ours}mlp.", f"{theirs}mlp.")
    else:
        moe = "mlp." if style == "transformers" else "block_sparse_moe."
        yield from _experts(config, style, f"{ours}mlp.", theirs + moe)


def _attention(config: ModelConfig, spec: LayerSpec, style: Names, ours: str, theirs: str) -> Iterator[Piece]:
    widths = [config.heads * config.head_dim] + [config.kv_heads * config.head_dim] * 2
    rows = zip(("q_proj", "k_proj", "v_proj"), _ranges(widths), strict=True)
    for name, part in rows:
        yield Piece(f"{ours}qkv_proj.weight", (part,), f"{theirs}{name}.weight")
    yield Piece(f"{ours}o_proj.weight", (), f"{theirs}o_proj.weight")
    if config.qk_norm is not None:
        for name in ("q_norm", "k_norm"):
            yield Piece(f"{ours}{name}.weight", (), f"{theirs}{name}.weight")
    if spec.mixer != "sparse":
        return
    prefix = "indexer." if style == "transformers" else "index_"
    widths = [config.index_heads * config.index_dim, config.index_dim]
    for name, part in zip(("q_proj", "k_proj"), _ranges(widths), strict=True):
        yield Piece(f"{ours}index_proj.weight", (part,), f"{theirs}{prefix}{name}.weight")
    for name in ("q_norm", "k_norm"):
        yield Piece(f"{ours}index_{name}.weight", (), f"{theirs}{prefix}{name}.weight")


def _gated(size: int, style: Names, ours: str, theirs: str) -> Iterator[Piece]:
    if style == "transformers":
        yield Piece(f"{ours}gate_up_proj.weight", (), f"{theirs}gate_up_proj.weight")
    else:
        for name, part in zip(("gate_proj", "up_proj"), _ranges([size, size]), strict=True):
            yield Piece(f"{ours}gate_up_proj.weight", (part,), f"{theirs}{name}.weight")
    yield Piece(f"{ours}down_proj.weight", (), f"{theirs}down_proj.weight")


def _experts(config: ModelConfig, style: Names, ours: str, theirs: str) -> Iterator[Piece]:
    bias = "e_score_correction_bias"
    yield Piece(f"{ours}gate.weight", (), f"{theirs}gate.weight")
    fused = style == "transformers"
    yield Piece(f"{ours}gate.{bias}", (), f"{theirs}gate.{bias}" if fused else f"{theirs}{bias}")
    if fused:
        for name in ("gate_up_proj", "down_proj"):
            yield Piece(f"{ours}experts.{name}", (), f"{theirs}experts.{name}")
    else:
        gate, up = _ranges([config.expert_size] * 2)
        for e in range(config.experts):
            yield Piece(f"{ours}experts.gate_up_proj", (e, gate), f"{theirs}experts.{e}.w1.weight")
            yield Piece(f"{ours}experts.down_proj", (e,), f"{theirs}experts.{e}.w2.weight")
            yield Piece(f"{ours}experts.gate_up_proj", (e, up), f"{theirs}experts.{e}.w3.weight")
    if config.shared_expert_size:
        shared = "shared_experts."
        yield from _gated(config.shared_expert_size, style, ours + shared, theirs + shared)


def _ranges(widths: list[int]) -> list[slice]:
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]
