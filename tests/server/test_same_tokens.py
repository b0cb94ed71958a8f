"""The same conversation gives the same answer in Chat Completions, Messages and Responses."""

import json
from typing import Any

import pytest

from small_server import FOUND, HTTP, Served

SCHEMA = {"type": "object", "properties": {"limit": {"type": "integer"}}}
SYSTEM = "Be brief."
THINKING = {"adaptive": "medium", "enabled": "high", "disabled": "none"}
"""Thinking modes and the Responses dialect's words for them."""


def post(served: Served, path: str, body: dict[str, Any]) -> Any:
    greedy = {"model": "small", "temperature": 0}
    reply = HTTP.post(f"{served.url}{path}", json={**greedy, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def chat(served: Served, mode: str, tools: bool, rounds: int, system: bool, limit: int) -> Any:
    call = {"id": "c1", "type": "function", "function": {"name": "grep", "arguments": '{"limit": 3}'}}
    history: list[Any] = [{"role": "system", "content": SYSTEM}] * system
    history += [{"role": "user", "content": "Where?"}]
    if rounds:
        history += [
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "a.py"},
        ]
    function = {"name": "grep", "description": "", "parameters": SCHEMA}
    body = {"messages": history, "max_tokens": limit, "thinking": {"type": mode}}
    tool = {"tools": [{"type": "function", "function": function}]} if tools else {}
    reply = post(served, "/v1/chat/completions", {**body, **tool})
    message = reply["choices"][0]["message"]
    calls = [
        (c["function"]["name"], json.loads(c["function"]["arguments"]))
        for c in message.get("tool_calls") or ()
    ]
    usage = reply["usage"]
    tokens = (usage["prompt_tokens"], usage["completion_tokens"])
    return message.get("reasoning_content") or "", message["content"] or "", calls, tokens


def messages(served: Served, mode: str, tools: bool, rounds: int, system: bool, limit: int) -> Any:
    use = {"type": "tool_use", "id": "c1", "name": "grep", "input": {"limit": 3}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "a.py"}
    history: list[Any] = [{"role": "user", "content": "Where?"}]
    if rounds:
        history += [
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, use]},
            {"role": "user", "content": [result]},
        ]
    body = {"messages": history, "max_tokens": limit, "thinking": {"type": mode}}
    tool = {"tools": [{"name": "grep", "description": "", "input_schema": SCHEMA}]} if tools else {}
    reply = post(served, "/v1/messages", {**body, **tool, **({"system": SYSTEM} if system else {})})
    blocks, usage = reply["content"], reply["usage"]
    return (
        "".join(b.get("thinking", "") for b in blocks),
        "".join(b.get("text", "") for b in blocks),
        [(b["name"], b["input"]) for b in blocks if b["type"] == "tool_use"],
        (usage["input_tokens"] + usage["cache_read_input_tokens"], usage["output_tokens"]),
    )


def responses(served: Served, mode: str, tools: bool, rounds: int, system: bool, limit: int) -> Any:
    items: list[Any] = [{"role": "user", "content": "Where?"}]
    if rounds:
        thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
        call = {"type": "function_call", "call_id": "c1", "name": "grep", "arguments": '{"limit": 3}'}
        items += [thought, call, {"type": "function_call_output", "call_id": "c1", "output": "a.py"}]
    body = {"input": items, "max_output_tokens": limit, "reasoning": {"effort": THINKING[mode]}}
    tool = (
        {"tools": [{"type": "function", "name": "grep", "description": "", "parameters": SCHEMA}]}
        if tools
        else {}
    )
    reply = post(served, "/v1/responses", {**body, **tool, **({"instructions": SYSTEM} if system else {})})
    output, usage = reply["output"], reply["usage"]
    return (
        "".join(p["text"] for i in output if i["type"] == "reasoning" for p in i["content"]),
        "".join(p["text"] for i in output if i["type"] == "message" for p in i["content"]),
        [(i["name"], json.loads(i["arguments"])) for i in output if i["type"] == "function_call"],
        (usage["input_tokens"], usage["output_tokens"]),
    )


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_taught_agent_says_the_same(taught: Served, rounds: int):
    asked = ("adaptive", True, rounds, False, 100)
    told = chat(taught, *asked)
    assert told[:3] == (("hm", "", [("grep", {"limit": 3})]), ("ah", FOUND, []))[rounds]
    assert told == messages(taught, *asked) == responses(taught, *asked)


@pytest.mark.parametrize("mode", THINKING)
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("tools", [False, True])
def test_a_random_model_says_the_same(served: Served, mode: str, system: bool, tools: bool):
    asked = (mode, tools, 0, system, 30)
    told = chat(served, *asked)
    assert told[3][1] > 0
    assert told == responses(served, *asked)
    if mode != "enabled":  # the smallest budget of thinking is more than this limit
        assert told == messages(served, *asked)
