"""The feed: slots stay full, groups without signal leave at once, a restart goes on exactly where it was."""

import itertools
import random

from longforge.forge.config import RolloutConfig
from longforge.forge.feed import TRAIN, Feed, group_name
from longforge.forge.memory_pool import MemoryPool
from longforge.protocol import Group

CONFIG = RolloutConfig(groups_per_step=2, group_size=3, buffer=6, window_fraction=0.34)


class Stage:
    """A feed over a pool, with episodes that end when the test says so."""

    def __init__(self, pool=None, steps: int = 50, first_step: int = 0) -> None:
        self.pool = pool or MemoryPool()
        self.submitted: list[str] = []
        self.resumed: list[str] = []
        self.feed = Feed(
            CONFIG,
            self.pool,
            steps=steps,
            first_step=first_step,
            tasks=lambda start: ({"n": n} for n in itertools.count(start)),
            submit=self._submit,
            resume=lambda episode: self.resumed.append(episode.episode_id),
        )

    def _submit(self, group: Group, step: int) -> None:
        self.pool.submit(group, phase=TRAIN, step=step)
        self.submitted.append(group.group_id)

    def end(self, sequence: int, rewards=(1.0, 0.0, 0.0)) -> None:
        name = group_name(TRAIN, sequence)
        for place, reward in enumerate(rewards):
            done = self.pool.finish_episode(f"{name}/{place}", reward=reward, outcome="answered", record={})
            if done.group_completed:
                self.feed.completed(name)


def test_slots_are_filled_and_freed_only_by_whole_batches():
    stage = Stage()
    stage.feed.fill()
    assert stage.submitted == [group_name(TRAIN, n) for n in range(6)]
    assert stage.pool.group(stage.submitted[4]).episodes[0].task == {"n": 4}
    stage.end(0)
    stage.feed.fill()
    assert stage.feed.batch(0) == [] and len(stage.submitted) == 6, (
        "one is not a batch; its slot stays charged"
    )
    stage.end(1)
    assert [g.sequence for g in stage.feed.batch(0)] == [0, 1]
    stage.feed.fill()
    assert len(stage.submitted) == 8
    counts = stage.feed.take_counts()
    assert counts.ages == [0, 0] and counts.filtered == 0 and sum(counts.rewards) == 2.0
    assert stage.feed.take_counts().rewards == []


def test_a_group_without_signal_is_never_trained_on_and_frees_its_slot():
    stage = Stage()
    stage.feed.fill()
    stage.end(3, rewards=(1.0, 1.0, 1.0))
    assert [row.status for row in stage.pool.groups(TRAIN)][3] == "filtered"
    stage.feed.fill()
    assert len(stage.submitted) == 7
    for sequence in (0, 1, 2, 4):
        stage.end(sequence)
    assert [g.sequence for g in stage.feed.batch(0)] == [0, 1]
    assert [g.sequence for g in stage.feed.batch(1)] == [2, 4]
    counts = stage.feed.take_counts()
    assert counts.filtered == 1 and len(counts.rewards) == 15


def test_a_group_beyond_the_window_waits_for_the_head():
    stage = Stage()
    stage.feed.fill()
    for sequence in (1, 2, 3):
        stage.end(sequence)
    assert stage.feed.ready == 1 and stage.feed.batch(0) == []
    stage.end(0)
    assert [g.sequence for g in stage.feed.batch(0)] == [0, 1]


def test_no_more_groups_are_started_than_the_last_steps_can_use():
    stage = Stage(steps=2)
    stage.feed.fill()
    assert len(stage.submitted) == 4
    stage.end(0, rewards=(0.0, 0.0, 0.0))
    stage.feed.fill()
    assert len(stage.submitted) == 7, "half are filtered so far: twice as many are needed, as far as slots go"


def test_a_restart_goes_on_from_the_pool():
    stage = Stage()
    stage.feed.fill()
    for sequence in (0, 1, 2):
        stage.end(sequence)
    taken = [g.group_id for g in stage.feed.batch(0)]
    stage.feed.fill()
    for place in range(2):
        stage.pool.finish_episode(
            f"{group_name(TRAIN, 3)}/{place}", reward=1.0, outcome="answered", record={}
        )
    # A group that completed while nobody looked: the crash came before the feed was told.
    for place in range(3):
        name = group_name(TRAIN, 5)
        stage.pool.finish_episode(f"{name}/{place}", reward=0.0, outcome="answered", record={})

    again = Stage(stage.pool)
    expected = [f"{group_name(TRAIN, 3)}/2"]
    expected += [f"{group_name(TRAIN, s)}/{place}" for s in (4, 6, 7) for place in range(3)]
    assert again.resumed == expected, "only what has not ended runs again"
    assert [row.status for row in again.pool.groups(TRAIN)][5] == "filtered"
    assert [g.group_id for g in again.feed.batch(0)] == taken, "a step that took its groups gets them again"
    again.feed.fill()
    assert again.submitted == [group_name(TRAIN, 8)]
    assert again.pool.group(group_name(TRAIN, 8)).episodes[0].task == {"n": 8}
    again.end(3, rewards=(1.0, 1.0, 0.0))
    assert [g.sequence for g in again.feed.batch(1)] == [2, 3]


def test_no_group_waits_longer_than_the_bound_whatever_ends_first_and_however_often_it_restarts():
    longest = 0
    for seed in range(8):
        rng = random.Random(seed)
        stage, step = Stage(steps=40), 0
        while step < 40:
            stage.feed.fill()
            running = [row.sequence for row in stage.pool.groups(TRAIN, "running")]
            if running:
                stage.end(running[0] if rng.random() < 0.2 else running[-1])  # heads get stuck
            if stage.feed.batch(step):
                stage.feed.fill()  # as the conductor does while the trainer is at work
                longest = max(longest, *stage.feed.take_counts().ages)
                step += 1
            if rng.random() < 0.05:  # a crash: the latest steps are undone and take the same groups again
                step = max(0, step - rng.randrange(3))
                stage = Stage(stage.pool, steps=40, first_step=step)
    assert longest == CONFIG.age_bound, "it is reached, and never passed"
