"""One call to a canned model before the first fork.

The `openai` package imports and prepares most of what a call needs at the first call: 50 ms that every forked
agent would pay again. The rehearsal pays them once, in the host.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai

from longforge.forge.code_search.agent import AgentTask, make_client, run_episode

__all__ = ["rehearse"]


def rehearse() -> None:
    """Run one episode whose model asks for a tool that is not there. What comes of it does not matter."""
    server = HTTPServer(("127.0.0.1", 0), _CannedModel)
    server.timeout = 5.0
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    http = openai.DefaultHttpxClient(trust_env=False, timeout=5.0)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with make_client(base_url=url, api_key="rehearsal", http_client=http) as client:
        run_episode(AgentTask("rehearsal", tools_socket="", timeout_s=5.0), client)
    thread.join()
    server.server_close()


class _CannedModel(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        call = {"id": "call_1", "type": "function", "function": {"name": "grep", "arguments": "{}"}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        body = {
            "id": "rehearsal",
            "object": "chat.completion",
            "created": 0,
            "model": "-",
            "choices": [choice],
        }
        data = json.dumps(body).encode()
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: standard error belongs to the person at the terminal."""
