"""How many tokens are worth guessing.

With probability a for each guess, given that those before it were right, k guesses yield
(1 - a^(k+1)) / (1 - a) tokens a step (Leviathan et al., arXiv 2211.17192, equation 1), at the price of k more
rows to verify and k passes of the draft module.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["DraftCosts", "best_length", "expected_tokens"]

WORTH = 1.02
"""A length must promise this much more than a shorter one: estimates waver."""


@dataclass(frozen=True)
class DraftCosts:
    """Seconds (or any unit) of a step and of a draft pass, by rows; between them, straight lines."""

    rows: tuple[int, ...] = (1, 64)
    step: tuple[float, ...] = (1.0, 7.3)
    draft: tuple[float, ...] = (0.25, 1.8)

    def of_step(self, rows: int) -> float:
        """A step that computes so many rows."""
        return _between(self.rows, self.step, rows)

    def of_draft(self, rows: int) -> float:
        """A pass of the draft module over so many rows."""
        return _between(self.rows, self.draft, rows)

    def seconds(self, batch: int, length: int) -> float:
        """A step of `batch` requests that verifies and makes `length` guesses for each."""
        return self.of_step(batch * (1 + length)) + (length and length * self.of_draft(batch))


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens that a step with `length` guesses yields."""
    return sum(acceptance**place for place in range(length + 1))


def best_length(acceptance: float, seconds: Callable[[int], float], most: int) -> int:
    """The number of guesses, 0 to `most`, that promises most tokens a second.

    seconds: of a step with so many guesses, verified and made.
    """
    best, best_rate = 0, 1.0 / seconds(0)
    for length in range(1, most + 1):
        rate = expected_tokens(acceptance, length) / seconds(length)
        if rate > best_rate * WORTH:
            best, best_rate = length, rate
    return best


def _between(places: Sequence[int], values: Sequence[float], at: int) -> float:
    """The straight line through the two points around `at`; beyond the ends the outermost line goes on."""
    if len(places) == 1:
        return values[0]
    right = min(max(bisect_left(places, at), 1), len(places) - 1)
    x0, x1, y0, y1 = places[right - 1], places[right], values[right - 1], values[right]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
