"""One request goes wrong in the engine: it alone is told, in its dialect; everybody else gets their bytes."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from load_clients import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Client, events, said
from load_server import eventually, idle, serving
from longforge.engine import Engine
from longforge.engine.grammar import Matcher
from longforge.errors import InputError
from longforge.model import CausalLM
from serve_process import longforge_serve
from small_model import small_model, small_tokenizer, write_small_checkpoint
from small_server import HTTP

BAD_WORD = "字"
FINE = {"model": "small", "prompt": [21, 22, 23, 24, 25, 26], "max_tokens": 40, "temperature": 0}
TALKS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": BAD_WORD}], "max_tokens": 9},
    COMPLETIONS: {"prompt": BAD_WORD, "max_tokens": 9},
    RESPONSES: {"input": BAD_WORD, "max_output_tokens": 19},
    MESSAGES: {"messages": [{"role": "user", "content": BAD_WORD}], "max_tokens": 9},
}


def poisoned() -> CausalLM:
    """Whoever's prompt holds BAD_WORD gets logits that are no numbers."""
    model = small_model(max_positions=1024)
    tokenizer = small_tokenizer()
    with torch.no_grad():
        for token in tokenizer.encode(BAD_WORD):
            model.model.embed_tokens.weight[token] = torch.nan
    return model


def together(url: str, *asked: tuple[str, dict[str, Any]]) -> list[Client]:
    clients = [Client(path, json.dumps(body).encode(), "", "polite") for path, body in asked]

    async def ask() -> None:
        await asyncio.gather(*(client.ask(int(url.rpartition(":")[2])) for client in clients))

    asyncio.run(ask())
    return clients


def told(path: str, reply: bytes) -> str:
    """The message of a stream's last event, which must be an error in the dialect's form."""
    last = events(reply)[-1]
    if path == RESPONSES:
        assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
        return last["response"]["error"]["message"]
    if path == MESSAGES:
        assert last["type"] == "error"
    return last["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", list(TALKS))
def test_logits_that_are_no_numbers_break_off_that_answer_and_no_other(path: str, stream: bool):
    with serving(poisoned()) as (loop, url):
        alone = HTTP.post(url + COMPLETIONS, json=FINE).content
        broken = TALKS[path] | {"model": "small", "temperature": 0, "stream": stream}
        fine, wrong, other = together(url, (COMPLETIONS, FINE), (path, broken), (COMPLETIONS, FINE))
        assert said(COMPLETIONS, fine.reply) == said(COMPLETIONS, other.reply) == said(COMPLETIONS, alone)
        if stream:
            assert (wrong.status, b"[DONE]" in wrong.reply) == (200, False)
            message = told(path, wrong.reply)
        else:
            body = json.loads(wrong.reply)
            assert wrong.status >= 500 or body.get("status") == "failed", wrong
            message = body["error"]["message"]
        assert "not finite" in message and "\n" not in message
        assert loop.failure is None and loop.stats().failed == 1
        assert eventually(lambda: idle(loop))
        loop.engine.check_pages()


class TiredMatcher(Matcher):
    """Gives up as the library does when a grammar becomes too much work: after six tokens."""

    seen = 0

    def accept(self, token: int) -> None:
        self.seen += 1
        super().accept(token)
        if self.seen == 6 and self.in_accept:
            raise InputError("grammar: too much work")

    def masks(self, drafts: Any = ()) -> Any:
        if self.seen >= 6 and not self.in_accept:
            raise InputError("grammar: too much work")
        return super().masks(drafts)

    in_accept = False


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("in_accept", [False, True])
def test_a_grammar_that_becomes_too_much_work_breaks_off_its_own_answer(
    drafts: int, in_accept: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("longforge.engine.grammar.Matcher", TiredMatcher)
    monkeypatch.setattr(TiredMatcher, "in_accept", in_accept)
    schema = {"name": "letters", "strict": True, "schema": {"type": "string", "pattern": "^[a-z]{30}$"}}
    constrained: dict[str, Any] = TALKS[CHAT] | {"model": "small", "stream": True, "max_tokens": 40}
    constrained["response_format"] = {"type": "json_schema", "json_schema": schema}
    constrained["thinking"] = {"type": "disabled"}
    with serving(drafts=drafts) as (loop, url):
        alone = HTTP.post(url + COMPLETIONS, json=FINE).content
        fine, wrong = together(url, (COMPLETIONS, FINE), (CHAT, constrained))
        assert said(COMPLETIONS, fine.reply) == said(COMPLETIONS, alone)
        assert "too much work" in told(CHAT, wrong.reply)
        assert len(events(wrong.reply)) > 2, "it had begun"
        assert loop.failure is None and eventually(lambda: idle(loop))
        loop.engine.check_pages()


def test_stop_strings_that_never_come_cost_nobody_anything():
    with serving() as (loop, url):
        alone = HTTP.post(url + COMPLETIONS, json=FINE).content
        stops = [chr(0x4E00 + i) * 50 for i in range(4)]
        for stream in (False, True):
            (reply,) = together(url, (COMPLETIONS, FINE | {"stop": stops, "stream": stream}))
            assert said(COMPLETIONS, reply.reply) == said(COMPLETIONS, alone)
        assert eventually(lambda: idle(loop))


class BrokenEngine(Engine):
    """Fails as a bug would, after some steps."""

    left = 8

    def step(self) -> Any:
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError
        return super().step()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_engine_is_told_to_everyone_who_waits_and_to_probes():
    with serving(engine_class=BrokenEngine) as (loop, url):
        talks = [(path, body | {"model": "small"}) for path, body in TALKS.items()]
        streams = [(path, body | {"stream": True}) for path, body in talks]
        many = [
            (path, body | {"max_tokens" if path != RESPONSES else "max_output_tokens": 200, "temperature": 0})
            for path, body in [*talks, *streams]
        ]
        answers = together(url, *many)
        for answer in answers:
            assert b"it has failed" in answer.reply, answer
        assert loop.crashed
        for path in ("/health", "/ready"):
            assert HTTP.get(url + path).status_code == 503
        late = HTTP.post(url + COMPLETIONS, json=FINE)
        assert late.status_code == 503 and "it has failed" in late.json()["error"]["message"]
        assert eventually(lambda: loop.open_requests == 0)
        assert HTTP.get(url + "/metrics").status_code == 200


FAILING = """
from longforge.engine import Engine
step, left = Engine.step, [40]
def failing(self):
    left[0] -= 1
    if left[0] == 0:
        raise ZeroDivisionError
    return step(self)
Engine.step = failing
"""


def test_a_server_whose_engine_failed_ends_with_a_code_of_its_own(tmp_path: Path):
    folder = write_small_checkpoint(tmp_path / "small", max_positions=8192)
    with longforge_serve(folder, before=FAILING) as (process, url):
        reply = HTTP.post(url + COMPLETIONS, json=FINE | {"max_tokens": 1000})
        assert reply.status_code == 503 and "it has failed" in reply.json()["error"]["message"]
        assert process.wait(60) == 70
        assert process.stderr is not None
        errors = process.stderr.read()
    assert "ZeroDivisionError" in errors
    assert errors.splitlines()[-1].startswith("longforge: engine: it has failed")
