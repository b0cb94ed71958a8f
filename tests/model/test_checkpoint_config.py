"""config.json: both ways of writing M3's layers, what is kept, and what is refused."""

import copy

import pytest

from longforge.errors import CheckpointError, ConfigError
from longforge.model import PRESETS, LayerSpec
from longforge.model.checkpoint_config import read_config, write_config

RELEASED_M2 = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "attn_type_list": [1] * 62,
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "layernorm_full_attention_beta": 1.0,
    "max_position_embeddings": 196608,
    "mlp_intermediate_size": 8192,
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
FREQ = [0] * 3 + [1] * 57
RELEASED_M3 = {
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "model_type": "minimax_m3_vl",
    "image_token_index": 200025,
    "vision_config": {"hidden_size": 1280, "num_hidden_layers": 32},
    "text_config": {
        "model_type": "minimax_m2",
        "attention_output_gate": False,
        "bos_token_id": 200034,
        "dense_intermediate_size": 12288,
        "eos_token_id": 200020,
        "head_dim": 128,
        "hidden_act": "swigluoai",
        "hidden_size": 6144,
        "intermediate_size": 3072,
        "max_position_embeddings": 524288,
        "moe_layer_freq": FREQ,
        "n_shared_experts": 1,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 60,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "num_mtp_modules": 7,
        "partial_rotary_factor": 0.5,
        "qk_norm_type": "per_head",
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000,
        "rotary_dim": 64,
        "routed_scaling_factor": 2.0,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 3072,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "use_gemma_norm": True,
        "vocab_size": 200064,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_attention_freq": FREQ,
            "sparse_block_size": 128,
            "sparse_disable_index_value": FREQ,
            "sparse_index_dim": 128,
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_num_index_heads": 4,
            "sparse_score_type": "max",
            "sparse_topk_blocks": 16,
        },
    },
}


def flat_m3():
    """The same text model as transformers writes it."""
    text = copy.deepcopy(RELEASED_M3["text_config"])
    del (
        text["sparse_attention_config"],
        text["moe_layer_freq"],
        text["partial_rotary_factor"],
        text["rope_theta"],
    )
    return text | {
        "architectures": ["MiniMaxM3VLForCausalLM"],
        "model_type": "minimax_m3_vl_text",
        "hidden_act": "silu",
        "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5000000.0, "rope_type": "default"},
        "layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57,
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57,
        "index_n_heads": 4,
        "index_head_dim": 128,
        "index_block_size": 128,
        "index_topk_blocks": 16,
        "index_local_blocks": 1,
    }


def as_released(preset, **changes):
    from dataclasses import replace

    return replace(PRESETS[preset], **changes)


def test_the_released_m2_file_is_the_preset():
    assert read_config(RELEASED_M2) == as_released("m2", mtp_modules=3, bos_id=None, eos_id=None)


def test_the_released_m3_file_is_the_preset_both_ways():
    assert read_config(RELEASED_M3) == as_released("m3", mtp_modules=7)
    assert read_config(flat_m3()) == as_released("m3", mtp_modules=7)


@pytest.mark.parametrize("raw", [RELEASED_M2, RELEASED_M3, flat_m3()], ids=["m2", "m3", "m3-flat"])
def test_reading_writing_and_reading_again_gives_the_same_model(raw):
    config = read_config(raw)
    written = write_config(config, raw, "bfloat16")
    assert read_config(written) == config
    assert "quantization_config" not in written
    text = written.get("text_config", written)
    assert ("layer_types" in text) == ("layer_types" in raw)
    assert ("sparse_attention_config" in text) == ("sparse_attention_config" in raw.get("text_config", {}))
    for key, value in raw.get("text_config", raw).items():
        if key not in ("architectures", "model_type", "quantization_config", "rope_parameters", "hidden_act"):
            assert text[key] == value, key


def test_the_rest_of_a_multimodal_file_is_kept():
    written = write_config(read_config(RELEASED_M3), RELEASED_M3)
    assert written["vision_config"] == RELEASED_M3["vision_config"]
    assert written["image_token_index"] == 200025


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_the_file(name):
    assert read_config(write_config(PRESETS[name])) == PRESETS[name]


def test_what_the_released_classes_cannot_compute_goes_under_our_own_name(config):
    for changes in (
        {"layers": ("sliding/moe", "lightning/dense")},
        {"qk_norm": None},
        {"shared_expert_size": 0},
    ):
        ours = config("m3", **changes)
        written = write_config(ours)
        assert written["architectures"] == ["LongforgeForCausalLM"]
        assert read_config(written) == ours


def test_rotary_width_follows_the_partial_factor_as_transformers_does():
    text = {k: v for k, v in RELEASED_M3["text_config"].items() if k != "partial_rotary_factor"}
    assert read_config({**RELEASED_M3, "text_config": text}).rotary_dim == 64
    flat = flat_m3()
    flat["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    assert read_config(flat).rotary_dim == 128
    assert read_config(flat).rope_theta == 10000.0


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(44, 30), (88, 60), (96, 34)])
def test_the_written_factor_gives_the_rotary_width_back(config, head_dim, rotary_dim):
    ours = config("m3", head_dim=head_dim, rotary_dim=rotary_dim, index_dim=rotary_dim)
    text = write_config(ours)["text_config"]
    assert int(head_dim * text["partial_rotary_factor"]) == rotary_dim
    assert read_config(write_config(ours)).rotary_dim == rotary_dim


def test_several_end_tokens_are_kept_and_the_first_counts():
    raw = RELEASED_M2 | {"eos_token_id": [200020, 5]}
    config = read_config(raw)
    assert config.eos_id == 200020
    assert write_config(config, raw)["eos_token_id"] == [200020, 5]


def changed(raw, path, value):
    raw = copy.deepcopy(raw)
    *parents, last = path.split(".")
    where = raw
    for parent in parents:
        where = where[parent]
    if value is None:
        del where[last]
    else:
        where[last] = value
    return raw


SPARSE = "text_config.sparse_attention_config."


@pytest.mark.parametrize(
    ("raw", "path", "value", "message"),
    [
        (RELEASED_M3, SPARSE + "sparse_init_block", 1, "sparse_init_block: 0 is needed, got 1"),
        (RELEASED_M3, SPARSE + "sparse_local_block", 2, "sparse_local_block: 1 is needed, got 2"),
        (RELEASED_M3, SPARSE + "sparse_score_type", "lse", "sparse_score_type: max is needed, got lse"),
        (
            RELEASED_M3,
            SPARSE + "sparse_disable_index_value",
            [0] * 60,
            "sparse_disable_index_value: true for every",
        ),
        (
            RELEASED_M3,
            SPARSE + "sparse_num_index_heads",
            2,
            "sparse_num_index_heads: one per kv head, 4, is needed",
        ),
        (
            RELEASED_M3,
            SPARSE + "sparse_attention_freq",
            [1, 0],
            "60 entries are needed in sparse_attention_freq",
        ),
        (RELEASED_M3, "text_config.moe_layer_freq", [1], "60 entries are needed in moe_layer_freq"),
        (
            RELEASED_M3,
            "text_config.attention_output_gate",
            True,
            "attention_output_gate: False is needed, got True",
        ),
        (RELEASED_M3, "text_config.use_gemma_norm", False, "use_gemma_norm: True is needed, got False"),
        (RELEASED_M3, "text_config.n_shared_experts", 2, "n_shared_experts: 1 is needed, got 2"),
        (RELEASED_M3, "text_config.hidden_size", None, "a number is needed for hidden_size, got None"),
        (
            RELEASED_M3,
            "text_config.qk_norm_type",
            "per_layer",
            "qk_norm_type: per_head is needed, got per_layer",
        ),
        (RELEASED_M2, "qk_norm_type", "per_head", "qk_norm_type: per_layer is needed, got per_head"),
        (RELEASED_M2, "attn_type_list", [0] * 62, "attn_type_list: 62 ones (full attention) are needed"),
        (RELEASED_M2, "scoring_func", "softmax", "scoring_func: sigmoid is needed, got softmax"),
        (RELEASED_M2, "shared_intermediate_size", 8, "shared_intermediate_size: 0 is needed, got 8"),
        (RELEASED_M2, "sliding_window", 4096, "sliding_window: None is needed, got 4096"),
        (RELEASED_M2, "hidden_size", "3072", "a number is needed for hidden_size, got '3072'"),
        (RELEASED_M2, "hidden_size", 3072.5, "hidden_size: a positive whole number is needed, got 3072.5"),
        (RELEASED_M2, "attn_type_list", 1, "values of the kinds in the released files are needed, got"),
        (
            RELEASED_M3,
            "text_config.num_hidden_layers",
            None,
            "a whole number is needed for num_hidden_layers",
        ),
        (
            RELEASED_M3,
            SPARSE + "sparse_topk_blocks",
            "16",
            "a whole number is needed for sparse_topk_blocks, got '16'",
        ),
        (RELEASED_M2, "architectures", ["LlamaForCausalLM"], "architecture MiniMaxM2ForCausalLM, "),
        (RELEASED_M2, "rope_scaling", {"rope_type": "yarn"}, "rope_type: default is needed, got yarn"),
        (RELEASED_M2, "longforge", {"pages": 4}, "longforge: an object with block_size is needed"),
        (
            flat_m3(),
            "layer_types",
            ["full_attention"] * 59 + ["mamba"],
            "60 entries full_attention or minimax_m3",
        ),
        (
            flat_m3(),
            "moe_layer_freq",
            [1] * 60,
            "mlp_layer_types and moe_layer_freq: the same layers are needed",
        ),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused_in_one_line(raw, path, value, message):
    with pytest.raises((CheckpointError, ConfigError)) as error:
        read_config(changed(raw, path, value))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_our_own_key_is_checked_too():
    ours = write_config(read_config(RELEASED_M2)) | {"architectures": ["LongforgeForCausalLM"]}
    with pytest.raises(ConfigError, match="longforge: the fields of a model are needed"):
        read_config(ours)
    with pytest.raises(CheckpointError, match="a longforge object is needed"):
        read_config({"architectures": ["LongforgeForCausalLM"]})
    with pytest.raises(ConfigError, match=r"longforge\.colour: unknown key"):
        read_config({"architectures": ["LongforgeForCausalLM"], "longforge": {"colour": 1}})
    assert LayerSpec("full", "moe") == read_config(RELEASED_M2).layers[0]
