"""Small models with random weights, and layouts of pages that are nobody's neighbours."""

from collections.abc import Callable, Sequence

import pytest
import torch

from longforge.kernels.layout import PackedLayout
from longforge.model import CausalLM, LayerSpec, ModelConfig

FAMILIES = {
    "m2": {
        "qk_norm": "per_layer",
        "gemma_norm": False,
        "activation": "silu",
        "layers": ("full/moe", "full/moe", "full/moe"),
    },
    "m3": {
        "qk_norm": "per_head",
        "gemma_norm": True,
        "activation": "swiglu_oai",
        "layers": ("full/dense", "sparse/moe", "sparse/moe"),
        "shared_expert_size": 12,
        "routed_scale": 2.0,
        "dense_size": 40,
    },
}


def tiny_config(family: str = "m3", **changes: object) -> ModelConfig:
    """A model of a few thousand parameters; `layers` as "mixer/feed_forward" words."""
    values: dict = {
        "family": family,
        "vocab_size": 61,
        "hidden_size": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "rotary_dim": 8,
        "rope_theta": 10_000.0,
        "max_positions": 512,
        "block_size": 4,
        "experts": 5,
        "experts_per_token": 2,
        "expert_size": 12,
        "top_k_blocks": 3,
        "index_dim": 16,
        "window": 7,
        "initializer_range": 0.15,
        "bos_id": 1,
        "eos_id": 2,
    }
    values |= FAMILIES[family] | changes
    values["layers"] = tuple(LayerSpec(*word.split("/")) for word in values["layers"])
    return ModelConfig(**values)


def tiny_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Random everywhere, norms and selection biases too, so that nothing is tested at a neutral value."""
    torch.manual_seed(seed)
    model = CausalLM(config).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
        for router in model.routers():
            router.e_score_correction_bias.copy_(torch.randn_like(router.e_score_correction_bias) * 0.1)
    return model


def layout_of(spans: Sequence[tuple[int, int, int]], table: torch.Tensor, block_size: int) -> PackedLayout:
    """Packed tokens of paths (path, first position, end position) over a given page table [P, M]."""
    positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
    paths = torch.cat([torch.full((end - start,), path) for path, start, end in spans])
    pages = table[paths, positions // block_size].long()
    return PackedLayout(positions, paths, pages * block_size + positions % block_size, table, block_size)


@pytest.fixture
def config() -> Callable[..., ModelConfig]:
    return tiny_config


@pytest.fixture
def model() -> Callable[..., CausalLM]:
    return tiny_model


@pytest.fixture
def layout() -> Callable[..., PackedLayout]:
    return layout_of
