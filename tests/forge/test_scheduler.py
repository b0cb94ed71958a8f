"""Promises of the windowed scheduler: it is its dull twin, bounded bypass, bounded age, all or nothing."""

import random
from collections import deque

import pytest

from longforge.errors import InputError
from longforge.forge.scheduler import PlainWindow, WindowedFifo, age_bound, window_size


@pytest.mark.parametrize("seed", range(30))
def test_it_does_what_the_plain_twin_does(seed):
    rng = random.Random(seed)
    buffer = rng.randint(1, 13)
    window = rng.randint(1, buffer)
    clever, plain = WindowedFifo(buffer, window), PlainWindow(buffer, window)
    running: list[int] = []
    for _ in range(400):
        action = rng.choice(["submit", "submit", "complete", "complete", "retire", "pull", "restart"])
        if action == "submit" and clever.free_slots:
            sequence = clever.submit()
            assert sequence == plain.submit()
            running.append(sequence)
        elif action == "complete" and running:
            sequence = running.pop(rng.randrange(len(running)))
            clever.complete(sequence)
            plain.complete(sequence)
        elif action == "retire" and clever.outstanding and rng.random() < 0.5:
            sequence = rng.choice(clever.outstanding)
            running = [s for s in running if s != sequence]
            clever.retire(sequence)
            plain.retire(sequence)
        elif action == "pull":
            count = rng.randint(1, buffer)
            assert clever.pull(count) == plain.pull(count)
        elif action == "restart":
            held = {s: s not in running for s in clever.outstanding}
            next_sequence = len(plain.states)
            clever = WindowedFifo(buffer, window)
            clever.restore(next_sequence, held)
            plain.restore(next_sequence, held)
        assert clever.head == plain.head
        assert clever.outstanding == plain.outstanding
        assert clever.free_slots == plain.free_slots


@pytest.mark.parametrize(
    ("buffer", "fraction", "per_pull"), [(8, 0.3, 2), (16, 0.3, 8), (7, 1.0, 3), (5, 0.0, 1)]
)
def test_bypass_and_age_stay_within_their_bounds_whatever_finishes_first(buffer, fraction, per_pull):
    window = window_size(buffer, fraction)
    for seed in range(20):
        rng = random.Random(seed)
        fifo = WindowedFifo(buffer, window)
        submitted_at: dict[int, int] = {}
        order: list[int] = []
        pulls = 0
        running: list[int] = []
        for _ in range(600):
            while fifo.free_slots:
                sequence = fifo.submit()
                submitted_at[sequence] = pulls
                running.append(sequence)
            # heavy tails: mostly the youngest finish, so that heads get stuck
            running.sort(key=lambda s: s + (rng.random() < 0.2) * rng.random() * -100)
            done = running.pop()
            if rng.random() < 0.1:
                fifo.retire(done)
            else:
                fifo.complete(done)
            taken = fifo.pull(per_pull)
            if taken:
                for sequence in taken:
                    assert pulls - submitted_at[sequence] <= age_bound(buffer, window, per_pull)
                order.extend(taken)
                pulls += 1
        assert pulls > 20
        for place, sequence in enumerate(order):
            assert sum(later > sequence for later in order[:place]) <= window - 1


def test_the_papers_example_reaches_its_bound_exactly():
    """N = 8, W = 4: out of order by at most 3, lag at most 10 (facts/forge.md 1.3)."""
    fifo = WindowedFifo(8, 4)
    for _ in range(8):
        fifo.submit()
    for sequence in range(7):
        fifo.complete(sequence)
        assert fifo.pull(1) == (sequence,)
        fifo.complete(fifo.submit())
    assert fifo.head == 7
    assert [fifo.pull(1) for _ in range(4)] == [(8,), (9,), (10,), ()], (
        "11 is complete but outside the window"
    )
    assert age_bound(8, 4, 1) == 10


def test_a_window_of_one_is_a_strict_queue():
    rng = random.Random(3)
    fifo, queue, done, order = WindowedFifo(6, window_size(6, 0.0)), deque(), set(), []
    for _ in range(300):
        while fifo.free_slots:
            queue.append(fifo.submit())
        unfinished = [s for s in queue if s not in done]
        if unfinished and rng.random() < 0.7:
            done.add(rng.choice(unfinished))
            fifo.complete(max(done & set(unfinished)))
        expected = queue[0] if queue[0] in done else None
        taken = fifo.pull(1)
        assert taken == (() if expected is None else (expected,))
        if taken:
            order.append(queue.popleft())
    assert order == sorted(order) and len(order) > 100


def test_a_pull_that_cannot_be_filled_takes_nothing():
    fifo = WindowedFifo(4, 2)
    for _ in range(4):
        fifo.submit()
    fifo.complete(1)
    fifo.complete(3)
    assert fifo.pull(2) == ()
    assert fifo.outstanding == (0, 1, 2, 3) and fifo.free_slots == 0
    assert fifo.ready == 1
    fifo.complete(0)
    assert fifo.pull(3) == (0, 1, 3), "taking 0 and 1 moves the window on to 3"


def test_a_retired_group_frees_its_slot_at_once():
    fifo = WindowedFifo(3, 1)
    for _ in range(3):
        fifo.submit()
    fifo.retire(1)
    assert fifo.free_slots == 1 and fifo.head == 0
    fifo.retire(0)
    assert fifo.head == 2
    with pytest.raises(InputError, match="holds no slot"):
        fifo.complete(0)


def test_misuse_is_one_line():
    with pytest.raises(InputError, match="window 5, buffer 4"):
        WindowedFifo(4, 5)
    fifo = WindowedFifo(1, 1)
    fifo.submit()
    with pytest.raises(InputError, match="all 1 slots are charged"):
        fifo.submit()


@pytest.mark.parametrize(
    ("buffer", "fraction", "window"), [(16, 0.3, 4), (40, 0.3, 12), (2, 0.3, 1), (8, 1.0, 8), (9, 0, 1)]
)
def test_window_size(buffer, fraction, window):
    assert window_size(buffer, fraction) == window
