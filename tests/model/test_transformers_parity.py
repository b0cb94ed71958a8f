"""The same logits as transformers, on random small checkpoints of both families, written by either side.

Prompts are far longer than top_k_blocks * block_size, so the selection matters.
"""

import pytest
import torch

from longforge.kernels.layout import PackedLayout
from longforge.model import CausalLM, KVCache

transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-5

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "rotary_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
M3 = COMMON | {
    "partial_rotary_factor": 0.5,
    "dense_intermediate_size": 40,
    "shared_intermediate_size": 12,
    "moe_layer_freq": [0, 1, 1],
    "sparse_attention_config": {
        "sparse_num_index_heads": 2,
        "sparse_index_dim": 16,
        "sparse_block_size": 4,
        "sparse_topk_blocks": 3,
        "sparse_local_block": 1,
        "sparse_init_block": 0,
        "sparse_attention_freq": [0, 1, 1],
    },
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}


def peer(kind):
    """A transformers model, random everywhere."""
    torch.manual_seed(3)
    if kind == "m2":
        model = transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(**COMMON))
    elif kind == "m3-text":
        model = transformers.MiniMaxM3VLForCausalLM(transformers.MiniMaxM3VLTextConfig(**M3))
    else:
        config = transformers.MiniMaxM3VLConfig(
            text_config=M3, vision_config=VISION, projector_hidden_size=32
        )
        model = transformers.MiniMaxM3SparseForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
        for name, bias in model.named_buffers():
            if "e_score_correction_bias" in name:
                bias.copy_(torch.randn_like(bias) * 0.1)
    return model.eval()


CLASSES = {"m2": "MiniMaxM2ForCausalLM", "m3": "MiniMaxM3SparseForConditionalGeneration"}
KINDS = ["m2", "m3-text", "m3-multimodal"]


def ids_of(batch, tokens):
    return torch.randint(0, 61, (batch, tokens), generator=torch.Generator().manual_seed(9))


def close(ours, theirs):
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_checkpoint_of_transformers_gives_its_logits(kind, tmp_path, caplog):
    theirs = peer(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = CausalLM.from_pretrained(tmp_path / "theirs")
    ids = ids_of(2, 90)
    close(ours(ids), theirs(input_ids=ids).logits)
    assert ("a multimodal checkpoint; the text model is read" in caplog.text) == (kind == "m3-multimodal")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_token_by_token_gives_the_same_logits(kind, tmp_path):
    theirs = peer(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = CausalLM.from_pretrained(tmp_path / "theirs")
    size = ours.config.block_size
    ids = ids_of(1, 40)
    cache = KVCache(ours.config, pages=-(-40 // size))
    past = None
    whole = PackedLayout.from_lengths([40], size)
    for t in range(40):
        step = PackedLayout(
            whole.positions[t : t + 1], whole.paths[:1], whole.slots[t : t + 1], whole.page_table, size
        )
        hidden = ours.forward_packed(ids[0, t : t + 1], step, cache).hidden
        out = theirs(input_ids=ids[:, t : t + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        close(ours.logits(hidden), out.logits[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_transformers_reads_what_we_write(kind, tmp_path):
    theirs = peer(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = CausalLM.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", max_shard_bytes=30_000)
    kind_of = getattr(transformers, CLASSES[ours.config.family])
    again, report = kind_of.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all("vision_tower" in key or "multi_modal_projector" in key for key in report["missing_keys"])
    ids = ids_of(2, 90)
    close(ours(ids), again.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["m2", "m3"])
@torch.no_grad()
def test_transformers_reads_a_model_that_never_was_its_own(config, model, tmp_path, family):
    ours = model(config(family, mtp_modules=1, rope_theta=3e4))
    ours.save_pretrained(tmp_path / "ours")
    theirs = getattr(transformers, CLASSES[family]).from_pretrained(tmp_path / "ours").eval()
    ids = ids_of(2, 90)
    close(ours(ids), theirs(input_ids=ids).logits)
    padded = torch.ones_like(ids)
    padded[1, 50:] = 0
    logits = theirs(input_ids=ids, attention_mask=padded).logits
    close(ours(ids, torch.tensor([90, 50]))[1, :50], logits[1, :50])
