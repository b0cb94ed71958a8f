"""What a model weighs and what a token of context costs: arithmetic on a configuration, no weights read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longforge.errors import InputError
from longforge.model.causal_lm import CausalLM
from longforge.model.checkpoint import config_of
from longforge.model.config import ModelConfig
from longforge.model.experts import Experts
from longforge.model.presets import PRESETS

__all__ = ["find_config", "model_info"]

_BF16 = 2
_FP32 = 4


def find_config(preset_or_path: str | Path) -> ModelConfig:
    """The configuration of a preset by name, or of a model folder. Raises InputError where it is neither."""
    name = str(preset_or_path)
    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).is_dir():
        raise InputError(
            f"{name}: a preset ({', '.join(PRESETS)}) or a model folder is needed, and it is neither"
        )
    return config_of(name)


def model_info(config: ModelConfig) -> dict[str, Any]:
    """Counts of parameters, and bytes per token of context in bf16, as one flat JSON-ready object.

    total_parameters                    decoder, embedding table and head, selection biases included, MTP not
    mtp_parameters                      declared MTP modules, on top of the total
    active_parameters                   what one token passes: the total less the experts not chosen
    active_parameters_without_tables    the same less embedding table and head
    kv_bytes_per_token                  keys and values of all softmax layers
    index_bytes_per_token               index keys of the sparse layers
    state_bytes_per_page                fp32 states of Lightning layers, per page of `block_size` positions
    """
    with torch.device("meta"):
        model = CausalLM(replace(config, mtp_modules=0))
        mtp = CausalLM(replace(config, mtp_modules=1)) if config.mtp_modules else model
    total = _size(model)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    idle = 0
    for module in model.modules():
        if isinstance(module, Experts):
            held = sum(p.numel() for p in module.parameters())
            idle += held // config.experts * (config.experts - config.experts_per_token)
    mixers = [layer.mixer for layer in config.layers]
    softmax = len(mixers) - mixers.count("lightning")
    states = mixers.count("lightning") * config.heads * config.head_dim**2
    return {
        "family": config.family,
        "layers": len(config.layers),
        "mixers": {kind: mixers.count(kind) for kind in dict.fromkeys(mixers)},
        "context": config.max_positions,
        "block_size": config.block_size,
        "selected_tokens": config.top_k_blocks * config.block_size if "sparse" in mixers else None,
        "total_parameters": total,
        "mtp_parameters": config.mtp_modules * (_size(mtp) - total),
        "active_parameters": total - idle,
        "active_parameters_without_tables": total - idle - tables,
        "weight_bytes": total * _BF16,
        "kv_bytes_per_token": softmax * 2 * config.kv_heads * config.head_dim * _BF16,
        "index_bytes_per_token": mixers.count("sparse") * config.index_dim * _BF16,
        "state_bytes_per_page": states * _FP32,
    }


def _size(model: CausalLM) -> int:
    biases = sum(router.e_score_correction_bias.numel() for router in model.routers())
    return sum(p.numel() for p in model.parameters()) + biases
