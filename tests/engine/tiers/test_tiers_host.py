"""The tier in memory does what a plain list, ordered by use, does."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from longforge.engine.tiers import HostTier
from longforge.errors import InputError

CAPACITY = 20
keys = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f"])


class HostTierAgainstAList(RuleBasedStateMachine):
    """The twin: a list of (key, record), the least recently used in front, rebuilt with every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = HostTier(CAPACITY)
        self.twin: list[tuple[bytes, np.ndarray]] = []
        self.evicted = self.dropped = self.made = 0

    def without(self, key: bytes) -> list[tuple[bytes, np.ndarray]]:
        return [held for held in self.twin if held[0] != key]

    @rule(key=keys, size=st.integers(1, CAPACITY + 3))
    def put(self, key: bytes, size: int):
        self.made += 1
        record = np.full(size, self.made % 256, np.uint8)
        self.twin = self.without(key)
        if size > CAPACITY:
            self.dropped += 1
        else:
            self.twin.append((key, record))
            while sum(held.nbytes for _, held in self.twin) > CAPACITY:
                self.twin.pop(0)
                self.evicted += 1
        assert self.tier.put(key, record) == (size <= CAPACITY)

    @rule(key=keys)
    def get(self, key: bytes):
        expected = dict(self.twin).get(key)
        if expected is not None:
            self.twin = [*self.without(key), (key, expected)]
        assert self.tier.get(key) is expected

    @rule(key=keys)
    def discard(self, key: bytes):
        assert self.tier.discard(key) == (key in dict(self.twin))
        self.twin = self.without(key)

    @rule()
    def clear(self):
        self.tier.clear()
        self.twin = []

    @invariant()
    def equal(self):
        assert len(self.tier) == len(self.twin)
        assert self.tier.bytes == sum(held.nbytes for _, held in self.twin) <= CAPACITY
        assert (self.tier.evicted, self.tier.dropped) == (self.evicted, self.dropped)
        for key in (b"a", b"b", b"c", b"d", b"e", b"f"):
            assert self.tier.has(key) == (key in dict(self.twin))


TestHostTierAgainstAList = HostTierAgainstAList.TestCase
TestHostTierAgainstAList.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_leaves_and_looking_is_no_use():
    tier = HostTier(3)
    for key in (b"a", b"b", b"c"):
        tier.put(key, np.zeros(1, np.uint8))
    assert tier.has(b"a") and tier.get(b"b") is not None
    tier.put(b"d", np.zeros(2, np.uint8))
    assert [key for key in (b"a", b"b", b"c", b"d") if tier.has(key)] == [b"b", b"d"]
    assert tier.evicted == 2


def test_a_tier_without_room_is_refused():
    with pytest.raises(InputError, match="host tier: a capacity of at least 1 byte"):
        HostTier(0)
