"""The owner's side of the agent host: submit episodes, get their results as futures."""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from longforge.errors import InputError, LongforgeError

__all__ = ["AgentHost"]

HOST_PROGRAM = ("-m", "longforge.forge.code_search.agent_host")


class AgentHost:
    """A running agent host; use it as a context manager. Safe to use from several threads.

    The host lives in a session of its own, so Ctrl-C in a terminal reaches its owner only; the owner's
    `close` (or death) ends it and every agent in it.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *HOST_PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._pending: dict[str, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # not the same: the host may wait until a result is read
        self._reader = threading.Thread(target=self._read_results, name="agent-host-results", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id of the host."""
        return self._process.pid

    def submit(
        self,
        episode_id: str,
        *,
        base_url: str,
        api_key: str,
        task: Mapping[str, Any],
        deadline_s: float = 120.0,
    ) -> Future[dict[str, Any]]:
        """Start an agent. The result has `answer`, `outcome`, `messages` (OpenAI's form) and `error`.

        `task` holds the fields of `agent.AgentTask`. The host ends the agent after `deadline_s`.

        Raises:
            InputError: an episode of this id is running.
            LongforgeError: the host has ended.
        """
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            if episode_id in self._pending:
                raise InputError(
                    f"episode {episode_id!r}: already running; give each episode an id of its own"
                )
            self._pending[episode_id] = future
        self._send(
            {
                "id": episode_id,
                "base_url": base_url,
                "api_key": api_key,
                "deadline_s": deadline_s,
                "task": dict(task),
            }
        )
        return future

    def cancel(self, episode_id: str) -> None:
        """Kill an episode's agent if it still runs; its result then has the outcome `cancelled`."""
        with self._lock:
            known = episode_id in self._pending
        if known:
            self._send({"cancel": episode_id})

    def close(self) -> None:
        """Kill every agent and end the host. Futures that are still open are cancelled."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._writing:
            if not self._process.stdin.closed:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()

    def __enter__(self) -> "AgentHost":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, body: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            with self._writing:
                self._process.stdin.write(json.dumps(body).encode() + b"\n")
                self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            with self._lock:
                self._pending.pop(body.get("id", ""), None)
            raise LongforgeError("agent host: has ended; start a new one") from None

    def _read_results(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            result = json.loads(line)
            with self._lock:
                future = self._pending.pop(result.pop("id"), None)
            if future is not None and not future.cancelled():
                future.set_result(result)
        with self._lock:
            left, self._pending = list(self._pending.values()), {}
        for future in left:
            future.cancel()
