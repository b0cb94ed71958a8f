"""Scheduling: decodes first, prompts in chunks, first come first served, pages always come back."""

from hypothesis import given, settings
from hypothesis import strategies as st

from longforge.engine.pages import PageAllocator
from longforge.engine.request import GenerationRequest
from longforge.engine.scheduler import Scheduler, Sequence

BLOCK = 4


def sequence(name: str, prompt: int, answer: int) -> Sequence:
    return Sequence(GenerationRequest(name, (1,) * prompt), limit=prompt + answer, seed=0)


def scheduler(pages: PageAllocator, max_running: int = 3, max_batch_tokens: int = 8) -> Scheduler:
    return Scheduler(pages, block_size=BLOCK, max_running=max_running, max_batch_tokens=max_batch_tokens)


def advance(plan: Scheduler) -> list[tuple[str, int, bool]]:
    """One step without a model: books the work and finishes what reached its limit."""
    work, _ = plan.schedule()
    for item in work:
        item.sequence.computed += item.tokens
        if item.samples:
            item.sequence.generated += 1
            if item.sequence.known >= item.sequence.limit:
                plan.remove(item.sequence)
    return [(item.sequence.request.id, item.tokens, item.samples) for item in work]


def test_a_long_prompt_goes_in_chunks_and_never_holds_up_a_running_answer():
    plan = scheduler(PageAllocator(50))
    plan.add(sequence("short", 2, 9))
    plan.add(sequence("long", 17, 2))
    steps = [advance(plan) for _ in range(5)]
    assert steps[0] == [("short", 2, True), ("long", 6, False)]
    assert steps[1] == [("short", 1, True), ("long", 7, False)]
    assert steps[2] == [("short", 1, True), ("long", 4, True)]
    assert steps[3] == [("short", 1, True), ("long", 1, True)]
    assert steps[4] == [("short", 1, True)]


def test_the_head_of_the_queue_is_not_overtaken_by_a_request_that_would_fit():
    pages = PageAllocator(4)
    plan = scheduler(pages)
    plan.add(sequence("big", 9, 4))
    assert advance(plan) == [("big", 8, False)]
    plan.add(sequence("too big for now", 5, 1))
    plan.add(sequence("small", 1, 1))
    assert pages.free == 1
    assert advance(plan) == [("big", 1, True)]
    assert [s.request.id for s in plan.waiting] == ["too big for now", "small"]


def test_the_last_token_needs_no_slot():
    pages = PageAllocator(1)
    plan = scheduler(pages)
    plan.add(sequence("exactly one page", 3, 2))
    assert advance(plan) == [("exactly one page", 3, True)]
    assert pages.free == 0


def test_a_waiting_request_can_be_removed():
    plan = scheduler(PageAllocator(9), max_running=1)
    first, second = sequence("first", 2, 3), sequence("second", 2, 3)
    plan.add(first)
    plan.add(second)
    advance(plan)
    plan.remove(second)
    assert not plan.waiting
    plan.remove(first)
    assert advance(plan) == []


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=12),
    st.lists(st.integers(0, 40), max_size=8),
    st.integers(1, 4),
    st.integers(4, 9),
)
def test_whatever_comes_and_is_cancelled_all_pages_return(
    requests: list[tuple[int, int]], cancels: list[int], max_running: int, budget: int
):
    pages = PageAllocator(8)  # one request may need all of them
    plan = scheduler(pages, max_running, budget)
    alive = [sequence(str(i), prompt, answer) for i, (prompt, answer) in enumerate(requests)]
    for one in alive:
        plan.add(one)
    for step in range(400):
        if step in cancels and (plan.running or plan.waiting):
            plan.remove((plan.running + list(plan.waiting))[step % (len(plan.running) + len(plan.waiting))])
        work = advance(plan)
        assert sum(tokens for _, tokens, _ in work) <= budget
        assert len(plan.running) <= max_running
        pages.check(s.pages for s in plan.running)
        for running in plan.running:
            assert len(running.pages) * BLOCK >= running.computed
        if not (plan.running or plan.waiting):
            break
        assert work, "work is left but the scheduler found none"
    assert pages.free == pages.total
    assert sorted(plan._free_rows) == list(range(max_running))
