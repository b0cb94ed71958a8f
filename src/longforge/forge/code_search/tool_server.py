"""The program that runs tools: `python -m longforge.forge.code_search.tool_server`, started by `Sandbox`.

It loads the tree, shuts itself in, and forks once per call. The first line on its standard input is its
configuration; when that input ends, so does the server. A client connects to a unix socket, sends one line of
JSON (`{"tool": ..., "arguments": {...}}`) and gets one back (`{"ok": ..., "result": ...}`).
"""

import gc
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longforge.errors import LongforgeError, ToolError
from longforge.forge.code_search.isolation import build_walls, die_with_parent, limit_child
from longforge.forge.code_search.tools import CodeTools, ToolLimits
from longforge.forge.code_search.tree import load_tree

__all__ = ["Handler", "ServerLimits", "ToolServer", "main"]

Handler = Callable[[str, dict[str, Any]], str]
"""Runs a tool by name; raises ToolError where it refuses."""

MAX_REQUEST = 64 * 1024
REQUEST_SECONDS = 10.0


@dataclass(frozen=True)
class ServerLimits:
    """What one tool call may use."""

    deadline_s: float = 2.0
    max_output: int = 4000
    """Characters."""
    memory_mib: int = 256
    """Address space on top of the loaded tree."""
    max_children: int = 8
    """Calls that run at once; the rest wait, and their deadline starts when they do."""
    cached_results: int = 4096


@dataclass
class _Child:
    pid: int
    pipe: int
    key: str
    client: socket.socket
    deadline: float
    output: bytearray = field(default_factory=bytearray)


@dataclass
class _Client:
    connection: socket.socket
    deadline: float
    request: bytearray = field(default_factory=bytearray)


class ToolServer:
    """A single-threaded loop: read requests, fork calls, enforce deadlines, answer."""

    def __init__(
        self, handler: Handler, listener: socket.socket, limits: ServerLimits, lifeline: int
    ) -> None:
        """`lifeline` is a file descriptor; the server ends when it can be read (the other end was closed)."""
        self._handler = handler
        self._limits = limits
        self._listener = listener
        self._lifeline = lifeline
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, _Child] = {}
        self._clients: dict[int, _Client] = {}
        self._waiting: deque[tuple[socket.socket, str]] = deque()
        self._answers: OrderedDict[str, bytes] = OrderedDict()
        self._address_space = _address_space() + limits.memory_mib * 2**20

    def serve(self) -> None:
        """Serve until the lifeline breaks; then kill what runs and return."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._lifeline, selectors.EVENT_READ, None)
        try:
            while True:
                for key, _ in self._selector.select(self._seconds_to_next_deadline()):
                    if key.data is None:
                        return
                    key.data(key.fd)
                self._enforce_deadlines()
                while self._waiting and len(self._children) < self._limits.max_children:
                    self._start(*self._waiting.popleft())
        finally:
            for child in list(self._children.values()):
                self._end(child)

    def _accept(self, _: int) -> None:
        try:
            connection, _address = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        client = _Client(connection, time.monotonic() + REQUEST_SECONDS)
        self._clients[connection.fileno()] = client
        self._selector.register(connection, selectors.EVENT_READ, self._read_request)

    def _read_request(self, descriptor: int) -> None:
        client = self._clients[descriptor]
        try:
            data = client.connection.recv(MAX_REQUEST)
        except OSError:
            data = b""
        client.request += data
        if client.request.endswith(b"\n"):
            self._forget(client)
            self._handle(client.connection, client.request)
        elif not data or len(client.request) > MAX_REQUEST:
            self._forget(client)
            self._reply(client.connection, _answer(False, "error: request is not one line of JSON"))

    def _forget(self, client: _Client) -> None:
        self._selector.unregister(client.connection)
        del self._clients[client.connection.fileno()]

    def _handle(self, connection: socket.socket, request: bytearray) -> None:
        try:
            body = json.loads(request)
            key = json.dumps([body["tool"], body["arguments"]], sort_keys=True)
            valid = isinstance(body["tool"], str) and isinstance(body["arguments"], dict)
        except (ValueError, KeyError, TypeError, RecursionError):
            valid, key = False, ""
        if not valid:
            self._reply(connection, _answer(False, "error: a call needs a tool's name and named arguments"))
        elif key in self._answers:
            self._answers.move_to_end(key)
            self._reply(connection, self._answers[key])
        else:
            self._waiting.append((connection, key))

    def _start(self, connection: socket.socket, key: str) -> None:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._run_call(key, write_end)
        os.close(write_end)
        deadline = time.monotonic() + self._limits.deadline_s
        self._children[read_end] = _Child(pid, read_end, key, connection, deadline)
        self._selector.register(read_end, selectors.EVENT_READ, self._read_output)

    def _run_call(self, key: str, pipe: int) -> None:
        """In the fork: run the tool, write a mark and its text to the pipe, and end."""
        try:
            die_with_parent()
            os.dup2(pipe, 0)
            os.closerange(3, 1024)
            limit_child(int(self._limits.deadline_s) + 2, self._address_space)
            name, arguments = json.loads(key)
            try:
                mark, text = b"+", self._handler(name, arguments)
            except ToolError as refusal:
                mark, text = b"-", str(refusal)
            except MemoryError:
                mark, text = b"-", f"error: {name} needs too much memory"
            except PermissionError as refusal:
                mark, text = b"-", f"error: {refusal}"
            data = mark + text[: self._limits.max_output + 1].encode("utf-8", "replace")
            while data:
                data = data[os.write(0, data) :]
        finally:
            os._exit(0)

    def _read_output(self, descriptor: int) -> None:
        child = self._children[descriptor]
        data = os.read(descriptor, 65536)
        child.output += data
        if not data or len(child.output) > 4 * self._limits.max_output + 8:
            self._finish(child)

    def _finish(self, child: _Child) -> None:
        self._end(child)
        mark, text = child.output[:1], child.output[1:].decode("utf-8", "replace")
        if len(text) > self._limits.max_output:
            text = text[: self._limits.max_output] + "\n... cut"
        answer = _answer(mark == b"+", text) if mark else _answer(False, "error: the tool failed")
        if mark:
            self._answers[child.key] = answer
            if len(self._answers) > self._limits.cached_results:
                self._answers.popitem(last=False)
        self._reply(child.client, answer)

    def _end(self, child: _Child) -> None:
        """Kill and reap; a call that closed its pipe and lives on is killed as well."""
        self._selector.unregister(child.pipe)
        os.close(child.pipe)
        del self._children[child.pipe]
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)

    def _reply(self, connection: socket.socket, answer: bytes) -> None:
        try:
            connection.settimeout(1.0)
            connection.sendall(answer)
        except OSError:
            pass
        finally:
            connection.close()

    def _seconds_to_next_deadline(self) -> float | None:
        deadlines = [entry.deadline for entry in (*self._children.values(), *self._clients.values())]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for child in [child for child in self._children.values() if child.deadline <= now]:
            self._end(child)
            text = f"error: stopped after {self._limits.deadline_s:g} seconds"
            self._reply(child.client, _answer(False, text))
        for client in [client for client in self._clients.values() if client.deadline <= now]:
            self._forget(client)
            client.connection.close()


def main(extra_tools: Mapping[str, Callable[..., str]] | None = None) -> int:
    """Read the configuration, report readiness on standard output, serve. `extra_tools` join the two."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(0, "rb", buffering=0, closefd=False) as stream:  # unbuffered: what follows is the lifeline
        config = json.loads(stream.readline())
    folder = Path(config["folder"])
    try:
        tree = load_tree(config["tree"], tuple(config["excluded"]))
    except LongforgeError as problem:
        print(json.dumps({"error": str(problem)}), flush=True)
        return 2
    tools = CodeTools(tree, ToolLimits(**config["tool_limits"]))
    extra = dict(extra_tools or {})

    def handler(name: str, arguments: dict[str, Any]) -> str:
        return extra[name](**arguments) if name in extra else tools.call(name, arguments)

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(folder / "socket"))
    listener.listen(128)
    server = ToolServer(handler, listener, ServerLimits(**config["limits"]), lifeline=0)
    tools.grep("warm up")  # imports what the first call would
    gc.freeze()
    walls = build_walls(folder / "root")
    print(json.dumps({"isolation": walls, "files": len(tree.files)}), flush=True)
    server.serve()
    return 0


def _answer(ok: bool, text: str) -> bytes:
    return json.dumps({"ok": ok, "result": text}).encode() + b"\n"


def _address_space() -> int:
    """Bytes of address space this process has now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
