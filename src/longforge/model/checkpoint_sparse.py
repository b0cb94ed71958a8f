"""Which layers of an M3 are sparse and which have experts: the two ways in which files say it.

released    sparse_attention_config { sparse_attention_freq, sparse_topk_blocks, ... } and moe_layer_freq
flat        layer_types, mlp_layer_types, index_topk_blocks, ... (what transformers writes)
"""

from collections.abc import Mapping
from typing import Any

from longforge.errors import CheckpointError, ConfigError
from longforge.model.config import LayerSpec, ModelConfig

__all__ = ["read_layers", "write_layers"]

# our field: (released key, flat key, what transformers takes where a file is silent)
_NUMBERS = {
    "index_heads": ("sparse_num_index_heads", "index_n_heads", 4),
    "index_dim": ("sparse_index_dim", "index_head_dim", 128),
    "block_size": ("sparse_block_size", "index_block_size", 128),
    "top_k_blocks": ("sparse_topk_blocks", "index_topk_blocks", 16),
    "local": ("sparse_local_block", "index_local_blocks", 1),
}
_MIXERS = {"full_attention": "full", "minimax_m3_sparse": "sparse"}
_FEED_FORWARDS = {"dense": "dense", "sparse": "moe"}


def read_layers(text: Mapping[str, Any], kv_heads: int) -> dict[str, Any]:
    """The fields `layers`, `block_size`, `top_k_blocks` and `index_dim` of an M3 text configuration.

    Without any sparse layer, block_size and the selection's sizes are left out. Raises ConfigError for a
    selection that we could not compute exactly, CheckpointError for lists that do not fit num_hidden_layers.
    """
    sparse = text.get("sparse_attention_config") or {}
    if not sparse.get("use_sparse_attention", True):
        sparse = {}
    count = _whole(text.get("num_hidden_layers"), "num_hidden_layers")
    types = _named(text.get("layer_types"), "layer_types", _MIXERS, count)
    freq = _flags(sparse.get("sparse_attention_freq"), "sparse_attention_freq", ("full", "sparse"), count)
    mlps = _named(text.get("mlp_layer_types"), "mlp_layer_types", _FEED_FORWARDS, count)
    moe = _flags(text.get("moe_layer_freq"), "moe_layer_freq", ("dense", "moe"), count)
    mixers: list[Any] = _agreed("layer_types and sparse_attention_freq", types, freq) or ["full"] * count
    feed_forwards: list[Any] = _agreed("mlp_layer_types and moe_layer_freq", mlps, moe) or ["moe"] * count
    layers = tuple(map(LayerSpec, mixers, feed_forwards))
    if "sparse" not in mixers:
        return {"layers": layers}
    numbers = {
        field: _whole(sparse.get(released, text.get(flat, default)), released)
        for field, (released, flat, default) in _NUMBERS.items()
    }
    _refuse_inexact(sparse, numbers, mixers, kv_heads)
    return {"layers": layers} | {k: numbers[k] for k in ("block_size", "top_k_blocks", "index_dim")}


def write_layers(config: ModelConfig, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say what `config.layers` are, in the way the kept keys do, else in the released way."""
    sparse = [int(layer.mixer == "sparse") for layer in config.layers]
    moe = [int(layer.feed_forward == "moe") for layer in config.layers]
    values = {
        "index_heads": config.index_heads,
        "index_dim": config.index_dim,
        "block_size": config.block_size,
        "top_k_blocks": config.top_k_blocks,
        "local": 1,
    }
    if "layer_types" in kept and "sparse_attention_config" not in kept:
        return {
            "layer_types": [("full_attention", "minimax_m3_sparse")[s] for s in sparse],
            "mlp_layer_types": [("dense", "sparse")[m] for m in moe],
        } | {flat: values[field] for field, (_, flat, _) in _NUMBERS.items()}
    released: dict[str, Any] = {
        "use_sparse_attention": any(sparse),
        "sparse_attention_freq": sparse,
        "sparse_disable_index_value": sparse,
        "sparse_score_type": "max",
        "sparse_init_block": 0,
    }
    released |= {key: values[field] for field, (key, _, _) in _NUMBERS.items()}
    return {"sparse_attention_config": released, "moe_layer_freq": moe}


def _refuse_inexact(
    sparse: Mapping[str, Any], numbers: Mapping[str, int], mixers: list[str], kv_heads: int
) -> None:
    wanted = {"sparse_score_type": "max", "sparse_init_block": 0, "sparse_init_tokens": 0}
    wanted |= {"sparse_local_tokens": 0}
    for key, value in wanted.items():
        if key in sparse and sparse[key] != value:
            raise ConfigError(
                f"{key}: {value} is needed, got {sparse[key]}; this model cannot be run exactly"
            )
    if numbers["local"] != 1:
        raise ConfigError(
            f"sparse_local_block: 1 is needed, got {numbers['local']}; only the own block is forced"
        )
    if numbers["index_heads"] != kv_heads:
        raise ConfigError(
            f"sparse_num_index_heads: one per kv head, {kv_heads}, is needed, got {numbers['index_heads']}"
        )
    disabled = sparse.get("sparse_disable_index_value", True)
    flags = disabled if isinstance(disabled, list) else [disabled] * len(mixers)
    if any(m == "sparse" and not flag for m, flag in zip(mixers, flags, strict=False)):
        raise ConfigError(
            f"sparse_disable_index_value: true for every sparse layer is needed, got {disabled}; "
            "index values are not supported"
        )


def _whole(value: Any, key: str) -> int:
    if not isinstance(value, int):
        raise CheckpointError(f"config.json: a whole number is needed for {key}, got {value!r}")
    return value


def _flags(value: Any, key: str, names: tuple[str, str], count: int) -> list[Any] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count:
        raise CheckpointError(f"config.json: {count} entries are needed in {key}, got {_brief(value)}")
    return [names[bool(flag)] for flag in value]


def _named(value: Any, key: str, names: Mapping[str, str], count: int) -> list[Any] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count or any(v not in names for v in value):
        listed = " or ".join(names)
        got = _brief(value, names)
        raise CheckpointError(f"config.json: {count} entries {listed} are needed in {key}, got {got}")
    return [names[v] for v in value]


def _brief(value: Any, known: Mapping[str, str] | None = None) -> str:
    if not isinstance(value, list):
        return repr(value)
    odd = [v for v in value if known is not None and v not in known]
    return repr(odd[0]) if odd else f"{len(value)} entries"


def _agreed(what: str, one: list[Any] | None, other: list[Any] | None) -> list[Any] | None:
    if one is not None and other is not None and one != other:
        at = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        raise ConfigError(
            f"{what}: the same layers are needed in both, got {one[at]} and {other[at]} for layer {at}"
        )
    return one if one is not None else other
