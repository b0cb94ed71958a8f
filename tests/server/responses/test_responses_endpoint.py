"""The Responses dialect, asked by the official client: thinking, tools, streams, the store, background."""

import json
import time
from typing import Any

import openai
import pytest

from small_server import FOUND, HTTP, Served

TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "grep",
        "description": "",
        "parameters": {"type": "object", "properties": {"limit": {"type": "integer"}}},
        "strict": False,
    }
]


def ask(served: Served, **fields: Any) -> Any:
    named = {"model": "small", "input": "Where?", "tools": TOOLS, "max_output_tokens": 100, **fields}
    return served.client.responses.create(**{k: v for k, v in named.items() if v is not None})


def output_of(first: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "a.py"}


def test_an_agent_thinks_calls_a_function_and_answers_from_its_result(taught: Served):
    first = ask(taught)
    assert [item.type for item in first.output] == ["reasoning", "function_call"]
    assert first.output[0].content[0].text == "hm"
    call = first.output[1]
    assert (call.name, json.loads(call.arguments), call.status) == ("grep", {"limit": 3}, "completed")
    assert first.status == "completed" and first.error is None and first.incomplete_details is None
    history = [{"role": "user", "content": "Where?"}, *first.output, output_of(first)]
    second = ask(taught, input=history)
    assert [item.type for item in second.output] == ["reasoning", "message"]
    assert second.output_text == FOUND and second.output[0].content[0].text == "ah"
    usage = second.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_continued_by_its_id(taught: Served, stream: bool):
    first = final(taught, stream)
    second = final(taught, stream, input=[output_of(first)], previous_response_id=first.id)
    assert second.output_text == FOUND and second.previous_response_id == first.id
    third = ask(taught, input="Where?", previous_response_id=second.id)
    assert third.usage.input_tokens > second.usage.input_tokens


def final(served: Served, stream: bool, **fields: Any) -> Any:
    if not stream:
        return ask(served, **fields)
    named = {"model": "small", "input": "Where?", "tools": TOOLS, "max_output_tokens": 100, **fields}
    with served.client.responses.stream(**named) as events:
        return events.get_final_response()


def test_the_clients_own_stream_helper_builds_the_same_response(taught: Served):
    whole, streamed = ask(taught), final(taught, True)
    assert [item.type for item in streamed.output] == [item.type for item in whole.output]
    assert streamed.output[0].content == whole.output[0].content
    assert streamed.output[1].arguments == whole.output[1].arguments
    assert streamed.usage.output_tokens_details == whole.usage.output_tokens_details
    assert streamed.usage.total_tokens == whole.usage.total_tokens


def test_instructions_are_the_system_text_and_are_not_inherited(served: Served):
    plain = ask(served, tools=None, max_output_tokens=1)
    told = ask(served, tools=None, max_output_tokens=1, instructions="word " * 20)
    more = told.usage.input_tokens - plain.usage.input_tokens
    assert more > 10
    after = [
        ask(served, tools=None, max_output_tokens=1, previous_response_id=before.id).usage.input_tokens
        for before in (plain, told)
    ]
    assert abs(after[0] - after[1]) < more / 2


def test_sealed_thinking_alone_is_enough_to_go_on(taught: Served):
    first = ask(taught, store=False, include=["reasoning.encrypted_content"])
    reasoning = first.output[0].model_dump()
    assert reasoning.pop("content") and reasoning["encrypted_content"]
    history = [{"role": "user", "content": "Where?"}, reasoning, first.output[1], output_of(first)]
    reply = taught.client.responses.with_raw_response.create(model="small", input=history, tools=TOOLS)
    assert reply.headers["longforge-thinking"] == "verified=1, unverified=0, unreadable=0"
    assert reply.parse().output_text == FOUND
    with pytest.raises(openai.NotFoundError):
        taught.client.responses.retrieve(first.id)


def test_foreign_thinking_is_no_reason_to_refuse(taught: Served):
    first = ask(taught)
    foreign = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"}
    own = {**foreign, "content": [{"type": "reasoning_text", "text": "hm"}]}
    for item, header in ((foreign, "unreadable=1"), (own, "unverified=1")):
        history = [{"role": "user", "content": "Where?"}, item, first.output[1], output_of(first)]
        reply = taught.client.responses.with_raw_response.create(model="small", input=history, tools=TOOLS)
        assert header in reply.headers["longforge-thinking"]
    assert reply.parse().output_text == FOUND


@pytest.mark.parametrize("stream", [False, True])
def test_the_limit_makes_a_response_incomplete(taught: Served, stream: bool):
    answer = ask(taught, max_output_tokens=2, stream=stream)
    if stream:
        answer = list(answer)[-1]
        assert answer.type == "response.incomplete"
        answer = answer.response
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 2
    assert answer.output[-1].status == "incomplete"


def test_effort_says_whether_to_think(taught: Served):
    tokens = {
        effort: ask(taught, max_output_tokens=1, reasoning={"effort": effort}).usage.input_tokens
        for effort in ("none", "low", "medium", "high")
    }
    assert tokens["low"] == tokens["medium"] == ask(taught, max_output_tokens=1).usage.input_tokens
    assert len({tokens["none"], tokens["low"], tokens["high"]}) == 3


@pytest.mark.parametrize("without", [{"tools": None}, {"tool_choice": "none"}])
def test_without_tools_a_call_is_text(taught: Served, without: dict[str, Any]):
    answer = ask(taught, **without)
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert "grep" in answer.output_text


CHOICES: list[Any] = ["required", {"type": "function", "name": "grep"}]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_of_tools_lets_the_model_think_and_call(taught: Served, choice: Any):
    answer = ask(taught, tool_choice=choice)
    assert [item.type for item in answer.output] == ["reasoning", "function_call"]
    assert answer.tool_choice == choice or answer.tool_choice.model_dump() == choice


@pytest.mark.parametrize("choice", CHOICES)
def test_a_required_call_is_all_that_a_model_can_say(served: Served, choice: Any):
    answer = ask(served, tool_choice=choice, temperature=0, reasoning={"effort": "none"})
    assert {(item.type, item.name) for item in answer.output} == {("function_call", "grep")}


def test_calls_may_be_one_at_a_time(taught: Served):
    answer = ask(taught, parallel_tool_calls=False)
    assert [item.type for item in answer.output].count("function_call") == 1


@pytest.mark.parametrize("kind", ["json_schema", "json_object"])
def test_a_text_format_is_obeyed(served: Served, kind: str):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    named = (
        {"name": "n", "schema": {**schema, "additionalProperties": False}} if kind == "json_schema" else {}
    )
    answer = ask(
        served,
        tools=None,
        text={"format": {"type": kind, **named}},
        reasoning={"effort": "none"},
        max_output_tokens=400,
    )
    if answer.status == "completed":
        value = json.loads(answer.output_text)
        assert list(value) == ["ok"] if named else isinstance(value, dict)


def test_a_stored_response_is_fetched_listed_and_deleted(taught: Served):
    responses = taught.client.responses
    first = ask(taught, metadata={"for": "a test"}, input=[{"role": "user", "content": "Where?"}])
    again = responses.retrieve(first.id)
    assert again.model_dump() == first.model_dump() and again.metadata == {"for": "a test"}
    second = ask(taught, input=[output_of(first)], previous_response_id=first.id)
    items = list(responses.input_items.list(second.id))
    assert [item.type for item in items] == ["function_call_output"]
    (question,) = responses.input_items.list(first.id).data
    assert question.content[0].text == "Where?"  # pyright: ignore
    responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match=r"there is none of this id"):
        responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        ask(taught, previous_response_id=first.id)
    assert ask(taught, previous_response_id=second.id, max_output_tokens=1).status == "incomplete"


def test_input_items_come_in_pages(served: Served):
    words = [{"role": "user", "content": word} for word in "abc"]
    made = ask(served, tools=None, input=words, max_output_tokens=1)
    items = served.client.responses.input_items
    first = items.list(made.id, limit=2, order="asc")
    assert [item.content[0].text for item in first.data] == ["a", "b"] and first.has_more  # pyright: ignore
    rest = items.list(made.id, after=first.data[-1].id, order="asc")  # pyright: ignore
    assert [item.content[0].text for item in rest.data] == ["c"] and not rest.has_more  # pyright: ignore
    assert [item.content[0].text for item in items.list(made.id).data] == ["c", "b", "a"]  # pyright: ignore


def test_a_background_response_is_waited_for(taught: Served):
    made = ask(taught, background=True)
    assert made.status == "in_progress" and made.background
    for _ in range(2000):
        now = taught.client.responses.retrieve(made.id)
        if now.status != "in_progress":
            break
        time.sleep(0.01)
    assert now.status == "completed" and now.output[-1].name == "grep"  # pyright: ignore
    assert taught.client.responses.cancel(made.id).status == "completed"


def test_a_background_response_is_cancelled_and_its_pages_come_back(served: Served):
    served.loop.pause()  # so that it cannot be over before it is cancelled
    try:
        made = ask(served, background=True, max_output_tokens=900, tools=None)
        assert served.client.responses.cancel(made.id).status == "cancelled"
        assert served.client.responses.retrieve(made.id).status == "cancelled"
    finally:
        served.loop.resume()
    for _ in range(2000):
        if not served.loop.open_requests and not served.loop.stats().running:
            break
        time.sleep(0.01)
    assert served.loop.open_requests == 0 and served.loop.stats().running == 0
    with pytest.raises(openai.BadRequestError, match="in the background"):
        served.client.responses.cancel(ask(served, tools=None, max_output_tokens=1).id)


def test_results_reach_the_model_in_the_order_of_the_calls(served: Served):
    def call(name: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": name, "name": "grep", "arguments": "{}"}

    def result(name: str) -> dict[str, Any]:
        return {"type": "function_call_output", "call_id": name, "output": f"of {name}"}

    def text(order: str) -> Any:
        items = [{"role": "user", "content": "Where?"}, call("a"), call("b"), *map(result, order)]
        return ask(served, input=items, temperature=0, max_output_tokens=12).output[-1].content

    assert text("ab") == text("ba")


def test_a_wrong_model_name_is_a_404_naming_both(taught: Served):
    with pytest.raises(openai.NotFoundError, match="serves 'small', got 'gpt-9'"):
        ask(taught, model="gpt-9")
    assert HTTP.get(f"{taught.url}/v1/responses/resp_none").status_code == 404
