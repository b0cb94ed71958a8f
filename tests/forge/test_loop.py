"""The whole loop with a random model: real server, real agents, every promise of a run folder."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from longforge.errors import RunError
from longforge.forge.config import ForgeConfig, load_config
from longforge.forge.feed import TRAIN
from longforge.forge.loop import start_run
from longforge.forge.parts import Source
from longforge.forge.sqlite_pool import SqlitePool
from longforge.forge.trainer import Trainer
from longforge.model import CausalLM
from longforge.observe import read_metrics
from small_environment import load_small
from small_model import write_small_checkpoint

STEPS, PER_STEP, SIZE, QUESTIONS = 4, 2, 3, 5
CONFIG = f"""
name = "tiny"
model = "model"
seed = 5
[agent]
concurrency = 8
deadline = 30.0
[rollout]
groups_per_step = {PER_STEP}
group_size = {SIZE}
buffer = 4
window_fraction = 0.5
max_tokens = 7
[trainer]
steps = {STEPS}
learning_rate = 1e-3
micro_batch_tokens = 600
checkpoint_every = 2
[evaluation]
questions = {QUESTIONS}
"""


@pytest.fixture
def config_file(tmp_path) -> Path:
    write_small_checkpoint(tmp_path / "model", max_positions=512)
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    return path


def check_run(out: Path) -> dict:
    """What must hold of any finished run, whatever happened to it on the way. Returns the summary."""
    summary = json.loads((out / "summary.json").read_text())
    for name in ("before", "after"):
        assert summary[name]["n"] == QUESTIONS and 0 <= summary[name]["low"] <= summary[name]["high"] <= 1
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    bound = load_config(out / "config.toml").rollout.age_bound
    assert all(row["age_max"] <= bound for row in rows)
    pool = SqlitePool(out / "pool.sqlite")
    trained = [group for step in range(STEPS) for group in pool.batch(step)]
    assert len(trained) == len(set(trained)) == STEPS * PER_STEP
    status = {row.group_id: row.status for row in pool.groups(TRAIN)}
    assert {g for g, s in status.items() if s == "consumed"} == set(trained)
    for group_id in trained:
        group = pool.group(group_id)
        assert [len(e.calls) for e in group.episodes] == [2] * SIZE, "no call lost, none twice"
        for episode in group.episodes:
            written = json.loads(
                (out / "episodes" / f"{episode.episode_id.replace('/', '-')}.json").read_text()
            )
            assert (written["reward"], written["phase"]) == (episode.reward, TRAIN)
            assert [m["role"] for m in written["messages"]] == ["user", "assistant"] * 2
            versions = [v for call in episode.calls for v in call.versions]
            assert written["versions"] == [min(versions), max(versions)]
    assert len(list((out / "episodes").glob("before-*.json"))) == QUESTIONS
    pool.close()
    assert sorted(p.name for p in (out / "weights").iterdir()) == [f"v{STEPS - 1:05d}", f"v{STEPS:05d}"]
    CausalLM.from_pretrained(out / "weights" / f"v{STEPS:05d}")
    assert (out / "report.html").stat().st_size > 1000
    return summary


def test_a_run_evaluates_trains_evaluates_and_explains_itself(config_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    saved, save = [], Trainer.save

    def noted(self: Trainer, folder: Path) -> Path:
        saved.append((self.step, [row["step"] for row in read_metrics(out)]))
        return save(self, folder)

    monkeypatch.setattr(Trainer, "save", noted)
    summary = start_run(load_config(config_file), out, load=load_small)
    assert check_run(out) == json.loads(json.dumps(summary))
    assert summary["finished"] and summary["steps"] == STEPS
    assert sum(summary["phase_seconds"].values()) == pytest.approx(summary["seconds"], rel=0.2)
    assert summary["tokens_per_second"]["rollout"] > 0 and summary["tokens_per_second"]["train"] > 0
    rows = read_metrics(out)
    assert {"loss", "ratio_mean", "entropy", "grad_norm", "reward", "staleness_mean"} <= rows[0].keys()
    assert rows[0]["fresh_logprob_gap"] < 1e-4, "trainer and engine agree about fresh weights"
    assert saved == [(2, [1, 2]), (4, [1, 2, 3, 4])], "once each, and never before the step has its metrics"
    with pytest.raises(RunError, match="expected a new or empty folder"):
        start_run(load_config(config_file), out, load=load_small)


def test_ctrl_c_before_there_is_a_run_does_not_promise_one(config_file, tmp_path):
    def load(config: ForgeConfig, stack: ExitStack) -> Source:
        os.kill(os.getpid(), signal.SIGINT)
        return load_small(config, stack)

    with pytest.raises(KeyboardInterrupt):
        start_run(load_config(config_file), tmp_path / "run", load=load)
    assert not (tmp_path / "run").exists()


class Child:
    """The same run in a process of its own, to be stopped."""

    def __init__(self, *arguments: str | Path) -> None:
        here = Path(__file__).resolve().parents[1]
        paths = [str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "small_environment", *map(str, arguments)]
        self.process = subprocess.Popen(command, env=environment, start_new_session=True)

    def wait_for_step(self, out: Path, step: int) -> None:
        """Until a training step is in the metrics (or the process ends)."""
        for _ in range(12_000):
            if self.process.poll() is not None or any(r["step"] >= step for r in read_metrics(out)):
                return
            time.sleep(0.05)

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.mark.slow
def test_a_run_that_is_stopped_and_killed_ends_like_any_other(config_file, tmp_path):
    out = tmp_path / "run"
    first = Child("run", config_file, out)
    first.wait_for_step(out, 1)
    assert first.stop(signal.SIGINT) == 130
    so_far = json.loads((out / "summary.json").read_text())
    assert so_far["before"]["n"] == QUESTIONS and so_far["after"] is None and not so_far["finished"]
    evaluated = {p.name: p.stat().st_mtime_ns for p in (out / "episodes").glob("before-*")}

    second = Child("resume", out)
    second.wait_for_step(out, 3)
    assert second.stop(signal.SIGKILL) == -signal.SIGKILL

    third = Child("resume", out)
    assert third.process.wait(240) == 0
    check_run(out)
    assert {p.name: p.stat().st_mtime_ns for p in (out / "episodes").glob("before-*")} == evaluated
