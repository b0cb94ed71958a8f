"""Who gets in, under which name, with how much; and what is told to those who do not."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import openai
import pytest
from fastapi import FastAPI

from longforge.engine import Engine, GenerationRequest
from longforge.server.app import create_app
from longforge.server.engine_loop import EngineLoop
from longforge.server.front_door import Door
from longforge.server.keys import ApiKeys
from longforge.server.launch import served_hosts
from longforge.server.running import BackgroundServer
from small_model import small_model, small_tokenizer
from small_server import HTTP

KEYS = ApiKeys.of({"ann": "key-of-ann-1", "bob": "key-of-bob-1", "admin": "root-key-9"})
BODY = {"model": "small", "prompt": [1, 2, 3], "max_tokens": 2}


def app(door: Door, engine_type: type[Engine] = Engine) -> tuple[FastAPI, EngineLoop]:
    loop = EngineLoop(engine_type(small_model(max_positions=512), pages=200, max_running=2), threads=1)
    return create_app(loop, small_tokenizer(), "small", door=door), loop


@dataclass(frozen=True)
class Guarded:
    url: str
    loop: EngineLoop
    tenants: list[str]


class WatchedEngine(Engine):
    """Keeps whose requests it got."""

    def submit(self, request: GenerationRequest) -> None:
        self.__dict__.setdefault("tenants", []).append(request.tenant)
        super().submit(request)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    application, loop = app(Door(keys=KEYS, max_body_bytes=4000), WatchedEngine)
    loop.engine.__dict__["tenants"] = []
    with BackgroundServer(application, on_stop=loop.stop) as server:
        yield Guarded(server.url, loop, loop.engine.__dict__["tenants"])


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong-key"),
        {"Authorization": "Bearer"},
        {"x-api-key": "key-of-ann-"},
        {"Authorization": "Basic a2V5"},
    ],
)
def test_without_a_known_key_nobody_gets_in(guarded: Guarded, headers: dict[str, str]):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/pause", "/nowhere"):
        reply = HTTP.post(f"{guarded.url}{path}", json=BODY, headers=headers)
        assert reply.status_code == 401 and reply.json()["error"]["type"] == "authentication_error"
    for path in ("/v1/models", "/metrics", "/openapi.json", "/is_paused"):
        assert HTTP.get(f"{guarded.url}{path}", headers=headers).status_code == 401


def test_the_official_client_understands_the_refusal(guarded: Guarded):
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="api key: expected one this server knows"):
        client.models.list()


def test_anthropics_paths_are_refused_in_anthropics_form(guarded: Guarded):
    reply = HTTP.post(f"{guarded.url}/v1/messages/count_tokens", json={})
    assert reply.status_code == 401 and set(reply.json()) == {"type", "error"}
    assert reply.json()["type"] == "error" and reply.json()["error"]["type"] == "authentication_error"
    client = anthropic.Anthropic(base_url=guarded.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError, match="api key: expected one"):
        client.messages.create(model="small", max_tokens=1, messages=[{"role": "user", "content": "a"}])


def test_health_ready_and_version_are_open(guarded: Guarded):
    for path in ("/health", "/ready", "/version"):
        assert HTTP.get(f"{guarded.url}{path}").status_code == 200


def test_a_key_names_the_tenant_and_a_caller_cannot(guarded: Guarded):
    guarded.tenants.clear()
    for headers in (bearer("key-of-ann-1"), {"x-api-key": "key-of-bob-1"}):
        HTTP.post(f"{guarded.url}/v1/completions", json=BODY, headers=headers).raise_for_status()
    chat = {"model": "small", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    HTTP.post(
        f"{guarded.url}/v1/chat/completions", json=chat, headers=bearer("key-of-bob-1")
    ).raise_for_status()
    assert guarded.tenants == ["ann", "bob", "bob"]
    refused = HTTP.post(
        f"{guarded.url}/v1/completions", json={**BODY, "cache_salt": "ann"}, headers=bearer("key-of-bob-1")
    )
    assert refused.status_code == 400 and "cache_salt" in refused.json()["error"]["message"]


def test_cached_tokens_are_those_of_the_tenants_own_cache(guarded: Guarded):
    def cached(key: str) -> int:
        body = {**BODY, "prompt": list(range(60, 100))}
        reply = HTTP.post(f"{guarded.url}/v1/completions", json=body, headers=bearer(key))
        return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("key-of-ann-1") == 0
    assert cached("key-of-ann-1") > 0
    assert cached("key-of-bob-1") == 0, "nobody can find out what another has asked"


def test_only_the_admin_key_pauses_and_resumes(guarded: Guarded):
    for path in ("/pause", "/resume", "/reset_prefix_cache"):
        reply = HTTP.post(f"{guarded.url}{path}", headers=bearer("key-of-ann-1"))
        assert reply.status_code == 403 and reply.json()["error"]["type"] == "permission_error"
    assert not guarded.loop.paused
    admin = bearer("root-key-9")
    for path, paused in (("/pause", True), ("/resume", False)):
        assert HTTP.post(f"{guarded.url}{path}", headers=admin).json() == {"is_paused": paused}
        assert HTTP.get(f"{guarded.url}/is_paused", headers=admin).json() == {"is_paused": paused}


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_only_the_admin_key_is_served_before_others(guarded: Guarded, path: str):
    asked: Any = {"model": "small", "max_tokens": 1}
    asked |= {"prompt": [1]} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}

    def status(key: str, priority: int | None) -> int:
        body = asked | {"priority": priority, "n": 2}
        return HTTP.post(f"{guarded.url}/v1/{path}", json=body, headers=bearer(key)).status_code

    assert [status("key-of-ann-1", priority) for priority in (None, 0, 7, -1)] == [200, 200, 200, 403]
    assert status("root-key-9", -1) == 200
    assert guarded.loop.open_requests == 0


def test_a_body_too_large_is_a_413_with_and_without_a_length(guarded: Guarded):
    large = json.dumps({**BODY, "user": "a" * 5000}).encode()

    def pieces() -> Iterator[bytes]:
        yield from (large[i : i + 100] for i in range(0, len(large), 100))

    headers = {**bearer("key-of-ann-1"), "content-type": "application/json"}
    for content in (large, pieces()):
        reply = HTTP.post(f"{guarded.url}/v1/completions", content=content, headers=headers)
        assert reply.status_code == 413
        assert "body: expected at most 4000 bytes" in reply.json()["error"]["message"]


def test_an_endless_body_is_not_read_to_its_end(guarded: Guarded):
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 200_000_000:
            sent += 1000
            yield b"a" * 1000
            await asyncio.sleep(0)

    async def post() -> int:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            headers = {**bearer("key-of-ann-1"), "content-type": "application/json"}
            try:
                reply = await client.post(f"{guarded.url}/v1/completions", content=endless(), headers=headers)
            except httpx.HTTPError:
                return 413  # the server closed the connection while we were still sending
            return reply.status_code

    assert asyncio.run(post()) == 413 and sent < 100_000_000


def test_too_many_or_too_large_headers_are_refused(guarded: Guarded):
    many = {f"x-{i}": "1" for i in range(101)}
    reply = HTTP.get(f"{guarded.url}/health", headers=many)
    assert reply.status_code == 400 and "headers: expected at most 100" in reply.json()["error"]["message"]
    try:
        status = HTTP.get(f"{guarded.url}/health", headers={"x-large": "a" * 200_000}).status_code
    except httpx.HTTPError:
        status = 400  # the connection was closed while the rest was on its way
    assert status == 400


async def ask(door: Door, path: str = "/health", method: str = "GET", **headers: str) -> httpx.Response:
    application, _ = app(door)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(application), base_url="http://localhost:8000"
    ) as client:
        return await client.request(method, path, headers=headers)


LOCAL = Door(allowed_hosts=served_hosts("127.0.0.1", ["box.lan"]))


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST", "box.lan:1"])
def test_a_server_on_loopback_answers_to_its_own_names(host: str):
    assert asyncio.run(ask(LOCAL, host=host)).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "", "127.0.0.1.nip.io"])
def test_a_server_on_loopback_answers_to_no_other_name(host: str):
    reply = asyncio.run(ask(LOCAL, host=host))
    assert reply.status_code == 403 and "--allowed-host" in reply.json()["error"]["message"]


def test_a_public_address_answers_to_every_name_unless_some_are_named():
    assert served_hosts("0.0.0.0", []) is None
    assert served_hosts("0.0.0.0", ["Box.lan"]) == {"box.lan"}
    assert asyncio.run(ask(Door(), host="anything.example")).status_code == 200


def test_a_web_page_of_another_origin_reaches_nothing():
    reply = asyncio.run(ask(LOCAL, "/pause", "POST", origin="https://evil.example"))
    assert reply.status_code == 403 and "access-control-allow-origin" not in reply.headers
    own = asyncio.run(ask(LOCAL, "/pause", "POST", origin="http://localhost:8000"))
    assert own.json() == {"is_paused": True}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"model": "small", "prompt": "\xff"}', "UTF-8"),
        (b'{"model": "small", "prompt": [1], "temperature": NaN}', "temperature: .*finite"),
        (b'{"model": "small", "prompt": [1], "temperature": Infinity}', "temperature: .*finite"),
        (b'{"model": "small", "prompt": [1], "max_tokens": ' + b"9" * 5000 + b"}", "numbers of a reasonable"),
        (b'{"model": "small", "prompt": [1], "\\ud800": 1}', "valid string.*ud800"),
        (b'{"model": "\\ud800", "prompt": [1]}', "serves 'small', got"),
        (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        (b'{"model": "small", "prompt": [1]', "body: expected JSON"),
    ],
)
def test_a_body_that_is_no_json_of_ours_is_a_clear_400(served: Any, content: bytes, words: str):
    headers = {"content-type": "application/json"}
    reply = HTTP.post(f"{served.url}/v1/completions", content=content, headers=headers)
    assert reply.status_code in (400, 404)
    assert re.search(words, reply.json()["error"]["message"]), reply.json()


def test_a_body_without_the_type_of_json_is_a_400(served: Any):
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
        reply = HTTP.post(
            f"{served.url}/v1/completions", content=json.dumps(BODY), headers={"content-type": kind}
        )
        assert reply.status_code == 400 and "\n" not in reply.json()["error"]["message"]


def test_on_a_public_address_without_keys_no_web_page_is_an_operator():
    assert asyncio.run(ask(Door(), "/pause", "POST")).status_code == 200
    for origin in ("https://evil.example", "http://localhost:8000"):
        assert asyncio.run(ask(Door(), "/pause", "POST", origin=origin)).status_code == 403


def test_without_its_key_a_server_tells_that_it_lives_and_nothing_of_what_it_did(guarded: Guarded):
    assert set(HTTP.get(f"{guarded.url}/health").json()) == {"status", "model"}
    assert "generated_tokens" in HTTP.get(f"{guarded.url}/health", headers=bearer("key-of-ann-1")).json()
