"""`longforge train pretrain`: from a TOML file and data on disk to a model folder."""

import json

import pytest
import torch
from typer.testing import CliRunner

from longforge.chat import Tokenizer
from longforge.cli.train import app
from longforge.errors import ConfigError, InputError, RunError
from longforge.model import CausalLM
from longforge.training.config import load_config
from longforge.training.launch import pretrain
from longforge.training.sources import read_conversations, read_texts

CONFIG = """
vocab_size = 400
[data]
conversations = "talk.jsonl"
held_out = "talk.jsonl"
texts = "sources"
tokens_per_step = 150
text_tokens = 40
[schedule]
steps = 2
warmup_steps = 1
"""

TALK = {
    "messages": [
        {"role": "user", "content": "Where is Foo?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "look",
            "tool_calls": [
                {"id": "1", "function": {"name": "grep", "arguments": '{"pattern": "class Foo"}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "a.py:3: class Foo:"},
        {"role": "assistant", "content": "a.py"},
    ],
    "tools": [{"type": "function", "function": {"name": "grep", "description": "search"}}],
}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "talk.jsonl").write_text("\n".join([json.dumps(TALK)] * 3))
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "a.py").write_text("class Foo:\n    def bar(self):\n        return 1\n" * 9)
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path / "run.toml"


def test_the_command_leaves_a_model_that_loads(config, tmp_path):
    result = CliRunner().invoke(app, ["pretrain", str(config), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    model = CausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = Tokenizer.load(tmp_path / "run" / "model")
    assert model(torch.tensor([tokenizer.encode("class Foo")])).isfinite().all()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and "answers" in rows[-1]["held_out"]


def test_a_folder_of_another_configuration_is_refused(config, tmp_path):
    plan = load_config(config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "mini"}))
    with pytest.raises(RunError, match="another configuration"):
        pretrain(plan, tmp_path / "run")


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("vocab_size = 400", "vocab_size = 3", "vocab_size"),
        ("vocab_size = 400", "vocab_size = 400\nmodel = 'macro'", "model: expected one of m2"),
        ('held_out = "talk.jsonl"', 'held_out = "nowhere.jsonl"', "nowhere.jsonl"),
    ],
)
def test_after_a_mended_mistake_the_folder_is_still_free(config, tmp_path, right, wrong, said):
    config.write_text(CONFIG.replace(right, wrong))
    with pytest.raises((ConfigError, InputError), match=said):
        pretrain(load_config(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_named_in_one_line(config, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunError, match=r"run: a folder that can be written is needed, got") as error:
        pretrain(load_config(config), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_device_that_is_not_there_is_named(config, tmp_path):
    with pytest.raises(InputError, match="device: one that torch can use here is needed, got banana"):
        pretrain(load_config(config), tmp_path / "run", device="banana")
    assert not (tmp_path / "run").exists()


def test_a_config_without_data_is_refused(tmp_path):
    (tmp_path / "run.toml").write_text("[schedule]\nsteps = 3")
    with pytest.raises(ConfigError, match="conversations"):
        pretrain(load_config(tmp_path / "run.toml"), tmp_path / "run")


@pytest.mark.parametrize("line", ["{", '{"message": []}', '{"messages": [{"content": "x"}]}', "[]"])
def test_a_line_that_is_no_conversation_is_named(tmp_path, line):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps(TALK) + "\n" + line)
    with pytest.raises(InputError, match=r"talk\.jsonl:2:"):
        read_conversations(path)


def test_a_folder_without_texts_is_named(tmp_path):
    with pytest.raises(InputError, match=r"expected text files"):
        read_texts(tmp_path)
