"""What a page is called outside the pool: a key for its tokens, below a namespace for everything else."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["DIGEST_BYTES", "Namespace", "PageName", "page_key", "root_key"]

DIGEST_BYTES = 32
"""Of a namespace and of a key: both are sha256."""

_ROOT = b"longforge pages from position 0\0"


@dataclass(frozen=True)
class Namespace:
    """Everything but tokens that decides what is in a page: pages are shared where all of it is equal.

    The weights' version alone would not do: two processes can count to the same version with different
    weights, so `weights` is a hash of the tensors (`weights_fingerprint`).
    """

    config: Mapping[str, Any]
    """`ModelConfig.as_dict()`."""
    weights: str
    weights_version: int
    dtype: str
    layout: str
    """`RecordFormat.layout`: the version of the record and what is in it."""
    block_size: int
    tenant: str = ""
    """Who may see the pages: tenants share nothing, not even the time that a hit would save."""

    def digest(self) -> bytes:
        """sha256 of the canonical JSON of all fields, 32 bytes."""
        fields = {
            "config": dict(self.config),
            "weights": self.weights,
            "weights_version": self.weights_version,
            "dtype": self.dtype,
            "layout": self.layout,
            "block_size": self.block_size,
            "tenant": self.tenant,
        }
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).digest()


class PageName(NamedTuple):
    """Where a record belongs. Both are 32 bytes."""

    namespace: bytes
    key: bytes


def root_key(namespace: bytes) -> bytes:
    """The parent of every first page of a namespace (`Namespace.digest()`)."""
    assert len(namespace) == DIGEST_BYTES, "a namespace is a sha256 digest"
    return hashlib.sha256(_ROOT + namespace).digest()


def page_key(parent: bytes, token_ids: Sequence[int] | NDArray[np.integer]) -> bytes:
    """The key of the page that holds `token_ids` and follows the page of key `parent`, 32 bytes.

    sha256 over the parent and the ids as int64, little-endian: equal keys, equal tokens from position 0 on.
    """
    assert len(parent) == DIGEST_BYTES, "a parent is a key"
    ids = np.asarray(token_ids)
    assert ids.ndim == 1 and ids.dtype.kind in "iu", "token ids are whole numbers in one row"
    return hashlib.sha256(parent + ids.astype("<i8").tobytes()).digest()
