"""Held-out success: what a finished evaluation says, and an episode as a person reads it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from longforge.forge.environment import Environment
from longforge.forge.pool import Pool
from longforge.forge.run_folder import RunFolder
from longforge.forge.stats import wilson
from longforge.protocol import Episode

__all__ = ["SUCCESS", "evaluation_result", "readable_episode", "write_missing_episodes"]

SUCCESS = 1.0
"""Reward from which an episode counts as a success."""


def evaluation_result(
    episodes: Sequence[Episode], environment: Environment, seconds: float
) -> dict[str, Any]:
    """Success with its 95 % interval, over all episodes and per kind of task, and how episodes ended."""
    kinds: dict[str, list[bool]] = {}
    for episode in episodes:
        kind = str(environment.readable(episode.task).get("kind", "task"))
        kinds.setdefault(kind, []).append(_succeeded(episode))
    return {
        **_rate([_succeeded(episode) for episode in episodes]),
        "seconds": round(seconds, 3),
        "kinds": {kind: _rate(results) for kind, results in sorted(kinds.items())},
        "outcomes": dict(sorted(Counter(episode.outcome for episode in episodes).items())),
    }


def readable_episode(episode: Episode, environment: Environment, *, phase: str, step: int) -> dict[str, Any]:
    """An episode with everything a person wants to know of it: plain JSON.

    step: training steps that had taken their groups when its own was submitted.
    """
    return {
        "id": episode.episode_id,
        "group": episode.group_id,
        "phase": phase,
        "step": step,
        **environment.readable(episode.task),
        "answer": episode.record.get("answer"),
        "reward": episode.reward,
        "outcome": episode.outcome,
        **{key: value for key, value in episode.record.items() if key != "answer"},
    }


def write_missing_episodes(
    folder: RunFolder, pool: Pool, environment: Environment, sizes: Mapping[str, int]
) -> None:
    """Writes the readable form of ended episodes that a killed process had no time for.

    Of a group that was cut off, those that had ended.

    sizes: episodes per group, for each phase.
    """
    for phase, size in sizes.items():
        for row in pool.groups(phase):
            names = [f"{row.group_id}/{i}" for i in range(size)]
            if all(map(folder.has_episode, names)):
                continue
            for episode in pool.group(row.group_id).episodes:
                if episode.reward is None or folder.has_episode(episode.episode_id):
                    continue
                readable = readable_episode(episode, environment, phase=phase, step=row.step)
                folder.write_episode(episode.episode_id, readable)


def _succeeded(episode: Episode) -> bool:
    return (episode.reward or 0.0) >= SUCCESS


def _rate(results: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson(sum(results), len(results))
    return {"success": sum(results) / max(len(results), 1), "low": low, "high": high, "n": len(results)}
