"""Bodies: messages survive the way out and back; odd values never reach the engine raw."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from longforge.chat import render
from longforge.errors import InputError
from longforge.protocol import Message, ToolCall, ToolSpec
from longforge.server.invalid import describe_invalid
from longforge.server.json_reply import JsonReply
from longforge.server.replies import sse
from longforge.server.wire import ChatMessage, Tool, message_body, to_messages, to_tools, tool_body
from small_server import HTTP

TEXT = st.text(max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
CALLS = st.builds(
    ToolCall,
    name=st.text(min_size=1, max_size=8),
    arguments=st.dictionaries(TEXT, VALUES, max_size=3),
    id=st.text(min_size=1, max_size=6),
)


@given(TEXT, st.none() | TEXT, st.lists(CALLS, max_size=3), TEXT)
def test_messages_survive_the_way_out_and_back(
    content: str, thinking: str | None, calls: list[ToolCall], result: str
):
    messages = [Message("user", content), Message("assistant", content, thinking, tuple(calls))]
    messages += [Message("tool", result, tool_call_id=call.id) for call in calls]
    wire = json.loads(json.dumps([message_body(message) for message in messages]))
    assert to_messages([ChatMessage.model_validate(body) for body in wire]) == messages


def test_a_developer_speaks_as_the_system():
    assert to_messages([ChatMessage(role="developer", content="be brief")]) == [Message("system", "be brief")]


def test_tools_survive_the_way_out_and_back():
    tools = (
        ToolSpec("grep", "Search.", {"type": "object", "properties": {"p": {"type": "string"}}}),
        ToolSpec("x"),
    )
    assert to_tools([Tool.model_validate(tool_body(tool)) for tool in tools]) == tools


@pytest.mark.parametrize("levels", [101, 900, 100_000])
def test_arguments_nested_too_deeply_are_refused_by_name(levels: int):
    arguments = '{"a":' * levels + "1" + "}" * levels
    call = {"id": "c1", "function": {"name": "grep", "arguments": arguments}}
    message = ChatMessage.model_validate({"role": "assistant", "tool_calls": [call]})
    with pytest.raises(InputError, match=r"messages\[0\].*'grep'.*at most 100 levels"):
        to_messages([message])


def test_arguments_as_deep_as_allowed_reach_the_prompt():
    call = {"id": "c1", "function": {"name": "grep", "arguments": '{"a":' * 100 + "1" + "}" * 100}}
    message = ChatMessage.model_validate({"role": "assistant", "tool_calls": [call]})
    for family in ("m2", "m3"):
        assert "grep" in render([Message("user", "q"), *to_messages([message])], family=family)


def test_a_schema_nested_too_deeply_is_refused_by_name():
    schema: dict[str, Any] = {}
    for _ in range(100):
        schema = {"items": schema}
    with pytest.raises(ValidationError) as caught:
        Tool.model_validate({"type": "function", "function": {"name": "grep", "parameters": schema}})
    message, field = describe_invalid(caught.value.errors())
    assert message.startswith("function.parameters: expected a JSON schema of at most 100 levels")
    assert field == "function"


def test_an_event_is_one_line_of_utf8():
    assert sse({"text": "a\n☕"}) == 'data: {"text":"a\\n☕"}\n\n'.encode()


def test_half_a_character_in_what_a_model_wrote_fails_no_reply():
    body = {"arguments": '{"a": "\ud800"}'}
    assert json.loads(sse(body).removeprefix(b"data: ")) == body
    assert json.loads(JsonReply(body).body) == body


def test_extreme_numbers_do_not_hurt_the_engine(served: Any):
    extreme = {
        "top_k": 10**30,
        "seed": -(10**40),
        "temperature": 1e-300,
        "stop_token_ids": [10**30],
        "max_tokens": 3,
    }
    body = {"model": "small", "prompt": [1, 2], **extreme}
    reply = HTTP.post(f"{served.url}/v1/completions", json=body)
    assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 3
    body["max_tokens"] = 10**30
    body["stop"] = reply.json()["choices"][0]["text"][:1]
    assert (
        HTTP.post(f"{served.url}/v1/completions", json=body).json()["choices"][0]["finish_reason"] == "stop"
    )
    assert HTTP.get(f"{served.url}/health").status_code == 200


def called(*ids: str) -> ChatMessage:
    calls = [{"id": name, "function": {"name": "grep", "arguments": "{}"}} for name in ids]
    return ChatMessage.model_validate({"role": "assistant", "tool_calls": calls})


def told(name: str) -> ChatMessage:
    return ChatMessage(role="tool", tool_call_id=name, content=f"of {name}")


def test_answers_of_tools_come_in_the_order_of_their_calls():
    for order in (["a", "b", "c"], ["c", "a", "b"], ["b", "a"]):
        messages = to_messages([called("a", "b", "c"), *map(told, order)])
        assert [message.content for message in messages[1:]] == [f"of {name}" for name in sorted(order)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["a", "a"], r"messages\[3\].tool_call_id: .* no answer yet, got 'a'"),
        (["old"], r"messages\[2\].tool_call_id: .* got 'old'"),
        (["b"], r"messages\[2\]: expected an answer to the call 'a' as well"),
    ],
)
def test_answers_that_would_be_read_as_those_of_other_calls_are_refused(given: list[str], words: str):
    with pytest.raises(InputError, match=words):
        to_messages([called("old"), called("a", "b"), *map(told, given)])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_schema_with_a_number_that_json_has_not_is_refused(number: float):
    with pytest.raises(ValidationError, match="finite numbers"):
        Tool.model_validate(tool_body(ToolSpec("x", "", {"type": "number", "maximum": number})))


def test_a_strict_tool_is_refused_with_what_to_do_instead():
    body = tool_body(ToolSpec("x"))
    body["function"]["strict"] = True
    with pytest.raises(ValidationError) as refused:
        Tool.model_validate(body)
    message, _ = describe_invalid(refused.value.errors())
    assert message.startswith("function.strict: ") and message.endswith("leave the field out")
