"""A pretraining run from a configuration and a folder: what `longforge train pretrain` does."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from longforge.chat import Tokenizer, render, train_tokenizer
from longforge.chat.tokens import BOS
from longforge.errors import ConfigError, InputError, RunError
from longforge.model.causal_lm import CausalLM
from longforge.model.config import ModelConfig
from longforge.model.presets import PRESETS
from longforge.observe import write_text_atomic
from longforge.training.config import PretrainConfig
from longforge.training.pretrain import Pretrainer, StepReport
from longforge.training.samples import Conversation, ConversationSource
from longforge.training.scores import held_out_batches, teacher_forced_scores
from longforge.training.sources import build_stream, read_conversations, read_texts

__all__ = ["finished_model", "model_shape", "new_model", "pretrain"]

RESOLVED = "config.json"


def pretrain(
    config: PretrainConfig,
    folder: Path,
    *,
    report: Callable[[StepReport], None] | None = None,
    device: torch.device | str = "cpu",
) -> bool:
    """Trains as `config` says, or goes on with what `folder` holds; writes the model to `folder/model`.

    Returns False when interrupted. Raises ConfigError or InputError for what cannot be trained, RunError for
    a folder that belongs to another configuration.
    """
    data = config.data
    _preset(config)
    _check_device(device)
    if not (data.conversations or data.texts):
        raise ConfigError("data: expected `conversations` or `texts` to train on, got neither")
    conversations = read_conversations(Path(data.conversations)) if data.conversations else []
    texts = read_texts(Path(data.texts)) if data.texts else []
    _refuse_another(folder, config)
    tokenizer = _tokenizer(config, folder, conversations, texts)
    model = new_model(config, tokenizer)
    stream = build_stream(
        config,
        tokenizer,
        model.config.block_size,
        conversations=(lambda i: conversations[i % len(conversations)]) if conversations else None,
        texts=texts,
    )
    evaluate = _evaluation(config, tokenizer, model.config.block_size, device)
    try:
        _claim(folder, config, tokenizer)
        trainer = Pretrainer(model, stream, config, folder, evaluate=evaluate, report=report, device=device)
        trainer.resume()
        if not trainer.run():
            return False
    except OSError as error:
        raise RunError(f"{folder}: a folder that can be written is needed, got {error}") from error
    finished_model(trainer.model.cpu(), torch.float32).save_pretrained(folder / "model")
    tokenizer.save(folder / "model")
    return True


def model_shape(config: PretrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The preset with the vocabulary and special tokens of this run. Raises ConfigError."""
    preset = _preset(config)
    vocabulary = config.vocab_size or preset.vocab_size
    if tokenizer.vocab_size > vocabulary:
        raise ConfigError(
            f"vocab_size: expected at least the tokenizer's {tokenizer.vocab_size}, got {vocabulary}"
        )
    return dataclasses.replace(
        preset, vocab_size=vocabulary, bos_id=tokenizer.token_id(BOS), eos_id=tokenizer.eos_id
    )


def new_model(config: PretrainConfig, tokenizer: Tokenizer) -> CausalLM:
    """The untrained model of the seed."""
    torch.manual_seed(config.seed)
    model = CausalLM(model_shape(config, tokenizer))
    if config.tie_while_training and model.lm_head is not None:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def finished_model(model: CausalLM, dtype: torch.dtype) -> CausalLM:
    """A copy in `dtype` whose output head is a table of its own, as the released format has it."""
    finished = CausalLM(model.config)
    finished.load_state_dict(model.state_dict())
    return finished.to(dtype)


def _preset(config: PretrainConfig) -> ModelConfig:
    if config.model not in PRESETS:
        raise ConfigError(f"model: expected one of {', '.join(PRESETS)}, got {config.model!r}")
    return PRESETS[config.model]


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise InputError(f"device: one that torch can use here is needed, got {device}: {reason}") from error


def _refuse_another(folder: Path, config: PretrainConfig) -> None:
    """Raises RunError where the folder was made with another configuration."""
    file = folder / RESOLVED
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != json.loads(_resolved(config)):
        raise RunError(f"{folder}: holds a run of another configuration ({file}); name an empty folder")


def _claim(folder: Path, config: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Writes the resolved configuration and the tokenizer where they are not there yet.

    Only once all that a user may have mistaken is read: after the mistake is mended the folder is still free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RESOLVED).exists():
        write_text_atomic(folder / RESOLVED, _resolved(config))
    if not (config.data.tokenizer or (folder / "tokenizer.json").exists()):
        tokenizer.save(folder)


def _resolved(config: PretrainConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def _tokenizer(
    config: PretrainConfig, folder: Path, conversations: list[Conversation], texts: list[str]
) -> Tokenizer:
    """The configured one, the folder's, or one trained on the data."""
    if config.data.tokenizer:
        return Tokenizer.load(config.data.tokenizer)
    if (folder / "tokenizer.json").exists():
        return Tokenizer.load(folder)
    size = config.vocab_size or _preset(config).vocab_size
    rendered = (render(c.messages, c.tools, add_generation_prompt=False) for c in conversations)
    return train_tokenizer([*rendered, *texts], size)


def _evaluation(
    config: PretrainConfig, tokenizer: Tokenizer, block_size: int, device: torch.device | str
) -> Callable[[CausalLM, int], Mapping[str, float]] | None:
    if not config.data.held_out:
        return None
    held_out = read_conversations(Path(config.data.held_out))
    source = ConversationSource(lambda i: held_out[i], tokenizer, max_tokens=config.data.max_tokens)
    batches = held_out_batches(
        [source.sample(i) for i in range(len(held_out))],
        tokens=config.data.tokens_per_step,
        block_size=block_size,
    )
    batches = [batch.to(device) for batch in batches]

    def evaluate(model: CausalLM, step: int) -> Mapping[str, float]:
        return teacher_forced_scores(model, batches)

    return evaluate
