"""The shapes that were published, and configurations that make no model."""

import pytest
import torch

from longforge.errors import ConfigError, InputError
from longforge.model import PRESETS, CausalLM, LayerSpec
from longforge.model.info import find_config, model_info


def test_m2_has_the_published_counts():
    info = model_info(PRESETS["m2"])
    assert round(info["total_parameters"] / 1e9, 3) == 228.690
    assert round(info["active_parameters_without_tables"] / 1e9, 3) == 9.801
    assert round(info["active_parameters"] / 1e9, 3) == 11.031
    assert info["kv_bytes_per_token"] == 248 * 1024
    assert info["index_bytes_per_token"] == 0


def test_m3_has_the_published_counts():
    info = model_info(PRESETS["m3"])
    assert round(info["total_parameters"] / 1e9, 3) == 426.175
    assert round(info["active_parameters_without_tables"] / 1e9, 2) == 23.50
    assert info["kv_bytes_per_token"] == 122_880
    assert info["index_bytes_per_token"] == 14_592
    assert info["selected_tokens"] == 2048


def test_every_preset_builds_without_memory():
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = CausalLM(config)
        assert len(model.model.layers) == len(config.layers), name
        assert all(p.is_meta for p in model.parameters())


def test_micro_and_mini_are_small_and_of_m3s_structure():
    assert 3e6 < model_info(PRESETS["micro"])["total_parameters"] < 8e6
    assert 1.5e8 < model_info(PRESETS["mini"])["total_parameters"] < 2.5e8
    for name in ("micro", "mini"):
        config = PRESETS[name]
        assert config.layers[0] == LayerSpec("full", "dense")
        assert set(config.layers[1:]) == {LayerSpec("sparse", "moe")}
        assert config.kv_heads == 4 and config.mtp_modules == 1


def test_info_counts_what_the_model_holds(config):
    held = config("m3", mtp_modules=2)
    model = CausalLM(held)
    info = model_info(held)
    biases = sum(r.e_score_correction_bias.numel() for r in model.routers())
    assert info["total_parameters"] + info["mtp_parameters"] == biases + sum(
        p.numel() for p in model.parameters()
    )


def test_info_counts_states_of_lightning_layers_and_no_keys_for_them(config):
    info = model_info(config("m2", layers=("full/moe", "lightning/moe", "sliding/moe")))
    assert info["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert info["state_bytes_per_page"] == 4 * 16 * 16 * 4


def test_an_unknown_preset_is_named(tmp_path):
    assert find_config("micro") is PRESETS["micro"]
    with pytest.raises(InputError, match=r"m9: a preset \(m2, m3, micro, mini\) or a model folder is needed"):
        find_config("m9")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "heads: a multiple of kv_heads 3 is needed, got 4"),
        ({"rotary_dim": 18}, "rotary_dim: an even number up to head_dim 16 is needed, got 18"),
        ({"rotary_dim": 7}, "rotary_dim: an even number up to head_dim 16 is needed, got 7"),
        ({"experts_per_token": 6}, "experts_per_token: at most experts 5 is needed, got 6"),
        ({"block_size": 0}, "block_size: a positive whole number is needed, got 0"),
        ({"hidden_size": 32.0}, "hidden_size: a positive whole number is needed, got 32.0"),
        ({"index_dim": 6}, "index_dim: at least rotary_dim 8 is needed, got 6"),
        ({"mtp_modules": -1}, "mtp_modules: zero or more is needed, got -1"),
        ({"activation": "relu"}, "activation: one of silu, swiglu_oai is needed, got relu"),
        ({"layers": ("sliding/moe",), "window": 0}, "window: a positive whole number is needed, got 0"),
        ({"layers": ("mamba/moe",)}, "mixer: one of full, sliding, lightning, sparse is needed, got mamba"),
        ({"layers": ()}, "layers: at least one layer is needed, got none"),
    ],
)
def test_a_configuration_that_makes_no_model_says_why(config, changes, message):
    with pytest.raises(ConfigError) as error:
        config("m3", **changes)
    assert str(error.value) == message
