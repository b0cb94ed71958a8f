"""One page as one string of bytes: a header that says whose page it is, then its row of every pool tensor.

    bytes 0..95     magic, layout version, header size, payload size, namespace, key
    bytes 96..127   sha256 over bytes 0..95 and the payload; zeros while the record is only in memory
    bytes 128..     the payload: the page's row of each pool tensor, in order, without gaps

A record is whole or it is nothing: keys without the state that belongs to them are never restored.
"""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longforge.engine.tiers.keys import DIGEST_BYTES, PageName
from longforge.errors import InputError

__all__ = ["HEADER_BYTES", "LAYOUT_VERSION", "Record", "RecordFormat", "is_whole", "sealed_header"]

Record = NDArray[np.uint8]
"""uint8 [header + payload], not written to once it is packed."""

LAYOUT_VERSION = 1
"""Rises with every change of what the bytes mean; part of every namespace through `RecordFormat.layout`."""

_MAGIC = b"longforge page\r\n"
_FIXED = struct.Struct("<16sIIQ32s32s")
HEADER_BYTES = _FIXED.size + DIGEST_BYTES


def _fixed(name: PageName, payload_bytes: int) -> bytes:
    return _FIXED.pack(_MAGIC, LAYOUT_VERSION, HEADER_BYTES, payload_bytes, name.namespace, name.key)


def _checksum(record: Record) -> bytes:
    digest = hashlib.sha256(record[: _FIXED.size].data)
    digest.update(record[HEADER_BYTES:].data)
    return digest.digest()


def sealed_header(record: Record) -> bytes:
    """The record's header with its checksum: what stands in front of the payload outside this process."""
    return record[: _FIXED.size].tobytes() + _checksum(record)


def is_whole(record: Record, name: PageName) -> bool:
    """Whether bytes from outside are, all of them, the sealed record of this page."""
    return _belongs(record, name) and record[_FIXED.size : HEADER_BYTES].tobytes() == _checksum(record)


def _belongs(record: Record, name: PageName) -> bool:
    # The expected header is known in full, so it is compared, not parsed.
    expected = _fixed(name, record.size - HEADER_BYTES) if record.size >= HEADER_BYTES else b""
    return record[: _FIXED.size].tobytes() == expected


class RecordFormat:
    """Copies pages of given pools to records and back.

    tensors: every tensor that a page has a row of, each [pages, ...], contiguous, on one device, any dtype.
    They must stay the pool for the format's lifetime: rows are views, and no copy of the pool is made.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        _check(tensors)
        self.pages = tensors[0].shape[0]
        described = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape[1:])}" for t in tensors]
        self.layout = f"{LAYOUT_VERSION}:{';'.join(described)}".replace(" ", "")
        """Version and contents of the record, a field of the namespace."""
        rows = [t.detach().reshape(self.pages, -1).view(torch.uint8) for t in tensors]
        self.payload_bytes = sum(row.shape[1] for row in rows)
        self.record_bytes = HEADER_BYTES + self.payload_bytes
        on_host = tensors[0].device.type == "cpu"
        self._rows = HostRows(rows) if on_host else StagedRows(rows)

    def pack(self, page: int, name: PageName) -> Record:
        """The record of a page of the pool, without checksum (`sealed_header` makes it, off this thread)."""
        assert 0 <= page < self.pages, "the page is one of the pool"
        record = np.empty(self.record_bytes, np.uint8)
        record[:HEADER_BYTES] = np.frombuffer(
            _fixed(name, self.payload_bytes) + bytes(DIGEST_BYTES), np.uint8
        )
        self._rows.read(page, record[HEADER_BYTES:])
        record.flags.writeable = False
        return record

    def unpack(self, record: Record, page: int, name: PageName) -> bool:
        """Writes a record into a page of the pool; False, and nothing written, if it is not this page's.

        Checks size and header. Bytes that come from outside the process must have passed `is_whole` before,
        as those of `FileTier.get` have.
        """
        assert 0 <= page < self.pages, "the page is one of the pool"
        if record.size != self.record_bytes or not _belongs(record, name):
            return False
        self._rows.write(page, record[HEADER_BYTES:])
        return True


def _check(tensors: Sequence[Tensor]) -> None:
    if not tensors:
        raise InputError("pools: at least one tensor is needed, got none")
    first = tensors[0]
    for i, tensor in enumerate(tensors):
        if tensor.ndim < 1 or tensor.shape[0] != first.shape[0] or not tensor.numel():
            expected = f"[{first.shape[0] if first.ndim else 'pages'}, ...]"
            raise InputError(f"pools: tensor {i}: {expected} with values is needed, got {list(tensor.shape)}")
        if tensor.device != first.device:
            raise InputError(f"pools: tensor {i}: device {first.device} is needed, got {tensor.device}")
        if not tensor.is_contiguous():
            raise InputError(f"pools: tensor {i}: contiguous memory is needed, got strides {tensor.stride()}")


class HostRows:
    """Pool tensors in host memory, each as uint8 [pages, bytes]: one memcpy per tensor."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self._arrays = [row.numpy() for row in rows]

    def read(self, page: int, payload: Record) -> None:
        """Copies the page's rows into `payload`."""
        start = 0
        for array in self._arrays:
            end = start + array.shape[1]
            payload[start:end] = array[page]
            start = end

    def write(self, page: int, payload: Record) -> None:
        """Copies `payload` into the page's rows."""
        start = 0
        for array in self._arrays:
            end = start + array.shape[1]
            array[page] = payload[start:end]
            start = end


class StagedRows:
    """Pool tensors on a device, each as uint8 [pages, bytes]: copied through one pinned page of host memory.

    Copies are queued on the current stream, behind the kernels that wrote the page, and waited for once.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self._device = rows[0].device
        total = sum(row.shape[1] for row in rows)
        self._staging = torch.empty(total, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self._host = self._staging.numpy()
        self._parts = list(zip(rows, self._staging.split([row.shape[1] for row in rows]), strict=True))

    def read(self, page: int, payload: Record) -> None:
        """Copies the page's rows into `payload`."""
        for row, staged in self._parts:
            staged.copy_(row[page], non_blocking=True)
        self._wait()
        payload[:] = self._host

    def write(self, page: int, payload: Record) -> None:
        """Copies `payload` into the page's rows. Returns when the staging page may be used again."""
        self._host[:] = payload
        for row, staged in self._parts:
            row[page].copy_(staged, non_blocking=True)
        self._wait()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
