"""What a request may ask of the sampler, and why a generation ended."""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["SamplingParams", "StopReason"]


class StopReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """A stop token or stop string came."""
    LENGTH = "length"
    """`max_tokens` or the model's context was reached."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request.

    `temperature` 0 is greedy (ties to the lower token id). `top_k` 0 and `top_p` 1 keep every token.
    `seed` fixes the draw of each position: the same prompt, weights and seed give the same tokens whatever
    else is in the batch. Log-probabilities that the engine reports are of the distribution it sampled from at
    temperature 1 before top-k and top-p are applied (raw model log-probabilities).
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
