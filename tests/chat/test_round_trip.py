"""Rendering and parsing undo each other, and the next prompt continues what was sampled."""

import json
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longforge.chat import Tokenizer, encode_prompt, parse, render, starts_in_thinking
from longforge.chat.format import call_text
from longforge.protocol import Message, ToolCall, ToolSpec

NS = "]<]minimax[>["
Typed = tuple[dict[str, Any], Any]  # a JSON schema, and a value that it allows

# Text is data here, so tags of the formats stay out of it; brackets, quotes and newlines are welcome.
text = st.text(st.sampled_from("ab <>/\n\"'[]{}é🎉0.")).filter(lambda t: "</" not in t)
names = st.text(st.sampled_from(string.ascii_letters + string.digits + "_-."), min_size=1, max_size=8).filter(
    lambda name: name not in ("think", "tool_call")  # as tags they would spell markers
)
words = st.text(st.sampled_from(string.ascii_lowercase), min_size=1, max_size=8)


SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "string": text,
    "integer": st.integers(),
    "number": st.floats(allow_nan=False, allow_infinity=False),
    "boolean": st.booleans(),
}
scalars = st.sampled_from(sorted(SCALARS)).flatmap(
    lambda kind: SCALARS[kind].map(lambda value: ({"type": kind}, value))
)


def _array(item: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    """Some values of one scalar type, or one value some times."""
    of_scalars = st.sampled_from(sorted(SCALARS)).flatmap(
        lambda kind: st.lists(SCALARS[kind], max_size=3).map(
            lambda values: ({"type": "array", "items": {"type": kind}}, values)
        )
    )
    repeated = st.tuples(item, st.integers(0, 2)).map(
        lambda made: ({"type": "array", "items": made[0][0]}, [made[0][1]] * made[1])
    )
    return of_scalars | repeated


def _object(member: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    return st.dictionaries(names, member, max_size=3).map(
        lambda members: (
            {"type": "object", "properties": {name: schema for name, (schema, _) in members.items()}},
            {name: value for name, (_, value) in members.items()},
        )
    )


typed = st.recursive(scalars, lambda inner: _array(inner) | _object(inner), max_leaves=6)
typed_arguments = _object(typed)
typed_calls = st.tuples(words, typed_arguments).map(
    lambda made: (ToolSpec(made[0], "", made[1][0]), ToolCall(made[0], made[1][1]))
)


@given(made=typed_calls)
@settings(max_examples=150)
@pytest.mark.parametrize("family", ["m2", "m3"])
def test_a_call_is_read_as_it_was_written(family, made: tuple[ToolSpec, ToolCall]) -> None:
    tool, call = made
    block = {
        "m2": "<minimax:tool_call>\n{}\n</minimax:tool_call>",
        "m3": f"{NS}<tool_call>\n{{}}\n{NS}</tool_call>",
    }
    written = block[family].replace("{}", call_text(call, family))
    message = parse(written, family, [tool])
    assert message == Message("assistant", tool_calls=(call,))


canonical = st.tuples(text, text, st.lists(typed_calls, max_size=2, unique_by=lambda made: made[0].name))


@given(made=canonical, result=text)
@settings(max_examples=100)
@pytest.mark.parametrize(
    ("family", "thinking"), [("m2", "enabled"), ("m3", "adaptive"), ("m3", "enabled"), ("m3", "disabled")]
)
def test_the_next_prompt_continues_prompt_and_answer(
    tokenizer: Tokenizer, family, thinking, made, result: str
) -> None:
    """Text for both families; for M3 token ids as well, since markers fence off every part of an answer."""
    thought, content, calls = made
    tools = [tool for tool, _ in calls]
    answer = Message(
        "assistant", content, None if thinking == "disabled" else thought, tuple(call for _, call in calls)
    )
    asked = [Message("user", "Which file?")]
    how = {"family": family, "thinking": thinking}
    prompt = render(asked, tools, **how)
    sampled = render([*asked, answer], tools, **how, add_generation_prompt=False)[
        len(prompt) : -len("[e~[\n")
    ]

    parsed = parse(sampled, family, tools, starts_in_thinking(family, thinking))
    assert parsed == answer
    results = [Message("tool", result)] * len(calls)
    following = render([*asked, parsed, *results], tools, **how)
    assert following.startswith(prompt + sampled + "[e~[\n")

    if family == "m3":
        ids = encode_prompt(tokenizer, asked, tools, **how) + tokenizer.encode(sampled + "[e~[\n")
        assert encode_prompt(tokenizer, [*asked, parsed, *results], tools, **how)[: len(ids)] == ids


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, " 5\n", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "integer"}, "5.5", "5.5"),
        ({"type": "number"}, "3.0", 3),
        ({"type": "number"}, "1e3", 1000),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "1", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "array"}, "1, 2", "1, 2"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["integer", "string"]}, "7", 7),
        ({"type": ["integer", "string"]}, "x", "x"),
        ({"anyOf": [{"type": "boolean"}, {"type": "string"}]}, "true", True),
        ({"anyOf": [{"type": "boolean"}, {}]}, "[1]", [1]),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": "true"}, "true", "true"),
        ({"$ref": "#/$defs/Size"}, "12", 12),
        ({"$ref": "#/$defs/Loop"}, "12", 12),
        ({"allOf": [{"$ref": "#/$defs/Size"}]}, "12", 12),
        ({}, "12", 12),
        ({}, "a string", "a string"),
        ({}, '"quoted"', '"quoted"'),
        (True, "12", 12),
        ({"type": 3, "anyOf": 4, "properties": 5}, "12", 12),
    ],
)
@pytest.mark.parametrize("family", ["m2", "m3"])
def test_the_schema_says_what_a_value_is(family, schema: Any, written: str, value: Any) -> None:
    definitions = {"Size": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}}
    tool = ToolSpec("f", "", {"type": "object", "properties": {"x": schema}, "$defs": definitions})
    body = {
        "m2": f'<invoke name="f"><parameter name="x">{written}</parameter></invoke></minimax:tool_call>',
        "m3": f'{NS}<invoke name="f">{NS}<x>{written}{NS}</x>{NS}</invoke>{NS}</tool_call>',
    }
    start = {"m2": "<minimax:tool_call>", "m3": f"{NS}<tool_call>"}
    (call,) = parse(start[family] + body[family], family, [tool]).tool_calls
    if family == "m2" and written.endswith("\n"):
        written = written[:-1]
    assert call.arguments == {"x": value}
    assert type(call.arguments["x"]) is type(value)


def test_null_is_none_in_m2_even_for_strings() -> None:
    tool = ToolSpec("f", "", {"type": "object", "properties": {"x": {"type": "string"}}})
    invoke = '<invoke name="f"><parameter name="x">null</parameter></invoke>'
    body = f"<minimax:tool_call>{invoke}</minimax:tool_call>"
    assert parse(body, "m2", [tool]).tool_calls[0].arguments == {"x": None}
    assert call_text(ToolCall("f", {"x": None}), "m2").count("null") == 1
    assert "<x>" not in call_text(ToolCall("f", {"x": None, "y": [None]}), "m3")


@pytest.mark.parametrize("family", ["m2", "m3"])
def test_a_call_can_be_told_with_all_its_nulls(family) -> None:
    call = ToolCall("f", {"x": None, "y": [1, None], "z": {"k": None}})
    written = call_text(call, family, nulls=True)
    block = f"{NS}<tool_call>{written}{NS}</tool_call>" if family == "m3" else f"<minimax:tool_call>{written}"
    assert written.count("null") == 3
    assert parse(block, family).tool_calls == (call,)


def test_a_tool_without_a_schema_still_gets_lists_and_objects_in_m3() -> None:
    arguments = {"names": ["a", "b"], "where": {"line": 3, "exact": True}}
    text = f"{NS}<tool_call>\n{call_text(ToolCall('unknown', arguments), 'm3')}\n{NS}</tool_call>"
    assert json.dumps(parse(text, "m3").tool_calls[0].arguments) == json.dumps(arguments)
