"""Many clients at once, good and bad: everyone well-behaved is served right, and nothing is left behind."""

import asyncio
import gc
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from load_clients import Client, crowd, said
from load_server import TENANTS, descriptors, eventually, idle, python_threads, resident_bytes, serving
from longforge.engine.draft_length import DraftCosts
from longforge.engine.page_mover import TierSettings
from longforge.server.engine_loop import EngineLoop

FREE = DraftCosts(rows=(1, 64), step=(1.0, 1.0), draft=(0.0, 0.0))
GROWTH = 300 * 2**20
"""Bytes by which the whole process, clients included, may grow."""


async def _all_at_once(clients: list[Client], loop: EngineLoop, port: int) -> None:
    """An operator is at work, too."""
    operator = asyncio.create_task(_operate(loop, port))
    await asyncio.gather(*(client.ask(port) for client in clients))
    operator.cancel()


async def _operate(loop: EngineLoop, port: int) -> None:
    while True:
        for path in ("/pause", "/reset_prefix_cache", "/resume"):
            asked = Client(path, b"", "admin", "polite")
            await asked.ask(port)
            assert asked.status == 200 or path == "/reset_prefix_cache", asked.reply
        await asyncio.sleep(0.2)


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


def _abuse(seed: int, count: int, caplog: Any, **sizes: Any) -> None:
    clients = crowd(seed, count, TENANTS)
    served = [client for client in clients if client.manner in ("polite", "slow")]
    expected = _answers_alone(served)
    gc.collect()
    threads, files, memory = python_threads(), descriptors(), resident_bytes()
    sizes = {"pages": 420, "max_running": 12, "max_batch_tokens": 128} | sizes
    with serving(tenants=(*TENANTS, "admin"), **sizes) as (loop, url):
        logging.getLogger("uvicorn").addHandler(caplog.handler)  # it does not propagate
        asyncio.run(_all_at_once(clients, loop, int(url.rpartition(":")[2])))
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
def test_a_hundred_clients_with_drafts_and_slower_tiers(caplog: Any, tmp_path: Path):
    tiers = TierSettings(2**20, tmp_path / "pages")
    _abuse(4, 100, caplog, drafts=2, draft_costs=FREE, tiers=tiers, pages=280)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_five_hundred_clients_of_every_kind(seed: int, caplog: Any):
    started = time.monotonic()
    _abuse(seed, 500, caplog)
    assert time.monotonic() - started < 280, "it is stuck rather than slow"
