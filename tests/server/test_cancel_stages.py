"""A client that hangs up at any stage of its request gives everything back at once."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from load_server import eventually, idle, serving
from longforge.chat import Tokenizer
from longforge.chat.tokenizer import LONG_TEXT
from longforge.engine.draft_length import DraftCosts
from longforge.engine.page_mover import TierSettings
from longforge.server.engine_loop import EngineLoop
from slow_steps import SlowEngine
from small_model import small_model
from small_server import HTTP

LONG = {"model": "small", "prompt": [1, 2, 3], "max_tokens": 900, "temperature": 0, "ignore_eos": True}
FREE = DraftCosts(rows=(1, 64), step=(1.0, 1.0), draft=(0.0, 0.0))


class StepByStep(SlowEngine):
    """Remembers what was held after each cancellation."""

    held: list[int]

    def cancel(self, request_id: str) -> bool:
        before = self.stats()
        found = super().cancel(request_id)
        after = self.stats()
        self.check_pages()
        self.held.append(after.pages - after.free_pages - after.cached_pages)
        assert after.running + after.waiting == before.running + before.waiting - found
        return found


@contextmanager
def hung_up(url: str, body: dict[str, Any], when: Callable[[], bool]) -> Iterator[None]:
    """Asks, and hangs up once `when` holds."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        assert eventually(when)
        yield


@contextmanager
def watched(**sizes: Any) -> Iterator[tuple[EngineLoop, str]]:
    StepByStep.held = []
    with serving(engine_class=StepByStep, **sizes) as served:
        yield served


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["queued", "chunk", "decode", "verify"])
def test_whoever_hangs_up_holds_nothing_any_more(stage: str, stream: bool):
    drafts = {"drafts": 2, "draft_costs": FREE} if stage == "verify" else {}
    with watched(max_running=1, max_batch_tokens=1 if stage == "chunk" else 4, **drafts) as (loop, url):
        body = LONG | {"stream": stream}
        if stage == "queued":
            with hung_up(url, body, lambda: loop.stats().running == 1):
                with hung_up(url, body, lambda: loop.stats().waiting == 1):
                    pass
                assert eventually(lambda: loop.stats().cancelled == 1)
                assert (loop.stats().waiting, loop.stats().running) == (0, 1), "the other goes on"
        elif stage == "chunk":
            long_prompt = body | {"prompt": [i % 200 for i in range(900)], "max_tokens": 9}
            with hung_up(url, long_prompt, lambda: loop.stats().prompt_tokens > 40):
                assert loop.stats().generated_tokens == 0
        elif stage == "decode":
            with hung_up(url, body, lambda: loop.stats().generated_tokens > 10):
                pass
        else:
            with hung_up(url, body, lambda: loop.stats().drafts > 3):
                pass
        assert eventually(lambda: idle(loop))
        assert StepByStep.held[-1] == 0, "all pages are back when cancelling is done"
        assert loop.stats().finished == 0 and loop.failure is None
        alone = HTTP.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 5}).json()
        assert alone["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_hangs_up_while_a_long_text_is_encoded_holds_nothing_any_more(
    stream: bool, monkeypatch: pytest.MonkeyPatch
):
    begun, gone = threading.Event(), threading.Event()

    def encode(self: Tokenizer, text: str, *, special: bool = True) -> list[int]:
        begun.set()
        assert gone.wait(60)
        return [1, 2, 3]

    monkeypatch.setattr(Tokenizer, "encode", encode)
    with watched(model=small_model(max_positions=LONG_TEXT)) as (loop, url):
        with hung_up(url, LONG | {"prompt": "a" * LONG_TEXT, "stream": stream}, begun.is_set):
            pass
        other = HTTP.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 5})
        assert other.status_code == 200, "the others' answers go on meanwhile"
        loop.pause()  # so that it cannot be done before it is known that nobody waits for it
        gone.set()
        assert eventually(lambda: loop.stats().cancelled == 1)
        assert eventually(lambda: idle(loop))
        assert loop.stats().finished == 1 and loop.failure is None


def test_what_a_tenant_computes_does_not_depend_on_what_another_sent():
    prompt = [5 + i % 90 for i in range(121)]

    def computed(first: str | None) -> tuple[int, dict[str, Any]]:
        """Prompt tokens that bob's request cost, and its usage, after `first` sent the same."""
        with serving(tenants=("ann", "bob")) as (loop, url):

            def ask(tenant: str) -> dict[str, Any]:
                key = {"Authorization": f"Bearer key-of-{tenant}-1234"}
                asked = LONG | {"prompt": prompt, "max_tokens": 3}
                return HTTP.post(f"{url}/v1/completions", json=asked, headers=key).json()["usage"]

            if first is not None:
                ask(first)
            before = loop.stats().prompt_tokens
            usage = ask("bob")
            assert eventually(lambda: idle(loop))
            return loop.stats().prompt_tokens - before, usage

    nobody, ann, bob = computed(None), computed("ann"), computed("bob")
    assert nobody == ann and nobody[0] == len(prompt)
    assert nobody[1]["prompt_tokens_details"]["cached_tokens"] == 0
    assert bob[0] == 1 and bob[1]["prompt_tokens_details"]["cached_tokens"] == 120


@pytest.mark.parametrize("tiers", ["host", "files"])
def test_nor_do_the_slower_tiers_tell_one_tenant_of_another(tiers: str, tmp_path: Any):
    settings = TierSettings(2**22) if tiers == "host" else TierSettings(folder=tmp_path / "pages")
    prompt = [5 + i % 90 for i in range(61)]
    with serving(tenants=("ann", "bob"), tiers=settings) as (loop, url):
        cached = []
        for tenant in ("ann", "bob", "bob"):
            key = {"Authorization": f"Bearer key-of-{tenant}-1234"}
            asked = LONG | {"prompt": prompt, "max_tokens": 3}
            usage = HTTP.post(f"{url}/v1/completions", json=asked, headers=key).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
            loop.engine.reset_cache()
            assert loop.engine._mover is not None and loop.engine._mover._tiers.flush(30)
        assert cached == [0, 0, 60], "only bob finds what bob left"
        assert loop.stats().prompt_tokens == 2 * len(prompt) + 1
