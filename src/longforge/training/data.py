"""Samples, where they come from, and how they are packed into steps: real tokens only, no padding.

A source gives sample number i for any i and always the same one, so the whole stream is a function of the
seed and a few counters, and a resumed run sees exactly the batches that an uninterrupted one would have seen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longforge.chat.template import encode_prompt
from longforge.chat.tokenizer import Tokenizer
from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout
from longforge.protocol import Message, ToolSpec

__all__ = [
    "ASSISTANT",
    "Batch",
    "BatchStream",
    "Conversation",
    "ConversationSource",
    "Sample",
    "Source",
    "TextSource",
    "pack",
]


ASSISTANT = 0.5
"""Tokens of at least this weight were written by the assistant."""


@dataclass(frozen=True)
class Conversation:
    """Messages that end with the assistant's last turn, and the tools it was offered."""

    messages: Sequence[Message]
    tools: Sequence[ToolSpec] = ()


@dataclass(frozen=True)
class Sample:
    """One sequence. `weights[i]` is how much the prediction of token i counts."""

    ids: np.ndarray
    """int64 [T]"""
    weights: np.ndarray
    """float32 [T]"""
    answer: tuple[int, int] = (0, 0)
    """Token range [start, stop) of the assistant's last turn; empty where there is none."""

    def __len__(self) -> int:
        return len(self.ids)


class Source(Protocol):
    """Numbered samples without end."""

    def sample(self, number: int) -> Sample: ...


class ConversationSource:
    """Conversations as samples: weight 1 on what the assistant generated, `background` on the rest."""

    def __init__(
        self,
        conversation: Callable[[int], Conversation],
        tokenizer: Tokenizer,
        *,
        background: float = 0.1,
        max_tokens: int | None = None,
    ) -> None:
        self._conversation = conversation
        self._tokenizer = tokenizer
        self._background = background
        self._max_tokens = max_tokens
        self._role = tokenizer.token_id("]~b]")
        self._end = tokenizer.token_id("[e~[")
        self._assistant = tokenizer.encode("ai\n", special=False)

    def sample(self, number: int) -> Sample:
        conversation = self._conversation(number)
        ids = np.asarray(
            encode_prompt(
                self._tokenizer, conversation.messages, conversation.tools, add_generation_prompt=False
            ),
            dtype=np.int64,
        )
        if self._max_tokens is not None:
            ids = ids[: self._max_tokens]
        weights = np.full(len(ids), self._background, dtype=np.float32)
        answer = (0, 0)
        for start, stop in self._turns(ids):
            weights[start:stop] = 1.0
            answer = (start, stop)
        return Sample(ids, weights, answer)

    def _turns(self, ids: np.ndarray) -> Iterator[tuple[int, int]]:
        """Token ranges of the assistant's turns, end-of-turn token included.

        Only templates write special tokens (user text is encoded without them), so scanning for them is safe.
        """
        opening = [self._role, *self._assistant]
        ends = np.flatnonzero(ids == self._end)
        for place in np.flatnonzero(ids == self._role):
            start = int(place) + len(opening)
            if ids[place:start].tolist() != opening:
                continue
            later = ends[ends >= start]
            yield start, int(later[0]) + 1 if len(later) else len(ids)


class TextSource:
    """Chunks of plain text, each cut at a seeded place, all tokens with the same small weight."""

    def __init__(
        self, texts: Sequence[str], tokenizer: Tokenizer, *, tokens: int, weight: float, seed: int
    ) -> None:
        if not texts:
            raise InputError(
                "texts: expected at least one non-empty text, got none; name a folder with sources"
            )
        self._texts = texts
        self._ends = np.cumsum([len(text) for text in texts])
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._weight = weight
        self._seed = seed

    def sample(self, number: int) -> Sample:
        rng = np.random.default_rng((self._seed, number))
        place = int(rng.integers(self._ends[-1]))
        which = int(np.searchsorted(self._ends, place, side="right"))
        text = self._texts[which]
        begin = place - (int(self._ends[which]) - len(text))
        begin = text.rfind("\n", 0, begin) + 1
        ids = self._tokenizer.encode(text[begin : begin + 6 * self._tokens], special=False)[: self._tokens]
        array = np.asarray(ids or [self._tokenizer.eos_id], dtype=np.int64)
        return Sample(array, np.full(len(array), self._weight, dtype=np.float32))


@dataclass(frozen=True)
class Batch:
    """One step's tokens: N packed tokens of P paths."""

    ids: Tensor
    """int64 [N]"""
    weights: Tensor
    """float32 [N]"""
    layout: PackedLayout
    answers: tuple[tuple[int, int], ...]
    """Row ranges of each path's last assistant turn."""

    def to(self, device: torch.device | str) -> "Batch":
        moved = PackedLayout(
            self.layout.positions.to(device),
            self.layout.paths.to(device),
            self.layout.slots.to(device),
            self.layout.page_table.to(device),
            self.layout.block_size,
        )
        return Batch(self.ids.to(device), self.weights.to(device), moved, self.answers)


def pack(samples: Sequence[Sample], block_size: int) -> Batch:
    """Samples side by side, each a path of its own."""
    assert samples, "a batch has at least one sample"
    starts = np.cumsum([0, *(len(sample) for sample in samples)])
    return Batch(
        ids=torch.from_numpy(np.concatenate([sample.ids for sample in samples])),
        weights=torch.from_numpy(np.concatenate([sample.weights for sample in samples])),
        layout=PackedLayout.from_lengths([len(sample) for sample in samples], block_size),
        answers=tuple(
            (int(at) + sample.answer[0], int(at) + sample.answer[1])
            for at, sample in zip(starts, samples, strict=False)
        ),
    )


class BatchStream:
    """Draws samples from weighted sources and fills each batch with at most `tokens` real tokens.

    A sample longer than `tokens` gets a batch of its own. `state()` and `load()` carry the counters over a
    restart.
    """

    def __init__(
        self, sources: Mapping[str, tuple[Source, float]], *, tokens: int, block_size: int, seed: int
    ) -> None:
        if not sources or any(share < 0 for _, share in sources.values()):
            raise InputError("sources: expected at least one, each with a share of 0 or more")
        self._sources = {name: source for name, (source, share) in sources.items() if share > 0}
        shares = np.array([sources[name][1] for name in self._sources])
        self._bounds = np.cumsum(shares / shares.sum())
        self._tokens = tokens
        self._block_size = block_size
        self._seed = seed
        self._draws = 0
        self._taken = dict.fromkeys(self._sources, 0)

    def next(self) -> Batch:
        samples: list[Sample] = []
        room = self._tokens
        while True:
            name, sample = self._peek()
            if samples and len(sample) > room:
                return pack(samples, self._block_size)
            samples.append(sample)
            room -= len(sample)
            self._draws += 1
            self._taken[name] += 1

    def state(self) -> dict[str, Any]:
        return {"draws": self._draws, "taken": dict(self._taken)}

    def load(self, state: Mapping[str, Any]) -> None:
        self._draws = int(state["draws"])
        self._taken = {name: int(state["taken"].get(name, 0)) for name in self._sources}

    def _peek(self) -> tuple[str, Sample]:
        """The sample that comes next, without taking it."""
        uniform = np.random.default_rng((self._seed, 1, self._draws)).random()
        name = list(self._sources)[min(int(np.searchsorted(self._bounds, uniform)), len(self._sources) - 1)]
        return name, self._sources[name].sample(self._taken[name])
