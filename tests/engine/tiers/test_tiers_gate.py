"""The gate: load where that is quicker, by measured costs, and find out when a tier has recovered."""

import pytest

from longforge.engine.tiers import Gate
from longforge.errors import InputError

MB = 1_000_000


def test_everything_is_allowed_until_both_sides_are_measured():
    gate = Gate()
    assert gate.allows("files", MB, 1)
    gate.saw_load("files", MB, 1000.0)
    assert gate.allows("files", MB, 1)
    gate = Gate()
    gate.saw_prefill(1, 1e-9)
    assert gate.allows("files", MB, 1)


def test_a_load_must_be_quicker_than_the_prefill_it_saves():
    gate = Gate()
    gate.saw_prefill(1000, 1.0)
    gate.saw_load("files", 10 * MB, 0.1)  # 10 ms for a MB: ten tokens
    assert gate.allows("files", MB, 11)
    assert not gate.allows("files", MB, 9)
    assert gate.allows("files", 2 * MB, 21)
    assert not gate.allows("files", 2 * MB, 19)
    assert gate.refused("files") == 2


def test_latency_counts_once_and_bandwidth_per_byte():
    gate = Gate()
    gate.saw_prefill(1000, 1.0)
    for size in (1, 5, 2, 9):
        gate.saw_load("files", size * MB, 0.050 + size * 0.010)
    assert not gate.allows("files", MB, 59)
    assert gate.allows("files", MB, 61)
    assert not gate.allows("files", 20 * MB, 249)
    assert gate.allows("files", 20 * MB, 251)


def test_tiers_are_judged_apart():
    gate = Gate()
    gate.saw_prefill(100, 1.0)
    gate.saw_load("files", MB, 5.0)
    gate.saw_load("host", MB, 0.001)
    assert not gate.allows("files", MB, 100)
    assert gate.allows("host", MB, 100)
    assert (gate.refused("files"), gate.refused("host")) == (1, 0)


def test_a_refused_tier_is_probed_and_recovers():
    gate = Gate(probe_every=4)
    gate.saw_prefill(100, 1.0)
    gate.saw_load("files", MB, 5.0)
    assert [gate.allows("files", MB, 100) for _ in range(8)] == [False, False, False, True] * 2
    assert gate.refused("files") == 6
    for _ in range(40):
        gate.saw_load("files", MB, 0.01)
    assert all(gate.allows("files", MB, 100) for _ in range(8))


def test_prefill_that_becomes_quicker_closes_the_gate():
    gate = Gate()
    gate.saw_load("files", MB, 0.5)
    gate.saw_prefill(100, 1.0)
    assert gate.allows("files", MB, 100)
    for _ in range(40):
        gate.saw_prefill(100, 0.1)
    assert not gate.allows("files", MB, 100)


def test_larger_loads_that_were_quicker_do_not_make_a_negative_cost():
    gate = Gate()
    gate.saw_prefill(1000, 1.0)
    gate.saw_load("files", MB, 0.3)
    gate.saw_load("files", 10 * MB, 0.1)
    assert not gate.allows("files", 100 * MB, 1)


def test_empty_measurements_say_nothing():
    gate = Gate()
    gate.saw_prefill(0, 9.0)
    gate.saw_load("files", 0, 9.0)
    gate.saw_prefill(10, 1.0)
    assert gate.allows("files", MB, 1)


def test_the_same_calls_give_the_same_answers():
    def answers() -> list[bool]:
        gate = Gate(probe_every=3)
        found = []
        for i in range(60):
            gate.saw_load("files", MB * (1 + i % 7), 0.01 * (i % 11))
            gate.saw_prefill(100, 0.02 * (1 + i % 5))
            found.append(gate.allows("files", MB * (1 + i % 3), 100))
        return found

    assert answers() == answers()
    assert set(answers()) == {True, False}


def test_a_gate_that_would_probe_always_is_refused():
    with pytest.raises(InputError, match="probe_every: at least 2"):
        Gate(probe_every=1)
