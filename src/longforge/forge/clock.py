"""A run's time: where it goes, and whether another training step still fits."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from longforge.forge.run_folder import RunState

__all__ = ["RunClock"]

REPORT_SECONDS = 8.0
EVALUATION_SLACK = 1.25
"""The last evaluation may take this much longer than the first: a trained agent may use more calls."""

RECENT_STEPS = 5


class RunClock:
    """Books time into `state`. began: when this process began with the run, on the monotonic clock."""

    def __init__(self, state: RunState, max_seconds: float | None, began: float) -> None:
        self._state = state
        self._max_seconds = max_seconds
        self._began = began - state.seconds
        self._steps: list[float] = []

    @property
    def spent(self) -> float:
        """Seconds of the whole run, those before a resume included."""
        return time.monotonic() - self._began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to the run's time per phase."""
        began = time.monotonic()
        try:
            yield
        finally:
            before = self._state.phase_seconds.get(name, 0.0)
            self._state.phase_seconds[name] = before + time.monotonic() - began

    def add_step(self, seconds: float) -> None:
        """A training step took so long, waiting for its batch included."""
        self._steps.append(seconds)

    def step_fits(self) -> bool:
        """Whether another step, the last evaluation and the report fit the limit."""
        if self._max_seconds is None:
            return True
        evaluation = EVALUATION_SLACK * self._state.evaluations["before"]["seconds"]
        step = median(self._steps[-RECENT_STEPS:]) if self._steps else 0.0
        return self.spent + step + evaluation + REPORT_SECONDS < self._max_seconds
