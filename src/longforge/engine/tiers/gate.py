"""Whether fetching a page is cheaper than computing it again: measured costs on both sides.

A tier can lose. A slow disk, or a fast one behind a busy network, takes longer than the model does:
then the tier is left alone until a probe finds it quicker.
"""

from dataclasses import dataclass, field

from longforge.errors import InputError

__all__ = ["Gate"]

# Of the weight in all earlier measurements: about the last ten count.
_KEPT = 0.9
# Loads must differ by this much (variance over mean square) before latency can be told from bandwidth.
_SPREAD = 0.01


@dataclass
class _Line:
    """seconds = latency + bytes * slope, least squares with exponentially falling weights."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.n = self.n * _KEPT + 1
        self.x = self.x * _KEPT + x
        self.y = self.y * _KEPT + y
        self.xx = self.xx * _KEPT + x * x
        self.xy = self.xy * _KEPT + x * y

    def at(self, x: float) -> float:
        spread = self.n * self.xx - self.x * self.x
        if spread > _SPREAD * self.x * self.x:
            slope = (self.n * self.xy - self.x * self.y) / spread
            latency = (self.y - slope * self.x) / self.n
            if slope > 0 and latency > 0:
                return latency + x * slope
        return x * self.y / self.x


@dataclass
class _Tier:
    loads: _Line = field(default_factory=_Line)
    refused: int = 0
    refused_in_a_row: int = 0


class Gate:
    """Compares a load's expected seconds with the prefill it saves. The same calls give the same answers.

    probe_every: of so many refusals in a row the last is let through, so that a tier that has become quick is
    found out.
    """

    def __init__(self, probe_every: int = 32) -> None:
        if probe_every < 2:
            raise InputError(f"probe_every: at least 2 is needed, got {probe_every}")
        self._probe_every = probe_every
        self._tiers: dict[str, _Tier] = {}
        self._prefill = _Line()

    def saw_load(self, tier: str, size: int, seconds: float) -> None:
        """A load of `size` bytes from `tier` took so long."""
        if size > 0:
            self._of(tier).loads.add(size, seconds)

    def saw_prefill(self, tokens: int, seconds: float) -> None:
        """Computing so many prompt tokens took so long."""
        if tokens > 0:
            self._prefill.add(tokens, seconds)

    def allows(self, tier: str, size: int, tokens: int) -> bool:
        """Whether to load `size` bytes to save the prefill of `tokens`. True until both are measured."""
        seen = self._of(tier)
        if seen.loads.n and self._prefill.n:
            seconds_per_token = self._prefill.y / self._prefill.x
            if seen.loads.at(size) >= tokens * seconds_per_token:
                seen.refused_in_a_row += 1
                if seen.refused_in_a_row < self._probe_every:
                    seen.refused += 1
                    return False
        seen.refused_in_a_row = 0
        return True

    def refused(self, tier: str) -> int:
        """Loads from `tier` that were not made."""
        return self._of(tier).refused

    def _of(self, tier: str) -> _Tier:
        return self._tiers.setdefault(tier, _Tier())
