"""`longforge chat` on a pipe: thinking, tool calls, results, errors, and a model of its own."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from longforge.cli import main

TOOLS = [
    {
        "name": "grep",
        "description": "",
        "parameters": {"type": "object", "properties": {"limit": {"type": "integer"}}},
    }
]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))

    def run(typed: str, *arguments: str) -> tuple[int, str, str]:
        arguments = tuple(str(tools) if argument == "TOOLS" else argument for argument in arguments)
        monkeypatch.setattr(sys, "argv", ["longforge", "chat", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_thinking_calls_and_answers_are_shown_in_order(chat: Any, taught: Any):
    code, out, err = chat("Where?\na.py\n", "--url", taught.url, "--tools", "TOOLS")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["(thinking) hm", '(calls grep) {"limit": 3}', "(thinking) ah", "café ☕"]


def test_reset_forgets_what_was_said(chat: Any, taught: Any):
    once = chat("Where?\na.py\n", "--url", f"{taught.url}/v1", "--tools", "TOOLS")
    again = chat("Where?\na.py\n/reset\n\nWhere?\na.py\n", "--url", taught.url, "--tools", "TOOLS")
    assert again[1] == once[1] * 2


def test_a_refused_question_on_a_pipe_is_one_line_and_exit_code_2(chat: Any, taught: Any):
    code, out, err = chat("word " * 900 + "\n", "--url", taught.url)
    assert code == 2 and out == ""
    assert err.startswith("longforge: prompt: at most 1024 tokens fit") and err.count("\n") == 1


def test_it_brings_its_own_model(chat: Any, folder: Path):
    code, out, err = chat("hello\n", str(folder), "--max-tokens", "5", "--seed", "1", "--threads", "1")
    assert (code, err) == (0, "") and out
    assert chat("hello\n", str(folder), "--max-tokens", "5", "--seed", "1", "--threads", "1")[1] == out
