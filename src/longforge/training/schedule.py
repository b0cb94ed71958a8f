"""The course of a run: what each part of the plan trains, and at which rate."""

from dataclasses import dataclass

from longforge.model.step import Phase
from longforge.training.config import PretrainConfig

__all__ = ["Stage", "learning_rate_factor", "linear_between", "stage_of"]


@dataclass(frozen=True)
class Stage:
    """What a step at some progress (0 to 1) of the plan does."""

    phase: Phase
    """warmup: attention is dense. sparse: attention reads the selected blocks."""
    mtp: str
    """off, detached (modules alone) or joint."""
    mtp_weight: float
    mtp_progress: float
    """Progress inside the MTP part."""


def stage_of(progress: float, config: PretrainConfig) -> Stage:
    """The stage at `progress`, the share of the planned steps that are done."""
    schedule = config.schedule
    start = 1.0 - schedule.mtp_share
    joint = start + schedule.mtp_share * schedule.mtp_detached_share
    phase: Phase = "warmup" if progress < schedule.dense_share else "sparse"
    if schedule.mtp_share <= 0 or progress < start:
        return Stage(phase, "off", 0.0, 0.0)
    first, last = schedule.mtp_weight
    weight = linear_between(progress, start=joint, stop=1.0, first=first, last=last)
    inside = (progress - start) / schedule.mtp_share
    return Stage(phase, "detached" if progress < joint else "joint", weight, inside)


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, final: float = 0.0) -> float:
    """Linear warm-up to 1 over `warmup_steps`, then a straight line to `final` at `steps`."""
    assert step >= 0 and warmup_steps >= 0 and steps > 0, (step, warmup_steps, steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = (steps - step) / max(steps - warmup_steps, 1)
    return final + (1 - final) * min(max(left, 0.0), 1.0)


def linear_between(progress: float, *, start: float, stop: float, first: float, last: float) -> float:
    """`first` until progress `start`, `last` from `stop` on, a straight line between them."""
    if progress <= start:
        return first
    if progress >= stop:
        return last
    return first + (last - first) * (progress - start) / (stop - start)
