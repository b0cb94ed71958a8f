"""Many agents, one import: `python -m longforge.forge.code_search.agent_host`, started by `HostedAgents`.

Importing `openai` costs a second. This program does it once and forks a fresh process for each episode. A
line of JSON on standard input is an episode:

    {"id": "e1", "base_url": "http://...", "api_key": "...", "deadline_s": 60, "task": {AgentTask's fields}}

and a line on standard output is its result: `id` and what `agent.run_episode` returns; `outcome` is
`deadline` where the episode ran out of time and `failed` where its process died. `{"cancel": "e1"}` kills an
episode (outcome `cancelled`). When standard input ends, every agent is killed and the program ends.
"""

import gc
import json
import os
import selectors
import signal
import ssl
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import openai

from longforge.errors import InputError
from longforge.forge.code_search.agent import make_client, parse_task, run_episode
from longforge.forge.code_search.isolation import die_with_parent
from longforge.forge.code_search.rehearsal import rehearse

__all__ = ["Host", "main"]


@dataclass
class _Agent:
    episode: str
    pid: int
    pipe: int
    deadline: float
    output: bytearray = field(default_factory=bytearray)


class Host:
    """A single-threaded loop: read episodes, fork agents, pass their results on one whole line at a time."""

    def __init__(self, tasks: int, results: int) -> None:
        """`tasks` and `results` are file descriptors to read lines from and write lines to."""
        self._tasks = tasks
        self._results = results
        self._selector = selectors.DefaultSelector()
        self._agents: dict[int, _Agent] = {}
        self._partial = bytearray()
        # One context for all forks: making one reads the system's certificates, which takes 50 ms.
        self._tls = ssl.create_default_context()

    def run(self) -> None:
        """Run episodes until the tasks end; then kill what still runs."""
        self._selector.register(self._tasks, selectors.EVENT_READ)
        gc.freeze()
        try:
            while True:
                deadlines = [agent.deadline for agent in self._agents.values()]
                wait = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
                ready = [key.fd for key, _ in self._selector.select(wait)]
                # Results first: a cancel among the tasks may end an agent whose result is in this very round.
                for descriptor in ready:
                    if descriptor != self._tasks:
                        self._read_result(self._agents[descriptor])
                if self._tasks in ready and not self._read_tasks():
                    return
                for agent in [a for a in self._agents.values() if a.deadline <= time.monotonic()]:
                    self._finish(agent, "deadline")
        finally:
            for agent in list(self._agents.values()):
                self._end(agent)

    def _read_tasks(self) -> bool:
        data = os.read(self._tasks, 65536)
        self._partial += data
        *lines, self._partial = self._partial.split(b"\n")
        for line in lines:
            body = json.loads(line)
            if "cancel" in body:
                for agent in [a for a in self._agents.values() if a.episode == body["cancel"]]:
                    self._finish(agent, "cancelled")
            else:
                self._start(body)
        return bool(data)

    def _start(self, body: dict[str, Any]) -> None:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._run_agent(body, write_end)
        os.close(write_end)
        deadline = time.monotonic() + float(body["deadline_s"])
        self._agents[read_end] = _Agent(body["id"], pid, read_end, deadline)
        self._selector.register(read_end, selectors.EVENT_READ)

    def _run_agent(self, body: dict[str, Any], pipe: int) -> None:
        """In the fork: be the agent, with a private environment, and write the result to the pipe."""
        try:
            die_with_parent()
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os.dup2(pipe, 3)
            os.closerange(4, 1024)
            os.environ["OPENAI_BASE_URL"] = body["base_url"]
            os.environ["OPENAI_API_KEY"] = body["api_key"]
            try:
                task = parse_task(body["task"])
                with make_client(http_client=openai.DefaultHttpxClient(verify=self._tls)) as client:
                    result = run_episode(task, client)
            except InputError as problem:
                result = {"answer": None, "outcome": "failed", "messages": [], "error": str(problem)}
            data = json.dumps(result).encode()
            while data:
                data = data[os.write(3, data) :]
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            os._exit(0)

    def _read_result(self, agent: _Agent) -> None:
        data = os.read(agent.pipe, 65536)
        agent.output += data
        if not data:
            self._finish(agent, "failed")

    def _finish(self, agent: _Agent, outcome: str) -> None:
        """Pass on what the agent wrote; where that is no whole result, say `outcome`."""
        self._end(agent)
        try:
            result = json.loads(agent.output)
        except ValueError:
            result = {"answer": None, "outcome": outcome, "messages": [], "error": f"agent: {outcome}"}
        data = json.dumps({"id": agent.episode, **result}).encode() + b"\n"
        while data:
            data = data[os.write(self._results, data) :]

    def _end(self, agent: _Agent) -> None:
        self._selector.unregister(agent.pipe)
        os.close(agent.pipe)
        del self._agents[agent.pipe]
        os.kill(agent.pid, signal.SIGKILL)
        os.waitpid(agent.pid, 0)


def main() -> int:
    """Serve standard input and output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A proxy for the outside world must not catch the calls to an endpoint on this machine.
    os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1,localhost")))
    rehearse()
    Host(tasks=0, results=1).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
