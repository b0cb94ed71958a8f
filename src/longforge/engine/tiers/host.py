"""The second tier: records in host memory, the least recently used leave first."""

from collections import OrderedDict

from longforge.engine.tiers.record import Record
from longforge.errors import InputError

__all__ = ["HostTier"]


class HostTier:
    """Records by key, at most `capacity_bytes` of them in bytes. For one thread."""

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < 1:
            raise InputError(f"host tier: a capacity of at least 1 byte is needed, got {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self.bytes = 0
        """Held now."""
        self.evicted = 0
        """Records that left because others came."""
        self.dropped = 0
        """Records larger than the whole tier."""
        self._records: OrderedDict[bytes, Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def has(self, key: bytes) -> bool:
        """Whether the record is here. Does not count as use."""
        return key in self._records

    def put(self, key: bytes, record: Record) -> bool:
        """Keeps a record as the most recently used, in place of one of its key. False if it never fits."""
        self.discard(key)
        if record.nbytes > self.capacity_bytes:
            self.dropped += 1
            return False
        while self.bytes + record.nbytes > self.capacity_bytes:
            _, old = self._records.popitem(last=False)
            self.bytes -= old.nbytes
            self.evicted += 1
        self._records[key] = record
        self.bytes += record.nbytes
        return True

    def get(self, key: bytes) -> Record | None:
        """The record, which is the most recently used one from now on."""
        record = self._records.get(key)
        if record is not None:
            self._records.move_to_end(key)
        return record

    def discard(self, key: bytes) -> bool:
        """Forgets a record; whether there was one."""
        record = self._records.pop(key, None)
        if record is None:
            return False
        self.bytes -= record.nbytes
        return True

    def clear(self) -> None:
        """Forgets all records."""
        self._records.clear()
        self.bytes = 0
