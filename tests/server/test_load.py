"""Many clients at once, good and bad: everyone well-behaved is served right, and nothing is left behind."""

import asyncio
import gc
import json
import logging
import time
from typing import Any

import pytest

from load_clients import Client, crowd, said
from load_server import TENANTS, descriptors, eventually, idle, python_threads, resident_bytes, serving

GROWTH = 300 * 2**20
"""Bytes by which the whole process, clients included, may grow."""


async def _all_at_once(clients: list[Client], port: int) -> None:
    await asyncio.gather(*(client.ask(port) for client in clients))


def _key(client: Client) -> str:
    body = {
        name: value for name, value in json.loads(client.body).items() if name not in ("stream", "priority")
    }
    return client.path + json.dumps(body, sort_keys=True)


def _answers_alone(clients: list[Client]) -> dict[str, tuple[str, str]]:
    """What each question gets from a server that does nothing else, keeps no pages and streams nothing."""
    alone: dict[str, tuple[str, str]] = {}
    with serving(tenants=TENANTS, prefix_cache=False, max_running=1) as (_, url):
        port = int(url.rpartition(":")[2])
        for client in clients:
            name = _key(client)
            if name not in alone:
                body = {key: value for key, value in json.loads(client.body).items() if key != "priority"}
                quiet = json.dumps(body | {"stream": False}).encode()
                asked = Client(client.path, quiet, client.tenant, "polite")
                asyncio.run(asked.ask(port))
                assert asked.status == 200, asked.reply
                alone[name] = said(asked.path, asked.reply)
    return alone


def _abuse(seed: int, count: int, caplog: Any) -> None:
    clients = crowd(seed, count, TENANTS)
    served = [client for client in clients if client.manner in ("polite", "slow")]
    expected = _answers_alone(served)
    gc.collect()
    threads, files, memory = python_threads(), descriptors(), resident_bytes()
    with serving(tenants=TENANTS, pages=420, max_running=12, max_batch_tokens=128) as (loop, url):
        logging.getLogger("uvicorn").addHandler(caplog.handler)  # it does not propagate
        asyncio.run(_all_at_once(clients, int(url.rpartition(":")[2])))
        assert eventually(lambda: idle(loop)), loop.stats()
        loop.engine.check_pages()
        assert loop.failure is None and loop.page_check_failures == 0
        assert loop.stats().preemptions + loop.stats().prefix_hit_tokens > 0, "this was no load"
    logging.getLogger("uvicorn").removeHandler(caplog.handler)
    wrong = [client for client in served if client.status != 200]
    assert not wrong, (len(wrong), wrong[0], wrong[0].reply)
    for client in served:
        assert said(client.path, client.reply) == expected[_key(client)], client
    for client in clients:
        if client.manner == "bad":
            assert 400 <= client.status < 500, (client.status, client.path, client.body[:200])
            assert json.loads(client.reply)["error"]["message"]
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert eventually(lambda: python_threads() <= threads and descriptors() <= files + 2)
    gc.collect()
    assert resident_bytes() - memory < GROWTH


def test_a_hundred_clients_of_every_kind(caplog: Any):
    _abuse(1, 100, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_five_hundred_clients_of_every_kind(seed: int, caplog: Any):
    started = time.monotonic()
    _abuse(seed, 500, caplog)
    assert time.monotonic() - started < 280, "it is stuck rather than slow"
