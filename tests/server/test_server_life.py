"""A server's life: health, models, clients that hang up, weights in mid-answer, shutdown."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from longforge.engine import Engine
from longforge.errors import EngineError, InputError
from longforge.protocol import SamplingParams
from longforge.server.app import create_app
from longforge.server.engine_loop import EngineLoop
from longforge.server.running import BackgroundServer, bind
from small_model import small_model, small_tokenizer, write_small_checkpoint
from small_server import HTTP

LONG = {"model": "small", "prompt": [1, 2, 3], "max_tokens": 900, "temperature": 0}


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def idle(loop: EngineLoop) -> bool:
    stats = loop.stats()
    return stats.running == stats.waiting == 0 and stats.free_pages + stats.cached_pages == stats.pages


def small_server() -> tuple[EngineLoop, BackgroundServer]:
    loop = EngineLoop(Engine(small_model(max_positions=1024), pages=300, max_running=4), threads=1)
    return loop, BackgroundServer(create_app(loop, small_tokenizer(), "small"), on_stop=loop.stop)


def pause_after_a_step(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer has its first token and cannot be done before the test goes on."""
    step = loop.engine.step

    def one_step() -> Any:
        loop.pause()
        return step()

    monkeypatch.setattr(loop.engine, "step", one_step)


def test_health_and_models_tell_what_is_served(served: Any):
    health = HTTP.get(f"{served.url}/health").json()
    assert health["status"] == "ok" and health["context"] == 1024
    assert [model.id for model in served.client.models.list()] == ["small"]
    assert served.client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="'small', got 'other'"):
        served.client.models.retrieve("other")
    assert HTTP.get(f"{served.url}/nowhere").json()["error"]["type"] == "not_found_error"


def test_a_client_that_drops_its_stream_gives_the_pages_back(served: Any, monkeypatch: pytest.MonkeyPatch):
    before = served.loop.stats().cancelled
    pause_after_a_step(served.loop, monkeypatch)
    try:
        with HTTP.stream("POST", f"{served.url}/v1/completions", json={**LONG, "stream": True}) as reply:
            lines = reply.iter_lines()  # kept: a generator that is thrown away closes the connection
            next(lines)
            assert not idle(served.loop)
        assert eventually(lambda: idle(served.loop))
        assert served.loop.stats().cancelled == before + 1
    finally:
        served.loop.resume()


def test_a_client_that_hangs_up_while_waiting_gives_the_pages_back(served: Any):
    before = served.loop.stats().cancelled
    served.loop.pause()  # so that it cannot be done before the client has gone
    try:
        with pytest.raises(httpx.ReadTimeout):
            HTTP.post(f"{served.url}/v1/completions", json=LONG, timeout=httpx.Timeout(60, read=0.05))
        assert eventually(lambda: served.loop.stats().cancelled == before + 1)
        assert eventually(lambda: idle(served.loop))
    finally:
        served.loop.resume()


def test_new_weights_are_active_when_the_answer_comes(tmp_path: Path):
    folder = write_small_checkpoint(tmp_path / "new", seed=1, max_positions=1024)
    loop, server = small_server()
    with server:
        url = f"{server.url}/v1/completions"
        versions: list[int] = []

        def generate() -> None:
            while 5 not in versions:
                reply = HTTP.post(url, json={**LONG, "max_tokens": 200}).json()
                versions.extend(reply["choices"][0]["weight_versions"])

        running = threading.Thread(target=generate)
        running.start()
        assert eventually(lambda: loop.stats().generated_tokens > 3)
        reply = HTTP.post(f"{server.url}/admin/weights", json={"path": str(folder), "version": 5})
        assert (reply.status_code, reply.json()) == (200, {"version": 5})
        assert HTTP.get(f"{server.url}/health").json()["version"] == 5
        running.join()
        assert set(versions) == {0, 5} and versions == sorted(versions)
        answer = HTTP.post(
            url, json={**LONG, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        ).json()
    ids = answer["choices"][0]["token_ids"]
    with torch.no_grad():
        best = small_model(seed=1, max_positions=1024)(torch.tensor([[1, 2, 3, *ids]]))[0, 2:-1].argmax(-1)
    assert ids == best.tolist()


def test_weights_that_do_not_fit_change_nothing(served: Any, tmp_path: Path):
    other = tmp_path / "other"
    small_model("sliding", max_positions=1024).save_pretrained(other)
    version = served.loop.engine.version
    head = served.model.lm_head.weight.clone()
    for path, number, status in [
        (tmp_path / "missing", version + 1, 400),
        (other, version + 1, 400),
        (other, -1, 400),
    ]:
        reply = HTTP.post(f"{served.url}/admin/weights", json={"path": str(path), "version": number})
        assert reply.status_code == status and "\n" not in reply.json()["error"]["message"]
    assert served.loop.engine.version == version and torch.equal(served.model.lm_head.weight, head)


def test_an_old_version_is_a_conflict(tmp_path: Path):
    folder = write_small_checkpoint(tmp_path / "same", max_positions=1024)
    _, server = small_server()
    with server:
        reply = HTTP.post(f"{server.url}/admin/weights", json={"path": str(folder), "version": 0})
    assert reply.status_code == 409
    assert reply.json()["error"]["message"] == "weights version: expected more than the active 0, got 0"


def test_weights_are_for_this_machine_only():
    app = create_app(EngineLoop(Engine(small_model(), pages=4)), small_tokenizer(), "small")

    async def from_afar() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=("192.0.2.7", 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/admin/weights", json={"path": "/tmp/x", "version": 1})

    assert asyncio.run(from_afar()).status_code == 403


def test_stopping_ends_open_answers_with_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch):
    loop, server = small_server()
    pause_after_a_step(loop, monkeypatch)
    with server:
        with HTTP.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            loop.stop()
            rest = [line for line in lines if line]
        assert "shutting down" in rest[-1] and "[DONE]" not in rest[-1]
        refused = HTTP.post(f"{server.url}/v1/completions", json=LONG)
        assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
        assert HTTP.get(f"{server.url}/health").status_code == 503


def test_a_port_in_use_is_named_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: it is in use on 127.0.0.1"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["é..b", "192.0.2.7"])
def test_a_host_that_is_none_is_one_line(host: str):
    with pytest.raises(InputError, match=f"cannot listen on {host} port 0"):
        bind(host, 0)


class BrokenEngine(Engine):
    """Fails as a bug would."""

    def step(self) -> Any:
        raise ZeroDivisionError


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_engine_fails_every_request_and_hangs_none():
    async def scenario() -> None:
        loop = EngineLoop(BrokenEngine(small_model(), pages=4))
        loop.start()
        generation = loop.open([1], SamplingParams())
        with pytest.raises(EngineError, match="it has failed"):
            async for _ in generation.batches():
                pass
        with pytest.raises(EngineError, match="it has failed"):
            loop.open([1], SamplingParams())
        loop.stop()

    asyncio.run(scenario())


def test_an_operator_who_gives_up_waiting_does_no_harm():
    """The command is cancelled while it waits behind a step; the engine skips it and goes on."""
    engine_loop, go = EngineLoop(Engine(small_model(), pages=9)), threading.Event()

    def block() -> None:
        go.wait(60)

    async def give_up() -> None:
        engine_loop.start()
        engine_loop._command(block)
        waiting = asyncio.ensure_future(engine_loop.reset_cache())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        go.set()
        assert await engine_loop.reset_cache() == 0

    asyncio.run(give_up())
    engine_loop.stop()
    assert not engine_loop.crashed
