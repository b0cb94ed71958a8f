"""What goes into the engine and what comes out of it: plain data."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from longforge.errors import ContextOverflow, InputError, LongforgeError
from longforge.protocol import SamplingParams, StopReason

__all__ = ["EngineStats", "GenerationRequest", "PromptToken", "RequestFailed", "TokenEvent", "check_request"]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue. `id` is the caller's name for it, unique among requests that still run."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    tenant: str = ""
    """Whose pages it may reuse and leave behind. Comes from a trusted place (the API key), never from the
    caller."""
    priority: int = 0
    """Lower is served earlier; among equals, first come, first served."""
    cache: bool = True
    """Whether it may use cached pages and leave its own behind."""
    report_blocks: bool = False
    """Whether its events tell which blocks the sparse layers selected."""


@dataclass(frozen=True, slots=True)
class PromptToken:
    """What the model thought of one token of a prompt."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


class TokenEvent(NamedTuple):
    """One sampled token of one request."""

    request_id: str
    token_id: int
    logprob: float
    """Natural logarithm of the model's probability of the token, at temperature 1, before anything else."""
    version: int
    """Version of the weights that sampled it."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The `top_logprobs` likeliest (token id, log-probability), likeliest first, ties to the lower id."""
    stop_reason: StopReason | None = None
    """Set on the last token of a request."""
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the cache."""
    prompt: tuple[PromptToken | None, ...] = ()
    """On the first event where `prompt_logprobs` was asked for: an entry per prompt token, the first None."""
    blocks: tuple[int, ...] = ()
    """Where asked for: how many of the layers' groups selected each block of the context, block 0 first."""


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A request that ended by an error of its own; the others go on."""

    request_id: str
    error: LongforgeError


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. Counters count from the start of the engine."""

    version: int
    running: int
    waiting: int
    pages: int
    free_pages: int
    """Pages that nobody uses and that hold nothing."""
    context: int
    steps: int
    prompt_tokens: int
    """Prompt tokens that went through the model."""
    generated_tokens: int
    finished: int
    cancelled: int
    cached_pages: int = 0
    """Pages that nobody uses but that a later prompt may find."""
    preemptions: int = 0
    prefix_queried_tokens: int = 0
    """Prompt tokens that were looked up in the cache."""
    prefix_hit_tokens: int = 0
    """Of these, found."""
    drafts: int = 0
    """Verifications of at least one drafted token."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_place: tuple[int, ...] = ()
    """How often the first, second, ... drafted token was accepted."""
    failed: int = 0


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
    if params.prompt_logprobs is not None and not 0 <= params.prompt_logprobs <= vocab_size:
        raise InputError(f"prompt_logprobs: expected 0 to {vocab_size}, got {params.prompt_logprobs}")
    if not 0 <= params.min_p <= 1:
        raise InputError(f"min_p: expected 0 to 1, got {params.min_p}")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        if not -2 <= value <= 2:
            raise InputError(f"{name}: expected -2 to 2, got {value}")
    if not 0 < params.repetition_penalty <= 100:
        raise InputError(
            f"repetition_penalty: expected more than 0 and at most 100, got {params.repetition_penalty}"
        )
    for token, bias in params.logit_bias:
        if not 0 <= token < vocab_size:
            raise InputError(f"logit_bias: expected token ids from 0 to {vocab_size - 1}, got {token}")
        if not -100 <= bias <= 100:
            raise InputError(f"logit_bias: expected values from -100 to 100, got {bias} for token {token}")
    if params.min_tokens < 0:
        raise InputError(f"min_tokens: expected at least 0, got {params.min_tokens}")
