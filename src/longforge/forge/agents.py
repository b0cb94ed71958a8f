"""Agents as the rollout sees them: programs that get a base URL, a key and a task, and answer."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from longforge.errors import RunError

__all__ = ["AgentProgram", "AgentReply", "Agents", "HostedAgents"]

OUTPUT_LIMIT = 1 << 24
"""Bytes of an agent program's output, and of one line of a host's; more is a failure."""

OUTCOMES = ("answered", "gave_up", "failed", "deadline")


@dataclass(frozen=True)
class AgentReply:
    """How an agent came back."""

    answer: str | None
    """Its final answer; None when it has none."""
    outcome: str
    """One of OUTCOMES."""
    detail: str = ""
    """One line about a failure."""


class Agents(Protocol):
    """Runs an agent on one task. Cancelling `run` ends the agent's work on it."""

    async def start(self) -> None: ...

    async def run(self, task: dict[str, Any], base_url: str, key: str) -> AgentReply: ...

    async def close(self) -> None: ...


class AgentProgram:
    """Any program, one process per episode.

    It finds OPENAI_BASE_URL and OPENAI_API_KEY in its environment and the task as one JSON document on
    standard input. The last line of its standard output is its answer: JSON with the key `answer`. What it
    writes to standard error goes to `log`.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command = tuple(command)
        self._log = log

    async def start(self) -> None:
        """Nothing is held between episodes."""

    async def run(self, task: dict[str, Any], base_url: str, key: str) -> AgentReply:
        environment = os.environ | {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": key}
        process = await _spawn(self._command, self._log, environment)
        try:
            output = await _converse(process, json.dumps(task).encode() + b"\n")
            if len(output) > OUTPUT_LIMIT:
                return AgentReply(None, "failed", f"agent: more than {OUTPUT_LIMIT} bytes of output")
            await process.wait()
        finally:
            await _end(process, unread=process.stdout)
        return _reply_of_output(output, process.returncode)

    async def close(self) -> None:
        """Nothing is held between episodes."""


class HostedAgents:
    """Agents inside one host process, which has paid for their imports once.

    The host reads lines of JSON, `{"id", "base_url", "api_key", "deadline_s", "task"}` or `{"cancel": id}`,
    and writes a line with `id`, `answer`, `outcome` and `error` for each.
    """

    def __init__(self, command: Sequence[str], log: Path, *, deadline: float) -> None:
        self._command = tuple(command)
        self._log = log
        # The rollout's own deadline comes first; the host's is there should the rollout be gone.
        self._deadline = deadline + 5.0
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: dict[str, asyncio.Future[AgentReply]] = {}

    async def start(self) -> None:
        self._process = await _spawn(self._command, self._log, dict(os.environ))
        self._reader = asyncio.get_running_loop().create_task(self._read(self._process))

    async def run(self, task: dict[str, Any], base_url: str, key: str) -> AgentReply:
        future: asyncio.Future[AgentReply] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        line = {"id": key, "base_url": base_url, "api_key": key, "deadline_s": self._deadline, "task": task}
        try:
            await self._send(line)
            return await future
        except asyncio.CancelledError:
            await self._send({"cancel": key})
            raise
        finally:
            self._waiting.pop(key, None)

    async def close(self) -> None:
        if self._process is not None:
            await _end(self._process)
        if self._reader is not None:
            await self._reader

    async def _send(self, line: dict[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None or process.returncode is not None:
            raise RunError(f"agent host: it is not running; see {self._log}")
        process.stdin.write(json.dumps(line).encode() + b"\n")
        with contextlib.suppress(ConnectionError):  # the reader tells all who wait that the host is gone
            await process.stdin.drain()

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                body = json.loads(line)
                future = self._waiting.get(body["id"])
                if future is not None and not future.done():
                    future.set_result(_reply_of_host(body))
            problem = "it ended"
        except (ValueError, KeyError, TypeError) as error:
            problem = f"it wrote what is no result ({type(error).__name__})"
            await _end(process)  # nobody reads it any more; later tasks are told that it is not running
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(RunError(f"agent host: {problem}; see {self._log}"))


async def _spawn(
    command: Sequence[str], log: Path, environment: dict[str, str]
) -> asyncio.subprocess.Process:
    """A child in a session of its own, so that Ctrl-C in a terminal reaches the conductor only."""
    with log.open("ab") as errors:
        try:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
                limit=OUTPUT_LIMIT,
            )
        except OSError as error:
            raise RunError(f"agent {command[0]!r}: it cannot be started ({error.strerror})") from error


async def _converse(process: asyncio.subprocess.Process, line: bytes) -> bytes:
    """Gives a child its one line; returns what it printed, or the first bytes of it if they are too many."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(ConnectionError):  # it may not care for its task
        process.stdin.write(line)
        await process.stdin.drain()
    process.stdin.close()
    output = b""
    while len(output) <= OUTPUT_LIMIT and (more := await process.stdout.read(1 << 16)):
        output += more
    return output


async def _end(process: asyncio.subprocess.Process, unread: asyncio.StreamReader | None = None) -> None:
    """Kills a child and everything it started.

    unread: its output, where nobody else reads it. A full buffer stops asyncio's reading, and then wait()
    would wait for the end of a pipe that nobody looks at.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        process.stdin.close()
    if unread is not None:
        while await unread.read(1 << 16):
            pass
    await process.wait()


def _reply_of_output(output: bytes, code: int | None) -> AgentReply:
    lines = output.strip().splitlines()
    try:
        body = json.loads(lines[-1])
        answer = body["answer"]
    except (ValueError, KeyError, TypeError, IndexError):
        problem = f'ended with code {code}, expected a last line of JSON with "answer"'
        return AgentReply(None, "failed", f"agent: {problem}")
    if code != 0:
        return AgentReply(None, "failed", f"agent: ended with code {code}")
    outcome = body.get("outcome", "gave_up" if answer is None else "answered")
    return _reply_of_host({"answer": answer, "outcome": outcome, "error": body.get("error")})


def _reply_of_host(body: dict[str, Any]) -> AgentReply:
    outcome = body["outcome"] if body["outcome"] in OUTCOMES else "failed"
    answer = body["answer"]
    return AgentReply(None if answer is None else str(answer), outcome, str(body.get("error") or ""))
