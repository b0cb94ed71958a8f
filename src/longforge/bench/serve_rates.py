"""Samples of rates and times: contestants take turns, a run is timed between its tokens."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Deadline", "Spread", "decode_rate", "in_turns", "spread"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the samples of `rounds` rounds."""

    middle: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Deadline:
    """When to begin nothing more, in seconds of `time.monotonic`."""

    at: float

    @staticmethod
    def after(minutes: float | None) -> "Deadline":
        """So many minutes from now; None: never."""
        return Deadline(float("inf") if minutes is None else time.monotonic() + 60 * minutes)

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self.at


def spread(samples: Sequence[float]) -> Spread:
    """Of at least one sample."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(middle, low, high, len(samples))


def in_turns(
    contestants: Mapping[str, Callable[[], float]], rounds: int, deadline: Deadline
) -> dict[str, Spread]:
    """The spread of what each contestant returns, one sample of each a round.

    At least one round; the others are left out once the deadline has passed. Contestants have run before.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        if number and deadline.passed:
            break
        for name, run in contestants.items():
            samples[name].append(run())
    return {name: spread(values) for name, values in samples.items()}


def decode_rate(times: Sequence[Sequence[float]]) -> float:
    """Tokens a second while all requests decode.

    times: of each request, when each of its tokens was there, in seconds. Counted is what comes after the
    last request's first token, so that no prompt is in it.
    """
    begin, end = max(of[0] for of in times), max(of[-1] for of in times)
    if begin == end:  # so short that one was over before another began
        begin = min(of[0] for of in times)
    tokens = sum(at > begin for of in times for at in of)
    return tokens / max(end - begin, 1e-6)
