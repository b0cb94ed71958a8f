"""Chat completions, asked by the official client: thinking, tools, streams, stops, errors."""

import json
import re
import time
from typing import Any

import openai
import pytest

from small_server import HTTP

USER = {"role": "user", "content": "Where?"}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "grep",
            "description": "",
            "parameters": {"type": "object", "properties": {"limit": {"type": "integer"}}},
        },
    }
]
FOUND = "café ☕"
JSON = {"content-type": "application/json"}


def ask(taught: Any, **fields: Any) -> Any:
    return taught.client.chat.completions.create(**{"model": "small", "messages": [USER], **fields})


def test_an_agent_calls_a_tool_and_answers_from_its_result(taught: Any):
    first = ask(taught, tools=TOOLS)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.reasoning_content == "hm"
    assert message.content is None
    assert [call.function.name for call in message.tool_calls] == ["grep"]
    assert json.loads(message.tool_calls[0].function.arguments) == {"limit": 3}
    usage = first.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "a.py"}
    second = ask(taught, tools=TOOLS, messages=[USER, message.model_dump(), result])
    assert second.choices[0].finish_reason == "stop"
    assert second.choices[0].message.content == FOUND
    assert second.choices[0].message.reasoning_content == "ah"


@pytest.mark.parametrize("dialect", ["reasoning_content", "reasoning", "reasoning_details"])
def test_thinking_is_taken_back_in_every_dialect(taught: Any, dialect: str):
    thinking = [{"type": "reasoning.text", "text": "hm"}] if dialect == "reasoning_details" else "hm"
    call = {"id": "c1", "type": "function", "function": {"name": "grep", "arguments": '{"limit": 3}'}}
    history = [
        USER,
        {
            "role": "assistant",
            "content": [{"type": "text", "text": ""}],
            dialect: thinking,
            "tool_calls": [call],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a.py"},
    ]
    assert ask(taught, tools=TOOLS, messages=history).choices[0].message.content == FOUND


def test_a_stream_adds_up_to_the_whole_answer(taught: Any):
    chunks = list(ask(taught, tools=TOOLS, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].choices == [] and chunks[-1].usage == ask(taught, tools=TOOLS).usage
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "hm"
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (calls[0].index, calls[0].function.name, calls[0].function.arguments) == (0, "grep", "")
    assert {call.index for call in calls} == {0}
    assert json.loads("".join(call.function.arguments for call in calls)) == {"limit": 3}
    assert calls[0].id.startswith("call_")


def test_a_call_is_named_before_its_arguments_are_written(taught: Any, monkeypatch: pytest.MonkeyPatch):
    step = taught.loop.engine.step

    def unhurried() -> Any:
        time.sleep(0.02)  # so that each token is read before the next one is there
        return step()

    monkeypatch.setattr(taught.loop.engine, "step", unhurried)
    chunks = list(ask(taught, tools=TOOLS, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in calls] == ["grep"] + [None] * (len(calls) - 1)
    fragments = [call.function.arguments for call in calls]
    assert fragments[0] == "" and fragments[1] == "{" and len(fragments) > 3
    assert "".join(fragments) == '{"limit": 3}'


def test_a_call_that_the_limit_cuts_off_has_valid_arguments_and_ends_with_length(taught: Any):
    whole = ask(taught, tools=TOOLS).usage.completion_tokens
    cut = 0
    for limit in range(whole - 8, whole, 3):
        choice = ask(taught, tools=TOOLS, max_tokens=limit).choices[0]
        assert choice.finish_reason == "length"
        chunks = list(ask(taught, tools=TOOLS, max_tokens=limit, stream=True))
        assert chunks[-1].choices[0].finish_reason == "length"
        parts = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        for call in choice.message.tool_calls or ():
            cut += 1
            assert json.loads(call.function.arguments) in ({}, {"limit": 3}, {"limit": "3"})
            assert "".join(part.function.arguments for part in parts) == call.function.arguments
    assert cut > 0


def test_the_clients_own_stream_helper_understands_the_stream(taught: Any):
    with taught.client.chat.completions.stream(model="small", messages=[USER], tools=TOOLS) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"limit": 3}'


def test_streamed_text_never_holds_half_a_character(taught: Any):
    called = ask(taught, tools=TOOLS).choices[0].message
    history = [
        USER,
        called.model_dump(),
        {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "a.py"},
    ]
    chunks = list(ask(taught, tools=TOOLS, messages=history, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == FOUND and "\ufffd" not in "".join(pieces)
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("without", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_a_call_is_text(taught: Any, without: dict[str, Any]):
    choice = ask(taught, **without).choices[0]
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    assert "grep" in choice.message.content


def test_stop_strings_cut_the_answer_before_them(taught: Any):
    called = ask(taught, tools=TOOLS).choices[0].message
    history = [
        USER,
        called.model_dump(),
        {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "a.py"},
    ]
    whole = ask(taught, tools=TOOLS, messages=history, stop=["é ☕", "zzz"])
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("caf", "stop")
    chunks = list(ask(taught, tools=TOOLS, messages=history, stop="é ☕", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "caf"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_limits_end_an_answer_with_length(taught: Any):
    for field in ("max_tokens", "max_completion_tokens"):
        answer = ask(taught, tools=TOOLS, **{field: 2})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 2


def test_thinking_modes_reach_the_template(taught: Any):
    lengths = {
        mode: ask(taught, max_tokens=1, extra_body={"thinking": {"type": mode}}).usage.prompt_tokens
        for mode in ("adaptive", "enabled", "disabled")
    }
    assert len(set(lengths.values())) > 1
    assert ask(taught, max_tokens=1).usage.prompt_tokens == lengths["adaptive"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_fun": {}}, "logit_fun: this server does not support the field"),
        ({"n": 65}, "n: .*64, got 65"),
        ({"temperature": -1}, "temperature: .*got -1"),
        ({"temperature": "hot"}, 'temperature: .*got "hot"'),
        ({"tool_choice": "required"}, "tool_choice: 'required' needs tools"),
        ({"tool_choice": "banana"}, "tool_choice: .*'auto', 'none' or 'required'"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "find"}}},
            "tool_choice: expected the name of an offered tool, got 'find'",
        ),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name: .*missing"),
        ({"tools": TOOLS * 2}, "tools: expected different names, got 'grep' twice"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: .*20, got 21"),
        ({"logit_bias": {"the": 1}}, "logit_bias: expected token ids as keys, got 'the'"),
        ({"logit_bias": {"5": 101}}, r"logit_bias.5: .*100, got 101"),
        ({"logit_bias": {"100000": 1}}, "logit_bias: expected token ids from 0 to 299, got 100000"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias: .*at most 1024"),
        ({"stop": ["a"] * 65}, "stop: expected at most 64 strings, got 65"),
        ({"stop": "a" * 257}, "stop: expected at most 256 characters, got 257"),
        ({"max_tokens": 3, "min_tokens": 4}, r"min_tokens: expected at most max_tokens \(3\), got 4"),
        ({"store": True}, "store: .*False"),
        ({"report_blocks": True}, "report_blocks needs stream"),
        ({"response_format": {"type": "json_schema"}}, "response_format: json_schema belongs to type"),
        (
            {"thinking": {"type": "enabled"}, "reasoning_effort": "none"},
            "expected one mode, got enabled and disabled",
        ),
        (
            {
                "tools": TOOLS,
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "response_format: a required call leaves no content",
        ),
        ({"messages": []}, "messages: .*at least 1"),
        ({"messages": [{"role": "wizard", "content": ""}]}, r"messages\[0\].role: .*got \"wizard\""),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, r"messages\[0\].name: .*not support"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"messages\[0\].content.*'text'",
        ),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: content is missing"),
        (
            {"messages": [{"role": "tool", "content": "a", "tool_call_id": "q"}]},
            r"messages\[0\].tool_call_id: .*'q'",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"stop": ""}, "stop: an empty string"),
        ({"stream_options": {}}, "stream_options needs stream"),
        (
            {"messages": [{"role": "user", "content": "word " * 900}]},
            "at most 1024 tokens fit .* got [0-9]{4}",
        ),
    ],
)
def test_what_is_not_served_is_refused_in_one_line(taught: Any, fields: dict[str, Any], message: str):
    body = {"model": "small", "messages": [USER], **fields}
    reply = HTTP.post(f"{taught.url}/v1/chat/completions", content=json.dumps(body), headers=JSON)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert re.search(message, error["message"]), error["message"]


def test_arguments_that_are_no_json_object_are_refused(taught: Any):
    call = {"id": "c1", "type": "function", "function": {"name": "grep", "arguments": "[3"}}
    with pytest.raises(openai.BadRequestError, match=r"messages\[1\].*'grep'.*JSON object"):
        ask(taught, messages=[USER, {"role": "assistant", "content": "", "tool_calls": [call]}])


def test_a_wrong_model_name_is_a_404_naming_both(taught: Any):
    with pytest.raises(openai.NotFoundError, match="serves 'small', got 'gpt-9'"):
        ask(taught, model="gpt-9")


@pytest.mark.parametrize("content", [b"{nope", b"[" * 100_000, b"", b'"text"'])
def test_a_body_that_is_no_json_object_is_refused(taught: Any, content: bytes):
    reply = HTTP.post(f"{taught.url}/v1/chat/completions", content=content, headers=JSON)
    assert reply.status_code == 400 and reply.json()["error"]["message"].count("\n") == 0
