"""Messages and Responses when things go wrong or slowly: overload, an engine that ends, silence, tenants."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import openai
import pytest

from longforge.engine import Engine, GenerationRequest
from longforge.server.app import create_app
from longforge.server.engine_loop import EngineLoop
from longforge.server.event_stream import Patience
from longforge.server.front_door import Door
from longforge.server.keys import ApiKeys
from longforge.server.running import BackgroundServer
from small_model import small_model, small_tokenizer
from small_server import HTTP, Served

QUESTION = [{"role": "user", "content": "Where?"}]
MESSAGES: Any = {"model": "small", "max_tokens": 900, "messages": QUESTION, "temperature": 0}
RESPONSES: Any = {"model": "small", "max_output_tokens": 900, "input": "Where?", "temperature": 0}
PATHS = {"/v1/messages": MESSAGES, "/v1/responses": RESPONSES}


def engine_loop(kind: type[Engine] = Engine, **limits: int) -> EngineLoop:
    engine = kind(small_model(max_positions=1024), pages=300, max_running=2)
    return EngineLoop(engine, threads=1, **limits)


@contextmanager
def running(loop: EngineLoop, **options: Any) -> Iterator[str]:
    app = create_app(loop, small_tokenizer(), "small", **options)
    with BackgroundServer(app, on_stop=loop.stop) as server:
        yield server.url


@contextmanager
def streaming(url: str, path: str) -> Iterator[Iterator[str]]:
    """The lines of a stream that has begun to answer."""
    with HTTP.stream("POST", f"{url}{path}", json={**PATHS[path], "stream": True}) as reply:
        lines = reply.iter_lines()
        for line in lines:
            if "delta" in line:
                break
        yield lines


def events(lines: Iterator[str]) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(3000):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_an_overloaded_server_says_when_to_come_again():
    loop = engine_loop(max_requests=1)
    with running(loop) as url, streaming(url, "/v1/messages") as lines:
        loop.pause()
        refused = HTTP.post(f"{url}/v1/messages", json=MESSAGES)
        assert refused.status_code == 529 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded_error"
        client = anthropic.Anthropic(base_url=url, api_key="k", max_retries=0)
        with pytest.raises(anthropic.APIStatusError, match="1 requests are open already"):
            client.messages.create(model="small", max_tokens=5, messages=QUESTION)  # pyright: ignore
        also = HTTP.post(f"{url}/v1/responses", json=RESPONSES)
        assert also.status_code == 429 and int(also.headers["retry-after"]) >= 1
        assert loop.open_requests == 1
        loop.resume()
        assert next(lines) is not None


@pytest.mark.parametrize("path", PATHS)
def test_an_engine_that_ends_is_told_in_the_stream(path: str):
    loop = engine_loop()
    with running(loop) as url, streaming(url, path) as lines:
        loop.stop()
        rest = events(lines)
        refused = HTTP.post(f"{url}{path}", json=PATHS[path])
    last = rest[-1]
    if path == "/v1/messages":
        assert last["type"] == "error" and last["error"]["type"] == "api_error"
        assert "shutting down" in last["error"]["message"]
        assert (refused.status_code, refused.json()["type"]) == (500, "error")
    else:
        assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
        assert "shutting down" in last["response"]["error"]["message"]
        assert refused.status_code == 503


@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_drops_its_stream_gives_everything_back(served: Served, path: str):
    with streaming(served.url, path):
        assert served.loop.open_requests == 1
    assert eventually(lambda: not served.loop.open_requests and not served.loop.stats().running)


class BrokenEngine(Engine):
    """Fails as a bug would, where a request is checked."""

    def check(self, request: GenerationRequest) -> None:
        raise ZeroDivisionError


def test_a_bug_is_told_in_the_dialects_form_and_in_nobodys_words():
    with running(engine_loop(BrokenEngine)) as url:
        reply = HTTP.post(f"{url}/anthropic/v1/messages", json=MESSAGES)
    assert reply.status_code == 500
    assert reply.json() == {
        "type": "error",
        "error": {"type": "api_error", "message": "server: an internal error, see its log"},
    }


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_that_waits_says_that_it_is_alive(path: str):
    loop = engine_loop()
    with running(loop, patience=Patience(silence=0.02)) as url:
        loop.pause()
        with HTTP.stream("POST", f"{url}{path}", json={**PATHS[path], "stream": True}) as reply:
            lines = reply.iter_lines()
            assert any(line == ": waiting" for line in lines if not line.startswith(("event", "data")))
            loop.resume()
            assert any("delta" in line for line in lines)
            loop.pause()
            alive = '"ping"' if path == "/v1/messages" else ": waiting"
            assert any(alive in line for line in lines)
            loop.resume()


def test_a_response_belongs_to_the_tenant_that_made_it():
    keys = ApiKeys.of({"ann": "key-of-ann-1", "bob": "key-of-bob-1"})
    with running(engine_loop(), door=Door(keys=keys)) as url:
        ann, bob = (
            openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            for key in ("key-of-ann-1", "key-of-bob-1")
        )
        made = ann.responses.create(model="small", input="Where?", max_output_tokens=2)
        for ask in (bob.responses.retrieve, bob.responses.delete, bob.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                ask(made.id)
        with pytest.raises(openai.NotFoundError):
            bob.responses.input_items.list(made.id)
        with pytest.raises(openai.NotFoundError, match="there is none of this id"):
            bob.responses.create(model="small", input="And?", previous_response_id=made.id)
        again = ann.responses.create(
            model="small", input="And?", previous_response_id=made.id, max_output_tokens=2
        )
        assert again.previous_response_id == made.id
        refused = HTTP.post(f"{url}/anthropic/v1/messages", json=MESSAGES, headers={"x-api-key": "nobody"})
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        known = HTTP.post(
            f"{url}/v1/messages", json={**MESSAGES, "max_tokens": 1}, headers={"x-api-key": "key-of-ann-1"}
        )
        assert known.status_code == 200


def test_what_was_found_in_the_cache_is_told_apart(served: Served):
    words = [{"role": "user", "content": "Which file defines the class? " * 5}]
    asked = {**MESSAGES, "messages": words, "max_tokens": 2}
    first, second = (HTTP.post(f"{served.url}/v1/messages", json=asked).json()["usage"] for _ in range(2))
    total = first["input_tokens"] + first["cache_read_input_tokens"]
    assert second["input_tokens"] + second["cache_read_input_tokens"] == total
    assert second["cache_read_input_tokens"] > total / 2
    with HTTP.stream("POST", f"{served.url}/v1/messages", json={**asked, "stream": True}) as reply:
        stream = events(reply.iter_lines())
    start, end = stream[0]["message"]["usage"], stream[-2]["usage"]
    assert start["input_tokens"] == end["input_tokens"] == second["input_tokens"]
    assert start["cache_read_input_tokens"] == second["cache_read_input_tokens"]
    asked = {**RESPONSES, "input": words, "max_output_tokens": 2, "reasoning": {"effort": "none"}}
    usage = HTTP.post(f"{served.url}/v1/responses", json=asked).json()["usage"]
    assert usage["input_tokens"] == total
    assert usage["input_tokens_details"]["cached_tokens"] == second["cache_read_input_tokens"]
