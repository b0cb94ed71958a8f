"""A real model and tokenizer as small as they get: random weights, sparse attention that really selects."""

from functools import cache
from pathlib import Path

import torch

from longforge.chat import Tokenizer, train_tokenizer
from longforge.model import CausalLM, LayerSpec, ModelConfig

TEXTS = (
    "Which file defines the class?",
    "def read(path, start, end): return lines[start:end]",
    "naïve café ☕ 字",
)
MIXTURES = {
    "sparse": (LayerSpec("full", "dense"), LayerSpec("sparse", "moe"), LayerSpec("sparse", "moe")),
    "sliding": (LayerSpec("sliding", "dense"), LayerSpec("full", "moe")),
    "lightning": (LayerSpec("lightning", "dense"), LayerSpec("sparse", "moe")),
}


@cache
def small_tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def small_config(mixture: str = "sparse", max_positions: int = 96) -> ModelConfig:
    return ModelConfig(
        family="m3",
        layers=MIXTURES[mixture],
        vocab_size=small_tokenizer().vocab_size,
        hidden_size=24,
        heads=4,
        kv_heads=2,
        head_dim=8,
        rotary_dim=4,
        rope_theta=10_000.0,
        qk_norm="per_head",
        gemma_norm=True,
        activation="swiglu_oai",
        max_positions=max_positions,
        block_size=4,
        experts=4,
        experts_per_token=2,
        expert_size=16,
        shared_expert_size=16,
        routed_scale=2.0,
        dense_size=32,
        top_k_blocks=3,
        index_dim=8,
        window=7,
        initializer_range=0.2,
        mtp_modules=1,
    )


def small_model(mixture: str = "sparse", *, seed: int = 0, max_positions: int = 96) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(small_config(mixture, max_positions)).eval()


def write_small_checkpoint(folder: Path, *, seed: int = 0, max_positions: int = 96) -> Path:
    small_model(seed=seed, max_positions=max_positions).save_pretrained(folder)
    small_tokenizer().save(folder)
    return folder
