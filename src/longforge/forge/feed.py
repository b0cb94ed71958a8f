"""The feed: keeps groups in flight and hands the trainer its batches, in the order the scheduler allows.

Owned by the conductor's thread. The pool is the truth: a feed over a pool that was used before goes on from
there, and a training step that has taken its groups already gets exactly those again.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from longforge.forge.advantage import has_signal
from longforge.forge.config import RolloutConfig
from longforge.forge.pool import Pool
from longforge.forge.scheduler import WindowedFifo
from longforge.protocol import Episode, Group

__all__ = ["TRAIN", "Feed", "FeedCounts", "group_name"]

TRAIN = "train"

PATIENCE_STEPS = 16
"""Training ends when this many steps' worth of groups in a row had no signal."""


@dataclass
class FeedCounts:
    """What happened since it was asked last."""

    rewards: list[float] = field(default_factory=list)
    """Of every episode whose group left the queue, trained on or not."""
    filtered: int = 0
    """Groups that left without training, having no signal."""
    ages: list[int] = field(default_factory=list)
    """Of groups trained on: steps that took their groups between its submission and its own.

    At most `RolloutConfig.age_bound`. Tokens may be one version older, since a group that is submitted while
    a step is at work begins under the weights before it.
    """


def group_name(phase: str, sequence: int) -> str:
    """Id of a group."""
    return f"{phase}-{sequence:05d}"


class Feed:
    """Submits training groups while slots are free and pulls finished ones.

    first_step: training steps done when the feed starts. submit: called with (group, step) for a new group,
    where `step` is the next step to take its groups; resume: called with an episode that the pool knows and
    that must run again. tasks: gives training tasks from a number on.
    """

    def __init__(
        self,
        config: RolloutConfig,
        pool: Pool,
        *,
        steps: int,
        first_step: int = 0,
        tasks: Callable[[int], Iterator[dict[str, Any]]],
        submit: Callable[[Group, int], None],
        resume: Callable[[Episode], None],
    ) -> None:
        self._config = config
        self._pool = pool
        self._steps = steps
        self._submit = submit
        self._fifo = WindowedFifo(config.buffer, config.window)
        self._counts = FeedCounts()
        self._kept = self._filtered = 0
        self._next_step = first_step
        while pool.batch(self._next_step):  # steps that a crash undid take the same groups again
            self._next_step += 1
        self._dry_spell = 0
        rows = pool.groups(TRAIN)
        self._submitted_at = {row.sequence: row.step for row in rows}
        self._tasks = tasks(len(rows))
        held = {r.sequence: r.status == "completed" for r in rows if r.status in ("running", "completed")}
        self._fifo.restore(len(rows), held)
        for sequence in [s for s, completed in held.items() if completed]:
            self._settle(sequence)
        for episode in pool.unfinished(TRAIN):
            resume(episode)

    def step_of(self, group_id: str) -> int:
        """The training step that was the next to take its groups when the group was submitted."""
        return self._submitted_at[_sequence(group_id)]

    @property
    def dry(self) -> bool:
        """Whether so many groups in a row had no signal that waiting for a batch is hopeless."""
        return self._dry_spell >= PATIENCE_STEPS * self._config.groups_per_step

    @property
    def ready(self) -> int:
        """Groups that could be pulled now."""
        return self._fifo.ready

    def completed(self, group_id: str) -> None:
        """A group's last episode has ended."""
        sequence = _sequence(group_id)
        self._fifo.complete(sequence)
        self._settle(sequence)

    def fill(self) -> None:
        """Submits groups while slots are free and steps are left to use them."""
        while self._fifo.free_slots and len(self._fifo.outstanding) < self._wanted():
            sequence = self._fifo.submit()
            name = group_name(TRAIN, sequence)
            task = next(self._tasks)
            episodes = [Episode(f"{name}/{i}", name, task) for i in range(self._config.group_size)]
            self._submitted_at[sequence] = self._next_step
            self._submit(Group(name, sequence, tuple(episodes)), self._next_step)

    def batch(self, step: int) -> list[Group]:
        """Groups of training step `step`, or none yet. The taking is in the pool when this returns.

        A step that took its groups before a restart gets the same again.
        """
        taken = self._pool.batch(step)
        if not taken:
            pulled = self._fifo.pull(self._config.groups_per_step)
            if not pulled:
                return []
            taken = tuple(group_name(TRAIN, sequence) for sequence in pulled)
            self._pool.consume(step, taken)
        self._next_step = max(self._next_step, step + 1)
        groups = [self._pool.group(group_id) for group_id in taken]
        for group in groups:
            self._counts.ages.append(step - self._submitted_at[group.sequence])
            self._counts.rewards += _rewards(group)
        return groups

    def take_counts(self) -> FeedCounts:
        """What happened since the last call."""
        counts, self._counts = self._counts, FeedCounts()
        return counts

    def _settle(self, sequence: int) -> None:
        """A completed group without signal leaves at once; its slot is free for another."""
        group = self._pool.group(group_name(TRAIN, sequence))
        if has_signal(_rewards(group)):
            self._kept += 1
            self._dry_spell = 0
            return
        self._dry_spell += 1
        self._pool.filter_group(group.group_id)
        self._fifo.retire(sequence)
        self._filtered += 1
        self._counts.filtered += 1
        self._counts.rewards += _rewards(group)

    def _wanted(self) -> int:
        """Groups worth having in flight: what the steps left take, and what will be filtered on the way."""
        needed = (self._steps - self._next_step) * self._config.groups_per_step
        # One of each is counted in advance, so that the first groups do not decide alone.
        keep_rate = (self._kept + 1) / (self._kept + self._filtered + 1)
        return math.ceil(needed / keep_rate)


def _sequence(group_id: str) -> int:
    return int(group_id.rsplit("-", 1)[1])


def _rewards(group: Group) -> list[float]:
    return [episode.reward or 0.0 for episode in group.episodes]
