"""What a run comes to: summary.json, and the table that people see."""

from collections.abc import Mapping, Sequence
from typing import Any

from longforge.forge.run_folder import RunFolder
from longforge.observe import passport, read_metrics

__all__ = ["build_summary", "summary_table", "text_plot"]

BAR_WIDTH = 50
LEVELS = "▁▂▃▄▅▆▇█"
EDGE_STEPS = 3
"""Steps at each end of training whose mean reward is told."""


def build_summary(
    folder: RunFolder, facts: Mapping[str, Any], groups: Mapping[str, int], *, finished: bool
) -> dict[str, Any]:
    """The run so far: `before`, `after` (None until measured), `seconds` and what happened between.

    facts: about the environment. groups: how many training groups have each status in the pool.
    """
    state, rows = folder.state, read_metrics(folder.path)
    rollout = folder.config.rollout
    return {
        "name": folder.config.name,
        "finished": finished,
        "before": state.evaluations.get("before"),
        "after": state.evaluations.get("after"),
        "seconds": round(state.seconds, 3),
        "steps": len(rows),
        "reward": {
            "first": _mean([row["reward"] for row in rows[:EDGE_STEPS]]),
            "last": _mean([row["reward"] for row in rows[-EDGE_STEPS:]]),
            "by_step": [round(row["reward"], 4) for row in rows],
        },
        "staleness": {
            "mean": _mean([row["staleness_mean"] for row in rows]),
            "max": max((row["staleness_max"] for row in rows), default=None),
            "age_max": max((row["age_max"] for row in rows), default=None),
            "age_bound": rollout.age_bound,
        },
        "tokens_per_second": {
            "rollout": _rate(rows, "rollout_tokens", "step_seconds"),
            "train": _rate(rows, "train_tokens", "train_seconds"),
        },
        "phase_seconds": {name: round(value, 3) for name, value in state.phase_seconds.items()},
        "groups": dict(groups),
        "environment": dict(facts),
        "passport": passport(),
    }


def summary_table(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary as rows of (what, how much)."""
    rows = [(f"held-out success {name}", _success(summary[name])) for name in ("before", "after")]
    reward, staleness, speed = summary["reward"], summary["staleness"], summary["tokens_per_second"]
    groups = summary["groups"]
    rows += [
        ("training steps", f"{summary['steps']}"),
        ("reward, first and last steps", f"{_number(reward['first'])} → {_number(reward['last'])}"),
        (
            "groups trained on / without signal",
            f"{groups.get('consumed', 0)} / {groups.get('filtered', 0)}",
        ),
        (
            "staleness, mean and most (versions)",
            f"{_number(staleness['mean'])} / {_number(staleness['max'])}",
        ),
        (
            "steps that a group waited, most",
            f"{_number(staleness['age_max'], 0)} (bound {staleness['age_bound']})",
        ),
        (
            "tokens per second, sampled / trained",
            f"{_number(speed['rollout'], 0)} / {_number(speed['train'], 0)}",
        ),
        *((f"seconds, {name.replace('_', ' ')}", f"{s:.1f}") for name, s in summary["phase_seconds"].items()),
        ("seconds, whole run", f"{summary['seconds']:.1f}"),
    ]
    return rows


def text_plot(summary: Mapping[str, Any]) -> str:
    """Success before and after as bars with their intervals, and the reward of every step, in characters."""
    lines = []
    for name in ("before", "after"):
        result = summary[name]
        if result is not None:
            bar = "".join(_cell(place / BAR_WIDTH, result) for place in range(BAR_WIDTH))
            lines.append(f"{name:>14} {bar} {100 * result['success']:5.1f} %")
    rewards = summary["reward"]["by_step"]
    if rewards:
        top = len(LEVELS) - 1
        curve = "".join(LEVELS[round(top * min(max(reward, 0.0), 1.0))] for reward in rewards)
        lines.append(f"{'reward by step':>14} {curve} {rewards[0]:.2f} → {rewards[-1]:.2f}")
    return "\n".join(lines)


def _cell(at: float, result: Mapping[str, Any]) -> str:
    """One character of a bar: full below the interval, half inside it, light above."""
    if at < result["low"]:
        return "█"
    return "▒" if at < result["high"] else "·"


def _success(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "not measured"
    low, high = 100 * result["low"], 100 * result["high"]
    return f"{100 * result['success']:.1f} % ({low:.1f} to {high:.1f}, n = {result['n']})"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _rate(rows: Sequence[Mapping[str, Any]], amount: str, seconds: str) -> float | None:
    time = sum(row[seconds] for row in rows)
    return sum(row[amount] for row in rows) / time if time else None


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
