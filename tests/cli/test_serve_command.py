"""`longforge serve` as a process: ready line, requests, Ctrl-C and SIGTERM, port in use."""

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from longforge.engine.drafts import PROBE_TOKENS
from longforge.model import CausalLM
from slow_steps import SLOW_STEPS
from small_model import small_config, small_tokenizer
from small_server import HTTP


@contextmanager
def serve_process(
    folder: Path, *options: str, before: str = ""
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """before: Python that the process runs first."""
    code = f"{before}\nfrom longforge.cli import main\nmain()"
    command = [
        sys.executable,
        *(("-c", code) if before else ("-m", "longforge.cli")),
        "serve",
        str(folder),
        "--threads",
        "1",
        "--port",
        "0",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127.0.0.1:\d+/v1", line)
        assert found, (line, process.stderr and process.stderr.read())
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_told_to_stop_and_leaves_quietly(folder: Path, ending: signal.Signals):
    with serve_process(folder, "--name", "mine", "--drain-seconds", "0", before=SLOW_STEPS) as (process, url):
        assert HTTP.get(f"{url}/models").json()["data"][0]["id"] == "mine"
        # An answer that would take long is under way when the signal comes.
        body = {"model": "mine", "prompt": [1], "max_tokens": 1000, "temperature": 0}
        replies: list[httpx.Response] = []
        client = threading.Thread(target=lambda: replies.append(HTTP.post(f"{url}/completions", json=body)))
        client.start()
        while HTTP.get(url.replace("/v1", "/health")).json()["running"] == 0:
            assert client.is_alive()
        process.send_signal(ending)
        output, errors = process.communicate(timeout=60)
        client.join()
    # The rest of what it said at the start was read together with the first line.
    assert (process.returncode, output.strip(), errors) == (0, "", "")
    assert replies[0].status_code == 503 and "shutting down" in replies[0].text


def test_an_address_that_others_reach_without_a_key_is_told(folder: Path):
    command = [
        sys.executable,
        "-m",
        "longforge.cli",
        "serve",
        str(folder),
        "--host",
        "0.0.0.0",
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(10)]
    finally:
        process.kill()
        process.wait()
    assert "whoever reaches 0.0.0.0 may use this server; --api-key-file" in lines[-1]


def test_a_port_in_use_is_one_line_and_exit_code_2(folder: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "longforge.cli", "serve", str(folder), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"longforge: port {port}: it is in use on 127.0.0.1; name another one with --port\n"


def test_the_curl_line_it_prints_works(folder: Path):
    with serve_process(folder, "--context", "2048", "--dtype", "bfloat16") as (process, url):
        assert process.stdout is not None
        rows = {}
        while "active" not in rows:
            label, _, text = process.stdout.readline().strip().partition("  ")
            rows[label] = text.strip()
        command = shlex.split(rows["try it"])
        assert command[:2] == ["curl", f"{url}/chat/completions"]
        body = json.loads(command[command.index("-d") + 1])
        assert HTTP.post(command[1], json={**body, "max_tokens": 2}).json()["usage"]["completion_tokens"] <= 2
        assert HTTP.get(f"{url}/models").json()["data"][0]["max_model_len"] == 2048
        assert rows["computes"] == "CPU, bfloat16: as asked"
        assert rows["threads"] == "1: as asked"
        notice = process.stdout.readline()
        assert "made for 1,024 positions" in notice


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dtype", "float16"], "dtype: expected auto, bfloat16 or float32, got 'float16'"),
        (["--device", "abacus"], "device: expected auto, cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "cuda:99"], "got 'cuda:99'"),
        (["--host-cache", "1e9"], "host cache: expected at most"),
        (["--host-cache", "inf"], "host cache: expected a number of GiB, got inf"),
        (["--file-cache", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_what_is_not_there_is_one_line(folder: Path, options: list[str], said: str):
    command = [sys.executable, "-m", "longforge.cli", "serve", str(folder), "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_drafts_need_a_model_that_can_guess(tmp_path: Path):
    config = replace(small_config(), mtp_modules=0)
    CausalLM(config).save_pretrained(tmp_path)
    small_tokenizer().save(tmp_path)
    command = [sys.executable, "-m", "longforge.cli", "serve", str(tmp_path), "--port", "0", "--drafts", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "drafts: expected a model with an MTP module to guess with, it has none" in done.stderr
    assert done.stderr.count("\n") == 1


def test_drafts_and_tiers_are_told_and_at_work(folder: Path, tmp_path: Path):
    options = ("--drafts", "2", "--host-cache", "0.5", "--file-cache", str(tmp_path / "pages"))
    with serve_process(folder, *options, "--file-cache-gib", "1") as (process, url):
        assert process.stdout is not None
        active = next(line for line in process.stdout if line.startswith("  active"))
        assert "MTP speculation (2 drafted)" in active
        assert "tiers (host memory 0.5 GiB, files 1 GiB)" in active
        # Where guesses are not worth their costs, one is tried every PROBE_TOKENS tokens all the same.
        tokens = 2 * PROBE_TOKENS + 2
        body = {"model": folder.name, "prompt": [1] * 400, "max_tokens": tokens, "ignore_eos": True}
        assert HTTP.post(f"{url}/completions", json=body).status_code == 200
        figures = HTTP.get(url.replace("/v1", "/metrics")).text
        assert f'longforge:tier_stored_total{{model_name="{folder.name}",tier="host"}} ' in figures
        assert f'longforge:tier_bytes{{model_name="{folder.name}",tier="files"}} ' in figures
        assert f'vllm:spec_decode_num_drafts_total{{model_name="{folder.name}"}} 0.0' not in figures
