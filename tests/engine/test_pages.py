"""Pages: lowest first, each with as many users as hold it, and none is ever lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longforge.engine.pages import PagePool
from longforge.errors import EngineError


def test_lowest_pages_come_first_also_after_a_release():
    pool = PagePool(7)
    assert (pool.take(3), pool.take(2)) == ([0, 1, 2], [3, 4])
    for page in (1, 4, 3):
        pool.release(page)
    assert pool.take(3) == [1, 3, 4]


def test_too_many_pages_are_refused_whole():
    pool = PagePool(3)
    pool.take(2)
    with pytest.raises(EngineError, match="2 asked for, 1 of 3 are free"):
        pool.take(2)
    assert pool.free == 1


@pytest.mark.parametrize("page", [-1, 0, 3])
def test_a_page_given_back_twice_or_from_nowhere_is_refused(page: int):
    pool = PagePool(3)
    pool.release(pool.take(1)[0])
    with pytest.raises(EngineError, match=f"page {page}"):
        pool.release(page)


def test_a_free_page_cannot_be_shared():
    with pytest.raises(EngineError, match="page 1: asked for while it is free"):
        PagePool(3).hold(1)


def test_the_check_finds_a_user_too_many_and_a_lost_page():
    pool = PagePool(3)
    page = pool.take(1)[0]
    pool.check([[page]])
    with pytest.raises(AssertionError, match="users"):
        pool.check([[page], [page]])
    pool._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        pool.check([[page]])


@given(
    st.lists(st.tuples(st.sampled_from(["take", "hold", "release", "cache"]), st.integers(0, 9)), max_size=80)
)
def test_the_pool_equals_plain_bookkeeping(moves: list[tuple[str, int]]):
    pool, tables, cached = PagePool(6), [], set()
    for move, number in moves:
        used = {page for table in tables for page in table}
        if move == "take" and number <= pool.free:
            tables.append(pool.take(number))
            assert not used & set(tables[-1]) and not cached & set(tables[-1])
        elif move == "hold" and used | cached:
            page = sorted(used | cached)[number % len(used | cached)]
            pool.hold(page)
            tables.append([page])
        elif move == "release" and tables:
            for page in tables.pop(number % len(tables)):
                pool.release(page)
        elif move == "cache":
            choices = sorted(used | cached)
            if choices:
                page = choices[number % len(choices)]
                pool.set_cached(page, page not in cached)
                cached ^= {page}
        pool.check(tables)
        used = {page for table in tables for page in table}
        assert pool.free == 6 - len(used | cached) and pool.idle == len(cached - used)
