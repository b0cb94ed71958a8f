"""What a grammar of an answer allows is what the parser reads as such an answer."""

import json
import random
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constrained import write
from longforge.chat import Tokenizer, parse, train_tokenizer
from longforge.chat.constraint import Constraint, answer_grammar
from longforge.chat.tokens import EOS, Family
from longforge.engine.grammar import Grammars
from longforge.errors import InputError
from longforge.protocol import Message, ToolSpec
from small_model import small_tokenizer

TOKENIZERS = {
    "special tags": small_tokenizer(),
    "tags in plain text": train_tokenizer(["some <text> of </tags>"], 280, special_tokens=(EOS,)),
}
GRAMMARS = {name: Grammars(tokenizer, 321) for name, tokenizer in TOKENIZERS.items()}

NUMBERS = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "number"},
        {"type": "integer", "minimum": 3, "maximum": 12},
        {"type": "number", "exclusiveMinimum": -1.5},
    ]
)
STRINGS = st.sampled_from(
    [
        {"type": "string"},
        {"type": "string", "minLength": 2, "maxLength": 5},
        {"type": "string", "pattern": r"^[a-c]\d{2}$"},
        {"type": "string", "pattern": "x|/y"},
    ]
)
SCALARS = st.one_of(
    NUMBERS,
    STRINGS,
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": ["string", "null"]},
            {"type": ["integer", "boolean", "null"]},
            {"type": ["string", "integer"]},
            {"enum": ["a", "null", "1", 5, True, "\n", "two words"]},
            {"const": "x<y"},
            {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
            {},
            {"type": "object"},
            {"type": "array"},
        ]
    ),
)
NAMES = st.sampled_from(["a", "b", "item", "path", "x y", "é"])


def objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], some: list[str]) -> dict[str, Any]:
        required = [name for name in properties if name in some]
        return {"type": "object", "properties": properties, "required": required}

    return st.builds(build, st.dictionaries(NAMES, inner, max_size=3), st.lists(NAMES))


def arrays(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )


VALUES = st.recursive(SCALARS, lambda inner: st.one_of(objects(inner), arrays(inner)), max_leaves=5)
PARAMETERS = objects(
    st.one_of(VALUES, st.builds(lambda part: {"anyOf": [part, {"type": "string"}]}, objects(SCALARS)))
)


def answer(
    constraint: Constraint,
    tools: list[ToolSpec],
    family: Family,
    thinking_open: bool,
    seed: int,
    kind: str = "special tags",
) -> Message | None:
    tokenizer: Tokenizer = TOKENIZERS[kind]
    grammar = answer_grammar(constraint, tools, family, thinking_open, tokenizer)
    assert grammar is not None
    tokens = write(GRAMMARS[kind].start(grammar), tokenizer, random.Random(seed))
    return None if tokens is None else parse(tokenizer.decode(tokens[:-1]), family, tools, thinking_open)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(PARAMETERS, min_size=1, max_size=2),
    st.sampled_from(["m2", "m3"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(sorted(TOKENIZERS)),
    st.integers(0, 99),
)
def test_whatever_is_written_under_required_calls_is_read_as_calls_of_the_schemas(
    schemas: list[dict[str, Any]], family: Family, thinking_open: bool, parallel: bool, kind: str, seed: int
) -> None:
    tools = [ToolSpec(f"tool_{place}", "", schema) for place, schema in enumerate(schemas)]
    message = answer(Constraint("required", None, parallel), tools, family, thinking_open, seed, kind)
    if message is None:
        return
    assert message.content == ""
    assert len(message.tool_calls) >= 1
    assert parallel or len(message.tool_calls) == 1
    by_name = {tool.name: tool.parameters for tool in tools}
    for call in message.tool_calls:
        problems = list(jsonschema_rs.iter_errors(by_name[call.name], call.arguments))
        assert not problems, (call, problems)
        assert call.arguments.keys() <= by_name[call.name]["properties"].keys()


TOOL = ToolSpec(
    "look", "", {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
)
OTHER = ToolSpec("count", "", {"type": "object", "properties": {"n": {"type": "integer"}}})


def accepts(grammar: Any, text: str, kind: str = "special tags") -> bool:
    """Whether the text, with its special tokens, is an answer that may stop there."""
    tokenizer = TOKENIZERS[kind]
    tokens = [*tokenizer.encode(text), tokenizer.eos_id]
    masks = GRAMMARS[kind].start(grammar).masks(tokens)
    last = masks[-1][tokenizer.eos_id // 32] >> (tokenizer.eos_id % 32) & 1
    return len(masks) == len(tokens) and bool(last)


def call(name: str = "look", argument: str = "path", value: str = "x") -> str:
    prefix = "]<]minimax[>["
    inner = f"{prefix}<{argument}>{value}{prefix}</{argument}>"
    return f'{prefix}<invoke name="{name}">{inner}{prefix}</invoke>\n'


def block(*calls: str) -> str:
    return "]<]minimax[>[<tool_call>\n" + "".join(calls) + "]<]minimax[>[</tool_call>"


def grammar_of(constraint: Constraint, *tools: ToolSpec, thinking_open: bool = False, **more: Any) -> Any:
    return answer_grammar(constraint, tools, "m3", thinking_open, small_tokenizer(), **more)


def test_a_free_answer_has_no_grammar() -> None:
    assert grammar_of(Constraint(), TOOL) is None
    assert grammar_of(Constraint(parallel=False)) is None


def test_required_calls_allow_calls_of_any_tool_and_nothing_else() -> None:
    grammar = grammar_of(Constraint("required"), TOOL, OTHER)
    assert accepts(grammar, block(call(), call("count", "n", "5")))
    assert accepts(grammar, "<mm:think>well</mm:think>" + block(call()))
    assert accepts(grammar, "</mm:think>" + block(call()))
    assert not accepts(grammar, "")
    assert not accepts(grammar, "Sure." + block(call()))
    assert not accepts(grammar, block())
    assert not accepts(grammar, block(call("count", "n", "five")))
    assert not accepts(grammar, block(call("other")))
    assert not accepts(grammar, block(call()) + block(call()))


def test_a_named_tool_is_the_only_one_called() -> None:
    grammar = grammar_of(Constraint("required", tool="look", parallel=False), TOOL, OTHER)
    assert accepts(grammar, block(call()))
    assert not accepts(grammar, block(call("count", "n", "5")))
    assert not accepts(grammar, block(call(), call()))


def test_thinking_that_was_opened_is_closed_first() -> None:
    grammar = grammar_of(Constraint("required"), TOOL, thinking_open=True)
    assert accepts(grammar, "well</mm:think>" + block(call()))
    assert not accepts(grammar, block(call()))


def test_an_answer_that_may_not_think_begins_at_once() -> None:
    grammar = grammar_of(Constraint("required"), TOOL, may_think=False)
    assert accepts(grammar, block(call()))
    assert not accepts(grammar, "<mm:think>well</mm:think>" + block(call()))
    assert not accepts(grammar, "</mm:think>" + block(call()))


def test_without_parallel_calls_there_is_free_content_and_at_most_one_call() -> None:
    grammar = grammar_of(Constraint(parallel=False), TOOL)
    assert accepts(grammar, "Just <b>words</b>.")
    assert accepts(grammar, "Let me look." + block(call()))
    assert not accepts(grammar, block(call(), call()))


def test_json_content_or_calls_where_both_are_asked_for() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = grammar_of(Constraint(schema=schema), TOOL)
    assert accepts(grammar, '{"a": 1}')
    assert accepts(grammar, '{\n  "a": 1\n}')
    assert accepts(grammar, block(call()))
    assert not accepts(grammar, '{"a": "x"}')
    assert not accepts(grammar, '{"a": 1}' + block(call()))
    assert not accepts(grammar_of(Constraint(schema=schema)), block(call()))


def test_an_empty_schema_is_any_object() -> None:
    grammar = grammar_of(Constraint(schema={}))
    assert accepts(grammar, '{"a": [1, {"b": null}], "c": "<p>"}')
    assert accepts(grammar, "{}")
    assert not accepts(grammar, "[]")


def _finite(text: str) -> float:
    """JSON's numbers may be larger than a float holds."""
    return max(-1e308, min(1e308, float(text)))


JSON_SCHEMAS = st.one_of(
    objects(VALUES),
    st.just({}),
    st.just({"type": "object", "additionalProperties": {"type": ["string", "integer"]}}),
    st.just(
        {
            "$ref": "#/$defs/tree",
            "$defs": {
                "tree": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}, "inner": {"$ref": "#/$defs/tree"}},
                    "required": ["name"],
                }
            },
        }
    ),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    JSON_SCHEMAS,
    st.sampled_from(["m2", "m3"]),
    st.booleans(),
    st.sampled_from(sorted(TOKENIZERS)),
    st.integers(0, 99),
)
def test_whatever_is_written_under_a_schema_is_content_of_that_schema(
    schema: dict[str, Any], family: Family, thinking_open: bool, kind: str, seed: int
) -> None:
    message = answer(Constraint(schema=schema), [], family, thinking_open, seed, kind)
    if message is None:
        return
    assert message.tool_calls == ()
    value = json.loads(message.content, parse_float=_finite)
    assert isinstance(value, dict)
    assert not list(jsonschema_rs.iter_errors(schema, value))


def test_most_answers_come_to_an_end_so_that_the_tests_above_say_something() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "array"}},
        "required": ["a"],
    }
    tools = [ToolSpec("t", "", schema)]
    for family in ("m2", "m3"):
        ended = [answer(Constraint("required"), tools, family, True, seed) is not None for seed in range(20)]
        assert sum(ended) >= 16
        ended = [answer(Constraint(schema=schema), [], family, False, seed) is not None for seed in range(20)]
        assert sum(ended) >= 16


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "not": {"required": ["a"]}}, "not"),
        ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"type": "frog"}}}, "frog"),
        ({"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}, "#/nowhere"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, "itself"),
        ({"type": "object", "properties": {"a": {"allOf": [{"type": "string"}, {"minLength": 3}]}}}, "allOf"),
        (
            {"type": "object", "properties": {"a": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}},
            "oneOf",
        ),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "a$|^b"}}}, "pattern"),
        ({"type": "object", "properties": {"a": {"minLength": 3}}}, "minLength"),
        ({"type": "object", "properties": {"a": {"type": "string", "minLength": -3}}}, "minLength"),
        ({"type": "object", "properties": {"a>b": {}}}, "a>b"),
        ({"type": "object", "properties": {"a": {"type": "integer", "const": "5"}}}, "const"),
        ({"type": "string"}, "object"),
        ({"type": "object", "properties": {"a": 5}}, "5"),
        ({"anyOf": [{"type": "object"}, {"type": "object"}]}, "object"),
    ],
)
def test_a_tool_that_cannot_be_served_is_refused_by_name(schema: dict[str, Any], named: str) -> None:
    for family in ("m2", "m3"):
        with pytest.raises(InputError) as refused:
            answer_grammar(
                Constraint("required"), [ToolSpec("bad", "", schema)], family, False, small_tokenizer()
            )
        assert "bad" in str(refused.value)
        assert named in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_schema_too_deep_or_too_large_is_refused() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(10_000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InputError, match="too large"):
        grammar_of(Constraint("required"), ToolSpec("t", "", {"type": "object", "properties": {"a": deep}}))
    with pytest.raises(InputError, match="deeper"):
        grammar_of(Constraint(schema=deep))
    doubling = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
    bomb = {"type": "object", "properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": {**doubling, "d30": {}}}
    with pytest.raises(InputError, match="too large"):
        grammar_of(Constraint("required"), ToolSpec("t", "", bomb))


@pytest.mark.parametrize(
    ("constraint", "tools", "message"),
    [
        (Constraint("required"), [], "no tools"),
        (Constraint("required", tool="nope"), [TOOL], "nope"),
        (Constraint("required", schema={}), [TOOL], "response_format"),
    ],
)
def test_constraints_that_contradict_the_tools_are_refused(
    constraint: Constraint, tools: list[ToolSpec], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        grammar_of(constraint, *tools)
