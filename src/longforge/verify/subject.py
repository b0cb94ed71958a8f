"""The model that is examined, and the engines that the checks make of it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longforge.chat import Tokenizer, encode_prompt
from longforge.chat.tokens import EOS
from longforge.engine import Engine
from longforge.errors import CheckpointError, InputError
from longforge.forge.code_search.prompts import TOOL_SPECS, opening_messages
from longforge.kernels.host_memory import keep_freed_memory
from longforge.model import CausalLM, shipped
from longforge.protocol import Message, ToolCall, ToolSpec
from longforge.server.cores import free_cores
from longforge.server.launch import model_folder
from longforge.server.placement import choose_placement

__all__ = ["Subject", "Talk", "open_subject", "rounding_of"]

LEAST_PAGES = 8
"""Pages that a context must hold."""
GREP = ToolSpec("grep", "search lines", {"type": "object", "properties": {"pattern": {"type": "string"}}})


@dataclass(frozen=True)
class Talk:
    """A conversation to answer, as a request tells it."""

    model: str
    messages: list[Message]
    tools: tuple[ToolSpec, ...]
    prompt: tuple[int, ...]
    """The same as token ids."""


@dataclass
class Subject:
    """A loaded model with its tokenizer, and what its engines left behind.

    conversation: messages with a tool call and its result, something that the model knows if we know what it
    knows. tolerance: what log-probabilities of one dtype may differ by (`rounding_of`).
    """

    model: CausalLM
    tokenizer: Tokenizer
    name: str
    conversation: list[Message]
    tools: tuple[ToolSpec, ...]
    tolerance: float
    engines: int = 0
    """Engines that came to rest and were examined."""
    pages: int = 0
    """Their pages."""
    leaks: list[str] = field(default_factory=list)
    """What was wrong with the pages of an engine at rest."""

    @property
    def block(self) -> int:
        """Tokens of a page."""
        return self.model.config.block_size

    def tokens(self, count: int, seed: int) -> tuple[int, ...]:
        """Ids drawn from the whole vocabulary, always the same ones."""
        draw = random.Random(f"verify {seed}")
        return tuple(draw.randrange(self.tokenizer.vocab_size) for _ in range(count))

    @property
    def deep(self) -> int:
        """Pages of a prompt whose last tokens leave some out, where the model selects; else a few."""
        config = self.model.config
        pages = config.top_k_blocks + 2 if config.has("sparse") else 4
        return max(2, min(pages, config.max_positions // self.block - 2))

    def talk(self, messages: int) -> Talk:
        """The first messages of the conversation."""
        said, family = self.conversation[:messages], self.model.config.family
        prompt = tuple(encode_prompt(self.tokenizer, said, self.tools, family=family))
        return Talk(self.name, said, self.tools, prompt)

    def prompt(self, room: int) -> tuple[int, ...]:
        """The chat as a prompt behind plain tokens, `deep` pages and some. It leaves `room` tokens of the
        context for an answer."""
        chat = self.talk(len(self.conversation)).prompt
        most = min(self.model.config.max_positions - room, max(len(chat), self.deep * self.block) + 5)
        return (self.tokens(max(0, most - len(chat)), 0) + chat)[-most:]

    @contextmanager
    def engine(self, **options: Any) -> Iterator[Engine]:
        """An engine of the model; arguments of `Engine`, without a prefix cache unless asked for one.

        When it is left at rest, its pages are counted: `leaks` tells what was wrong.
        """
        engine = Engine(self.model, **{"prefix_cache": False, "max_running": 1, **options})
        try:
            yield engine
        finally:
            engine.close()
        self._examine(engine)

    def _examine(self, engine: Engine) -> None:
        stats = engine.stats()
        self.engines += 1
        self.pages += stats.pages
        if stats.running or stats.waiting or stats.free_pages + stats.cached_pages != stats.pages:
            held = f"{stats.free_pages} free + {stats.cached_pages} cached of {stats.pages} pages"
            self.leaks.append(
                f"engine {self.engines}: {held}, {stats.running} running, {stats.waiting} waiting"
            )
        try:
            engine.check_pages()
        except AssertionError as error:
            self.leaks.append(f"engine {self.engines}: {error}")


def open_subject(model: str | Path | None = None, device: str = "auto", dtype: str = "auto") -> Subject:
    """Loads a model folder (None: the shipped model) as `longforge serve` does.

    Errors: InputError for device or dtype, CheckpointError for the folder.
    """
    keep_freed_memory()
    folder = model_folder(model)
    torch.set_num_threads(free_cores().free)
    tokenizer = Tokenizer.load(folder)
    try:
        tokenizer.token_id(EOS)
    except InputError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    placement = choose_placement(folder, device, dtype)
    causal_lm = CausalLM.from_pretrained(folder, placement.dtype, placement.device)
    if tokenizer.vocab_size > causal_lm.config.vocab_size:
        ids = f"the tokenizer has {tokenizer.vocab_size} ids, the model only {causal_lm.config.vocab_size}"
        raise CheckpointError(f"{folder}: {ids}")
    _check_context(causal_lm)
    known = model is None or folder.resolve() == shipped.path().resolve()
    messages, tools = _searching() if known else _talking()
    name = folder.resolve().name
    return Subject(causal_lm, tokenizer, name, messages, tools, rounding_of(causal_lm.dtype))


def _check_context(model: CausalLM) -> None:
    """InputError for a model whose context is too short for what the checks do around borders of pages."""
    least = LEAST_PAGES * model.config.block_size
    if model.config.max_positions < least:
        raise InputError(
            f"model: expected a context of at least {least} tokens ({LEAST_PAGES} pages) to verify it with, "
            f"got {model.config.max_positions}"
        )


def rounding_of(dtype: torch.dtype) -> float:
    """What two ways to compute one log-probability may differ by.

    32 steps of the dtype at 1, as logits are of that order and every layer rounds; at least 2e-4, as in wide
    dtypes sums over thousands of terms decide. Wrong keys or states cost far more than either.
    """
    return max(32 * torch.finfo(dtype).eps, 2e-4)


def _searching() -> tuple[list[Message], tuple[ToolSpec, ...]]:
    """A question of code search, which the shipped model was made for."""
    call = ToolCall("grep", {"pattern": "class HelpFormatter"}, "call_1")
    messages = [
        *opening_messages("Which file defines class HelpFormatter?"),
        Message("assistant", "", "find class", (call,)),
        Message("tool", "argparse.py:154:class HelpFormatter(object):", tool_call_id=call.id),
    ]
    return messages, TOOL_SPECS


def _talking() -> tuple[list[Message], tuple[ToolSpec, ...]]:
    call = ToolCall("grep", {"pattern": "class A"}, "call_1")
    messages = [
        Message("system", "Be brief."),
        Message("user", "Which file defines class A?"),
        Message("assistant", "", "search", (call,)),
        Message("tool", "a.py:1: class A", tool_call_id=call.id),
    ]
    return messages, (GREP,)
