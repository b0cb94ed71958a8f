"""Models known by name. m2 and m3 have the published shapes; micro and mini are ours."""

from longforge.model.config import LayerSpec, ModelConfig

__all__ = ["PRESETS"]


def _m3_layers(dense: int, sparse: int) -> tuple[LayerSpec, ...]:
    """M3's pattern: the first layers dense in attention and feed-forward, all others sparse with experts."""
    return (LayerSpec("full", "dense"),) * dense + (LayerSpec("sparse", "moe"),) * sparse


_M2 = ModelConfig(
    family="m2",
    layers=(LayerSpec("full", "moe"),) * 62,
    vocab_size=200_064,
    hidden_size=3072,
    heads=48,
    kv_heads=8,
    head_dim=128,
    rotary_dim=64,
    rope_theta=5_000_000.0,
    qk_norm="per_layer",
    gemma_norm=False,
    activation="silu",
    max_positions=196_608,
    block_size=128,
    experts=256,
    experts_per_token=8,
    expert_size=1536,
    bos_id=200_034,
    eos_id=200_020,
)

# Readers of the shipped config disagree on max_positions (524,288 or 1,048,576); ours is transformers'.
_M3 = ModelConfig(
    family="m3",
    layers=_m3_layers(dense=3, sparse=57),
    vocab_size=200_064,
    hidden_size=6144,
    heads=64,
    kv_heads=4,
    head_dim=128,
    rotary_dim=64,
    rope_theta=5_000_000.0,
    qk_norm="per_head",
    gemma_norm=True,
    activation="swiglu_oai",
    max_positions=524_288,
    block_size=128,
    experts=128,
    experts_per_token=4,
    expert_size=3072,
    shared_expert_size=3072,
    routed_scale=2.0,
    dense_size=12_288,
    top_k_blocks=16,
    index_dim=128,
    bos_id=200_034,
    eos_id=200_020,
)

# The demo's. A small rotary base, because eight frequencies must tell 4,096 positions apart.
_MICRO = ModelConfig(
    family="m3",
    layers=_m3_layers(dense=1, sparse=3),
    vocab_size=2048,
    hidden_size=192,
    heads=8,
    kv_heads=4,
    head_dim=32,
    rotary_dim=16,
    rope_theta=10_000.0,
    qk_norm="per_head",
    gemma_norm=True,
    activation="swiglu_oai",
    max_positions=4096,
    block_size=16,
    experts=8,
    experts_per_token=2,
    expert_size=192,
    shared_expert_size=192,
    routed_scale=2.0,
    dense_size=512,
    top_k_blocks=16,
    index_dim=32,
    mtp_modules=1,
)

# For one GPU: the same structure at about 213 M parameters.
_MINI = ModelConfig(
    family="m3",
    layers=_m3_layers(dense=1, sparse=9),
    vocab_size=32_768,
    hidden_size=768,
    heads=16,
    kv_heads=4,
    head_dim=64,
    rotary_dim=32,
    rope_theta=1_000_000.0,
    qk_norm="per_head",
    gemma_norm=True,
    activation="swiglu_oai",
    max_positions=65_536,
    block_size=64,
    experts=16,
    experts_per_token=2,
    expert_size=384,
    shared_expert_size=384,
    routed_scale=2.0,
    dense_size=2048,
    top_k_blocks=16,
    index_dim=64,
    mtp_modules=1,
)

PRESETS: dict[str, ModelConfig] = {"m2": _M2, "m3": _M3, "micro": _MICRO, "mini": _MINI}
