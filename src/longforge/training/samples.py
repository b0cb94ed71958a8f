"""Where samples come from: conversations and plain text. Sample i is always the same."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from longforge.chat.template import encode_prompt
from longforge.chat.tokenizer import Tokenizer
from longforge.errors import InputError
from longforge.protocol import Message, ToolSpec
from longforge.training.data import Sample

__all__ = ["Conversation", "ConversationSource", "TextSource"]


@dataclass(frozen=True)
class Conversation:
    """Messages that end with the assistant's last turn, and the tools it was offered."""

    messages: Sequence[Message]
    tools: Sequence[ToolSpec] = ()


class ConversationSource:
    """Conversations as samples: weight 1 on what the assistant generated, `background` on the rest.

    `openings` is the share of conversations that end after the assistant's first turn. They are short, so a
    step holds more of them, and of the copying that a small model has to discover.
    """

    def __init__(
        self,
        conversation: Callable[[int], Conversation],
        tokenizer: Tokenizer,
        *,
        background: float = 0.1,
        openings: float = 0.0,
        seed: int = 0,
        max_tokens: int | None = None,
    ) -> None:
        self._conversation = conversation
        self._tokenizer = tokenizer
        self._background = background
        self._openings = openings
        self._seed = seed
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
        turns = list(self._turns(ids))
        if turns and np.random.default_rng((self._seed, 3, number)).random() < self._openings:
            turns = turns[:1]
            ids = ids[: turns[0][1]]
        ids = ids[: self._max_tokens]
        weights = np.full(len(ids), self._background, dtype=np.float32)
        for start, stop in turns:
            weights[start:stop] = 1.0
        return Sample(ids, weights, _within(turns[-1], len(ids)) if turns else (0, 0))

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


def _within(span: tuple[int, int], length: int) -> tuple[int, int]:
    return min(span[0], length), min(span[1], length)


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
