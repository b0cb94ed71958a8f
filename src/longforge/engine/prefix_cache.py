"""The prefix cache: a trie of pages keyed by exact token ids.

An edge is the ids of one whole page, so a path from a root spells a prompt page by page and a look-up is one
dictionary access per page. A root is anything hashable; the engine uses (weights version, tenant), so pages
of other weights or of another tenant can never match. No hashes stand in for tokens: there are no collisions.

Eviction takes the least recently used leaf that nobody uses. A request uses all pages of its path, so a page
without users has no descendant with users, and taking leaves alone can reach all of them.
"""

import heapq
from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import NDArray

from longforge.engine.pages import PagePool
from longforge.errors import EngineError

__all__ = ["PrefixCache"]


class _Node:
    """One page of the trie."""

    __slots__ = ("children", "ids", "page", "parent", "used_at")

    def __init__(self, ids: bytes, page: int, parent: "_Node | None") -> None:
        self.ids = ids
        self.page = page
        self.parent = parent
        self.children: dict[bytes, _Node] = {}
        self.used_at = 0


class PrefixCache:
    """Pages by what they hold. Takes pages out of the pool for requests, evicting where it must."""

    def __init__(self, pool: PagePool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self._roots: dict[Hashable, _Node] = {}
        self._nodes: dict[int, _Node] = {}
        """The node of each cached page."""
        self._leaves: list[tuple[int, int]] = []
        """Heap of (used_at, page) of leaves without users; entries may be out of date."""
        self._clock = 0

    @property
    def available(self) -> int:
        """Pages that `take` could give now."""
        return self.pool.free + self.pool.idle

    def find(self, root: Hashable, ids: NDArray[np.int64], most: int) -> list[int]:
        """The pages of the longest run of whole pages that `ids` begins with, at most `most`."""
        node = self._roots.get(root)
        pages: list[int] = []
        size = self.block_size
        for start in range(0, min(most, len(ids) // size) * size, size):
            node = node and node.children.get(ids[start : start + size].tobytes())
            if node is None:
                break
            pages.append(node.page)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """A request begins to use pages that `find` gave."""
        for page in pages:
            self.pool.hold(page)

    def take(self, count: int) -> list[int]:
        """`count` pages for a request, evicting no more than is short.

        EngineError if too few can be had; then nothing has changed.
        """
        if count > self.available:
            raise EngineError(f"pages: {count} asked for, {self.available} can be had")
        while self.pool.free < count:
            self._evict()
        return self.pool.take(count)

    def release(self, pages: Iterable[int]) -> None:
        """A request ends to use pages, given in the order of its path. What is cached stays for others."""
        for page in pages:
            self.pool.release(page)
            if (node := self._nodes.get(page)) is not None:
                self._touch(node)

    def add(self, root: Hashable, before: int | None, ids: NDArray[np.int64], page: int) -> int:
        """Makes a page that a request has filled known, behind the cached page `before` (None: first).

        ids: the page's own. Returns the page that holds them: where another request was faster, its page,
        which the caller now uses instead of its own.
        """
        parent = self._roots.setdefault(root, _Node(b"", -1, None)) if before is None else self._nodes[before]
        key = ids.tobytes()
        known = parent.children.get(key)
        if known is not None:
            self.pool.hold(known.page)
            self.pool.release(page)
            return known.page
        node = _Node(key, page, parent)
        parent.children[key] = self._nodes[page] = node
        self.pool.set_cached(page, True)
        self._touch(node)
        return page

    def forget(self) -> int:
        """Makes every page unknown. Those that requests use stay theirs. Returns how many were forgotten."""
        count = len(self._nodes)
        for page in self._nodes:
            self.pool.set_cached(page, False)
        self._roots, self._nodes, self._leaves = {}, {}, []
        return count

    def check(self) -> None:
        """Asserts that the trie and the pool tell the same story."""
        cached = {page for page in range(self.pool.total) if self.pool.cached[page]}
        assert cached == set(self._nodes), "the trie and the pool disagree about cached pages"
        reached = 0
        left = list(self._roots.values())
        while left:
            node = left.pop()
            for ids, child in node.children.items():
                assert child.parent is node and child.ids == ids, "a child is at the wrong place"
                assert self._nodes[child.page] is child, "a page has another node"
                if node.parent is not None:
                    assert self.pool.users[node.page] >= self.pool.users[child.page], "a path has a hole"
                left.append(child)
                reached += 1
        assert reached == len(self._nodes), "a cached page cannot be reached"

    def _touch(self, node: _Node) -> None:
        self._clock += 1
        node.used_at = self._clock
        self._note_leaf(node)

    def _note_leaf(self, node: _Node) -> None:
        if not node.children and not self.pool.users[node.page]:
            heapq.heappush(self._leaves, (node.used_at, node.page))
            if len(self._leaves) > 2 * len(self._nodes) + 64:  # mostly out of date
                self._leaves = [(n.used_at, n.page) for n in self._nodes.values() if not n.children]
                heapq.heapify(self._leaves)

    def _evict(self) -> None:
        while True:
            used_at, page = heapq.heappop(self._leaves)
            node = self._nodes.get(page)
            if node and node.used_at == used_at and not node.children and not self.pool.users[page]:
                break
        del self._nodes[page]
        self.pool.set_cached(page, False)
        parent = node.parent
        assert parent is not None, "a page hangs on a root or on another page"
        del parent.children[node.ids]
        if parent.parent is not None:
            self._note_leaf(parent)
        elif not parent.children:
            self._roots = {root: top for root, top in self._roots.items() if top is not parent}
