"""`longforge chat` in a terminal: Ctrl-C stops an answer, not the program; facts and commands."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PARAMETERS = '{"type": "object", "properties": {"limit": {"type": "integer"}}}'
TOOLS = f'[{{"name": "grep", "description": "", "parameters": {PARAMETERS}}}]'


class Terminal:
    """A person at a terminal with `longforge chat` in it."""

    def __init__(self, *arguments: str) -> None:
        self._here, there = pty.openpty()
        command = [sys.executable, "-m", "longforge.cli", "chat", *arguments]
        self.process = subprocess.Popen(
            command, stdin=there, stdout=there, stderr=there, env=os.environ | {"TERM": "dumb"}
        )
        os.close(there)
        self.said = ""

    def wait(self, pattern: str) -> str:
        """Everything up to and with the first match that was not waited for yet."""
        end = time.monotonic() + 120
        while not (found := re.search(pattern, self.said)):
            assert time.monotonic() < end and self.process.poll() is None, self.said
            self.said += os.read(self._here, 4096).decode(errors="replace").replace("\r", "")
        before, self.said = self.said[: found.end()], self.said[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self._here, text.encode())

    def leave(self) -> int:
        self.type("\x04")
        code = self.process.wait(60)
        os.close(self._here)
        return code


@pytest.fixture
def tools(tmp_path: Path) -> Iterator[str]:
    file = tmp_path / "tools.json"
    file.write_text(TOOLS)
    yield str(file)


def test_ctrl_c_stops_the_answer_and_gives_the_pages_back(taught: Any, tools: str):
    terminal = Terminal("--url", taught.url, "--tools", tools, "--max-tokens", "900", "--temperature", "0")
    terminal.wait("Ctrl-C stops an answer.*\n> ")
    taught.loop.pause()
    try:
        before = taught.loop.stats().cancelled
        terminal.type("Where?\n")
        while not taught.loop.open_requests:
            time.sleep(0.01)
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait(r"\(stopped\)\n> ")
        while taught.loop.open_requests:
            time.sleep(0.01)
    finally:
        taught.loop.resume()
    while taught.loop.stats().cancelled == before:
        time.sleep(0.01)
    stats = taught.loop.stats()
    assert stats.running == stats.waiting == 0 and stats.free_pages + stats.cached_pages == stats.pages
    terminal.type("/reset\n")
    terminal.wait("> ")
    terminal.type("Where?\n")
    said = terminal.wait("grep returns> ")
    assert '(calls grep) {"limit": 3}' in said
    assert re.search(r"\[\d+ tokens, \d+ tokens/s, prompt \d+.*\]\n", said)
    terminal.type("a.py\n")
    assert "café ☕" in terminal.wait(r"prompt \d+.*\]\n> ")
    assert terminal.leave() == 0


def test_tools_are_shown_on_request(taught: Any, tools: str):
    terminal = Terminal("--url", taught.url, "--tools", tools)
    terminal.wait("\n> ")
    terminal.type("/tools\n")
    assert "grep(limit)\n" in terminal.wait("\n> ")
    assert terminal.leave() == 0
