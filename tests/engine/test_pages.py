"""Pages: whoever takes them gives them back, lowest first, and nobody owns one twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longforge.engine.pages import PageAllocator
from longforge.errors import EngineError


def test_lowest_pages_come_first_also_after_a_release():
    pages = PageAllocator(7)
    first, second = pages.allocate(3), pages.allocate(2)
    assert (first, second) == ([0, 1, 2], [3, 4])
    pages.release([1])
    pages.release([4, 3])
    assert pages.allocate(3) == [1, 3, 4]


def test_too_many_pages_are_refused_whole():
    pages = PageAllocator(3)
    pages.allocate(2)
    with pytest.raises(EngineError, match="2 asked for, 1 of 3 are free"):
        pages.allocate(2)
    assert pages.free == 1


@pytest.mark.parametrize("page", [-1, 0, 3])
def test_a_page_given_back_twice_or_from_nowhere_is_refused(page: int):
    pages = PageAllocator(3)
    pages.release(pages.allocate(1))
    with pytest.raises(EngineError, match=f"page {page}"):
        pages.release([page])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_allocator_equals_the_obvious_set(moves: list[tuple[bool, int]]):
    pages, free, owners = PageAllocator(11), set(range(11)), []
    for take, number in moves:
        if take and number <= len(free):
            assert pages.can_allocate(number)
            got = pages.allocate(number)
            assert got == sorted(free)[:number]
            free -= set(got)
            owners.append(got)
        elif not take and owners:
            given_back = owners.pop(number % len(owners))
            pages.release(given_back)
            free |= set(given_back)
        assert pages.free == len(free)
        pages.check(owners)
