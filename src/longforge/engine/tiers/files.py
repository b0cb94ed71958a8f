"""The third tier: one file per page in a folder that processes share, written behind the engine's back.

Nothing here raises into the engine. What cannot be read is a miss, what cannot be written is dropped, both
are counted, and after repeated failures the tier stops trying and says why.
"""

import contextlib
import errno
import os
import stat
import threading
from pathlib import Path

import numpy as np

from longforge.engine.tiers.behind import WriteBehind
from longforge.engine.tiers.folder import PageFolder, remove
from longforge.engine.tiers.keys import PageName
from longforge.engine.tiers.record import HEADER_BYTES, Record, is_whole, sealed_header
from longforge.errors import InputError

__all__ = ["FileTier"]

# Failures in a row after which reading or writing stops: one may be an accident, a full disk repeats itself.
_PATIENCE = 5
# Of the capacity: how far below it an eviction goes, so that not every write has to look at all files.
_BATCH = 0.1
# Of the capacity: bytes written after which the folder is looked at again, because others write there too.
_LOOK_AGAIN = 0.125
_ABSENT = (errno.ENOENT, errno.ENOTDIR)


class Switch:
    """Goes off, with a reason, after several failures in a row."""

    def __init__(self, verb: str) -> None:
        self.failures = 0
        self.reason: str | None = None
        self._verb = verb
        self._in_a_row = 0

    def failed(self, error: OSError) -> None:
        """Counts a failure."""
        self.failures += 1
        self._in_a_row += 1
        if self._in_a_row >= _PATIENCE and self.reason is None:
            what = error.strerror or type(error).__name__
            self.reason = f"page folder: {self._verb} stopped after {self._in_a_row} failures: {what}"

    def worked(self) -> None:
        """Forgives earlier failures."""
        self._in_a_row = 0


class FileTier:
    """Records by name in `folder`, which holds at most `capacity_bytes` of them, other processes' included.

    Alone the capacity is kept exactly; each further process that writes at the same time may exceed it by an
    eighth until it looks again. The least recently used records leave first, of any namespace.

    record_bytes: size of every record of this process; a file of another size under its name is damaged.
    queue_bytes: what may wait to be written; more is dropped.
    Raises InputError for a folder that is not ours, or where not even one record fits.
    """

    def __init__(
        self, folder: Path, capacity_bytes: int, record_bytes: int, queue_bytes: int = 256 << 20
    ) -> None:
        for what, size in (("capacity", capacity_bytes), ("queue", queue_bytes)):
            if size < record_bytes:
                raise InputError(
                    f"file tier: {what}: at least one record of {record_bytes} bytes is needed, got {size}"
                )
        self._folder = PageFolder(folder)
        self._capacity = capacity_bytes
        self._record_bytes = record_bytes
        self._counts = threading.Lock()
        self._reading, self._writing = Switch("reading"), Switch("writing")
        self._unseen = 0  # bytes written since the last look; only the writer thread uses it
        self.pages = 0
        self.bytes = 0
        self.stored = 0
        self.evicted = 0
        self.damaged = 0
        self._off = 0
        self._behind = WriteBehind(self._write, self._look, queue_bytes)

    @property
    def reason(self) -> str | None:
        """Why the tier stopped storing or reading; None while it works."""
        reasons = [switch.reason for switch in (self._writing, self._reading) if switch.reason]
        return "; ".join(reasons) or None

    @property
    def failures(self) -> int:
        """Errors of the file system."""
        return self._reading.failures + self._writing.failures

    @property
    def dropped(self) -> int:
        """Records not written: the queue was full, no room could be made, or writing has stopped."""
        return self._behind.dropped + self._off

    def has(self, name: PageName) -> bool:
        """Whether a file of the right size is there."""
        if self._reading.reason:
            return False
        try:
            found = os.stat(self._folder.path_of(name), follow_symlinks=False)  # noqa: PTH116 - plain strings, as in folder.py
        except OSError as error:
            if error.errno not in _ABSENT:
                self._reading.failed(error)
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == self._record_bytes

    def get(self, name: PageName) -> Record | None:
        """The record, checked to the last byte; None if it is not there. A damaged one is deleted."""
        if self._reading.reason:
            return None
        path = self._folder.path_of(name)
        try:
            record = _read(path, self._record_bytes)
        except OSError as error:
            if error.errno not in _ABSENT:
                self._reading.failed(error)
            return None
        self._reading.worked()
        if record is None or not is_whole(record, name):
            self.damaged += 1
            if remove(path):
                self._forget(1, self._record_bytes)
            return None
        record.flags.writeable = False
        return record

    def touch(self, name: PageName) -> None:
        """Makes a record the most recently used one."""
        # Gone meanwhile, or not to be marked: then it leaves earlier, which is no harm.
        with contextlib.suppress(OSError):
            os.utime(self._folder.path_of(name), follow_symlinks=False)

    def put(self, name: PageName, record: Record) -> bool:
        """Queues a record to be written, unless it is there by then; False if it was dropped."""
        assert record.nbytes == self._record_bytes, "every record of a tier has one size"
        if self._writing.reason:
            self._count_off()
            return False
        return self._behind.offer(name, record)

    def holds(self, name: PageName) -> bool:
        """Whether a record is there or on its way."""
        return self._behind.holds(name) or self.has(name)

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until all that was put is written or given up; False if `timeout` seconds were not enough."""
        return self._behind.flush(timeout)

    def close(self, timeout: float = 30.0) -> None:
        """Writes what waits, for at most `timeout` seconds, and ends the thread. May be called twice."""
        self._behind.close(timeout)

    # The rest runs on the writer's thread.

    def _write(self, name: PageName, record: Record) -> None:
        if self._writing.reason:
            self._count_off()
            return
        try:
            if self.has(name):
                self.touch(name)
                return
            if not self._make_room():
                self._count_off()
                return
            self._folder.write(name, sealed_header(record), record.data[HEADER_BYTES:])
        except OSError as error:
            self._writing.failed(error)
            return
        self._writing.worked()
        self._unseen += record.nbytes
        with self._counts:
            self.stored += 1
            self.pages += 1
            self.bytes += record.nbytes

    def _make_room(self) -> bool:
        full = self.bytes + self._record_bytes > self._capacity
        if full or self._unseen > _LOOK_AGAIN * self._capacity:
            self._look(self._record_bytes)
        return self.bytes + self._record_bytes <= self._capacity

    def _look(self, room: int = 0) -> None:
        """Counts what is there, everybody's; if `room` more bytes would not fit, the oldest go."""
        try:
            found = self._folder.records()
        except OSError as error:
            self._writing.failed(error)
            return
        self._unseen = 0
        with self._counts:
            self.pages, self.bytes = len(found), sum(entry.size for entry in found)
        if self.bytes + room <= self._capacity:
            return
        goal = min(self._capacity - room, int((1 - _BATCH) * self._capacity))
        for entry in sorted(found):
            if self.bytes <= goal:
                break
            if remove(entry.path):
                self.evicted += 1
                self._forget(1, entry.size)

    def _count_off(self) -> None:
        with self._counts:
            self._off += 1

    def _forget(self, pages: int, size: int) -> None:
        with self._counts:
            self.pages = max(0, self.pages - pages)
            self.bytes = max(0, self.bytes - size)


def _read(path: str, size: int) -> Record | None:
    """The bytes of a regular file of this size; None for anything else that stands there."""
    try:
        # Without O_NONBLOCK opening a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            return None
        record = np.empty(size, np.uint8)
        rest = record.data
        while rest:
            count = os.readv(descriptor, [rest])
            if not count:
                return None
            rest = rest[count:]
        return record
    finally:
        os.close(descriptor)
