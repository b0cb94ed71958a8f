"""The fields that requests for chat and for completions share."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from longforge.protocol import SamplingParams
from longforge.server.wire import Body

__all__ = ["MAX_CHOICES", "MAX_LOGIT_BIAS", "MAX_STOPS", "MAX_TOP_LOGPROBS", "Sampling", "choice_seed"]

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 256
"""Longest stop string: each new piece of text is compared with all their beginnings."""
MAX_CHOICES = 64
MAX_LOGIT_BIAS = 1024
MAX_LABELS = 16
MAX_LABEL_CHARACTERS = 512

_TOKEN_ID = re.compile(r"[0-9]{1,10}")
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that the seeds of 2**64 choices are all different

Label = Annotated[str, Field(max_length=MAX_LABEL_CHARACTERS)]


class StreamOptions(Body):
    """`include_usage` adds a last chunk with the usage, `continuous_usage_stats` the usage so far to each."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(Body):
    """How to sample, when to stop, what to report.

    The labels (`user`, `metadata`, `safety_identifier`, `prompt_cache_key`, `service_tier`) name the request
    for its sender; they have no effect on the answer. Nothing is stored, so `store` can only be false.
    """

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    """-1 and 0 keep every token."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=MAX_LOGIT_BIAS
    )
    """Token ids, written as strings, and what is added to their logits."""
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=MAX_STOPS)
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    """Go on after the model's own end of turn."""
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    """Lower is served earlier; below 0 it takes an operator's key."""
    user: Label | None = None
    metadata: dict[Label, Label] | None = Field(default=None, max_length=MAX_LABELS)
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    @property
    def limit(self) -> int:
        """Most tokens of an answer."""
        raise NotImplementedError

    @property
    def choices(self) -> int:
        """Answers to give."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_usage_always(self) -> bool:
        """Whether each chunk of a stream carries the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @model_validator(mode="after")
    def _consistent(self) -> "Sampling":
        if any(not stop for stop in self.stops):
            raise ValueError("stop: an empty string would stop at once")
        if len(self.stops) > MAX_STOPS:
            raise ValueError(f"stop: expected at most {MAX_STOPS} strings, got {len(self.stops)}")
        longest = max(map(len, self.stops), default=0)
        if longest > MAX_STOP_CHARACTERS:
            raise ValueError(f"stop: expected at most {MAX_STOP_CHARACTERS} characters, got {longest}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        for token in self.logit_bias or ():
            if not _TOKEN_ID.fullmatch(token):
                raise ValueError(f"logit_bias: expected token ids as keys, got {token[:40]!r}")
        if (self.min_tokens or 0) > self.limit:
            raise ValueError(f"min_tokens: expected at most max_tokens ({self.limit}), got {self.min_tokens}")
        return self

    def params(self, stop_ids: tuple[int, ...], choice: int = 0, **rest: Any) -> SamplingParams:
        """What the engine is asked for.

        stop_ids: the model's own stop tokens. choice: place of the answer among all of the request. rest:
        more fields of `SamplingParams`.
        """
        values: dict[str, Any] = {
            "max_tokens": self.limit,
            "top_k": max(0, self.top_k or 0),
            "seed": None if self.seed is None else choice_seed(self.seed, choice),
            "stop_token_ids": (*(() if self.ignore_eos else stop_ids), *(self.stop_token_ids or ())),
            "logit_bias": tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
        }
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "min_tokens",
        ):
            if (value := getattr(self, name)) is not None:
                values[name] = value
        return SamplingParams(**values, **rest)


def choice_seed(seed: int, choice: int) -> int:
    """Seed of one answer of several: the request's own for the first, all different, always the same."""
    return seed if choice == 0 else (seed + choice * _SEED_STEP) % 2**64
