"""The gateway: a key is an episode, ids are recorded as sampled, the agent gets a chat message back."""

import asyncio
import json
import random

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from longforge.chat import Tokenizer, encode_prompt, train_tokenizer
from longforge.forge.engine_client import EngineClient
from longforge.forge.gateway import Gateway, Policy, call_seed
from longforge.forge.memory_pool import MemoryPool
from longforge.protocol import Episode, Group, Message

CONTEXT = 400
TOOL = {
    "type": "function",
    "function": {
        "name": "grep",
        "parameters": {"type": "object", "properties": {"pattern": {"type": "string"}}},
    },
}
CALL = (
    '<mm:think>look</mm:think>\n]<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="grep">'
    "]<]minimax[>[<pattern>class Foo]<]minimax[>[</pattern>]<]minimax[>[</invoke>\n"
    "]<]minimax[>[</tool_call>[e~["
)


class CannedEngine:
    """A completions endpoint that answers with given texts in turn, and keeps what it was asked."""

    def __init__(self, tokenizer: Tokenizer, answers: list[str]) -> None:
        self.asked: list[dict] = []
        self._tokenizer = tokenizer
        self._answers = answers
        self.app = FastAPI()
        self.app.add_api_route("/v1/completions", self.complete, methods=["POST"])

    async def complete(self, request: Request) -> JSONResponse:
        body = json.loads(await request.body())
        self.asked.append(body)
        answer = self._answers[min(len(self.asked), len(self._answers)) - 1]
        if answer == "BROKEN":
            return JSONResponse({"error": {"message": "out of pages"}}, 500)
        ids = self._tokenizer.encode(answer)[: body["max_tokens"]]
        choice = {
            "token_ids": ids,
            "logprobs": {"token_logprobs": [-0.25] * len(ids)},
            "weight_versions": [3] * len(ids),
            "finish_reason": "stop" if ids[-1] == self._tokenizer.eos_id else "length",
        }
        return JSONResponse({"choices": [choice]})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["which file defines class Foo? grep read pattern path answer is"] * 3, 320)


class Bench:
    """A gateway over a canned engine and a memory pool, with one episode submitted."""

    def __init__(self, tokenizer: Tokenizer, answers: list[str], policy: Policy | None = None) -> None:
        self.tokenizer = tokenizer
        self.engine = CannedEngine(tokenizer, answers)
        self.pool = MemoryPool()
        self.pool.submit(Group("g", 0, (Episode("g/0", "g", {}),)), phase="train", step=0)
        client = EngineClient("http://engine", "m", transport=httpx.ASGITransport(self.engine.app))
        self.gateway = Gateway(
            tokenizer=tokenizer,
            engine=client,
            pool=self.pool,
            family="m3",
            context=CONTEXT,
            model_name="m",
            seed=11,
        )
        self.key = self.gateway.issue_key("g/0", policy or Policy(max_tokens=200))

    def post(self, *bodies: dict, key: str | None = None) -> list[httpx.Response]:
        async def run() -> list[httpx.Response]:
            headers = {"Authorization": f"Bearer {self.key if key is None else key}"}
            transport = httpx.ASGITransport(self.gateway.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                return [await client.post("/v1/chat/completions", json=b, headers=headers) for b in bodies]

        return asyncio.run(run())

    @property
    def calls(self):
        return self.pool.group("g").episodes[0].calls


def ask(*messages: dict, **fields) -> dict:
    turns = list(messages) or [{"role": "user", "content": "which file defines class Foo?"}]
    return {"model": "m", "messages": turns, **fields}


def test_a_call_is_recorded_as_sampled_and_answered_as_a_message(tokenizer):
    bench = Bench(tokenizer, [CALL])
    (response,) = bench.post(ask(tools=[TOOL]))
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == "look"
    function = choice["message"]["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("grep", {"pattern": "class Foo"})
    (call,) = bench.calls
    assert call.prompt_ids == tuple(bench.engine.asked[0]["prompt"])
    assert call.sampled_ids == tuple(tokenizer.encode(CALL))
    assert call.sampled_ids[-1] == tokenizer.eos_id, "the sampled end of turn is trained on too"
    assert call.logprobs == (-0.25,) * len(call.sampled_ids)
    assert set(call.versions) == {3} and call.stop_reason == "stop" and call.parent_id is None


def test_a_reply_sent_back_extends_the_recorded_ids_and_names_its_parent(tokenizer):
    bench = Bench(tokenizer, [CALL, "foo.py[e~["])
    (first,) = bench.post(ask(tools=[TOOL]))
    message = first.json()["choices"][0]["message"]
    tool = {"role": "tool", "content": "foo.py:1: class Foo", "tool_call_id": message["tool_calls"][0]["id"]}
    (second,) = bench.post(ask(ask()["messages"][0], message, tool, tools=[TOOL]))
    assert second.json()["choices"][0]["message"]["content"] == "foo.py"
    one, two = bench.calls
    assert two.parent_id == one.call_id
    assert two.prompt_ids[: len(one.prompt_ids) + len(one.sampled_ids)] == one.prompt_ids + one.sampled_ids


def test_an_unknown_or_ended_key_is_refused(tokenizer):
    bench = Bench(tokenizer, ["hello[e~["])
    for key in ("", "lf-guess"):
        (response,) = bench.post(ask(), key=key)
        assert response.status_code == 401
        assert "key of an episode that is running" in response.json()["error"]["message"]
    bench.pool.finish_episode("g/0", reward=0.0, outcome="deadline", record={})
    (late,) = bench.post(ask())
    assert late.status_code == 401 and bench.calls == (), "an answer after the deadline is not kept"
    bench.gateway.revoke(bench.key)
    (revoked,) = bench.post(ask())
    assert revoked.status_code == 401 and len(bench.engine.asked) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"logit_fun": {}}, "logit_fun: this server does not support the field"),
        ({"logit_bias": {"5": 1}}, "logit_bias: a run does not serve it"),
        ({"n": 2}, "n: a run does not serve it"),
        ({"logprobs": True}, "logprobs: a run does not serve it"),
        ({"presence_penalty": 0.5}, "presence_penalty: a run does not serve it"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice: a run does not serve it"),
        ({"response_format": {"type": "json_object"}}, "response_format: a run does not serve it"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls: a run does not serve it"),
        ({"stop": ["x"]}, "stop: a run does not serve it"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 900}]}, f"at most {CONTEXT} tokens fit"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_it(tokenizer, body, words):
    bench = Bench(tokenizer, ["hello[e~["])
    (response,) = bench.post(ask() | body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert bench.engine.asked == [] and bench.calls == ()


def test_the_run_decides_how_to_sample(tokenizer):
    fixed = Bench(tokenizer, ["hi[e~["], Policy(max_tokens=50, temperature=1.0))
    fixed.post(ask(temperature=0.1, top_p=0.5, max_tokens=7), ask(max_tokens=90))
    assert [a["max_tokens"] for a in fixed.engine.asked] == [7, 50], "an agent may ask for fewer tokens"
    assert fixed.engine.asked[0]["temperature"] == 1.0 and "top_p" not in fixed.engine.asked[0]
    free = Bench(tokenizer, ["hi[e~["], Policy(max_tokens=50, allow_request_sampling=True))
    free.post(ask(temperature=0.1, top_p=0.5, thinking={"type": "enabled"}))
    assert (free.engine.asked[0]["temperature"], free.engine.asked[0]["top_p"]) == (0.1, 0.5)
    thinking = encode_prompt(
        tokenizer, [Message("user", ask()["messages"][0]["content"])], thinking="enabled"
    )
    assert free.engine.asked[0]["prompt"] == thinking


def test_the_answer_is_cut_where_the_context_ends(tokenizer):
    bench = Bench(tokenizer, ["word " * 300], Policy(max_tokens=10_000))
    (response,) = bench.post(ask())
    (call,) = bench.calls
    assert response.json()["choices"][0]["finish_reason"] == "length" and call.stop_reason == "length"
    assert bench.engine.asked[0]["max_tokens"] == CONTEXT - len(call.prompt_ids)


def test_seeds_depend_on_run_episode_and_call_alone(tokenizer):
    bench = Bench(tokenizer, ["hi[e~["])
    bench.post(ask(), ask())
    seeds = [asked["seed"] for asked in bench.engine.asked]
    assert seeds == [call_seed(11, "g/0", 0), call_seed(11, "g/0", 1)]
    rng = random.Random(0)
    names = {(rng.randrange(9), f"e{rng.randrange(99)}", rng.randrange(9)) for _ in range(500)}
    assert len({call_seed(*name) for name in names}) == len(names)


def test_an_engine_that_fails_is_a_502_and_leaves_no_call(tokenizer):
    bench = Bench(tokenizer, ["BROKEN"])
    (response,) = bench.post(ask())
    assert response.status_code == 502 and "out of pages" in response.json()["error"]["message"]
    assert bench.calls == ()


def test_a_stream_carries_the_same_message(tokenizer):
    bench = Bench(tokenizer, [CALL])
    (response,) = bench.post(ask(tools=[TOOL], stream=True, stream_options={"include_usage": True}))
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "look"
    assert [d["tool_calls"][0]["function"]["name"] for d in deltas if "tool_calls" in d] == ["grep"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert chunks[-1]["usage"]["completion_tokens"] == len(bench.calls[0].sampled_ids)
