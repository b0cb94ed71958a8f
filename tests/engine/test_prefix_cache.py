"""The trie finds what was computed, never more, and evicts as its plain twin does."""

import numpy as np
import pytest

from longforge.engine.pages import PagePool
from longforge.engine.plain_cache import PlainPrefixCache
from longforge.engine.prefix_cache import PrefixCache
from longforge.errors import EngineError

BOTH = pytest.mark.parametrize("kind", [PrefixCache, PlainPrefixCache])
BLOCK = 2


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def filled(cache: PrefixCache | PlainPrefixCache, root: object, path: np.ndarray) -> list[int]:
    """What a request leaves behind that computed `path` from its start."""
    pages = cache.take(len(path) // BLOCK)
    for block in range(len(pages)):
        before = pages[block - 1] if block else None
        pages[block] = cache.add(root, before, path[block * BLOCK : (block + 1) * BLOCK], pages[block])
    return pages


@BOTH
def test_hits_are_whole_pages_of_exactly_these_tokens(kind: type[PrefixCache]):
    cache = kind(PagePool(9), BLOCK)
    pages = filled(cache, "a", ids(1, 2, 3, 4, 5, 6))
    assert cache.find("a", ids(1, 2, 3, 4, 5, 6), 9) == pages
    assert cache.find("a", ids(1, 2, 3, 4, 5, 6), 2) == pages[:2]
    assert cache.find("a", ids(1, 2, 3, 4, 5), 9) == pages[:2]
    assert cache.find("a", ids(1, 2, 3, 9, 5, 6), 9) == pages[:1]
    assert cache.find("a", ids(1, 9, 3, 4), 9) == []
    assert cache.find("b", ids(1, 2, 3, 4), 9) == []
    assert cache.find("a", ids(3, 4), 9) == []


@BOTH
def test_two_requests_that_compute_the_same_end_up_on_one_page(kind: type[PrefixCache]):
    cache = kind(PagePool(4), BLOCK)
    first, second = filled(cache, "a", ids(1, 2)), filled(cache, "a", ids(1, 2))
    assert first == second and cache.pool.users[first[0]] == 2 and cache.pool.free == 3


@BOTH
def test_the_least_recently_used_leaf_goes_first_and_only_as_many_as_are_short(kind: type[PrefixCache]):
    cache = kind(PagePool(5), BLOCK)
    long = filled(cache, "a", ids(1, 2, 3, 4, 5, 6))
    short = filled(cache, "a", ids(7, 8))
    cache.release(short)
    cache.release(long)
    taken = cache.take(2)  # one page is free, so one goes: the older leaf
    assert cache.find("a", ids(7, 8), 9) == [] and cache.find("a", ids(1, 2, 3, 4, 5, 6), 9) == long
    taken += cache.take(2)
    assert cache.find("a", ids(1, 2, 3, 4, 5, 6), 9) == long[:1]
    cache.pool.check([taken])


@BOTH
def test_pages_in_use_are_never_evicted(kind: type[PrefixCache]):
    cache = kind(PagePool(3), BLOCK)
    pages = filled(cache, "a", ids(1, 2, 3, 4))
    cache.release(pages)
    cache.hold(pages)
    with pytest.raises(EngineError, match="2 asked for, 1 can be had"):
        cache.take(2)
    assert cache.find("a", ids(1, 2, 3, 4), 9) == pages


@BOTH
def test_what_is_forgotten_is_not_found_and_its_users_keep_their_pages(kind: type[PrefixCache]):
    cache = kind(PagePool(4), BLOCK)
    used, unused = filled(cache, "a", ids(1, 2)), filled(cache, "a", ids(3, 4))
    cache.release(unused)
    assert cache.forget() == 2
    assert cache.find("a", ids(1, 2), 9) == [] and cache.pool.free == 3
    cache.pool.check([used])
    cache.release(used)
    assert cache.pool.free == 4


def test_a_cache_that_is_never_short_does_not_collect_rubbish():
    cache = PrefixCache(PagePool(4), BLOCK)
    for _ in range(1000):
        pages = filled(cache, "a", ids(1, 2, 3, 4))
        cache.release(pages)
    assert len(cache._leaves) < 100
    cache.check()
