"""Who owns which page of the pool.

A page is `block_size` consecutive positions of one path and holds the keys, values and index keys of every
layer (`model.KVCache`). It is the only thing that is allocated. Here pages are numbers; the tensors never
move.
"""

import heapq
from collections.abc import Iterable

from longforge.errors import EngineError

__all__ = ["PageAllocator"]


class PageAllocator:
    """Hands out page numbers 0 .. total-1, lowest first, so that a run is reproducible to the page."""

    def __init__(self, total: int) -> None:
        assert total >= 1, "a pool has at least one page"
        self.total = total
        self._free = list(range(total))  # sorted, hence a heap
        self._used = bytearray(total)

    @property
    def free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether `allocate(count)` would succeed now."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes the `count` lowest free pages, ascending.

        EngineError if there are fewer; then nothing is taken.
        """
        if not self.can_allocate(count):
            raise EngineError(f"pages: {count} asked for, {self.free} of {self.total} are free")
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._used[page] = 1
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Gives pages back. A page that is not in use is a bug of the caller and raises EngineError."""
        for page in pages:
            if not (0 <= page < self.total and self._used[page]):
                raise EngineError(f"page {page}: given back without being in use")
            self._used[page] = 0
            heapq.heappush(self._free, page)

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Asserts the invariant: free and owned pages together are the pool, and no page has two owners."""
        owned = [page for pages in owners for page in pages]
        assert len(set(owned)) == len(owned), "a page has two owners"
        assert sorted(owned + self._free) == list(range(self.total)), "free and owned pages are not the pool"
        assert all(self._used[page] for page in owned), "an owned page is marked free"
