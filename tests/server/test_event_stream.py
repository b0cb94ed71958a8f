"""Streams that wait, on either side: for the first token, and for a reader who takes nothing."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import openai
import pytest
from fastapi import FastAPI, Response
from starlette.types import Message

from load_server import eventually, serving
from longforge.server.event_stream import PIECE, WAITING, EventStream, Patience
from longforge.server.running import BackgroundServer
from small_server import HTTP

IDS = [1, 2, 3]
QUESTION: Any = [{"role": "user", "content": "Where?"}]
CHAT: Any = {"model": "small", "messages": QUESTION, "temperature": 0, "max_tokens": 20}
COMPLETION: Any = {"model": "small", "prompt": IDS, "temperature": 0, "max_tokens": 20}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}


@contextmanager
def held(loop: Any) -> Iterator[None]:
    """The engine computes nothing for a while."""
    loop.pause()
    timer = threading.Timer(0.4, loop.resume)
    timer.start()
    yield
    timer.join()


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_that_waits_for_its_first_token_sends_comments(path: str):
    with serving(patience=Patience(silence=0.02)) as (loop, url):
        loop.pause()
        with HTTP.stream("POST", f"{url}{path}", json=PATHS[path] | {"stream": True}) as reply:
            lines = reply.iter_lines()
            assert next(line for line in lines if line.startswith(":")) == ": waiting"
            loop.resume()
            rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["choices"] for line in rest[:-1])


def test_the_official_clients_read_on_through_signs_of_life():
    with serving(patience=Patience(silence=0.01)) as (loop, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        claude = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
        whole = client.chat.completions.create(**CHAT).choices[0].message
        with held(loop):
            chunks = list(client.chat.completions.create(**CHAT, stream=True))
        deltas = [chunk.choices[0].delta.model_dump() for chunk in chunks]
        assert "".join(delta["content"] or "" for delta in deltas) == (whole.content or "")
        completed = client.completions.create(**COMPLETION).choices[0].text
        with held(loop):
            parts = list(client.completions.create(**COMPLETION, stream=True))
        assert "".join(part.choices[0].text for part in parts) == completed
        asked: Any = {"model": "small", "input": "Where?", "temperature": 0, "max_output_tokens": 20}
        responded = client.responses.create(**asked).output_text
        with held(loop):
            kinds = [(event.type, event) for event in client.responses.create(**asked, stream=True)]
        assert kinds[-1][1].response.output_text == responded
        greedy: Any = {"model": "small", "messages": QUESTION, "max_tokens": 20}
        greedy["extra_body"] = {"temperature": 0}
        said = claude.messages.create(**greedy).content
        with held(loop), claude.messages.stream(**greedy) as stream:
            assert [block.type for block in stream.get_final_message().content] == [b.type for b in said]


@contextmanager
def deaf_reader(url: str, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A client that asks and then reads nothing."""
    host, port = url.removeprefix("http://").split(":")
    sent = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        yield client


def test_a_reader_who_takes_nothing_gives_its_request_back():
    """Each answer begins with 20 log-probabilities of 900 tokens: more than the sockets between hold."""
    many = COMPLETION | {"prompt": [1] * 900, "echo": True, "logprobs": 20, "max_tokens": 100, "n": 24}
    with serving(patience=Patience(stall=0.3), pages=600) as (loop, url):
        with deaf_reader(url, "/v1/completions", many | {"stream": True}):
            assert eventually(lambda: loop.open_requests > 0)
            assert eventually(lambda: loop.open_requests == 0)
        assert HTTP.post(f"{url}/v1/completions", json=COMPLETION).status_code == 200


@pytest.mark.parametrize("silence", [0.01, 10.0])
def test_a_stream_nobody_takes_is_closed_and_one_that_is_read_goes_on(silence: float):
    closed = list[str]()

    async def events(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"data: " + b"x" * 65_536 + b"\n\n"

    app = FastAPI()

    @app.post("/{count}/{stall}")
    async def stream(count: int, stall: float) -> Response:
        return EventStream(events(count), lambda: closed.append(str(count)), Patience(silence, stall))

    with BackgroundServer(app) as server:
        with deaf_reader(server.url, "/1000/0.5", {}):
            assert eventually(lambda: closed == ["1000"])
        got = bytearray()
        with deaf_reader(server.url, "/99/60", {}) as client:
            while not got.endswith(b"\r\n0\r\n\r\n") and (more := client.recv(1_000_000)):
                got += more
    assert got.count(b"data: ") == 99


def bodies(stream: EventStream, seconds_each: float = 0) -> list[bytes]:
    """What a stream sends where each write takes so long."""
    sent: list[bytes] = []

    async def send(message: Message) -> None:
        await asyncio.sleep(seconds_each)
        sent.append(message.get("body", b""))

    asyncio.run(asyncio.wait_for(stream.stream_response(send), 60))
    return sent


def test_parts_of_an_answer_with_nothing_to_read_are_no_signs_of_life():
    """Half a tag, thinking that is hidden: the connection would be silent for as long as they come."""
    signs = list[bytes]()

    async def events() -> AsyncIterator[bytes]:
        while not signs:
            yield b""
            await asyncio.sleep(0)
        yield b"data: 1\n\n"

    def sign() -> bytes:
        signs.append(WAITING)
        return WAITING

    sent = bodies(EventStream(events(), lambda: None, Patience(silence=0.05), sign))
    assert b"".join(sent) == b"".join(signs) + b"data: 1\n\n"


def test_a_large_event_goes_out_in_pieces_without_signs_of_life_between():
    """Who reads it slowly makes room for a piece at a time, though not for all of it within the patience."""
    event = b"data: " + bytes(range(32, 127)) * 10_000 + b"\n\n"

    async def events() -> AsyncIterator[bytes]:
        yield event

    sent = bodies(EventStream(events(), lambda: None, Patience(silence=0.001)), seconds_each=0.01)
    assert max(map(len, sent)) <= PIECE
    assert event in b"".join(sent)
