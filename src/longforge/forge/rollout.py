"""Rollout: episodes of submitted groups, a bounded number at a time, each with a key and a deadline.

    submit(group) -> pool -> queue -> key -> agent -> answer -> reward -> pool -> told to the conductor

Every episode ends: answered, gave_up, failed or deadline. The last two get reward 0 and are as good as any
other for completing their group, so no episode can hold up its siblings. Where the engine, the tools or the
agents' host are gone, the run breaks and the episode stays unfinished: it would say nothing of the policy.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longforge.errors import LongforgeError
from longforge.forge.agents import AgentReply, Agents
from longforge.forge.background import BackgroundLoop
from longforge.forge.environment import Environment
from longforge.forge.gateway import Gateway, Policy
from longforge.forge.pool import Pool
from longforge.protocol import Episode, Group

__all__ = ["EpisodeEnd", "Rollouts"]


@dataclass(frozen=True)
class EpisodeEnd:
    """What the conductor is told when an episode ends."""

    phase: str
    episode: Episode
    """With reward, outcome and record, without calls."""
    group_completed: bool


class Rollouts:
    """Runs episodes on the background loop.

    ended: called on that loop for every episode that ends; must not block. failure: set when an episode
    broke in a way that is not the agent's doing; the conductor looks at it.
    """

    def __init__(
        self,
        *,
        loop: BackgroundLoop,
        gateway: Gateway,
        gateway_url: str,
        agents: Agents,
        environment: Environment,
        pool: Pool,
        deadline: float,
        concurrency: int,
        ended: Callable[[EpisodeEnd], None],
    ) -> None:
        self._loop = loop
        self._gateway = gateway
        self._base_url = f"{gateway_url}/v1"
        self._agents = agents
        self._environment = environment
        self._pool = pool
        self._deadline = deadline
        self._places = asyncio.Semaphore(concurrency)
        self._ended = ended
        self._tasks: set[asyncio.Task[None]] = set()
        self.failure: BaseException | None = None

    def submit(self, group: Group, *, phase: str, step: int, policy: Policy) -> None:
        """Puts a group into the pool and its episodes into the queue. From any thread."""
        self._pool.submit(group, phase=phase, step=step)
        for episode in group.episodes:
            self.enqueue(episode, phase=phase, policy=policy)

    def enqueue(self, episode: Episode, *, phase: str, policy: Policy) -> None:
        """Queues one episode that the pool knows. From any thread."""
        self._loop.loop.call_soon_threadsafe(self._start, episode, phase, policy)

    def cancel(self) -> None:
        """Ends all episodes without a result; the pool still has them as unfinished. Waits for it."""
        self._loop.run(self._cancel(), seconds=30)

    async def _cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, episode: Episode, phase: str, policy: Policy) -> None:
        task = self._loop.loop.create_task(self._guarded(episode, phase, policy))
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.failure = self.failure or task.exception()

    async def _guarded(self, episode: Episode, phase: str, policy: Policy) -> None:
        async with self._places:
            await self._play(episode, phase, policy)

    async def _play(self, episode: Episode, phase: str, policy: Policy) -> None:
        began = time.perf_counter()
        key = self._gateway.issue_key(episode.episode_id, policy)
        try:
            shown = self._environment.shown(episode.task)
            async with asyncio.timeout(self._deadline):
                reply = await self._agents.run(shown, self._base_url, key)
        except TimeoutError:
            reply = AgentReply(None, "deadline", f"not back after {self._deadline:g} s")
        finally:
            seen = self._gateway.revoke(key)
        if self._gateway.engine_gone is not None:
            raise self._gateway.engine_gone
        self._environment.check()
        reward = self._environment.score(episode.task, reply.answer)
        record = {
            **seen,
            "answer": reply.answer,
            "detail": reply.detail,
            "seconds": round(time.perf_counter() - began, 3),
        }
        self._finish(episode, phase, reward, reply.outcome, record)

    def _finish(
        self, episode: Episode, phase: str, reward: float, outcome: str, record: dict[str, Any]
    ) -> None:
        done = self._pool.finish_episode(episode.episode_id, reward=reward, outcome=outcome, record=record)
        if done.stored:
            ended = Episode(episode.episode_id, episode.group_id, episode.task, (), reward, outcome, record)
            self._ended(EpisodeEnd(phase, ended, done.group_completed))

    def check(self) -> None:
        """Raises what broke the rollout, if anything did."""
        if self.failure is not None:
            if isinstance(self.failure, LongforgeError):
                raise self.failure
            raise RuntimeError("an episode broke the rollout") from self.failure
