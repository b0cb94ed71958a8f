"""What a ready server prints, and where and in which dtype it computes."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longforge.errors import CheckpointError, InputError
from longforge.forge.engine_process import _READY
from longforge.server.banner import Features, ServerFacts, banner, capacity
from longforge.server.placement import LARGE_WEIGHTS, choose_placement, cpu_dtype
from small_model import write_small_checkpoint

FACTS = ServerFacts(
    model="it's mine",
    url="http://127.0.0.1:8000",
    context=4096,
    pages=1024,
    page_tokens=64,
    threads=1,
    threads_why="1 of 2 cores (1.0 are busy)",
    placement="CPU, float32: as asked",
)


def rows(facts: ServerFacts) -> dict[str, str]:
    lines = banner(facts).splitlines()[1:]
    return {line[2:13].strip(): line[13:] for line in lines}


def test_the_first_line_is_the_one_that_programs_wait_for():
    first = banner(FACTS).splitlines()[0]
    found = _READY.search(first)
    assert found is not None and found[1] == FACTS.url
    assert first.endswith("(context 4096, 1024 pages of 64 tokens, 1 thread); Ctrl-C stops it")


def test_every_command_can_be_pasted():
    said = rows(FACTS)
    curl = shlex.split(said["try it"])
    assert curl[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(curl[-1])["model"] == "it's mine"
    assert said["OpenAI"] == "export OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none"
    assert said["Anthropic"].startswith("export ANTHROPIC_BASE_URL=http://127.0.0.1:8000 ")
    assert said["web page"] == "http://127.0.0.1:8000/"
    assert "notice" not in said


def test_a_server_on_every_address_is_shown_at_one_that_works():
    said = rows(replace(FACTS, url="http://0.0.0.0:8000"))
    assert said["web page"] == "http://127.0.0.1:8000/"
    assert banner(replace(FACTS, url="http://0.0.0.0:8000")).startswith(
        "longforge serves it's mine at http://0.0"
    )


def test_where_keys_are_asked_for_the_commands_have_a_place_for_one():
    said = rows(replace(FACTS, features=Features(api_keys=2)))
    assert "Authorization: Bearer YOUR-KEY" in shlex.split(said["try it"])
    assert said["OpenAI"].endswith("OPENAI_API_KEY=YOUR-KEY")
    assert said["active"] == "API keys (2)"


@pytest.mark.parametrize(
    ("pages", "page_tokens", "context", "said"),
    [
        (1024, 64, 4096, "65,536 tokens: 16 full contexts of 4,096 tokens at once"),
        (1024, 128, 131072, "131,072 tokens: 16 chats of 8,192 tokens at once"),
        (2, 64, 100, "128 tokens: 1 full context of 100 tokens at once"),
        (64, 128, 8192, "8,192 tokens: 1 full context of 8,192 tokens at once"),
    ],
)
def test_capacity_is_told_in_conversations(pages: int, page_tokens: int, context: int, said: str):
    assert capacity(pages, page_tokens, context) == said


def test_features_that_are_on_are_named_and_no_others():
    assert Features().words() == []
    everything = Features(16, True, 2, True, ("host memory", "disk"), 3)
    assert everything.words() == [
        "MSA (16 blocks a token)",
        "prefix cache",
        "MTP speculation (2 drafted)",
        "constrained output",
        "tiers (host memory, disk)",
        "API keys (3)",
    ]
    assert rows(FACTS)["active"] == "plain generation"


@pytest.mark.parametrize(
    ("declared", "weights", "engine", "chosen"),
    [
        (torch.float32, 10 * LARGE_WEIGHTS, "amx", torch.float32),
        (torch.bfloat16, LARGE_WEIGHTS, "amx", torch.bfloat16),
        (torch.bfloat16, LARGE_WEIGHTS, "avx512", torch.bfloat16),
        (torch.bfloat16, LARGE_WEIGHTS - 1, "avx512", torch.float32),
        (torch.bfloat16, 1, "amx", torch.bfloat16),
        (torch.bfloat16, LARGE_WEIGHTS, None, torch.float32),
        (torch.float16, LARGE_WEIGHTS, "amx", torch.bfloat16),
    ],
)
def test_bf16_on_a_cpu_with_matrix_tiles_and_for_large_weights_on_one_that_multiplies_it(
    declared: torch.dtype, weights: int, engine: str | None, chosen: torch.dtype
):
    dtype, why = cpu_dtype(declared, weights, engine)
    assert dtype is chosen and re.search(r"\w", why)


def test_placement_of_a_folder(tmp_path: Path):
    folder = write_small_checkpoint(tmp_path / "tiny")
    assert str(choose_placement(folder, "cpu")) == "CPU, float32: as the checkpoint says"
    assert choose_placement(folder, "cpu", "bfloat16").dtype is torch.bfloat16
    with pytest.raises(InputError, match="dtype: expected auto, bfloat16 or float32, got 'float16'"):
        choose_placement(folder, "cpu", "float16")
    with pytest.raises(InputError, match="device: expected auto, cpu, cuda or cuda:N, got 'tpu'"):
        choose_placement(folder, "tpu")
    with pytest.raises(CheckpointError):
        choose_placement(tmp_path / "nothing", "cpu")
