"""The Messages dialect as bytes: order and names of events, forms of errors."""

import itertools
import json
import re
from typing import Any

import pytest

from small_server import FOUND, HTTP, Served

JSON = {"content-type": "application/json", "x-api-key": "k", "anthropic-version": "2023-06-01"}
USER = {"role": "user", "content": "Where?"}
TOOL = {
    "name": "grep",
    "description": "",
    "input_schema": {"type": "object", "properties": {"limit": {"type": "integer"}}},
}
ASK: dict[str, Any] = {
    "model": "small",
    "max_tokens": 100,
    "messages": [USER],
    "tools": [TOOL],
    "thinking": {"type": "adaptive"},
}
USE = {"type": "tool_use", "id": "t1", "name": "grep", "input": {"limit": 3}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "a.py"}]}
TEXT = {"type": "text", "text": "a"}
THOUGHT = {"type": "thinking", "thinking": "hm"}


def rounds(*blocks: Any) -> list[Any]:
    return [USER, {"role": "assistant", "content": [*blocks, USE]}, {"role": "user", "content": [RESULT]}]


def post(served: Served, path: str = "/v1/messages", **fields: Any) -> Any:
    content = json.dumps({**ASK, **fields})
    return HTTP.post(f"{served.url}{path}", content=content, headers=JSON)


def events(served: Served, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream; checks that each has its own name."""
    reply = post(served, stream=True, **fields)
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = []
    for chunk in reply.text.strip().split("\n\n"):
        if chunk.startswith(":"):
            continue
        name, data = chunk.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def shape(stream: list[dict[str, Any]]) -> list[str]:
    """Types in order, repeated deltas once."""
    names = [
        event["delta"]["type"] if "index" in event and "delta" in event else event["type"] for event in stream
    ]
    return [name for name, _ in itertools.groupby(names)]


def test_a_call_streams_in_the_order_of_the_dialect(taught: Served):
    stream = events(taught)
    assert shape(stream) == [
        "message_start",
        "ping",
        "content_block_start",
        "thinking_delta",
        "signature_delta",
        "content_block_stop",
        "content_block_start",
        "input_json_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = stream[0]["message"]
    assert (start["type"], start["role"], start["content"]) == ("message", "assistant", [])
    assert start["stop_reason"] is None and start["usage"]["input_tokens"] > 0
    assert [event["index"] for event in stream if event["type"] == "content_block_start"] == [0, 1]
    assert [event["delta"]["type"] for event in stream if "index" in event and "delta" in event].count(
        "signature_delta"
    ) == 1
    block = next(e["content_block"] for e in stream if e.get("content_block", {}).get("type") == "tool_use")
    assert block["input"] == {} and re.fullmatch(r"[a-zA-Z0-9_-]+", block["id"])
    end = stream[-2]
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    whole = post(taught).json()
    assert end["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_text_streams_as_text_and_never_half_a_character(taught: Served):
    stream = events(taught, messages=rounds(THOUGHT))
    texts = [e["delta"]["text"] for e in stream if e.get("delta", {}).get("type") == "text_delta"]
    assert "".join(texts) == FOUND and "\ufffd" not in "".join(texts) and all(texts)
    assert stream[-2]["delta"]["stop_reason"] == "end_turn"


def test_an_answer_without_anything_is_one_empty_text(taught: Served):
    # The stop string is the whole answer, so nothing is left of it.
    history = rounds(THOUGHT)
    fields = {"messages": history, "stop_sequences": ["<mm:think>"]}
    assert shape(events(taught, **fields))[2:] == [
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert post(taught, **fields).json()["content"] == [{"type": "text", "text": ""}]


def test_thinking_that_is_not_shown_comes_back_by_its_mark(taught: Served):
    first = post(taught, thinking={"type": "adaptive", "display": "omitted"}).json()
    hidden, call = first["content"]
    assert hidden["thinking"] == "" and hidden["signature"]
    streamed = events(taught, thinking={"type": "adaptive", "display": "omitted"})
    assert "thinking_delta" not in shape(streamed) and "signature_delta" in shape(streamed)
    result = {**RESULT, "tool_use_id": call["id"]}
    history = [USER, {"role": "assistant", "content": [hidden, call]}, {"role": "user", "content": [result]}]
    reply = post(taught, messages=history)
    assert reply.headers["longforge-thinking"] == "verified=1, unverified=0, unreadable=0"
    assert reply.json()["content"][-1]["text"] == FOUND  # it was taught to say so after this very thinking


@pytest.mark.parametrize(
    ("block", "header"),
    [
        (THOUGHT, "verified=0, unverified=1, unreadable=0"),
        ({**THOUGHT, "signature": "EqQBCkYIBRgCKkCh"}, "verified=0, unverified=1, unreadable=0"),
        ({**THOUGHT, "signature": "lf1.0.AAAA"}, "verified=0, unverified=1, unreadable=0"),
        ({"type": "redacted_thinking", "data": "EqQB"}, "verified=0, unverified=0, unreadable=1"),
        ({**THOUGHT, "thinking": "", "signature": "EqQB"}, "verified=0, unverified=0, unreadable=1"),
    ],
)
def test_foreign_thinking_is_taken_and_told_apart(taught: Served, block: Any, header: str):
    reply = post(taught, messages=rounds(block))
    assert reply.status_code == 200 and reply.headers["longforge-thinking"] == header
    if block.get("thinking"):
        assert reply.json()["content"][-1]["text"] == FOUND


def test_own_thinking_is_verified_until_somebody_changes_it(taught: Served):
    block = post(taught).json()["content"][0]
    for changed, header in ((block, "verified=1"), ({**block, "thinking": "hm!"}, "verified=0")):
        reply = post(taught, messages=rounds(changed), stream=True)
        assert reply.headers["longforge-thinking"].startswith(header)
    assert "longforge-thinking" not in post(taught).headers


LONG = {"role": "user", "content": "word " * 900}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 2}, "n: this server does not support the field"),
        ({"max_tokens": None}, "max_tokens: .*valid integer, got null"),
        ({"max_tokens": 0}, "max_tokens: .*greater than or equal to 1, got 0"),
        ({"temperature": "hot"}, 'temperature: .*got "hot"'),
        ({"messages": []}, "messages: .*at least 1"),
        ({"messages": [{"role": "wizard", "content": ""}]}, r"messages\[0\].*'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image.*text only"),
        ({"messages": [{"role": "user", "content": [{"type": "poem"}]}]}, "'poem'.*'tool_result'"),
        ({"messages": [USER, {"role": "assistant", "content": "Once"}]}, "cannot be continued"),
        ({"messages": [*rounds()[:2], USER]}, r"messages\[2\].*result for the call 't1', got none"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, r"messages\[0\].*got one for 't1'"),
        (
            {"messages": [*rounds()[:2], {"role": "user", "content": [RESULT, RESULT]}]},
            "one result for the call 't1', got two",
        ),
        (
            {"messages": [*rounds()[:2], {"role": "user", "content": [TEXT, RESULT]}]},
            "tool_result blocks first",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "budget_tokens: .*1024"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "less than max_tokens .100., got 2000"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens belongs to type 'enabled'"),
        ({"tool_choice": {"type": "tool"}}, "a name belongs to type 'tool'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, r"tools\[0\]: type: .*'custom'"),
        (
            {"tools": [{"name": "grep", "input_schema": {}}] * 2},
            "tools: expected different names, got 'grep' twice",
        ),
        ({"service_tier": "priority"}, "service_tier: .*'auto'"),
        ({"stop_sequences": [""]}, r"stop_sequences\[0\].*at least 1"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"messages": [LONG]}, "at most 1024 tokens fit .* got [0-9]{4}"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_served_is_refused_in_the_dialects_form(
    taught: Served, fields: dict[str, Any], message: str, stream: bool
):
    reply = post(taught, **fields, stream=stream)
    told = reply.json()
    assert (reply.status_code, told["type"]) == (400, "error")
    assert told["error"]["type"] == "invalid_request_error"
    assert "\n" not in told["error"]["message"]
    assert re.search(message, told["error"]["message"]), told["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/anthropic/v1/messages"])
def test_a_wrong_model_name_is_a_404_naming_both(taught: Served, path: str):
    asked = {name: value for name, value in ASK.items() if "count" not in path or name != "max_tokens"}
    reply = HTTP.post(f"{taught.url}{path}", json={**asked, "model": "claude"})
    assert reply.status_code == 404
    assert reply.json()["error"] == {
        "type": "not_found_error",
        "message": "model: this server serves 'small', got 'claude'",
    }


@pytest.mark.parametrize("content", [b"{nope", b"[" * 100_000, b"", b'"text"', b"\xff"])
def test_a_body_that_is_no_json_object_is_refused(taught: Served, content: bytes):
    reply = HTTP.post(f"{taught.url}/v1/messages", content=content, headers=JSON)
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
