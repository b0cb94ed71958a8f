"""Who uses which page of the pool.

A page is `block_size` consecutive positions of one path and holds the keys, values, index keys and draft keys
of every layer (`model.KVCache`). It is the only thing that is allocated, shared, cached and evicted. Here
pages are numbers; the tensors never move.

    free      nobody uses it, it holds nothing
    used      at least one running request has it in its page table; `users` counts them
    cached    the prefix cache knows what it holds; used or not
"""

import heapq
from collections import Counter
from collections.abc import Iterable

from longforge.errors import EngineError

__all__ = ["PagePool"]


class PagePool:
    """Pages 0 .. total-1. The lowest free ones are handed out first: a run is reproducible to the page."""

    def __init__(self, total: int) -> None:
        assert total >= 1, "a pool has at least one page"
        self.total = total
        self.users = [0] * total
        """Running requests that use each page."""
        self.cached = bytearray(total)
        """1 for the pages that the prefix cache holds."""
        self._free = list(range(total))  # sorted, hence a heap
        self.idle = 0
        """Cached pages that no request uses: what eviction can win."""

    @property
    def free(self) -> int:
        """Pages that nobody uses and that hold nothing."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """The `count` lowest free pages, ascending, each with one user.

        EngineError if there are fewer; then nothing is taken.
        """
        if count > len(self._free):
            raise EngineError(f"pages: {count} asked for, {self.free} of {self.total} are free")
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self.users[page] = 1
        return pages

    def hold(self, page: int) -> None:
        """One more user of a used or cached page."""
        if not (self.users[page] or self.cached[page]):
            raise EngineError(f"page {page}: asked for while it is free")
        self.idle -= not self.users[page]
        self.users[page] += 1

    def release(self, page: int) -> None:
        """One user less; a page without users that is not cached becomes free."""
        if not (0 <= page < self.total and self.users[page]):
            raise EngineError(f"page {page}: given back without being in use")
        self.users[page] -= 1
        if not self.users[page]:
            self._unused(page)

    def set_cached(self, page: int, cached: bool) -> None:
        """Tells whether the prefix cache holds a page. It may start to hold only pages in use."""
        assert bool(self.cached[page]) != cached, "a page is taken into the cache once"
        assert self.users[page] or not cached, "a page that enters the cache is in use"
        self.cached[page] = cached
        if not self.users[page]:
            self.idle -= 1
            self._unused(page)

    def _unused(self, page: int) -> None:
        if self.cached[page]:
            self.idle += 1
        else:
            heapq.heappush(self._free, page)

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Asserts the invariants, given the page tables of all running requests.

        Free, cached and used pages together are the pool, and each page's users are the tables that name it.
        """
        users = Counter(page for table in tables for page in table)
        assert all(users[page] == count for page, count in enumerate(self.users)), "users are miscounted"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        idle = {p for p in range(self.total) if self.cached[p] and not self.users[p]}
        assert self.idle == len(idle), "idle pages are miscounted"
        used = {p for p in range(self.total) if self.users[p]}
        assert not free & idle and not free & used, "a free page is used or cached"
        assert len(free) + len(idle) + len(used) == self.total, "a page is lost"
