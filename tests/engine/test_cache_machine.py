"""Scheduler and prefix cache against the plain twin, whatever comes in whatever order.

Two worlds get the same requests, cancellations, drafts and new weights; one caches pages in the trie, the
other in the plain twin. Their plans must be the same to the page. Each world also keeps what a model would
have written to each page, and before a token is computed everything in front of it must be there: of its own
path, of its own weights and of its own tenant.
"""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from longforge.engine.pages import PagePool
from longforge.engine.plain_cache import PlainPrefixCache
from longforge.engine.prefix_cache import PrefixCache
from longforge.engine.request import GenerationRequest
from longforge.engine.scheduler import Scheduler
from longforge.engine.sequence import Sequence
from longforge.engine.speculation import accepted
from longforge.protocol import SamplingParams

BLOCK, PAGES, ROWS, BUDGET, DRAFTS = 2, 10, 3, 7, 2


def answer(ids: tuple[int, ...]) -> int:
    """The model: any deterministic function of the path."""
    return (sum(ids) + 3 * len(ids)) % 2


class World:
    """One engine without tensors."""

    def __init__(self, kind: type[PrefixCache]) -> None:
        self.pool = PagePool(PAGES)
        self.cache = kind(self.pool, BLOCK)
        self.version = 0
        self.scheduler = Scheduler(
            self.cache,
            max_running=ROWS,
            max_batch_tokens=BUDGET,
            spare=DRAFTS,
            on_preempt=self.adopt,
        )
        self.alive: dict[str, Sequence] = {}
        self.written: dict[tuple[int, int], Any] = {}
        self.answers: dict[str, tuple[int, ...]] = {}

    def adopt(self, sequence: Sequence) -> None:
        sequence.root = (self.version, sequence.request.tenant) if sequence.request.cache else None

    def add(self, request: GenerationRequest) -> None:
        limit = len(request.prompt_ids) + request.params.max_tokens
        sequence = Sequence(request, limit=limit, seed=0, arrival=int(request.id))
        self.adopt(sequence)
        self.alive[request.id] = sequence
        self.scheduler.add(sequence)

    def cancel(self, name: str) -> None:
        self.scheduler.remove(self.alive.pop(name))

    def new_weights(self) -> None:
        self.version += 1
        for sequence in self.scheduler.running:
            sequence.root = None
        self.cache.forget()
        for sequence in self.alive.values():
            if sequence.row < 0:
                self.adopt(sequence)

    def step(self, drafts: list[int]) -> list[Any]:
        work = self.scheduler.schedule()
        for item in work:
            self.compute(item.sequence, item.tokens, item.drafts)
            if item.samples:
                self.follow(item.sequence, item.drafts)
            item.sequence.drafts = tuple(drafts) if item.samples else ()
            item.sequence.drafts = item.sequence.drafts[
                : max(0, item.sequence.limit - item.sequence.known - 1)
            ]
        for item in work:
            self.scheduler.publish(item.sequence)
        for item in work:
            if item.sequence.known >= item.sequence.limit:
                name = item.sequence.request.id
                self.answers[name] = tuple(item.sequence.ids.tolist())
                self.cancel(name)
        return [(w.sequence.request.id, w.tokens, w.drafts, tuple(w.sequence.pages)) for w in work]

    def compute(self, sequence: Sequence, tokens: int, drafts: tuple[int, ...]) -> None:
        path = (*sequence.ids[: sequence.computed + tokens].tolist(), *drafts)
        clean = sequence.root is not None
        mark = (self.version, sequence.request.tenant) if clean else sequence.request.id
        for position in range(len(path)):
            place = (sequence.pages[position // BLOCK], position % BLOCK)
            if position >= sequence.computed:
                self.written[place] = (mark, path[: position + 1])
            elif clean:
                assert self.written[place] == (mark, path[: position + 1]), "another path's page was read"
            else:
                assert self.written[place][1] == path[: position + 1], "another path's page was read"
        sequence.computed += tokens

    def follow(self, sequence: Sequence, drafts: tuple[int, ...]) -> None:
        path = tuple(sequence.ids[: sequence.known].tolist())
        sampled = [answer(path + drafts[:place]) for place in range(len(drafts) + 1)]
        right = accepted(sampled, drafts)
        for token in sampled[: right + 1]:
            sequence.append(token)
        sequence.computed += right


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.worlds = [World(PrefixCache), World(PlainPrefixCache)]
        self.count = 0
        self.requests: dict[str, GenerationRequest] = {}

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        tokens=st.integers(1, 7),
        tenant=st.sampled_from(["a", "b"]),
        priority=st.integers(0, 2),
        cache=st.sampled_from([True, True, True, False]),
    )
    def add(self, prompt: list[int], tokens: int, tenant: str, priority: int, cache: bool) -> None:
        name = str(self.count)
        self.count += 1
        request = GenerationRequest(
            name, tuple(prompt), SamplingParams(tokens), tenant=tenant, priority=priority, cache=cache
        )
        self.requests[name] = request
        for world in self.worlds:
            world.add(request)

    @rule(drafts=st.lists(st.integers(0, 1), max_size=DRAFTS), count=st.integers(1, 6))
    def step(self, drafts: list[int], count: int) -> None:
        for _ in range(count):
            plans = [world.step(drafts) for world in self.worlds]
            assert plans[0] == plans[1], "the trie and its twin plan different steps"
            assert bool(plans[0]) == bool(self.worlds[0].alive or plans[0]), (
                "work is left but nothing is done"
            )

    @precondition(lambda self: self.worlds[0].alive)
    @rule(number=st.integers(0, 99))
    def cancel(self, number: int) -> None:
        names = sorted(self.worlds[0].alive)
        for world in self.worlds:
            world.cancel(names[number % len(names)])

    @rule()
    def new_weights(self) -> None:
        for world in self.worlds:
            world.new_weights()

    @invariant()
    def pages_add_up(self) -> None:
        for world in self.worlds:
            world.pool.check(s.pages for s in world.scheduler.running)
            order = [s.order for s in world.scheduler.running]
            assert order == sorted(order) and len(order) <= ROWS
        self.worlds[0].cache.check()
        assert self.worlds[0].alive.keys() == self.worlds[1].alive.keys()

    def teardown(self) -> None:
        """Everything ends, with the answers that the model alone gives."""
        for world in self.worlds:
            for _ in range(2000):
                if not world.alive:
                    break
                assert world.step([1]), "work is left but nothing is done"
            assert not world.alive and world.pool.free + world.pool.idle == PAGES
            for name, ids in world.answers.items():
                path = self.requests[name].prompt_ids
                while len(path) < len(ids):
                    path = (*path, answer(path))
                assert ids == path


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_scheduler_and_cache_equal_the_plain_twin = Machine.TestCase
