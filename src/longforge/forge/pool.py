"""The data pool's contract: what agents did, until the trainer has used it.

    groups    one task tried several times; running -> completed -> consumed | filtered
    episodes  one try: reward, outcome and the record that a person reads
    calls     one model call: ids and log-probabilities exactly as they were sampled
    batches   which groups the trainer took at which step

Promises: every write has an idempotent key, so that repeating it after a crash changes nothing. A group is
consumed in the same transaction that records its training step, at most once, ever: a trainer that lost its
latest steps in a crash finds their batches here and replays exactly those.

`SqlitePool` (sqlite_pool.py) keeps it in a file; `MemoryPool` (memory_pool.py) is the dull twin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from longforge.protocol import Call, Episode, Group

__all__ = ["Finished", "GroupRow", "Pool"]


@dataclass(frozen=True)
class GroupRow:
    """A group without its episodes: what the scheduler and the progress line need."""

    group_id: str
    phase: str
    """`train`, or the name of an evaluation."""
    sequence: int
    """Order of submission within the phase, from 0."""
    status: str
    """running (an episode has not ended), completed, consumed (trained on) or filtered (no signal)."""
    step: int
    """Training step that was the next to take its groups when this one was submitted."""


@dataclass(frozen=True)
class Finished:
    """What ending an episode did. `stored` is False when it had ended before: then nothing was changed."""

    stored: bool
    group_id: str
    group_completed: bool


class Pool(Protocol):
    """What gateway, rollout, scheduler and trainer need of a pool. Both pools may be used from threads."""

    def submit(self, group: Group, *, phase: str, step: int) -> None:
        """Adds a group of episodes that have not run. A group that is there already stays as it is."""
        ...

    def add_call(self, call: Call) -> bool:
        """Adds one call. False, and nothing stored, if its episode has ended or the call is there already."""
        ...

    def finish_episode(
        self, episode_id: str, *, reward: float, outcome: str, record: dict[str, Any]
    ) -> Finished:
        """Ends an episode, and its group with the last one. The first ending counts."""
        ...

    def groups(self, phase: str, status: str | None = None) -> list[GroupRow]:
        """Groups of a phase in order of submission."""
        ...

    def group(self, group_id: str) -> Group:
        """A whole group: episodes in order, each with its calls in order."""
        ...

    def unfinished(self, phase: str) -> list[Episode]:
        """Episodes of a phase that have not ended, in order of submission."""
        ...

    def drop_unfinished_calls(self) -> int:
        """Forgets the calls of episodes that have not ended; they will run again. Returns how many."""
        ...

    def filter_group(self, group_id: str) -> None:
        """Takes a completed group away from training: it has no signal."""
        ...

    def consume(self, step: int, group_ids: Sequence[str]) -> None:
        """Records that training step `step` takes these completed groups: one transaction, once."""
        ...

    def batch(self, step: int) -> tuple[str, ...]:
        """Groups recorded for a training step, in order; empty if none were."""
        ...

    def close(self) -> None: ...
