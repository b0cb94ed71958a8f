"""What is known of an answer when it is over, for the metrics."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Observed", "Observer", "ignore"]


@dataclass(frozen=True, slots=True)
class Observed:
    """One answer. Times are seconds of `time.perf_counter`."""

    outcome: str
    """stop, length, abort (its reader went away) or error."""
    opened: float
    arrivals: tuple[float, ...]
    """When each token came."""
    let_in: float | None = None
    """When the scheduler first let it in; None: it never was."""


Observer = Callable[[Observed], None]


def ignore(observed: Observed) -> None:
    """Observes nothing."""
