"""What goes into the engine and what comes out of it: plain data."""

import math
from dataclasses import dataclass, field

from longforge.errors import ContextOverflow, InputError
from longforge.protocol import SamplingParams, StopReason

__all__ = ["EngineStats", "GenerationRequest", "TokenEvent", "check_request"]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue. `id` is the caller's name for it, unique among requests that still run."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One sampled token of one request."""

    request_id: str
    token_id: int
    logprob: float
    """Natural logarithm of the model's probability of the token, at temperature 1, before top-k and top-p."""
    version: int
    """Version of the weights that sampled it."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The `top_logprobs` likeliest (token id, log-probability), likeliest first, ties to the lower id."""
    stop_reason: StopReason | None = None
    """Set on the last token of a request."""


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. Counters count from the start of the engine."""

    version: int
    running: int
    waiting: int
    pages: int
    free_pages: int
    context: int
    steps: int
    prompt_tokens: int
    """Prompt tokens that went through the model."""
    generated_tokens: int
    finished: int
    cancelled: int


def check_request(request: GenerationRequest, *, vocab_size: int, context: int) -> None:
    """Refuses what can never be generated.

    Errors: InputError naming the field; ContextOverflow if the prompt leaves no room for one token.
    """
    prompt, params = request.prompt_ids, request.params
    if not prompt:
        raise InputError("prompt: expected at least 1 token, got none")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"prompt: expected token ids from 0 to {vocab_size - 1}, got {wrong}")
    if len(prompt) + 1 > context:
        # A prompt that just fills the context still lacks room for the one token it asks for.
        raise ContextOverflow(max(len(prompt), context + 1), context)
    if params.max_tokens < 1:
        raise InputError(f"max_tokens: expected at least 1, got {params.max_tokens}")
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise InputError(f"temperature: expected a finite number of at least 0, got {params.temperature}")
    if not 0 < params.top_p <= 1:
        raise InputError(f"top_p: expected more than 0 and at most 1, got {params.top_p}")
    if params.top_k < 0:
        raise InputError(f"top_k: expected at least 1, or 0 for every token, got {params.top_k}")
    if not 0 <= params.top_logprobs <= vocab_size:
        raise InputError(f"top_logprobs: expected 0 to {vocab_size}, got {params.top_logprobs}")
