"""The conductor: evaluate, train, evaluate, report. It builds the parts and drives them; they don't know it.

    rollouts (background loop)  --episodes ended-->  conductor (main thread)  --batches-->  trainer
                ^                                        |                                     |
                +----------- groups to play -------------+        weights version n+1  <-------+

While the trainer works on one batch, the engine goes on sampling the next groups with the weights it has;
the scheduler bounds how old they can get. Everything that must survive is in the pool, the trainer's
checkpoint and state.json, so that an interrupted run goes on: evaluations that are complete are not
repeated, and no group is trained on twice in the history of the weights that result.
"""

import queue
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from longforge.forge.clock import RunClock
from longforge.forge.config import ForgeConfig
from longforge.forge.evaluation import evaluation_result, readable_episode, write_missing_episodes
from longforge.forge.feed import TRAIN, Feed, group_name
from longforge.forge.gateway import Policy
from longforge.forge.interrupts import Interrupted, StopFlag
from longforge.forge.parts import Parts, Source, build_parts, load_source
from longforge.forge.report import write_report
from longforge.forge.rollout import EpisodeEnd
from longforge.forge.run_folder import RunFolder, full_disk_told
from longforge.forge.summary import build_summary
from longforge.observe import MetricsLog, Progress
from longforge.protocol import Episode, Group

__all__ = ["Interrupted", "resume_run", "start_run"]

Load = Callable[[ForgeConfig, ExitStack], Source]

WAIT_SECONDS = 0.2
"""How long the conductor looks at one thing before it looks at the clock and at Ctrl-C."""


def start_run(
    config: ForgeConfig, out: Path, *, replace: bool = False, load: Load = load_source
) -> dict[str, Any]:
    """A new run in `out`. Returns its summary.

    load: gives model, tokenizer and environment; the configuration's by default. Errors: Interrupted (the
    run can go on); a LongforgeError about the configuration, the model, the environment or the folder, or
    KeyboardInterrupt, before anything is written or removed.
    """
    RunFolder.check_place(out, replace=replace)
    began = time.monotonic()
    with full_disk_told(out), ExitStack() as stack:
        stop = stack.enter_context(StopFlag())
        source = load(config, stack)
        if stop.requested:
            raise KeyboardInterrupt  # there is no run yet that could go on
        folder = RunFolder.create(out, config, replace=replace)
        stack.callback(folder.close)
        folder.state.phase_seconds["start"] = time.monotonic() - began
        return _Conductor(folder, stop, stack.enter_context(Progress()), began).run(source)


def resume_run(path: Path, *, load: Load = load_source) -> dict[str, Any]:
    """Goes on with a run that was interrupted or killed. Returns its summary.

    Of a finished run, only the report is made again.
    """
    began = time.monotonic()
    with full_disk_told(path), ExitStack() as stack:
        stop = stack.enter_context(StopFlag())
        folder = RunFolder.open(path)
        stack.callback(folder.close)
        conductor = _Conductor(folder, stop, stack.enter_context(Progress()), began)
        if folder.state.finished:
            return conductor.report()
        return conductor.run(load(folder.config, stack))


class _Conductor:
    """One process's work on a run, since `began` (on the monotonic clock)."""

    def __init__(self, folder: RunFolder, stop: StopFlag, progress: Progress, began: float) -> None:
        self._folder = folder
        self._config = folder.config
        self._state = folder.state
        self._stop = stop
        self._progress = progress
        self._clock = RunClock(folder.state, folder.config.max_seconds, began)
        self._parts: Parts
        self._feed: Feed | None = None
        self._saved_step: int | None = None

    def run(self, source: Source) -> dict[str, Any]:
        """Everything that is left to do."""
        stack = ExitStack()
        try:
            with self._clock.phase("start"):
                self._parts = build_parts(self._folder, source, stack, self._stop)
            self._saved_step = self._parts.trainer.step or None  # a later step than 0 was loaded
            self._work()
        except Interrupted:
            if hasattr(self, "_parts"):
                if not self._state.training_done:
                    self._checkpoint()
                self._summarise(finished=False)
            raise
        finally:
            with self._clock.phase("stop"):
                stack.close()
            self._save_state()
        return self.report()

    def _work(self) -> None:
        if "before" not in self._state.evaluations:
            self._evaluate("before")
        if not self._state.training_done:
            self._train()
        if "after" not in self._state.evaluations:
            self._evaluate("after")
        sizes = {"before": 1, TRAIN: self._config.rollout.group_size, "after": 1}
        write_missing_episodes(self._folder, self._parts.pool, self._parts.environment, sizes)
        self._summarise(finished=True)
        self._state.finished = True

    def _evaluate(self, name: str) -> None:
        """Every held-out task once, with the weights of now."""
        config, parts = self._config, self._parts
        tasks = parts.environment.held_out_tasks(config.seed, config.evaluation.questions)
        policy = self._policy(config.evaluation.temperature)
        known = {row.sequence for row in parts.pool.groups(name)}
        with self._clock.phase(f"evaluate_{name}"):
            unfinished = parts.pool.unfinished(name)
            for episode in unfinished:
                parts.rollouts.enqueue(episode, phase=name, policy=policy)
            for sequence, task in enumerate(tasks):
                if sequence not in known:
                    group = _group(name, sequence, task, size=1)
                    parts.rollouts.submit(group, phase=name, step=parts.trainer.step, policy=policy)
            done = len(known) - len(unfinished)
            bar = self._progress.task(f"evaluate {name}", total=len(tasks))
            bar.advance(done)
            right = 0
            while done < len(tasks):
                for end in self._ends(WAIT_SECONDS):
                    if end.phase != name:  # a training episode that ended while training did
                        continue
                    right += (end.episode.reward or 0.0) >= 1.0
                    done += 1
                    bar.advance(1, note=f"{right} right")
        rows = parts.pool.groups(name)
        episodes = [parts.pool.group(row.group_id).episodes[0] for row in rows]
        seconds = self._state.phase_seconds[f"evaluate_{name}"]
        self._state.evaluations[name] = evaluation_result(episodes, parts.environment, seconds)
        self._save_state()

    def _train(self) -> None:
        """Training steps until all are done or the time is."""
        config, parts = self._config, self._parts
        policy = self._policy(config.rollout.temperature)
        self._feed = feed = Feed(
            config.rollout,
            parts.pool,
            steps=config.trainer.steps,
            first_step=parts.trainer.step,
            tasks=lambda start: parts.environment.train_tasks(config.seed, start),
            submit=lambda group, step: parts.rollouts.submit(group, phase=TRAIN, step=step, policy=policy),
            resume=lambda episode: parts.rollouts.enqueue(episode, phase=TRAIN, policy=policy),
        )
        bar = self._progress.task("train", total=config.trainer.steps)
        bar.advance(parts.trainer.step)
        with MetricsLog(self._folder.path, first_step=parts.trainer.step + 1) as metrics:
            while parts.trainer.step < config.trainer.steps:
                began, sampled = time.monotonic(), parts.gateway.sampled_tokens
                groups = self._next_batch(feed)
                if not groups:
                    break
                row = self._step(feed, groups)
                seconds = time.monotonic() - began
                tokens = parts.gateway.sampled_tokens - sampled
                row |= {"step_seconds": seconds, "rollout_tokens": tokens}
                row |= {"rollout_tokens_per_second": tokens / seconds, "run_seconds": self._clock.spent}
                metrics.write(parts.trainer.step, row)
                # After its row: a step that is in the checkpoint is not done again, and would have none.
                if parts.trainer.step % config.trainer.checkpoint_every == 0:
                    self._checkpoint()
                self._clock.add_step(time.monotonic() - began)
                bar.advance(1, note=f"reward {row['reward']:.2f}, staleness {row['staleness_mean']:.1f}")
        self._finish_training()

    def _next_batch(self, feed: Feed) -> list[Group]:
        """The next training batch once it is there; nothing when the time for training is over."""
        step = self._parts.trainer.step
        with self._clock.phase("wait_for_rollouts"):
            while self._clock.step_fits():
                self._tend(feed)
                groups = feed.batch(step)
                if groups:
                    return groups
                if feed.dry:
                    self._progress.say(
                        "train: stopped early, since all of a group's rewards are equal of late"
                    )
                    return []
                self._tend(feed, WAIT_SECONDS)
        self._progress.say("train: stopped early, so that the last evaluation fits max_seconds")
        return []

    def _step(self, feed: Feed, groups: list[Group]) -> dict[str, Any]:
        """Trains and publishes; returns the step's metrics."""
        parts = self._parts
        with self._clock.phase("train"):
            metrics: dict[str, Any] = parts.trainer.train(groups, between=lambda: self._tend(feed))
        with self._clock.phase("publish"):
            parts.publisher.publish(parts.trainer.model, parts.trainer.step)
        counts = feed.take_counts()
        rewards = [episode.reward or 0.0 for group in groups for episode in group.episodes]
        return {
            "reward": sum(counts.rewards) / len(counts.rewards),
            "reward_trained": sum(rewards) / len(rewards),
            "filtered_groups": counts.filtered,
            "age_mean": sum(counts.ages) / len(counts.ages),
            "age_max": max(counts.ages),
            **metrics,
        }

    def _tend(self, feed: Feed, seconds: float = 0.0) -> None:
        """Looks after the rollouts for at most `seconds`: episodes that ended, slots that are free."""
        for end in self._ends(seconds):
            if end.phase == TRAIN and end.group_completed:
                feed.completed(end.episode.group_id)
        feed.fill()

    def _ends(self, seconds: float) -> Iterator[EpisodeEnd]:
        """Episodes that have ended, written down for people; waits up to `seconds` for the first.

        Raises what must stop the run: Interrupted, a dead engine, a broken rollout.
        """
        self._stop.check()
        self._parts.engine.check()
        self._parts.rollouts.check()
        try:
            end = self._parts.ended.get(timeout=seconds) if seconds else self._parts.ended.get_nowait()
            while True:
                self._write_episode(end.phase, end.episode)
                yield end
                end = self._parts.ended.get_nowait()
        except queue.Empty:
            return

    def _write_episode(self, phase: str, episode: Episode) -> None:
        training = phase == TRAIN and self._feed is not None
        step = self._feed.step_of(episode.group_id) if training and self._feed else self._parts.trainer.step
        readable = readable_episode(episode, self._parts.environment, phase=phase, step=step)
        self._folder.write_episode(episode.episode_id, readable)

    def _finish_training(self) -> None:
        self._parts.rollouts.cancel()
        self._checkpoint()
        self._state.training_done = True
        self._save_state()

    def _checkpoint(self) -> None:
        trainer = self._parts.trainer
        if trainer.step != self._saved_step:
            with self._clock.phase("checkpoint"):
                trainer.save(self._folder.checkpoint)
            self._saved_step = trainer.step
        self._save_state()

    def _summarise(self, *, finished: bool) -> None:
        """Writes summary.json as far as the run has come."""
        parts = self._parts
        groups = Counter(row.status for row in parts.pool.groups(TRAIN))
        self._save_state()
        facts = parts.environment.describe()
        self._folder.write_summary(build_summary(self._folder, facts, groups, finished=finished))

    def report(self) -> dict[str, Any]:
        """report.html and plot.png, from the folder alone. Returns the summary in its last form."""
        with self._clock.phase("report"):
            write_report(self._folder.path)
        self._save_state()
        summary = self._folder.read_summary()
        summary |= {"seconds": self._state.seconds, "phase_seconds": self._state.phase_seconds}
        self._folder.write_summary(summary)
        return summary

    def _policy(self, temperature: float) -> Policy:
        rollout = self._config.rollout
        return Policy(
            max_tokens=rollout.max_tokens,
            temperature=temperature,
            thinking=rollout.thinking,
            allow_request_sampling=rollout.allow_request_sampling,
        )

    def _save_state(self) -> None:
        self._state.seconds = self._clock.spent
        self._folder.save_state()


def _group(phase: str, sequence: int, task: dict[str, Any], *, size: int) -> Group:
    name = group_name(phase, sequence)
    return Group(name, sequence, tuple(Episode(f"{name}/{i}", name, task) for i in range(size)))
