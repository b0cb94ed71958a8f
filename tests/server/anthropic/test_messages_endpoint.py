"""The Messages dialect, asked by the official client: thinking, tools, streams, stops, usage."""

import json
from typing import Any

import anthropic
import pytest

from small_server import FOUND, HTTP, Served

USER: Any = {"role": "user", "content": "Where?"}
TOOLS: Any = [
    {
        "name": "grep",
        "description": "",
        "input_schema": {"type": "object", "properties": {"limit": {"type": "integer"}}},
    }
]
SAMPLING = ("temperature", "top_p", "top_k")
ADAPTIVE: Any = {"type": "adaptive"}


def client(served: Served, path: str = "") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url + path, api_key="none", max_retries=0)


def ask(taught: Served, **fields: Any) -> Any:
    """What the taught model was taught is the adaptive prompt."""
    return client(taught).messages.create(**body(**fields))


def body(**fields: Any) -> dict[str, Any]:
    """What the client is called with; it has no arguments for sampling any more, the dialect has."""
    base = {"model": "small", "max_tokens": 100, "messages": [USER], "tools": TOOLS, "thinking": ADAPTIVE}
    sampling = {name: fields.pop(name) for name in SAMPLING if name in fields}
    named = {name: value for name, value in {**base, **fields}.items() if value is not None}
    return {**named, "extra_body": {**sampling, **fields.get("extra_body", {})}} if sampling else named


def second_round(first: Any) -> list[Any]:
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "a.py"}
    return [USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]


def test_an_agent_thinks_calls_a_tool_and_answers_from_its_result(taught: Served):
    first = ask(taught)
    assert [block.type for block in first.content] == ["thinking", "tool_use"]
    assert first.content[0].thinking == "hm"
    assert (first.content[1].name, first.content[1].input) == ("grep", {"limit": 3})
    assert (first.type, first.role, first.stop_reason, first.stop_sequence) == (
        "message",
        "assistant",
        "tool_use",
        None,
    )
    second = ask(taught, messages=second_round(first))
    assert [block.type for block in second.content] == ["thinking", "text"]
    assert (second.content[0].thinking, second.content[1].text) == ("ah", FOUND)
    assert second.stop_reason == "end_turn"


def test_the_second_prompt_extends_the_first_and_its_answer(taught: Served):
    first = ask(taught)
    second = ask(taught, messages=second_round(first))
    before = first.usage.input_tokens + first.usage.cache_read_input_tokens + first.usage.output_tokens
    rendered = second.usage.input_tokens + second.usage.cache_read_input_tokens
    without = [USER, {"role": "assistant", "content": first.content[1:]}, second_round(first)[2]]
    short = client(taught).messages.count_tokens(**count_body(messages=without)).input_tokens
    assert short < rendered and before < rendered


def count_body(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in body(**fields).items() if name != "max_tokens"}


@pytest.mark.parametrize("path", ["", "/anthropic"])
def test_tokens_are_counted_without_answering(taught: Served, path: str):
    counted = client(taught, path).messages.count_tokens(**count_body()).input_tokens
    usage = client(taught, path).messages.create(**body(max_tokens=1)).usage
    assert counted == usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens


def test_the_clients_own_stream_helper_builds_the_same_message(taught: Served):
    whole = ask(taught)
    with client(taught).messages.stream(**body()) as stream:
        final = stream.get_final_message()
    assert [b.type for b in final.content] == ["thinking", "tool_use"]
    assert final.content[0].thinking == whole.content[0].thinking  # pyright: ignore
    assert final.content[0].signature == whole.content[0].signature  # pyright: ignore
    assert final.content[1].input == whole.content[1].input  # pyright: ignore
    assert (final.stop_reason, final.usage.output_tokens) == ("tool_use", whole.usage.output_tokens)
    with client(taught).messages.stream(**body(messages=second_round(whole))) as stream:
        text = "".join(stream.text_stream)
    assert text == FOUND


def test_without_the_thinking_field_the_model_is_told_not_to_think(served: Served):
    lengths = {
        str(thinking): client(served)
        .messages.count_tokens(**count_body(thinking=thinking, tools=None))
        .input_tokens
        for thinking in (None, {"type": "disabled"}, ADAPTIVE)
    }
    assert lengths["None"] == lengths["{'type': 'disabled'}"] != lengths[str(ADAPTIVE)]


def test_a_stop_sequence_is_named_and_cut_off(taught: Served):
    history = second_round(ask(taught))
    for stream in (False, True):
        answer = final(taught, stream, messages=history, stop_sequences=["zzz", "é ☕"])
        assert answer.content[-1].text == "caf"
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "é ☕")


def final(taught: Served, stream: bool, **fields: Any) -> Any:
    if not stream:
        return ask(taught, **fields)
    with client(taught).messages.stream(**body(**fields)) as events:
        return events.get_final_message()


@pytest.mark.parametrize("stream", [False, True])
def test_the_limit_ends_an_answer_with_max_tokens(taught: Served, stream: bool):
    answer = final(taught, stream, max_tokens=2)
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_context_is_told_apart_from_the_limit(served: Served, stream: bool):
    words = {"role": "user", "content": "x" * 900}
    fields = {"messages": [words], "tools": None, "max_tokens": 5000, "temperature": 0}
    answer = final(served, stream, **fields)
    assert answer.stop_reason in ("model_context_window_exceeded", "end_turn")
    usage = answer.usage
    total = usage.input_tokens + usage.cache_read_input_tokens + usage.output_tokens
    assert (total == 1024) == (answer.stop_reason == "model_context_window_exceeded")


def test_without_tools_or_with_choice_none_a_call_is_text(taught: Served):
    for fields in ({"tools": None}, {"tool_choice": {"type": "none"}}):
        answer = ask(taught, **fields)
        assert answer.stop_reason == "end_turn"
        assert [block.type for block in answer.content] == ["thinking", "text"]
        assert "grep" in answer.content[1].text


CHOICES: list[Any] = [
    {"type": "any"},
    {"type": "tool", "name": "grep"},
    {"type": "any", "disable_parallel_tool_use": True},
]


@pytest.mark.parametrize("choice", [*CHOICES, {"type": "auto", "disable_parallel_tool_use": True}])
def test_a_choice_of_tools_lets_the_model_think_and_call(taught: Served, choice: Any):
    answer = ask(taught, tool_choice=choice)
    assert [block.type for block in answer.content] == ["thinking", "tool_use"]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_required_call_is_all_that_a_model_can_say(served: Served, choice: Any):
    answer = ask(served, tool_choice=choice, temperature=0, thinking=None)
    assert {block.type for block in answer.content} == {"tool_use"}
    assert {block.name for block in answer.content} == {"grep"}
    if "disable_parallel_tool_use" in choice:
        assert len(answer.content) == 1


def test_an_output_format_is_obeyed(served: Served):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    answer = ask(
        served,
        tools=None,
        thinking=None,
        max_tokens=600,
        output_config={
            "format": {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}
        },
    )
    assert [block.type for block in answer.content] == ["text"]
    assert json.loads(answer.content[0].text) in ({"ok": True}, {"ok": False})


def test_a_billing_header_in_the_system_text_does_not_reach_the_prompt(served: Served):
    def count(system: Any) -> int:
        fields = count_body(system=system, tools=None)
        return client(served).messages.count_tokens(**fields).input_tokens

    plain = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    nonce = [{"type": "text", "text": "x-anthropic-billing-header: cch=a1b2c;"}, *plain]
    assert count("Be brief.") == count(plain) == count(nonce)
    assert count("x-anthropic-billing-header: cch=a1b2c;\nBe brief.") == count(plain)


def test_an_agents_usual_fields_are_taken(taught: Served):
    answer = ask(
        taught,
        metadata={"user_id": "u"},
        service_tier="auto",
        tool_choice={"type": "auto"},
        extra_headers={"anthropic-beta": "interleaved-thinking-2025-05-14"},
        extra_body={"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
    )
    assert answer.stop_reason == "tool_use"


def test_results_reach_the_model_in_the_order_of_the_calls(served: Served):
    def use(name: str) -> dict[str, Any]:
        return {"type": "tool_use", "id": name, "name": "grep", "input": {}}

    def result(name: str) -> dict[str, Any]:
        return {"type": "tool_result", "tool_use_id": name, "content": f"of {name}"}

    def text(order: list[str]) -> str:
        asked = {"role": "assistant", "content": [use("a"), use("b")]}
        answered = {"role": "user", "content": [result(name) for name in order]}
        fields = body(messages=[USER, asked, answered], max_tokens=12) | {"temperature": 0}
        reply = HTTP.post(f"{served.url}/v1/messages", json=fields)
        assert reply.status_code == 200, reply.text
        return reply.json()["content"]

    assert text(["a", "b"]) == text(["b", "a"])
