"""A real `longforge serve` and a signal: what is open ends as it should, and so does the process."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_process import longforge_serve
from slow_steps import SLOW_STEPS
from small_model import write_small_checkpoint
from small_server import HTTP

LONG = {"model": "small", "prompt": [1, 2, 3], "max_tokens": 4000, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("model") / "small", max_positions=8192)


def events(lines: Iterator[str]) -> list[Any]:
    data = [line.removeprefix("data: ") for line in lines if line]
    return [event if event == "[DONE]" else json.loads(event) for event in data]


def test_the_first_signal_lets_an_open_answer_end_and_takes_no_other(folder: Path):
    with longforge_serve(folder, "--drain-seconds", "100", before=SLOW_STEPS) as (process, url):
        body = {**LONG, "max_tokens": 400}
        with HTTP.stream("POST", f"{url}/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            while (ready := HTTP.get(f"{url}/ready")).status_code == 200:
                pass
            assert ready.status_code == 503
            refused = HTTP.post(f"{url}/v1/completions", json={**LONG, "stream": False})
            assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
            rest = events(lines)
        assert rest[-1] == "[DONE]" and rest[-2]["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 0


@pytest.mark.parametrize(("seconds", "signals"), [("0.2", 1), ("1000", 2)])
def test_when_time_is_up_or_at_the_second_signal_open_answers_end_with_an_error(
    folder: Path, seconds: str, signals: int
):
    with longforge_serve(folder, "--drain-seconds", seconds, before=SLOW_STEPS) as (process, url):
        with HTTP.stream("POST", f"{url}/v1/completions", json={**LONG, "max_tokens": 8000}) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            if signals == 2:
                while HTTP.get(f"{url}/ready").status_code == 200:
                    pass
                process.send_signal(signal.SIGTERM)
            rest = events(lines)
        assert "shutting down" in rest[-1]["error"]["message"]
        assert process.wait(60) == 0


def test_keys_from_a_file_guard_a_server(folder: Path, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("ann:key-of-ann-1\n")
    with longforge_serve(folder, "--api-key-file", str(keys)) as (process, url):
        assert HTTP.get(f"{url}/v1/models").status_code == 401
        allowed = HTTP.get(f"{url}/v1/models", headers={"Authorization": "Bearer key-of-ann-1"})
        assert allowed.status_code == 200
        foreign = httpx.get(f"{url}/health", headers={"Host": "evil.example"}, trust_env=False)
        assert foreign.status_code == 403
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_without_a_limit_draining_ends_when_the_last_answer_does(folder: Path):
    with longforge_serve(folder, "--drain-seconds", "inf", before=SLOW_STEPS) as (process, url):
        with HTTP.stream("POST", f"{url}/v1/completions", json={**LONG, "max_tokens": 300}) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert events(lines)[-1] == "[DONE]"
        assert process.wait(60) == 0
