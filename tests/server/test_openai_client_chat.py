"""Chat Completions, every field, asked by the official client, streaming and not."""

import json
from typing import Any

import pytest

from small_server import HTTP

USER = {"role": "user", "content": "Where?"}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "grep", "parameters": {"type": "object"}}}]


def ask(server: Any, **fields: Any) -> Any:
    body = {"model": "small", "messages": [USER], "max_tokens": 8, **fields}
    return server.client.chat.completions.create(**body)


def streamed(server: Any, **fields: Any) -> list[Any]:
    return list(ask(server, stream=True, **fields))


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    deltas = [choice.delta.model_dump() for choice in choices]
    return "".join((d.get("reasoning") or "") + "|" + (d.get("content") or "") for d in deltas)


IDS = {"extra_body": {"return_token_ids": True}}


def test_several_choices_differ_and_repeat_with_their_seed(served: Any):
    fields = {"n": 3, "seed": 7, **IDS}
    first, second = ask(served, **fields), ask(served, **fields)
    ids = [choice.token_ids for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert ids == [choice.token_ids for choice in second.choices]
    assert len({tuple(one) for one in ids}) == 3
    assert ids[0] == ask(served, seed=7, **IDS).choices[0].token_ids, "the first has the request's own seed"
    assert first.usage.completion_tokens == sum(map(len, ids))
    assert first.usage.prompt_tokens == len(first.prompt_token_ids), "the prompt counts once"


def test_streamed_choices_carry_their_index_and_add_up_to_the_whole_ones(served: Any):
    fields = {"n": 3, "seed": 7, **IDS}
    whole = ask(served, **fields)
    chunks = streamed(served, **fields)
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert [value for c in mine for value in c.token_ids] == choice.token_ids
        assert [value for c in mine for value in c.weight_versions] == choice.weight_versions
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert mine[0].prompt_token_ids == choice.prompt_token_ids == whole.prompt_token_ids


def test_logprobs_are_the_models_and_their_bytes_are_the_text(served: Any):
    fields = {"logprobs": True, "top_logprobs": 4, "seed": 3, "max_tokens": 24, **IDS}
    choice = ask(served, **fields).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == len(choice.token_ids)
    raw = b"".join(bytes(entry.bytes) for entry in entries)
    ended = choice.finish_reason == "stop"
    assert raw.decode(errors="replace") == served.tokenizer.decode(
        choice.token_ids[:-1] if ended else choice.token_ids
    )
    for entry in entries:
        top = [other.logprob for other in entry.top_logprobs]
        assert len(top) == 4 and top == sorted(top, reverse=True) and entry.logprob <= top[0] <= 0
    chunks = streamed(served, **fields)
    later = [e for chunk in chunks for c in chunk.choices if c.logprobs for e in c.logprobs.content]
    assert [entry.bytes for entry in later] == [entry.bytes for entry in entries]
    assert [e.logprob for e in later] == pytest.approx([e.logprob for e in entries], abs=1e-5)


def test_logprobs_of_a_character_in_pieces_reassemble_it(taught: Any):
    history = [
        USER,
        {
            "role": "assistant",
            "reasoning": "hm",
            "tool_calls": [{"id": "x", "function": {"name": "grep", "arguments": '{"limit": 3}'}}],
        },
        {"role": "tool", "tool_call_id": "x", "content": "a.py"},
    ]
    tools = [{"type": "function", "function": {"name": "grep", "parameters": GREP}}]
    choice = ask(taught, messages=history, tools=tools, logprobs=True, max_tokens=64).choices[0]
    raw = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert choice.message.content == "café ☕" and raw.decode().endswith("café ☕")
    assert choice.logprobs.content[-1].token == "[e~[" and choice.logprobs.content[-1].bytes == []


GREP = {"type": "object", "properties": {"limit": {"type": "integer"}}}


def test_thinking_comes_under_every_name(taught: Any):
    tools = [{"type": "function", "function": {"name": "grep", "parameters": GREP}}]
    fields = {"tools": tools, "max_tokens": 64, "extra_body": {"reasoning_split": True}}
    message = ask(taught, **fields).choices[0].message
    assert message.reasoning_content == message.reasoning == "hm"
    assert [detail["text"] for detail in message.reasoning_details] == ["hm"]
    deltas = [c.delta for chunk in streamed(taught, **fields) for c in chunk.choices]
    for name in ("reasoning_content", "reasoning"):
        assert "".join(getattr(delta, name, None) or "" for delta in deltas) == "hm"
    details = [detail for delta in deltas for detail in getattr(delta, "reasoning_details", None) or ()]
    assert "".join(detail["text"] for detail in details) == "hm"
    plain = ask(taught, tools=tools, max_tokens=64).choices[0].message
    assert "reasoning_details" not in plain.model_dump()


def test_usage_tells_thinking_and_cached_tokens(taught: Any):
    tools = [{"type": "function", "function": {"name": "grep", "parameters": GREP}}]
    whole = ask(taught, tools=tools, max_tokens=64)
    thinking = whole.usage.completion_tokens_details.reasoning_tokens
    assert 0 < thinking < whole.usage.completion_tokens
    assert whole.usage.prompt_tokens_details.cached_tokens >= 0
    chunks = streamed(taught, tools=tools, max_tokens=64, stream_options={"include_usage": True})
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == thinking


def test_usage_may_come_with_every_chunk(served: Any):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = streamed(served, seed=1, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == counts[-2] > 0


@pytest.mark.parametrize(
    ("switch", "mode"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, "disabled"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "enabled"),
        ({"chat_template_kwargs": {"thinking_mode": "disabled"}}, "disabled"),
        ({"reasoning_effort": "none"}, "disabled"),
        ({"reasoning_effort": "high"}, "adaptive"),
        ({}, "adaptive"),
    ],
)
def test_every_switch_of_thinking_reaches_the_template(served: Any, switch: dict[str, Any], mode: str):
    body = {"max_tokens": 1, "return_token_ids": True}
    asked = ask(served, extra_body={**body, **switch})
    expected = ask(served, extra_body={**body, "thinking": {"type": mode}})
    assert asked.prompt_token_ids == expected.prompt_token_ids


def test_labels_are_accepted_and_change_nothing(served: Any):
    labels = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    labelled = ask(served, seed=5, **labels, **IDS).choices[0].token_ids
    assert labelled == ask(served, seed=5, **IDS).choices[0].token_ids


def test_ignoring_the_end_goes_on_to_the_limit(taught: Any):
    ended = ask(taught, max_tokens=90)
    longer = ask(taught, max_tokens=90, extra_body={"ignore_eos": True})
    assert ended.choices[0].finish_reason == "stop" and ended.usage.completion_tokens < 90
    assert longer.choices[0].finish_reason == "length" and longer.usage.completion_tokens == 90


def test_the_selected_blocks_are_told_with_each_chunk(served: Any):
    chunks = streamed(served, seed=1, extra_body={"report_blocks": True})
    reports = [chunk.longforge for chunk in chunks if hasattr(chunk, "longforge")]
    assert reports and {report["block_size"] for report in reports} == {4}
    assert all(not hasattr(chunk, "longforge") for chunk in streamed(served, seed=1))


def test_the_newest_token_selects_at_least_its_own_block(served: Any):
    chunks = streamed(served, seed=1, extra_body={"report_blocks": True, "return_token_ids": True})
    reports = [chunk.longforge for chunk in chunks if hasattr(chunk, "longforge")]
    prompt = len(chunks[0].prompt_token_ids)
    assert all(len(report["blocks"]) >= prompt // 4 and report["blocks"][-1] > 0 for report in reports)


def greedy(served: Any, **fields: Any) -> Any:
    extra = fields.pop("extra_body", {})
    body = {"return_token_ids": True, **extra}
    return ask(served, temperature=0, **fields, extra_body=body).choices[0].token_ids


def test_a_bias_forbids_and_forces_a_token(served: Any):
    ids = greedy(served)
    assert ids[0] not in greedy(served, logit_bias={str(ids[0]): -100})
    assert set(greedy(served, logit_bias={"17": 100})) == {17}


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 50}}]
)
def test_a_penalty_makes_an_answer_repeat_itself_less(served: Any, penalty: dict[str, Any]):
    plain = greedy(served, max_tokens=60)
    varied = greedy(served, max_tokens=60, **penalty)
    assert len(set(varied)) > len(set(plain))


def test_min_p_of_one_is_greedy(served: Any):
    body = {"min_p": 1, "return_token_ids": True}
    assert ask(served, seed=9, extra_body=body).choices[0].token_ids == greedy(served)


def test_an_answer_does_not_end_before_min_tokens(taught: Any):
    answer = ask(taught, max_tokens=60, extra_body={"min_tokens": 50})
    assert answer.usage.completion_tokens >= 50


CALLS = {"tools": TOOLS, "max_tokens": 200}
NAMED = {"type": "function", "function": {"name": "grep"}}


@pytest.mark.parametrize(("choice", "finish"), [("required", "tool_calls"), (NAMED, "stop")])
def test_a_required_call_comes_and_tells_it_as_openai_does(served: Any, choice: Any, finish: str):
    answer = ask(served, **CALLS, seed=1, tool_choice=choice, parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in answer.message.tool_calls] == ["grep"]
    assert isinstance(json.loads(answer.message.tool_calls[0].function.arguments), dict)
    assert answer.finish_reason == finish
    chunks = streamed(served, **CALLS, seed=1, tool_choice=choice, parallel_tool_calls=False)
    assert chunks[-1].choices[0].finish_reason == finish


def test_content_follows_the_schema_asked_for(served: Any):
    schema = {
        "type": "object",
        "properties": {"found": {"type": "boolean"}},
        "required": ["found"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    fields = {"max_tokens": 200, "seed": 1, "reasoning_effort": "none"}
    answer = ask(served, response_format=form, **fields)
    assert isinstance(json.loads(answer.choices[0].message.content)["found"], bool)
    free = ask(served, response_format={"type": "json_object"}, **fields).choices[0]
    assert free.finish_reason == "length" or isinstance(json.loads(free.message.content), dict)
    text = ask(served, response_format={"type": "text"}, **fields, **IDS).choices[0].token_ids
    assert text == ask(served, **fields, **IDS).choices[0].token_ids


def test_a_form_that_is_not_served_is_refused_before_anything_streams(served: Any):
    body = {"model": "small", "messages": [USER], "stream": True, "max_tokens": 1}
    deep: Any = {}
    for _ in range(101):
        deep = {"items": deep}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": deep}}
    reply = HTTP.post(f"{served.url}/v1/chat/completions", json={**body, "response_format": form})
    assert reply.status_code == 400 and "at most 100 levels" in reply.json()["error"]["message"]
    form["json_schema"]["schema"] = {"enum": ["a" * 300_000]}
    reply = HTTP.post(f"{served.url}/v1/chat/completions", json={**body, "response_format": form})
    assert reply.status_code == 400 and "at most 262144 characters" in reply.json()["error"]["message"]
