"""config.json of the released families, read and written.

What the released keys cannot say is kept under a `longforge` key of ours. A model that the released
architectures cannot compute (other mixers, other switches) is written as `LongforgeForCausalLM`, so that
other programs refuse it instead of running a different model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from longforge.errors import CheckpointError, ConfigError
from longforge.model.checkpoint_sparse import read_layers, write_layers
from longforge.model.config import LayerSpec, ModelConfig

__all__ = ["ARCHITECTURES", "is_released", "read_config", "write_config"]

OURS = "LongforgeForCausalLM"
ARCHITECTURES = {
    "MiniMaxM2ForCausalLM": "m2",
    "MiniMaxM3SparseForConditionalGeneration": "m3",
    "MiniMaxM3VLForCausalLM": "m3",
    "MiniMaxM3SparseForCausalLM": "m3",
    OURS: None,
}
_MODEL_TYPES = {"minimax_m2": "m2", "minimax_m3_vl": "m3", "minimax_m3_vl_text": "m3"}

# The released name of each plain field.
_COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_positions": "max_position_embeddings",
    "experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
    "mtp_modules": "num_mtp_modules",
}
_M3 = {
    "dense_size": "dense_intermediate_size",
    "shared_expert_size": "shared_intermediate_size",
    "routed_scale": "routed_scaling_factor",
    "swiglu_alpha": "swiglu_alpha",
    "swiglu_limit": "swiglu_limit",
}
_DEFAULTS: dict[str, Any] = {
    "norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_embeddings": False,
    "mtp_modules": 0,
    "dense_size": 0,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "routed_scale": 1.0,
}
_PAGE = 128
"""Block size where the model has no sparse layers and the file does not say: the released kernels' page."""


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes.

    `mtp_modules` is what the file declares; released files declare modules that they do not hold. Raises
    CheckpointError or ConfigError, one line, for an unknown architecture, a missing or wrong key, and
    anything that we could not compute exactly.
    """
    named = _architecture(raw)
    if named == OURS:
        return _read_ours(raw)
    try:
        return _read_released(raw, named)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"values of the kinds in the released files are needed, got {error}") from error


def _read_released(raw: Mapping[str, Any], named: str) -> ModelConfig:
    family = ARCHITECTURES[named] if named in ARCHITECTURES else _MODEL_TYPES[named]
    nested = raw.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, Mapping) else raw
    ours = raw.get("longforge") or {}
    if not isinstance(ours, Mapping) or set(ours) - {"block_size"}:
        raise ConfigError(f"longforge: an object with block_size is needed, got {ours}")
    names = _COMMON | (_M3 if family == "m3" else {})
    values: dict[str, Any] = {f: _value(text, key, _DEFAULTS.get(f)) for f, key in names.items()}
    values |= _rotary(text, family, values["head_dim"])
    values |= {"bos_id": _token(text, raw, "bos_token_id"), "eos_id": _token(text, raw, "eos_token_id")}
    block_size = int(ours.get("block_size", _PAGE))
    read = _read_m2 if family == "m2" else _read_m3
    values |= {"family": family, "block_size": block_size}
    return ModelConfig(**(values | read(text, values)))


def write_config(
    config: ModelConfig, kept: Mapping[str, Any] | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """config.json of a model. `kept` is the file it was read from: what else it says stays.

    M3 is written nested under text_config as released; its layers in the released way, or in transformers'
    flat way where `kept` has it so.
    """
    kept = {k: v for k, v in (kept or {}).items() if k not in _NOT_KEPT}
    text = {k: v for k, v in kept.get("text_config", kept).items() if k not in _NOT_KEPT}
    if not is_released(config):
        return {"architectures": [OURS], "model_type": "longforge", "dtype": dtype} | {
            "longforge": config.as_dict()
        }
    names = _COMMON | (_M3 if config.family == "m3" else {})
    text |= {key: getattr(config, field) for field, key in names.items()}
    text |= {
        "num_hidden_layers": len(config.layers),
        "bos_token_id": config.bos_id,
        "eos_token_id": _kept_list(text.get("eos_token_id"), config.eos_id),
        "hidden_act": "silu" if config.family == "m2" else "swigluoai",
        "use_qk_norm": True,
        "qk_norm_type": config.qk_norm,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "rope_theta": config.rope_theta,
        "rotary_dim": config.rotary_dim,
        "partial_rotary_factor": _partial_factor(config),
    }
    if config.family == "m2":
        text |= {"attn_type_list": [1] * len(config.layers), "shared_intermediate_size": 0}
        text |= {"use_mtp": config.mtp_modules > 0, "mtp_transformer_layers": 1}
        text |= {"architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "dtype": dtype}
        return text | {"longforge": {"block_size": config.block_size}}
    return _write_m3(config, kept, text, dtype)


_NOT_KEPT = (
    "architectures",
    "quantization_config",
    "torch_dtype",
    "dtype",
    "rope_parameters",
    "rope_scaling",
    "longforge",
    "transformers_version",
    "auto_map",
)


def _write_m3(
    config: ModelConfig, kept: Mapping[str, Any], text: dict[str, Any], dtype: str
) -> dict[str, Any]:
    text |= {"model_type": "minimax_m3_vl_text", "dtype": dtype}
    text |= {"use_gemma_norm": True, "attention_output_gate": False, "n_shared_experts": 1}
    text |= write_layers(config, text)
    top = dict(kept) if "text_config" in kept else {}
    if "vision_config" not in top:
        top |= _no_vision()
    top |= {"architectures": ["MiniMaxM3SparseForConditionalGeneration"], "model_type": "minimax_m3_vl"}
    top |= {"dtype": dtype, "tie_word_embeddings": config.tie_embeddings, "text_config": text}
    return top if config.has("sparse") else top | {"longforge": {"block_size": config.block_size}}


def _no_vision() -> dict[str, Any]:
    """The smallest tower that the released architecture can name; a text-only folder holds no tensors for it.

    The released names belong to the multimodal class; transformers' text-only class does not read them.
    """
    vision = {"model_type": "minimax_m3_vl_vision", "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    return {"vision_config": vision, "projector_hidden_size": 16}


def is_released(config: ModelConfig) -> bool:
    """Whether the family's released architecture computes exactly this model."""
    layers = {(layer.mixer, layer.feed_forward) for layer in config.layers}
    if config.family == "m2":
        return (
            layers == {("full", "moe")}
            and config.qk_norm == "per_layer"
            and config.activation == "silu"
            and not config.gemma_norm
            and not config.shared_expert_size
            and config.routed_scale == 1.0
        )
    mixers, feed_forwards = {m for m, _ in layers}, {f for _, f in layers}
    return (
        mixers <= {"full", "sparse"}
        and config.qk_norm == "per_head"
        and config.activation == "swiglu_oai"
        and config.gemma_norm
        and ("moe" not in feed_forwards or config.shared_expert_size > 0)
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    named = raw.get("architectures") or [raw.get("model_type")]
    if not isinstance(named, Sequence) or named[0] not in (*ARCHITECTURES, *_MODEL_TYPES):
        known = ", ".join(a for a in ARCHITECTURES)
        raise CheckpointError(f"config.json: architecture {known} is needed, got {named}")
    return str(named[0])


def _read_ours(raw: Mapping[str, Any]) -> ModelConfig:
    ours = raw.get("longforge")
    if not isinstance(ours, Mapping):
        raise CheckpointError(f"config.json: a longforge object is needed for {OURS}, got {ours}")
    known = {f.name for f in fields(ModelConfig)}
    if unknown := sorted(set(ours) - known):
        raise ConfigError(f"longforge.{unknown[0]}: unknown key in config.json")
    try:
        layers = tuple(LayerSpec(mixer, feed_forward) for mixer, feed_forward in ours["layers"])
        values: dict[str, Any] = {**ours, "layers": layers}
        return ModelConfig(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"longforge: the fields of a model are needed in config.json, got {error}"
        ) from error


def _read_m2(text: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unless(text, "hidden_act", "silu", "swish")
    _refuse_unless(text, "scoring_func", "sigmoid")
    _refuse_unless(text, "qk_norm_type", "per_layer")
    _refuse_unless(text, "use_qk_norm", True)
    _refuse_unless(text, "sliding_window", None)
    _refuse_unless(text, "shared_intermediate_size", 0)
    layers = int(_value(text, "num_hidden_layers"))
    kinds = text.get("attn_type_list")
    if kinds is not None and (len(kinds) < layers or any(kind != 1 for kind in kinds[:layers])):
        got = next((kind for kind in kinds if kind != 1), f"{len(kinds)} entries")
        raise ConfigError(f"attn_type_list: {layers} ones (full attention) are needed, got {got}")
    declared = values["mtp_modules"] if text.get("use_mtp", True) else 0
    switches = {"qk_norm": "per_layer", "gemma_norm": False, "activation": "silu", "mtp_modules": declared}
    return switches | {"layers": (LayerSpec("full", "moe"),) * layers}


def _read_m3(text: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unless(text, "hidden_act", "swigluoai", "silu")
    _refuse_unless(text, "scoring_func", "sigmoid")
    _refuse_unless(text, "qk_norm_type", "per_head")
    _refuse_unless(text, "use_qk_norm", True)
    _refuse_unless(text, "use_gemma_norm", True)
    _refuse_unless(text, "attention_output_gate", False)
    _refuse_unless(text, "n_shared_experts", 1)
    switches = {"qk_norm": "per_head", "gemma_norm": True, "activation": "swiglu_oai"}
    return switches | read_layers(text, values["kv_heads"])


def _rotary(text: Mapping[str, Any], family: str, head_dim: int) -> dict[str, Any]:
    """As transformers 5 has it: a partial factor wins over rotary_dim, which new-style M3 files ignore."""
    new = text.get("rope_parameters") or {}
    old = text.get("rope_scaling") or {}
    kind = new.get("rope_type", old.get("rope_type", old.get("type", "default")))
    if kind != "default":
        raise ConfigError(f"rope_type: default is needed, got {kind}")
    factor = new.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    if factor is not None:
        rotary_dim = int(head_dim * float(factor))
    elif new and family == "m3":
        rotary_dim = head_dim
    else:
        rotary_dim = int(text.get("rotary_dim") or head_dim)
    return {"rotary_dim": rotary_dim, "rope_theta": float(new.get("rope_theta", text.get("rope_theta", 5e6)))}


def _partial_factor(config: ModelConfig) -> float:
    """The share of a head that is rotated; readers multiply it by head_dim and round down."""
    factor = config.rotary_dim / config.head_dim
    return factor if int(config.head_dim * factor) == config.rotary_dim else math.nextafter(factor, 2.0)


def _value(text: Mapping[str, Any], key: str, default: Any = None) -> Any:
    value = text.get(key, default)
    if value is None:
        value = default
    if not isinstance(value, bool | int | float):
        raise CheckpointError(f"config.json: a number is needed for {key}, got {value!r}")
    return value


def _token(text: Mapping[str, Any], raw: Mapping[str, Any], key: str) -> int | None:
    """Some files list several end tokens; the first is the one a sequence ends with."""
    value: Any = text.get(key, raw.get(key))
    if isinstance(value, list):
        value = value[0] if value else None
    return value


def _kept_list(kept: Any, token: int | None) -> Any:
    return kept if isinstance(kept, list) and kept and kept[0] == token else token


def _refuse_unless(text: Mapping[str, Any], key: str, *allowed: Any) -> None:
    if key in text and text[key] not in allowed:
        raise ConfigError(f"{key}: {allowed[0]} is needed, got {text[key]}; this model cannot be run exactly")
