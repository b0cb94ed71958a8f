"""What an operator and a machine do to a server: kill it, stop it, fill its disk, press Ctrl-C twice."""

import asyncio
import contextlib
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from load_clients import COMPLETIONS, Client, events, said
from load_server import eventually
from serve_process import longforge_serve
from slow_steps import SLOW_STEPS
from small_model import write_small_checkpoint
from small_server import HTTP

ASKED = {"model": "small", "prompt": [1, 2, 3], "temperature": 0, "ignore_eos": True}
FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("model") / "small", max_positions=8192)


def prompts(count: int) -> list[list[int]]:
    return [[(7 * i + j) % 250 for j in range(90)] for i in range(count)]


def answer(url: str, prompt: list[int], most: int = 5) -> str:
    reply = HTTP.post(url + COMPLETIONS, json=ASKED | {"prompt": prompt, "max_tokens": most})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def figure(url: str, name: str) -> float:
    """A figure of the file tier."""
    lines = HTTP.get(f"{url}/metrics").text.splitlines()
    (value,) = [line.split()[-1] for line in lines if line.startswith(f"longforge:tier_{name}{{")]
    return float(value)


@pytest.mark.slow
def test_a_server_killed_while_it_writes_pages_leaves_none_that_mislead(folder: Path, tmp_path: Path):
    pages = ("--file-cache", str(tmp_path / "pages"), "--file-cache-gib", "0.01")
    with longforge_serve(folder, *pages) as (process, url):
        expected = [answer(url, prompt) for prompt in prompts(12)]
        assert eventually(lambda: figure(url, "stored_total") > 0)
        more = [
            threading.Thread(target=lambda p=p: _until_it_dies(url, p), daemon=True) for p in prompts(24)[12:]
        ]
        for thread in more:
            thread.start()
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for thread in more:
            thread.join()
    with longforge_serve(folder, *pages) as (process, url):
        assert [answer(url, prompt) for prompt in prompts(12)] == expected
        assert figure(url, "hits_total") > 0, "what was written whole is found"
        assert figure(url, "failures_total") == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def _until_it_dies(url: str, prompt: list[int]) -> None:
    with contextlib.suppress(httpx.HTTPError):
        answer(url, prompt)


def test_pages_that_wait_are_written_when_the_server_ends(folder: Path, tmp_path: Path):
    pages = ("--file-cache", str(tmp_path / "pages"), "--host-cache", "0.01")
    prompt = prompts(1)[0]
    with longforge_serve(folder, *pages) as (process, url):
        expected = answer(url, prompt)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    with longforge_serve(folder, *pages) as (process, url):
        body = ASKED | {"prompt": prompt, "max_tokens": 5}
        reply = HTTP.post(url + COMPLETIONS, json=body).json()
        assert reply["choices"][0]["text"] == expected
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 88


def test_a_full_disk_costs_the_files_and_no_answer(folder: Path, tmp_path: Path):
    pages = ("--file-cache", str(tmp_path / "pages"))
    with longforge_serve(folder, *pages, before=FULL_DISK) as (process, url):
        first = [answer(url, prompt) for prompt in prompts(3)]
        assert eventually(lambda: figure(url, "stopped") == 1)
        assert figure(url, "failures_total") > 0 and figure(url, "stored_total") == 0
        assert [answer(url, prompt) for prompt in prompts(3)] == first
        assert HTTP.get(f"{url}/ready").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def many(url: str, count: int, most: int) -> tuple[threading.Thread, list[Client]]:
    """Streams that are read by another thread."""
    body = json.dumps(ASKED | {"max_tokens": most, "stream": True}).encode()
    clients = [Client(COMPLETIONS, body, "", "polite") for _ in range(count)]

    async def ask() -> None:
        await asyncio.gather(*(client.ask(int(url.rpartition(":")[2])) for client in clients))

    reader = threading.Thread(target=lambda: asyncio.run(ask()), daemon=True)
    reader.start()
    return reader, clients


def busy(url: str, requests: int) -> bool:
    health: dict[str, Any] = HTTP.get(f"{url}/health").json()
    return health["running"] + health["waiting"] == requests


def test_at_sigterm_fifty_open_streams_end_whole(folder: Path):
    crowd = ("--drain-seconds", "200", "--max-running", "64")
    with longforge_serve(folder, *crowd, before=SLOW_STEPS) as (process, url):
        reader, clients = many(url, 50, 300)
        assert eventually(lambda: busy(url, 50))
        process.send_signal(signal.SIGTERM)
        assert eventually(lambda: HTTP.get(f"{url}/ready").status_code == 503)
        assert HTTP.post(url + COMPLETIONS, json=ASKED).status_code == 503
        reader.join()
        assert process.wait(60) == 0
    (whole,) = {said(client.path, client.reply) for client in clients}
    assert whole[1] == "length" and all(client.reply.endswith(b"data: [DONE]\n\n") for client in clients)


@pytest.mark.slow
def test_ctrl_c_twice_ends_fifty_streams_with_an_error_each(folder: Path):
    crowd = ("--drain-seconds", "1000", "--max-running", "64")
    with longforge_serve(folder, *crowd, before=SLOW_STEPS) as (process, url):
        reader, clients = many(url, 50, 8000)
        assert eventually(lambda: busy(url, 50))
        process.send_signal(signal.SIGINT)
        assert eventually(lambda: HTTP.get(f"{url}/ready").status_code == 503)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        reader.join()
        assert process.stderr is not None and process.stderr.read() == ""
    for client in clients:
        assert "shutting down" in events(client.reply)[-1]["error"]["message"]


@pytest.mark.slow
def test_a_server_that_is_stopped_and_continued_goes_on_where_it_was(folder: Path):
    with longforge_serve(folder, before=SLOW_STEPS) as (process, url):
        alone = answer(url, [1, 2, 3], 150)
        reader, clients = many(url, 5, 150)
        assert eventually(lambda: busy(url, 5))
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        reader.join()
        assert {said(client.path, client.reply)[0] for client in clients} == {f"|{alone}"}
        assert HTTP.get(f"{url}/ready").status_code == 200
