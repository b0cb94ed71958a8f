"""`longforge chat` on a pipe: thinking, tool calls, results, errors, and a model of its own."""

import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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

    def run(typed: str | bytes, *arguments: str) -> tuple[int, str, str]:
        arguments = tuple(str(tools) if argument == "TOOLS" else argument for argument in arguments)
        monkeypatch.setattr(sys, "argv", ["longforge", "chat", *arguments])
        raw = typed.encode() if isinstance(typed, str) else typed
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
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


def test_input_that_ends_before_a_tools_result_ends_the_conversation(chat: Any, taught: Any):
    code, out, err = chat("Where?\n", "--url", taught.url, "--tools", "TOOLS")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["(thinking) hm", '(calls grep) {"limit": 3}']


def test_bytes_that_are_no_text_are_one_line_and_exit_code_2(chat: Any, taught: Any):
    code, out, err = chat(b"caf\xe9\n", "--url", taught.url)
    assert (code, out, err) == (2, "", "longforge: input: expected UTF-8 text, got other bytes\n")


class OtherServer(BaseHTTPRequestHandler):
    """Answers, but not as a model server does."""

    content_type, body = "text/html", b"<p>hello</p>"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", self.content_type)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("content_type", "body"),
    [("text/html", b"<p>hello</p>"), ("application/json", b"{}"), ("application/json", b'{"data": []}')],
)
def test_a_server_of_something_else_is_one_line(chat: Any, content_type: str, body: bytes):
    handler = type("Handler", (OtherServer,), {"content_type": content_type, "body": body})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code, out, err = chat("hello\n", "--url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"127.0.0.1:{server.server_port}/v1: expected a model server" in err


class KeyedServer(OtherServer):
    """Lists a model for whoever has the key, and nothing else."""

    content_type, body = "application/json", b'{"object": "list", "data": [{"id": "mine"}]}'

    def do_GET(self) -> None:
        if self.headers["Authorization"] == "Bearer sesame":
            super().do_GET()
        else:
            self.send_error(401)


def test_a_server_that_asks_for_a_key_gets_the_one_that_was_given(chat: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), KeyedServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        code, out, err = chat("", "--url", url)
        assert (code, out) == (2, "") and "give one with --api-key or in OPENAI_API_KEY" in err
        assert chat("", "--url", url, "--api-key", "sesame") == (0, "", "")
        monkeypatch.setenv("OPENAI_API_KEY", "sesame")
        assert chat("", "--url", url) == (0, "", "")
        server.shutdown()


def test_it_brings_its_own_model(chat: Any, folder: Path):
    code, out, err = chat("hello\n", str(folder), "--max-tokens", "5", "--seed", "1", "--threads", "1")
    assert (code, err) == (0, "") and out
    assert chat("hello\n", str(folder), "--max-tokens", "5", "--seed", "1", "--threads", "1")[1] == out
