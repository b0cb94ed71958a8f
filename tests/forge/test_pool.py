"""The pool: same as its twin, each group trained on exactly once, nothing lost with the process."""

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from longforge.errors import InputError, RunError
from longforge.forge.memory_pool import MemoryPool
from longforge.forge.sqlite_pool import SqlitePool
from longforge.protocol import Call, Episode, Group


def make_group(sequence: int, size: int = 2, phase: str = "train") -> Group:
    group_id = f"{phase}-{sequence}"
    episodes = [Episode(f"{group_id}/{i}", group_id, {"question": f"q{sequence} ä"}) for i in range(size)]
    return Group(group_id, sequence, tuple(episodes))


def make_call(episode_id: str, index: int, rng: random.Random) -> Call:
    n = rng.randint(1, 9)
    return Call(
        f"{episode_id}#{index}",
        episode_id,
        index,
        tuple(rng.randrange(200_064) for _ in range(rng.randint(1, 30))),
        tuple(rng.randrange(200_064) for _ in range(n)),
        tuple(float(np.float32(-rng.random() * 9)) for _ in range(n)),
        tuple(rng.randrange(5) for _ in range(n)),
        rng.choice(["stop", "length"]),
        parent_id=None if index == 0 else f"{episode_id}#{index - 1}",
        seconds=rng.random(),
    )


@pytest.fixture(params=["sqlite", "memory"])
def pool(request, tmp_path):
    made = SqlitePool(tmp_path / "pool.sqlite") if request.param == "sqlite" else MemoryPool()
    yield made
    made.close()


def test_a_group_comes_back_as_it_was_put(pool):
    rng = random.Random(0)
    pool.submit(make_group(0, size=2), phase="train", step=3)
    calls = [make_call("train-0/1", i, rng) for i in range(3)]
    for call in reversed(calls):
        assert pool.add_call(call)
    assert pool.finish_episode("train-0/1", reward=0.5, outcome="answered", record={"a": "ü"}).stored
    group = pool.group("train-0")
    assert group.episodes[0].reward is None and group.episodes[0].calls == ()
    assert group.episodes[1].calls == tuple(calls)
    assert (group.episodes[1].reward, group.episodes[1].outcome) == (0.5, "answered")
    assert group.episodes[1].record == {"a": "ü"} and group.episodes[1].task == {"question": "q0 ä"}
    assert [e.episode_id for e in pool.unfinished("train")] == ["train-0/0"]


def test_repeating_a_write_changes_nothing(pool):
    rng = random.Random(1)
    pool.submit(make_group(0, size=1), phase="train", step=0)
    call = make_call("train-0/0", 0, rng)
    assert pool.add_call(call) and not pool.add_call(call)
    first = pool.finish_episode("train-0/0", reward=1.0, outcome="answered", record={})
    again = pool.finish_episode("train-0/0", reward=0.0, outcome="deadline", record={"late": True})
    assert (first.stored, first.group_completed) == (True, True)
    assert (again.stored, again.group_completed) == (False, False)
    pool.submit(make_group(0, size=1), phase="train", step=9)
    pool.consume(0, ["train-0"])
    pool.consume(0, ["train-0"])
    assert pool.group("train-0").episodes[0].reward == 1.0
    assert [(row.status, row.step) for row in pool.groups("train")] == [("consumed", 0)]


def test_a_call_after_the_end_of_its_episode_is_not_kept(pool):
    rng = random.Random(2)
    pool.submit(make_group(0, size=1), phase="train", step=0)
    pool.finish_episode("train-0/0", reward=0.0, outcome="deadline", record={})
    assert not pool.add_call(make_call("train-0/0", 0, rng))
    assert pool.group("train-0").episodes[0].calls == ()


def test_a_group_is_consumed_at_most_once_and_only_when_completed(pool):
    for sequence in range(3):
        pool.submit(make_group(sequence, size=1), phase="train", step=0)
    pool.finish_episode("train-0/0", reward=1.0, outcome="answered", record={})
    pool.finish_episode("train-1/0", reward=1.0, outcome="answered", record={})
    with pytest.raises(RunError, match="must be completed to become consumed, it is running"):
        pool.consume(0, ["train-0", "train-2"])
    assert pool.batch(0) == () and pool.groups("train")[0].status == "completed", "all or nothing"
    pool.consume(0, ["train-0"])
    with pytest.raises(RunError, match="it is consumed"):
        pool.consume(1, ["train-0"])
    with pytest.raises(RunError, match="step 0 has taken train-0"):
        pool.consume(0, ["train-1"])
    pool.filter_group("train-1")
    with pytest.raises(RunError, match="it is filtered"):
        pool.consume(1, ["train-1"])
    assert (pool.batch(0), pool.batch(1)) == (("train-0",), ())


def test_phases_are_apart_and_unknown_names_are_errors(pool):
    pool.submit(make_group(0, phase="before"), phase="before", step=0)
    pool.submit(make_group(0), phase="train", step=0)
    assert [r.group_id for r in pool.groups("before")] == ["before-0"]
    with pytest.raises(InputError, match="nobody"):
        pool.finish_episode("nobody", reward=0.0, outcome="", record={})
    with pytest.raises(InputError, match="nobody"):
        pool.add_call(make_call("nobody", 0, random.Random(0)))
    with pytest.raises(InputError, match="nothing"):
        pool.group("nothing")


@pytest.mark.parametrize("seed", range(6))
def test_sqlite_does_what_memory_does(seed, tmp_path):
    rng = random.Random(seed)
    path = tmp_path / "pool.sqlite"
    real, twin = SqlitePool(path), MemoryPool()
    submitted = 0

    def both(name, *args, **kwargs):
        answers = []
        for one in (real, twin):
            try:
                answers.append(getattr(one, name)(*args, **kwargs))
            except (RunError, InputError) as error:
                answers.append(f"{type(error).__name__}: {error}")
        assert answers[0] == answers[1], name
        return answers[0]

    for step in range(120):
        match rng.choice(
            ["submit", "call", "call", "finish", "finish", "filter", "consume", "drop", "reopen"]
        ):
            case "submit":
                both("submit", make_group(submitted, size=rng.randint(1, 3)), phase="train", step=step)
                submitted += 1
            case "call" if submitted:
                sequence = rng.randrange(submitted)
                call = make_call(f"train-{sequence}/0", rng.randrange(3), rng)
                both("add_call", call)
            case "finish" if submitted:
                episode = f"train-{rng.randrange(submitted)}/{rng.randrange(3)}"
                both("finish_episode", episode, reward=rng.random(), outcome="answered", record={"n": step})
            case "filter" if submitted:
                both("filter_group", f"train-{rng.randrange(submitted)}")
            case "consume" if submitted:
                names = [
                    f"train-{s}" for s in rng.sample(range(submitted), min(submitted, rng.randint(1, 2)))
                ]
                both("consume", rng.randrange(20), names)
            case "drop" if rng.random() < 0.2:
                both("drop_unfinished_calls")
            case "reopen" if rng.random() < 0.3:
                real.close()
                real = SqlitePool(path)
    assert both("groups", "train")
    both("unfinished", "train")
    for status in ("running", "completed", "consumed", "filtered"):
        both("groups", "train", status)
    for sequence in range(submitted):
        both("group", f"train-{sequence}")
    for step in range(20):
        both("batch", step)
    real.close()


def test_a_file_that_is_no_pool_is_one_line(tmp_path):
    path = tmp_path / "pool.sqlite"
    path.write_text("this is no database, it only says so\n" * 50)
    with pytest.raises(RunError, match="not a readable SQLite file"):
        SqlitePool(path)


def test_a_pool_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"pool\.sqlite: it cannot be written \(unable to open"):
        SqlitePool(tmp_path / "none" / "pool.sqlite")


TRAINER = """
import json, os, sys
from pathlib import Path
from longforge.forge.sqlite_pool import SqlitePool
from longforge.protocol import Call, Episode, Group

folder, steps = Path(sys.argv[1]), 12
pool = SqlitePool(folder / "pool.sqlite")
checkpoint = folder / "checkpoint.json"
state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "trained": []}
pool.drop_unfinished_calls()

def run(episode):
    for i in range(2):
        pool.add_call(Call(f"{episode}#{i}", episode, i, (1, 2), (3,), (-0.5,), (0,), "stop"))
        print("x", flush=True)
    pool.finish_episode(episode, reward=1.0, outcome="answered", record={})
    print("x", flush=True)

for episode in pool.unfinished("train"):
    run(episode.episode_id)
while state["step"] < steps:
    while not pool.batch(state["step"]):
        done = pool.groups("train", "completed")
        if len(done) >= 2:
            pool.consume(state["step"], [row.group_id for row in done[:2]])
            print("x", flush=True)
            break
        n = len(pool.groups("train"))
        names = [f"g{n}/{i}" for i in range(2)]
        group = Group(f"g{n}", n, tuple(Episode(name, f"g{n}", {}) for name in names))
        pool.submit(group, phase="train", step=state["step"])
        for name in names:
            run(name)
    batch = pool.batch(state["step"])
    calls = [c.call_id for g in batch for e in pool.group(g).episodes for c in e.calls]
    state = {"step": state["step"] + 1, "trained": state["trained"] + calls}
    if state["step"] % 3 == 0 or state["step"] == steps:
        temporary = checkpoint.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, checkpoint)
    print("x", flush=True)
"""


def test_kill_minus_nine_at_any_moment_trains_each_sample_exactly_once(tmp_path):
    rng = random.Random(5)
    kills = 0
    for attempt in range(40):
        # The last attempts may run to their end; the earlier ones are killed after a random number of writes.
        child = subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        if attempt < 5:
            for _ in range(rng.randint(1, 60)):
                if not child.stdout.readline():
                    break
            child.send_signal(signal.SIGKILL)
        else:
            child.stdout.read()
        code = child.wait()
        child.stdout.close()
        kills += code == -signal.SIGKILL
        if code == 0:
            break
    state = json.loads((tmp_path / "checkpoint.json").read_text())
    assert state["step"] == 12 and kills >= 2, "it must have been killed at work"
    expected = [f"g{n}/{e}#{c}" for n in range(24) for e in range(2) for c in range(2)]
    assert Counter(state["trained"]) == Counter(expected)
    pool = SqlitePool(Path(tmp_path) / "pool.sqlite")
    assert [g for step in range(12) for g in pool.batch(step)] == [f"g{n}" for n in range(24)]
    pool.close()
