"""The prefix cache's dull twin: the same promises by looking through everything. Tests compare the two."""

from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import NDArray

from longforge.engine.pages import PagePool
from longforge.errors import EngineError

__all__ = ["PlainPrefixCache"]


class PlainPrefixCache:
    """Each cached page beside the whole path of ids that leads to its end. Methods as in `PrefixCache`."""

    def __init__(self, pool: PagePool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self._paths: dict[tuple[Hashable, tuple[int, ...]], int] = {}
        self._used_at: dict[int, int] = {}
        self._clock = 0

    @property
    def available(self) -> int:
        return self.pool.free + self.pool.idle

    def find(self, root: Hashable, ids: NDArray[np.int64], most: int) -> list[int]:
        path, pages = tuple(ids.tolist()), []
        for end in range(self.block_size, len(path) + 1, self.block_size):
            page = self._paths.get((root, path[:end]))
            if page is None or len(pages) == most:
                break
            pages.append(page)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.pool.hold(page)

    def take(self, count: int) -> list[int]:
        if count > self.available:
            raise EngineError(f"pages: {count} asked for, {self.available} can be had")
        while self.pool.free < count:
            key = min(filter(self._evictable, self._paths), key=lambda key: self._used_at[self._paths[key]])
            self.pool.set_cached(self._paths.pop(key), False)
        return self.pool.take(count)

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.pool.release(page)
            if page in self._paths.values():
                self._touch(page)

    def add(self, root: Hashable, before: int | None, ids: NDArray[np.int64], page: int) -> int:
        path: tuple[int, ...] = ()
        if before is not None:
            path = next(path for (_, path), known in self._paths.items() if known == before)
        key = (root, path + tuple(ids.tolist()))
        if key in self._paths:
            self.pool.hold(self._paths[key])
            self.pool.release(page)
            return self._paths[key]
        self._paths[key] = page
        self.pool.set_cached(page, True)
        self._touch(page)
        return page

    def forget(self) -> int:
        count = len(self._paths)
        for page in self._paths.values():
            self.pool.set_cached(page, False)
        self._paths = {}
        return count

    def _touch(self, page: int) -> None:
        self._clock += 1
        self._used_at[page] = self._clock

    def _evictable(self, key: tuple[Hashable, tuple[int, ...]]) -> bool:
        root, path = key
        return not self.pool.users[self._paths[key]] and not any(
            other_root == root and len(other) > len(path) and other[: len(path)] == path
            for other_root, other in self._paths
        )
