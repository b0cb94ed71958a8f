"""Small real things that the tests of code search share: trees, and a chat server that follows a script."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from longforge.forge.code_search.index import CodeIndex, build_index
from longforge.forge.code_search.questions import QuestionSet
from longforge.forge.code_search.tools import CodeTools

Script = Callable[[list[dict[str, Any]]], dict[str, Any]]


class ScriptedChatServer:
    """A Chat Completions endpoint whose assistant message is a function of the messages it gets."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append(body)
                owner.keys.append(self.headers["Authorization"].removeprefix("Bearer "))
                message = {"role": "assistant", "content": "", **owner.script(body["messages"])}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                reply = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "m",
                    "choices": [choice],
                }
                data = json.dumps(reply).encode()
                self.send_response(message.get("status", 200))
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def chat_server() -> Iterator[Callable[[Script], ScriptedChatServer]]:
    servers: list[ScriptedChatServer] = []

    def start(script: Script) -> ScriptedChatServer:
        servers.append(ScriptedChatServer(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def write_tree(root: Path, files: Mapping[str, str]) -> Path:
    """Write a hand-made tree; returns its root."""
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[[Mapping[str, str]], Path]:
    def make(files: Mapping[str, str]) -> Path:
        return write_tree(tmp_path / "tree", files)

    return make


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of two files for tests that only need something to search."""
    return write_tree(
        tmp_path_factory.mktemp("zoo"),
        {
            "animals/base.py": "class Animal:\n    def __init__(self):\n        self.legs = 4\n\n"
            "    def speak(self):\n        return ''\n",
            "animals/dogs.py": "from animals import base\n\n\nclass Dog(base.Animal):\n"
            "    def bark(self):\n        return 'wuff'  # other animals of this tree say nothing\n",
        },
    )


@pytest.fixture(scope="session")
def library() -> CodeIndex:
    """The standard library, indexed once for all tests."""
    return build_index()


@pytest.fixture(scope="session")
def library_tools(library: CodeIndex) -> CodeTools:
    return CodeTools(library.tree)


@pytest.fixture(scope="session")
def library_questions(library: CodeIndex) -> QuestionSet:
    return QuestionSet(library)
