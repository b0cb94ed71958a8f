"""The model: configuration, decoder, mixers, experts, multi-token prediction, checkpoints."""

from longforge.model.cache import KVCache
from longforge.model.causal_lm import CausalLM, PackedOutput
from longforge.model.config import LayerSpec, ModelConfig
from longforge.model.presets import PRESETS

__all__ = ["PRESETS", "CausalLM", "KVCache", "LayerSpec", "ModelConfig", "PackedOutput"]
