"""The dull twin of the pool: plain dictionaries under one lock.

For tests, and for runs that need not survive a crash.
"""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from longforge.errors import InputError, RunError
from longforge.forge.pool import Finished, GroupRow
from longforge.protocol import Call, Episode, Group

__all__ = ["MemoryPool"]


class MemoryPool:
    """`Pool` in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, GroupRow] = {}
        self._episodes: dict[str, Episode] = {}
        self._ended: set[str] = set()
        self._calls: dict[str, Call] = {}
        self._batches: dict[int, tuple[str, ...]] = {}

    def submit(self, group: Group, *, phase: str, step: int) -> None:
        with self._lock:
            if group.group_id in self._rows:
                return
            self._rows[group.group_id] = GroupRow(group.group_id, phase, group.sequence, "running", step)
            for e in group.episodes:
                self._episodes[e.episode_id] = Episode(e.episode_id, group.group_id, e.task)

    def add_call(self, call: Call) -> bool:
        with self._lock:
            if call.episode_id not in self._episodes:
                raise InputError(
                    f"pool: call {call.call_id} names episode {call.episode_id}, which is not there"
                )
            if call.episode_id in self._ended or call.call_id in self._calls:
                return False
            self._calls[call.call_id] = call
            return True

    def finish_episode(
        self, episode_id: str, *, reward: float, outcome: str, record: dict[str, Any]
    ) -> Finished:
        with self._lock:
            episode = self._episodes.get(episode_id)
            if episode is None:
                raise InputError(f"pool: episode {episode_id} is not there")
            if episode_id in self._ended:
                return Finished(False, episode.group_id, False)
            self._episodes[episode_id] = replace(episode, reward=reward, outcome=outcome, record=record)
            self._ended.add(episode_id)
            completed = all(e.episode_id in self._ended for e in self._members(episode.group_id))
            if completed:
                self._move(episode.group_id, "running", "completed")
            return Finished(True, episode.group_id, completed)

    def groups(self, phase: str, status: str | None = None) -> list[GroupRow]:
        with self._lock:
            rows = [r for r in self._rows.values() if r.phase == phase and status in (None, r.status)]
            return sorted(rows, key=lambda row: row.sequence)

    def group(self, group_id: str) -> Group:
        with self._lock:
            if group_id not in self._rows:
                raise InputError(f"pool: group {group_id} is not there")
            episodes = tuple(replace(e, calls=self._calls_of(e)) for e in self._members(group_id))
            return Group(group_id, self._rows[group_id].sequence, episodes)

    def unfinished(self, phase: str) -> list[Episode]:
        rows = self.groups(phase)
        with self._lock:
            members = [e for row in rows for e in self._members(row.group_id)]
            return [e for e in members if e.episode_id not in self._ended]

    def drop_unfinished_calls(self) -> int:
        with self._lock:
            kept = {key: call for key, call in self._calls.items() if call.episode_id in self._ended}
            dropped = len(self._calls) - len(kept)
            self._calls = kept
            return dropped

    def filter_group(self, group_id: str) -> None:
        with self._lock:
            self._move(group_id, "completed", "filtered")

    def consume(self, step: int, group_ids: Sequence[str]) -> None:
        with self._lock:
            recorded = self._batches.get(step, ())
            if recorded == tuple(group_ids):
                return
            if recorded:
                raise RunError(
                    f"pool: step {step} has taken {', '.join(recorded)}; it cannot take other groups"
                )
            before = dict(self._rows)
            try:
                for group_id in group_ids:
                    self._move(group_id, "completed", "consumed")
            except RunError:
                self._rows = before
                raise
            self._batches[step] = tuple(group_ids)

    def batch(self, step: int) -> tuple[str, ...]:
        with self._lock:
            return self._batches.get(step, ())

    def close(self) -> None:
        """Nothing is held."""

    def _members(self, group_id: str) -> list[Episode]:
        return [e for e in self._episodes.values() if e.group_id == group_id]

    def _calls_of(self, episode: Episode) -> tuple[Call, ...]:
        mine = (c for c in self._calls.values() if c.episode_id == episode.episode_id)
        return tuple(sorted(mine, key=lambda call: call.index))

    def _move(self, group_id: str, before: str, after: str) -> None:
        row = self._rows.get(group_id)
        if row is None or row.status != before:
            found = "not there" if row is None else row.status
            raise RunError(f"pool: group {group_id} must be {before} to become {after}, it is {found}")
        self._rows[group_id] = replace(row, status=after)
