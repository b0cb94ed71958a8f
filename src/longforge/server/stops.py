"""Stop strings in a text that comes in pieces."""

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Cuts a text before the first stop string, wherever the pieces are split.

    Text that may still turn out to begin a stop string is held back. Of several stop strings the one that is
    complete first counts, as if the text had come character by character.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that came."""

    def push(self, text: str) -> str:
        """The text that is now certain. Nothing more comes after `found`."""
        if not self._stops or self.found is not None:
            return text if self.found is None else ""
        self._held += text
        ends = [
            (place + len(stop), place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0
        ]
        _, cut, self.found = min(ends) if ends else (0, len(self._held) - self._undecided(), None)
        certain, self._held = self._held[:cut], "" if ends else self._held[cut:]
        return certain

    def finish(self) -> str:
        """What was held back: the text has ended."""
        held, self._held = self._held, ""
        return held

    def _undecided(self) -> int:
        """Length of the longest tail that begins a stop string without completing it."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            tail = self._held[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0
