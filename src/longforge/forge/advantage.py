"""Group advantage: how much better an episode did than its siblings at the same task."""

from collections.abc import Sequence

__all__ = ["group_advantages", "has_signal"]

_SMALLEST_STD = 1e-6
"""Keeps the normalised form finite; below it the group has no signal and is filtered before."""


def group_advantages(rewards: Sequence[float], *, normalise: bool = False) -> tuple[float, ...]:
    """A_i = r_i - mean(r); with `normalise`, divided by the group's standard deviation (population).

    The mean of the group is the trajectory-level baseline (M2 report, section 6.1): one advantage per
    episode, which reaches every token of every call of it. Dividing by the deviation is GRPO's form; it
    weighs nearly solved and nearly hopeless tasks up, and is off by default.
    """
    mean = sum(rewards) / len(rewards)
    centred = [r - mean for r in rewards]
    if normalise:
        std = (sum(c * c for c in centred) / len(centred)) ** 0.5
        centred = [c / (std + _SMALLEST_STD) for c in centred]
    return tuple(centred)


def has_signal(rewards: Sequence[float]) -> bool:
    """False where all episodes of a group did equally well: every advantage is zero, nothing to learn."""
    return max(rewards) - min(rewards) > _SMALLEST_STD
