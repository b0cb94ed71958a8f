"""More than the server takes: refused at once, told when to come again, and nobody else is hurt."""

import concurrent.futures
import socket
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from longforge.server.app import create_app
from longforge.server.engine_loop import EngineLoop
from longforge.server.running import BackgroundServer
from slow_steps import SlowEngine
from small_model import small_model, small_tokenizer
from small_server import HTTP

LONG = {"model": "small", "prompt": [1, 2, 3], "max_tokens": 900, "temperature": 0, "ignore_eos": True}


def server(**limits: int) -> tuple[EngineLoop, BackgroundServer]:
    engine = SlowEngine(small_model(max_positions=1024), pages=300, max_running=2)
    loop = EngineLoop(engine, threads=1, **limits)
    return loop, BackgroundServer(create_app(loop, small_tokenizer(), "small"), on_stop=loop.stop)


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("limits", "fields", "words"),
    [
        ({"max_requests": 1}, {}, "1 requests are open already"),
        ({"max_requests": 2}, {"n": 2}, "2 requests are open already"),
        ({"max_tokens": 10}, {"prompt": [1] * 9}, "9 more would pass 10"),
    ],
)
def test_what_is_too_much_is_a_429_that_may_be_tried_again(
    limits: dict[str, int], fields: dict[str, Any], words: str
):
    loop, running = server(**limits)
    with running:
        loop.pause()  # so that the first one cannot be done before the others ask
        with HTTP.stream("POST", f"{running.url}/v1/completions", json={**LONG, "stream": True}):
            refused = HTTP.post(f"{running.url}/v1/completions", json={**LONG, **fields})
            assert refused.status_code == 429 and words in refused.json()["error"]["message"]
            assert int(refused.headers["retry-after"]) >= 1
            assert loop.open_requests == 1, "what was opened of the refused request is closed again"
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0)
            chat: Any = {"model": "small", "messages": [{"role": "user", "content": "a" * 9}]}
            with pytest.raises(openai.RateLimitError):
                client.chat.completions.create(**chat, **({"n": 2} if "n" in fields else {}))
            loop.resume()
        assert eventually(lambda: loop.open_requests == 0)
        served = HTTP.post(f"{running.url}/v1/completions", json={**LONG, "max_tokens": 2})
        assert served.status_code == 200


def test_a_draining_server_is_not_ready_and_says_503():
    loop, running = server()
    with running:
        loop.drain()
        ready = HTTP.get(f"{running.url}/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert HTTP.get(f"{running.url}/health").status_code == 200, "it still lives"
        refused = HTTP.post(f"{running.url}/v1/completions", json=LONG)
        assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
        assert "retry-after" in refused.headers


def test_a_reader_that_stops_reading_holds_up_nobody_and_little_memory():
    loop, running = server()
    with running:
        port = int(running.url.rpartition(":")[2])
        body = (
            b'{"model":"small","prompt":[1],"max_tokens":900,"stream":true,"logprobs":20,"ignore_eos":true}'
        )
        with socket.create_connection(("127.0.0.1", port)) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
            deaf.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            assert eventually(lambda: loop.stats().generated_tokens >= 900)
            short = HTTP.post(f"{running.url}/v1/completions", json={**LONG, "max_tokens": 3})
            assert short.json()["usage"]["completion_tokens"] == 3
            assert loop.stats().generated_tokens == 903, "an answer never holds more than its own tokens"
            assert loop.stats().running == 0, "and no pages once it is made"
        assert eventually(lambda: loop.open_requests == 0)


def test_pausing_holds_an_answer_and_resuming_goes_on():
    loop, running = server()
    with running:
        assert HTTP.post(f"{running.url}/pause").json() == {"is_paused": True}
        with HTTP.stream(
            "POST", f"{running.url}/v1/completions", json={**LONG, "stream": True, "max_tokens": 5}
        ) as reply:
            assert eventually(lambda: loop.open_requests == 1)
            assert loop.stats().generated_tokens == 0
            assert HTTP.post(f"{running.url}/resume").json() == {"is_paused": False}
            assert [line for line in reply.iter_lines() if line][-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_pausing_may_end_what_is_open(stream: bool):
    loop, running = server()
    with running, concurrent.futures.ThreadPoolExecutor() as pool:
        body = LONG | {"stream": stream}
        asked = [pool.submit(HTTP.post, f"{running.url}/v1/completions", json=body) for _ in range(4)]
        assert eventually(lambda: loop.stats().running == 2 and loop.stats().waiting == 2)
        assert HTTP.post(f"{running.url}/pause?mode=abort").json() == {"is_paused": True}
        for reply in asked:
            assert "ended open requests" in reply.result().text
            assert reply.result().status_code == (200 if stream else 503)
        assert eventually(lambda: loop.open_requests == 0)
        stats = loop.stats()
        assert (stats.running, stats.waiting, stats.free_pages + stats.cached_pages) == (0, 0, stats.pages)
        later = pool.submit(HTTP.post, f"{running.url}/v1/completions", json=LONG | {"max_tokens": 2})
        assert eventually(lambda: loop.open_requests == 1)
        HTTP.post(f"{running.url}/resume")
        assert later.result().status_code == 200
        assert HTTP.post(f"{running.url}/pause?mode=soon").status_code == 400


def test_the_cache_can_be_emptied(served: Any):
    reply = HTTP.post(f"{served.url}/reset_prefix_cache")
    assert reply.status_code == 200 and reply.json()["pages"] >= 0
