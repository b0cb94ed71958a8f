"""Ctrl-C, kept from tearing a step apart."""

import signal
from types import FrameType

__all__ = ["Interrupted", "StopFlag"]


class Interrupted(Exception):
    """Someone asked the run to stop; raised at a place where everything is whole."""


class StopFlag:
    """While entered, Ctrl-C and SIGTERM are noted and `check` raises `Interrupted`.

    A second Ctrl-C raises KeyboardInterrupt at once. Signals reach the main thread only, so it enters there.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: list[tuple[int, object]] = []

    def check(self) -> None:
        """Raises Interrupted if a stop was asked for."""
        if self.requested:
            raise Interrupted

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> "StopFlag":
        self._before = [(number, signal.signal(number, self._note)) for number in self.SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] - what signal() gave back
