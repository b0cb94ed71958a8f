"""Thinking that ends at a number of tokens, compared with the same answer asked for in steps by hand."""

import asyncio
import json
from typing import Any

import pytest

from longforge.chat import encode_prompt
from longforge.chat.constraint import Constraint
from longforge.engine import Engine
from longforge.engine.grammar import Grammars
from longforge.model import CausalLM
from longforge.protocol import Message, SamplingParams, StopReason
from longforge.server.answer import Answer
from longforge.server.engine_loop import EngineLoop
from longforge.server.service import Caller, Service
from longforge.server.turn import Turn
from small_model import small_model, small_tokenizer, teach

TALK = [Message("user", "Where?")]
GREEDY = SamplingParams(max_tokens=30, temperature=0.0)
CLOSE = "</mm:think>"


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """A model that thinks for long, and answers briefly wherever its thinking is cut after five tokens."""
    tokenizer = small_tokenizer()
    prompt = encode_prompt(tokenizer, TALK, thinking="enabled")
    thought = tokenizer.encode("which file defines the class return lines")
    close = tokenizer.encode(CLOSE)
    answer = [*tokenizer.encode("end"), tokenizer.eos_id]
    dialogues = [
        (prompt, [*thought, *close, *answer]),
        ([*prompt, *thought[:5], *close], answer),
    ]
    return teach(small_model(max_positions=256, hidden_size=192), dialogues)


def run(model: CausalLM, budget: int | None, *, draining: bool = False, **options: Any) -> Any:
    """(message, reason, sampled ids, thinking tokens) of one turn."""
    options = {"stops": (), "eager": False, "params": GREEDY, **options}

    async def turn() -> Any:
        grammars = Grammars(small_tokenizer(), model.config.vocab_size)
        loop = EngineLoop(Engine(model, pages=100, max_running=2, grammars=grammars), threads=1)
        loop.start()
        service = Service(loop, small_tokenizer(), "small")
        prompt = encode_prompt(small_tokenizer(), TALK, thinking="enabled")
        asked = Turn(service, Caller(), prompt, thinking="enabled", thinking_budget=budget, **options)
        if draining:
            loop.drain()
        try:
            parts = [part async for part in asked.parts()]
            assert loop.open_requests <= 1, "one request at a time"
        finally:
            asked.close()
            loop.stop()
        texts = {
            kind: "".join(d.text for part in parts for d in part.deltas if d.kind == kind)
            for kind in ("thinking", "content")
        }
        ids = [event.token_id for part in parts for event in part.events]
        assert [part.reason is not None for part in parts] == [False] * (len(parts) - 1) + [True]
        assert asked.completion_tokens == len(ids)
        return texts, parts[-1].reason, ids, asked.stop_string

    return asyncio.run(turn())


def test_within_the_budget_nothing_changes(model: CausalLM):
    free = run(model, None)
    assert free[0]["content"] == "end" and free[1] is StopReason.STOP
    assert run(model, 29) == free


@pytest.mark.parametrize("eager", [False, True])
def test_beyond_the_budget_the_thinking_is_closed_and_the_answer_goes_on(model: CausalLM, eager: bool):
    free = run(model, None)
    texts, reason, ids, _ = run(model, 5, eager=eager)
    assert ids[:5] == free[2][:5]
    assert texts == {"thinking": small_tokenizer().decode(ids[:5]), "content": "end"}
    assert reason is StopReason.STOP
    assert small_tokenizer().token_id(CLOSE) not in ids, "what closed the thinking was not sampled"


def test_every_budget_gives_what_two_requests_by_hand_give(model: CausalLM):
    tokenizer = small_tokenizer()
    prompt = encode_prompt(tokenizer, TALK, thinking="enabled")
    free = run(model, None)
    close = tokenizer.token_id(CLOSE)
    for budget in range(1, 30):
        head = free[2][:budget]
        open_still = len(head) == budget and close not in head
        by_hand = head + by_completion(model, [*prompt, *head, close], 30 - budget) if open_still else free[2]
        assert run(model, budget)[2] == by_hand, budget


def by_completion(model: CausalLM, prompt: list[int], limit: int) -> list[int]:
    async def whole() -> list[int]:
        loop = EngineLoop(Engine(model, pages=100, max_running=2), threads=1)
        loop.start()
        params = SamplingParams(max_tokens=limit, temperature=0.0, stop_token_ids=small_tokenizer().stop_ids)
        answer = Answer(loop, small_tokenizer(), prompt, params, eager=False)
        try:
            return [event.token_id for event in (await answer.whole()).events]
        finally:
            answer.close()
            loop.stop()

    return asyncio.run(whole())


def test_limit_stop_string_and_full_context_end_the_answer_in_either_leg(model: CausalLM):
    short = SamplingParams(max_tokens=6, temperature=0.0)
    texts, reason, ids, _ = run(model, 5, params=short)
    assert (len(ids), reason) == (6, StopReason.LENGTH) and texts["content"]
    assert run(model, 29, stops=("hich",))[3] == "hich"
    assert run(model, 5, stops=("nd",))[3] == "nd"
    long = SamplingParams(max_tokens=5000, temperature=0.0)
    assert run(model, 4999, params=long)[1] is StopReason.STOP


@pytest.mark.parametrize("budget", [5, 29, 200])
@pytest.mark.parametrize("seed", range(3))
def test_what_follows_the_thinking_obeys_its_grammar(model: CausalLM, budget: int, seed: int):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    fields = Constraint(schema={**schema, "additionalProperties": False})
    params = SamplingParams(max_tokens=230, seed=seed)
    texts, reason, ids, _ = run(model, budget, constraint=fields, params=params)
    assert len(ids) <= 230
    if reason is StopReason.STOP:
        assert json.loads(texts["content"]) in ({"ok": True}, {"ok": False})
    if budget == 5:
        assert len(small_tokenizer().encode(texts["thinking"])) <= 6
        assert texts["content"].lstrip().startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_under_a_grammar_does_not_end_in_its_thinking(stream: bool):
    tokenizer = small_tokenizer()
    prompt = encode_prompt(tokenizer, TALK, thinking="enabled")
    silent = teach(
        small_model(max_positions=256, hidden_size=192),
        [(prompt, [*tokenizer.encode("which"), tokenizer.eos_id])],
    )
    assert run(silent, 200, eager=stream)[0]["content"] == ""
    fields = Constraint(schema={"type": "object", "properties": {}, "additionalProperties": False})
    texts, _, ids, _ = run(silent, 20, constraint=fields, eager=stream)
    assert tokenizer.eos_id not in ids[:-1] and texts["content"].lstrip().startswith("{")


def test_a_server_that_drains_lets_an_answer_go_on_after_its_thinking(model: CausalLM):
    assert run(model, 5, draining=True) == run(model, 5)
