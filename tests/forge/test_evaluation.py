"""What an evaluation says, and the readable episodes that a killed process had no time for."""

import json

from longforge.forge.config import ForgeConfig
from longforge.forge.evaluation import evaluation_result, write_missing_episodes
from longforge.forge.feed import TRAIN
from longforge.forge.memory_pool import MemoryPool
from longforge.forge.run_folder import RunFolder
from longforge.forge.stats import wilson
from longforge.protocol import Episode, Group
from small_environment import Lengths


def test_only_a_full_reward_is_a_success():
    rewards = {"answered": (1.0, 0.5, 0.0), "deadline": (0.0,)}
    episodes = [
        Episode(f"g/{outcome}{i}", "g", {"question": "?"}, (), reward, outcome)
        for outcome, group in rewards.items()
        for i, reward in enumerate(group)
    ]
    result = evaluation_result(episodes, Lengths(), 2.5)
    low, high = wilson(1, 4)
    rate = {"success": 0.25, "low": low, "high": high, "n": 4}
    outcomes = {"answered": 3, "deadline": 1}
    assert result == {**rate, "seconds": 2.5, "kinds": {"length": rate}, "outcomes": outcomes}


def test_every_episode_that_ended_is_written_also_of_a_group_that_was_cut_off(tmp_path):
    folder, pool = RunFolder.create(tmp_path / "run", ForgeConfig()), MemoryPool()
    for name, ended in (("train-00000", 2), ("train-00001", 1)):
        episodes = tuple(Episode(f"{name}/{i}", name, {"question": name}) for i in range(2))
        pool.submit(Group(name, int(name[-1]), episodes), phase=TRAIN, step=3)
        for episode in episodes[:ended]:
            pool.finish_episode(episode.episode_id, reward=1.0, outcome="answered", record={"answer": "ab"})
    folder.write_episode("train-00000/0", {"written": "before"})
    write_missing_episodes(folder, pool, Lengths(), {TRAIN: 2})
    found = {p.name: json.loads(p.read_text()) for p in folder.episodes.iterdir()}
    assert sorted(found) == ["train-00000-0.json", "train-00000-1.json", "train-00001-0.json"]
    assert found["train-00000-0.json"] == {"written": "before"}
    written = found["train-00001-0.json"]
    assert (written["step"], written["answer"], written["question"]) == (3, "ab", "train-00001")
    folder.close()
