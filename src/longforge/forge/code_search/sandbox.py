"""Where tools run: a server process of its own with a deadline per call, and the client that asks it.

A call runs in a fork of the server, which has no network, no files and no other programs (`isolation.py`).
The agent knows the server's unix socket and nothing else of it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longforge.errors import InputError, LongforgeError
from longforge.forge.code_search.tool_server import ServerLimits
from longforge.forge.code_search.tools import ToolLimits
from longforge.forge.code_search.tree import EXCLUDED, default_tree, tree_root

__all__ = ["Sandbox", "ServerLimits", "call_tool"]

SERVER_PROGRAM = ("-m", "longforge.forge.code_search.tool_server")


class Sandbox:
    """A running tool server; use it as a context manager.

    It lives in a session of its own, so that Ctrl-C in a terminal reaches its owner only, and it ends when
    its owner closes it or dies.
    """

    def __init__(
        self,
        tree: str | Path | None = None,
        *,
        limits: ServerLimits | None = None,
        tool_limits: ToolLimits | None = None,
        excluded: Sequence[str] = EXCLUDED,
        program: Sequence[str] = SERVER_PROGRAM,
    ) -> None:
        """Start the server and wait until it listens.

        Raises:
            InputError: no such tree.
            LongforgeError: the server did not start.
        """
        root = tree_root(default_tree() if tree is None else tree)
        self.folder = Path(tempfile.mkdtemp(prefix="longforge-tools-"))
        self.socket = str(self.folder / "socket")
        """Path of the unix socket; only this user can reach it."""
        self.isolation: dict[str, bool] = {}
        """Which walls stand around the server: network, root, capabilities, audit_hook."""
        (self.folder / "root").mkdir(mode=0o500)
        config = {
            "tree": str(root),
            "folder": str(self.folder),
            "excluded": list(excluded),
            "limits": asdict(limits or ServerLimits()),
            "tool_limits": asdict(tool_limits or ToolLimits()),
        }
        self._process = subprocess.Popen(
            [sys.executable, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._await_ready(config)

    def _await_ready(self, config: dict[str, Any]) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(config).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        report: dict[str, Any] = (
            json.loads(line) if line else {"error": "tool server: ended before it was ready"}
        )
        if "error" in report:
            self.close()
            raise (InputError if line else LongforgeError)(report["error"])
        self.isolation = report["isolation"]

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def check(self) -> None:
        """Raises LongforgeError if the server has ended."""
        code = self._process.poll()
        if code is not None:
            raise LongforgeError(f"tool server: it ended with code {code}; resume the run to start another")

    def call(self, tool: str, arguments: dict[str, Any]) -> tuple[bool, str]:
        """Run one tool as an agent would."""
        return call_tool(self.socket, tool, arguments)

    def close(self) -> None:
        """End the server and every call in it; closing twice is fine."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def call_tool(
    socket_path: str | os.PathLike[str], tool: str, arguments: dict[str, Any], timeout_s: float = 60.0
) -> tuple[bool, str]:
    """Ask a tool server: (whether the tool did what was asked, its result or one line saying why not).

    Raises:
        OSError: the server is gone or silent for `timeout_s`.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(os.fspath(socket_path))
        connection.sendall(json.dumps({"tool": tool, "arguments": arguments}).encode() + b"\n")
        with connection.makefile("rb") as stream:
            line = stream.readline()
    if not line:
        raise ConnectionError("tool server: closed the connection without an answer")
    answer = json.loads(line)
    return bool(answer["ok"]), str(answer["result"])
