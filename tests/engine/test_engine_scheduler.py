"""Scheduling: one rule, decodes first, prompts in chunks, the first in order always goes on."""

import numpy as np

from longforge.engine.pages import PagePool
from longforge.engine.prefix_cache import PrefixCache
from longforge.engine.request import GenerationRequest
from longforge.engine.scheduler import Scheduler
from longforge.engine.sequence import Sequence
from longforge.protocol import SamplingParams

BLOCK = 4


class Plan:
    """A scheduler and its requests, without a model: every answer is the token 1."""

    def __init__(self, pages: int, max_running: int = 3, max_batch_tokens: int = 8) -> None:
        self.pool = PagePool(pages)
        self.cache = PrefixCache(self.pool, BLOCK)
        self.steps = 0
        self.scheduler = Scheduler(
            self.cache,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            clock=lambda: self.steps,
        )
        self.count = 0

    def add(self, name: str, prompt: int, answer: int, priority: int = 0, first: int = 1) -> Sequence:
        ids = (first,) * prompt
        request = GenerationRequest(name, ids, SamplingParams(answer), priority=priority)
        self.count += 1
        one = Sequence(request, limit=prompt + answer, seed=0, arrival=self.count)
        self.scheduler.add(one)
        return one

    def step(self) -> list[tuple[str, int, bool]]:
        self.steps += 1
        work = self.scheduler.schedule()
        for item in work:
            item.sequence.computed += item.tokens
            if item.samples:
                item.sequence.append(1)
            self.scheduler.publish(item.sequence)
            if item.sequence.known >= item.sequence.limit:
                self.scheduler.remove(item.sequence)
        self.pool.check(s.pages for s in self.scheduler.running)
        self.cache.check()
        return [(item.sequence.request.id, item.tokens, item.samples) for item in work]

    def drain(self, steps: int = 200) -> list[list[tuple[str, int, bool]]]:
        done = []
        while self.scheduler.running or self.scheduler.waiting:
            done.append(self.step())
            assert done[-1] and len(done) < steps, "work is left but nothing is done"
        return done


def test_a_long_prompt_goes_in_chunks_and_never_holds_up_a_running_answer():
    plan = Plan(50)
    plan.add("short", 2, 9)
    plan.add("long", 17, 2)
    steps = [plan.step() for _ in range(5)]
    assert steps[0] == [("short", 2, True), ("long", 6, False)]
    assert steps[1] == [("short", 1, True), ("long", 7, False)]
    assert steps[2] == [("short", 1, True), ("long", 4, True)]
    assert steps[3] == [("short", 1, True), ("long", 1, True)]
    assert steps[4] == [("short", 1, True)]


def test_the_head_of_the_line_is_not_overtaken_by_a_request_that_would_fit():
    plan = Plan(4)
    plan.add("big", 9, 4)
    assert plan.step() == [("big", 8, False)]
    plan.add("too big for now", 5, 1)
    plan.add("small", 1, 1)
    assert plan.step() == [("big", 1, True)]
    assert plan.scheduler.waiting == 2


def test_pages_are_taken_as_they_are_needed_and_the_last_token_needs_none():
    plan = Plan(2)
    one = plan.add("one", 3, 6)
    plan.step()
    assert len(one.pages) == 1 and plan.pool.free == 1
    plan.step()
    plan.step()
    assert len(one.pages) == 2
    plan.drain()
    assert one.known == 9


def test_the_youngest_is_preempted_and_the_oldest_never():
    plan = Plan(6)
    old, young = plan.add("old", 9, 12), plan.add("young", 8, 12)
    while not plan.scheduler.preemptions:
        plan.step()
    assert old.row >= 0 and young.row < 0 and young.pages == [] and young.computed == 0
    kept = young.known
    plan.drain()
    assert old.known == 21 and young.known == 20 and kept > 8


def test_who_comes_back_finds_the_pages_it_had_filled():
    plan = Plan(7)
    for one in (plan.add("old", 10, 12, first=2), plan.add("young", 9, 8, first=3)):
        one.root = "root"
    while not plan.scheduler.preemptions:
        plan.step()
    young = next(entry[1] for entry in plan.scheduler._waiting)
    assert young.computed == 0
    while young.row < 0:
        plan.step()
    assert young.computed >= BLOCK
    plan.drain()


def test_a_sequence_knows_when_it_was_first_let_in_and_no_later_time():
    plan = Plan(7, max_running=2)
    old, young, last = (plan.add(name, 9, 12) for name in ("old", "young", "last"))
    while not plan.scheduler.preemptions:
        plan.step()
    assert young.row < 0, "it was pushed out and will come back"
    let_in = young.let_in
    plan.drain()
    assert old.let_in == 1 and young.let_in == let_in and let_in is not None
    assert last.let_in is not None and last.let_in > let_in + 1, "a row was free only when another had ended"


def test_a_better_priority_is_served_first_and_pushes_out_a_worse_one():
    plan = Plan(50, max_running=1)
    plan.add("worse", 4, 20, priority=5)
    plan.step()
    plan.add("worst", 4, 1, priority=9)
    plan.add("better", 4, 2, priority=1)
    plan.add("as good", 4, 1, priority=1)
    order = [work[0][0] for work in plan.drain()]
    assert order[:3] == ["better", "better", "as good"] and order[-1] == "worst"
    assert plan.scheduler.preemptions == 1


def test_drafts_are_verified_with_the_token_before_them_and_fit_the_budget():
    plan = Plan(9, max_batch_tokens=4)
    one, two = plan.add("one", 2, 20), plan.add("two", 2, 20)
    plan.step()
    one.drafts, two.drafts = (7, 8), (9, 9)
    work = plan.scheduler.schedule()
    assert [(w.sequence, w.tokens, w.drafts, w.samples) for w in work] == [
        (one, 1, (7, 8), True),
        (two, 1, (), True),
    ]


def test_a_request_can_be_removed_while_it_waits_and_while_it_runs():
    plan = Plan(9, max_running=1)
    first, second = plan.add("first", 2, 3), plan.add("second", 2, 3)
    plan.step()
    plan.scheduler.remove(second)
    assert not plan.scheduler.waiting
    plan.scheduler.remove(first)
    assert plan.step() == [] and plan.pool.free == 9


def test_at_least_one_token_is_computed_however_much_is_found():
    plan = Plan(9)
    for _ in range(2):
        one = plan.add("one", 8, 1)
        one.root = "root"
        plan.step()
    assert plan.count == 2 and one.cached_tokens == 4 and one.known == 9
    assert np.array_equal(one.ids, np.ones(9))


def test_drafts_never_take_the_one_token_of_another_that_runs():
    plan = Plan(30, max_running=3, max_batch_tokens=4)
    asked = [plan.add(name, 1, 20) for name in ("one", "two", "three")]
    plan.step()
    for one in asked:
        one.drafts = (7, 8)
    assert [(w.tokens, w.drafts) for w in plan.scheduler.schedule()] == [(1, (7,)), (1, ()), (1, ())]


def test_a_prompt_in_chunks_goes_on_however_much_the_answers_behind_it_draft():
    plan = Plan(30, max_running=2, max_batch_tokens=2)
    plan.add("answers", 1, 20, priority=1)
    plan.step()
    plan.add("prompt", 9, 2)
    for sequence in plan.scheduler.running:
        sequence.drafts = (7, 8)
    assert [(w.sequence.request.id, w.tokens, w.drafts) for w in plan.scheduler.schedule()] == [
        ("answers", 1, (7,))
    ]
    for sequence in plan.scheduler.running:
        sequence.drafts = ()
    plan.step()
    for sequence in plan.scheduler.running:
        sequence.drafts = (7, 8) if sequence.generated else ()
    assert {w.sequence.request.id: w.tokens for w in plan.scheduler.schedule()} == {"answers": 1, "prompt": 1}


def test_its_own_pages_do_not_count_as_found_when_a_request_comes_back():
    plan = Plan(7, max_batch_tokens=3)
    old, young = plan.add("old", 4, 20, first=2), plan.add("young", 17, 2, first=3)
    old.root = young.root = "root"
    while not plan.scheduler.preemptions:
        plan.step()
    assert not young.generated
    while young.row < 0:
        plan.step()
    plan.drain()
    assert young.cached_tokens == plan.scheduler.hit_tokens == 0 and plan.scheduler.queried_tokens == 21
