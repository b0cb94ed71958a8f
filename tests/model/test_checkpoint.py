"""Model folders: what is written is read back bit for bit, and what is wrong is named."""

import json
import logging
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longforge.errors import CheckpointError, ConfigError
from longforge.model import CausalLM
from longforge.model.checkpoint import config_of
from longforge.model.safetensors_files import dequantise


def same(one: CausalLM, other: CausalLM) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return one.config == other.config and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


KINDS = {
    "m2": {"family": "m2", "mtp_modules": 1},
    "m3": {"family": "m3", "mtp_modules": 2},
    "tied": {"family": "m3", "tie_embeddings": True},
    "ours": {"family": "m3", "layers": ("full/dense", "sliding/moe", "lightning/moe", "sparse/dense")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_back_the_same_model(config, model, tmp_path, kind):
    lm = model(config(**KINDS[kind]))
    lm.save_pretrained(tmp_path / "m")
    again = CausalLM.from_pretrained(tmp_path / "m")
    assert same(lm, again)
    assert all(p.requires_grad for p in again.parameters())
    ids = torch.randint(0, 61, (1, 20))
    with torch.no_grad():
        assert torch.equal(lm(ids), again(ids))


def test_the_names_on_disk_are_the_released_ones(config, model, tmp_path):
    model(config("m3", mtp_modules=1)).save_pretrained(tmp_path / "m3")
    names = set(load_file(tmp_path / "m3" / "model.safetensors"))
    root = "language_model.model."
    assert {"language_model.lm_head.weight", f"{root}embed_tokens.weight", f"{root}norm.weight"} <= names
    assert {f"{root}layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")} <= names
    assert {
        f"{root}layers.2.self_attn.index_{n}.weight" for n in ("q_proj", "k_proj", "q_norm", "k_norm")
    } <= names
    moe = f"{root}layers.1.block_sparse_moe."
    assert {f"{moe}experts.4.w{i}.weight" for i in (1, 2, 3)} | {f"{moe}e_score_correction_bias"} <= names
    assert f"{moe}shared_experts.down_proj.weight" in names
    mtp = f"{root}mtp.layers.0."
    assert {f"{mtp}{n}.weight" for n in ("enorm", "hnorm", "eh_proj", "final_layernorm")} <= names
    assert f"{mtp}transformer_layer.block_sparse_moe.experts.0.w1.weight" in names
    model(config("m2")).save_pretrained(tmp_path / "m2")
    names = set(load_file(tmp_path / "m2" / "model.safetensors"))
    assert {"lm_head.weight", "model.layers.0.block_sparse_moe.experts.0.w1.weight"} <= names


def test_shards_hold_the_same_model_and_replace_a_single_file(config, model, tmp_path):
    lm = model(config("m3", mtp_modules=1))
    lm.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    lm.save_pretrained(tmp_path / "m", max_shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 3 and files[0].startswith("model-00001-of-")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert same(lm, CausalLM.from_pretrained(tmp_path / "m"))
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "{}"
    lm.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@contextmanager
def disk_for(size):
    """No file may grow beyond `size` bytes: the system refuses the write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 10_000], ids=["nothing fits", "the first shard fits"])
def test_a_write_that_fails_leaves_the_old_folder_whole(config, model, tmp_path, size):
    lm = model(config("m3"))
    lm.save_pretrained(tmp_path / "m")
    with (
        disk_for(size),
        pytest.raises(CheckpointError, match="a folder that can be written is needed, got") as error,
    ):
        model(config("m3"), seed=1).save_pretrained(tmp_path / "m", max_shard_bytes=15_000)
    assert "\n" not in str(error.value)
    assert same(lm, CausalLM.from_pretrained(tmp_path / "m"))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(config, model, tmp_path, monkeypatch):
    lm = model(config("m3"))
    lm.save_pretrained(tmp_path / "m")
    rename = Path.rename

    def refused(self, target):
        if self.suffix == ".new":
            raise OSError("Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(CheckpointError, match="got Device or resource busy"):
        model(config("m3"), seed=1).save_pretrained(tmp_path / "m")
    assert same(lm, CausalLM.from_pretrained(tmp_path / "m"))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_what_else_an_older_folder_holds_stays_and_a_link_is_followed(config, model, tmp_path):
    lm = model(config("m3"))
    (tmp_path / "m" / "notes").mkdir(parents=True)
    (tmp_path / "m" / "notes" / "a.txt").write_text("kept")
    (tmp_path / "m" / "alias").symlink_to("notes")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    lm.save_pretrained(tmp_path / "link")
    assert (tmp_path / "m" / "alias").is_symlink()
    assert (tmp_path / "m" / "alias" / "a.txt").read_text() == "kept"
    assert same(lm, CausalLM.from_pretrained(tmp_path / "m"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "m"] and (tmp_path / "link").is_symlink()


def test_half_precision_on_disk_and_in_memory(config, model, tmp_path):
    lm = model(config("m3"))
    lm.save_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert stored["language_model.model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    bias = "language_model.model.layers.1.block_sparse_moe.e_score_correction_bias"
    assert stored[bias].dtype == torch.float32
    narrow = CausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert narrow.lm_head.weight.dtype == torch.float32
    assert {r.weight.dtype for r in narrow.routers()} == {torch.float32}
    wide = CausalLM.from_pretrained(tmp_path / "m")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    ids = torch.randint(0, 61, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(narrow(ids), wide(ids), rtol=0, atol=0.2)


def test_fp8_weights_are_dequantised_by_their_blocks(config, model, tmp_path):
    lm = model(config("m2", hidden_size=160, expert_size=136))
    lm.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if ".experts." in n or "_proj" in n]:
        rows, columns = tensors[name].shape
        scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) + 0.5
        value = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
        tensors |= {name: value, f"{name}_scale_inv": scale}
    save_file(tensors, file)
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    read = CausalLM.from_pretrained(tmp_path / "m")
    up = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    held = read.state_dict()["model.layers.1.mlp.experts.gate_up_proj"][3, 136:]
    value, scale = tensors[up].float(), tensors[f"{up}_scale_inv"]
    for row, column in [(0, 0), (127, 127), (128, 5), (5, 128), (135, 159)]:
        expected = value[row, column] * scale[row // 128, column // 128]
        assert held[row, column] == expected
    read.save_pretrained(tmp_path / "again")
    assert same(read, CausalLM.from_pretrained(tmp_path / "again"))


def test_scales_that_do_not_fit_are_refused():
    weight = torch.zeros(130, 20).to(torch.float8_e4m3fn)
    with pytest.raises(
        CheckpointError, match=r"w: scales fp32 \[2, 1\] in blocks of 128x128 are needed, got"
    ):
        dequantise(weight, torch.ones(1, 1), (128, 128), "w")
    with pytest.raises(CheckpointError, match=r"got torch.uint8 \[2, 1\]"):
        dequantise(weight, torch.ones(2, 1, dtype=torch.uint8), (128, 128), "w")


def test_declared_mtp_modules_that_are_not_held_are_read_as_none(config, model, tmp_path, caplog):
    model(config("m3")).save_pretrained(tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    raw["text_config"]["num_mtp_modules"] = 7
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    with caplog.at_level(logging.WARNING):
        lm = CausalLM.from_pretrained(tmp_path / "m")
    assert lm.config.mtp_modules == 0 and not lm.mtp
    assert "declares 7 multi-token prediction modules, the checkpoint holds 0: read as 0" in caplog.text
    assert config_of(tmp_path / "m").mtp_modules == 7


def corrupt_json(folder):
    (folder / "config.json").write_text("{")


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def nothing_but_a_header(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\x00")


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without(name):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors")

    return change


def with_tensor(name, tensor):
    def change(folder):
        save_file(load_file(folder / "model.safetensors") | {name: tensor}, folder / "model.safetensors")

    return change


def lost_shard(folder):
    index = {"weight_map": {"language_model.lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def odd_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1, "b": "c"}}')


def wrong_index(folder):
    index = {"weight_map": {"language_model.nose.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


HEAD = "language_model.lm_head.weight"
NORM = "language_model.model.norm.weight"
FP8 = torch.zeros(32).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "config.json").unlink(),
            "config.json: this file is needed in a model folder, and is missing",
        ),
        (corrupt_json, "config.json: a JSON object is needed, got unreadable text"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: a JSON object is needed, got list"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "model.safetensors: this file is needed in a model folder",
        ),
        (truncate, "model.safetensors: a whole safetensors file is needed, got a truncated or damaged one"),
        (nothing_but_a_header, "a whole safetensors file is needed, got a truncated or damaged one"),
        (pickled, "pytorch_model.bin: safetensors are needed, got pickled weights, which are never loaded"),
        (without(NORM), f"tensor {NORM} is needed, and is missing"),
        (with_tensor(HEAD, torch.zeros(61, 31)), f"{HEAD} of shape [61, 32] is needed, got [61, 31]"),
        (
            with_tensor("language_model.model.layers.9.x", torch.zeros(1)),
            "layers.9.x has no place in the model",
        ),
        (with_tensor(NORM, FP8), f"{NORM}_scale_inv is needed for {NORM} in torch.float8_e4m3fn"),
        (lost_shard, "model-00001-of-00002.safetensors: this shard is needed by the index, and is missing"),
        (wrong_index, "tensor language_model.nose.weight is needed by the index, and is missing"),
        (odd_index, "model.safetensors.index.json: a weight_map object is needed, and is missing"),
    ],
)
def test_a_broken_folder_is_named_in_one_line(config, model, tmp_path, change, message):
    model(config("m3")).save_pretrained(tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(CheckpointError) as error:
        CausalLM.from_pretrained(tmp_path / "m")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_and_a_wrong_value_name_the_path(config, model, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: a model folder is needed, and there is none"):
        CausalLM.from_pretrained(tmp_path / "nowhere")
    model(config("m3")).save_pretrained(tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    raw["text_config"]["num_key_value_heads"] = 3
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"config.json: .*one per kv head, 3, is needed, got 2"):
        CausalLM.from_pretrained(tmp_path / "m")
    raw["quantization_config"] = {"quant_method": "gptq"}
    raw["text_config"]["num_key_value_heads"] = 2
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="quant_method fp8 or none is needed, got gptq"):
        CausalLM.from_pretrained(tmp_path / "m")
    raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": 128}
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"weight_block_size \[rows, columns\] is needed, got 128"):
        CausalLM.from_pretrained(tmp_path / "m")
