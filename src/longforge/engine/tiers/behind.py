"""A thread that writes while the engine goes on, with a bounded queue that drops rather than waits."""

import threading
from collections.abc import Callable

from longforge.engine.tiers.keys import PageName
from longforge.engine.tiers.record import Record

__all__ = ["WriteBehind"]


class WriteBehind:
    """Hands records to `write` on a thread of its own, oldest first.

    write: called for one record at a time; must not raise.
    prepare: called once on that thread before the first write; must not raise.
    """

    def __init__(
        self, write: Callable[[PageName, Record], None], prepare: Callable[[], None], limit_bytes: int
    ) -> None:
        self.dropped = 0
        """Records that found the queue full or closed."""
        self._write = write
        self._prepare = prepare
        self._limit = limit_bytes
        self._changed = threading.Condition()
        self._waiting: dict[PageName, Record] = {}
        self._bytes = 0
        self._preparing = True
        self._closing = False
        # A daemon: a process that ends without close() loses what waits, and does not hang.
        self._thread = threading.Thread(target=self._run, name="longforge-pages", daemon=True)
        self._thread.start()

    def offer(self, name: PageName, record: Record) -> bool:
        """Queues a record; False if it was dropped. One that waits already is not queued twice."""
        with self._changed:
            if name in self._waiting:
                return True
            if self._closing or not self._thread.is_alive() or self._bytes + record.nbytes > self._limit:
                self.dropped += 1
                return False
            self._waiting[name] = record
            self._bytes += record.nbytes
            self._changed.notify_all()
            return True

    def holds(self, name: PageName) -> bool:
        """Whether a record waits or is being written."""
        with self._changed:
            return name in self._waiting

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until nothing waits; whether that was reached within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(self._idle, timeout) and not self._waiting

    def close(self, timeout: float) -> None:
        """Writes what waits, for at most `timeout` seconds; drops the rest. May be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if not self._changed.wait_for(self._idle, timeout):
                # The record at the front is being written and removes itself.
                rest = list(self._waiting)[1:]
                for name in rest:
                    self._bytes -= self._waiting.pop(name).nbytes
                self.dropped += len(rest)
        self._thread.join(timeout)

    def _idle(self) -> bool:
        return not self._thread.is_alive() or not (self._waiting or self._preparing)

    def _run(self) -> None:
        self._prepare()
        with self._changed:
            self._preparing = False
            self._changed.notify_all()
        while self._next():
            pass

    def _next(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return False
            name, record = next(iter(self._waiting.items()))
        self._write(name, record)
        with self._changed:
            del self._waiting[name]
            self._bytes -= record.nbytes
            self._changed.notify_all()
        return True
