"""Whether an engine's pages still add up, looked at while it has nothing else to do."""

import logging
import threading
import time
from collections.abc import Callable

__all__ = ["PageWatch"]

CHECK_SECONDS = 1.0
"""At least so long from one check to the next: they look at every page."""

logger = logging.getLogger(__name__)


class PageWatch:
    """Checks once after each time of work. For the engine's thread.

    check: asserts that the pages add up. seconds: at least so long from one check to the next. A check that
    fails is logged and counted; the server goes on, since most of what it serves is still right.
    """

    def __init__(self, check: Callable[[], None], seconds: float = CHECK_SECONDS) -> None:
        self.failures = 0
        self._check = check
        self._seconds = seconds
        self._checked = -float("inf")
        self._due = False

    def worked(self) -> None:
        """Something has changed."""
        self._due = True

    def check(self, wake: threading.Event) -> None:
        """Checks if something has changed, once it is time to; not if `wake` is set before."""
        if not self._due or wake.wait(self._checked + self._seconds - time.monotonic()):
            return
        self._due = False
        self._checked = time.monotonic()
        try:
            self._check()
        except AssertionError as error:
            self.failures += 1
            logger.error("engine: its pages do not add up (%s); restart the server when it suits", error)
