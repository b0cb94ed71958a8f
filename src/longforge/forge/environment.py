"""Environments: where tasks come from, who acts in them by default, and what an answer is worth."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

from longforge.forge.agents import AgentProgram, Agents, HostedAgents
from longforge.forge.code_search.index import build_index
from longforge.forge.code_search.questions import Kind, QuestionSet
from longforge.forge.code_search.reward import score
from longforge.forge.code_search.sandbox import Sandbox
from longforge.forge.code_search.tree import default_tree, tree_root
from longforge.forge.config import DEFAULT_TREE, AgentConfig, EnvironmentConfig

__all__ = ["ENVIRONMENTS", "CodeSearch", "Environment", "Task"]

Task = dict[str, Any]


class Environment(Protocol):
    """A task is plain JSON and holds all that is needed to judge an answer to it."""

    def train_tasks(self, seed: int, start: int) -> Iterator[Task]:
        """Training tasks without end, from number `start` on; a function of the seed."""
        ...

    def held_out_tasks(self, seed: int, n: int) -> list[Task]:
        """`n` tasks that training never shows."""
        ...

    def shown(self, task: Task) -> Task:
        """What the agent gets to see of a task."""
        ...

    def score(self, task: Task, answer: str | None) -> float:
        """Reward of an answer."""
        ...

    def readable(self, task: Task) -> dict[str, Any]:
        """What a person reads of a task: question, expected, kind."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for the run's summary."""
        ...

    def agents(self, log: Path) -> Agents:
        """The agents of a run: the configuration's program, or the environment's own."""
        ...

    def check(self) -> None:
        """Raises a LongforgeError if agents cannot act any more, through no fault of theirs."""
        ...

    def close(self) -> None: ...


class CodeSearch:
    """Questions about a Python tree; the agent searches it with `grep` and `read` in a sandbox."""

    HOST = (sys.executable, "-m", "longforge.forge.code_search.agent_host")

    def __init__(self, config: EnvironmentConfig, agent: AgentConfig, max_tokens: int) -> None:
        """Indexes the tree and starts the tool server. Errors: InputError for a tree without Python files."""
        tree = default_tree() if config.tree == DEFAULT_TREE else tree_root(config.tree)
        index = build_index(tree)
        self._mix = cast("dict[Kind, float] | None", config.mix or None)
        self._questions = QuestionSet(index)
        self._questions.sample("held_out", 0, 1, self._mix)  # a mix or a tree that cannot work fails here
        self._facts = {"tree": str(tree), "files": len(index.tree.files), "classes": len(index.classes)}
        self._agent = agent
        self._max_tokens = max_tokens
        self._sandbox = Sandbox(tree)

    def train_tasks(self, seed: int, start: int) -> Iterator[Task]:
        return map(asdict, islice(self._questions.stream("train", seed, self._mix), start, None))

    def held_out_tasks(self, seed: int, n: int) -> list[Task]:
        return [asdict(question) for question in self._questions.sample("held_out", seed, n, self._mix)]

    def shown(self, task: Task) -> Task:
        return {
            "question": task["text"],
            "tools_socket": self._sandbox.socket,
            "max_turns": self._agent.max_calls,
            "max_tokens": self._max_tokens,
            "timeout_s": self._agent.deadline,
        }

    def score(self, task: Task, answer: str | None) -> float:
        return score(answer, task["answer"])

    def readable(self, task: Task) -> dict[str, Any]:
        return {"question": task["text"], "expected": task["answer"], "kind": task["kind"]}

    def describe(self) -> dict[str, Any]:
        return {**self._facts, "isolation": self._sandbox.isolation}

    def agents(self, log: Path) -> Agents:
        if self._agent.command:
            return AgentProgram(self._agent.command, log)
        return HostedAgents(self.HOST, log, deadline=self._agent.deadline)

    def check(self) -> None:
        self._sandbox.check()

    def close(self) -> None:
        self._sandbox.close()


ENVIRONMENTS: dict[str, Callable[[EnvironmentConfig, AgentConfig, int], Environment]] = {
    "code_search": CodeSearch
}
"""Every environment that a configuration can name."""
