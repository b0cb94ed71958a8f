"""The Responses dialect as bytes: order of events, what is refused, the store's bounds."""

import itertools
import json
import re
from typing import Any

import pytest

from longforge.chat.parser import Delta
from longforge.protocol import ToolCall
from longforge.server.responses.events import ItemEvents
from longforge.server.responses.reply import Reply
from longforge.server.responses.store import ResponseStore, Stored
from longforge.server.responses.wire import ResponsesRequest
from small_server import FOUND, HTTP, Served

JSON = {"content-type": "application/json"}
TOOL = {
    "type": "function",
    "name": "grep",
    "description": "",
    "parameters": {"type": "object", "properties": {"limit": {"type": "integer"}}},
}
ASK: dict[str, Any] = {"model": "small", "input": "Where?", "tools": [TOOL]}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
CALL = {"type": "function_call", "call_id": "c1", "name": "grep", "arguments": '{"limit": 3}'}
OUTPUT = {
    "type": "function_call_output",
    "call_id": "c1",
    "output": [{"type": "input_text", "text": "a.py"}],
}
USER = {"role": "user", "content": "Where?"}


def post(served: Served, **fields: Any) -> Any:
    return HTTP.post(f"{served.url}/v1/responses", content=json.dumps({**ASK, **fields}), headers=JSON)


def events(served: Served, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream; checks names and numbers."""
    reply = post(served, stream=True, **fields)
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = []
    for chunk in reply.text.strip().split("\n\n"):
        name, data = chunk.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def shape(stream: list[dict[str, Any]]) -> list[str]:
    names = [event["type"].removeprefix("response.") for event in stream]
    return [name for name, _ in itertools.groupby(names)]


REASONING = [
    "output_item.added",
    "content_part.added",
    "reasoning_text.delta",
    "reasoning_text.done",
    "content_part.done",
    "output_item.done",
]


def test_a_call_streams_in_the_order_of_the_dialect(taught: Served):
    stream = events(taught)
    assert shape(stream) == [
        "created",
        "in_progress",
        *REASONING,
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    added = [event for event in stream if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == [0, 1]
    assert added[1]["item"]["arguments"] == "" and added[1]["item"]["status"] == "in_progress"
    ids = {event["item_id"] for event in stream if "item_id" in event}
    assert ids == {event["item"]["id"] for event in added}
    assert stream[0]["response"]["output"] == [] and stream[0]["response"]["status"] == "in_progress"
    done = [event["item"] for event in stream if event["type"] == "response.output_item.done"]
    assert stream[-1]["response"]["output"] == done
    assert json.loads(done[1]["arguments"]) == {"limit": 3}


def test_text_streams_in_the_order_of_the_dialect(taught: Served):
    stream = events(taught, input=[USER, THOUGHT, CALL, OUTPUT])
    assert shape(stream) == [
        "created",
        "in_progress",
        *REASONING,
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    deltas = [event["delta"] for event in stream if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == FOUND and "\ufffd" not in "".join(deltas)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 2}, "n: this server does not support the field"),
        ({"input": []}, "input.*at least 1"),
        ({"input": [{"role": "wizard", "content": ""}]}, "input.*role.*wizard"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.*item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "text only"),
        ({"input": [USER, CALL]}, "result for the call 'c1', got none"),
        ({"input": [USER, OUTPUT]}, "got one for 'c1', which is none"),
        ({"input": [USER, {**CALL, "arguments": "[3"}, OUTPUT]}, "'grep'.*JSON object"),
        ({"temperature": -1}, "temperature: .*got -1"),
        ({"truncation": "auto"}, "truncation: .*'disabled'"),
        ({"include": ["message.output_text.logprobs"]}, r"include\[0\]: .*encrypted_content"),
        ({"tools": [{"type": "web_search"}]}, "got 'web_search'; this server has no tools"),
        (
            {"tools": [{"type": "function", "name": "ls"}] * 2},
            "^tools: expected different names, got 'ls' twice",
        ),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary: .*'auto'"),
        ({"text": {"format": {"type": "json_schema"}}}, "a schema belongs to type 'json_schema'"),
        ({"tool_choice": {"type": "function", "name": "ls"}}, "'ls': no such tool"),
        ({"tool_choice": "required", "tools": []}, "a call is required, but there are no tools"),
        ({"background": True, "stream": True}, "background: expected no stream"),
        ({"background": True, "store": False}, "background: expected store"),
        ({"stream_options": {}}, "stream_options needs stream"),
        ({"input": "\ud800"}, "lone surrogate"),
        ({"input": "word " * 900}, "at most 1024 tokens fit .* got [0-9]{4}"),
    ],
)
def test_what_is_not_served_is_refused_in_one_line(taught: Served, fields: dict[str, Any], message: str):
    reply = post(taught, **fields)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert re.search(message, error["message"]), error["message"]


def test_an_unknown_response_before_it_is_a_404_with_its_code(taught: Served):
    reply = post(taught, previous_response_id="resp_x")
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")


def test_text_that_comes_inside_a_call_waits_for_its_end():
    call = ToolCall("grep", {}, "c1")
    machine = ItemEvents()
    deltas = [
        Delta("call_start", call=call),
        Delta("content", "late"),
        Delta("call_arguments", "{}"),
        Delta("call_end", call=call),
    ]
    kinds = [event["type"] for event in [*machine.push(deltas), *machine.finish(cut=False)]]
    assert [item["type"] for item in machine.output] == ["function_call", "message"]
    assert kinds.index("response.function_call_arguments.done") < kinds.index("response.output_text.delta")
    assert machine.output[1]["content"][0]["text"] == "late"


def test_nothing_at_all_is_one_empty_message():
    machine = ItemEvents(drops_empty=True)
    made = [*machine.push([Delta("thinking")]), *machine.finish(cut=False)]
    assert made and [item["type"] for item in machine.output] == ["message"]
    assert machine.output[0]["content"][0]["text"] == ""


def entry(text: str = "", ended: list[str] | None = None) -> Stored:
    reply = Reply(ResponsesRequest(model="small", input="Where?"))
    cancel = (lambda: ended.append(reply.id)) if ended is not None else (lambda: None)
    return Stored(reply, ({"text": text},), 1, cancel)


def test_the_store_forgets_the_least_recently_used():
    store = ResponseStore(limit=2)
    ended: list[str] = []
    first, second, third = (entry(ended=ended) for _ in range(3))
    store.put("ann", first)
    store.put("ann", second)
    assert store.get("ann", first.reply.id) is first
    store.put("ann", third)
    assert store.get("ann", second.reply.id) is None and ended == [second.reply.id]
    assert store.get("ann", first.reply.id) is first and store.get("bob", first.reply.id) is None
    assert store.delete("ann", third.reply.id) and not store.delete("ann", third.reply.id)
    assert len(store) == 1


def test_the_store_is_bounded_by_what_it_holds():
    store = ResponseStore(characters=30_000)
    for _ in range(20):
        store.put("", entry("x" * 5000))
        assert 1 <= len(store) <= 5
    store.put("", entry("x" * 40_000))
    assert len(store) == 0
    small = entry()
    store.put("", small)
    small.reply.output.append({"text": "x" * 40_000})
    store.grew("", small)
    assert len(store) == 0
    store.grew("", small)
    assert len(store) == 0
