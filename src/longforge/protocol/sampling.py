"""What a request may ask of the sampler, and why a generation ended."""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Literal

__all__ = ["Grammar", "SamplingParams", "StopReason"]


class StopReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """A stop token or stop string came."""
    LENGTH = "length"
    """`max_tokens` or the model's context was reached."""


@dataclass(frozen=True)
class Grammar:
    """A language that an answer must be in, from its first token to its stop token.

    json_schema: `text` is a JSON schema. regex: a regular expression. lark: a grammar in llguidance's dialect
    of Lark, in which `<[ID]>` is the token of that id.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request.

    `temperature` 0 is greedy (ties to the lower token id). `top_k` 0, `top_p` 1 and `min_p` 0 keep every
    token. `seed` fixes the draw of each position: the same prompt, weights and seed give the same tokens
    whatever else is in the batch. Log-probabilities that the engine reports are raw: of the model's own
    distribution at temperature 1, before penalties, bias, grammar and filters.

    Order: penalties (repetition, then frequency and presence), logit bias, grammar and `min_tokens`,
    temperature, top-k, top-p on what top-k left, min-p (of the likeliest token's probability).
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    """Taken off the logit of each token that was generated already."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token as many times as it was generated already."""
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of tokens in the prompt or the answer so far
    (Keskar et al., CTRL, arXiv 1909.05858, section 4.1)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit)."""
    min_tokens: int = 0
    """Stop tokens are not sampled before this many tokens."""
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None
    """Log-probabilities of the prompt's tokens, with so many alternatives; such a request computes its whole
    prompt. None: not asked for."""

    @cached_property
    def needs_counts(self) -> bool:
        """Whether the tokens so far change the distribution."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1
