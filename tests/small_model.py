"""A real model and tokenizer as small as they get: random weights, sparse attention that really selects."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from longforge.chat import Tokenizer, train_tokenizer
from longforge.kernels.layout import PackedLayout
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


def small_config(mixture: str = "sparse", max_positions: int = 96, hidden_size: int = 24) -> ModelConfig:
    return ModelConfig(
        family="m3",
        layers=MIXTURES[mixture],
        vocab_size=small_tokenizer().vocab_size,
        hidden_size=hidden_size,
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
        window=7 if mixture == "sliding" else 0,
        initializer_range=0.2,
        mtp_modules=1,
    )


def small_model(
    mixture: str = "sparse", *, seed: int = 0, max_positions: int = 96, hidden_size: int = 24
) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(small_config(mixture, max_positions, hidden_size)).eval()


def teach(model: CausalLM, dialogues: Sequence[tuple[list[int], list[int]]]) -> CausalLM:
    """Sets the head so that each prompt (ids) is continued by its answer (ids), surely, at any temperature.

    The hidden states that precede the answers' tokens are linearly independent as long as there are fewer of
    them than hidden channels; the head is then the exact solution of a linear system. Everything below it
    stays random.
    """
    rows, targets = [], []
    with torch.no_grad():
        for prompt, answer in dialogues:
            layout = PackedLayout.from_lengths([len(prompt) + len(answer)], model.config.block_size)
            hidden = model.forward_packed(torch.tensor(prompt + answer), layout).hidden
            rows.append(hidden[len(prompt) - 1 : -1].double())
            targets += answer
        states = torch.cat(rows)
        assert len(states) <= model.config.hidden_size, "too much to teach"
        wanted = 30.0 * torch.nn.functional.one_hot(torch.tensor(targets), model.config.vocab_size).double()
        model.lm_head.weight.copy_((torch.linalg.pinv(states) @ wanted).T)
    return model


def write_small_checkpoint(folder: Path, *, seed: int = 0, max_positions: int = 96) -> Path:
    small_model(seed=seed, max_positions=max_positions).save_pretrained(folder)
    small_tokenizer().save(folder)
    return folder
