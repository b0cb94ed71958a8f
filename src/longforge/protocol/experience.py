"""The unit of experience: one model call. Made by the gateway, kept by the pool, read by the trainer."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Call", "Episode", "Group"]


@dataclass(frozen=True)
class Call:
    """One model call: exactly the ids the model saw and sampled, never re-tokenised."""

    call_id: str
    episode_id: str
    index: int
    """Place of the call in its episode, from 0, in order of arrival."""
    prompt_ids: tuple[int, ...]
    sampled_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural log-probability of each sampled id under the weights that sampled it."""
    versions: tuple[int, ...]
    """Weights version of each sampled id."""
    stop_reason: str
    label: str = "main"
    parent_id: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Episode:
    """One try of an agent at one task. Credit is given per episode and reaches each of its calls."""

    episode_id: str
    group_id: str
    task: dict[str, Any]
    calls: tuple[Call, ...] = ()
    reward: float | None = None
    outcome: str = ""
    """Why the episode ended: answered, gave_up, deadline, failed."""
    record: dict[str, Any] = field(default_factory=dict)
    """What a person reads: messages, tool calls, answer, expected answer."""


@dataclass(frozen=True)
class Group:
    """All episodes of one task, in order of submission. Advantages are relative to the group."""

    group_id: str
    sequence: int
    """Order of submission, from 0; the windowed scheduler counts in it."""
    episodes: tuple[Episode, ...] = ()
